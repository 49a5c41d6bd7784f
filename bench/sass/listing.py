"""Compile a module's text, disassemble it, and parse the listing."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cupynorm.cuda.source import OPTIONS

ARCHITECTURE = "sm_90"


class MissingError(RuntimeError):
    """NVRTC or nvdisasm is not installed."""


def _wheel_folders() -> list[Path]:
    """Return the folders of NVIDIA's wheels."""
    spec = importlib.util.find_spec("nvidia")
    return [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []


@lru_cache(maxsize=1)
def nvrtc() -> ctypes.CDLL:
    """Return the NVRTC library of NVIDIA's wheel or of the toolkit."""
    found = [path for folder in _wheel_folders() for path in sorted(folder.rglob("libnvrtc.so.*"))]
    for name in (*found, "/usr/local/cuda/lib64/libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"):
        try:
            for builtins in sorted(Path(name).parent.glob("libnvrtc-builtins.so.*")):
                ctypes.CDLL(str(builtins))  # which the library looks for by its name
            return ctypes.CDLL(str(name))
        except OSError:
            continue
    raise MissingError("no NVRTC library: pip install nvidia-cuda-nvrtc")


@lru_cache(maxsize=1)
def nvrtc_version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


@lru_cache(maxsize=1)
def nvdisasm() -> str:
    """Return the path of nvdisasm."""
    found = [str(path) for folder in _wheel_folders() for path in folder.rglob("nvdisasm")]
    for name in (*found, shutil.which("nvdisasm"), "/usr/local/cuda/bin/nvdisasm"):
        if name and Path(name).exists():
            return name
    raise MissingError("no nvdisasm: pip install nvidia-cuda-nvdisasm")


def cubin_of(text: str) -> bytes:
    """Compile a module's text as CuPy does."""
    library, program = nvrtc(), ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None)
    try:
        options = [option.encode() for option in (*OPTIONS, f"-arch={ARCHITECTURE}")]
        status = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        if status:
            raise RuntimeError(f"NVRTC reports error {status}")
        size = ctypes.c_size_t()
        library.nvrtcGetCUBINSize(program, ctypes.byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        library.nvrtcGetCUBIN(program, cubin)
        return cubin.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([nvdisasm(), "-c", file.name], capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Instruction:
    """guard: the predicate that decides whether it has an effect, "" for none; name: with its modifiers."""

    address: int
    guard: str
    name: str
    operands: tuple[str, ...]

    @property
    def operation(self) -> str:
        return self.name.partition(".")[0]

    @property
    def modifiers(self) -> tuple[str, ...]:
        return tuple(self.name.split(".")[1:])

    def __str__(self) -> str:
        return f"{self.address:#06x} {self.guard} {self.name} {', '.join(self.operands)}"


@dataclass(frozen=True)
class Kernel:
    """A kernel's instructions by address, and the addresses of its labels."""

    name: str
    code: dict[int, Instruction]
    labels: dict[str, int]


_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+) )?\s*([A-Z][\w.]*)\s*(.*?)\s*;")
_COMMENT = re.compile(r"\(\*.*?\*\)")  # on spills and the like
_LABEL = re.compile(r"([.$\w]+):$")


def kernels_of(listing: str) -> dict[str, Kernel]:
    """Parse nvdisasm's listing of a cubin."""
    kernels: dict[str, Kernel] = {}
    kernel, waiting = None, []
    for line in listing.splitlines():
        if line.startswith("\t.section"):
            name = re.search(r"\.text\.(\w+)", line)
            kernel = kernels.setdefault(name[1], Kernel(name[1], {}, {})) if name else None
        elif kernel and (label := _LABEL.match(line)):
            waiting.append(label[1])
        elif kernel and (found := _LINE.match(_COMMENT.sub("", line))):
            address = int(found[1], 16)
            operands = tuple(re.split(r",\s*|\s+(?=`)", found[4])) if found[4] else ()
            kernel.code[address] = Instruction(address, found[2] or "", found[3], operands)
            kernel.labels.update(dict.fromkeys(waiting, address))
            waiting.clear()
    return kernels


@lru_cache(maxsize=64)
def compiled(text: str) -> dict[str, Kernel]:
    """Return the kernels of a module's text."""
    return kernels_of(disassembled(cubin_of(text)))
