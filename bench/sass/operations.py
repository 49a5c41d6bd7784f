"""What each instruction computes: a function of the machine, the instruction and the threads that execute it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .operands import F32, F64, I32, I64, PT, RZ, U32, U64, URZ, Operand, address, parsed

if TYPE_CHECKING:
    from .machine import Block

Mask = np.ndarray


class Decoded:
    """An instruction with its operands parsed."""

    def __init__(self, instruction: Any):
        self.instruction = instruction
        self.name, self.modifiers = instruction.operation, set(instruction.modifiers)
        self.order = instruction.modifiers
        self.texts = instruction.operands
        self.guard = parsed(instruction.guard) if instruction.guard else None
        self.operands = [_operand(text) for text in self.texts]
        self.function = OPERATIONS.get(self.name)

    def split(self) -> tuple[list[Operand], Operand, list[Operand]]:
        """Return predicates that are written, the destination and the sources: D, [P, [P,]] sources."""
        first, *rest = self.operands
        written = []
        while rest and rest[0].is_predicate:
            written.append(rest.pop(0))
        return written, first, rest


def _operand(text: str) -> Any:
    if "[" in text and not text.startswith(("c[", "-c[", "~c[", "|c[", "-|c[")):
        return address(text)
    if text.startswith("`(") or text.startswith(("SR_", "SRZ", "PR", "B0", "B1", "B2", "B3", "B4", "B5", "B6", "B7")):
        return text
    return parsed(text)


def _put(m: Block, target: Operand, words: np.ndarray, mask: Mask, word: int = 0) -> None:
    if target.value != (RZ if target.kind == "R" else URZ):
        np.copyto(m.registers.file(target.kind)[target.value + word], words.astype(U32), where=mask)


def _put_single(m: Block, target: Operand, numbers: np.ndarray, mask: Mask) -> None:
    _put(m, target, numbers.astype(F32).view(U32), mask)


def _put_wide(m: Block, target: Operand, values: np.ndarray, mask: Mask) -> None:
    values = values.view(U64)
    _put(m, target, values & U64(0xFFFFFFFF), mask)
    _put(m, target, values >> U64(32), mask, 1)


def _put_predicate(m: Block, target: Operand, values: np.ndarray, mask: Mask) -> None:
    if target.value != PT:
        np.copyto(m.registers.file(target.kind)[target.value], values, where=mask)


def _low(values: np.ndarray) -> np.ndarray:
    return values & 0xFFFFFFFF


# Integers


def iadd3(m: Block, i: Decoded, mask: Mask) -> None:
    """Sum of three numbers, with up to two carries in (.X) and out."""
    carries, target, sources = i.split()
    r = m.registers
    total = sum((source.integer(r) for source in sources[:3]), np.zeros(r.threads, I64))
    for carry in sources[3:]:
        total = total + carry.predicate(r)
    _put(m, target, _low(total), mask)
    for number, carry in enumerate(carries, 1):
        _put_predicate(m, carry, total >> 32 >= number, mask)


def imad(m: Block, i: Decoded, mask: Mask) -> None:
    carries, target, (a, b, *rest) = i.split()
    r = m.registers
    if "MOV" in i.modifiers:
        _put(m, target, rest[0].integer(r), mask)
    elif "WIDE" in i.modifiers or "HI" in i.modifiers:
        if "U32" in i.modifiers:
            product = a.integer(r).astype(U64) * b.integer(r).astype(U64)
        else:
            product = (a.signed(r) * b.signed(r)).view(U64)
        total = product + rest[0].wide(r)
        if "HI" in i.modifiers:
            _put(m, target, total >> U64(32), mask)
        else:
            _put_wide(m, target, total, mask)
            for carry in carries:
                _put_predicate(m, carry, total < product, mask)
    else:
        total = a.signed(r) * b.signed(r) + rest[0].integer(r)
        for carry in rest[1:]:
            total = total + carry.predicate(r)
        _put(m, target, _low(total), mask)


def lea(m: Block, i: Decoded, mask: Mask) -> None:
    """(a << shift) + b; .HI: the upper half of the shifted 64 bits; .X: with a carry."""
    carries, target, sources = i.split()
    r = m.registers
    carry = sources.pop() if "X" in i.modifiers else None
    shift = int(sources.pop().value, 0)
    a, b, *upper = sources
    low = a.integer(r).astype(U32).astype(U64)
    if "HI" in i.modifiers:
        high = (a.signed(r) >> 31) if "SX32" in i.modifiers else upper[0].integer(r)
        shifted = (low | high.astype(U32).astype(U64) << U64(32)) << U64(shift) >> U64(32)
    else:
        shifted = low << U64(shift)
    total = _low(shifted.view(I64)) + b.integer(r)
    if carry is not None:
        total = total + carry.predicate(r)
    _put(m, target, _low(total), mask)
    for out in carries:
        _put_predicate(m, out, total >> 32 >= 1, mask)


def shf(m: Block, i: Decoded, mask: Mask) -> None:
    """Shift of two registers together; .HI: the upper one of the result."""
    target, low, by, high = i.operands
    r = m.registers
    left, kind = i.order[0] == "L", i.order[1]
    shift = by.integer(r)
    shift = shift % 64 if "W" in i.modifiers else np.minimum(shift, 63)
    pair = low.integer(r).astype(U32).astype(U64) | high.integer(r).astype(U32).astype(U64) << U64(32)
    if left:
        found = pair << shift.astype(U64)
    elif kind in ("S32", "S64"):
        found = (pair.view(I64) >> shift).view(U64)
    else:
        found = pair >> shift.astype(U64)
    _put(m, target, found >> U64(32) if "HI" in i.modifiers else _low(found.view(I64)), mask)


def _looked_up(table: int, a: Any, b: Any, c: Any) -> Any:
    """Return the function of three bits with this table, for each bit."""
    found = a & ~a
    for number in range(8):
        if table >> number & 1:
            found = found | ((a if number & 4 else ~a) & (b if number & 2 else ~b) & (c if number & 1 else ~c))
    return found


def lop3(m: Block, i: Decoded, mask: Mask) -> None:
    operands = i.operands
    out = operands[0] if operands[0].is_predicate else None
    target, a, b, c, table = operands[out is not None :][:5]
    r = m.registers
    words = (each.integer(r).astype(U32) for each in (a, b, c))
    found = _looked_up(int(table.value, 0), *words)
    _put(m, target, found, mask)
    if out is not None:
        _put_predicate(m, out, found != 0, mask)


def plop3(m: Block, i: Decoded, mask: Mask) -> None:
    first, second, a, b, c, table, other = i.operands
    values = [each.predicate(m.registers) for each in (a, b, c)]
    _put_predicate(m, first, _looked_up(int(table.value, 0), *values), mask)
    _put_predicate(m, second, _looked_up(int(other.value, 0), *values), mask)


_ORDERED: dict[str, Callable[[Any, Any], Any]] = {
    "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal, "EQ": np.equal,
    "NE": np.not_equal,
}  # fmt: skip


def _combined(i: Decoded, found: np.ndarray, with_: np.ndarray) -> np.ndarray:
    return found | with_ if "OR" in i.modifiers else found ^ with_ if "XOR" in i.modifiers else found & with_


def isetp(m: Block, i: Decoded, mask: Mask) -> None:
    first, second, a, b, with_, *lower = i.operands
    r = m.registers
    if "U32" in i.modifiers:
        x, y = a.integer(r).astype(U32), b.integer(r).astype(U32)
    else:
        x, y = a.signed(r), b.signed(r)
    compare = _ORDERED[i.order[0]]
    found = compare(x, y)
    if lower:  # .EX: of the upper words, after the lower ones
        strict = {"LE": np.less, "GE": np.greater}.get(i.order[0], compare)
        equal = x == y
        found = np.where(equal, lower[0].predicate(r), strict(x, y))
    others = with_.predicate(r)
    _put_predicate(m, first, _combined(i, found, others), mask)
    _put_predicate(m, second, _combined(i, ~found, others), mask)


def sel(m: Block, i: Decoded, mask: Mask) -> None:
    target, a, b, which = i.operands
    r = m.registers
    _put(m, target, np.where(which.predicate(r), a.integer(r), b.integer(r)), mask)


def fsel(m: Block, i: Decoded, mask: Mask) -> None:
    target, a, b, which = i.operands
    r = m.registers
    _put_single(m, target, np.where(which.predicate(r), a.single(r), b.single(r)), mask)


def mov(m: Block, i: Decoded, mask: Mask) -> None:
    _put(m, i.operands[0], i.operands[1].integer(m.registers), mask)


def ldc(m: Block, i: Decoded, mask: Mask) -> None:
    target, source = i.operands
    _put(m, target, source.words(m.registers), mask)
    if "64" in i.modifiers:
        _put(m, target, source.words(m.registers, 1), mask, 1)


def special(m: Block, i: Decoded, mask: Mask) -> None:
    target, name = i.operands
    value = m.registers.special.get(name, 0)
    words = np.broadcast_to(np.asarray(value, I64), (m.registers.threads,))
    _put(m, target, words, mask)
    if i.name == "CS2R" and "32" not in i.modifiers:
        _put(m, target, words * 0, mask, 1)


def prmt(m: Block, i: Decoded, mask: Mask) -> None:
    """Bytes of two registers, in the order that the selector says."""
    target, a, which, b = i.operands
    r = m.registers
    pair = a.integer(r).astype(U32).astype(U64) | b.integer(r).astype(U32).astype(U64) << U64(32)
    chosen = which.integer(r).astype(U64)
    found = np.zeros(r.threads, U64)
    for byte in range(4):
        nibble = chosen >> U64(4 * byte) & U64(15)
        value = pair >> (nibble & U64(7)) * U64(8) & U64(255)
        signs = np.where(value >= 128, U64(255), U64(0))
        found |= np.where(nibble >= 8, signs, value) << U64(8 * byte)
    _put(m, target, found, mask)


def iabs(m: Block, i: Decoded, mask: Mask) -> None:
    _put(m, i.operands[0], np.abs(i.operands[1].signed(m.registers)), mask)


def flo(m: Block, i: Decoded, mask: Mask) -> None:
    """The place of the leading one; .SH: counted from above."""
    target, source = i.operands
    words = source.integer(m.registers).astype(U32).astype(F64)
    place = np.where(words > 0, np.frexp(words)[1].astype(I64) - 1, 0xFFFFFFFF)
    _put(m, target, 31 - place if "SH" in i.modifiers else place, mask)


def viadd(m: Block, i: Decoded, mask: Mask) -> None:
    target, a, b = i.operands
    _put(m, target, _low(a.integer(m.registers) + b.integer(m.registers)), mask)


def vimnmx(m: Block, i: Decoded, mask: Mask) -> None:
    """The lesser of two numbers if the predicate holds, else the greater; VIADDMNMX: the first is a sum."""
    target, *sources, least = i.operands
    r = m.registers

    def value(operand: Operand) -> np.ndarray:
        return operand.integer(r).astype(U32).astype(I64) if "U32" in i.modifiers else operand.signed(r)

    *terms, other = [value(source) for source in sources]
    first = sum(terms, np.zeros(r.threads, I64))
    first = _low(first) if "U32" in i.modifiers else first.astype(U32).view(I32).astype(I64)
    _put(m, target, _low(np.where(least.predicate(r), np.minimum(first, other), np.maximum(first, other))), mask)


def p2r(m: Block, i: Decoded, mask: Mask) -> None:
    target, _, kept, which = i.operands
    r = m.registers
    bits = sum((r.p[number].astype(I64) << number for number in range(7)), np.zeros(r.threads, I64))
    chosen = which.integer(r)
    _put(m, target, (kept.integer(r) & ~chosen) | (bits & chosen), mask)


# Floating point


def fadd(m: Block, i: Decoded, mask: Mask) -> None:
    target, a, b = i.operands
    _put_single(m, target, a.single(m.registers) + b.single(m.registers), mask)


def fmul(m: Block, i: Decoded, mask: Mask) -> None:
    target, a, b = i.operands
    _put_single(m, target, a.single(m.registers) * b.single(m.registers), mask)


def ffma(m: Block, i: Decoded, mask: Mask) -> None:
    target, a, b, c = i.operands
    exact = a.single(m.registers).astype(F64) * b.single(m.registers)  # 48 bits
    _put_single(m, target, exact + c.single(m.registers), mask)


def fmnmx(m: Block, i: Decoded, mask: Mask) -> None:
    target, a, b, least = i.operands
    x, y = a.single(m.registers), b.single(m.registers)
    _put_single(m, target, np.where(least.predicate(m.registers), np.fmin(x, y), np.fmax(x, y)), mask)


def _fsetp(m: Block, i: Decoded, mask: Mask, x: np.ndarray, y: np.ndarray) -> None:
    first, second, _, _, with_ = i.operands
    name = i.order[0]
    unordered = np.isnan(x) | np.isnan(y)
    if name in ("NAN", "NUM"):
        found = unordered == (name == "NAN")
    elif name.endswith("U"):
        found = _ORDERED[name[:-1]](x, y) | unordered
    else:
        found = _ORDERED[name](x, y) & ~unordered
    others = with_.predicate(m.registers)
    _put_predicate(m, first, _combined(i, found, others), mask)
    _put_predicate(m, second, _combined(i, ~found, others), mask)


def fsetp(m: Block, i: Decoded, mask: Mask) -> None:
    _fsetp(m, i, mask, i.operands[2].single(m.registers), i.operands[3].single(m.registers))


def dsetp(m: Block, i: Decoded, mask: Mask) -> None:
    _fsetp(m, i, mask, i.operands[2].double(m.registers), i.operands[3].double(m.registers))


def mufu(m: Block, i: Decoded, mask: Mask) -> None:
    """A function of the special unit, here correctly rounded."""
    target, source = i.operands
    if "RCP64H" in i.modifiers:
        upper = source.words(m.registers).astype(U64) << U64(32)
        _put(m, target, (1 / upper.view(F64)).view(U64) >> U64(32), mask)
        return
    x = source.single(m.registers).astype(F64)
    functions: dict[str, Callable[[Any], Any]] = {
        "RCP": lambda x: 1 / x, "RSQ": lambda x: 1 / np.sqrt(x), "SQRT": np.sqrt, "EX2": np.exp2, "LG2": np.log2,
    }  # fmt: skip
    _put_single(m, target, functions[i.order[0]](x), mask)


def fchk(m: Block, i: Decoded, mask: Mask) -> None:
    """Whether a division needs its slow path: exponents at the ends of the range."""
    out, a, b = i.operands
    x, y = a.single(m.registers), b.single(m.registers)
    ex, ey = (np.frexp(np.where(np.isfinite(each), each, 0))[1] for each in (x, y))
    odd = ~np.isfinite(x) | ~np.isfinite(y) | (y == 0) | (np.abs(ey) > 124) | ((x != 0) & (ex < -100))
    _put_predicate(m, out, odd | ((x != 0) & (np.abs(ex - ey) > 124)), mask)


def double_arithmetic(m: Block, i: Decoded, mask: Mask) -> None:
    target, a, b, *c = i.operands
    x, y = a.double(m.registers), b.double(m.registers)
    if i.name == "DADD":
        found = x + y
    else:
        found = x * y if not c else (x.astype(np.longdouble) * y + c[0].double(m.registers)).astype(F64)
    _put_wide(m, target, found, mask)


def _halves(words: np.ndarray, bfloat16: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and the upper 16-bit number of each word."""
    if bfloat16:
        return (words << U32(16)).view(F32), (words & U32(0xFFFF0000)).view(F32)
    pairs = words.view(np.float16).reshape(-1, 2).astype(F32)
    return pairs[:, 0], pairs[:, 1]


