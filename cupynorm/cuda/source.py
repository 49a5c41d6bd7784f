"""Find the kernel sources, and assemble the text of each module.

A module is one .cu file for one dtype, access width, layout, alignment and epilogue. It holds the kernels of one group
of the file's variants (subwarps, warps, blocks, clusters, or the grid), or the kernels that exist once.
Headers are inlined, since CuPy's disk cache keys on the text it is given and would miss a change in a header; #line
keeps the compiler's messages pointing at the real file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from pathlib import Path

from .._types import EPS_MODES
from . import ops
from .arguments import FLAGS, struct_name
from .plan import Plan, Step
from .variants import (
    EPILOGUES,
    FORCED,
    INPUT_ITEMSIZE,
    ITEMSIZE,
    KERNELS,
    MASKED,
    MIXED_KERNELS,
    PLAIN,
    PLAIN_KERNELS,
    SINGLE,
    VARIANTS,
    Kind,
    Variant,
    exists,
    group_of,
    resident_threads,
    widest,
)


class CompileError(RuntimeError):
    """A kernel did not compile. The message has the file, the line and what to do."""


def compile_error(module: Module, log: str) -> CompileError:
    """Return the error for a module that does not compile: the first error's file and line, the log and a hint."""
    first = re.search(r"^(\S+)\((\d+)\): (?:catastrophic )?error.*$", log, re.M)
    where = f"{first[1]}, line {first[2]}" if first else "the compiler's options"
    return CompileError(
        f"{module.file}.cu ({module.dtype}, {module.kind}) does not compile: {where}\n"
        f"{log.strip()}\n"
        f"The sources are in {kernel_folder()}. If they are unchanged, the CUDA toolkit's NVRTC is probably too old "
        "for this GPU or incomplete: `CUPYNORM_EAGER=0 python -m cupynorm info` shows NVRTC and the GPU, and "
        "`pip install 'cupynorm[cuda12]'` (or cuda13) installs a matching one. CUPYNORM_EAGER=0 defers compiling until "
        "a kernel is used."
    )


#: Compiler options of every module (NVRTC's and, for the emulator, g++'s).
OPTIONS = ("-std=c++17",)


