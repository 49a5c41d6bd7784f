"""Convert float16 to float32 and back in NumPy: the bits of NumPy's casts, at a speed independent of the values.

NumPy's casts convert one value at a time. A denormal takes several times as long to read, and 20 times as long to write
if it is rounded, as does an overflow: each raises a processor flag. This module reads float32 from a table, and makes
float16 by integer arithmetic and one rounding addition. That takes more NumPy calls, so small arrays are converted here
only if they contain slow values.
"""

from __future__ import annotations

from functools import cache

import numpy as np

LEAST = 2**11  # elements; checking smaller arrays for slow values does not pay
FEW = 2**13  # elements; up to here NumPy's cast of ordinary values is faster
CHUNK = 2**15  # elements at a time, to stay in the cache; smaller chunks cost more in calls

# Arrays, since a ufunc takes half as long to read an array argument as a Python number.
MAGNITUDE, EXPONENT = np.array(0x7FFFFFFF, np.uint32), np.array(0x7F800000, np.uint32)
ZERO, ONE, NORMAL, BEYOND = (np.array(bits, np.uint32) for bits in (0, 1, 113 << 23, 143 << 23))  # 2**-14, 2**16
MANTISSA, SIGN, SIGN_BIT = (np.array(number, np.uint32) for number in (13, 16, 0x8000))
GRAIN = np.array((13 << 23) + 2048, np.uint32)
ORDINARY = 0x477FF000 - (113 << 23)  # bits from 2**-14 to the first number that rounds to 2**16
NOTHING = 2**32 - (113 << 23)  # bits from 2**-14 to 0, modulo 2**32


@cache
def _table() -> np.ndarray:
    return np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)


def pays_to_widen(part: np.ndarray) -> bool:
    """True if `widen` reads this part of an array faster than a cast."""
    return part.dtype.char == "e" and part.size > FEW


def pays_to_narrow(values: np.ndarray, part: np.ndarray) -> bool:
    """True if `narrow` writes float32 values to this part of an array faster than a cast."""
    if part.dtype.char != "e" or part.size < LEAST:
        return False
    if part.size > FEW:
        return True
    above = np.bitwise_and(values.view(np.uint32), MAGNITUDE)
    np.subtract(above, NORMAL, out=above)  # smaller values wrap around to large ones
    if np.maximum.reduce(above, None) < ORDINARY:
        return False
    return bool(((above >= ORDINARY) & (above != NOTHING)).any())


def codes_in(buffer: np.ndarray, size: int) -> np.ndarray:
    """Return the uint16 view from which `widen` reads `size` halves: the second half of buffer[:size]."""
    return buffer[:size].view(np.uint16)[size:]


def widen(buffer: np.ndarray, size: int) -> None:
    """Convert codes_in(buffer, size) to float32 in buffer[:size]."""
    codes, table = codes_in(buffer, size), _table()
    for i in range(0, size, CHUNK):  # overwrites at most its own codes, which take copies first
        table.take(codes[i : i + CHUNK], out=buffer[i : min(i + CHUNK, size)], mode="clip")


def narrow(values: np.ndarray, buffer: np.ndarray) -> np.ndarray:
    """Round float32 values to halves (to nearest, ties to even); return uint16 codes, in the float32 buffer."""
    codes = buffer.view(np.uint16)[: values.size]
    scratch = np.empty((2, min(values.size, CHUNK)), np.uint32)
    for i in range(0, values.size, CHUNK):
        part = values[i : i + CHUNK]
        _narrow(part, codes[i : i + CHUNK], *scratch[:, : part.size])
    return codes


def _narrow(values: np.ndarray, codes: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    bits = values.view(np.uint32)
    np.bitwise_and(bits, MAGNITUDE, out=a)
    most = np.maximum.reduce(a)
    if most >= BEYOND:
        a.clip(ZERO, BEYOND, out=a)
    # Add 2**(e + 13), where e is the exponent of the half. Its last bit is the last bit of the half, so the addition
    # rounds, and the sum ends with the half's mantissa and its leading 1. The 2048 cancels the sum of the exponents.
    a.clip(NORMAL, BEYOND, out=b)
    np.bitwise_and(b, EXPONENT, out=b)
    np.add(b, GRAIN, out=b)
    np.add(a.view(np.float32), b.view(np.float32), out=a.view(np.float32))
    np.right_shift(a, MANTISSA, out=b)
    np.add(a, b, out=a)
    np.right_shift(bits, SIGN, out=b)
    np.bitwise_and(b, SIGN_BIT, out=b)
    np.bitwise_or(a, b, out=a)
    np.copyto(codes, a, casting="unsafe")  # the last 16 bits
    if most > EXPONENT:  # NaN became infinity: restore the upper bits of its payload, at least 1
        np.bitwise_and(bits, MAGNITUDE, out=a)
        a.clip(EXPONENT, MAGNITUDE, out=a)
        np.subtract(a, EXPONENT, out=a)
        np.right_shift(a, MANTISSA, out=b)
        a.clip(ZERO, ONE, out=a)
        np.maximum(a, b, out=a)
        codes |= a.astype(np.uint16)
