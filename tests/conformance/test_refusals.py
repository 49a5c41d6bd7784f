"""A call that fails, at any point, changes no lasting state; an interrupted call changes all of it or nothing."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import cases, faults
from helpers.backends import Backend, use_compiled
from helpers.compare import Bits, assert_equal, bits
from helpers.faults import Faults, LaunchError
from helpers.loops import let_threads_pay

import cupynorm as cn
from cupynorm import _checks, devices
from cupynorm._types import commit
from cupynorm.cpu import numpy_path, result_pool, thread_pool
from cupynorm.cuda.device import Device
from cupynorm.inference import inferring

SHAPE = (3, 4, 6, 7)
#: A device whose plans split planes of SHAPE or of LARGE: several launches per call.
TINY = Device("tiny", (7, 5), 1, 1024, 2**14)
LARGE = (1, 2, 60, 70)


class Held:
    """A layer, the arrays of a call, and a picture of the state that a call must not break."""

    def __init__(self, backend: Backend, rng: np.random.Generator, shape: tuple[int, ...], dtype: str = "float32"):
        self.backend = backend
        c, kind = shape[1], devices.dtype_of(dtype)

        def made(shape: Any, dtype: Any = kind) -> Any:
            return backend.array(rng.normal(size=shape).astype(dtype))

        self.layer = cn.InstanceNorm2d(
            c, affine=True, track_running_stats=True, activation="relu", device=backend.device
        )
        single = np.float32
        for parameter in self.layer.params():
            parameter.data = made(c, single)
        self.layer.running_mean[...] = made(c, single)
        self.layer.running_var[...] = backend.array(rng.uniform(1, 2, c).astype(single))
        self.x, self.residual, self.dy, self.out = (made(shape) for _ in range(4))
        self.other = made(shape)
        self.state: dict[str, np.ndarray] = {}
        self.strided = False
        self.context = copy_context()  # for modes local to a context

    def picture(self) -> dict[str, Any]:
        """Identity and bits of all lasting state."""
        layer = self.layer
        arrays = {name: getattr(layer, name) for name in layer._buffers}
        for name, parameter in layer.namedparams():
            arrays |= {name: parameter.data, f"{name}.grad": parameter.grad}
        seen: dict[str, Any] = {name: None if a is None else (id(a), Bits(a)) for name, a in arrays.items()}
        saved = layer.saved
        seen["saved"] = None if saved is None else (id(saved), id(saved[0]), saved[0].overwritten)
        seen["settings"] = (layer.device, layer.training, layer.eps, layer.momentum, layer._anywhere, layer._inferred)
        for name in ("x", "residual", "dy", "other"):
            seen[name] = self.bits(name)
        return seen

    def bits(self, name: str) -> Bits:
        return Bits(getattr(self, name))


def _forward(held: Held) -> None:
    held.layer.forward(held.x, residual=held.residual, out=held.out)


def _eval_forward(held: Held) -> None:
    held.layer.forward(held.other, out=held.out)


def _infer(held: Held) -> None:
    held.context.run(cn.inference_mode().__enter__)


def _forward_there(held: Held) -> None:
    held.context.run(_forward, held)


def _reset(held: Held) -> None:
    held.layer.reset_parameters()


def _backward(held: Held) -> None:
    held.layer.backward(held.dy, out=held.out)


def _strided_statistics(held: Held) -> None:
    layer = held.layer
    cn.instance_norm(held.x, layer.running_mean, layer.running_var, layer.weight.data, out=held.out)


def _load(held: Held) -> None:
    held.layer.load_state_dict(held.state)


def _assign(held: Held) -> None:
    held.layer.weight.data = held.state["weight"]


def _prepare_load(held: Held) -> None:
    state = held.layer.state_dict()
    held.state = {name: (held.backend.host(a) + 1).astype(np.float64) for name, a in state.items()}


def _strided(held: Held) -> None:
    for name in ("running_mean", "running_var"):
        array = getattr(held.layer, name)
        twice = held.backend.array(np.repeat(held.backend.host(array), 2))
        setattr(held.layer, name, twice[::-2])
    held.strided = True


def _eval(held: Held) -> None:
    held.layer.eval()
    _forward(held)


#: A call, and the steps before it.
CALLS: dict[str, tuple[Callable[[Held], None], list[Callable[[Held], None]]]] = {
    "forward": (_forward, [_eval]),  # `saved` is of another forward before
    "first forward": (_forward, []),
    "forward in eval": (_eval_forward, [_eval]),
    "forward in inference_mode": (_forward_there, [_forward, _infer]),
    "statistics with strides": (_strided_statistics, [_strided]),
    "first backward": (_backward, [_forward]),
    "second backward": (_backward, [_forward, _backward]),
    "backward in eval": (_backward, [_eval, _backward]),
    "load_state_dict": (_load, [_forward, _prepare_load]),
    "reset_parameters": (_reset, [_forward, _backward]),
    "data": (_assign, [_prepare_load]),
}


def ready(backend: Backend, rng: np.random.Generator, name: str, where: str) -> tuple[Held, Callable[[Held], None]]:
    backend.pretend(TINY if where == "split" else cases.SMALL_DEVICE)
    backend._patch.setattr(numpy_path, "BLOCK_BYTES", 8192)
    call, before = CALLS[name]
    held = Held(backend, rng, LARGE if where == "split" else SHAPE)
    for step in before:
        step(held)
    if call is _forward:
        held.layer.train()
    return held, call


@pytest.mark.full(simt=lambda given: given["where"] == "split", numpy=lambda given: given["where"] == "split")
@pytest.mark.parametrize("where", ["small", "split"])
@pytest.mark.parametrize("name", CALLS)
def test_failing_allocations_and_launches(backend: Backend, rng: np.random.Generator, name: str, where: str) -> None:
    """Every allocation of a call, and every launch, fails in turn."""
    held, call = ready(backend, rng, name, where)
    spare = copy_of(held)
    call(spare)  # compiles, and fills the caches
    before, out = held.picture(), held.bits("out")
    number, finished = 0, False
    while not finished:
        number += 1
        fault = Faults(number)
        try:
            with faults.failures(backend, fault):
                call(held)
        except (MemoryError, LaunchError):
            assert held.picture() == before, f"after failure {number}"
            if backend.name in ("simt", "cupy") and not fault.launched:
                assert held.bits("out") == out, f"out after failure {number}"
        else:
            finished = True
        if not finished:
            held.out[...] = held.backend.array(out.array)
    assert number > (0 if name == "data" else 4)  # some points of failure were reached
    assert without_identities(held) == without_identities(spare)


def copy_of(held: Held) -> Held:
    twin = copy.copy(held)
    twin.layer = copy.deepcopy(held.layer)
    if held.strided:  # deepcopy has made them dense
        _strided(twin)
        for name in ("running_mean", "running_var"):
            getattr(twin.layer, name)[...] = getattr(held.layer, name)
    twin.layer.saved = held.layer.saved
    twin.out = held.out.copy()
    return twin


def without_identities(held: Held) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: value[1] if isinstance(value, tuple) else value for name, value in held.picture().items()
    }
    saved = held.layer.saved
    found["saved"] = None if saved is None else bits(saved[0].mean, saved[0].rstd, saved[0].mean_lo)
    found["out"] = held.bits("out")
    return found


def few(given: dict[str, Any]) -> bool:
    return given["where"] == "split" or given["name"] not in ("forward", "second backward", "load_state_dict")


@pytest.mark.full(simt=few, numpy=few)
@pytest.mark.parametrize("where", ["small", "split"])
@pytest.mark.parametrize("name", CALLS)
def test_interrupts(backend: Backend, rng: np.random.Generator, name: str, where: str) -> None:
    """KeyboardInterrupt wherever Python can raise it in the package: lasting state is as before the call or after."""
    original, call = ready(backend, rng, name, where)
    done = copy_of(original)
    call(done)
    after = without_identities(done)
    seen = set()
    number, finished = 0, False
    while not finished:
        number += 1
        held = copy_of(original)
        before = held.picture()
        fault = Faults(number)
        try:
            with faults.interrupts(fault):
                call(held)
        except KeyboardInterrupt:
            pass
        else:
            finished = True
            assert fault.count < number
        now = without_identities(held)
        if held.picture() == before:
            seen.add("before")
        else:
            assert {**now, "out": 0} == {**after, "out": 0}, f"interrupt {number}"
            assert held.layer.saved is not original.layer.saved or call is not _forward
            if call in (_forward, _backward, _strided_statistics):  # then the result is complete as well
                assert now["out"] == after["out"]
            seen.add("after")
        assert not finished or now == after
    assert number > 5
    assert seen == {"before", "after"}


def test_interrupted_inference_mode_is_not_entered() -> None:
    mode, number, finished = cn.inference_mode(), 0, False
    while not finished:
        number += 1
        try:
            with faults.interrupts(Faults(number)):
                mode.__enter__()
        except KeyboardInterrupt:
            assert not inferring()
        else:
            finished = True
    assert inferring()
    mode.__exit__()
    assert not inferring()
    assert number > 2


# Writes that belong together


class BrokenError(Exception):
    pass


def test_writes_stop_at_the_first_failure() -> None:
    done: list[int] = []

    def fail() -> None:
        raise BrokenError

    with pytest.raises(BrokenError):
        commit(partial(done.append, 1), partial(fail), partial(done.append, 2))
    assert done == [1]


@pytest.mark.full(simt=lambda given: True)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_interrupted_backward_into_its_input(
    backend: Backend, rng: np.random.Generator, activation: str | None
) -> None:
    """The input may be half-written: the next backward refuses it instead of giving wrong gradients silently."""
    given, dy = (backend.array(rng.normal(size=SHAPE).astype(np.float32)) for _ in range(2))
    refused, number, finished = 0, 0, False
    while not finished:
        number += 1
        x = given.copy()
        _, saved = cn.instance_norm_forward(x, activation=activation)
        try:
            with faults.interrupts(Faults(number)):
                cn.instance_norm_backward(dy, saved, out=x)
        except KeyboardInterrupt:
            pass
        else:
            finished = True
        untouched = Bits(x) == Bits(given)
        try:
            cn.instance_norm_backward(dy, saved)
        except ValueError:
            refused += 1
            with pytest.raises(ValueError, match="written over"):
                cn.instance_norm_backward(dy, saved)
        else:
            assert untouched, f"interrupt {number}"
    assert 1 < refused < number


@pytest.mark.parametrize("fails", range(7))
def test_failed_move_moves_nothing(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, fails: int) -> None:
    layer = cn.InstanceNorm2d(3, affine=True, track_running_stats=True, device="cpu")
    x = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    layer.backward(layer.forward(x))
    before = {name: getattr(layer, name) for name in (*layer._buffers, "saved", "device", "_anywhere")}
    parameters = [(p.data, p.grad) for p in layer.params()]
    asked: list[str] = []

    def to_device(array: np.ndarray, device: str) -> np.ndarray:
        asked.append(device)
        if len(asked) == fails + 1:
            raise MemoryError
        return array.copy()

    monkeypatch.setattr(devices, "resolve", str)
    monkeypatch.setattr(devices, "to_device", to_device)
    with pytest.raises(MemoryError):
        layer.to_gpu("cuda:1")
    assert {name: getattr(layer, name) for name in before} == before
    assert all(a is b for pair, p in zip(parameters, layer.params(), strict=True)
               for a, b in zip(pair, (p.data, p.grad), strict=True))  # fmt: skip
    asked[:] = [""] * 7
    assert layer.to_gpu("cuda:1").device == "cuda:1"
    assert len(asked) == 14
    assert layer.weight.data is not parameters[0][0]


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"])
def test_loading_into_a_read_only_array_loads_nothing(name: str) -> None:
    layer = cn.InstanceNorm2d(3, affine=True, track_running_stats=True, device="cpu")
    state = {key: array + 1 for key, array in layer.state_dict().items()}
    before = layer.state_dict()
    layer._state()[name].flags.writeable = False
    with pytest.raises(ValueError, match=f"{name} of InstanceNorm2d.* is read-only"):
        layer.load_state_dict(state)
    for key, array in layer.state_dict().items():
        assert_equal(array, before[key])


def test_numpy_errors_leave_gradients_unchanged(rng: np.random.Generator) -> None:
    """If NumPy is set to raise at an overflow, the error comes before any gradient is added to."""
    layer = cn.InstanceNorm2d(2, affine=True, device="cpu", dtype="float16")
    x = rng.normal(size=(1, 2, 4, 4)).astype(np.float16)
    layer.backward(layer.forward(x))
    layer.weight.grad[...] = 1
    layer.bias.grad[...] = 65504
    with np.errstate(all="raise"), pytest.raises(FloatingPointError):
        layer.backward(np.full_like(x, 3000))
    assert (layer.weight.grad.tolist(), layer.bias.grad.tolist()) == ([1, 1], [65504, 65504])


# Interrupts while other threads work


@pytest.mark.parametrize("kind", ["numpy", pytest.param("compiled", marks=pytest.mark.compiled)])
def test_helper_threads_finish_before_an_interrupt_is_raised(
    kind: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a call has ended in any way, no thread writes into its arrays."""
    use_compiled(monkeypatch, kind == "compiled")
    let_threads_pay(monkeypatch)
    jobs: list[Any] = []
    lead = thread_pool._Job.lead

    def noted(job: Any, offer: Any) -> None:
        jobs.append(job)
        work = job.work

        def slow(worker: int) -> None:
            work(worker)
            if threading.current_thread() is not threading.main_thread():
                time.sleep(0.002)

        job.work = slow
        lead(job, offer)

    late: list[Any] = []
    take_part = thread_pool._Job.help

    def watched(job: Any, who: int) -> None:
        if job not in jobs and not job.closed:
            late.append(job)
        take_part(job, who)

    before = cn.get_num_threads()
    cn.set_num_threads(3)
    x, out = rng.normal(size=(16, 8, 30, 30)).astype(np.float32), np.empty((16, 8, 30, 30), np.float32)
    try:
        expected = Bits(cn.instance_norm(x))
        monkeypatch.setattr(thread_pool._Job, "lead", noted)
        monkeypatch.setattr(thread_pool._Job, "help", watched)
        number, finished = 0, False
        while not finished:
            number += 1
            jobs.clear()
            try:
                with faults.interrupts(Faults(number)):
                    cn.instance_norm(x, out=out)
            except KeyboardInterrupt:
                pass
            else:
                finished = True
            # Compiled helpers that are returning, with every task done, write no more.
            at_work = [job for job in jobs if job.active and not job.queue.drain()]
            assert not at_work, f"interrupt {number}"
        assert jobs
        assert not late
        assert Bits(out) == expected
    finally:
        cn.set_num_threads(before)


