"""Operands of instructions, as vectors of a value for each thread of a block."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np

U32, I32, U64, I64, F32, F64 = np.uint32, np.int32, np.uint64, np.int64, np.float32, np.float64

#: Registers that are always 0 or true.
RZ, URZ, PT = 255, 63, 7


class Registers:
    """The registers of a block's threads: a row for each register."""

    def __init__(self, threads: int, constants: bytes, special: dict[str, Any]):
        self.threads = threads
        self.r = np.zeros((256, threads), U32)
        self.ur = np.zeros((64, threads), U32)  # the same in all threads of a warp
        self.p = np.zeros((8, threads), bool)
        self.up = np.zeros((8, threads), bool)
        self.p[PT] = self.up[PT] = True
        self.constants = np.frombuffer(constants, np.uint8)
        self.special = special

    def file(self, kind: str) -> np.ndarray:
        return {"R": self.r, "UR": self.ur, "P": self.p, "UP": self.up}[kind]


class Operand(NamedTuple):
    """kind: R, UR, P, UP, c (of the constant bank), or # for an immediate. value: a number, or text of an immediate."""

    kind: str
    value: Any
    negative: bool = False
    absolute: bool = False
    inverted: bool = False  # ~ of integers, ! of predicates
    part: str = ""  # of a register of two halves: H0_H0, H1_H1

    @property
    def is_predicate(self) -> bool:
        return self.kind in ("P", "UP")

    def words(self, registers: Registers, word: int = 0) -> np.ndarray:
        """Return 32 bits of each thread, without the sign. word: 1 for the upper half of 64 bits."""
        if self.kind in ("R", "UR"):
            zero = self.value == (RZ if self.kind == "R" else URZ)
            row = self.value if zero else self.value + word
            return registers.file(self.kind)[row]
        if self.kind == "c":
            at = self.value + 4 * word
            found = registers.constants[at : at + 4].view(U32)[0]
        else:
            found = U32((int(self.value, 0) & 2**64 - 1) >> 32 * word & 2**32 - 1)
        return np.full(registers.threads, found, U32)

    def integer(self, registers: Registers) -> np.ndarray:
        """Return 32 bits as an integer of 64 bits, not negative unless negated: -0 is then 2^32, as for a carry."""
        found = self.words(registers).astype(I64)
        if self.inverted:
            found = found ^ 0xFFFFFFFF
        return (found ^ 0xFFFFFFFF) + 1 if self.negative else found

    def signed(self, registers: Registers) -> np.ndarray:
        return self.integer(registers).astype(U32).view(I32).astype(I64)

    def wide(self, registers: Registers) -> np.ndarray:
        """Return 64 bits of two registers."""
        found = self.words(registers).astype(U64) | self.words(registers, 1).astype(U64) << U64(32)
        return (~found + U64(1)) if self.negative else ~found if self.inverted else found

    def predicate(self, registers: Registers) -> np.ndarray:
        return registers.file(self.kind)[self.value] ^ self.inverted

    def single(self, registers: Registers) -> np.ndarray:
        """Return float32 numbers."""
        if self.kind == "#":
            return self._signed(np.full(registers.threads, _number(self.value), F32))
        return self._signed(self.words(registers).view(F32))

    def double(self, registers: Registers) -> np.ndarray:
        """Return float64 numbers."""
        if self.kind == "#":
            return self._signed(np.full(registers.threads, _number(self.value), F64))
        bits = self.words(registers).astype(U64) | self.words(registers, 1).astype(U64) << U64(32)
        return self._signed(bits.view(F64))

    def _signed(self, numbers: np.ndarray) -> np.ndarray:
        numbers = np.abs(numbers) if self.absolute else numbers
        return -numbers if self.negative else numbers


def _number(text: str) -> float:
    text = text.upper()
    if "NAN" in text:
        return float("nan")
    return float(text.replace("INF", "inf")) if not text.startswith("0X") else float(int(text, 0))


_REGISTER = re.compile(r"(UR|UP|R|P)(\d+|Z|T)((?:\.\w+)*)$")


def parsed(text: str) -> Operand:
    """Parse a register, a predicate, a constant or an immediate."""
    rest, negative, absolute, inverted = text, False, False, False
    if rest[0] in "~!":
        inverted, rest = True, rest[1:]
    if rest[0] == "-" and not re.match(r"-(\d|QNAN|INF|SNAN)", rest):
        negative, rest = True, rest[1:]
    if rest[0] == "|":
        absolute, rest = True, rest.replace("|", "")
    if found := _REGISTER.match(rest):
        kind, number, modifiers = found.groups()
        row = {"Z": RZ if kind == "R" else URZ, "T": PT}.get(number)
        part = modifiers.replace(".reuse", "").lstrip(".")
        return Operand(kind, int(number) if row is None else row, negative, absolute, inverted, part)
    if found := re.match(r"c\[0x0\]\[0x([0-9a-f]+)\]", rest):
        return Operand("c", int(found[1], 16), negative, absolute, inverted)
    return Operand("#", rest, negative, absolute, inverted)


class Address(NamedTuple):
    """A sum of registers and a number. wide: of 64 bits."""

    terms: tuple[tuple[Operand, int], ...]  # each with a scale
    offset: int
    wide: bool

    def of(self, registers: Registers) -> np.ndarray:
        total = np.full(registers.threads, self.offset, I64)
        for operand, scale in self.terms:
            wide = self.wide and (operand.part == "64" or operand.kind == "UR")
            total += (
                operand.wide(registers).view(I64) if wide else operand.words(registers).view(I32).astype(I64)
            ) * scale
        return total


def address(text: str) -> Address:
    """Parse an address: [R0+0x10], desc[UR6][R42.64+0x400]."""
    inner = text[text.rindex("[") + 1 : -1]
    terms, offset = [], 0
    for part in inner.replace("+-", "-").replace("-", "+-").split("+"):
        if re.match(r"-?0x", part):
            offset += int(part, 0)
        elif part:
            name, _, scale = part.partition(".X")
            terms.append((parsed(name), int(scale or 1)))
    return Address(tuple(terms), offset, "desc" in text or ".64" in inner)
