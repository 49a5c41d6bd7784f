"""The CUDA kernels on the emulator: bytes moved, the same bits in every order, and that the emulator bites."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import cases
import numpy as np
import pytest
import reference
from simt import emulator
from simt.emulator import Emulator, SimtError

import cupynorm as cn
from cupynorm import devices, functional
from cupynorm.cuda.launch import Launcher
from cupynorm.cuda.plan import Device, Memory, Step
from cupynorm.cuda.source import Module, all_modules, kernel_folder
from cupynorm.explain import plan_for

pytestmark = pytest.mark.simt


@pytest.fixture(autouse=True)
def _compiler() -> None:
    emulator.require()


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Emulator]:
    """Run the public functions on a new emulator."""

    def made(runtime: Any) -> Any:
        monkeypatch.setattr("simt.backend.forward", Launcher(runtime).forward)
        monkeypatch.setattr("simt.backend.backward", Launcher(runtime).backward)
        monkeypatch.setitem(functional.BACKENDS, "numpy", "simt.backend")
        return runtime

    return made


class Recorder:
    """A runtime that launches nothing and remembers what it was to launch."""

    def __init__(self, device: Device):
        self._device = device
        self.launched: set[tuple[Module, str]] = set()

    def on(self, array: Any) -> Any:
        return nullcontext()

    def device(self) -> Device:
        return self._device

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.zeros(shape, dtype)

    def address(self, array: np.ndarray) -> int:
        return array.ctypes.data

    def launch(self, module: Module, step: Step, args: tuple[Any, ...]) -> None:
        self.launched.add((module, step.name))


def test_the_case_table_reaches_every_kernel(on: Callable[..., Any], rng: np.random.Generator) -> None:
    runtime = on(Recorder(cases.SMALL_DEVICE))
    for case in (*cases.TABLE, *cases.variants()):
        x, dy, weight, bias, mean, var = cases.arrays(case, rng)
        for options in ({}, {"use_input_stats": False}):
            _, saved = cn.instance_norm_forward(x, weight, bias, running_mean=mean, running_var=var, **options)
            cn.instance_norm_backward(dy, saved)
    missing = {(m, name) for m in all_modules() for name in m.kernels} - runtime.launched
    assert not missing, sorted(f"{m.file} {m.dtype} {m.kind} {m.vector} {name}" for m, name in missing)


# One case for each regime: shape, layout, shared memory of the device.
REGIMES = [
    ("warp-registers", (2, 3, 5, 7), "contiguous"),
    ("block-registers", (2, 3, 35, 45), "contiguous"),
    ("block-registers", (2, 3, 35, 45), "unaligned"),
    ("block-shared", (2, 2, 140, 129), "contiguous"),
    ("split", (2, 2, 260, 131), "contiguous"),
    ("warp-registers", (2, 8, 4, 4), "channels_last"),
    ("block-registers", (2, 8, 16, 15), "channels_last"),
    ("block-shared", (2, 8, 70, 32), "channels_last"),
    ("split", (2, 8, 70, 100), "channels_last"),
    ("split", (2, 3, 70, 100), "channels_last"),
]
DEVICE = Device("bytes", (8, 0), 1, 100 * 1024, 2**20)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(("regime", "shape", "layout"), REGIMES)
def test_bytes(
    on: Callable[..., Emulator], rng: np.random.Generator, regime: str, shape: tuple[int, ...], layout: str, dtype: str
) -> None:
    """Every element is read and written as often as the plan says, and nothing else of its size is touched."""
    scale = {"float64": 2, "float32": 1}.get(dtype, 0.5)  # the same bytes a plane in every dtype
    shape = (*shape[:3], round(shape[3] / scale))
    x = reference.LAYOUTS[layout](rng.normal(size=shape).astype(devices.dtype_of(dtype)))
    y = reference.LAYOUTS[layout](np.zeros_like(x))
    dy = reference.LAYOUTS[layout](rng.normal(size=shape).astype(x.dtype))
    runtime = on(Emulator(DEVICE))
    memory = Memory(x.shape, x.strides, x.itemsize, x.ctypes.data % 16)
    planes = shape[0] * shape[1]

    def large(counts: list[emulator.Count]) -> int:
        total = 0
        for count in counts:
            for address, size in count.size.items():
                moved = count.read[address] + count.written[address]
                if size >= x.nbytes:
                    assert moved % x.nbytes == 0, f"{count.kernel} moves a part of an array"
                    total += moved
                else:
                    tiles = step.tiles
                    assert size <= planes * tiles * 24, f"{count.kernel} touches {size} B that are no sums of planes"
        return total

    made, _ = plan_for("forward", memory, dtype, DEVICE)
    step = made.steps[0]
    assert made.regime == regime
    _, saved = cn.instance_norm_forward(x, out=y)
    assert large(runtime.counts) == made.accesses * x.nbytes == (3 if regime == "split" else 2) * x.nbytes

    runtime.counts.clear()
    made, _ = plan_for("backward", memory, dtype, DEVICE)
    step = made.steps[0]
    cn.instance_norm_backward(dy, saved, out=y)
    assert large(runtime.counts) == made.accesses * x.nbytes == (5 if made.regime == "split" else 3) * x.nbytes

    # Tracked eval: two and three accesses whatever the size; without affine gradients x is not read again.
    runtime.counts.clear()
    made, _ = plan_for("eval_gradient", memory, dtype, DEVICE)
    step = made.steps[0]
    ones = np.ones(shape[1], functional.math_dtype(x.dtype))
    _, saved = cn.instance_norm_forward(x, ones, running_mean=ones, running_var=ones, use_input_stats=False, out=y)
    assert large(runtime.counts) == 2 * x.nbytes
    runtime.counts.clear()
    cn.instance_norm_backward(dy, saved, out=y)
    assert large(runtime.counts) == 3 * x.nbytes
    _, saved = cn.instance_norm_forward(x, running_mean=ones, running_var=ones, use_input_stats=False, out=y)
    runtime.counts.clear()
    cn.instance_norm_backward(dy, saved, out=y)
    assert large(runtime.counts) == 2 * x.nbytes


def _everything(rng_seed: int) -> list[np.ndarray]:
    """Results of forward and backward, in training and eval, in every regime: a net for broken kernels."""
    rng = np.random.default_rng(rng_seed)
    results: list[np.ndarray] = []
    for _, shape, layout in REGIMES:
        x, dy = (reference.LAYOUTS[layout](rng.normal(size=shape).astype(np.float32)) for _ in range(2))
        weight, bias, mean, var = (rng.random(shape[1]).astype(np.float32) + 0.5 for _ in range(4))
        for use_input_stats in (True, False):
            y, saved = cn.instance_norm_forward(
                x, weight, bias, running_mean=mean, running_var=var, use_input_stats=use_input_stats
            )
            results += [y, *cn.instance_norm_backward(dy, saved), mean.copy(), var.copy()]
    return results


@pytest.fixture(scope="module")
def right() -> tuple[int, list[np.ndarray]]:
    """What the NumPy backend makes of it."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    return seed, _everything(seed)