def _bits16(numbers: np.ndarray, bfloat16: bool) -> np.ndarray:
    if not bfloat16:
        return numbers.astype(np.float16).view(np.uint16).astype(U32)
    bits = numbers.astype(F32).view(U32)
    rounded = (bits + U32(0x7FFF) + (bits >> U32(16) & U32(1))) >> U32(16)
    return np.where(np.isnan(numbers), U32(0x7FFF), rounded)


def hfma2(m: Block, i: Decoded, mask: Mask) -> None:
    """Two products and sums of 16-bit numbers. An immediate has both halves, the upper first."""
    target, *rest = i.operands
    bfloat16 = "BF16" in i.name or any("BF16" in modifier for modifier in i.modifiers)
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    while rest:
        operand = rest.pop(0)
        if operand.kind == "#":
            upper, lower = (np.full(m.registers.threads, float(each.value), F32) for each in (operand, rest.pop(0)))
        else:
            lower, upper = _halves(np.ascontiguousarray(operand.words(m.registers)), bfloat16)
            if operand.part in ("H0_H0", "H1_H1"):
                lower = upper = lower if operand.part == "H0_H0" else upper
            if operand.negative:
                lower, upper = -lower, -upper
        pairs.append((lower, upper))
    while len(pairs) < 3:  # HADD2, HMUL2
        pairs.append((np.zeros_like(pairs[0][0]),) * 2)
    a, b, c = pairs
    if i.name == "HADD2":
        found = [a[half] + b[half] for half in (0, 1)]
    else:
        found = [a[half].astype(F64) * b[half] + c[half] for half in (0, 1)]
    _put(m, target, _bits16(found[0], bfloat16) | _bits16(found[1], bfloat16) << U32(16), mask)


