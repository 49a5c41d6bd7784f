"""Compile the kernels with NVRTC, without a GPU, and check the resources they need.

The core modules are always compiled, for sm_90. Compiling everything for every architecture takes most of an hour, so
the full tier takes a part: each module for one of the architectures in turn (clusters: sm_90 and later), only the
largest, which needs most registers, of variants that differ in vecs or in the cluster's size alone, and dtypes, vecs
and alignments in turn (_code). Its epilogues are none and relu; silu and gelu, which take longest, are compiled in a
few modules. The nightly tier compiles everything for every architecture; run it after changes of kernels, VARIANTS or
resident_threads.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from helpers import builds, offsets, tiers
from helpers.bounds import bounds_of

from cupynorm.cuda import source
from cupynorm.cuda.arguments import STRUCTS
from cupynorm.cuda.source import (
    OPTIONS,
    CompileError,
    Module,
    all_modules,
    compile_error,
    core_modules,
    masked_modules,
    mixed_modules,
)
from cupynorm.cuda.variants import EPILOGUES, ITEMSIZE, SINGLE, VARIANTS, Variant, group_of, widest

pytestmark = [pytest.mark.nvrtc]

ARCHITECTURES = (70, 75, 80, 86, 89, 90, 100, 120)
# CuPy adds this after a module's own options.
CUPY_OPTIONS = ("-ftz=true",)
REGISTERS = 65536  # of a multiprocessor, on all of them
FIRST_WITH_CLUSTERS = 90  # older ones have no kernels of the groups "cluster" and "cluster_registers"
#: Bytes of local memory per thread that the kernels of a file, scope and residency may have on sm_90, as NVRTC 13.0
#: reports them; other kernels may have none. A few bytes stay in the first-level cache: measurements show that they
#: cost nothing, while fewer resident threads do. On other architectures the same kernels may have ELSEWHERE bytes (up
#: to 208 were seen: sm_100, NVRTC 12.9) and the others FEW: a module's architecture changes with the list of modules.
ELSEWHERE, FEW = 224, 16
SPILLED = {
    ("forward", "subwarp", "registers"): 8,
    ("forward", "block", "registers"): 24,
    ("forward", "cluster", "registers"): 36,
    ("forward", "grid", "registers"): 52,
    ("backward", "block", "registers"): 40,
    ("backward", "cluster", "registers"): 68,
    ("backward", "grid", "registers"): 68,
    ("split", "block", "registers"): 20,
}
#: With a mask these may have some, too: float64 in shared memory, and bytes in.
SPILLED_MASKED = {("forward", "grid", "shared"): 40, ("forward", "block", "shared"): 8}
EVERYTHING = tiers.asked == "nightly"
RELU, SMOOTH = EPILOGUES["relu"], ("silu", "gelu")


@lru_cache(maxsize=1)
def _nvrtc() -> ctypes.CDLL:
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        return ctypes.CDLL(load_nvidia_dynamic_lib("nvrtc").abs_path)
    except Exception as error:  # missing in any way
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


def _variant_of(module: Module, kernel: str) -> Variant | None:
    """Return the variant of a kernel; None for merges and sums over N, which have none."""
    return next((variant for variant in module.variants if kernel.endswith(f"_{variant.name}")), None)


def _allowed(module: Module, kernel: str, architecture: int) -> int:
    """Return the bytes of local memory per thread that a kernel may have."""
    variant = _variant_of(module, kernel)
    known = (module.file, variant.scope, variant.residency) if variant else None
    if architecture != 90:
        return ELSEWHERE if known in SPILLED else FEW
    return (SPILLED | SPILLED_MASKED if module.masked else SPILLED).get(known, 0)  # type: ignore[arg-type]


def _registers(module: Module, kernel: str) -> int:
    """Return the most registers per thread with which the wanted number of blocks fits on a multiprocessor."""
    variant = _variant_of(module, kernel)
    # Registers are allocated in eights.
    most = REGISTERS // (module.blocks(variant) * variant.threads) // 8 * 8 if variant else 255
    return min(most, 255)


def _check_resources(module: Module, architecture: int, whole: bool = True) -> Compiled:
    """Compile a module to machine code, and check that local memory and registers are within their limits.

    whole=False: compile only the largest of variants that differ in vecs or in the cluster's size alone.
    """
    options = (*OPTIONS, *CUPY_OPTIONS, f"-arch=sm_{architecture}", "--ptxas-options=-v")
    text, kernels = module.source, set(module.kernels)
    if not whole:
        largest = {(variant.scope, variant.residency, variant.threads): variant for variant in module.variants}.values()
        for variant in set(module.variants).difference(largest):
            text = re.sub(rf"^KERNEL.* \w+_{variant.name}\(.*\n", "", text, flags=re.M)
            kernels = {name for name in kernels if not name.endswith(f"_{variant.name}")}
    done = _compile(text, options, want_ptx=True)
    assert done.status == 0, f"{module} for sm_{architecture}:\n{done.log}"
    assert not re.search(r"kernels/.*warning", done.log), done.log
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        done.log,
        re.S,
    )
    assert {name for name, *_ in found} == kernels
    faults = [
        f"{name} of {module} for sm_{architecture}: {registers} of {_registers(module, name)} registers, "
        f"local memory {memory}, allowed {_allowed(module, name, architecture)}"
        for name, memory, _, _, registers in found  # memory: the stack frame
        if int(memory) > _allowed(module, name, architecture) or int(registers) > _registers(module, name)
    ]
    if faults:
        raise AssertionError("\n".join(faults))
    return done


def _named(module: Module) -> str:
    return f"{module.file}-{module.dtype}-{module.group or 'core'}-{module.epilogue}"


@pytest.mark.parametrize("module", core_modules(), ids=_named)
def test_core_modules(module: Module) -> None:
    """Resources, launch bounds and accesses of the modules compiled at import."""
    assert _supported(90)
    done = _check_resources(module, 90)
    _check_launch_bounds(module, done.ptx)
    if module.file != "channels":
        _check_accesses(module, done.ptx)


def _code(module: Module) -> Module:
    """Return one key for all modules that take turns: they differ only in dtype, accesses or the kind of epilogue."""
    return replace(module, dtype="float16", vec_size=1, misaligned=False, epilogue=0)


def _dealt(architecture: int) -> list[Module]:
    """Return the modules that are compiled for an architecture."""
    same: dict[Module, list[Module]] = {}
    for module in all_modules() if EVERYTHING else all_modules([0, RELU]):
        same.setdefault(_code(module), []).append(module)
    known = [a for a in ARCHITECTURES if _supported(a)]
    mine = []
    for i, (code, modules) in enumerate(same.items()):
        possible = [a for a in known if a >= FIRST_WITH_CLUSTERS or not code.group.startswith("cluster")]
        if EVERYTHING:
            mine += modules if architecture in possible else []
        elif architecture == possible[(i + i // len(possible)) % len(possible)]:  # out of step with the list's periods
            mine.append(modules[i % len(modules)])
    return mine + ([] if EVERYTHING or architecture != 90 else _smooth_modules())


def _smooth_modules() -> list[Module]:
    """Return the modules with silu and gelu that the full tier compiles, for sm_90: forward and backward by blocks."""
    turns = zip(("forward", "backward"), SMOOTH, strict=True)
    return [Module(file, "float32", 4, "channels_first", "", EPILOGUES[name]) for file, name in turns]


def _mixed() -> list[Module]:
    """Return modules for x of another dtype: in turn of the pairs, without and with an epilogue in turn; in the nightly
    tier all modules of all pairs."""
    if EVERYTHING:
        return [module for pair in builds.PAIRS for module in mixed_modules(*pair, epilogues=range(4))]
    return _in_turn(m for i, pair in enumerate(builds.PAIRS) for m in mixed_modules(*pair, epilogues=(i % 2,)))


def _in_turn(modules: Iterable[Module]) -> list[Module]:
    """Return a module of each group of kernels, with the widest accesses, of the dtypes, epilogue and layout that the
    groups before it have least."""
    same: dict[tuple[Any, ...], list[Module]] = {}
    counts: Counter[tuple[str, Any]] = Counter()

    def traits(module: Module) -> list[tuple[str, Any]]:
        return [(name, getattr(module, name)) for name in ("input", "dtype", "epilogue", "kind")]

    for module in modules:
        if not module.misaligned and (module.vec_size > 1 or module.group == "subwarp" or module.file not in VARIANTS):
            same.setdefault((module.file, module.group), []).append(module)
    chosen = []
    for each in same.values():
        chosen.append(min(each, key=lambda module: sum(counts[trait] for trait in traits(module))))
        counts.update(traits(chosen[-1]))
    return chosen


def _masked() -> list[Module]:
    """Return modules with a mask: in turn of the dtypes and of the epilogues; in the nightly tier all."""
    if EVERYTHING:
        return [module for dtype in ITEMSIZE for module in masked_modules(dtype, range(4))]
    return _in_turn(m for dtype, codes in builds.MASKED.items() for m in masked_modules(dtype, codes))


def _check_all(modules: list[Module], architecture: int, whole: bool = True) -> None:
    """Check the resources of modules, in several threads, and report all faults."""
    _nvrtc()  # load it in one thread before others compile, or some find it without its builtins (status 7)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checks = [pool.submit(_check_resources, module, architecture, whole) for module in modules]
    faults = [str(check.exception()) for check in checks if check.exception()]
    if faults:
        raise AssertionError("\n".join(faults))


@pytest.mark.full
def test_modules_with_a_mask() -> None:
    _check_all(_masked(), 90, EVERYTHING)


@pytest.mark.full
def test_modules_for_x_of_another_dtype() -> None:
    _check_all(_mixed(), 90, EVERYTHING)


def test_integers_are_read_in_vecs() -> None:
    """Of 4 uint16: 8 bytes at once, and 16 of the float32 that they become."""
    module = Module("forward", "float32", 4, "channels_first", "warp", input="uint16")
    done = _check_resources(module, 90)
    for entry in _entries(module, done.ptx):
        moved = re.findall(r"(ld|st)\.global\.(?:v(\d)\.)?[a-z](\d+)", entry)
        bits = {(kind, int(count or 1) * int(size)) for kind, count, size in moved}
        assert {("ld", 64), ("st", 128)} <= bits, bits


@pytest.mark.full
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_module(architecture: int) -> None:
    if not _supported(architecture):
        pytest.skip(f"this NVRTC does not know sm_{architecture}")
    modules = _dealt(architecture)
    _check_all(modules, architecture, EVERYTHING)
    print(f"sm_{architecture}: {len(modules)} modules")


def test_every_kind_of_module_is_compiled() -> None:
    dealt = [module for architecture in ARCHITECTURES if _supported(architecture) for module in _dealt(architecture)]
    assert {_code(module) for module in dealt} == {_code(module) for module in all_modules()}
    assert {module.epilogue for module in dealt} == {0, *EPILOGUES.values()}
    for fused in (False, True):
        assert {module.dtype for module in dealt if (module.epilogue > 0) == fused} == set(ITEMSIZE)


def _wide_modules() -> list[Module]:
    """Return bfloat16 modules of each group, apart from the core modules: with and without an epilogue in turn."""
    files = {"forward": (0, RELU), "backward": (RELU, 0), "double_backward": (0,)}
    modules = [
        Module(file, "bfloat16", _width(group), "channels_first", group, epilogue)
        for file, epilogues in files.items()
        for i, group in enumerate(dict.fromkeys(group_of(variant, file) for variant in VARIANTS[file]))
        for epilogue in (epilogues if EVERYTHING else [epilogues[i % len(epilogues)]])
    ]
    return [m for m in modules if m.variants and m not in core_modules()]


def _width(group: str) -> int:
    return 1 if group == "subwarp" else widest(ITEMSIZE["bfloat16"], "channels_first")


@pytest.mark.parametrize("module", _wide_modules(), ids=_named)
def test_launch_bounds_and_accesses(module: Module) -> None:
    ptx = _compile(module.source, (*OPTIONS, *CUPY_OPTIONS, "-arch=compute_90"), want_ptx=True).ptx
    _check_launch_bounds(module, ptx)
    _check_accesses(module, ptx)


def _entries(module: Module, ptx: str) -> list[str]:
    entries = ptx.split(".visible .entry ")[1:]
    assert {entry.split("(")[0] for entry in entries} == set(module.kernels)
    return entries


def _check_launch_bounds(module: Module, ptx: str) -> None:
    """Check that each kernel is compiled for the threads, cluster and resident blocks that its text asks for. Those of
    planned launches are the same: test_plan.test_kernels_are_compiled_for_their_launches."""
    bounds = bounds_of(module)
    for entry in _entries(module, ptx):
        said = re.findall(r"\.(maxntid|minnctapersm|reqnctapercluster) (\d+)", entry.split("{")[0])
        threads, blocks, cluster = bounds[entry.split("(")[0]]
        wanted = {"maxntid": threads, "minnctapersm": blocks} | ({"reqnctapercluster": cluster} if cluster > 1 else {})
        assert {name: int(number) for name, number in said} == wanted, entry.split("(")[0]


def _check_accesses(module: Module, ptx: str) -> None:
    """Check that vecs move in one access each, 16 bytes channels-first; only tail elements and numbers of planes move
    one by one."""
    forward, double, fused = module.file == "forward", module.file == "double_backward", bool(module.epilogue)
    inputs = (1 if forward else 3 if double else 2) + fused  # x, dy, ddx, residual
    for entry in _entries(module, ptx):
        name = entry.split("(")[0]
        variant = next(r for r in module.variants if name.endswith(r.name))
        outputs = 1 + double + (fused and not forward)  # y or dx, ddy, dresidual
        if (double or (forward and fused)) and variant.scope != "subwarp":
            outputs *= 2  # the code that writes exists twice: with ddx or a residual, and without (with_constant)
        loads = len(re.findall(r"ld\.global\.v4\.(?:b32|u32|f32)", entry))
        stores = len(re.findall(r"st\.global\.v4\.b32", entry))
        if variant.residency == "registers":
            vecs = variant.vecs_per_thread  # in groups of blocks, too: as many as a block has registers for
            if variant.scope == "subwarp":  # as many vecs of 16 bytes as each lane moves of a warp's run
                vecs = variant.vecs_per_thread // widest(ITEMSIZE[module.dtype], "channels_first")
            assert loads == inputs * vecs, name
            assert stores == outputs * vecs, name
        else:
            assert loads >= inputs, name
            assert stores >= outputs, name
        # Narrow stores are tail elements, numbers of planes (at most 4 statistics forward, 2 sums of either dtype
        # backward), and partials of a grid's block; vecs are not split.
        numbers = 4 if forward else 2 if module.dtype == "float32" else 4
        partials = (4 if forward else 9 if double else 3) if variant.scope == "grid" else 0
        narrow = len(re.findall(r"st\.global\.(?:u16|b16|f32|u32|b32)\b", entry))
        assert narrow <= outputs + numbers + partials, name
        assert "st.global.v2" not in entry, name
        assert "ld.global.v2" not in entry, name


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


@pytest.mark.parametrize("header", sorted(path.name for path in source.kernel_folder().glob("*.cuh")))
def test_headers_are_self_contained(header: str) -> None:
    module = Module("forward", "float32", 4, "channels_first")
    done = _compile(module.constants + source.inlined(header), (*OPTIONS, *CUPY_OPTIONS, "-arch=compute_90"))
    assert done.status == 0, done.log
    text = (source.kernel_folder() / header).read_text()
    guard = f"CUPYNORM_{header.removesuffix('.cuh').upper()}"
    directives = re.findall(r"^#.*$", text, re.M)
    assert directives[:2] == [f"#ifndef {guard}", f"#define {guard}"]
    assert text.endswith("\n#endif\n")


@pytest.mark.parametrize("file", [*VARIANTS, *SINGLE])
def test_arguments_lie_where_numpy_puts_them(monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """NVRTC checks it; a wrong order of fields is found. The emulator's builds check the same with g++."""
    module = next(module for module in all_modules([0]) if module.file == file)
    options = (*OPTIONS, *CUPY_OPTIONS, "-arch=compute_90")
    kernels = offsets.structs_of(module)
    assert all(offsets.kernel_of(name) in kernels for name in module.kernels)
    structs = re.sub(r"^KERNEL.*\}\n", "", module.source, flags=re.M)  # without variants, which take seconds to compile
    done = _compile(structs + offsets.asserted(module, offsets.NVRTC), options)
    assert done.status == 0, done.log
    first = min(kernels)
    names = STRUCTS[first].names
    assert names is not None
    monkeypatch.setitem(STRUCTS, first, np.dtype([(name, STRUCTS[first][name]) for name in names[::-1]], align=True))
    assert "static assertion failed" in _compile(structs + offsets.asserted(module, offsets.NVRTC), options).log


@pytest.mark.parametrize("file", ["forward", "backward"])
def test_clusters_are_fenced_once(file: str) -> None:
    """Only the warp that puts has a fence. An arrival with release semantics would be a GPU-wide fence in each warp."""
    module = Module(file, "float32", 4, "channels_first", "cluster_registers")
    ptx = _compile(module.source, (*OPTIONS, *CUPY_OPTIONS, "-arch=compute_90"), want_ptx=True).ptx
    entries = ptx.split(".visible .entry ")[1:]
    assert len(entries) == len(module.kernels)
    for entry in entries:
        assert len(re.findall(r"\bfence\.acq_rel\.cluster\b", entry)) == 1
        arrivals = re.findall(r"\bbarrier\.cluster\.arrive\S*", entry)
        assert len(arrivals) == 2
        assert all(".relaxed" in arrival for arrival in arrivals)
