"""
A CUDA graph
============

The forwards and backwards of a chain of normalisations are captured in a CUDA graph, which is then launched with new
data. The results have the same bits as those of the calls. The example is for those who train or infer with small
arrays on a GPU, where the time that the host spends in calls matters. It writes ``cuda_graph.png``.

Run it with ``python examples/cuda_graph.py``; ``pip install '.[demo,cuda13]'``, or ``cuda12``, installs the
packages it needs. Without a GPU it prints the reason and draws nothing. It has been run with the fake GPU of the tests,
not yet on a real one.
"""

import time
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

import cupynorm as cn
from cupynorm.devices import gpu_status

usable, status = gpu_status()
if usable:
    import cupy as cp
else:
    print(f"This example needs a GPU ({status}).")

# %%
# The calls
# ---------
# A chain of normalisations stands for a network: the result of each is the input of the next.

SHAPE = (2, 16, 16, 16)
LAYERS = (1, 2, 4)
REPEATS = 10


def forward_and_backward(x: Any, dy: Any, weight: Any, bias: Any, layers: int) -> list[Any]:
    """Return y, dx, and the gradients of the weight and the bias of each layer."""
    states, gradients = [], []
    for _ in range(layers):
        x, saved = cn.instance_norm_forward(x, weight, bias, activation="relu")
        states.append(saved)
    for saved in reversed(states):
        dy, *of_parameters = cn.instance_norm_backward(dy, saved)
        gradients += of_parameters
    return [x, dy, *gradients]


# %%
# The capture
# -----------
# ``warmup`` compiles the kernels and prepares the memory pool. Then the calls are recorded instead of run. The graph
# keeps using the memory that they allocated, so it needs a pool of its own, which must live as long as the graph.


def capture(stream: Any, pool: Any, call: Callable[[], list[Any]], like: Any) -> tuple[Any, list[Any]]:
    """Return a graph of a call, and the arrays that each launch of the graph fills."""
    with stream, cp.cuda.using_allocator(pool.malloc):
        cn.warmup(like, activation="relu")
        stream.begin_capture()
        results = call()
        return stream.end_capture(), results


# %%
# The host time
# -------------
# A call returns when its kernels are enqueued; the GPU may still be busy then. The time until the return is measured,
# with an idle GPU at the beginning.


def host_times(stream: Any, call: Callable[[], Any]) -> np.ndarray:
    """Return quantiles of the microseconds until a call returns: 10, 50 and 90 %."""
    times = []
    for _ in range(REPEATS):
        stream.synchronize()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    stream.synchronize()
    return np.quantile(times, (0.1, 0.5, 0.9))


# %%
# Launches with new data
# ----------------------
# A graph reads the arrays that it was captured with. So new data is copied into them, on the stream of the graph.


def measure(layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Compare the results of a graph and of direct calls, and return the host times of direct calls and launches."""
    rng = np.random.default_rng(0)
    stream, pool = cp.cuda.Stream(non_blocking=True), cp.cuda.MemoryPool()
    with stream:
        x, dy = (cp.empty(SHAPE, cp.float32) for _ in range(2))
        weight, bias = (cp.asarray(rng.normal(size=SHAPE[1]).astype(np.float32)) for _ in range(2))

        def call() -> list[Any]:
            return forward_and_backward(x, dy, weight, bias, layers)

        graph, results = capture(stream, pool, call, like=x)
        for _ in range(2):
            x.set(rng.normal(3, 2, SHAPE).astype(np.float32), stream=stream)
            dy.set(rng.normal(size=SHAPE).astype(np.float32), stream=stream)
            graph.launch(stream)
            for of_graph, of_call in zip(results, call(), strict=True):
                assert of_graph.get().tobytes() == of_call.get().tobytes()
        calls, launches = host_times(stream, call), host_times(stream, lambda: graph.launch(stream))
    print(f"{layers} layers: the same bits; host time of the calls {calls[1]:.0f} µs, of a launch {launches[1]:.0f} µs")
    return calls, launches


# %%
# The figure has the medians, and the range from 10 to 90 % of the times.

if usable:
    times = np.array([measure(layers) for layers in LAYERS])
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    for index, (name, colour) in enumerate({"direct calls": "#c1440e", "launch of a graph": "#1f5fa8"}.items()):
        low, median, high = times[:, index].T
        axis.plot(LAYERS, median, "o-", color=colour, label=name)
        axis.fill_between(LAYERS, low, high, color=colour, alpha=0.2, lw=0)
    axis.set(xlabel="normalisations, each forward and backward", ylabel="host time (µs)", xticks=LAYERS)
    axis.set_ylim(bottom=0)
    axis.set_title(f"host time of calls and of a CUDA graph, float32 arrays {SHAPE}")
    axis.legend(frameon=False)
    figure.savefig("cuda_graph.png", dpi=100)
