"""Instructions that the kernels issue on sm_90: their machine code is executed in NumPy (bench/sass), which also shows
that it computes the right results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.commands import instructions
from bench.sass import listing, machine
from bench.sass.machine import Block, MachineError
from bench.sass.runtime import SassRuntime
from cupynorm import devices
from cupynorm._types import ForwardCall
from cupynorm.cuda.device import Device
from cupynorm.cuda.launch import CudaBackend
from cupynorm.cuda.plan import Step

pytestmark = [pytest.mark.nvrtc, pytest.mark.full]

#: After a change, review the output of `python -m bench instructions --json tests/kernels/instructions.json`.
TABLE = json.loads((Path(__file__).parent / "instructions.json").read_text(encoding="utf-8"))
COUNTS = TABLE["lane-instructions of an element"]


@pytest.fixture(autouse=True, scope="module")
def _tools() -> None:
    try:
        listing.nvrtc(), listing.nvdisasm()
    except listing.MissingError as error:
        pytest.skip(str(error))


def test_the_table_has_every_case() -> None:
    assert list(COUNTS) == [str(case) for case in instructions.CASES]


@pytest.mark.parametrize("op", ["forward", "backward"])
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_instructions_of_each_element(layout: str, op: str) -> None:
    """Neither more than in the table, nor so few that it is out of date. `count` compares results with NumPy's."""
    if list(listing.nvrtc_version()) != TABLE["nvrtc"]:
        pytest.skip(f"the table is for NVRTC {TABLE['nvrtc']}, this is {listing.nvrtc_version()}")
    wrong = []
    for case in instructions.CASES:
        if (case.layout, case.op) == (layout, op):
            found, (kernel, expected) = instructions.count(case), COUNTS[str(case)]
            if found.kernel != kernel or not 0.98 * expected <= found.lane <= 1.005 * expected:
                wrong.append(f"{case}: {found.kernel} {found.lane:.2f}, in the table {kernel} {expected}")
    assert not wrong, "\n".join(wrong)


SMALL = Device("small", (9, 0), 4, 100 * 1024, 2**20, 4)