def i2f(m: Block, i: Decoded, mask: Mask) -> None:
    target, source = i.operands
    r = m.registers
    kinds = {"U32": source.integer, "S32": source.signed, "U64": source.wide, "S64": source.wide}
    kind = next((kind for kind in kinds if kind in i.modifiers), "S32")
    value = kinds[kind](r)
    if kind == "U32":
        value = value.astype(U32)
    value = value.view(I64) if kind == "S64" else value
    if "F64" in i.modifiers:
        _put_wide(m, target, value.astype(F64), mask)
        return
    numbers = value.astype(F32)
    if "RP" in i.modifiers:  # towards +infinity
        numbers = np.where(numbers.astype(np.longdouble) < value, np.nextafter(numbers, F32(np.inf)), numbers)
    _put_single(m, target, numbers, mask)


def f2i(m: Block, i: Decoded, mask: Mask) -> None:
    target, source = i.operands
    numbers = source.double(m.registers) if "F64" in i.modifiers else source.single(m.registers).astype(F64)
    numbers = np.trunc(np.nan_to_num(numbers))
    if "U64" in i.modifiers:
        _put_wide(m, target, np.clip(numbers, 0, 1.8446744073709550e19).astype(U64), mask)
    elif "S64" in i.modifiers:
        _put_wide(m, target, np.clip(numbers, -(2.0**63), 9.2233720368547748e18).astype(I64), mask)
    elif "U32" in i.modifiers:
        _put(m, target, np.clip(numbers, 0, 2.0**32 - 1).astype(I64), mask)
    else:
        _put(m, target, _low(np.clip(numbers, -(2.0**31), 2.0**31 - 1).astype(I64)), mask)


