"""cupynorm.dask: arrays of any chunks, each normalised as a whole."""

from __future__ import annotations

import itertools
import threading
import warnings
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from helpers import reference
from helpers.backends import Backend, on
from helpers.compare import BFLOAT16, assert_within, bits, wide

import cupynorm as cn
import cupynorm.dask as cnd

pytestmark = pytest.mark.extras

SHAPE = (3, 4, 9, 10)
CHUNKS = [
    SHAPE, (1, 4, 9, 10), (2, 3, 9, 10), (3, 4, 4, 10), (3, 4, 9, 3), (1, 1, 3, 4), (2, 3, 5, 7),
    ((1, 2), (4,), (0, 9), (1, 0, 9)), ((0, 3), (1, 3), (9,), (10,)),
]  # fmt: skip


def values(rng: np.random.Generator, shape: tuple[int, ...] = SHAPE, dtype: Any = np.float32) -> np.ndarray:
    return (rng.normal(size=shape) * 3 + 20).astype(dtype)


@on("numpy", "simt")
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_chunks_give_the_results_of_the_whole(backend: Backend, rng: np.random.Generator, chunks: Any) -> None:
    x, residual = values(rng), values(rng) / 8
    weight, bias = rng.normal(size=(2, *SHAPE[:2])).astype(np.float32)
    a = da.from_array(x, chunks=chunks)
    for given in (
        {}, {"weight": weight[0], "bias": da.from_array(bias, chunks=1)},
        {"weight": weight, "activation": "silu", "residual": da.from_array(residual, chunks=5), "eps": 1e-3},
        {"ddof": 2, "eps_mode": "std", "eps": 0.5},
    ):  # fmt: skip
        y = cnd.instance_norm(a, **given)
        assert (y.shape, y.chunks, y.dtype, type(y._meta)) == (a.shape, a.chunks, a.dtype, np.ndarray)
        if "activation" in given:
            exact = reference.forward(x, weight, activation="silu", residual=residual, eps=1e-3)
        else:
            convention = {name: given[name] for name in ("ddof", "eps_mode", "eps") if name in given}
            exact = reference.forward(x, given.get("weight"), bias if "bias" in given else None, **convention)
        assert_within(y.compute(scheduler="synchronous"), exact, 2e-5)
    (found,) = dask.compute(cnd.moments(a), scheduler="synchronous")
    assert type(found) is cn.Moments and [each.dtype for each in vars(found).values()] == [int, float, float]
    mean, var = reference.statistics(x)
    assert (found.count == 90).all()
    assert_within(found.mean, mean, 1e-6)
    assert_within(found.m2, var * 90, var * 1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("shape", [(2, 3, 50), (2, 3, 4, 5, 6)], ids=str)
def test_dtypes_and_ranks(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> None:
    x = values(rng, shape, BFLOAT16 if dtype == "bfloat16" else dtype)
    y = cnd.instance_norm(da.from_array(x, chunks=(1, 2, *(3,) * (len(shape) - 2))), np.full(3, 2, x.dtype))
    assert y.dtype == x.dtype and y.compute().dtype == x.dtype
    assert_within(y.compute(), 2 * reference.forward(x), 0.03 if dtype != "float64" else 1e-12)


@pytest.mark.parametrize(("input", "dtype"), [("uint16", "float32"), ("int8", "float16"), ("float32", "float64")])
def test_results_of_another_dtype(rng: np.random.Generator, input: str, dtype: str) -> None:
    """Integers are read as they are, in each chunk."""
    x = (values(rng) + 40).astype(input)
    a = da.from_array(x, chunks=(1, 3, 5, 4))
    residual = da.from_array(values(rng, dtype=dtype), chunks=4)
    y = cnd.instance_norm(a, residual=residual, dtype=dtype)
    assert (y.shape, y.chunks, y.dtype, y._meta.dtype) == (a.shape, a.chunks, dtype, dtype)
    found = y.compute()
    assert found.dtype == dtype
    exact = reference.forward(x, residual=residual.compute())
    assert_within(found, exact, 0.05 if dtype == "float16" else 2e-5)
    if dtype == "float64":
        assert_within(found, exact, 1e-11)
    assert_within(cnd.moments(a).mean.compute(), x.mean((2, 3)), 1e-4)


@on("numpy", "simt")
@pytest.mark.parametrize("chunks", [SHAPE, (1, 3, 5, 4), (2, 3, 9, 3)], ids=str)
@pytest.mark.parametrize("kind", ["plane", "own", "dask", "lengths"])
def test_masks(backend: Backend, rng: np.random.Generator, kind: str, chunks: Any) -> None:
    """The results of the whole, whatever is outside of the mask."""
    x = values(rng).astype(np.float64)
    mask = rng.random({"plane": (9, 10), "dask": (3, 1, 9, 10)}.get(kind, SHAPE)) < 0.6
    options: dict[str, Any] = {"mask": da.from_array(mask, chunks=2) if kind == "dask" else mask}
    if kind == "lengths":
        options = {"lengths": [10, 0, 4]}
        mask = np.arange(10) < np.array([10, 0, 4]).reshape(3, 1, 1, 1)
    spoiled = np.where(mask, x, np.nan)
    a, residual = da.from_array(spoiled, chunks=chunks), da.from_array(values(rng).astype(np.float64), chunks=4)
    for reread in (True, False):
        y = cnd.instance_norm(a, residual=residual, activation="relu", reread=reread, ddof=1, **options)
        found = y.compute(scheduler="synchronous")
        expected = cn.instance_norm(spoiled, residual=residual.compute(), activation="relu", ddof=1, **(
            {"mask": mask} if "mask" in options else options))  # fmt: skip
        assert_within(found, expected, 1e-11)
    (moments,) = dask.compute(cnd.moments(a, **options), scheduler="synchronous")
    assert (moments.count == np.broadcast_to(mask, SHAPE).sum((2, 3))).all()


def test_refusals_of_masks() -> None:
    a = da.zeros((2, 3, 4, 5), chunks=2, dtype=np.float32)
    for options, error, message in (
        ({"mask": np.ones(5)}, TypeError, "mask has dtype float64; needed is bool"),
        ({"mask": [True] * 5}, TypeError, "mask must be an array, got list"),
        ({"mask": np.ones(4, bool)}, ValueError, r"mask has shape \(4,\), which does not broadcast"),
        ({"mask": np.ones(5, bool), "lengths": [1, 2]}, ValueError, "mask and lengths are both given"),
        ({"lengths": [1, 6]}, ValueError, "lengths must be 0 to 5"),
        ({"lengths": 5}, TypeError, "lengths must be a list or a NumPy array"),
    ):
        for call in (cnd.instance_norm, cnd.moments):
            with pytest.raises(error, match=message):
                call(a, **options)


@pytest.mark.long  # and not quick: other processes have the compiled loops, which the quick tier turns off
def test_every_scheduler_gives_the_same_bits(rng: np.random.Generator) -> None:
    x = values(rng, (2, 3, 40, 50))
    found = []
    for scheduler in ("synchronous", "threads", "threads", "processes"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # processes are forked beside threads
            y = cnd.instance_norm(da.from_array(x, chunks=(1, 2, 7, 11)))
            found.append(bits(y.compute(scheduler=scheduler, num_workers=2)))
    assert found == [found[0]] * 4


@pytest.mark.long
def test_distributed_gives_the_same_bits(rng: np.random.Generator) -> None:
    distributed = pytest.importorskip("distributed")
    x = values(rng, (2, 3, 40, 50))
    y = cnd.instance_norm(da.from_array(x, chunks=(1, 2, 7, 11)))
    expected = bits(y.compute(scheduler="synchronous"))
    options = {"dashboard_address": None, "n_workers": 2, "threads_per_worker": 1, "silence_logs": "ERROR"}
    for processes in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with distributed.LocalCluster(processes=processes, **options) as cluster, distributed.Client(cluster):
                assert bits(y.compute()) == expected
                persisted = da.from_array(x, chunks=(1, 2, 7, 11)).persist()
                assert bits(cnd.instance_norm(persisted).compute()) == expected
                (moments,) = dask.compute(cnd.moments(da.from_array(x, chunks=9)))
        assert (moments.count == 2000).all()


class Loads:
    """Chunks that count how often they are loaded, and what happens in which order."""

    def __init__(self, x: np.ndarray, chunks: Any):
        self.order: list[str] = []
        self._lock = threading.Lock()
        self.array = da.from_array(x, chunks=chunks).map_blocks(self.load, dtype=x.dtype, meta=x[:0])

    @property
    def number(self) -> int:
        return self.order.count("load")

    def note(self, what: str) -> None:
        with self._lock:
            self.order.append(what)

    def load(self, block: np.ndarray) -> np.ndarray:
        self.note("load")
        return block

    def store(self, block: np.ndarray) -> np.ndarray:
        self.note("store")
        return block


def test_nothing_is_loaded_before_it_is_needed_nor_more_often(rng: np.random.Generator) -> None:
    x = values(rng)
    for chunks, reread, expected in (((1, 2, 9, 10), True, 6), ((3, 4, 3, 10), True, 6), ((3, 4, 3, 10), False, 3)):
        loads = Loads(x, chunks)
        y = cnd.instance_norm(loads.array, reread=reread)
        moments = cnd.moments(loads.array)
        merged = moments.merge(moments)
        assert loads.number == 0
        y.compute(scheduler="synchronous", optimize_graph=False)
        assert loads.number == expected
        loads.order.clear()
        dask.compute(merged.var(), merged.std(ddof=1), scheduler="synchronous", optimize_graph=False)
        assert loads.number == (6 if chunks[0] == 1 else 3)


#: Graphs of several kinds of layers between the loads and the array that is normalised.
GRAPHS: dict[str, Any] = {
    "itself": lambda a: a,
    "new axes": lambda a: a[0, 0][None, None],
    "reshape": lambda a: a.reshape(1, 1, 8, 3, 2),
    "rechunk": lambda a: a.rechunk((1, 1, 1, 6)),
    "slices": lambda a: a[:, :, :, 1:],
    "concatenate": lambda a: da.concatenate([a, a * 2], axis=2),
    "delayed": lambda a: da.concatenate(
        [da.from_delayed(each, (1, 1, 2, 6), a.dtype, meta=a._meta) for each in a.to_delayed().ravel()], axis=2
    ),
    "overlap": lambda a: a.map_overlap(lambda block: block, depth=(0, 0, 1, 0), boundary="reflect", meta=a._meta),
}  # fmt: skip


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("optimize", [True, False])
def test_chunks_are_loaded_again_only_after_all_moments(rng: np.random.Generator, graph: str, optimize: bool) -> None:
    """So that no chunk is kept while the others are read."""
    x = values(rng, (1, 1, 8, 6))
    loads = Loads(x, (1, 1, 2, 6))
    a = GRAPHS[graph](loads.array)
    y = cnd.instance_norm(a).map_blocks(loads.store, dtype=x.dtype, meta=a._meta)
    found = y.compute(scheduler="synchronous", optimize_graph=optimize)
    assert_within(found, reference.forward(a.compute(scheduler="synchronous")), 2e-5)
    order = loads.order[:-4]  # without those of the line above
    before = order[: order.index("store")].count("load")
    assert order.count("load") == 8, order
    assert before <= (7 if graph == "overlap" else 5), order  # with overlap a chunk needs its neighbours


def test_a_residual_is_loaded_again_too(rng: np.random.Generator) -> None:
    """And so is an array whose own lazy moments are given."""
    x = values(rng, (1, 1, 8, 6))
    for given in (lambda a: {"residual": a}, lambda a: {"moments": cnd.moments(a)}):
        loads = Loads(x, (1, 1, 2, 6))
        y = cnd.instance_norm(loads.array, **given(loads.array)).map_blocks(loads.store, dtype=x.dtype, meta=x[:0])
        found = y.compute(scheduler="synchronous")
        assert loads.order[:4] == ["load"] * 4 and loads.number == 8
        residual = x if "residual" in given(loads.array) else None
        assert_within(found, reference.forward(x, residual=residual), 2e-5)


def test_persisted_arrays_are_not_copied(rng: np.random.Generator) -> None:
    x = values(rng, (1, 1, 8, 6))
    a = da.from_array(x, chunks=(1, 1, 2, 6)).persist(scheduler="synchronous")
    y = cnd.instance_norm(a)
    assert_within(y.compute(scheduler="synchronous"), reference.forward(x), 2e-5)
    assert_within(cnd.instance_norm(cnd.instance_norm(a)).compute(), reference.forward(reference.forward(x)), 2e-5)


@on("numpy", "compiled")
def test_bits_do_not_depend_on_the_layout_and_address_of_chunks(backend: Backend, rng: np.random.Generator) -> None:
    """A scheduler may move chunks to other memory, and pickling changes their layout."""
    x = values(rng, (2, 3, 8, 50))
    unaligned = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    unaligned[...] = x
    found = []
    for made in (x, np.asfortranarray(x), np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1), unaligned):
        for chunks in (x.shape, (2, 3, 3, 20)):
            y = cnd.instance_norm(da.from_array(made, chunks=chunks, name=False, inline_array=True))
            found.append(bits(y.compute(scheduler="synchronous")))
    assert found == found[:2] * 4


def test_given_moments(rng: np.random.Generator) -> None:
    x, other = values(rng), values(rng)
    a = da.from_array(x, chunks=(2, 3, 5, 7))
    mine, theirs = cn.moments(x), cn.moments(other)
    expected = cn.instance_norm(x, moments=mine.merge(theirs))
    for moments in (mine.merge(theirs), cnd.moments(a).merge(cnd.moments(da.from_array(other, chunks=(2, 3, 4, 4))))):
        y = cnd.instance_norm(a, moments=moments)
        assert_within(y.compute(), wide(expected), 1e-5)
    one = da.from_array(x[..., :1, :1], chunks=2)
    assert_within(
        cnd.instance_norm(one, moments=mine).compute(), wide(cn.instance_norm(x, moments=mine))[..., :1, :1], 1e-5
    )


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5)], ids=str)
def test_empty_arrays(shape: tuple[int, ...]) -> None:
    a = da.zeros(shape, chunks=2, dtype=np.float32)
    assert cnd.instance_norm(a).compute().shape == shape
    (found,) = dask.compute(cnd.moments(a))
    assert found.count.shape == shape[:2] and not found.count.any()


