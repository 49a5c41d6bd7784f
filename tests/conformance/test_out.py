"""What the functions write to on every backend, `out` and running statistics: layouts, shared memory, refusals."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import reference
from helpers.arrays import normal
from helpers.backends import Backend, on
from helpers.compare import Bits, assert_same, bits
from helpers.reference import LAYOUTS, assert_close

import cupynorm as cn

SHAPE = 2, 3, 4, 5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("input_layout", ["contiguous", "channels_last", "crop"])
def test_layouts_of_out(backend: Backend, rng: np.random.Generator, layout: str, input_layout: str) -> None:
    host, dy = normal(rng, SHAPE), normal(rng, SHAPE)
    x = backend.array(LAYOUTS[input_layout](host))
    out = backend.array(LAYOUTS[layout](np.full(SHAPE, np.nan, np.float32)))
    strides = out.strides
    y, saved = cn.instance_norm_forward(x, out=out)
    assert y is out
    assert out.strides == strides
    assert_close(backend.host(out), reference.forward(host))
    dx, *_ = cn.instance_norm_backward(backend.array(dy), saved, out=out)
    assert dx is out
    assert_close(backend.host(out), reference.backward(dy, host)[0])


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_out_interleaved_with_the_input(backend: Backend, rng: np.random.Generator, axis: int) -> None:
    """x and out are every second slice of one array: nothing but out is written."""
    host = normal(rng, SHAPE)
    both = backend.array(np.repeat(host, 2, axis))
    even, odd = ((slice(None),) * axis + (slice(start, None, 2),) for start in (0, 1))
    cn.instance_norm(both[even], out=both[odd])
    assert_close(backend.host(both[odd]), reference.forward(host))
    assert_same(backend.host(both[even]), host)


def test_out_may_be_another_view_of_the_input(backend: Backend, rng: np.random.Generator) -> None:
    host = normal(rng, (3, 4, 5))
    x = backend.array(host.copy())[None]
    out = x.reshape(3, 4, 5).reshape(1, 3, 4, 5)  # the same memory; only the stride of the one sample may differ
    cn.instance_norm(x, out=out)
    assert_close(backend.host(x), reference.forward(host[None]))


def test_out_may_be_dy(backend: Backend, rng: np.random.Generator) -> None:
    host, dy = normal(rng, SHAPE), normal(rng, SHAPE)
    _, saved = cn.instance_norm_forward(backend.array(host))
    out = backend.array(dy.copy())
    assert cn.instance_norm_backward(out, saved, out=out)[0] is out
    assert_close(backend.host(out), reference.backward(dy, host)[0])


def test_out_may_be_x_in_the_last_backward(backend: Backend, rng: np.random.Generator) -> None:
    host, dy = normal(rng, SHAPE), normal(rng, SHAPE)
    x, g, ones = backend.array(host.copy()), backend.array(dy), backend.array(np.ones(3, np.float32))
    _, saved = cn.instance_norm_forward(x, ones, ones)
    gradients = cn.instance_norm_backward(g, saved, out=x)
    assert gradients[0] is x
    for ours, exact in zip(gradients, reference.backward(dy, host)[:3], strict=True):
        assert_close(backend.host(ours), exact, terms=host.size // ours.size)
    before = bits(x, g)
    with pytest.raises(ValueError, match="out"):  # x is overwritten: a second result would be wrong
        cn.instance_norm_backward(g, saved)
    assert bits(x, g) == before


def test_no_backward_after_the_input_is_overwritten(backend: Backend, rng: np.random.Generator) -> None:
    x = backend.array(normal(rng, SHAPE))
    _, saved = cn.instance_norm_forward(x, out=x)
    with pytest.raises(ValueError, match="out"):
        cn.instance_norm_backward(x, saved)


#: Views of an array of (4, 6, 7, 6) that overlap its [:2, :3, :4, :5] but differ from it.
OVERLAPS: dict[str, Callable[[Any], Any]] = {
    "shifted column": lambda a: a[:2, :3, :4, 1:],
    "shifted row": lambda a: a[:2, :3, 1:5, :5],
    "shifted channel": lambda a: a[:2, 1:4, :4, :5],
    "shifted sample": lambda a: a[1:3, :3, :4, :5],
    "reversed": lambda a: a[:2, :3, :4, :5][..., ::-1],
    "corner": lambda a: a[1:3, 2:5, 3:, 1:][:, :, :4],
}


@pytest.mark.parametrize("kind", OVERLAPS)
def test_overlapping_out_is_refused(backend: Backend, rng: np.random.Generator, kind: str) -> None:
    base = backend.array(normal(rng, (4, 6, 7, 6)))
    x, out = base[:2, :3, :4, :5], OVERLAPS[kind](base)
    mean, var = (backend.array(np.ones(3, np.float32)) for _ in range(2))
    before = bits(base, mean, var)
    with pytest.raises(ValueError, match="out overlaps input"):
        cn.instance_norm(x, mean, var, out=out)
    other = backend.array(normal(rng, SHAPE))
    _, saved = cn.instance_norm_forward(other)
    with pytest.raises(ValueError, match="out overlaps dy"):
        cn.instance_norm_backward(x, saved, out=out)
    _, saved = cn.instance_norm_forward(x)
    with pytest.raises(ValueError, match="out overlaps input"):
        cn.instance_norm_backward(other, saved, out=out)
    assert bits(base, mean, var) == before


def test_out_overlapping_a_parameter_is_refused(backend: Backend, rng: np.random.Generator) -> None:
    x, out = backend.array(normal(rng, SHAPE)), backend.array(np.ones(SHAPE, np.float32))
    inside = out[0, 0, 0, :3]
    before = bits(x, out)
    other = backend.array(np.ones(3, np.float32))
    calls: list[tuple[str, dict[str, Any]]] = [
        ("weight", {"weight": inside}),
        ("bias", {"bias": inside}),
        ("running_mean", {"running_mean": inside, "running_var": other}),
        ("running_var", {"running_mean": other, "running_var": inside}),
    ]
    for (name, arguments), given in itertools.product(calls, ({}, {"moments": cn.moments(x)})):
        with pytest.raises(ValueError, match=f"out overlaps {name}"):
            cn.instance_norm(x, out=out, **arguments, **given)
    _, saved = cn.instance_norm_forward(x, weight=inside)
    with pytest.raises(ValueError, match="out overlaps weight"):
        cn.instance_norm_backward(x, saved, out=out)
    assert bits(x, out) == before


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_self_overlapping_out_is_refused(backend: Backend, rng: np.random.Generator, axis: int) -> None:
    x = backend.array(normal(rng, SHAPE))
    small = np.zeros(SHAPE, np.float32).take([0], axis)
    out = np.lib.stride_tricks.as_strided(small, SHAPE, [0 if i == axis else s for i, s in enumerate(small.strides)])
    with pytest.raises(ValueError, match="out has strides"):
        cn.instance_norm(x, out=backend.array(out))
    assert not small.any()


#: Pairs of slices of an array of 7, three elements each.
MEETING = {"the same": (np.s_[:3], np.s_[:3]), "shifted": (np.s_[:3], np.s_[2:5]), "steps": (np.s_[:6:2], np.s_[4:]),
           "reversed": (np.s_[:3], np.s_[4:1:-1])}  # fmt: skip
APART = {"beside": (np.s_[:3], np.s_[3:6]), "between": (np.s_[:6:2], np.s_[1:7:2])}


@pytest.mark.parametrize("slices", MEETING)
@pytest.mark.parametrize("first", ["running_mean", "input", "residual", "weight", "bias"])
@pytest.mark.parametrize("second", ["running_mean", "running_var"])
def test_statistics_sharing_memory_are_refused(
    backend: Backend, rng: np.random.Generator, first: str, second: str, slices: str
) -> None:
    """An update is refused before anything is written. Without an update, they may share memory."""
    if first == second:
        return
    given: dict[str, Any] = {name: backend.array(normal(rng, (2, 3, 4, 7))) for name in ("input", "residual")}
    given |= dict.fromkeys(("weight", "bias"), backend.array(np.ones(3, np.float32)))  # these two may share memory
    given |= {name: backend.array(np.ones(3, np.float32)) for name in ("running_mean", "running_var")}
    memory = given[first][1, 2, 3] if first in ("input", "residual") else backend.array(np.ones(7, np.float32))
    places = MEETING[slices]
    given[second] = memory[places[1]]
    if first not in ("input", "residual"):
        given[first] = given[second] if slices == "the same" else memory[places[0]]

    def pictures() -> dict[str, Bits]:
        return {name: Bits(array) for name, array in given.items()}

    before = pictures()
    for momentum in (0.1, 1.0):
        with pytest.raises(ValueError, match=f"^{first} and {second} share memory, and {second} is to be updated"):
            cn.instance_norm(**given, momentum=momentum)
    cn.instance_norm(**given, momentum=0)
    cn.instance_norm(**given, use_input_stats=False)
    assert pictures() == before


@pytest.mark.parametrize("slices", APART)
@pytest.mark.parametrize("names", [("running_mean", "running_var"), ("bias", "running_mean")], ids=str)
def test_statistics_may_be_interleaved(
    backend: Backend, rng: np.random.Generator, names: tuple[str, str], slices: str
) -> None:
    x = backend.array(normal(rng, SHAPE))
    given = {name: backend.array(np.ones(3, np.float32)) for name in ("bias", "running_mean", "running_var")}
    others = {name: array.copy() for name, array in given.items()}
    memory = backend.array(np.ones(7, np.float32))
    given |= {name: memory[place] for name, place in zip(names, APART[slices], strict=True)}
    cn.instance_norm(x, **given)
    cn.instance_norm(x, **others)
    for name, array in given.items():
        assert_same(backend.host(array), backend.host(others[name]), name)


@on("cupy")
def test_foreign_memory_is_compared_by_address(backend: Backend, rng: np.random.Generator) -> None:
    """Arrays from another library each have a memory object of their own."""
    import cupy

    memory = backend.array(np.ones(7, np.float32))

    def foreign(start: int) -> Any:
        owner = cupy.cuda.UnownedMemory(memory.data.ptr + 4 * start, 12, memory)
        return cupy.ndarray((3,), np.float32, cupy.cuda.MemoryPointer(owner, 0))

    x = backend.array(normal(rng, SHAPE))
    with pytest.raises(ValueError, match=r"^running_mean and running_var share memory"):
        cn.instance_norm(x, foreign(0), foreign(2))
    assert (backend.host(memory) == 1).all()
    cn.instance_norm(x, foreign(0), foreign(3))
    assert backend.host(memory)[6] == 1


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_self_overlapping_statistics_are_refused(backend: Backend, rng: np.random.Generator, name: str) -> None:
    x = backend.array(normal(rng, SHAPE))
    once = np.lib.stride_tricks.as_strided(np.ones(1, np.float32), (3,), (0,))
    given = {key: backend.array(np.ones(3, np.float32)) for key in ("running_mean", "running_var")}
    given |= {name: backend.array(once)}
    with pytest.raises(ValueError, match=f"^{name} is to be updated and has strides"):
        cn.instance_norm(x, **given)
    assert all((backend.host(array) == 1).all() for array in given.values())
    expected = cn.instance_norm(x, *(backend.array(np.ones(3, np.float32)) for _ in range(2)), use_input_stats=False)
    assert_same(backend.host(cn.instance_norm(x, **given, use_input_stats=False)), backend.host(expected))


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 3, 4, 4), "float32"), ((3, 4, 5), "float32"), (SHAPE, "float64"), (SHAPE, "float16")]
)
def test_out_of_other_shape_or_dtype(backend: Backend, rng: np.random.Generator, shape: Any, dtype: str) -> None:
    x, out = backend.array(normal(rng, SHAPE)), backend.array(np.full(shape, 5, dtype))
    mean, var = (backend.array(np.ones(3, np.float32)) for _ in range(2))
    _, saved = cn.instance_norm_forward(x)
    before = bits(out, mean, var)
    for call in (lambda: cn.instance_norm(x, mean, var, out=out), lambda: cn.instance_norm_backward(x, saved, out=out)):
        with pytest.raises((TypeError, ValueError), match=r"out has shape .* and dtype .*needed"):
            call()
    assert bits(out, mean, var) == before


def test_read_only_arrays() -> None:
    """Only NumPy has read-only arrays."""
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    ones = np.ones(3, np.float32)
    x.flags.writeable = ones.flags.writeable = False
    y, saved = cn.instance_norm_forward(x, ones, ones, running_mean=ones, running_var=ones, use_input_stats=False)
    y.flags.writeable = False
    cn.instance_norm_backward(y, saved)
    with pytest.raises(ValueError, match="out is read-only"):
        cn.instance_norm_backward(y, saved, out=y)
    with pytest.raises(ValueError, match="out is read-only"):
        cn.instance_norm(x, out=y)
    for pair in ((ones, np.ones(3, np.float32)), (np.ones(3, np.float32), ones)):
        with pytest.raises(ValueError, match=r"running_.* is read-only"):
            cn.instance_norm(x, *pair)
        assert [a.tolist() for a in pair] == [[1, 1, 1]] * 2
