"""Fixtures of the tests of the Chainer adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def send(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    """Move arrays, and links in place, to the device of the test."""
    from cupynorm.chainer_import import chainer

    device = chainer.get_device("@numpy" if request.param == "cpu" else "@cupy:0")

    def to(what: Any) -> Any:
        if isinstance(what, chainer.Link):
            what.to_device(device)
            return what
        return device.send(what)

    return to


@pytest.fixture
def seeded(rng: np.random.Generator) -> None:
    """Chainer draws from NumPy's global generator."""
    np.random.seed(int(rng.integers(2**31)))