@dataclass(frozen=True)
class Module:
    """A compile unit: the variants of one group of a file."""

    file: str  # a key of variants.KERNELS or variants.SINGLE
    dtype: str
    vec_size: int
    kind: Kind
    group: str = ""
    epilogue: int = 0
    misaligned: bool = False
    input: str = ""  # the dtype of x, if it is another
    masked: bool = False

    @classmethod
    def of(cls, step: Step, plan: Plan) -> Module:
        """Return the module that holds the kernel of a plan's step."""
        if step.module in SINGLE:
            return single(step.module, plan.dtype, plan.input)
        epilogue = 0 if step.plain else plan.epilogue
        if step.group == "subwarp":  # staged planes are partitioned by elements
            module = cls(step.module, plan.dtype, 1, plan.kind, step.group, epilogue, masked=plan.masked)
        else:
            facts = step.module, plan.dtype, plan.vec_size, plan.kind, step.group, epilogue, plan.misaligned
            module = cls(*facts, plan.input, plan.masked)
        forced = FORCED.get(step.module)
        return ForcedModule(**vars(module), only=forced[0]) if forced else module

    @property
    def variants(self) -> tuple[Variant, ...]:
        facts = self.file, self.math_dtype, self.kind, self.epilogue, self.misaligned, self.input, self.masked
        known = (variant for variant in VARIANTS.get(self.file, ()) if group_of(variant, self.file) == self.group)
        return tuple(variant for variant in known if exists(variant, *facts))

    @property
    def math_dtype(self) -> str:
        """The dtype by which resources are chosen: float64 if this is the dtype of x alone, else that of results."""
        return "float64" if self.input == "float64" else self.dtype

    @property
    def constants(self) -> str:
        """The text with the module's constants. They are no compiler options: CuPy compiles a dummy for each new tuple
        of options."""
        numbers = {
            "VEC_SIZE": self.vec_size,
            "CHANNELS_LAST": int(self.kind == "channels_last"),
            "MISALIGNED": int(self.misaligned),
            "MASKED": int(self.masked),
            "EPILOGUE": self.epilogue,
            "READ_AHEAD": self._read_ahead,
            **{f"EPS_{mode.upper()}": number for number, mode in enumerate(EPS_MODES)},
            **FLAGS,
            **ops.constants(),
        }
        lines = [f"[[maybe_unused]] constexpr int {name} = {number};\n" for name, number in numbers.items()]
        return "".join([f"#define STORAGE {self.dtype}\n#define INPUT {self.input or self.dtype}\n", *lines])

    @property
    def _read_ahead(self) -> int:
        """The vecs that a thread reads of each array before it uses the first, if its tile stays in shared memory."""
        if self.file == "double_backward":
            return 1 if any(variant.grouped for variant in self.variants) and self.kind == "channels_last" else 2
        return 2 if self.epilogue or self.misaligned else 4  # these need registers for other things

    def _kernel(self, prefix: str, variant: Variant) -> str:
        """Return the text of one variant of a kernel."""
        bounds = f"KERNEL({variant.threads}, {self.blocks(variant)})"
        cluster = f" CLUSTER_OF({variant.cluster})" if variant.scope == "cluster" else ""
        template = (
            f"{prefix}<{variant.scope.upper()}, {variant.residency.upper()}, {variant.threads},"
            f" {variant.vecs_per_thread or 1}>"
        )
        parameter = f"{struct_name(prefix)} call"
        return f"{bounds}{cluster} {prefix}_{variant.name}({parameter}) {{ {template}(call); }}\n"

    def blocks(self, variant: Variant) -> int:
        """Return the number of blocks of a variant that must fit on a multiprocessor."""
        facts = self.file, self.math_dtype, self.kind, self.epilogue, self.misaligned, self.masked
        return max(1, resident_threads(variant, *facts) // variant.threads)

    @property
    def _prefixes(self) -> tuple[str, ...]:
        """The kernels of this module that have variants."""
        kernels = KERNELS.get(self.file, ())
        if self.input:
            kernels = tuple(kernel for kernel in kernels if kernel in MIXED_KERNELS)
        return tuple(kernel for kernel in kernels if not (self.epilogue and kernel in PLAIN_KERNELS))

    @property
    def source(self) -> str:
        kernels = "".join(self._kernel(prefix, variant) for prefix in self._prefixes for variant in self.variants)
        if any(variant.scope == "cluster" for variant in self.variants):  # older GPUs have none: the module is empty
            kernels = f"#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900\n{kernels}#endif\n"
        return f'{self.constants}{inlined(f"{self.file}.cu")}#line 1 "the variants"\n{kernels}'

    @property
    def kernels(self) -> tuple[str, ...]:
        """The names of the kernels in this module."""
        variants = tuple(f"{prefix}_{variant.name}" for prefix in self._prefixes for variant in self.variants)
        return variants + SINGLE.get(self.file, ())


@dataclass(frozen=True)
class ForcedModule(Module):
    """A module of one variant, which need not be in VARIANTS (variants.FORCED)."""

    only: Variant = field(kw_only=True)

    @property
    def variants(self) -> tuple[Variant, ...]:
        return (self.only,)


def single(file: str, dtype: str, input: str = "") -> Module:
    """Return a module of kernels that exist once. They do not read x: only the precision of its dtype matters."""
    return Module(file, dtype, 1, "channels_first", input="float64" if input == "float64" != dtype else "")


def all_modules(epilogues: Iterable[int] = range(max(EPILOGUES.values()) + 1)) -> list[Module]:
    """Return every module that calls may compile if all arrays have one dtype; `mixed_modules` are the others."""
    modules = [single(file, dtype) for file, dtype in product(SINGLE, ITEMSIZE)]
    for epilogue, (file, variants), dtype in product(epilogues, VARIANTS.items(), ITEMSIZE):
        if epilogue and file in PLAIN:
            continue
        for group in dict.fromkeys(group_of(variant, file) for variant in variants):
            if group == "subwarp":
                modules.append(Module(file, dtype, 1, "channels_first", group, epilogue))
                continue
            first, last = widest(ITEMSIZE[dtype], "channels_first"), widest(ITEMSIZE[dtype], "channels_last")
            modules += [
                Module(file, dtype, first, "channels_first", group, epilogue, misaligned)
                for misaligned in (False, True)
            ]
            modules += [Module(file, dtype, v, "channels_last", group, epilogue) for v in (last, 1)]
    return [module for module in modules if module.kernels]


def masked_modules(dtype: str, epilogues: Iterable[int] = (0,)) -> list[Module]:
    """Return every module that calls with a mask may compile if all arrays have one dtype."""
    modules = (m for m in all_modules(epilogues) if m.dtype == dtype)
    return [replace(m, masked=True) for m in modules if m.file in MASKED]


def mixed_modules(input: str, dtype: str, epilogues: Iterable[int] = (0,)) -> list[Module]:
    """Return every module that calls may compile if x has this dtype, and the other arrays another."""
    modules = [single(file, dtype, "float64") for file in SINGLE] if input == "float64" else []
    for epilogue, file in product(epilogues, ("forward", "split", "parts", "frozen")):
        for group in dict.fromkeys(group_of(variant, file) for variant in VARIANTS[file]):
            for kind, v in mixed_accesses(input, dtype) if group != "subwarp" else ():
                modules.append(Module(file, dtype, v, kind, group, epilogue, input=input))
    return [module for module in modules if module.kernels]


def mixed_accesses(input: str, dtype: str) -> list[tuple[Kind, int]]:
    """Return the kinds of kernels and the numbers of elements that a thread reads at once, if x has another dtype."""
    itemsize = max(INPUT_ITEMSIZE[input], ITEMSIZE[dtype])
    kinds: tuple[Kind, Kind] = ("channels_first", "channels_last")
    return [(kind, v) for kind in kinds for v in (widest(itemsize, kind), 1)]


def core_modules() -> list[Module]:
    """Return the modules compiled at import: forward and backward for float32, float16 and bfloat16, channels-first, by
    warps and blocks."""
    dtypes = ("float32", "float16", "bfloat16")
    return [
        Module(file, dtype, widest(ITEMSIZE[dtype], "channels_first"), "channels_first", group)
        for file, dtype, group in product(("forward", "backward"), dtypes, ("", "warp"))
    ] + [Module("channels", dtype, 1, "channels_first") for dtype in dtypes]


def kernel_folder() -> Path:
    """Return the folder of the CUDA sources: in the installed package, else beside the package (a checkout)."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "kernels", package.parent / "kernels"):
        if (folder / "types.cuh").is_file():
            return folder
    raise FileNotFoundError(
        f"cupynorm's CUDA sources are in neither {package / 'kernels'} nor {package.parent / 'kernels'}: "
        "install cupynorm again, or run it from a complete checkout"
    )


@lru_cache(maxsize=None)
def inlined(name: str) -> str:
    """Return the text of a source file with its headers inlined, each once."""
    folder = kernel_folder()
    seen: set[str] = set()

    def read(file: str) -> str:
        seen.add(file)
        lines = [f'#line 1 "kernels/{file}"']
        for number, line in enumerate((folder / file).read_text(encoding="utf-8").splitlines(), 1):
            header = re.match(r'#include "(\w+\.cuh)"', line)
            if not header:
                lines.append(line)
            elif header[1] not in seen:
                lines += [read(header[1]), f'#line {number + 1} "kernels/{file}"']
            else:
                lines.append("")
        return "\n".join(lines)

    return read(name) + "\n"
