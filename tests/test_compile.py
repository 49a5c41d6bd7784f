"""Kernels compiled by NVRTC itself, without a GPU, and held to their resources.

The core modules are compiled for sm_90 each time. Everything for every architecture takes most of an hour, so the full
tier deals: modules take turns at the architectures, each is compiled for one (clusters: of sm_90 and later). Of
variants that differ in vecs or in the cluster's size alone it takes the largest, which needs most registers; and
dtypes, vecs and epilogues take turns too (_code). The nightly tier compiles everything for every architecture: for
changes of kernels, of VARIANTS, of resident_threads.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import pytest
from helpers import tiers

from cupynorm.cuda import source
from cupynorm.cuda.plan import Step
from cupynorm.cuda.source import OPTIONS, CompileError, Module, all_modules, compile_error, core_modules
from cupynorm.cuda.variants import ITEMSIZE, VARIANTS, Variant, group_of, widest

pytestmark = [pytest.mark.nvrtc]

ARCHITECTURES = (70, 75, 80, 86, 89, 90, 100, 120)
# CuPy adds this after a module's own options.
CUPY_OPTIONS = ("-ftz=true",)
REGISTERS = 65536  # of a multiprocessor, on all of them
FIRST_WITH_CLUSTERS = 90  # older ones have no kernels of the groups "cluster" and "cluster_registers"
#: Bytes of local memory of a thread that kernels of a file, scope and residency may have; others have none. A few go to
#: the first-level cache: measured, they cost nothing, and to hold fewer threads does. What NVRTC 13.0 reports for
#: sm_90; for other architectures the same kernels may have ELSEWHERE, where up to 208 were seen (sm_100, NVRTC
#: 12.9), and others a few: which of them is compiled for which changes with the list of modules.
ELSEWHERE, FEW = 224, 16
SPILLED = {
    ("forward", "subwarp", "registers"): 8,
    ("forward", "block", "registers"): 8,
    ("forward", "cluster", "registers"): 36,
    ("forward", "grid", "registers"): 52,
    ("backward", "block", "registers"): 40,
    ("backward", "cluster", "registers"): 68,
    ("backward", "grid", "registers"): 68,
    ("split", "block", "registers"): 20,
}
EVERYTHING = tiers.asked == "nightly"


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


def _variant_of(module: Module, kernel: str) -> Variant | None:
    """The variant of a kernel; None of merges, and sums over N, which have a block to themselves."""
    return next((variant for variant in module.variants if kernel.endswith(f"_{variant.name}")), None)


def _allowed(module: Module, kernel: str, architecture: int) -> int:
    """Bytes of a thread's local memory that a kernel may have."""
    variant = _variant_of(module, kernel)
    known = (module.file, variant.scope, variant.residency) if variant else None
    if architecture != 90:
        return ELSEWHERE if known in SPILLED else FEW
    return SPILLED.get(known, 0)  # type: ignore[arg-type]


def _registers(module: Module, kernel: str) -> int:
    """The most registers of a thread with which as many blocks as are to stay on a multiprocessor do."""
    variant = _variant_of(module, kernel)
    most = (
        REGISTERS // (module.blocks(variant) * variant.threads) // 8 * 8 if variant else 255
    )  # they are given in eights
    return min(most, 255)


def _check_resources(module: Module, architecture: int, whole: bool = True) -> int:
    """Compile a module to machine code; no more local memory than SPILLED allows, no more registers than its threads
    may have.

    Not whole: of variants that differ in vecs or in the cluster's size alone, the largest.
    """
    options = (*OPTIONS, *CUPY_OPTIONS, f"-arch=sm_{architecture}", "--ptxas-options=-v")
    text, kernels = module.source, set(module.kernels)
    if not whole:
        largest = {(variant.scope, variant.residency, variant.threads): variant for variant in module.variants}.values()
        for variant in set(module.variants).difference(largest):
            text = re.sub(rf" VARIANT\({variant.name}, [^)]*\)", "", text, count=1)
            kernels = {name for name in kernels if not name.endswith(f"_{variant.name}")}
    done = _compile(text, options)
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
    return len(found)


@pytest.mark.parametrize("module", core_modules(), ids=lambda m: f"{m.file}-{m.dtype}-{m.group or 'core'}")
def test_core_modules(module: Module) -> None:
    assert _supported(90)
    assert _check_resources(module, 90) == len(module.kernels)


def _code(module: Module) -> Module:
    """One for all modules that take turns: those that differ in dtype, in the size of their vecs, in which epilogue."""
    return replace(module, dtype="float16", vec_size=min(module.vec_size, 2), epilogue=0)