def f2f(m: Block, i: Decoded, mask: Mask) -> None:
    target, source = i.operands
    to, of = [each for each in i.order if each in ("F32", "F64", "F16")]
    if (to, of) == ("F32", "F64"):
        _put_single(m, target, source.double(m.registers), mask)
    elif (to, of) == ("F64", "F32"):
        _put_wide(m, target, source.single(m.registers).astype(F64), mask)
    else:
        raise NotImplementedError(str(i.instruction))


def f2fp(m: Block, i: Decoded, mask: Mask) -> None:
    """Two float32 numbers rounded to 16 bits, the first one above."""
    target, upper, lower = i.operands
    bfloat16 = "BF16" in i.modifiers
    high, low = (_bits16(each.single(m.registers), bfloat16) for each in (upper, lower))
    _put(m, target, low | high << U32(16), mask)


# Memory


def _size(i: Decoded) -> tuple[int, bool]:
    """Return the bytes that a thread accesses, and whether they are signed."""
    for name, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if name in i.modifiers:
            return size, name[0] == "S"
    return 4, False


def load(m: Block, i: Decoded, mask: Mask) -> None:
    operands = [each for each in i.operands if not (isinstance(each, Operand) and each.is_predicate)]
    target, place = operands
    size, signed = _size(i)
    found = m.memory(i.name, place.of(m.registers), size, mask).read(mask)
    if size < 4:
        number = found.view(f"<u{size}")[:, 0].astype(I64)
        number = number - ((number >> (8 * size - 1)) << 8 * size) if signed else number
        _put_some(m, target, _low(number), mask, 0)
    for word in range(size // 4):
        _put_some(m, target, found.view(U32)[:, word], mask, word)


def _put_some(m: Block, target: Operand, words: np.ndarray, mask: Mask, word: int) -> None:
    """Write the words of the threads in the mask only."""
    if target.value != RZ:
        m.registers.r[target.value + word, mask] = words.astype(U32)


def store(m: Block, i: Decoded, mask: Mask) -> None:
    place, source = i.operands
    size, _ = _size(i)
    words = np.stack([source.words(m.registers, word)[mask] for word in range(max(1, size // 4))], axis=1)
    m.memory(i.name, place.of(m.registers), size, mask).write(
        mask, np.ascontiguousarray(words).view(np.uint8)[:, :size]
    )


def atomic(m: Block, i: Decoded, mask: Mask) -> None:
    """Add to a word, one thread after the other."""
    *_, target, place, source = i.operands
    if "ADD" not in i.modifiers:
        raise NotImplementedError(str(i.instruction))
    places, added = place.of(m.registers), source.words(m.registers)
    for thread in np.flatnonzero(mask):
        alone = np.zeros_like(mask)
        alone[thread] = True
        access = m.memory(i.name, places, 4, alone)
        before = access.read(alone).view(U32)[:, 0]
        _put_some(m, target, before, alone, 0)
        access.write(alone, (before + added[alone]).astype(U32)[:, None].view(np.uint8))


def shfl(m: Block, i: Decoded, mask: Mask) -> None:
    out, target, source, by, limit = i.operands
    if "BFLY" not in i.modifiers or int(limit.value, 0) != 0x1F:
        raise NotImplementedError(str(i.instruction))
    threads = np.arange(m.registers.threads)
    of = threads ^ np.where(mask, by.integer(m.registers), 0)
    _put(m, target, source.words(m.registers)[of], mask)
    _put_predicate(m, out, np.ones(m.registers.threads, bool), mask)


def vote(m: Block, i: Decoded, mask: Mask) -> None:
    *targets, source = i.operands
    votes = source.predicate(m.registers) & mask if "ANY" in i.modifiers else source.predicate(m.registers) | ~mask
    warps = votes.reshape(-1, 32)
    found = warps.any(1) if "ANY" in i.modifiers else warps.all(1)
    bits = (votes & mask).reshape(-1, 32) @ (1 << np.arange(32))
    for target in targets:
        if target.is_predicate:
            _put_predicate(m, target, np.repeat(found, 32), mask)
        else:
            _put(m, target, np.repeat(bits, 32), mask)


def nothing(m: Block, i: Decoded, mask: Mask) -> None:
    """Hints, and orders of memory accesses that are in order here anyway."""


OPERATIONS: dict[str, Callable[[Block, Decoded, Mask], None]] = {
    "IADD3": iadd3, "UIADD3": iadd3, "IMAD": imad, "UIMAD": imad, "LEA": lea, "ULEA": lea, "SHF": shf, "USHF": shf,
    "LOP3": lop3, "ULOP3": lop3, "PLOP3": plop3, "UPLOP3": plop3, "ISETP": isetp, "UISETP": isetp, "SEL": sel,
    "USEL": sel, "FSEL": fsel, "MOV": mov, "UMOV": mov, "R2UR": mov, "LDC": ldc, "ULDC": ldc, "CS2R": special,
    "S2R": special, "S2UR": special, "PRMT": prmt, "UPRMT": prmt, "IABS": iabs, "FLO": flo, "UFLO": flo,
    "VIADD": viadd, "VIMNMX": vimnmx,
    "VIADDMNMX": vimnmx, "P2R": p2r, "FADD": fadd, "FMUL": fmul, "FFMA": ffma, "FMNMX": fmnmx, "FSETP": fsetp,
    "DSETP": dsetp, "MUFU": mufu, "FCHK": fchk, "DADD": double_arithmetic, "DMUL": double_arithmetic,
    "DFMA": double_arithmetic, "HFMA2": hfma2, "HADD2": hfma2, "HMUL2": hfma2, "I2F": i2f, "I2FP": i2f, "F2I": f2i,
    "F2F": f2f, "F2FP": f2fp, "LDG": load, "LDS": load, "LDL": load, "LD": load, "STG": store, "STS": store,
    "STL": store, "ST": store, "SHFL": shfl, "ATOMG": atomic, "VOTE": vote, "VOTEU": vote,
    **dict.fromkeys(("NOP", "YIELD", "MEMBAR", "ERRBAR", "CGAERRBAR", "CCTL", "WARPSYNC", "ENDCOLLECTIVE"), nothing),
}  # fmt: skip
