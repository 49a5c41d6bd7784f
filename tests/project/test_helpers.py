"""The test utilities: comparisons that detect and explain differences, covering arrays, tiers, seeds, backends."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import backends, seeds, tiers
from helpers.compare import BFLOAT16, Bits, assert_same, assert_within, bits
from helpers.pairwise import covering
from helpers.recorder import Recorder

import cupynorm as cn
from cupynorm.backend import MODULES
from cupynorm.cuda.device import DEVICES

AXES: dict[str, list[Any]] = {"a": [1, 2, 3], "b": "uvwx", "c": [True, False], "d": [None, "e"]}


def held(rows: list[Any], axes: dict[str, Any]) -> set[Any]:
    return {(i, row[i], j, row[j]) for row in rows for i, j in combinations(range(len(axes)), 2)}


def test_covering_array_holds_every_pair_in_few_rows() -> None:
    rows = covering(AXES)
    assert held(rows, AXES) == held(list(product(*AXES.values())), AXES)
    assert 12 <= len(rows) == len(set(rows)) <= 15


def test_rows_of_a_lower_tier_come_first() -> None:
    rows = covering(AXES, lambda row: int(row[3] == "e" and row[0] > 1))
    ranks = [row[3] == "e" and row[0] > 1 for row in rows]
    assert ranks == sorted(ranks)
    assert held(rows, AXES) == held(list(product(*AXES.values())), AXES)
    # Only two pairs need the higher tier: (2, "e") and (3, "e").
    assert sum(ranks) == 2


def explained(call: Any, *given: Any, **named: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        call(*given, **named)
    return str(caught.value)


def test_message_of_a_failed_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    actual = np.ones((2, 3, 4), np.float32)
    actual[1, 2, 0] += 2.0**-20
    actual[0, 1, 1] -= 2.0**-22
    assert_within(actual, 1.0, 2.0**-20)
    monkeypatch.setattr("helpers.compare.LAUNCHED", ["forward_warp_registers_128x1 of forward.cu (float32)"])
    lines = explained(assert_within, actual, 1.0, 2.0**-23, "y").splitlines()
    assert lines[0].startswith("y: 2 of 24 elements of shape (2, 3, 4), float32, are off; the worst, at (1, 2, 0):")
    assert lines[1].split() == ["got", "1.000000954"]
    assert lines[2].split() == ["expected", "1"]
    assert lines[3].split("error")[1].strip() == "9.54e-07: 16 roundings of 5.96e-08"
    assert lines[4].split("bound")[1].strip() == "1.19e-07: 2 roundings of 5.96e-08"
    assert lines[5].strip() == "kernels   forward_warp_registers_128x1 of forward.cu (float32)"


def test_message_of_different_bits() -> None:
    one = np.arange(6, dtype=np.float32).reshape(2, 3)
    other = one.copy()
    other[1, 0] = -3
    before = bits(one, None, one[0])
    assert before == bits(one.copy("F"), None, one[0])
    assert Bits(np.zeros(2)) != Bits(-np.zeros(2))
    assert Bits(one) != Bits(one.astype(np.float64))
    assert Bits(one) != Bits(one.ravel())

    def compared(left: Any, right: Any) -> None:
        assert left == right

    said = explained(
        compared, {"a": (1, Bits(one)), "b": before}, {"a": (1, Bits(one)), "b": bits(other, None, one[0])}
    )
    assert "result['b'][0], bits: 1 of 6 elements of shape (2, 3), float32, are off; the worst, at (1, 0):" in said
    assert "got       3" in said and "expected  -3" in said
    one[...] = 7
    assert before == bits(np.float32([[0, 1, 2], [3, 4, 5]]), None, np.float32([0, 1, 2]))
    said = explained(compared, Bits(one), Bits(one[0]))
    assert "got float32 of shape (2, 3), expected float32 of shape (3,)" in said


@pytest.mark.parametrize("dtype", ["float16", BFLOAT16, "float32", "float64"], ids=str)
def test_comparison_of_nan_and_infinity(dtype: Any) -> None:
    values = np.array([1, np.nan, np.inf, -np.inf], dtype)
    assert_within(values, values.astype(np.longdouble), 0.0)
    for place, wrong in ((0, np.nan), (0, np.inf), (1, 1), (1, np.inf), (2, 1), (2, -np.inf), (3, np.nan)):
        other = values.copy()
        other[place] = wrong
        assert f"at ({place},)" in explained(assert_within, other, values.astype(np.longdouble), 1e30)
    too_large = np.longdouble("1e400")
    assert_within(np.array([np.inf], dtype), too_large, 0.0, overflow=True)
    assert "at (0,)" in explained(assert_within, np.array([np.inf], dtype), too_large, 1e30)
    assert_within(np.array([3], dtype), 4.0, math.nan)
    assert "at (0,)" in explained(assert_within, np.array([np.nan], dtype), 4.0, math.nan)


def test_comparison_of_bits() -> None:
    values = np.array([0.0, 1.0, np.nan], np.float32)
    assert_same(values, values.copy())
    for other in (np.array([-0.0, 1, np.nan], np.float32), np.array([0, np.nextafter(np.float32(1), 2), np.nan], "f4")):
        assert "1 of 3" in explained(assert_same, other, values)
    payload = values.copy()
    payload.view(np.uint32)[2] ^= 1
    assert "at (2,)" in explained(assert_same, payload, values)
    explained(assert_same, values.astype(np.float64), values)
    explained(assert_same, values[None], values)
    assert "1 of 3" in explained(assert_same, np.array([1, 2, 4]), np.array([1, 2, 3]))


def test_tiers_follow_from_marks_and_their_rules() -> None:
    mark = pytest.mark.full(simt=lambda given: given["dtype"] != "float32").mark
    assert tiers.rank([mark], {"backend": "simt", "dtype": "float32"}) == 0
    assert tiers.rank([mark], {"backend": "simt", "dtype": "float16"}) == 1
    assert tiers.rank([mark], {"backend": "numpy", "dtype": "float16"}) == 0
    assert tiers.rank([pytest.mark.full.mark, pytest.mark.long.mark], {}) == 1
    assert tiers.rank([pytest.mark.full.mark, pytest.mark.nightly.mark], {}) == 2


def test_one_in_four_of_many_cases_on_the_emulator_is_for_the_default_tier() -> None:
    class Item(SimpleNamespace):
        __hash__ = object.__hash__

    def items(count: int, backend: str, **closest: Any) -> list[Any]:
        same = {"function": object(), "callspec": SimpleNamespace(params={"backend": backend})}
        same |= {"iter_markers": list, "get_closest_marker": closest.get}
        return [Item(nodeid=f"test[{backend}-{number}]", **same) for number in range(count)]

    few, many = items(tiers.FEW, "simt"), items(3000, "simt")
    whole, others = items(3000, "simt", whole=True), items(3000, "numpy")
    ranks = tiers.ranks(few + many + whole + others)
    later = {item for item in ranks if ranks[item]}
    assert later < set(many)
    assert later == tiers.beyond(many, "simt")
    for part in (many[::2], many[1::2], many[::3]):
        assert 0.71 < len(later.intersection(part)) / len(part) < 0.79


def test_seeds_differ_by_name_and_by_run(monkeypatch: pytest.MonkeyPatch) -> None:
    first = seeds.seed_of("tests/test_a.py::test_b")
    assert first == seeds.seed_of("tests/test_a.py::test_b") != seeds.seed_of("tests/test_a.py::test_c")
    monkeypatch.setattr(seeds, "seed", seeds.seed)
    assert seeds.choose(str(seeds.seed + 1)) == seeds.seed
    assert seeds.seed_of("tests/test_a.py::test_b") != first
    assert seeds.choose("fresh") != seeds.choose("fresh")


def test_missing_backends_have_no_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "missing", lambda name: "no such thing" if name in ("simt", "cupy") else "")
    assert [p.values[0] for p in backends.parameters(("numpy", "simt"))] == ["numpy"]
    (absent,) = backends.parameters(("simt", "cupy"))
    assert {mark.name for mark in absent.marks} == {"absent", "simt"}


def test_launches_are_recorded_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = SimpleNamespace(prepare=lambda kernel, args, arrays: args)
    backends.note_launches(runtime, monkeypatch)
    facts = {"dtype": "float16", "kind": "channels_first", "group": "warp", "vec_size": 8, "misaligned": True}
    module = SimpleNamespace(file="forward", **facts)
    for name in ("a", "b", "a"):
        assert runtime.prepare((module, SimpleNamespace(name=name)), 7, []) == 7
    said = "of forward.cu (float16, channels_first, warp, vec_size 8, misaligned)"
    assert list(backends.LAUNCHED) == [f"b {said}", f"a {said}"]


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import cupynorm as cn
from helpers.backends import LAUNCHED, use

x = np.random.default_rng(1).normal(size=(2, 3, 5, 7)).astype(np.float32)
expected = (x - x.mean((2, 3), keepdims=True)) / np.sqrt(x.var((2, 3), keepdims=True) + 1e-5)
for name in sys.argv[2:]:
    with use(name) as backend:
        y = cn.instance_norm(x)
        place = cn.backend.MODULES["cpu"]
        print(name, backend.device, np.abs(y - expected).max() < 1e-5, "emulator" in place, len(LAUNCHED))
print(cn.backend.MODULES["cpu"])
"""


