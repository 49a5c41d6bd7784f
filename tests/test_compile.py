"""Every kernel compiled for every architecture by NVRTC itself, without a GPU, and held to its resources."""

from __future__ import annotations

import ctypes
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import pytest

from cupynorm.cuda import source
from cupynorm.cuda.plan import LADDERS, resident_threads
from cupynorm.cuda.source import OPTIONS, CompileError, Module, all_modules, compile_error, core_modules

pytestmark = [pytest.mark.nvrtc]

ARCHITECTURES = (70, 75, 80, 86, 89, 90, 100, 120)
# CuPy adds this after a module's own options.
CUPY_OPTIONS = ("-ftz=true",)
REGISTERS = 65536  # of a multiprocessor, on all of them


@lru_cache(maxsize=1)
def _nvrtc() -> ctypes.CDLL:
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        return ctypes.CDLL(load_nvidia_dynamic_lib("nvrtc").abs_path)
    except Exception as error:  # whichever way it is missing
        pytest.skip(f"no NVRTC library: {type(error).__name__}")


@dataclass
class Compiled:
    status: int
    log: str
    ptx: str


def _compile(text: str, options: tuple[str, ...], want_ptx: bool = False) -> Compiled:
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None) == 0
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc.nvrtcCompileProgram(program, len(options), given)

        def text_of(kind: str) -> str:
            size = ctypes.c_size_t()
            getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
            buffer = ctypes.create_string_buffer(size.value + 1)
            getattr(nvrtc, f"nvrtcGet{kind}")(program, buffer)
            return buffer.value.decode()

        return Compiled(status, text_of("ProgramLog"), text_of("PTX") if want_ptx and status == 0 else "")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _supported(architecture: int) -> bool:
    count = ctypes.c_int()
    nvrtc = _nvrtc()
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    supported = (ctypes.c_int * count.value)()
    nvrtc.nvrtcGetSupportedArchs(supported)
    return architecture in list(supported)


def _check_resources(module: Module, architecture: int) -> int:
    """Compile a module to machine code; no spills, no local memory, no more registers than its threads may have."""
    options = (*OPTIONS, *CUPY_OPTIONS, f"-arch=sm_{architecture}", "--ptxas-options=-v")
    done = _compile(module.source, options)
    assert done.status == 0, f"{module} for sm_{architecture}:\n{done.log}"
    assert not re.search(r"kernels/.*warning", done.log), done.log
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        done.log,
        re.S,
    )
    assert {name for name, *_ in found} == set(module.kernels)
    most = {
        name: REGISTERS // resident_threads(module.file, module.dtype, module.kind) if "x" in name else 255
        for name in module.kernels
    }
    for name, *memory, registers in found:
        assert [int(m) for m in memory] == [0, 0, 0], f"{name} of {module} for sm_{architecture}: {memory}"
        assert int(registers) <= most[name], f"{name} of {module} for sm_{architecture}: {registers} registers"
    return len(found)


@pytest.mark.parametrize("module", core_modules(), ids=lambda m: f"{m.file}-{m.dtype}")
def test_core_modules(module: Module) -> None:
    assert _supported(90)
    assert _check_resources(module, 90) == len(module.kernels)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_module(architecture: int) -> None:
    if not _supported(architecture):
        pytest.skip(f"this NVRTC does not know sm_{architecture}")
    with ThreadPoolExecutor(2) as pool:
        kernels = sum(pool.map(lambda module: _check_resources(module, architecture), all_modules()))
    assert kernels == sum(len(module.kernels) for module in all_modules())
    print(f"sm_{architecture}: {kernels} kernels")


@pytest.mark.parametrize(
    "module", [m for m in core_modules() if m.file != "channels"], ids=lambda m: f"{m.file}-{m.dtype}"
)
def test_sixteen_byte_accesses(module: Module) -> None:
    """Packs move in one access each: 16 bytes channels-first, and only edges and sums of planes by themselves."""
    ptx = _compile(module.source, (*OPTIONS, *CUPY_OPTIONS, "-arch=compute_90"), want_ptx=True).ptx
    for entry in ptx.split(".visible .entry ")[1:]:
        name = entry.split("(")[0]
        rung = next(r for r in LADDERS[module.file] if name.endswith(r.name))
        arrays = 1 if module.file == "forward" else 2
        loads = len(re.findall(r"ld\.global\.v4\.(?:b32|u32|f32)", entry))
        stores = len(re.findall(r"st\.global\.v4\.b32", entry))
        if rung.chunks:
            assert loads == arrays * rung.chunks, name
            assert stores == rung.chunks, name
        else:
            assert loads >= arrays, name
            assert stores >= 1, name
        # Narrow ones: the edge element and the planes' parameters and sums, not a pack taken apart.
        assert len(re.findall(r"st\.global\.(?:u16|b16|f32|u32)\b", entry)) <= 4, name
        assert "st.global.v2" not in entry, name


def test_a_compile_error_names_file_and_line(monkeypatch: pytest.MonkeyPatch) -> None:
    module = core_modules()[0]
    text = module.source.replace("out[0] = t[0];", "out[0] = t[0] + nonsense;")
    assert text != module.source
    done = _compile(text, (*OPTIONS, "-arch=sm_90"))
    assert done.status != 0
    message = str(compile_error(module, done.log))
    line = next(
        i
        for i, t in enumerate((source.kernel_folder() / "sums.cuh").read_text().splitlines(), 1)
        if "out[0] = t[0];" in t
    )
    assert f"kernels/sums.cuh, line {line}" in message
    assert "nonsense" in message
    assert "CUPYNORM_EAGER=0" in message
    assert isinstance(compile_error(module, "no such option"), CompileError)