def test_same_bits_in_every_order(on: Callable[..., Emulator], right: tuple[int, list[np.ndarray]]) -> None:
    seed, expected = right
    results = []
    for order in emulator.ORDERS:
        on(Emulator(DEVICE, order))
        results.append(_everything(seed))
    for forward, *others, exact in zip(*results, expected, strict=True):
        for other in others:
            np.testing.assert_array_equal(forward, other)
        np.testing.assert_allclose(forward, exact, rtol=1e-4, atol=1e-4)


def _caught(on: Callable[..., Emulator], right: tuple[int, list[np.ndarray]], transform: emulator.Transform) -> str:
    """What the emulator says of broken kernels: the first complaint, or '' if nothing is wrong in any order."""
    seed, expected = right
    for order in emulator.ORDERS:
        on(Emulator(DEVICE, order, transform))
        try:
            results = _everything(seed)
        except SimtError as error:
            return str(error)
        for actual, exact in zip(results, expected, strict=True):
            if not np.allclose(actual, exact, rtol=1e-3, atol=1e-3):
                return f"wrong numbers in {order} order"
    return ""


#: Barriers whose removal nothing shows, with the reason why they are redundant: none.
SURVIVORS: dict[str, str] = {}


def _barriers() -> list[tuple[str, int]]:
    """Every barrier in the kernel sources: file, and line."""
    sites = []
    for path in sorted(kernel_folder().glob("*.cu*")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            sites += [(path.name, number)] * len(re.findall(r"__sync(?:threads|warp)\(\)", line.split("//")[0]))
    return sites


@pytest.mark.parametrize(("file", "line"), _barriers())
def test_every_barrier_is_needed(
    on: Callable[..., Emulator], right: tuple[int, list[np.ndarray]], file: str, line: int
) -> None:
    text = (kernel_folder() / file).read_text().splitlines()[line - 1]
    without = re.sub(r"__sync(?:threads|warp)\(\);", "", text)
    assert without != text

    def removed(source: str) -> str:
        # The line as it stands in its file; modules that do not include the file stay as they are.
        marker = f'#line 1 "kernels/{file}"\n'
        head, found, body = source.partition(marker)
        if not found:
            return source
        lines = body.splitlines()
        here = _line_in(body, file, line)
        assert lines[here] == text
        lines[here] = without
        return head + found + "\n".join(lines)

    said = _caught(on, right, removed)
    print(f"{file}:{line}: {said}")
    assert bool(said) != (f"{file}:{line}" in SURVIVORS), said


def _line_in(body: str, file: str, line: int) -> int:
    """Where line `line` of a file is in a text that begins with it and has other files put in."""
    current, number = file, 0
    for index, text in enumerate(body.splitlines()):
        directive = re.match(r'#line (\d+) "kernels/(.+)"', text)
        if directive:
            number, current = int(directive[1]) - 1, directive[2]
            continue
        number += 1
        if current == file and number == line:
            return index
    raise AssertionError(f"{file}:{line} is not there")


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("if (share.holds(from + i)) pack[i] = load(", "pack[i] = load(", "outside of every array"),
        ("const int shift = (int)(address / sizeof(Storage) % V);", "const int shift = 0;", "not aligned"),
        ("if (lane < lanes) {", "if (false) {", "wrong numbers"),  # reads poisoned shared memory
        ("    __syncthreads();\n    #pragma unroll\n    for (int k = 0; k < K; k++) s[k] = 0;",
         "    if (threadIdx.x != 5) __syncthreads();\n    for (int k = 0; k < K; k++) s[k] = 0;", "divergence"),
        ("s[k] += __shfl_xor_sync(", "if (threadIdx.x % 32 != 3) s[k] += __shfl_xor_sync(", "divergence"),
        ("scratch[(warp * lanes + lane) * K + k] = s[k];", "scratch[(warp * lanes + lane) * K + k + 1] = s[k];",
         "behind the end of shared memory"),
        ("int lanes, int chunks, double eps) {", "int lanes, long long chunks, double eps) {", "argument 18"),
    ],
    ids=["bounds", "alignment", "poison", "barrier", "shuffle", "shared", "arguments"],
)  # fmt: skip
def test_the_emulator_bites(
    on: Callable[..., Emulator], right: tuple[int, list[np.ndarray]], old: str, new: str, complaint: str
) -> None:
    said = _caught(on, right, lambda source: source.replace(old, new))
    assert complaint in said


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bit_conversions(on: Callable[..., Emulator], dtype: str) -> None:
    """Every 16-bit value passes through the kernels as NumPy and ml_dtypes read and round it."""
    on(Emulator(DEVICE))
    x = np.arange(65536, dtype=np.uint16).view(devices.dtype_of(dtype)).reshape(1, 1, 65536)
    zero, one = np.zeros(1, np.float32), np.ones(1, np.float32)
    y = cn.instance_norm(x, zero, one, use_input_stats=False, eps=0.0)
    np.testing.assert_array_equal(y.astype(np.float32), x.astype(np.float32))
    # Between the values: a third of each, rounded back.
    y = cn.instance_norm(x, zero, one, one / 3, use_input_stats=False, eps=0.0)
    with np.errstate(all="ignore"):
        third = x.astype(np.float32) * (one / 3)
        np.testing.assert_array_equal(y.astype(np.float32), third.astype(x.dtype).astype(np.float32))