@pytest.mark.long
def test_a_script_uses_each_backend(tmp_path: Path) -> None:
    names = [name for name in ("numpy", "simt") if not backends.missing(name)]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, backends.TESTS, *names], capture_output=True, text=True, cwd=tmp_path,
        check=True, env=os.environ | {"PYTHONPATH": str(Path(cn.__file__).parents[1])},
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        *(f"{name} cpu True {name == 'simt'} {int(name == 'simt')}" for name in names),
        "cupynorm.cpu",
    ]


@pytest.mark.long
def test_blocks_of_backends_nest() -> None:
    recorder = Recorder(DEVICES["H100"])
    x = np.zeros((2, 3, 4), np.float32)
    with backends.use("simt", recorder):
        cn.instance_norm(x)
        with backends.use("numpy"):
            cn.instance_norm(x)
            assert len(recorder.steps) == 1
        cn.instance_norm(x)
        assert len(recorder.steps) == 2
    cn.instance_norm(x)
    assert len(recorder.steps) == 2


def test_unusable_backends_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="one of numpy, compiled, simt, cupy, got 'cuda'"), backends.use("cuda"):
        pass
    monkeypatch.setattr(backends, "missing", lambda name: "no compiler")
    with pytest.raises(RuntimeError, match="the backend simt is not available: no compiler"), backends.use("simt"):
        pass
    assert MODULES["cpu"] == "cupynorm.cpu"
