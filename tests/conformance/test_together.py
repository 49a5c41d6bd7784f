"""Calls side by side, within others, and one after another: threads, signals, processes, thousands of calls."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import reference
from helpers.backends import TESTS, Backend, on_cpu, traced_memory, use_compiled
from helpers.compare import Bits, assert_same, bits
from helpers.faults import Faults, ending, handled
from helpers.loops import forget_layouts, forget_modules, llvm_machine, loops_path
from helpers.processes import run
from helpers.tiers import amount

import cupynorm as cn
from cupynorm import config, cpu
from cupynorm.cpu import numpy_path, numpy_small, result_pool, running, thread_pool

ROOT = Path(__file__).parents[2]
SHAPE = (3, 4, 6, 7)


def normal(backend: Backend, rng: np.random.Generator, shape: tuple[int, ...] = SHAPE) -> Any:
    return backend.array(rng.normal(size=shape).astype(np.float32))


def side_by_side(calls: list[Callable[[], Any]]) -> list[Any]:
    """What the calls return, begun at the same moment in threads of their own."""
    barrier = threading.Barrier(len(calls))

    def called(call: Callable[[], Any]) -> Any:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(called, calls))


# Threads


def test_many_threads_on_one_layer_in_eval(backend: Backend, rng: np.random.Generator) -> None:
    """Nothing of a layer is written in eval but what the last forward kept: every result is right."""
    layer = cn.InstanceNorm2d(4, affine=True, track_running_stats=True, device=backend.device)
    layer.forward(normal(backend, rng))
    layer.eval()
    inputs = [normal(backend, rng) for _ in range(4)]
    expected = [Bits(layer.forward(x)) for x in inputs]

    def work(number: int) -> bool:
        return all(Bits(layer.forward(inputs[number])) == expected[number] for _ in range(20))

    assert all(side_by_side([lambda number=number: work(number) for number in range(4)]))


def test_no_batch_is_lost_from_the_running_statistics(
    backend: Backend, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forwards in training of several threads: each batch moves the statistics once, in some order."""
    layer = cn.InstanceNorm2d(4, momentum=0.5, track_running_stats=True, device=backend.device)
    x = normal(backend, rng)
    once = cn.InstanceNorm2d(4, momentum=0.5, track_running_stats=True, device=backend.device)
    times, threads = 5, 4
    for _ in range(times * threads):  # of one batch, the order does not matter
        once.forward(x)
    expected = bits(*once.state_dict().values())
    y = Bits(once.forward(x))

    def work() -> list[Bits]:
        return [Bits(layer.forward(x)) for _ in range(times)]

    moved = running._moved

    def slowly(*given: Any) -> Any:
        """Others have time to read what is about to be moved."""
        result = moved(*given)
        time.sleep(1e-3)
        return result

    monkeypatch.setattr(running, "_moved", slowly)
    results = side_by_side([work] * threads)
    assert {r for some in results for r in some} == {y}
    assert bits(*layer.state_dict().values()) == expected


def test_many_layers_in_many_threads(backend: Backend, rng: np.random.Generator) -> None:
    """A layer for each thread, forward and backward: the same bits as one after the other."""
    shapes = [SHAPE, (2, 4, 9, 9), (1, 4, 30, 31), (5, 4, 2, 3)]
    data = [(normal(backend, rng, shape), normal(backend, rng, shape)) for shape in shapes]

    def train(x: Any, dy: Any) -> list[Bits]:
        layer = cn.InstanceNorm2d(4, affine=True, track_running_stats=True, device=backend.device)
        results: list[Any] = []
        for _ in range(5):
            results += [layer.forward(x), layer.backward(dy)]
        results += [layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var]
        return bits(*results)

    expected = [train(*pair) for pair in data]
    assert side_by_side([lambda pair=pair: train(*pair) for pair in data]) == expected