def test_interrupts_lose_no_pooled_memory(rng: np.random.Generator) -> None:
    """Results still reuse memory after interrupts at every point of its allocation and release."""
    limit = cn.get_memory_limit()
    cn.set_memory_limit(0)
    cn.set_memory_limit(2**30)
    number, finished = 0, False
    try:
        while not finished:
            number += 1
            try:
                with faults.interrupts(Faults(number)):
                    a = result_pool.empty((result_pool.LEAST,), np.dtype(np.uint8))
                    a[:] = 1
            except KeyboardInterrupt:
                pass
            else:
                finished = True
            a = None
        a = result_pool.empty((result_pool.LEAST,), np.dtype(np.uint8))
        where = a.__array_interface__["data"][0]
        del a
        assert result_pool.empty((result_pool.LEAST,), np.dtype(np.uint8)).__array_interface__["data"][0] == where
        assert number > 3
    finally:
        cn.set_memory_limit(0)
        cn.set_memory_limit(limit)


def test_addresses_of_gpu_arrays_meet_as_those_of_numpy_arrays_do(rng: np.random.Generator) -> None:
    """Whether views may share memory, from their addresses, shapes and strides alone."""
    memory, found = np.zeros(200, np.int16), set()

    def view() -> np.ndarray:
        shape, steps = rng.integers(0, 5, 2), rng.integers(-20, 21, 2)
        reach = (shape - 1) * steps
        low, high = -np.minimum(reach, 0).sum(), memory.size - np.maximum(reach, 0).sum()
        return np.lib.stride_tricks.as_strided(memory[rng.integers(low, high) :], shape, steps * memory.itemsize)

    def on_a_gpu(a: np.ndarray) -> Any:
        address = SimpleNamespace(ptr=a.ctypes.data)
        return SimpleNamespace(data=address, size=a.size, shape=a.shape, strides=a.strides, itemsize=a.itemsize)

    for _ in range(1000):
        a, b = view(), view()
        meet = np.may_share_memory(a, b)
        assert _checks._bounds_meet(on_a_gpu(a), on_a_gpu(b)) == meet, (a.__array_interface__, b.__array_interface__)
        three = [a, b, view()]
        apart = not any(np.may_share_memory(*pair) for pair in combinations(three, 2))
        if apart and all(each.size for each in three):  # an empty one may lie within another
            assert _checks._all_apart([*map(on_a_gpu, three)])
            found.add("apart")
        elif not apart:
            assert not _checks._all_apart([*map(on_a_gpu, three)])
        found.add(meet)
    assert found == {True, False, "apart"}
    for second in (5, 6, 7):  # the two share an element, or lie side by side, or apart
        a, b = memory[:6], memory[second : second + 4]
        for one, other in ((a, b), (b, a)):
            assert _checks._bounds_meet(on_a_gpu(one), on_a_gpu(other)) == (second == 5)
