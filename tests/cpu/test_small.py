"""NumPy alone, samples of few elements: computed in float64, whatever the batch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from helpers.arrays import laid
from helpers.backends import use_compiled
from helpers.compare import assert_same, assert_within

import cupynorm as cn
from cupynorm import cpu, functional
from cupynorm.cpu import numpy_small
from cupynorm.cpu.blocking import Arrays
from cupynorm.cpu.numpy_path import NumpyWork
from cupynorm.cpu.numpy_small import SmallWork


@pytest.fixture(autouse=True)
def numpy_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    use_compiled(monkeypatch, False)
    monkeypatch.setattr(functional, "_known", {})


def chosen(shape: tuple[int, ...], mask: bool = False) -> type:
    x = np.zeros(shape, np.float32)
    call = cn.Saved(x, np.zeros((3, *shape[:2]), np.float32), None, None, True)
    arrays = Arrays(x, x, mask=np.ones(shape, bool) if mask else None)
    return type(cpu._choose(call, arrays))


def test_which_samples_are_small() -> None:
    """Those of at most MOST elements, however many there are; none with a mask."""
    most = numpy_small.MOST
    for samples in (1, 7, 10_000):
        assert chosen((samples, 4, most // 4)) is SmallWork
        assert chosen((samples, 4, most // 8, 2)) is SmallWork
        assert chosen((samples, 4, most // 4 + 1)) is NumpyWork
        assert chosen((samples, 4, most // 4), mask=True) is NumpyWork


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "silu", "gelu"])
def test_results_are_those_of_large_samples(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, dtype: str, activation: Any
) -> None:
    """Forward and backward with any options, any layout, in place or not; moments and sums of parts."""
    for _ in range(12):
        shape = tuple(rng.integers((1, 1, 1, 2), (6, 5, 6, 7)).tolist())
        layout = str(rng.choice(["contiguous", "channels_last", "every second column", "crop", "transposed"]))
        parameters = rng.normal(size=(2, 3, *shape[:2])).astype(np.float64 if dtype == "float64" else np.float32)
        weight, bias = (p[0] if rng.random() < 0.5 else p[0, 0] for p in parameters)
        x, dy, residual = (laid(rng.normal(size=shape).astype(dtype), layout) for _ in range(3))
        x += rng.choice([0, 30])
        options: dict[str, Any] = {
            "activation": activation, "negative_slope": rng.uniform(-1, 2), "eps": rng.choice([0.1, 1e-5]),
            "ddof": rng.uniform(), "eps_mode": str(rng.choice(["variance", "std", "max"])),
            "residual": residual if rng.random() < 0.5 else None,
        }  # fmt: skip
        tracked = {"running_mean": np.zeros_like(bias), "running_var": np.ones_like(bias)} if bias.ndim == 1 else {}

        def results(
            x: Any = x, dy: Any = dy, weight: Any = weight, bias: Any = bias, options: Any = options,
            tracked: Any = tracked,
        ) -> list[np.ndarray]:  # fmt: skip
            functional._known.clear()
            running = {name: array.copy() for name, array in tracked.items()}
            y, saved = cn.instance_norm_forward(x, weight, bias, **running, **options)
            found = [y, saved.statistics, *running.values(), *cn.instance_norm_backward(dy, saved)]
            if tracked:
                y, saved = cn.instance_norm_forward(x, weight, bias, **running, use_input_stats=False, **options)
                found += [y, *cn.instance_norm_backward(dy, saved)]
            parts = x[..., :1, :], x[..., 1:, :]
            moments = [cn.moments(part) for part in parts]
            found += [*vars(moments[0].merge(moments[1])).values(), *vars(cn.gradient_sums(dy, saved)).values()]
            there = x.copy()
            return [*found, cn.instance_norm(there, out=there)]

        ours = results()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(numpy_small, "MOST", 0)
            others = results()
        digits = {"float16": 1e-3, "float32": 3e-6, "float64": 1e-12}[dtype]
        for one, other in zip(ours, others, strict=True):
            scale = 1 + np.abs(other.astype(float)).max(initial=0)
            assert_within(one, other.astype(np.longdouble), 40 * digits * scale)


def test_the_bits_of_a_sample_in_any_batch(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of one sample or many, by one thread or two."""
    monkeypatch.setattr(NumpyWork, "pays", 1)
    for threads in (1, 2):
        monkeypatch.setattr(numpy_small, "BLOCK", int(rng.integers(1, 2000)))
        monkeypatch.setattr(numpy_small, "get_num_threads", lambda threads=threads: threads)
        shape = 9, 3, 7, 11
        x, dy = rng.normal(size=(2, *shape)).astype(np.float32)
        y, saved = cn.instance_norm_forward(x, activation="gelu")
        dx = cn.instance_norm_backward(dy, saved)[0]
        for some in (slice(0, 1), slice(3, 4), slice(2, 8)):
            part, of_part = cn.instance_norm_forward(x[some], activation="gelu")
            assert_same(part, y[some])
            assert_same(cn.instance_norm_backward(dy[some], of_part)[0], dx[some])


def test_errors_are_half_a_rounding_of_the_statistics(rng: np.random.Generator) -> None:
    """About: rstd is rounded to float32, and so is the result. Against long double, with a mean of up to 1e6."""
    for mean in (0, 1e3, 1e6):
        x = (mean + rng.normal(size=(2, 3, 5, 8))).astype(np.float32)
        wide = x.astype(np.longdouble)
        wide -= wide.mean((2, 3), keepdims=True)
        exact = wide / np.sqrt((wide**2).mean((2, 3), keepdims=True) + 1e-5)
        assert_within(cn.instance_norm(x), exact, 1.1 * 2**-23 * np.abs(exact) + 1e-12)


@pytest.mark.parametrize("value", [0.1, 1e300, -7.0])
def test_constant_planes_in_float64(value: float) -> None:
    x = np.full((2, 3, 3, 7), value)
    assert (cn.instance_norm(x) == 0).all()
    assert (cn.moments(x).m2 == 0).all() and (cn.moments(x).mean == value).all()


def test_what_explain_says(rng: np.random.Generator) -> None:
    text = cn.explain(rng.normal(size=(2, 3, 4, 5)).astype(np.float32))
    assert "NumPy, 1 block(s) of samples, in float64" in text and "one thread" in text
    assert math.prod((3, 4, 5)) <= numpy_small.MOST