def _dealt(architecture: int) -> list[Module]:
    """The modules that are compiled for an architecture."""
    same: dict[Module, list[Module]] = {}
    for module in all_modules():
        same.setdefault(_code(module), []).append(module)
    known = [a for a in ARCHITECTURES if _supported(a)]
    mine = []
    for i, (code, modules) in enumerate(same.items()):
        possible = [a for a in known if a >= FIRST_WITH_CLUSTERS or not code.group.startswith("cluster")]
        if EVERYTHING:
            mine += modules if architecture in possible else []
        elif architecture == possible[(i + i // len(possible)) % len(possible)]:  # the list has periods: not in step
            mine.append(modules[i % len(modules)])
    return mine


@pytest.mark.full
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_module(architecture: int) -> None:
    if not _supported(architecture):
        pytest.skip(f"this NVRTC does not know sm_{architecture}")
    modules = _dealt(architecture)
    _nvrtc()  # loaded by one thread, before others compile: else some find it without its builtins (status 7)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checks = [pool.submit(_check_resources, module, architecture, EVERYTHING) for module in modules]
    faults = [str(check.exception()) for check in checks if check.exception()]
    if faults:
        raise AssertionError("\n".join(faults))
    print(f"sm_{architecture}: {sum(check.result() for check in checks)} kernels of {len(modules)} modules")


def test_the_deal_leaves_no_code_out() -> None:
    dealt = [module for architecture in ARCHITECTURES if _supported(architecture) for module in _dealt(architecture)]
    assert {_code(module) for module in dealt} == {_code(module) for module in all_modules()}
    for fused in (False, True):
        assert {module.dtype for module in dealt if (module.epilogue > 0) == fused} == set(ITEMSIZE)


def _wide_modules() -> list[Module]:
    """One module of each group with and without an epilogue, besides the core."""
    files = [(file, epilogue) for file in _FILES for epilogue in (0, 1)] + [("double_backward", 0)]
    modules = [
        Module(file, "bfloat16", _width(group), "channels_first", group, epilogue)
        for file, epilogue in files
        for group in dict.fromkeys(group_of(variant, file) for variant in VARIANTS[file])
    ]
    wide = [m for m in core_modules() if m.file != "channels"]
    return wide + [m for m in modules if m.variants and m not in wide]


_FILES = ("forward", "backward")


def _width(group: str) -> int:
    return 1 if group == "subwarp" else widest(ITEMSIZE["bfloat16"], "channels_first")


@lru_cache(maxsize=1)
def _planned() -> dict[Module, set[Step]]:
    """What recorded plans launch, under one module of each file and its variants, with an epilogue and without: one of
    _wide_modules if it has them.
    """
    wide = _wide_modules()
    modules = {(m.file, m.variants, m.epilogue > 0): m for m in wide}
    steps: dict[Module, set[Step]] = {module: set() for module in wide}
    for recorded in json.loads(Path(__file__).with_name("plans.json").read_text()):
        plan = recorded["planned"]
        for step, named in zip(plan["plan"]["steps"], plan["modules"], strict=True):
            module = Module(**named)
            one = modules.setdefault((module.file, module.variants, module.epilogue > 0), module)
            steps.setdefault(one, set()).add(Step(**step | {"grid": tuple(step["grid"])}))
    return steps


@pytest.mark.parametrize("module", _planned(), ids=lambda m: f"{m.file}-{m.dtype}-{m.group or 'core'}-{m.epilogue}")
def test_launch_bounds_and_accesses(module: Module) -> None:
    ptx = _compile(module.source, (*OPTIONS, *CUPY_OPTIONS, "-arch=compute_90"), want_ptx=True).ptx
    entries = ptx.split(".visible .entry ")[1:]
    assert len(entries) == len(module.kernels)
    _check_launch_bounds(module, entries)
    if module in _wide_modules():
        _check_accesses(module, entries)


def _check_launch_bounds(module: Module, entries: list[str]) -> None:
    """Kernels are compiled for as many threads as plans launch, for the cluster, and for the blocks that are to stay on
    a multiprocessor. The emulator runs any number; a GPU refuses more threads than were compiled for.
    """
    kernels = {entry.split("(")[0]: entry.split("{")[0] for entry in entries}
    for step in _planned()[module]:
        said = dict(re.findall(r"\.(maxntid|minnctapersm|reqnctapercluster) (\d+)", kernels[step.name]))
        variant = _variant_of(module, step.name)
        blocks = module.blocks(variant) if variant else 1
        assert said.pop("reqnctapercluster", "1") == str(step.cluster), step.name
        assert said == {"maxntid": str(step.threads), "minnctapersm": str(blocks)}, step.name


def _check_accesses(module: Module, entries: list[str]) -> None:
    """Vecs move in one access each: 16 bytes channels-first, and only tail elements and numbers of planes by
    themselves."""
    forward, double, fused = module.file == "forward", module.file == "double_backward", bool(module.epilogue)
    inputs = (1 if forward else 3 if double else 2) + fused  # x, dy, ddx, residual
    outputs = 1 + double + (fused and not forward)  # y or dx, ddy, dresidual
    for entry in entries:
        name = entry.split("(")[0]
        variant = next(r for r in module.variants if name.endswith(r.name))
        loads = len(re.findall(r"ld\.global\.v4\.(?:b32|u32|f32)", entry))
        stores = len(re.findall(r"st\.global\.v4\.b32", entry))
        if variant.residency == "registers":
            vecs = variant.vecs_per_thread  # of a group as well: all that a block has registers for
            if variant.scope == "subwarp":  # as many wide vecs as a warp's run may hold whole, dealt to its lanes
                vecs = variant.vecs_per_thread // widest(ITEMSIZE[module.dtype], "channels_first")
            assert loads == inputs * vecs, name
            assert stores == outputs * vecs, name
        else:
            assert loads >= inputs, name
            assert stores >= outputs, name
        # Narrow ones: tail elements, what a plane has of its own (forward 4 statistics, backward 2 sums of either
        # dtype, at most), and what a block of a grid puts; not a vec taken apart.
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


@pytest.mark.parametrize("file", ["forward", "backward"])
def test_clusters_are_fenced_once(file: str) -> None:
    """By the warp that puts. An arrival that releases would be a fence of the whole GPU, by each warp."""
    module = Module(file, "float32", 4, "channels_first", "cluster_registers")
    ptx = _compile(module.source, (*OPTIONS, *CUPY_OPTIONS, "-arch=compute_90"), want_ptx=True).ptx
    entries = ptx.split(".visible .entry ")[1:]
    assert len(entries) == len(module.kernels)
    for entry in entries:
        assert len(re.findall(r"\bfence\.acq_rel\.cluster\b", entry)) == 1
        arrivals = re.findall(r"\bbarrier\.cluster\.arrive\S*", entry)
        assert len(arrivals) == 2
        assert all(".relaxed" in arrival for arrival in arrivals)
