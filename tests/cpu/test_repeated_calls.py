"""Calls on arrays with the facts of an earlier call: its checks hold for them, but for those of addresses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.backends import on_cpu
from helpers.compare import assert_same, assert_within

import cupynorm as cn
from cupynorm import cpu, functional

pytestmark = [pytest.mark.usefixtures("way"), on_cpu]
SHAPE = (2, 3, 5, 7)


def per_channel(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float64)[:, None, None]


def call(rng: np.random.Generator, channels_last: bool) -> dict[str, Any]:
    x, residual = (rng.normal(size=SHAPE).astype(np.float32) for _ in range(2))
    if channels_last:
        x = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    weight, bias, mean, var = rng.uniform(0.5, 2, (4, 3)).astype(np.float32)
    return {
        "input": x, "residual": residual, "weight": weight, "bias": bias, "running_mean": mean, "running_var": var,
        "activation": "leaky_relu", "negative_slope": rng.uniform(), "eps": rng.uniform(), "momentum": rng.uniform(),
        "ddof": rng.uniform(),
    }  # fmt: skip


def expected(given: dict[str, Any]) -> list[np.ndarray]:
    """Return y and the running statistics, in float64."""
    x, count = given["input"].astype(np.float64), SHAPE[2] * SHAPE[3]
    mean, m2 = x.mean((2, 3), keepdims=True), x.var((2, 3), keepdims=True) * count
    z = (x - mean) / np.sqrt(m2 / (count - given["ddof"]) + given["eps"])
    z = z * per_channel(given["weight"]) + per_channel(given["bias"]) + given["residual"]
    y = np.where(z > 0, z, z * given["negative_slope"])
    batch = mean.mean((0, 2, 3)), m2.mean((0, 2, 3)) / (count - 1)
    running = given["running_mean"], given["running_var"]
    momentum = given["momentum"]
    return [y, *((1 - momentum) * old + momentum * new for old, new in zip(running, batch, strict=True))]


@pytest.mark.parametrize("channels_last", [False, True])
def test_each_call_has_its_own_arrays_and_numbers(rng: np.random.Generator, channels_last: bool) -> None:
    for number in range(4):
        given = call(rng, channels_last)
        exact = expected(given)
        found = cn.instance_norm(**given), given["running_mean"], given["running_var"]
        # Each random option makes a key of its own, but the same options are used again below.
        for one, other in zip(found, exact, strict=True):
            assert_within(one, other, 1e-5 * (1 + np.abs(other)), f"result of call {number}")
    options = {name: given[name] for name in ("activation", "negative_slope", "eps", "momentum", "ddof")}
    known = len(functional._known)
    for _ in range(4):
        given = call(rng, channels_last) | options
        exact = expected(given)
        found = cn.instance_norm(**given), given["running_mean"], given["running_var"]
        for one, other in zip(found, exact, strict=True):
            assert_within(one, other, 1e-5 * (1 + np.abs(other)))
        assert found[0].strides == (given["input"].strides if channels_last else given["residual"].strides)
    assert len(functional._known) == known


def test_a_slope_of_minus_zero(rng: np.random.Generator) -> None:
    """It equals 0, so such calls have one trace; the results may differ in the signs of zeros."""
    x = rng.normal(size=SHAPE).astype(np.float32)

    def result(slope: float) -> np.ndarray:
        return cn.instance_norm(x, activation="leaky_relu", negative_slope=slope)

    known = [result(slope) for slope in (0.0, -0.0, 0.0)]
    for slope, found in zip((0.0, -0.0, 0.0), known, strict=True):
        functional._known.clear()
        assert_same(found, result(slope))


def test_the_backward_of_known_calls(rng: np.random.Generator) -> None:
    dy, weight = rng.normal(size=SHAPE).astype(np.float32), np.ones(3, np.float32)
    for _ in range(3):
        x = rng.normal(size=SHAPE).astype(np.float32)
        y, saved = cn.instance_norm_forward(x, weight)
        functional._known.clear()
        again, of_checked = cn.instance_norm_forward(x, weight)
        assert_same(y, again)
        assert_same(saved.statistics, of_checked.statistics)
        for one, other in zip(
            cn.instance_norm_backward(dy, saved), cn.instance_norm_backward(dy, of_checked), strict=True
        ):
            assert (one is None) == (other is None)
            if one is not None:
                assert_same(one, other)


def test_what_is_checked_in_every_call(rng: np.random.Generator) -> None:
    """Nothing is written by a refused call."""
    memory = rng.normal(size=(3, *SHAPE)).astype(np.float32)
    x, out, _ = memory
    statistics = np.ones((3, 3), np.float32)
    cn.instance_norm(x, out=out)
    cn.instance_norm(x, *statistics[:2])
    before = memory.copy(), statistics.copy()
    refused: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (ValueError, "overlaps", (x,), {"out": memory.reshape(-1)[7:][: x.size].reshape(SHAPE)}),
        (ValueError, "share memory", (x, statistics[0], statistics[0]), {}),
        (ValueError, "share memory", (x, statistics[0], x.reshape(-1)[:3]), {}),
        (TypeError, "subclass", (np.ma.masked_array(x),), {"out": out}),
        (TypeError, "subclass", (x,), {"out": np.ma.masked_array(out)}),
        (TypeError, "dtype", (x, statistics[0], statistics[1].astype(np.float16)), {}),
        (ValueError, "eps", (x,), {"eps": -1e-5}),
        (TypeError, "momentum", (x, *statistics[:2]), {"momentum": True}),
    ]
    for kind, text, given, options in refused:
        for _ in range(2):
            with pytest.raises(kind, match=text):
                cn.instance_norm(*given, **options)
    out.flags.writeable = False
    statistics.flags.writeable = False
    for given, options in (((x,), {"out": out}), ((x, *statistics[:2]), {})):
        with pytest.raises(ValueError, match="read-only"):
            cn.instance_norm(*given, **options)
    assert_same(memory, before[0])
    assert_same(statistics, before[1])


@pytest.mark.compiled
def test_the_numbers_of_a_small_forward(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are packed at another place the second time: each number is the same, or of an array of the same use."""
    from cupynorm.cpu import loops_path
    from cupynorm.cpu.loops_places import CALL, FORMAT

    monkeypatch.setattr(cpu, "compiled", True)
    packed: list[dict[str, Any]] = []

    class Noted:
        @staticmethod
        def pack(*numbers: Any) -> bytes:
            packed.append(dict(zip(CALL, numbers, strict=True)))
            return FORMAT.pack(*numbers)

    monkeypatch.setattr(loops_path, "FORMAT", Noted)
    given = call(rng, False)
    out = np.empty_like(given["input"])
    for _ in range(2):
        cn.instance_norm(**given, out=out)
    first, second = packed
    made = {"mean", "variance", "partials"}
    assert {name: first[name] for name in CALL if name not in made} == {
        name: second[name] for name in CALL if name not in made
    }
    places = [first["x"], first["result"], first["residual"], first["weight"], first["bias"], loops_path.NOWHERE]
    for numbers in packed:
        assert len({*(numbers[name] for name in made), *places}) == 9


