"""PyTorch's behaviour, rows 22 to 26 of docs/reference/semantics.md: state, inference mode, repr."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from helpers.arrays import normal
from helpers.backends import Backend
from helpers.compare import Bits, assert_equal, assert_same
from helpers.layers import LAYERS, held
from helpers.optional import imported
from helpers.semantics import full_layer, refused, torch_layer

import cupynorm as cn

torch = imported("torch")

pytestmark = pytest.mark.extras


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_keys(backend: Backend, rank: int) -> None:
    keys = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    for affine in (True, False):
        for bias in (True, False):
            for tracked in (True, False):
                arguments = {"affine": affine, "bias": bias, "track_running_stats": tracked}
                layer = LAYERS[rank](3, **arguments, device=backend.device)
                expected = keys[: affine + (affine and bias)] + keys[2:] * tracked
                state = layer.state_dict()
                assert list(state) == expected
                if tracked:
                    assert state["num_batches_tracked"].dtype == np.int64
                    assert state["num_batches_tracked"].shape == ()
                if torch and bias:
                    arguments.pop("bias")
                    assert list(torch_layer(rank, 3, **arguments).state_dict()) == expected


def test_bad_states_are_refused(backend: Backend) -> None:
    layer = full_layer(backend)
    good = {name: backend.host(array) + 1 for name, array in layer.state_dict().items()}
    missing = {name: array for name, array in good.items() if name not in ("bias", "running_var")}
    with refused(KeyError, "missing.*bias.*running_var", layer):
        layer.load_state_dict(missing)
    with refused(KeyError, "unexpected.*gamma.*beta", layer):
        layer.load_state_dict(good | {"gamma": np.ones(3), "beta": np.ones(3)})
    with refused(KeyError, "missing.*weight.*unexpected.*gamma", layer):
        layer.load_state_dict({"gamma": np.ones(3)} | {k: v for k, v in good.items() if k != "weight"})


@pytest.mark.parametrize("strict", [True, False])
def test_state_without_batch_counter(backend: Backend, strict: bool) -> None:
    layer = full_layer(backend)
    layer.num_batches_tracked[...] = 5
    state = {name: backend.host(array) + 1 for name, array in layer.state_dict().items()}
    del state["num_batches_tracked"]
    layer.load_state_dict(state, strict=strict)
    loaded = layer.state_dict()
    assert int(loaded.pop("num_batches_tracked")) == 5
    for name, array in loaded.items():
        assert_equal(backend.host(array), state[name])
    if torch:
        theirs = torch_layer(2, 3, affine=True, track_running_stats=True)
        theirs.num_batches_tracked.fill_(5)
        theirs.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()}, strict=strict)
        assert int(theirs.num_batches_tracked) == 5


@pytest.mark.parametrize("prefix", ["", "stem.1."])
@pytest.mark.parametrize("names", [["running_mean", "running_var"], ["running_var"],
                                   ["running_mean", "running_var", "num_batches_tracked"]], ids=len)  # fmt: skip
def test_statistics_for_an_untracked_layer(backend: Backend, prefix: str, names: list[str]) -> None:
    layer = LAYERS[2](3, affine=True, device=backend.device)
    state = {prefix + name: np.full(3, 2.0) for name in ("weight", "bias", *names)}
    said = f"{' and '.join(prefix + name for name in names)} are running statistics"
    with refused(KeyError, f"{re.escape(said)}.*Remove these keys.*track_running_stats=True", layer):
        layer.load_state_dict(state, prefix=prefix)
    if torch:
        theirs = torch_layer(2, 3, affine=True)
        with pytest.raises(RuntimeError, match="track_running_stats=True"):
            theirs.load_state_dict({name.removeprefix(prefix): torch.from_numpy(a) for name, a in state.items()})
    layer.load_state_dict(state, strict=False, prefix=prefix)
    assert layer.running_mean is None
    assert_equal(backend.host(layer.weight.data), [2, 2, 2])
    for bad in ({"gamma": np.ones(3)}, {}):  # without statistics in the state, the error does not mention them
        with pytest.raises(KeyError) as caught:
            layer.load_state_dict(bad)
        assert "track_running_stats=True" not in str(caught.value)


@pytest.mark.parametrize("what", ["reset_running_stats", "reset_parameters"])
@pytest.mark.parametrize("tracked", [True, False])
def test_resetting(backend: Backend, what: str, tracked: bool) -> None:
    arguments = {"affine": True, "track_running_stats": tracked}
    layer = full_layer(backend) if tracked else LAYERS[2](3, **arguments, device=backend.device)
    state = {name: np.full(array.shape, start) for start, (name, array) in enumerate(layer.state_dict().items(), 2)}
    layer.load_state_dict(state)
    before = {name: (id(array), Bits(array)) for name, array in held(layer).items()}
    expected = {name: array.flat[0] for name, array in state.items()}
    if tracked:
        expected |= {"running_mean": 0, "running_var": 1, "num_batches_tracked": 0}
    if what == "reset_parameters":
        expected |= {"weight": 1, "bias": 0}
    assert getattr(layer, what)() is None
    assert list(layer.state_dict()) == list(expected)
    for name, array in layer.state_dict().items():
        assert_equal(backend.host(array), expected[name])
    for name, array in held(layer).items():
        assert id(array) == before[name][0]
        assert not name.endswith("grad") or Bits(array) == before[name][1]
    if torch:
        theirs = torch_layer(2, 3, **arguments)
        theirs.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
        getattr(theirs, what)()
        for name, values in theirs.state_dict().items():
            assert_equal(values.numpy(), expected[name])


@pytest.mark.parametrize("training", [True, False])
def test_inference_mode(backend: Backend, rng: np.random.Generator, training: bool) -> None:
    host = normal(rng, (2, 3, 4, 5))
    layer, twin = (full_layer(backend).train(training) for _ in range(2))
    expected = twin.forward(backend.array(host))
    with cn.inference_mode():
        assert_same(backend.host(layer.forward(backend.array(host))), backend.host(expected))
    for name, array in held(layer).items():
        assert_same(backend.host(array), backend.host(held(twin)[name]))
    assert layer.saved is None
    with refused(RuntimeError, r"within cupynorm.inference_mode\(\).*outside", layer):
        layer.backward(backend.array(host))
    if torch:
        theirs = torch_layer(2, 3, affine=True, track_running_stats=True).train(training)
        before = theirs.running_mean.clone()
        with torch.inference_mode():
            y = theirs(torch.from_numpy(host))
        assert bool((theirs.running_mean != before).all()) == training
        with pytest.raises(RuntimeError, match="grad"):
            y.sum().backward()


def test_wrong_shapes_are_refused(backend: Backend) -> None:
    layer = full_layer(backend)
    wrong = {name: backend.host(array) + 1 for name, array in layer.state_dict().items()}
    for name, shape in (("weight", (2, 3)), ("bias", ()), ("num_batches_tracked", (1,)), ("running_mean", (4,))):
        with refused(ValueError, f"{name}.*{re.escape(str(shape))}", layer):
            layer.load_state_dict(wrong | {name: np.ones(shape)}, strict=False)


def test_every_wrong_shape_is_named(backend: Backend) -> None:
    layer = full_layer(backend)
    wrong = layer.state_dict() | {"running_mean": np.ones(4), "running_var": np.ones((3, 1))}
    for strict in (True, False):
        with refused(ValueError, r"running_mean.*\(4,\)", layer):
            layer.load_state_dict(wrong, strict=strict)
        with refused(ValueError, r"running_var.*\(3, 1\)", layer):
            layer.load_state_dict(wrong, strict=strict)


def test_loading(backend: Backend) -> None:
    layer = full_layer(backend)
    arrays = {name: array for name, array in held(layer).items() if "grad" not in name}
    values = {
        "weight": np.array([1, 2, 3], np.float64),
        "bias": np.array([4, 5, 6], np.float16),
        "running_mean": np.array([7, 8, 9], np.int32),
        "running_var": [10, 11, 12],
        "num_batches_tracked": np.array(7, np.int32),
    }
    layer.load_state_dict(values)
    loaded = {name: array for name, array in held(layer).items() if "grad" not in name}
    assert all(loaded[name] is array for name, array in arrays.items())
    for name, array in layer.state_dict().items():
        assert array.dtype == (np.int64 if name == "num_batches_tracked" else np.float32)
        assert_equal(backend.host(array), values[name])
    layer.load_state_dict({"bias": np.zeros(3), "gamma": np.zeros(3)}, strict=False)
    assert_equal(backend.host(layer.bias.data), [0, 0, 0])
    assert_equal(backend.host(layer.weight.data), [1, 2, 3])


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_repr(rank: int) -> None:
    layer = LAYERS[rank](3, device="cpu")
    expected = f"InstanceNorm{rank}d(3, eps=1e-05, momentum=0.1, affine=False, bias=False, track_running_stats=False)"
    assert repr(layer) == expected
    full = LAYERS[rank](8, 1e-3, None, True, True, "cpu")
    assert repr(full) == (
        f"InstanceNorm{rank}d(8, eps=0.001, momentum=None, affine=True, bias=True, track_running_stats=True)"
    )
    assert "affine=True, bias=False" in repr(LAYERS[rank](8, affine=True, bias=False, device="cpu"))


def test_documentation_names_every_test() -> None:
    text = (Path(__file__).parents[2] / "docs" / "reference" / "semantics.md").read_text(encoding="utf-8")
    files = [file.read_text(encoding="utf-8") for file in Path(__file__).parent.glob("test_semantics_*.py")]
    here = [
        name for file in files for name in re.findall(r"^def (test_\w+)", file, re.M) if "documentation" not in name
    ]
    assert sorted(re.findall(r"`(test_\w+)`", text)) == sorted(here)
    assert [int(n) for n in re.findall(r"^(\d+)\. ", text, re.M)] == list(range(1, 27))
