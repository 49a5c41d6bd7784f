"""Build the fake device for the installed CuPy: python tests/fakegpu/build.py prints the folder of the build.

It has two files. libfakegpu.so, from device/*.cpp, is the driver and the runtime. runtime.so is CuPy's own extension
module cupy_backends.cuda.api.runtime, built anew from CuPy's sources, since NVIDIA's runtime is linked into the
wheel's. Functions that CuPy uses and device/ does not implement return an error that names them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("FAKEGPU_CACHE", Path(tempfile.gettempdir()) / f"cupynorm-fakegpu-{os.getuid()}"))
CUPY = "cupy-cuda13x"
NEEDED = (CUPY, "nvidia-cuda-runtime", "Cython", "fastrlock", "numpy", "setuptools", "wheel")

UNSUPPORTED = """
namespace fake { int refuse(int code, const char* format, ...); }
#define UNSUPPORTED(name) \\
    extern "C" int name() { return fake::refuse(801, "the fake GPU has no %s", #name); }
"""
PROFILER = """
#pragma once
#include <cuda_runtime_api.h>
extern "C" cudaError_t cudaProfilerStart(void);
extern "C" cudaError_t cudaProfilerStop(void);
"""


class MissingError(RuntimeError):
    """The build needs a program or a package that is not installed."""


def versions() -> dict[str, str]:
    """Return the versions of all packages that the build uses; raise MissingError if one, or g++, is missing."""
    found = {}
    for name in NEEDED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise MissingError(f"the fake GPU needs {name}: tests/fakegpu/README.md shows how to install it") from None
    if shutil.which("g++") is None:
        raise MissingError("the fake GPU needs g++")
    return found


def folder() -> Path:
    """Return the folder of the build for these sources and versions."""
    key = hashlib.sha256(repr((sys.version, sorted(versions().items()))).encode())
    for file in (Path(__file__), *sorted((HERE / "device").iterdir())):
        key.update(file.read_bytes())
    return CACHE / key.hexdigest()[:24]


def build() -> Path:
    """Return the folder of the two files, and build them if they are missing."""
    made = folder()
    if not made.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            _build(Path(scratch), Path(scratch, "made"))
            try:
                os.replace(Path(scratch, "made"), made)
            except OSError:  # another process was faster
                if not made.exists():
                    raise
    return made


def _run(*command: Any, **options: Any) -> str:
    done = subprocess.run(
        [str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}")
    return done.stdout


def _download(scratch: Path, requirement: str, *options: str) -> Path:
    """Download a package's file with pip, and return its path."""
    target = scratch / re.split("[=<>]", requirement)[0]
    # CuPy's setup.py, which pip runs to get the package's name, would otherwise look for a CUDA toolkit.
    environment = os.environ | {"CUPY_INSTALL_USE_STUB": "1"}
    _run(
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", *options,
        "--dest", target, requirement, env=environment,
    )  # fmt: skip
    return next(target.iterdir())


def _build(scratch: Path, made: Path) -> None:
    of = versions()
    sdist = _download(scratch, f"cupy=={of[CUPY]}", "--no-binary", ":all:", "--no-build-isolation")
    with tarfile.open(sdist) as archive:
        sources = [m for m in archive if "/cupy_backends/" in m.name or m.name.endswith((".pxd", ".pxi"))]
        archive.extractall(scratch, sources, filter="data")
    root = scratch / f"cupy-{of[CUPY]}"
    cuda = ".".join(of["nvidia-cuda-runtime"].split(".")[:2])
    with zipfile.ZipFile(_download(scratch, f"nvidia-cuda-crt=={cuda}.*", "--only-binary", ":all:")) as archive:
        archive.extractall(scratch / "crt")
    (scratch / "cuda_profiler_api.h").write_text(PROFILER)

    source = _translate(root, cuda)
    runtime = importlib.metadata.distribution("nvidia-cuda-runtime")
    headers = next(Path(str(runtime.locate_file(f))) for f in runtime.files or () if f.name == "cuda_runtime_api.h")
    crt = next((scratch / "crt").rglob("crt")).parent
    import numpy

    paths = (HERE / "device", headers.parent, crt, scratch, sysconfig.get_paths()["include"], numpy.get_include())
    compiler = ("g++", "-std=c++17", "-O1", "-fPIC", "-w", *(f"-I{path}" for path in paths))

    # libcuda.so.1 is a link to the library, in a folder of its own, so that the search path can leave it out.
    (made / "driver").mkdir(parents=True)
    library, link = made / "libfakegpu.so", made / "driver" / "libcuda.so.1"
    link.symlink_to("../libfakegpu.so")

    def compiling(file: Path) -> subprocess.Popen[bytes]:
        level = ["-O0"] if file == source else []  # CuPy's module is large, and its calls are few
        return subprocess.Popen([*compiler, *level, "-c", str(file), "-o", str(scratch / f"{file.stem}.o")])

    objects = [(file.stem, compiling(file)) for file in (source, *sorted((HERE / "device").glob("*.cpp")))]
    for name, process in objects:
        if process.wait():
            raise RuntimeError(f"{name} does not compile")
    own = [scratch / f"{name}.o" for name, _ in objects if name != source.stem]
    there = set(re.findall(r" T (cu\w+)", _run("nm", *own)))
    asked = set(re.findall(r" U (cuda[A-Z]\w+)", _run("nm", scratch / f"{source.stem}.o"))) | _driver_functions(root)
    unsupported = scratch / "unsupported.cpp"
    unsupported.write_text(UNSUPPORTED + "".join(f"UNSUPPORTED({name})\n" for name in sorted(asked - there)))
    _run(*compiler, "-c", unsupported, "-o", scratch / "unsupported.o")
    # Rename the runtime's functions, since PyTorch may have loaded NVIDIA's into the process.
    names = scratch / "names"
    names.write_text("".join(f"{name} fakegpu_{name}\n" for name in sorted(asked | there) if name.startswith("cuda")))
    for file in scratch.glob("*.o"):
        _run("objcopy", f"--redefine-syms={names}", file)
    _run(*compiler, "-shared", "-Wl,-soname,libfakegpu.so", *own, scratch / "unsupported.o", "-o", library)
    _run(
        *compiler, "-shared", scratch / f"{source.stem}.o", library, "-Wl,-rpath,$ORIGIN", "-o", made / "runtime.so",
    )  # fmt: skip


def _driver_functions(root: Path) -> set[str]:
    """Return the driver's functions that CuPy looks up by name."""
    text = (root / "cupy_backends/cuda/api/_driver_extern.pxi").read_text()
    return {f"cu{name.replace('{version}', '_v2')}" for name in re.findall(r"_L\.get\(f?'([\w{}]+)'\)", text)}


def _translate(root: Path, cuda: str) -> Path:
    """Translate CuPy's runtime.pyx to C++ with the settings of its wheels, and return the file."""
    major, minor = cuda.split(".")
    settings = {
        "CUPY_CUDA_VERSION": int(major) * 1000 + int(minor) * 10, "CUPY_HIP_VERSION": 0,
        "CUPY_USE_CUDA_PYTHON": False, "CUPY_CUFFT_STATIC": False, "CUPY_CYTHON_VERSION": versions()["Cython"],
    }  # fmt: skip
    script = (
        "from setuptools import Extension; from Cython.Build import cythonize; "
        "cythonize([Extension('cupy_backends.cuda.api.runtime', ['cupy_backends/cuda/api/runtime.pyx'], "
        f"language='c++')], language_level=3, compile_time_env={settings!r})"
    )
    _run(sys.executable, "-c", script, cwd=root)
    return root / "cupy_backends/cuda/api/runtime.cpp"


if __name__ == "__main__":
    try:
        print(build())
    except MissingError as error:
        sys.exit(str(error))
