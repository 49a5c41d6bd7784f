"""The case table on every backend."""

from __future__ import annotations

import cases
import numpy as np
import pytest
from conftest import Backend


@pytest.mark.parametrize("case", cases.TABLE, ids=str)
def test_table(backend: Backend, case: cases.Case, rng: np.random.Generator) -> None:
    cases.check(backend, case, rng)


@pytest.mark.parametrize("case", cases.SMALL, ids=str)
def test_small(backend: Backend, case: cases.Case, rng: np.random.Generator) -> None:
    cases.check(backend, case, rng)


@pytest.mark.parametrize("case", cases.variants(), ids=str)
def test_variant(backend: Backend, case: cases.Case, rng: np.random.Generator) -> None:
    cases.check(backend, case, rng)


@pytest.mark.parametrize("case", [case for case in cases.TABLE if case.activation is None], ids=str)
def test_double_backward(backend: Backend, case: cases.Case, rng: np.random.Generator) -> None:
    cases.check_double(backend, case, rng)


@pytest.mark.parametrize("case", cases.SMALL, ids=str)
def test_double_small(backend: Backend, case: cases.Case, rng: np.random.Generator) -> None:
    cases.check_double(backend, case, rng)


@pytest.mark.parametrize("case", cases.double_variants(), ids=str)
def test_double_variant(backend: Backend, case: cases.Case, rng: np.random.Generator) -> None:
    cases.check_double(backend, case, rng)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases.epilogue_variants(), ids=str)
def test_epilogue_variant(backend: Backend, case: cases.Case, rng: np.random.Generator) -> None:
    cases.check(backend, case, rng)