@pytest.mark.compiled
def test_first_calls_at_the_same_moment_compile_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Each module is compiled by whoever comes first; the others find its code. All get the same bits."""
    use_compiled(monkeypatch, True)
    monkeypatch.setattr(config.cache_folder, "given", str(tmp_path))
    forget_modules(monkeypatch)
    emit, compiled = llvm_machine.emit, []
    monkeypatch.setattr(llvm_machine, "emit", lambda write: compiled.append(write) or emit(write))
    x = rng.normal(size=SHAPE).astype(np.float32)
    results = side_by_side([lambda: Bits(cn.instance_norm(x))] * 4)
    assert len(set(results)) == 1
    assert len(compiled) == len([*tmp_path.iterdir()]) > 2


@pytest.mark.simt
def test_first_calls_at_the_same_moment_on_the_emulator(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Each module is asked for by whoever comes first, and built once; all get the same bits."""
    from emulator import runtime as emulator

    emulator.require()
    from cupynorm.backend import MODULES

    monkeypatch.setitem(MODULES, "cpu", "emulator.backend")
    monkeypatch.setattr(emulator, "CACHE", tmp_path)
    emulator.build.cache_clear()
    compiled: list[Any] = []
    ran = subprocess.run

    def noted(command: Any, **options: Any) -> Any:
        compiled.extend(word for word in command if word.endswith("kernels.cpp"))
        return ran(command, **options)

    monkeypatch.setattr(emulator.subprocess, "run", noted)
    x = rng.normal(size=SHAPE).astype(np.float32)
    try:
        results = side_by_side([lambda: Bits(cn.instance_norm(x))] * 4)
    finally:
        emulator.build.cache_clear()
    assert len(set(results)) == 1
    assert len(compiled) == len(list(tmp_path.glob("*.so"))) == 1