@pytest.mark.parametrize("shape", [(2, 3, 40), (3, 2, 300), (1, 4, 3000), (1, 1, 70_000)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_results_of_whole_calls(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> None:
    """All blocks of all launches, on a small device: also clusters, grids that wait, and sums over the batch."""
    runtime = SassRuntime(SMALL)
    backend = CudaBackend(runtime)
    x, dy = (rng.normal(3, 2, shape).astype(devices.dtype_of(dtype)) for _ in range(2))
    weight, bias = rng.uniform(0.5, 2, (2, shape[1])).astype(np.float32)
    result = backend.forward(ForwardCall(x, weight, bias))
    result.commit()
    assert result.saved is not None
    dx, dweight, dbias, _ = backend.backward(dy, result.saved, out=None)
    a, g, w = x.astype(np.longdouble), dy.astype(np.longdouble), weight[:, None]
    rstd = (a.var(2, keepdims=True) + 1e-5) ** -0.5
    xhat = (a - a.mean(2, keepdims=True)) * rstd
    expected = {
        "y": xhat * w + bias[:, None],
        "dx": w * rstd * (g - g.mean(2, keepdims=True) - xhat * (g * xhat).mean(2, keepdims=True)),
        "dweight": (g * xhat).sum((0, 2)),
        "dbias": g.sum((0, 2)),
    }
    bound = {"float32": 1e-5, "bfloat16": 1e-2}[dtype]
    for name, got in {"y": result.y, "dx": dx, "dweight": dweight, "dbias": dbias}.items():
        exact = expected[name]
        error = np.abs(got.astype(np.longdouble) - exact).max() / max(1, np.abs(exact).max())
        assert error <= bound, (name, error, [launched.step.name for launched in runtime.launched])


KERNEL = """
struct Arguments { long long* out; const long long* a; const long long* b; const float* f; int n; };
extern "C" __global__ void __launch_bounds__(64) k(Arguments call) {
    __shared__ long long shared[64];
    const int i = threadIdx.x;
    const long long a = call.a[i], b = call.b[i];
    const float f = call.f[i];
    long long* out = call.out + i;
    shared[i] = a;
    __syncthreads();
    out[0 * 64] = a + b;
    out[1 * 64] = a * b;
    out[2 * 64] = b ? a / b : -1;
    out[3 * 64] = (unsigned)a / ((unsigned)b | 1);
    out[4 * 64] = (a >> (b & 63)) ^ (a << (b & 31));
    out[5 * 64] = a < b ? a : b;
    out[6 * 64] = __byte_perm((unsigned)a, (unsigned)b, 0x3715);
    out[7 * 64] = (long long)(f * 1000.0f);
    out[8 * 64] = __float_as_uint(f / (1.0f + f * f));
    out[9 * 64] = __double_as_longlong((double)f * 3.5 + (double)a);
    out[10 * 64] = shared[63 - i];
    long long sum = 0;
    for (int k = 0; k < (i & 7); k++) sum += shared[k] * k;     // a different number of times in each thread
    out[11 * 64] = sum;
    int s = i;
    for (int d = 16; d; d /= 2) s += __shfl_xor_sync(0xffffffff, s, d);
    out[12 * 64] = s;
    out[13 * 64] = __float2int_rz(f) + (int)(short)a + (a == b) + __clz((int)a | 1);
}
"""


def _block(arguments: bytes, arrays: list[Any], text: str = KERNEL, threads: int = 64) -> Block:
    return Block(listing.compiled(text)["k"], Step("", "", "k", (1, 1), threads, 0), [0], arguments, arrays)


def test_the_machine_computes_what_c_does(rng: np.random.Generator) -> None:
    """Integers of 64 bits, divisions, shifts, bytes, conversions, barriers, shuffles, and loops that diverge."""
    a, b = (rng.integers(-(2**63), 2**63 - 1, 64) >> rng.integers(0, 62, 64) for _ in range(2))
    b[:4], a[4:8] = [0, 1, -1, a[3]], [0, -1, 2**63 - 1, -(2**63) + 1]
    f = rng.normal(0, 100, 64).astype(np.float32)
    out = np.zeros((14, 64), np.int64)
    arguments = np.array([each.ctypes.data for each in (out, a, b, f)] + [64], np.int64).tobytes()
    _block(arguments, [out, a, b, f]).run()

    def wrapped(value: int) -> int:
        return (value + 2**63) % 2**64 - 2**63

    def short(value: int) -> int:
        return (value + 2**15) % 2**16 - 2**15

    def byte(value: int, number: int) -> int:
        return value >> 8 * number & 255

    for i in range(64):
        x, y, z = int(a[i]), int(b[i]), f[i]
        pair = (x & 2**32 - 1) | (y & 2**32 - 1) << 32
        low = x | 1
        zeros = 32 - (low & 2**32 - 1).bit_length()
        quotient = 0 if not y else abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)
        expected = [
            wrapped(x + y), wrapped(x * y), -1 if not y else wrapped(quotient),
            (x & 2**32 - 1) // (y & 2**32 - 1 | 1), wrapped((x >> (y & 63)) ^ wrapped(x << (y & 31))), min(x, y),
            sum(byte(pair, nibble) << 8 * k for k, nibble in enumerate((5, 1, 7, 3))), int(z * np.float32(1000)),
            int((z / (np.float32(1) + z * z)).view(np.uint32)), int(np.float64(float(z) * 3.5 + x).view(np.int64)),
            int(a[63 - i]), wrapped(sum(int(a[k]) * k for k in range(i & 7))), sum(range(32)) + 32 * 32 * (i // 32),
            int(z) + short(x) + (x == y) + zeros,
        ]  # fmt: skip
        near = {8: 2}  # the sum of products may be contracted
        for number, exact in enumerate(expected):
            assert abs(int(out[number, i]) - exact) <= near.get(number, 0), (number, i, x, y, z)


@pytest.mark.parametrize(
    ("index", "fault"), [("64", "no array"), ("-1", "no array"), ("threadIdx.x", "outside"), ("0", "")]
)
def test_the_machine_detects_accesses_outside_of_arrays(index: str, fault: str) -> None:
    text = f'extern "C" __global__ void k(int* p) {{ p[{index} + threadIdx.x] = 7; }}'
    array = np.zeros(64, np.int32)
    block = _block(np.array([array.ctypes.data], np.int64).tobytes(), [array], text)
    if fault:
        with pytest.raises(MachineError, match=fault):
            block.run()
        return
    block.run()
    assert (array == 7).all()
    assert block.issued["STG"] == 2 and sum(block.issued.values()) >= 10  # two warps


def test_threads_that_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MOST_STEPS", 2000)
    wait = "if (threadIdx.x < 32) __syncthreads(); else while (*(volatile int*)p == 0);"
    array = np.zeros(64, np.int32)
    text = f'extern "C" __global__ void k(int* p) {{ {wait} }}'
    block = _block(np.array([array.ctypes.data], np.int64).tobytes(), [array], text)
    with pytest.raises(MachineError, match="does not end"):
        block.run()
