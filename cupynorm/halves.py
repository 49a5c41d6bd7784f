"""float16 to float32 and back for NumPy alone: NumPy's bits, in about the same time whatever the values.

NumPy's casts go through values one by one. A denormal takes several times as long to read, and to write 20 times where
it is rounded, as does what overflows: each raises a flag of the processor. Here float32 is looked up in a table, and
float16 made by integer arithmetic and one addition that rounds. That is some calls of NumPy more: of few elements they
are made only where there is something among them that would take long.
"""

from __future__ import annotations

from functools import cache

import numpy as np

LEAST = 2**11  # elements from which on it is worth a look what is among them
FEW = 2**13  # up to which these calls take longer than a cast of ordinary values
CHUNK = 2**15  # elements at a time, for the cache; fewer cost more in calls

# Constants as arrays: a ufunc takes half as long to get at them as at numbers.
MAGNITUDE, EXPONENT = np.array(0x7FFFFFFF, np.uint32), np.array(0x7F800000, np.uint32)
ZERO, ONE, NORMAL, BEYOND = (np.array(bits, np.uint32) for bits in (0, 1, 113 << 23, 143 << 23))  # 2**-14, 2**16
MANTISSA, SIGN, SIGN_BIT = (np.array(number, np.uint32) for number in (13, 16, 0x8000))
GRAIN = np.array((13 << 23) + 2048, np.uint32)
ORDINARY = 0x477FF000 - (113 << 23)  # how far above 2**-14 the first number lies that is rounded to 2**16
NOTHING = 2**32 - (113 << 23)  # and, modulo 2**32, 0


@cache
def _table() -> np.ndarray:
    return np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)


def pays_to_widen(part: np.ndarray) -> bool:
    """Whether a part of an array is to be read by what is here."""
    return part.dtype.char == "e" and part.size > FEW


def pays_to_narrow(values: np.ndarray, part: np.ndarray) -> bool:
    """Whether float32 values are to be written to a part of an array by what is here."""
    if part.dtype.char != "e" or part.size < LEAST:
        return False
    if part.size > FEW:
        return True
    above = np.bitwise_and(values.view(np.uint32), MAGNITUDE)
    np.subtract(above, NORMAL, out=above)  # what is less becomes large
    if np.maximum.reduce(above, None) < ORDINARY:
        return False
    return bool(((above >= ORDINARY) & (above != NOTHING)).any())


def codes_in(buffer: np.ndarray, size: int) -> np.ndarray:
    """Where `widen` takes `size` halves from, as uint16: the second half of the memory of buffer[:size]."""
    return buffer[:size].view(np.uint16)[size:]


def widen(buffer: np.ndarray, size: int) -> None:
    """What is in codes_in(buffer, size), as float32 in buffer[:size]."""
    codes, table = codes_in(buffer, size), _table()
    for i in range(0, size, CHUNK):  # a chunk reaches at most its own codes, of which take makes indices first
        table.take(codes[i : i + CHUNK], out=buffer[i : min(i + CHUNK, size)], mode="clip")


def narrow(values: np.ndarray, buffer: np.ndarray) -> np.ndarray:
    """float32 values as halves, to nearest, ties to even: as uint16, in a buffer that has room for as many float32."""
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
    # 2**(e + 13), with e the exponent of the half, is added: its last bit is the half's, so that the addition rounds,
    # and the sum's last bits are the half's mantissa, with its leading 1. 2048 makes what the exponents add up to 0.
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
    if most > EXPONENT:  # NaN was made infinity: what is left of its payload is put back, at least 1
        np.bitwise_and(bits, MAGNITUDE, out=a)
        a.clip(EXPONENT, MAGNITUDE, out=a)
        np.subtract(a, EXPONENT, out=a)
        np.right_shift(a, MANTISSA, out=b)
        a.clip(ZERO, ONE, out=a)
        np.maximum(a, b, out=a)
        codes |= a.astype(np.uint16)
