"""Text by which a compiler checks that kernels' arguments lie where NumPy puts them (cupynorm/cuda/arguments.py)."""

from __future__ import annotations

from cupynorm.cuda.arguments import STRUCTS, leaves, struct_name
from cupynorm.cuda.source import Module

#: Offsets as constant expressions: g++'s built-in function, and that of NVRTC, which has no <cstddef>.
GCC, NVRTC = "__builtin_offsetof({struct}, {field})", "__INTADDR__(&((({struct}*)0)->{field}))"


def structs_of(module: Module) -> set[str]:
    """Return the names of the kernels of a module, without their variants."""
    return {name for name in STRUCTS if f" {struct_name(name)} " in module.source}


def kernel_of(name: str) -> str:
    """Return a kernel's name without its variant, the longest that fits; "" for the kernel of a test."""
    return max((known for known in STRUCTS if name == known or name.startswith(f"{known}_")), key=len, default="")


def asserted(module: Module, offset: str) -> str:
    """Return assertions of the offsets and sizes of all arguments that a module defines."""
    facts = []
    for name in sorted(structs_of(module)):
        struct, dtype = struct_name(name), STRUCTS[name]
        facts += [(offset.format(struct=struct, field=field), at) for field, at, _ in leaves(dtype)]
        facts.append((f"sizeof({struct})", dtype.itemsize))
    return "".join(f'static_assert({fact} == {number}, "{number}");\n' for fact, number in facts)
