"""Calls on the CUDA kernels that replay the trace of an earlier one: what they check again, and what they do anew."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers.cases import BLOCKS, GRID
from helpers.compare import assert_same, assert_within
from helpers.recorder import Recorder
from helpers.reference import LAYOUTS

import cupynorm as cn
from cupynorm import functional
from cupynorm.cuda import arguments, calls
from cupynorm.cuda.device import DEVICES
from cupynorm.cuda.trace import Number, Slot

X = np.zeros((2, 3, 8), np.float32)
W = np.ones(3, np.float32)


@pytest.fixture
def recorder(run_on: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Recorder:
    monkeypatch.setattr(functional, "_known", {})
    found: Recorder = run_on(Recorder(DEVICES["H100"]))
    return found


def traced(call: Callable[[], Any]) -> int:
    """Return the number of new traces during a call."""
    before = calls.traced.cache_info().misses
    call()
    return calls.traced.cache_info().misses - before


WRONG: list[dict[str, Any]] = [
    {"eps": True}, {"eps": -1.0}, {"eps": np.nan}, {"eps": "1"}, {"momentum": np.inf}, {"momentum": None},
    {"negative_slope": True}, {"activation": "tanh"}, {"activation": ["relu"]}, {"eps_mode": "none"}, {"eps_mode": 0},
    {"ddof": 8.0}, {"ddof": 9}, {"ddof": True}, {"dtype": "int32"}, {"dtype": []}, {"weight": 1.0},
    {"weight": [1.0, 1.0, 1.0]}, {"weight": np.ones(4, np.float32)}, {"weight": W.astype(np.float64)},
    {"weight": np.ma.masked_array(W)}, {"bias": W[None, :2]}, {"residual": X[:1]}, {"residual": X.astype(np.float64)},
    {"running_mean": W}, {"out": X[:1].copy()}, {"moments": X}, {"mask": X}, {"lengths": [9, 9]},
    {"use_input_stats": False},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: "-".join(f"{k}={v!r}"[:30] for k, v in wrong.items()))
def test_refusals_after_the_same_call_has_passed(recorder: Recorder, wrong: dict[str, Any]) -> None:
    """Options equal to those that have passed (True and 1.0), too, and arrays of other classes."""
    right = {"weight": W, "eps": 1.0, "momentum": 1.0, "negative_slope": 1.0, "ddof": 1.0}
    for _ in range(2):
        cn.instance_norm(X, **right)
    assert len(functional._known) == 1
    recorder.clear()
    with pytest.raises((TypeError, ValueError)):
        cn.instance_norm(X, **right | wrong)
    assert not recorder.steps and not recorder.made


@pytest.mark.parametrize(
    "x", [X.tolist(), X.astype(np.int32), X[0, 0], X[:, :, :1], np.ma.masked_array(X)], ids=range(5)
)
def test_refused_inputs_after_others_have_passed(recorder: Recorder, x: Any) -> None:
    cn.instance_norm(X)
    with pytest.raises((TypeError, ValueError)):
        cn.instance_norm(x)


def test_addresses_are_checked_in_every_call(recorder: Recorder) -> None:
    memory = np.zeros(200, np.float32)
    x, mean, var = memory[:48].reshape(2, 3, 8), memory[100:103], memory[110:113]
    apart, across = (memory[at : at + 48].reshape(2, 3, 8) for at in (60, 24))  # all are aligned alike
    for _ in range(2):
        cn.instance_norm(x, out=apart)
        cn.instance_norm(x, out=x)
        cn.instance_norm(x, mean, var)
        with pytest.raises(ValueError, match="out overlaps input"):
            cn.instance_norm(x, out=across)
        with pytest.raises(ValueError, match="share memory"):
            cn.instance_norm(x, mean, mean)
        with pytest.raises(ValueError, match="share memory"):
            cn.instance_norm(x, memory[4:7], var)


def test_one_trace_for_arrays_with_the_same_facts(recorder: Recorder) -> None:
    def call(x: np.ndarray = X, **options: Any) -> Callable[[], Any]:
        return lambda: cn.instance_norm_forward(x, W, **options)

    assert traced(call()) == 1
    assert not traced(call(X.copy()))
    assert not traced(call(eps=1e-3, negative_slope=0.5, momentum=0.5, ddof=1))  # values, which no trace depends on
    for different in (
        call(X.astype(np.float16)), call(X[:1]), call(X[:, :, ::2]), call(X[..., None]), call(bias=W), call(residual=X),
        call(activation="relu"), call(eps_mode="std"), call(dtype=np.float16), call(mask=np.ones(8, bool)),
        lambda: cn.instance_norm(X, weight=W),
    ):  # fmt: skip
        assert [traced(different) for _ in range(3)] == [1, 0, 0]


def test_another_device_or_batch_invariance_needs_another_trace(recorder: Recorder) -> None:
    """Both were chosen so that the launches differ."""
    x = np.zeros((64, 3, 65_536), np.float32)

    def launched() -> list[Any]:
        recorder.clear()
        cn.instance_norm(x)
        return recorder.steps

    first = launched()
    recorder._device = BLOCKS
    second = launched()
    assert first != second
    cn.set_batch_invariant(True)
    try:
        third = launched()
    finally:
        cn.set_batch_invariant(False)
    assert launched() == second
    recorder._device = DEVICES["H100"]
    assert launched() == first
    assert len({tuple(steps) for steps in (first, second, third)}) >= 2


def test_calls_of_two_runtimes(run_on: Callable[..., Any]) -> None:
    first, second = Recorder(BLOCKS), Recorder(BLOCKS)
    for runtime in (first, second, first, second):
        run_on(runtime)
        cn.instance_norm(X)
    for runtime in (first, second):
        assert len(runtime.steps) == 2
        assert sum(runtime.made.values()) == 2


def test_a_kernel_that_does_not_compile_is_compiled_again(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("no memory for the compiler")

    with monkeypatch.context() as patch:
        patch.setattr(recorder, "kernel", fail)
        for _ in range(2):
            with pytest.raises(MemoryError):
                cn.instance_norm(X)
    cn.instance_norm(X)
    assert len(recorder.steps) == 1


def test_known_calls_are_bounded(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "MOST_KNOWN", 3)
    for size in range(2, 12):
        cn.instance_norm(X[:, :, :size])
        assert 1 <= len(functional._known) <= 3


@pytest.mark.simt
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "unaligned"])
@pytest.mark.parametrize("device", [BLOCKS, GRID], ids=["block", "grid"])
def test_replayed_calls_use_their_own_arrays_and_numbers(
    run_on: Callable[..., Any], rng: np.random.Generator, device: Any, layout: str
) -> None:
    """Twice the same facts, with other values of everything else."""
    shape = (2, 3, 18_000, 1)

    def results(seed: int) -> list[np.ndarray]:
        random = np.random.default_rng(seed)
        x, dy, residual = (LAYOUTS[layout](random.normal(size=shape).astype(np.float32)) for _ in range(3))
        weight, bias, mean, var = random.uniform(0.5, 2, (4, 3)).astype(np.float32)
        y, saved = cn.instance_norm_forward(
            x, weight, bias, running_mean=mean, running_var=var, residual=residual, activation="leaky_relu",
            negative_slope=random.uniform(), eps=random.uniform(), momentum=random.uniform(), ddof=random.uniform(),
        )  # fmt: skip
        return [y, mean, var, *cn.instance_norm_backward(dy, saved)]

    seeds = rng.integers(2**31, size=3)
    expected = [results(seed) for seed in seeds]
    from emulator.runtime import Emulator

    run_on(Emulator(device))
    for seed, exact in zip(seeds, expected, strict=True):
        for one, other in zip(results(seed), exact, strict=True):
            assert_within(one, other, 2e-4 * (1 + np.abs(other)))
    assert_same(*(np.concatenate([a.ravel() for a in results(seeds[0])]) for _ in range(2)))


@pytest.mark.parametrize("kernel", arguments.STRUCTS)
def test_packed_arguments(rng: np.random.Generator, kernel: str) -> None:
    """Each field has its value, whether it is a constant or a variable of the call; the rest is 0."""
    struct = arguments.STRUCTS[kernel]
    leaves = list(arguments.leaves(struct))
    for _ in range(20):
        values: dict[str, Any] = {"no.such.name": 7}
        variables = {}
        for name, _offset, dtype in leaves:
            value = float(rng.normal()) if dtype.kind == "f" else int(rng.integers(1, 2**31))
            match int(rng.integers(3)):
                case 0:
                    values[name] = value
                case 1:
                    values[name] = Number(name)
                    variables[Number(name)] = value
        pack, items = arguments.packer(kernel, values)
        memory = pack(*(variables.get(item, item) for item in items))
        assert len(memory) == struct.itemsize
        used = np.zeros(struct.itemsize, bool)
        for name, offset, dtype in leaves:
            given = values.get(name, 0)
            expected = variables.get(given, given)
            assert np.frombuffer(memory, dtype, 1, offset)[0] == expected, name
            used[offset : offset + dtype.itemsize] = True
        assert not np.frombuffer(memory, np.uint8)[~used].any()


def test_slots_know_when_they_are_contiguous(rng: np.random.Generator) -> None:
    """As NumPy does."""
    shapes = [(2, 3, 4), (1, 3, 4), (2, 1, 4), (2, 3, 1), (2, 0, 4), (3,), ()]
    for shape, step in itertools.product(shapes, (1, 2)):
        array = np.zeros([size * step for size in shape], np.float32)[tuple(slice(None, None, step) for _ in shape)]
        for axes in itertools.permutations(range(array.ndim)):
            moved = array.transpose(axes)
            slot = Slot(moved.shape, moved.strides, moved.dtype)
            assert slot.c_contiguous == moved.flags.c_contiguous
            assert slot.nbytes == moved.nbytes
