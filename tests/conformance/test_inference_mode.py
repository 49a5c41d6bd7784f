"""`inference_mode`: layers keep nothing for a backward; where the mode begins and ends."""

from __future__ import annotations

import asyncio
import copy
import pickle
import threading
import weakref
from typing import Any

import numpy as np
import pytest
from helpers.arrays import normal
from helpers.backends import Backend
from helpers.compare import assert_same
from helpers.layers import SHAPES, full

import cupynorm as cn
from cupynorm import devices


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("before", [True, False], ids=["a forward before", "none before"])
@pytest.mark.parametrize("unbatched", [True, False])
def test_inference_mode_frees_inputs(
    backend: Backend, rng: np.random.Generator, training: bool, before: bool, unbatched: bool
) -> None:
    """Inputs of this forward and of the one before are freed as soon as the caller drops them."""
    shape = SHAPES[2][unbatched:]
    layers = [
        full(device=backend.device, activation="relu").train(training),
        cn.InstanceNorm2d(3, device=backend.device).train(training),
    ]
    for layer in layers:
        gone = []
        if before:
            x, residual = (backend.array(normal(rng, shape)) for _ in range(2))
            layer.forward(x, residual=residual)
            gone += [weakref.ref(x)]
        x, residual = (backend.array(normal(rng, shape)) for _ in range(2))
        with cn.inference_mode():
            y = layer.forward(x, residual=residual)
        gone += [weakref.ref(x), weakref.ref(residual)]
        del x, residual
        assert [ref() for ref in gone] == [None] * len(gone)
        assert layer.saved is None
        with pytest.raises(RuntimeError, match=r"inference_mode\(\): do the forward again outside"):
            layer.backward(y)
        layer.forward(y)
        layer.backward(y)


def test_saved_outlives_inference_mode(backend: Backend, rng: np.random.Generator) -> None:
    """`saved` of an earlier forward stays valid; so does `saved` of the function within the mode."""
    layer, twin = full(device=backend.device), full(device=backend.device)
    x, dy = (backend.array(normal(rng, SHAPES[2])) for _ in range(2))
    expected = backend.host(twin.backward(dy)) if twin.forward(x) is not None else None
    layer.forward(x)
    saved = layer.saved
    with cn.inference_mode():
        layer.forward(dy)
        assert_same(backend.host(layer.backward(dy, saved=saved)), expected)
        _, given = cn.instance_norm_forward(x, layer.weight.data, layer.bias.data)
        assert_same(backend.host(cn.instance_norm_backward(dy, given)[0]), expected)


def test_backward_error_after_inference_mode(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names inference_mode only if that is the reason."""
    x = normal(rng, SHAPES[2])
    layer = full()
    with cn.inference_mode():
        layer.forward(x)
    for other in (full(), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with pytest.raises(RuntimeError, match="needs a forward before it"):
            other.backward(x)
    with pytest.raises(RuntimeError, match="inference_mode"):
        layer.backward(x)
    monkeypatch.setattr(devices, "resolve", str)
    monkeypatch.setattr(devices, "to_device", lambda array, device: array.copy())
    layer.to_gpu("cuda:1").to_cpu()
    with pytest.raises(RuntimeError, match="needs a forward before it"):
        layer.backward(x)


def keeps() -> bool:
    """True if a layer saves a forward here."""
    layer = cn.InstanceNorm1d(1, device="cpu")
    layer.forward(np.arange(4, dtype=np.float32)[None])
    return layer.saved is not None


def test_inference_mode_nests_and_ends() -> None:
    mode = cn.inference_mode()
    with mode:
        assert not keeps()
        with cn.inference_mode(False):
            assert keeps()
            with mode:
                assert not keeps()
            assert keeps()
        assert not keeps()
    assert keeps()
    with pytest.raises(ZeroDivisionError), mode:
        raise ZeroDivisionError
    assert keeps()


def test_inference_mode_as_a_decorator() -> None:
    @cn.inference_mode()
    def keeping(depth: int, *, then: Any = None) -> list[bool]:
        """What keeps() says."""
        if then:
            raise then
        return [keeps(), *(keeping(depth - 1) if depth else [])]

    assert keeping(2) == [False] * 3
    assert keeping.__doc__ == "What keeps() says."
    with pytest.raises(ZeroDivisionError):
        keeping(0, then=ZeroDivisionError)
    assert cn.inference_mode(False)(keeps)()
    assert keeps()

    def generator() -> Any:
        yield 1

    async def coroutine() -> None:
        pass

    async def both() -> Any:
        yield 1

    for function in (generator, coroutine, both):
        with pytest.raises(TypeError, match=f"cannot decorate .*{function.__name__}.*use `with"):
            cn.inference_mode()(function)


@pytest.mark.parametrize("mode", [None, 1, "yes", keeps, np.True_], ids=["None", "1", "yes", "function", "np.True_"])
def test_invalid_inference_modes(mode: Any) -> None:
    with pytest.raises(TypeError, match=r"mode must be a bool.*@cupynorm.inference_mode\(\)"):
        cn.inference_mode(mode)


def test_inference_mode_is_local_to_the_thread() -> None:
    entered, done = threading.Event(), threading.Event()
    seen: dict[str, list[bool]] = {"within": [], "beside": []}

    @cn.inference_mode()
    def within() -> None:
        entered.set()
        done.wait(60)
        seen["within"].append(keeps())

    def beside() -> None:
        seen["beside"].append(keeps())

    other = threading.Thread(target=within)
    other.start()
    entered.wait(60)
    seen["beside"].append(keeps())
    with cn.inference_mode():
        thread = threading.Thread(target=beside)
        thread.start()
        thread.join()
    done.set()
    other.join()
    assert seen == {"within": [False], "beside": [True] * 2}


def test_inference_mode_is_local_to_the_task() -> None:
    """A task that awaits within the mode does not put other tasks into it."""

    async def task(within: bool, turns: list[bool]) -> None:
        with cn.inference_mode(within):
            for _ in range(3):
                await asyncio.sleep(0)
                turns.append(keeps())

    async def main() -> tuple[list[bool], list[bool]]:
        turns: tuple[list[bool], list[bool]] = [], []
        await asyncio.gather(task(True, turns[0]), task(False, turns[1]))
        return turns

    assert asyncio.run(main()) == ([False] * 3, [True] * 3)