@pytest.mark.long
@pytest.mark.parametrize("way", ["numpy", pytest.param("compiled", marks=pytest.mark.compiled)])
def test_first_calls_at_the_same_moment_import_the_backend(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is imported at first use: whoever comes while another thread does that waits for it."""
    use_compiled(monkeypatch, way == "compiled")
    code = """
import builtins, sys, threading, time, numpy as np, cupynorm as cn
assert "cupynorm.cpu" not in sys.modules
usual = builtins.__import__
def slowly(name, scope=None, *rest):
    if scope and scope.get("__name__") == "cupynorm.cpu":
        time.sleep(0.01)
    return usual(name, scope, *rest)
builtins.__import__ = slowly
x = np.random.default_rng(1).normal(size=(2, 3, 9, 9)).astype(np.float32)
results = []
def go(number):
    time.sleep(0.005 * number)
    results.append(cn.instance_norm(x).tobytes())
threads = [threading.Thread(target=go, args=(i,)) for i in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
print(len(results), len(set(results)))
"""
    ran = run(code, CUPYNORM_COMPILED=str(int(way == "compiled")))
    assert (ran.stdout, ran.stderr) == ("8 1\n", "")


# Signal handlers and finalisers, which run in the middle of other calls


@pytest.mark.full(simt=lambda given: given["strided"])
@pytest.mark.parametrize("strided", [False, True])
def test_a_handler_calls_at_any_point_of_a_forward(backend: Backend, rng: np.random.Generator, strided: bool) -> None:
    """Both batches move the running statistics, and both results are right."""
    x = normal(backend, rng)
    start = [rng.normal(size=8).astype(np.float32), rng.uniform(1, 2, 8).astype(np.float32)]

    def statistics() -> list[Any]:
        return [backend.array(a.copy())[::-2] if strided else backend.array(a[:4].copy()) for a in start]

    expected = statistics()
    for _ in range(2):
        y = Bits(cn.instance_norm(x, *expected))
    number, finished = 0, False
    while not finished:
        number += 1
        own, nested = statistics(), []

        def handler(own: Any = own, nested: Any = nested) -> None:
            nested.append(Bits(cn.instance_norm(x, *own)))

        with ending(), handled(Faults(number), handler):
            result = cn.instance_norm(x, *own)
        if not nested:
            finished = True
            cn.instance_norm(x, *own)
        assert bits(*own) == bits(*expected), f"handler at point {number}"
        assert {Bits(result), *nested} == {y}
    assert number > 10


@on_cpu
def test_a_finaliser_calls_as_a_forward_ends(
    backend: Backend, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the last forward kept goes as the statistics have been written; its memory is given back by Python code."""
    layer, once = (cn.InstanceNorm2d(4, momentum=0.5, track_running_stats=True, device="cpu") for _ in range(2))
    x = normal(backend, rng, (8, 4, 64, 64))
    for _ in range(3):
        y = Bits(once.forward(x))
    back, nested = result_pool._Memory._give_back, []

    def called(*given: Any) -> None:
        back(*given)
        if not nested:
            nested.append(None)
            with ending():
                nested.append(Bits(layer.forward(x)))

    monkeypatch.setattr(result_pool, "_memory", result_pool._Memory())
    monkeypatch.setattr(result_pool._Memory, "_give_back", called)
    kept = cn.instance_norm(x)
    result = layer.forward(kept)
    layer.running_mean[...], layer.running_var[...] = 0, 1
    del kept  # now the layer alone holds it
    assert not nested
    assert Bits(layer.forward(x)) == y
    assert nested == [None, y]
    layer.forward(x)
    del result
    assert bits(layer.running_mean, layer.running_var) == bits(once.running_mean, once.running_var)


@pytest.mark.long
@on_cpu
@pytest.mark.usefixtures("threads_as_they_were")
def test_a_handler_calls_as_helpers_are_started_and_ended(
    backend: Backend, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool is in the middle of starting threads, with Python's own locks of threads held, or of ending them."""
    monkeypatch.setattr(numpy_small, "MOST", 0)
    monkeypatch.setattr(numpy_path.NumpyWork, "pays", 1)
    monkeypatch.setattr(loops_path, "PAYS", 1)
    forget_layouts(monkeypatch)
    x = normal(backend, rng, (6, 4, 9, 9))
    expected = Bits(cn.instance_norm(x))
    number, finished = 0, False
    while not finished:
        number += 1
        pool = thread_pool._Pool()
        monkeypatch.setattr(thread_pool._state, "pool", pool)
        cn.set_num_threads(3)
        results: list[Bits] = []

        def handler(results: list[Bits] = results) -> None:
            results.append(Bits(cn.instance_norm(x)))

        with ending(), handled(Faults(number), handler, threading.__file__):
            result = cn.instance_norm(x)
            pool.end()
        finished = not results
        assert {Bits(result), *results} == {expected}, f"handler at point {number}"
        assert pool.helpers == []
    assert number > 20


# Processes


def _work(number: int) -> list[Any]:
    """In a worker: what a call gives, and a layer that went through a pickle."""
    x = np.random.default_rng(number).normal(size=(2, 3, 40, 41)).astype(np.float32)
    layer = pickle.loads(_layer)
    y = layer.forward(x)
    return bits(y, layer.backward(y), layer.weight.grad, layer.running_var)


def _begin(layer: bytes, way: bool, backend: str) -> None:
    global _layer  # noqa: PLW0603
    _layer = layer
    cpu.compiled = way
    if backend == "simt":
        from cupynorm.backend import MODULES

        MODULES["cpu"] = "emulator.backend"


_layer = b""


@pytest.mark.long
@pytest.mark.full(simt=lambda given: given["method"] != "spawn")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers(backend: Backend, rng: np.random.Generator, method: str) -> None:
    """Processes of every kind, with a layer that was pickled into them: the same bits as here."""
    if backend.name == "cupy" and method == "fork":
        pytest.skip("CUDA cannot be used in a forked child")
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip("not on this system")
    if backend.name == "cupy":
        pytest.skip("test_pickles_between_devices has it")
    layer = cn.InstanceNorm2d(3, affine=True, track_running_stats=True, device="cpu")
    layer.weight.data = [1.5, -2, 0.5]
    layer.forward(rng.normal(size=(2, 3, 5, 5)).astype(np.float32))
    given = pickle.dumps(layer), cpu.compiled, backend.name
    was = _layer
    _begin(*given[:2], "")
    try:
        expected = [_work(number) for number in range(3)]
        patch = pytest.MonkeyPatch()
        with patch.context() as inner:
            paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent), TESTS, os.environ.get("PYTHONPATH", "")])
            inner.setenv("PYTHONPATH", paths)
            inner.setattr("sys.stdin", None)
            with multiprocessing.get_context(method).Pool(2, _begin, given) as pool:
                assert pool.map(_work, range(3)) == expected
    finally:
        _begin(was, given[1], "")


@pytest.mark.gpu
def test_pickles_between_devices(rng: np.random.Generator) -> None:
    """A layer on a GPU comes back on the GPU; one that was moved to the CPU first has NumPy arrays."""
    layer = cn.InstanceNorm2d(3, affine=True, track_running_stats=True, device="cuda")
    import cupy

    x = cupy.asarray(rng.normal(size=(2, 3, 5, 5)), cupy.float32)
    layer.backward(layer.forward(x))
    twin = pickle.loads(pickle.dumps(layer))
    assert twin.device == layer.device
    assert_same(twin.forward(x), layer.forward(x))
    host = pickle.loads(pickle.dumps(layer.to_cpu()))
    assert type(host.weight.data) is np.ndarray
    reference.assert_close(host.eval().forward(x.get()), layer.eval().forward(x.get()))


# Ends


