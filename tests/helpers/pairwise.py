"""Covering arrays: few rows of a product of parameters that hold every pair of values.

Most faults that depend on parameters at all depend on one or two of them; the whole product is for the nightly tier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest

from . import tiers

Row = tuple[Any, ...]


def pairwise(**axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrise a test with rows of the product of these axes that hold each pair of values, on each backend.

    Rows that the test's own rules put into a lower tier come first; a higher tier adds rows for missing pairs only.
    """
    return pytest.mark.pairwise(**axes)


def covering(axes: dict[str, Sequence[Any]], rank: Callable[[Row], int] = lambda row: 0) -> list[Row]:
    """Return rows that hold every pair of values of two axes: first rows of rank 0 only, then up to rank 1, …

    Greedy: each next row holds the most missing pairs, and is the first of these in the product's order.
    """
    rows = list(product(*axes.values()))
    places = np.array(list(product(*(range(len(values)) for values in axes.values()))))
    columns, count = [], 0
    for i, j in combinations(range(len(axes)), 2):
        sizes = places[:, i].max() + 1, places[:, j].max() + 1
        columns.append(count + places[:, i] * sizes[1] + places[:, j])
        count += sizes[0] * sizes[1]
    pairs, missing = np.stack(columns, 1), np.ones(count, bool)
    ranks = np.array([rank(row) for row in rows])
    chosen: list[Row] = []
    for allowed in np.unique(ranks):
        while True:
            gained = missing[pairs].sum(1) * (ranks <= allowed)
            best = int(gained.argmax())
            if not gained[best]:
                break
            missing[pairs[best]] = False
            chosen.append(rows[best])
    return chosen


def parametrize(metafunc: pytest.Metafunc, backends: Sequence[Any]) -> None:
    """Generate the tests of a function marked with `pairwise`. backends: the parameters of `backend`, if it is used."""
    mark = metafunc.definition.get_closest_marker("pairwise")
    assert mark is not None
    axes, marks = dict(mark.kwargs), list(metafunc.definition.iter_markers())
    parameters = []
    for backend in backends or [None]:
        before = backend.values if backend else ()

        def rank(row: Row, before: Row = before) -> int:
            names = [*["backend"] * len(before), *axes]
            return tiers.rank(marks, dict(zip(names, (*before, *row), strict=True)))

        chosen = covering(axes, rank)
        rest = [row for row in product(*axes.values()) if row not in chosen] if tiers.asked == "nightly" else []
        for row in chosen + rest:
            extra = [*(backend.marks if backend else ()), *([] if row in chosen else [pytest.mark.nightly])]
            values = (*before, *row)
            parameters.append(pytest.param(*values, marks=extra, id="-".join(map(str, values))))
    metafunc.parametrize(
        [*(["backend"] if backends else []), *axes], parameters, indirect=["backend"] if backends else False
    )
