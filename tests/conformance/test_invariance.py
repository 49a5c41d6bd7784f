"""A sample's results have the same bits in every batch: always on a CPU, on a GPU if batch invariance is set."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from helpers import reference, tiers
from helpers.backends import Backend, on, on_cpu
from helpers.compare import Bits

import cupynorm as cn
from cupynorm import config, devices
from cupynorm.cuda.describe import plan_for
from cupynorm.cuda.device import DEVICES, Device
from cupynorm.cuda.layout import ArrayDesc, Layout, choose_layout, contiguous_desc
from cupynorm.cuda.ops import Op
from cupynorm.cuda.plan import Plan, plan
from cupynorm.cuda.variants import ITEMSIZE, VARIANTS, Kind

EIGHT = Device("eight", (9, 0), 8, 99 * 1024, 4 * 2**20, 4)
THREE = Device("three", (9, 0), 3, 227 * 1024, 2**20)
# Two multiprocessors hold 65 536 floats in registers: four blocks each, 256 threads, eight vecs.
LITTLE = Device("little", (7, 5), 2, 12 * 1024, 2**18)
ROOMY = Device("roomy", (8, 0), 2, 150 * 1024, 2**18)

#: Channels, positions, device: planes of every regime. For some of them N decides the regime.
SHAPES = [
    (5, 21, EIGHT), (4, 129, EIGHT), (4, 997, EIGHT), (17, 997, EIGHT), (3, 4725, EIGHT), (3, 1000, EIGHT),
    (3, 20_001, THREE), (3, 30_011, EIGHT), (1, 30_011, EIGHT),
    (1, 65_601, LITTLE), (1, 65_603, ROOMY),
]  # fmt: skip
SAMPLES = 5


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    before = config.batch_invariant.given
    yield
    config.batch_invariant.given = before


def results(backend: Backend, x: Any, dy: Any, weight: Any, double: bool) -> list[np.ndarray]:
    """Return a call's results for its samples: forward, backward and double backward."""
    y, saved = cn.instance_norm_forward(x, weight)
    found = [y, saved.mean, saved.rstd, cn.instance_norm_backward(dy, saved)[0]]
    if double:
        found += cn.instance_norm_double_backward(x, None, None, dy, saved)[:2]
    return [backend.host(a) for a in found]


def unlike(
    backend: Backend, rng: np.random.Generator, dtype: str, layout: str, c: int, s: int, device: Device
) -> set[str]:
    """Return the slices of samples whose results differ by themselves and as a part of the batch."""
    backend.pretend(device)
    x, dy = (
        backend.array(reference.LAYOUTS[layout](rng.normal(size=(SAMPLES, c, s, 1)).astype(devices.dtype_of(dtype))))
        for _ in range(2)
    )
    weight = backend.array(rng.normal(size=c).astype(np.float32))
    # On the emulator only modules that other tests build, too.
    double = backend.name != "simt" or ((dtype, layout) == ("float16", "contiguous") and s > 256 and s % 8 > 0)
    whole = results(backend, x, dy, weight, double)
    found = set()
    for some in ("1:2", "2:5", "0:5:2", "0:1", "4:5")[: tiers.amount(2, 3, 5)]:
        part = slice(*map(int, some.split(":")))
        for a, b in zip(whole, results(backend, x[part], dy[part], weight, double), strict=True):
            if Bits(a[part]) != Bits(b):
                found.add(some)
    return found