def _asan_environment() -> dict[str, str]:
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    path = library.stdout.strip()
    if not os.path.isabs(path):
        pytest.skip("AddressSanitizer is not installed")
    return os.environ | {
        "LD_PRELOAD": path,
        "ASAN_OPTIONS": "detect_leaks=0,log_to_syslog=0",
        "CUPYNORM_SIMT_ASAN": "1",
    }


@pytest.mark.slow
def test_address_sanitizer() -> None:
    """A part of the case table, with the heap watched: arrays and shared memory."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "simt and (float32 or bfloat16)"]
    folder = os.path.dirname(__file__)
    done = subprocess.run(
        [*command, os.path.join(folder, "test_cases.py")],
        env=_asan_environment(), capture_output=True, text=True, check=False, cwd=os.path.dirname(folder),
    )  # fmt: skip
    print(done.stdout[-3000:], done.stderr[-3000:])
    assert done.returncode == 0
    assert re.search(r"\d+ passed", done.stdout)
    assert "ERROR: AddressSanitizer" not in done.stderr


_OVERFLOW = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np, cupynorm
from cupynorm import functional
from simt import backend
backend.runtime.transform = lambda source: source.replace(
    "scratch[(warp * lanes + lane) * K + k] = s[k];", "scratch[(warp * lanes + lane) * K + k + 16] = s[k];")
functional.BACKENDS["numpy"] = "simt.backend"
cupynorm.instance_norm(np.ones((1, 1, 35, 450), np.float32))
"""


@pytest.mark.slow
def test_address_sanitizer_bites() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _OVERFLOW, os.path.dirname(__file__)],
        env=_asan_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