def test_numpys_warnings_are_off(rng: np.random.Generator) -> None:
    """Also in a call like one before, and for numbers that are not used."""
    x, constant = rng.normal(size=SHAPE).astype(np.float32), np.ones(SHAPE, np.float32)
    with np.errstate(all="raise"):
        for _ in range(2):
            for activation in (None, "relu", "leaky_relu"):
                saved = cn.instance_norm_forward(x, activation=activation, negative_slope=1e300)[1]
                cn.instance_norm_backward(x, saved)
                cn.gradient_sums(x, saved)
            for eps_mode in ("variance", "std", "max"):
                cn.instance_norm_backward(x, cn.instance_norm_forward(constant, eps=0.0, eps_mode=eps_mode)[1])


def test_arrays_that_the_loops_cannot_read(rng: np.random.Generator) -> None:
    """Calls on misaligned ones are checked each time."""
    x = rng.normal(size=SHAPE).astype(np.float32)
    memory = np.zeros(x.nbytes + 1, np.uint8)
    odd = memory[1:].view(np.float32).reshape(SHAPE)
    odd[...] = x
    known = cn.instance_norm(x)
    before = len(functional._known)
    for _ in range(2):
        assert_within(cn.instance_norm(odd), known.astype(np.float64), 1e-5)
    assert len(functional._known) == before


def test_a_large_table_of_runs_is_not_kept(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace would keep its layout: so calls with large ones find theirs anew."""
    if not cpu.compiled:
        pytest.skip("no loops")
    monkeypatch.setattr(cpu.loops_path, "TRACED_TABLE", 2)
    monkeypatch.setattr(cpu.loops_path, "LONG_RUN", 1)
    monkeypatch.setattr(cpu.loops_path, "_layout", cpu.loops_path._layout.__wrapped__)
    x = rng.normal(size=(2, 3, 5, 8)).astype(np.float32)[..., :7]
    for _ in range(2):
        y = cn.instance_norm(x)
        assert_within(y, cn.instance_norm(np.ascontiguousarray(x)).astype(np.float64), 1e-5)
    works = [trace.work for trace in functional._known.values()]
    assert cpu._choose in works and len(works) == 2