BUSY = """
import numpy as np, cupynorm as cn, threading, time, sys, os
from cupynorm import cpu
cpu.compiled = cpu.compiled and {way!r} == "compiled"
cn.set_num_threads(3)
x = np.random.default_rng(1).standard_normal((8, 64, 64, 65), dtype=np.float32)
layer = cn.InstanceNorm2d(64, affine=True, track_running_stats=True, device="cpu")
layer.backward(layer.forward(x))
begun = threading.Event()
def busy():
    while True:
        layer.forward(x)
        begun.set()
        layer.backward(x)
for _ in range(2):
    threading.Thread(target=busy, daemon=True).start()
begun.wait()
{end}
"""

ENDS = {
    "the end of the program": ("", 0),
    "sys.exit": ("sys.exit(3)", 3),
    "an error": ("raise SystemExit(4)", 4),
    "os._exit": ("os._exit(5)", 5),
    "a terminating signal": ("import signal; os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", -15),
}


@pytest.mark.long
@pytest.mark.parametrize("way", ["numpy", pytest.param("compiled", marks=pytest.mark.compiled)])
@pytest.mark.parametrize("end", ENDS)
def test_the_interpreter_ends_in_the_middle_of_calls(way: str, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Daemon threads are within calls, helpers at work for them: the process ends with its own code, and silently."""
    use_compiled(monkeypatch, way == "compiled")
    code, status = ENDS[end]
    ran = run(BUSY.format(way=way, end=code))
    assert (ran.returncode, ran.stdout, ran.stderr) == (status, "", "")


# Thousands


@pytest.mark.long
def test_thousands_of_calls(backend: Backend, rng: np.random.Generator) -> None:
    """Nothing grows in hundreds or thousands of forwards and backwards: what Python and NumPy hold, caches among it."""
    times = amount(50, 200) if backend.name == "simt" else amount(500, 2_000, 10_000)
    x, dy = normal(backend, rng, (1, 2, 3, 3)), normal(backend, rng, (1, 2, 3, 3))
    layer = cn.InstanceNorm2d(2, affine=True, track_running_stats=True, device=backend.device)

    def train(count: int) -> None:
        for _ in range(count):
            layer.cleargrads()
            layer.forward(x)
            layer.backward(dy)

    if backend.name == "simt":
        from emulator.backend import runtime

        runtime.counts.clear()
    train(20)
    gc.collect()
    with traced_memory():
        train(times // 10)  # what is kept once, as Python 3.10 keeps frames
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        if backend.name == "cupy":
            import cupy

            pool = cupy.get_default_memory_pool()
            held = pool.total_bytes()
        train(times)
        if backend.name == "simt":
            runtime.counts.clear()
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    assert grown < 20_000, f"{grown} bytes in {times} calls"
    if backend.name == "cupy":
        assert pool.total_bytes() == held
    assert layer.saved[0].x is x


def test_many_shapes_in_turn(backend: Backend, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cache of what follows from a shape has an end, and results do not depend on what it has forgotten."""
    from functools import _lru_cache_wrapper, lru_cache

    cn.instance_norm(normal(backend, rng))  # imports what there is
    caches = {
        (module, name): value for module, file in sys.modules.items() if module.startswith("cupynorm.")
        for name, value in vars(file).items() if isinstance(value, _lru_cache_wrapper)
    }  # fmt: skip
    by_shape = {key: cache for key, cache in caches.items() if cache.cache_parameters()["maxsize"] is not None}
    assert len({name for _, name in by_shape}) > 5
    # The rest is of few things: dtypes, activations, kinds of calls, rows of at most ROW elements.
    rest = {name for _, name in caches.keys() - by_shape.keys()}
    assert rest <= {
        "_table", "half_erfcx", "ones_row", "_target", "converts_halves", "_stamp", "module_of", "steps_of",
        "_function_of", "no_parameter", "_writers", "inlined", "gpu_status", "resident_threads", "widest",
    }, rest  # fmt: skip
    for (module, name), cache in by_shape.items():  # so small that all of it is forgotten again and again
        monkeypatch.setattr(sys.modules[module], name, lru_cache(maxsize=2)(cache.__wrapped__))
    shapes = [(1 + i % 3, 1 + i % 4, 2 + i % 5, 1 + i % 7) for i in range(30 if backend.name == "simt" else 120)]
    for shape in shapes * 2:
        x = rng.normal(size=shape).astype(np.float32)
        y, saved = cn.instance_norm_forward(backend.array(x), eps=1.0)
        reference.assert_close(backend.host(y), reference.forward(x, eps=1.0))
        cn.instance_norm_backward(y, saved)
