"""The emulator's clusters, distributed shared memory and cooperative grids: correct kernels pass, broken ones fail."""

from __future__ import annotations

import math
import os
import platform
from typing import Any

import numpy as np
import pytest
from emulator import runtime as emulator
from emulator.runtime import Emulator, SimtError, Text
from helpers.seeds import seed_of

from cupynorm.cuda.plan import Step

pytestmark = [pytest.mark.simt, pytest.mark.full]

THREADS = 64


@pytest.fixture(autouse=True)
def _compiler() -> None:
    emulator.require()


def launch(
    source: str,
    *args: Any,
    grid: tuple[int, int],
    cluster: int = 1,
    cooperative: bool = False,
    order: str = "forward",
    threads: int = THREADS,
    shared: int = 256,
    kernels: tuple[str, ...] = ("kernel",),
    kernel: int = 0,
) -> emulator.Count:
    """Run one of the kernels of a source text over arrays and numbers, and return the bytes it moved."""
    runtime = Emulator(order=order)
    runtime.seed = seed_of(os.environ["PYTEST_CURRENT_TEST"]) % 2**16
    print(f"emulator seed {runtime.seed}, {order}")
    step = Step(
        "text", kernels[kernel], kernels[kernel], grid, threads, shared, cluster=cluster, cooperative=cooperative
    )
    values = tuple(np.uintp(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in args)
    arrays = [a for a in args if isinstance(a, np.ndarray)]
    runtime.prepare((Text("text", f'#line 1 "text"\n{source}', kernels), step), values, arrays)()
    return runtime.counts[-1]


def without(source: str, mark: str) -> str:
    """Return the source without the line that ends with this comment; the other lines keep their numbers."""
    lines = source.splitlines()
    (here,) = (i for i, line in enumerate(lines) if line.endswith(f"// {mark}"))
    return "\n".join([*lines[:here], "", *lines[here + 1 :]])


#: The sums of a block's two or more warps, which go to own[].
_OWN = """
    const unsigned i = threadIdx.x, number = (blockIdx.y * gridDim.x + blockIdx.x) * blockDim.x + i;
    const unsigned warps = blockDim.x / 32;
    double* own = (double*)shared_memory();
    double s = load(x + number);
    for (int distance = 16; distance; distance /= 2) s += __shfl_xor_sync(0xffffffff, s, distance);
"""

#: Every thread of a cluster gets the sum over the cluster by reading the other blocks' sums.
PULL = f"""
KERNEL(64, 1) CLUSTER_OF(4) kernel(const double* x, double* sums, int size) {{{_OWN}
    cluster_arrive(); cluster_wait();  // begun
    if (i % 32 == 0) own[i / 32] = s;
    cluster_arrive(); __syncthreads(); cluster_wait();  // written
    double total = 0;
    for (int r = 0; r < size; r++) for (unsigned w = 0; w < warps; w++) total += peer(own + w, r)[0];
    store(sums + number, total);
    cluster_arrive(); cluster_wait();  // read
}}
"""

#: The same with pointers to the other blocks' memory that are taken early.
EARLY = f"""
KERNEL(64, 1) CLUSTER_OF(4) kernel(const double* x, double* sums, int size) {{{_OWN}
    cluster_arrive(); cluster_wait();  // begun
    const double* others[16];
    for (int r = 0; r < size; r++) others[r] = peer(own, r);
    if (i % 32 == 0) own[i / 32] = s;
    cluster_arrive(); cluster_wait();  // written
    double total = 0;
    for (int r = 0; r < size; r++) for (unsigned w = 0; w < warps; w++) total += others[r][w];
    store(sums + number, total);
    cluster_arrive(); cluster_wait();  // read
}}
"""

#: The same, but each block writes to the others.
PUSH = f"""
KERNEL(64, 1) CLUSTER_OF(4) kernel(const double* x, double* sums, int size) {{{_OWN}
    cluster_arrive(); cluster_wait();  // begun
    const unsigned w = i / 32, at = block_in_cluster() * warps + w;
    if (i % 32 == 0) for (int r = 0; r < size; r++) *peer(own + at, r) = s;
    cluster_arrive(); cluster_wait();  // written
    double total = 0;
    for (unsigned k = 0; k < size * warps; k++) total += own[k];
    store(sums + number, total);
}}
"""

#: Every thread of the grid gets the sum over the grid.
GRID = """
KERNEL(64, 1) kernel(const double* x, double* partials, unsigned* counter, double* sums) {
    const unsigned i = threadIdx.x, number = (blockIdx.y * gridDim.x + blockIdx.x) * blockDim.x + i;
    const unsigned blocks = gridDim.x * gridDim.y;
    store(partials + number, load(x + number));
    __syncthreads();  // stored
    if (i == 0) add_release(counter);  // release
    if (i == 0) wait_until(counter, blocks);  // wait
    __syncthreads();  // waited
    double total = 0;
    for (unsigned k = 0; k < blocks * blockDim.x; k++) total += load_fresh(partials + k);
    store(sums + number, total);
}
"""


def cluster_sums(
    source: str, rng: np.random.Generator, order: str, cluster: int = 4, threads: int = THREADS
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums that the threads of six clusters got, and the exact ones."""
    grid = (3 * cluster, 2)
    x = rng.normal(size=(2, 3, cluster * threads))
    sums = np.full(x.shape, np.nan)
    shared = cluster * threads // 32 * 8
    launch(source, x, sums, np.int32(cluster), grid=grid, cluster=cluster, order=order, threads=threads, shared=shared)
    exact = np.array([[math.fsum(values) for values in row] for row in x])
    return sums, np.broadcast_to(exact[..., None], x.shape)


def grid_sums(source: str, rng: np.random.Generator, order: str, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums that the threads of a cooperative grid of eight blocks got, and the exact ones."""
    x = rng.normal(size=(8, THREADS))
    partials, sums, counter = np.full(x.shape, np.nan), np.full(x.shape, np.nan), np.zeros(1, np.uint32)
    launch(source, x, partials, counter, sums, grid=(4, 2), order=order, **({"cooperative": True} | options))
    return sums, np.full(x.shape, math.fsum(x.flat))


def right(sums: np.ndarray, exact: np.ndarray) -> bool:
    return np.allclose(sums, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cluster", [1, 2, 4, 16])
@pytest.mark.parametrize("source", [PULL, EARLY, PUSH], ids=["pull", "early", "push"])
def test_cluster_sum(rng: np.random.Generator, source: str, cluster: int) -> None:
    for order in emulator.ORDERS:
        assert right(*cluster_sums(source, rng, order, cluster))


def test_large_cluster(rng: np.random.Generator) -> None:
    assert right(*cluster_sums(PULL, rng, "shuffled", 16, 512))


def test_cluster_sum_needs_its_barrier(rng: np.random.Generator) -> None:
    """A value that another block has not written yet is NaN; a block that does not wait has ended."""
    for order in emulator.ORDERS:
        for source in (PULL, EARLY):
            sums, _ = cluster_sums(without(source, "written"), rng, order)
            assert np.isnan(sums).any()
    for order in ("forward", "reverse"):
        with pytest.raises(SimtError, match="has ended"):
            cluster_sums(without(PUSH, "written"), rng, order)


def test_write_after_cluster_arrive(rng: np.random.Generator) -> None:
    """A write between arrive and wait is too late."""
    write, meet = "if (i % 32 == 0) own[i / 32] = s;", "cluster_arrive(); __syncthreads(); cluster_wait();  // written"
    assert f"{write}\n    {meet}" in PULL
    late = PULL.replace(f"{write}\n    {meet}", f"cluster_arrive();\n{write}\ncluster_wait();")
    assert not all(right(*cluster_sums(late, rng, order)) for order in emulator.ORDERS)


def test_memory_of_a_block_that_has_not_begun(rng: np.random.Generator) -> None:
    for order in emulator.ORDERS:
        assert right(*cluster_sums(without(PULL, "begun"), rng, order))  # "written" is barrier enough
    for order in ("forward", "reverse"):  # shuffled, all may have begun before the first writes
        with pytest.raises(SimtError, match="has not begun"):
            cluster_sums(without(PUSH, "begun"), rng, order)


def test_memory_of_a_block_that_has_ended(rng: np.random.Generator) -> None:
    for order in emulator.ORDERS:
        with pytest.raises(SimtError, match="has ended"):
            cluster_sums(without(PULL, "read"), rng, order)
        sums, _ = cluster_sums(without(EARLY, "read"), rng, order)
        assert np.isnan(sums).any()


@pytest.mark.parametrize("cluster", [1, 2])
def test_grid_sum(rng: np.random.Generator, cluster: int) -> None:
    for order in emulator.ORDERS:
        assert right(*grid_sums(GRID, rng, order, cluster=cluster))


@pytest.mark.parametrize("mark", ["stored", "wait", "waited"])
def test_grid_sum_needs_its_barriers(rng: np.random.Generator, mark: str) -> None:
    results = [grid_sums(without(GRID, mark), rng, order) for order in emulator.ORDERS]
    assert not all(right(*r) for r in results)


def test_deadlock(rng: np.random.Generator) -> None:
    waits = r"deadlock: thread 0 of block \d,\d waits for a counter at line 8 to reach 8, it stands at "
    for order in emulator.ORDERS:
        with pytest.raises(SimtError, match=waits + "0"):
            grid_sums(without(GRID, "release"), rng, order)
        with pytest.raises(SimtError, match=waits + "1"):  # the blocks do not run together
            grid_sums(GRID, rng, order, cooperative=False)


def test_one_lane_waits_for_a_counter(rng: np.random.Generator) -> None:
    """The other lanes of its warp wait for it."""
    source = GRID.replace("if (i == 0) wait_until", "if (i % 32 == 7) wait_until")
    source = source.replace("__syncthreads();  // waited", "__syncwarp();  // waited")
    for order in emulator.ORDERS:
        assert right(*grid_sums(source, rng, order))
    assert not all(right(*grid_sums(without(source, "waited"), rng, order)) for order in emulator.ORDERS)


def test_accesses_to_counters_are_counted(rng: np.random.Generator) -> None:
    x, partials, sums, counter = *rng.normal(size=(3, 8, THREADS)), np.zeros(1, np.uint32)
    count = launch(GRID, x, partials, counter, sums, grid=(4, 2), cooperative=True)
    address = counter.ctypes.data
    assert counter[0] == 8
    assert (count.size[address], count.read[address], count.written[address]) == (4, 8 * (4 + 4), 8 * 4)
    assert count.read[partials.ctypes.data] == partials.nbytes * partials.size


TICKET = """
KERNEL(64, 1) CLUSTER_OF(4) kernel(unsigned* counter, unsigned* tickets) {
    if (threadIdx.x) return;
    store(tickets + blockIdx.y * gridDim.x + blockIdx.x, load(counter));
    add_release(counter);
}
"""


@pytest.mark.parametrize(("cluster", "cooperative"), [(1, False), (4, False), (1, True), (4, True)])
def test_order_of_blocks(cluster: int, cooperative: bool) -> None:
    came = {}
    for order in emulator.ORDERS:
        counter, tickets = np.zeros(1, np.uint32), np.zeros(40, np.uint32)
        launch(TICKET, counter, tickets, grid=(20, 2), cluster=cluster, cooperative=cooperative, order=order)
        came[order] = tickets.tolist()
        assert sorted(came[order]) == list(range(40))
    assert came["forward"] == sorted(came["forward"])
    assert came["reverse"] == came["forward"][::-1]
    assert came["shuffled"] not in (came["forward"], came["reverse"])  # chance: 2 in 10!


#: The body of a kernel over two clusters of two blocks (line 3 on), and the emulator's complaint.
WRONG = {
    "wait alone": ("cluster_wait();", "cluster_wait without cluster_arrive at line 3"),
    "wait twice": ("cluster_arrive();\ncluster_wait();\ncluster_wait();", "cluster_wait without .* at line 5"),
    "arrive twice": ("cluster_arrive();\ncluster_arrive();\ncluster_wait();", "second cluster_arrive .* at line 4"),
    "arrive alone": ("cluster_arrive();", "ends without cluster_wait"),
    "thread ends": (
        "if (threadIdx.x == 5 && blockIdx.x == 3) return;\ncluster_arrive();\ncluster_wait();",
        r"divergence: thread \d+ of block [23],0 waits for its cluster at line 5, thread 5 of block 3,0 has ended",
    ),
    "block ends": (
        "if (block_in_cluster() == 1) return;\ncluster_arrive();\ncluster_wait();",
        r"divergence: .* of block [02],0 .* line 5, thread 0 of block [13],0 has ended",
    ),
    "thread elsewhere": (
        "if (threadIdx.x == 5) __syncthreads();\ncluster_arrive();\ncluster_wait();",
        r"divergence: .* line 5, thread 5 of block .* has not arrived",
    ),
    "lines": (
        "if (block_in_cluster())\n{ cluster_arrive(); cluster_wait(); }\nelse\n{ cluster_arrive(); cluster_wait(); }",
        "divergence: a cluster_arrive at line [46], others at line [46]",
    ),
    "warp": (
        "if (threadIdx.x == 5) __syncthreads();\n__syncwarp();",
        "divergence: lanes of warp 0 wait at line 4, lane 5",
    ),
    "peer of global": ("peer(data, 0);", "4 bytes are not in shared memory"),
    "peer behind shared": ("peer(own + 64, 0);", "4 bytes are not in shared memory"),
    "staged in global": ("in_shared(data) = 1;", "4 bytes are not in shared memory"),
    "behind what is staged": ("in_shared((uint64_t*)(own + 63));", "8 bytes are not in shared memory"),
    "staged askew": ("in_shared((uint64_t*)(own + 1));", "8 bytes in shared memory are not aligned"),
    "peer rank": ("peer(own, 2);", "peer.* block 2, which is not in the cluster"),
    "canary": ("if (blockIdx.x == 3) own[64] = 1;", "behind the end of shared memory"),
    "no counter": ("wait_until(data + 1, 1);", "outside of every array"),
    "no counter to add to": ("add_release(data + 1);", "outside of every array"),
    "not a counter": ("wait_until((unsigned*)((char*)data + 1), 1);", "not aligned"),
}


def wrong() -> str:
    """Return a kernel for each wrong use, with its number in the name."""
    head = "KERNEL(64, 1) CLUSTER_OF(2) wrong_{}(unsigned* data) {{\nunsigned* own = (unsigned*)shared_memory();\n"
    return "\n".join(f'#line 1 "text"\n{head.format(k)}{body}\n}}' for k, (body, _) in enumerate(WRONG.values()))


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use(name: str) -> None:
    kernels, kernel = tuple(f"wrong_{k}" for k in range(len(WRONG))), list(WRONG).index(name)
    data = np.zeros(1, np.uint32)
    for order in emulator.ORDERS:
        with pytest.raises(SimtError, match=WRONG[name][1]):
            launch(wrong(), data, grid=(4, 1), cluster=2, order=order, kernels=kernels, kernel=kernel)


FLUSH = """
KERNEL(64, 1) kernel(const float* given, float* out) {
    const unsigned i = threadIdx.x;
    if (i < 4) store(out + i, i < 2 ? load(given + i) * 2 : load(given + i) * load(given + i));
}
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator flushes on x86 alone")
def test_denormals_are_flushed() -> None:
    """Operands and results are flushed, in kernels only, as a GPU does in kernels that CuPy compiles."""
    given, out = np.array([1e-38, 1.2e-38, 1e-20, 1.1e-19], np.float32), np.full(4, -1, np.float32)
    launch(FLUSH, given, out, grid=(1, 1))
    two = np.float32(2)
    assert out.tolist() == [0, two * given[1], 0, given[3] * given[3]]
    assert given[0] * two > given[0] > 0
    assert 0 < given[2] * given[2] < given[0]


@pytest.mark.parametrize(("grid", "cluster"), [((6, 4), 4), ((32, 1), 32), ((4, 1), 0)])
def test_grid_of_incomplete_clusters(grid: tuple[int, int], cluster: int) -> None:
    tickets = np.zeros(64, np.uint32)
    with pytest.raises(SimtError, match=f"a cluster of {cluster} blocks in a grid of {grid[0]} along x"):
        launch(TICKET, np.zeros(1, np.uint32), tickets, grid=grid, cluster=cluster)
    assert not tickets.any()
