"""Checkpoints of whole PyTorch models, loaded and saved, as state_dicts and as safetensors files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers.compare import BFLOAT16, assert_equal
from helpers.optional import required
from helpers.reference import assert_close

import cupynorm as cn
from cupynorm import devices

torch = required("torch")

pytestmark = pytest.mark.extras

LAYERS = {"stem.1": (2, 3), "body.blocks.0.norm": (1, 4), "body.blocks.1.norm": (3, 5), "body.blocks.10.norm": (2, 6)}
PLAIN = "body.plain"


def torch_model(rng: np.random.Generator, dtype: Any = None) -> Any:
    """A model with instance normalisation at several depths, once without parameters, and with other layers."""
    norms = {
        name: getattr(torch.nn, f"InstanceNorm{rank}d")(size, affine=True, track_running_stats=True)
        for name, (rank, size) in LAYERS.items()
    }
    model = torch.nn.Module()
    model.stem = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), norms["stem.1"])
    model.body = torch.nn.Module()
    model.body.blocks = torch.nn.ModuleList(torch.nn.Module() for _ in range(11))
    model.body.plain = torch.nn.InstanceNorm2d(3)
    for name, norm in norms.items():
        if name.startswith("body"):
            model.body.blocks[int(name.split(".")[2])].norm = norm
    for values in model.state_dict().values():
        if values.ndim:
            values.copy_(torch.from_numpy(rng.uniform(0.5, 2, values.shape)))
    return model if dtype is None else model.to(dtype)


def our_layers(dtype: Any = None) -> dict[str, Any]:
    made = {1: cn.InstanceNorm1d, 2: cn.InstanceNorm2d, 3: cn.InstanceNorm3d}
    layers = {
        name: made[rank](size, affine=True, track_running_stats=True, device="cpu", dtype=dtype)
        for name, (rank, size) in LAYERS.items()
    }
    return layers | {PLAIN: cn.InstanceNorm2d(3, device="cpu", dtype=dtype)}


def load(layers: dict[str, Any], state: Any) -> None:
    for name, norm in layers.items():
        norm.load_state_dict(state, prefix=f"{name}.")


def state_of(layers: dict[str, Any]) -> dict[str, np.ndarray]:
    return {key: array for name, norm in layers.items() for key, array in norm.state_dict(f"{name}.").items()}


def bits(state: dict[str, Any]) -> dict[str, Any]:
    """dtype, shape and bytes of every entry of a model's state or ours, without the convolution's."""
    found = {}
    for key, value in state.items():
        if key.startswith("stem.0"):
            continue
        if isinstance(value, np.ndarray):
            found[key] = value.dtype.name, value.shape, value.tobytes()
        else:
            raw = value.reshape(-1).view(torch.uint8).numpy().tobytes()
            found[key] = str(value.dtype).removeprefix("torch."), tuple(value.shape), raw
    return found


DTYPES = pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])


@DTYPES
@pytest.mark.parametrize("how", ["state_dict", "named_parameters and buffers", "safetensors"])
def test_round_trip_bit_for_bit(rng: np.random.Generator, tmp_path: Path, dtype: str, how: str) -> None:
    theirs, back = torch_model(rng, getattr(torch, dtype)), torch_model(rng, getattr(torch, dtype))
    assert theirs.stem[1].num_batches_tracked.dtype == torch.int64
    theirs.stem[1].num_batches_tracked.fill_(7)
    layers = our_layers(dtype)
    if how == "safetensors":
        files = pytest.importorskip("safetensors.numpy")
        from safetensors.torch import load_file, save_file

        save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
        load(layers, files.load_file(tmp_path / "theirs.safetensors"))
        files.save_file(state_of(layers), tmp_path / "ours.safetensors")
        state = load_file(tmp_path / "ours.safetensors")
    else:
        # Parameters require gradients, which NumPy's own conversion refuses.
        given = (
            theirs.state_dict()
            if how == "state_dict"
            else dict(theirs.named_parameters()) | dict(theirs.named_buffers())
        )
        load(layers, given)
        state = {
            key: torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) if a.dtype == BFLOAT16 else torch.from_numpy(a)
            for key, a in state_of(layers).items()
        }
    assert bits(state_of(layers)) == bits(theirs.state_dict())
    result = back.load_state_dict(state, strict=False)
    assert all(key.startswith("stem.0") for key in result.missing_keys)
    assert result.unexpected_keys == []
    assert bits(back.state_dict()) == bits(theirs.state_dict())
    assert layers["stem.1"].num_batches_tracked.tolist() == 7


def test_layers_match_the_model(rng: np.random.Generator) -> None:
    theirs, layers = torch_model(rng), our_layers()
    load(layers, theirs.state_dict())
    modules = dict(theirs.named_modules())
    for name, (rank, size) in (LAYERS | {PLAIN: (2, 3)}).items():
        x = rng.standard_normal((2, size, 7, 5, 3)[: rank + 2]).astype(np.float32)
        for training in (False, True, False):
            expected = modules[name].train(training)(torch.from_numpy(x)).detach().numpy()
            assert_close(layers[name].train(training)(x), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_checkpoints_in_float32_layers(rng: np.random.Generator, tmp_path: Path, dtype: str) -> None:
    """Mixed precision: 16-bit checkpoints are widened exactly."""
    theirs, direct, through_file = torch_model(rng, getattr(torch, dtype)), our_layers(), our_layers()
    load(direct, theirs.state_dict())
    assert bits(state_of(direct)) == bits(theirs.float().state_dict())
    files = pytest.importorskip("safetensors.numpy")
    from safetensors.torch import save_file

    save_file(theirs.to(getattr(torch, dtype)).state_dict(), tmp_path / "model.safetensors")
    load(through_file, files.load_file(tmp_path / "model.safetensors"))
    assert bits(state_of(through_file)) == bits(state_of(direct))


# Tensors of other kinds


@pytest.mark.parametrize("dtype", [name for name in dir(torch) if name.startswith("float8_")])
@pytest.mark.parametrize("how", ["load", "data", "numpy"])
@pytest.mark.parametrize("wanted", ["float32", "float64"])
def test_every_float8_value_is_loaded_exactly(dtype: str, how: str, wanted: str) -> None:
    """From PyTorch, and from NumPy arrays of ml_dtypes; against ml_dtypes."""
    codes, kind = np.arange(256, dtype=np.uint8), getattr(ml_dtypes, dtype)
    tensor = torch.from_numpy(codes.copy()).view(getattr(torch, dtype))
    norm = cn.InstanceNorm2d(256, affine=True, bias=False, device="cpu", dtype=wanted)
    with np.errstate(invalid="ignore"):  # of a signalling NaN
        if how == "data":
            norm.weight.data = tensor
        else:
            norm.load_state_dict({"weight": tensor if how == "load" else codes.view(kind)})
        assert_equal(norm.weight.data, codes.view(kind).astype(wanted))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "int8", "uint8", "bool"])
def test_tensors_of_dtypes_that_numpy_has_keep_them(dtype: str) -> None:
    values = np.array([0, 1, 1 if dtype == "bool" else 3]).astype(dtype)
    values = values / 7 if values.dtype.kind == "f" else values
    found = devices.to_host(torch.from_numpy(values.copy()))
    assert found.dtype == values.dtype
    assert_equal(found, values)


def freed() -> Any:
    """A tensor without memory, as FSDP leaves its parameters."""
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    return tensor


def fake() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode().from_tensor(torch.ones(3))


#: Tensors that cannot be loaded, and their errors.
ODD: dict[str, tuple[Any, str]] = {
    "sparse": (lambda: torch.ones(3).to_sparse(), r"layout torch.sparse_coo.*to_dense\(\)"),
    "compressed": (lambda: torch.eye(3).to_sparse_csr(), r"layout torch.sparse_csr.*to_dense\(\)"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), r"qint8.*dequantize\(\)"),
    "meta": (lambda: torch.ones(3, device="meta"), "meta.*no values.*map_location='cpu'"),
    "freed": (freed, "no values.*freed"),
    "bfloat16, freed": (lambda: freed().view(torch.bfloat16), "no values.*freed"),
    "complex": (lambda: torch.ones(3, dtype=torch.complex64), r"complex \(torch.complex64\).*tensor.real"),
    "half complex": (lambda: torch.ones(3).to(torch.complex32), r"complex \(torch.complex32\).*tensor.real"),
    "conjugate": (lambda: torch.ones(3, dtype=torch.complex64).conj(), "complex.*tensor.real"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), r"nested.*unbind\(\)"),
    "lazy": (torch.nn.UninitializedParameter, "not initialized.*forward"),
    "int4": (lambda: torch.empty(3, dtype=torch.int4), "Tensor of torch.int4.*torch.float32"),
    "float4": (lambda: torch.zeros(3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "float4.*torch.float32"),
    "fake": (fake, "FakeTensor of torch.float32.*plain tensor"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch's, about beta and prototype features
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("strict", [True, False])
def test_tensors_without_numbers_are_refused(kind: str, strict: bool) -> None:
    """The error names the entry and says what to do; nothing is loaded."""
    make, said = ODD[kind]
    try:
        odd = make()
    except (AttributeError, RuntimeError) as why:
        pytest.skip(f"this PyTorch has no such tensor: {why}")
    norm = our_layers()["stem.1"]
    state = {f"stem.1.{name}": array + 1 for name, array in norm.state_dict().items()}
    before = bits(norm.state_dict())
    with pytest.raises(TypeError, match=f"^stem.1.running_mean is a .*{said}"):
        norm.load_state_dict(state | {"stem.1.running_mean": odd}, strict, prefix="stem.1.")
    with pytest.raises(TypeError, match=f"^data is a .*{said}"):
        norm.weight.data = odd
    assert bits(norm.state_dict()) == before


PLAIN_VALUES = {
    "negated": lambda t: torch.complex(t, -t).conj().imag,  # a view with PyTorch's negative bit
    "a view": lambda t: torch.stack([t, -t], 1)[:, 0],
    "reversed": lambda t: t.flip(0).flip(0),
    "requires a gradient": lambda t: t.clone().requires_grad_() * 1,
    "parameter": lambda t: torch.nn.Parameter(t.clone()),
    "of inference_mode": lambda t: torch.inference_mode()(t.clone)(),
    "integers": lambda t: t.to(torch.uint16),
}


@pytest.mark.parametrize("kind", PLAIN_VALUES)
def test_tensors_with_numbers_are_loaded(kind: str) -> None:
    tensor = PLAIN_VALUES[kind](torch.tensor([1.0, 2, 3]))
    norm = our_layers()["stem.1"]
    norm.load_state_dict({"weight": tensor}, strict=False)
    norm.bias.data = tensor
    assert norm.weight.data.tolist() == norm.bias.data.tolist() == [1, 2, 3]


def test_file_without_batch_counter(rng: np.random.Generator, tmp_path: Path) -> None:
    """A whole model through a file, as PyTorch 0.4.0 saved it."""
    theirs, layers = torch_model(rng), our_layers()
    old = {key: value for key, value in theirs.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "model.pt")
    load(layers, torch.load(tmp_path / "model.pt", weights_only=True))
    assert bits(state_of(layers)) == bits(theirs.state_dict())
    torch_model(rng).load_state_dict(old)
    del old["stem.1.running_var"]
    with pytest.raises(KeyError, match=r"missing \['stem.1.running_var'\], unexpected nothing"):
        layers["stem.1"].load_state_dict(old, prefix="stem.1.")


def test_strict_within_the_prefix(rng: np.random.Generator) -> None:
    """Errors name the checkpoint's own keys; another layer whose name begins alike does no harm."""
    state = torch_model(rng).state_dict()
    norm = our_layers()["body.blocks.1.norm"]
    before = bits(norm.state_dict())
    for broken, word in (
        (
            {k: v for k, v in state.items() if k != "body.blocks.1.norm.running_var"},
            r"missing.*blocks\.1\.norm\.running_var",
        ),
        (state | {"body.blocks.1.norm.scale": torch.ones(5)}, r"unexpected.*blocks\.1\.norm\.scale"),
        ({}, r"missing.*body\.blocks\.1\.norm\.weight"),
    ):
        with pytest.raises(KeyError, match=word):
            norm.load_state_dict(broken, prefix="body.blocks.1.norm.")
        assert bits(norm.state_dict()) == before
    with pytest.raises(ValueError, match=r"body\.blocks\.1\.norm\.bias \(6,\), not \(5,\)"):
        norm.load_state_dict(state | {"body.blocks.1.norm.bias": torch.ones(6)}, prefix="body.blocks.1.norm.")
    assert bits(norm.state_dict()) == before
    with pytest.raises(KeyError, match="unexpected"):
        norm.load_state_dict(state)  # a whole model's state, without a prefix
    norm.load_state_dict(state, prefix="body.blocks.1.norm.")
    norm.load_state_dict({"body.blocks.1.norm.weight": 3 * torch.ones(5)}, strict=False, prefix="body.blocks.1.norm.")
    assert norm.weight.data.tolist() == [3] * 5
    assert norm.bias.data.tolist() == state["body.blocks.1.norm.bias"].tolist()