def test_many_chunks_are_merged_by_a_tree() -> None:
    """In a few steps from any chunk to the moments of the whole."""
    a = da.zeros((1, 1, 1000), chunks=(1, 1, 1), dtype=np.float32)
    graph = dict(cnd.moments(a).count.__dask_graph__())
    dependencies = {key: dask.core.get_dependencies(graph, key) for key in graph}

    def depth(key: Any) -> int:
        return 1 + max(map(depth, dependencies[key]), default=0)

    assert max(map(depth, graph)) <= 9


def test_refusals() -> None:
    a = da.zeros((2, 3, 4, 5), chunks=2, dtype=np.float32)
    with pytest.raises(TypeError, match=r"a must be a dask array, got numpy\.ndarray"):
        cnd.instance_norm(np.zeros((2, 3, 4)))
    with pytest.raises(TypeError, match=r"a must be a dask array, got builtins\.int"):
        cnd.moments(5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a has dtype int64; accepted are float16"):
        cnd.moments(a.astype(int))
    with pytest.raises(TypeError, match="a has dtype uint16; integers need dtype="):
        cnd.instance_norm(a.astype(np.uint16))
    with pytest.raises(TypeError, match="dtype, of the result, must be"):
        cnd.instance_norm(a, dtype=int)
    with pytest.raises(ValueError, match="at least 3 dimensions"):
        cnd.moments(a[0, 0])
    with pytest.raises(ValueError, match=r"unknown sizes.*compute_chunk_sizes"):
        cnd.instance_norm(a[a.sum((1, 2, 3)) > 0])
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        cnd.instance_norm(a[..., :1, :1])
    with pytest.raises(ValueError, match="eps must not be negative"):
        cnd.instance_norm(a, eps=-1)
    with pytest.raises(ValueError, match="eps_mode must be one of"):
        cnd.instance_norm(a, eps_mode="sum")
    with pytest.raises(ValueError, match="ddof must be less than the number of positions of a plane, 20, got 20"):
        cnd.instance_norm(a, ddof=20)
    with pytest.raises(ValueError, match="activation must be None or one of"):
        cnd.instance_norm(a, activation="tanh")
    with pytest.raises(ValueError, match=r"weight has shape \(2,\); needed is \(3,\) or \(2, 3\)"):
        cnd.instance_norm(a, np.ones(2, np.float32))
    with pytest.raises(TypeError, match="bias has dtype float64; needed is float32"):
        cnd.instance_norm(a, bias=np.ones(3))
    with pytest.raises(TypeError, match="residual must be a dask array, got ndarray"):
        cnd.instance_norm(a, residual=np.zeros(a.shape, a.dtype))
    with pytest.raises(ValueError, match="residual has shape"):
        cnd.instance_norm(a, residual=a[:1])
    with pytest.raises(TypeError, match="moments must be what moments returns, got int"):
        cnd.instance_norm(a, moments=5)
    with pytest.raises(TypeError, match="weight must be an array, got list"):
        cnd.instance_norm(a, [1, 1, 1])
    odd = a.map_blocks(lambda block: block.astype(np.float64), dtype=np.float32, meta=np.empty((0,) * 4, np.float32))
    with pytest.raises(TypeError, match="a chunk has dtype float64, but the dask array's dtype is float32"):
        cnd.instance_norm(odd).compute()
    moments = cnd.moments(a)
    with pytest.raises(ValueError, match=r"moments.count has shape \(1, 3\)"):
        cnd.instance_norm(a, moments=cn.Moments(moments.count[:1], moments.mean, moments.m2))
    with pytest.raises(TypeError, match=r"moments\.mean has dtype int64; needed is float64"):
        cnd.instance_norm(a, moments=cn.Moments(moments.count, moments.count, moments.m2))
    with pytest.raises(ValueError, match="shapes"):
        moments.merge(cnd.moments(a[:1]))
    with pytest.raises(ValueError, match=r"is on dask\.array\.core\.Array and on cpu"):
        moments.merge(cn.moments(np.zeros((2, 3, 4))))


def test_random_chunks(rng: np.random.Generator) -> None:
    for _ in range(12):
        shape = tuple(rng.integers(1, 7, 2)) + tuple(rng.integers(2, 9, rng.integers(1, 4)))
        x = values(rng, shape, np.float64)
        chunks = []
        for size in shape:
            borders = [0, *np.sort(rng.integers(0, size + 1, rng.integers(0, 4))).tolist(), int(size)]
            chunks.append(tuple(b - a for a, b in itertools.pairwise(borders)))
        print(shape, chunks)
        y = cnd.instance_norm(da.from_array(x, chunks=tuple(chunks)))
        assert_within(y.compute(scheduler="threads"), reference.forward(x), 1e-11)