@pytest.mark.long
@pytest.mark.full(
    numpy=lambda given: given["dtype"] == "float16",
    simt=lambda given: (given["dtype"], given["layout"]) != ("float32", "contiguous"),
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_sample_has_the_same_bits_in_any_batch(
    backend: Backend, rng: np.random.Generator, dtype: str, layout: str
) -> None:
    cn.set_batch_invariant(True)
    for shape in SHAPES[:9] if backend.name == "simt" and tiers.asked != "nightly" else SHAPES:
        assert not unlike(backend, rng, dtype, layout, *shape), shape


@on_cpu
@pytest.mark.usefixtures("threads_as_they_were")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("order", [(3, 0, 1, 2), (2, 0, 1, 3), (0, 3, 2, 1)])
def test_samples_that_lie_between_each_other(
    backend: Backend, rng: np.random.Generator, order: tuple[int, ...], threads: int
) -> None:
    """Planes that are copied together first, also in tiles, are cut alike in every batch."""
    cn.set_num_threads(threads)
    for size in (7, 300):
        shape = dict(zip(order, (6, 2, size, size), strict=True))  # of the axes in memory
        memory = rng.normal(size=(2, *(shape[axis] for axis in sorted(shape)))).astype(np.float32)
        x, dy = memory.transpose(0, *(axis + 1 for axis in order))
        weight = np.ones(2, np.float32)
        whole = results(backend, x, dy, weight, False)
        for part in (slice(0, 1), slice(2, 4), slice(5, 6)):
            for a, b in zip(whole, results(backend, x[part], dy[part], weight, False), strict=True):
                assert Bits(a[part]) == Bits(b), (size, part)


@on("simt")  # on CPUs bits never depend on the batch, and a GPU may have too few multiprocessors
def test_bits_depend_on_the_batch_by_default(backend: Backend, rng: np.random.Generator) -> None:
    """These shapes show that they depend on the size of the batch, and on the place in it."""
    cn.set_batch_invariant(False)
    assert unlike(backend, rng, "float32", "contiguous", 1, 30_000, EIGHT)
    assert not unlike(backend, rng, "float32", "contiguous", 32, 1000, EIGHT)
    assert "1:2" in unlike(backend, rng, "float32", "contiguous", 33, 1001, EIGHT)


def planned(op: Op, n: int, c: int, s: int, dtype: str, kind: Kind, device: Device, invariant: bool) -> Plan:
    layout = Layout(*((c * s, s, 1) if kind == "channels_first" else (c * s, 1, c)), 0)
    arrays = {"forward": 2, "backward": 3, "double_backward": 5}[op]
    return plan(op, (n, c, s), dtype, kind, (layout,) * arrays, device, invariant=invariant)


def order(made: Plan) -> tuple[Any, ...]:
    """Return the facts that decide the order of additions."""
    step = made.steps[0]
    return made.regime, made.vec_size, step.name, step.tiles, step.vecs_per_thread, step.subdivision


def test_the_shapes_reach_every_regime() -> None:
    regimes = {planned("forward", 5, c, s, "float32", "channels_first", d, True).regime for c, s, d in SHAPES}
    assert regimes == {f"{variant.scope}-{variant.residency}" for variant in VARIANTS["forward"]} | {"split"}
    alone, many = (
        {(c, s): planned("forward", n, c, s, "float32", "channels_first", d, False).regime for c, s, d in SHAPES}
        for n in (1, 5)
    )
    assert (alone[4, 997], many[4, 997]) == ("block-registers", "warp-registers")
    assert (alone[1, 30_011], many[1, 30_011]) == ("grid-registers", "cluster-registers")


@pytest.mark.parametrize("op", ["forward", "backward", "double_backward"])
def test_plans_do_not_depend_on_n(rng: np.random.Generator, op: Op) -> None:
    for _ in range(60):
        device = list(DEVICES.values())[rng.integers(len(DEVICES))]
        kind: Kind = "channels_first" if rng.integers(2) else "channels_last"
        dtype = list(ITEMSIZE)[rng.integers(len(ITEMSIZE))]
        c, s = int(rng.integers(1, 70)), int(10 ** rng.uniform(0.4, 6.5))
        of_one = order(planned(op, 1, c, s, dtype, kind, device, True))
        for n in (2, 3, 17, 200, 5_000):
            made = planned(op, n, c, s, dtype, kind, device, True)
            assert order(made) == of_one, (device.name, kind, dtype, n, c, s)


def test_batch_invariance_is_free_for_aligned_planes() -> None:
    """The plan is the same if N decides nothing: here a single sample has blocks of 128 threads for 132
    multiprocessors."""
    for shape in ((64, 132, 64 * 64), (20, 300, 16), (2, 64, 2**22)):
        for op in ("forward", "backward"):
            plans = [planned(op, *shape, "float32", "channels_first", DEVICES["H100"], i) for i in (False, True)]
            assert plans[0] == plans[1]


@pytest.mark.parametrize("invariant", [False, True])
def test_copies_for_batch_invariance(invariant: bool) -> None:
    """Only arrays that would be partitioned otherwise than a new array are copied."""

    def copied(c: int, channels: int, misalignment: int = 0) -> bool:
        """Return True if an array of c channels, sliced from one of `channels`, is copied."""
        strides = channels * 84, 4, channels * 28, channels * 4
        desc = ArrayDesc((2, c, 3, 7), strides, 4, misalignment)
        kind, _, (copy,) = choose_layout((desc,), invariant)
        assert kind == "channels_last"
        return copy

    assert not copied(8, 8)
    assert not copied(8, 16)
    assert not copied(6, 6)  # 6 channels are no whole vecs, so they are read one by one
    assert not copied(6, 9, 4)
    assert copied(8, 9) == copied(8, 16, 4) == invariant
    for made in (
        contiguous_desc((2, c, 3, 7), 4, kind) for c in (1, 6, 8) for kind in ("channels_first", "channels_last")
    ):
        assert choose_layout((made,), invariant)[2] == (False,)


@pytest.mark.long
def test_explain_names_n(rng: np.random.Generator) -> None:
    def told(shape: tuple[int, ...], dtype: str = "float32") -> str:
        lines = cn.explain(np.empty(shape, dtype), device="H100").splitlines()
        return next(line for line in lines if "bits" in line).split(": ", 1)[1]

    assert told((4, 64, 128, 128)) == "the same in every batch"
    # Blocks of 128 threads if there is one for each of 132 multiprocessors.
    assert told((4, 64, 64, 64)) == "depend on N (the same for N = 3 or more) (cupynorm.set_batch_invariant)"
    assert told((2, 64, 64, 64)) == "depend on N (the same for N = 1 to 2) (cupynorm.set_batch_invariant)"
    assert told((8, 256, 7, 7)) == "the same in every batch"
    where = "the addresses of its planes modulo 16 bytes"
    assert told((4, 300, 35, 45)) == f"depend on {where} (cupynorm.set_batch_invariant)"
    # Warps from 2 x 132 planes on, blocks of 128 threads from 132 on.
    assert told((4, 3, 27, 27)).startswith(f"depend on {where} and on N (the same for N = 1 to 43)")
    assert told((50, 3, 27, 27)).startswith(f"depend on {where} and on N (the same for N = 44 to 87)")
    assert told((88, 3, 27, 27)).startswith(f"depend on {where} and on N (the same for N = 88 or more)")
    # Grids of blocks with registers: at most three runs of N are named.
    assert told((2, 3, 700, 700)).startswith("depend on N (the same for N = 2, 4, 6) ")
    assert told((2, 4, 700, 700)).startswith("depend on N (the same for N = 2, 4, 6, ...) ")
    for n in (2,) if tiers.asked == "default" else (1, 2, 40, 88, 1000):
        shape = (n, int(rng.integers(1, 4)), 2 * int(rng.integers(500, 500_000)))
        text = told(shape)
        mine, *others = (
            order(plan_for("forward", desc(m, *shape[1:]), "float32", DEVICES["H100"])[0]) for m in (n, *range(1, 99))
        )
        alike = [m for m, other in enumerate(others, 1) if other == mine]
        if "N = " not in text:
            assert len(alike) == 98, (shape, text)
            continue
        parts = text.split("N = ")[1].split(")")[0].split(", ")
        said: set[int] = set()
        for part in parts:
            first, _, last = part.replace(" or more", " to 100000").partition(" to ")
            if first != "...":
                said |= set(range(int(first), int(last or first) + 1))
        assert n in said or "..." in parts
        assert [m for m in range(1, 99) if m in said] == (alike if "..." not in parts else sorted(said & set(alike)))
    cn.set_batch_invariant(True)
    assert told((4, 3, 27, 27)) == "the same in every batch, since batch invariance is set"


def desc(*shape: int) -> Any:
    return contiguous_desc(shape, 4, "channels_first")


def test_setting() -> None:
    cn.set_batch_invariant(True)
    for bad in (1, 0, None, "1", np.True_):
        with pytest.raises(TypeError, match="must be True or False"):
            cn.set_batch_invariant(bad)
    assert cn.get_batch_invariant() is True
    cn.set_batch_invariant(False)
    assert cn.get_batch_invariant() is False


@pytest.mark.long
@pytest.mark.parametrize(("text", "answer"), [("", "False"), ("0", "False"), ("1", "True"), ("yes", "must be 0 or 1")])
def test_environment(text: str, answer: str) -> None:
    code = "import cupynorm as cn; print(cn.get_batch_invariant())"
    environment = os.environ | {"CUPYNORM_BATCH_INVARIANT": text, "CUPYNORM_EAGER": "0"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert answer in ran.stdout + ran.stderr
