"""What numba lacks for the loops: memory at an address, 16-bit numbers, non-temporal stores, vector transpositions.

In compiled code float16 is stored as int16 and bfloat16 as uint16: the type of a stored element tells how to read it.
Everything here is free of branches, so that loops over it become vector instructions.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from .numba_cache import INLINE, INTERNAL

#: By dtype name: a sample of the type that elements are stored as.
SAMPLES = {"float16": np.int16(0), "bfloat16": np.uint16(0), "float32": np.float32(0), "float64": np.float64(0)}


def computing(stored):
    """Return the numba type in which a stored type computes."""
    return types.float64 if stored == types.float64 else types.float32


@intrinsic
def _pointer(typingctx, address, like):
    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(types.int64, like), generate


@numba.njit(**INTERNAL)
def memory(address, like):
    """Return all memory from an address on as an array of like's type; offsets below 0 are unsigned and wrap around."""
    return numba.carray(_pointer(address, like), 1 << 40)


@intrinsic
def own_address(typingctx):
    """Return the address of the calling compiled function."""

    def generate(context, builder, signature, args):
        return builder.ptrtoint(builder.function, ir.IntType(64))

    return types.int64(), generate


@intrinsic
def call(typingctx, address, arguments):
    """Call the compiled function at an address. It must take arguments of these types and return its own address.

    A call by name would make the compiler include and compile the whole function in the caller again.
    """
    kinds = tuple(types.unliteral(kind) for kind in arguments.types)

    def generate(context, builder, signature, args):
        kind = context.call_conv.get_function_type(types.int64, kinds)
        function = builder.inttoptr(args[0], kind.as_pointer())
        values = [
            context.cast(builder, value, *pair)
            for value, *pair in zip(cgutils.unpack_tuple(builder, args[1]), signature.args[1].types, kinds, strict=True)
        ]
        status, result = context.call_conv.call_function(builder, function, types.int64, kinds, values)
        with cgutils.if_unlikely(builder, status.is_error):
            context.call_conv.return_status_propagate(builder, status)
        return result

    return types.int64(types.int64, arguments), generate


@intrinsic
def prefetch(typingctx, array, index):
    """Prefetch the cache line of an element into the L2 cache; the address need not be valid."""

    def generate(context, builder, signature, args):
        array = context.make_array(signature.args[0])(context, builder, args[0])
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        address = builder.bitcast(builder.gep(array.data, [args[1]]), byte)
        builder.call(function, [address, number(0), number(2), number(1)])
        return context.get_dummy_value()

    return types.none(array, index), generate


@intrinsic
def _put_line(typingctx, array, index, source, at):
    """Write a cache line of elements with a non-temporal store; array[index] must be at the start of a line."""

    def generate(context, builder, signature, args):
        line = ir.VectorType(ir.IntType(8), 64).as_pointer()
        target, source = (context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 2))
        target, source = builder.gep(target, [args[1]]), builder.gep(source, [args[3]])
        value = builder.load(builder.bitcast(source, line), align=1)
        store = builder.store(value, builder.bitcast(target, line), align=64)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    return types.none(array, index, source, at), generate


def _copy(size):
    """Make a compiled function (target, p, source, o) that copies `size` bytes from source[o] to target[p]."""

    @intrinsic
    def copy(typingctx, target, p, source, o):
        def generate(context, builder, signature, args):
            kind = ir.VectorType(ir.IntType(8), size).as_pointer()
            target, source = (context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 2))
            target, source = builder.gep(target, [args[1]]), builder.gep(source, [args[3]])
            builder.store(builder.load(builder.bitcast(source, kind), align=1), builder.bitcast(target, kind), align=1)
            return context.get_dummy_value()

        return types.none(target, p, source, o), generate

    return copy


_copy_32, _copy_8 = _copy(32), _copy(8)


def transposition(size):
    """Make a compiled function (source, o, apart, target, p, width) that transposes a block of size x size elements.

    Rows are `apart` elements apart in the source and `width` in the target.
    """

    @intrinsic
    def transpose(typingctx, source, o, apart, target, p, width):
        def generate(context, builder, signature, args):
            source, target = (context.make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 3))
            kind = ir.VectorType(context.get_data_type(signature.args[0].dtype), size).as_pointer()

            def row(memory, start, step, i):
                index = builder.add(start, builder.mul(step, step.type(i)))
                return builder.bitcast(builder.gep(memory, [index]), kind)

            rows = [builder.load(row(source, args[1], args[2], i), align=1) for i in range(size)]
            half = size // 2
            while half:  # in each square of side 2 * half, swap the two off-diagonal squares
                lower = [j if not j & half else size + j - half for j in range(size)]
                upper = [j + half if not j & half else size + j for j in range(size)]
                masks = [ir.Constant(ir.VectorType(ir.IntType(32), size), mask) for mask in (lower, upper)]
                for i in range(size):
                    if not i & half:
                        pair = rows[i], rows[i + half]
                        rows[i], rows[i + half] = (builder.shuffle_vector(*pair, mask) for mask in masks)
                half //= 2
            for i, value in enumerate(rows):
                builder.store(value, row(target, args[4], args[5], i), align=1)
            return context.get_dummy_value()

        return types.none(source, o, apart, target, p, width), generate

    return transpose


@numba.njit(**INLINE)
def copy_row(a, o, b, p, size):
    """Copy contiguous elements from a[o] to b[p], several at a time; the last copies may overlap."""
    wide, narrow = np.uint64(32 // a.itemsize), np.uint64(8 // a.itemsize)
    if size >= wide:
        for i in range(np.uint64(0), size - wide, wide):
            _copy_32(b, p + i, a, o + i)
        _copy_32(b, p + size - wide, a, o + size - wide)
    elif size >= narrow:
        for i in range(np.uint64(0), size - narrow, narrow):
            _copy_8(b, p + i, a, o + i)
        _copy_8(b, p + size - narrow, a, o + size - narrow)
    else:
        for i in range(size):
            b[p + i] = a[o + i]


@numba.njit(**INTERNAL)
def stream(buffer, size, array, index):
    """Copy the first `size` elements of a buffer to array[index], whole cache lines by non-temporal stores.

    An ordinary store reads the line first. The threads' atomic operations make the stores visible to other threads.
    """
    line = line_of(array[0])
    first = min(np.uint64(-(array.ctypes.data // np.uint64(array.itemsize) + index) % line), size)
    last = first + (size - first) // line * line
    for i in range(first):
        array[index + i] = buffer[i]
    for i in range(first, last, line):
        _put_line(array, index + i, buffer, i)
    for i in range(last, size):
        array[index + i] = buffer[i]


def line_of(like):
    """Return the number of elements in a cache line."""
    raise NotImplementedError("compiled only")


@overload(line_of, jit_options=INLINE)
def _line_of(like):
    elements = np.uint64(512 // like.bitwidth)
    return lambda like: elements


@intrinsic
def _bits(typingctx, value):
    """Reinterpret float32 as uint32 and back; likewise 64-bit types."""
    other = {
        types.float32: types.uint32,
        types.uint32: types.float32,
        types.float64: types.uint64,
        types.uint64: types.float64,
    }[value]

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return other(value), generate


def zero_of(like):
    raise NotImplementedError("compiled only")


@overload(zero_of, jit_options=INLINE)
def _zero_of(like):
    kind = computing(like)
    return lambda like: kind(0)


def zeros_of(like):
    raise NotImplementedError("compiled only")


@overload(zeros_of, jit_options=INLINE)
def _zeros_of(like):
    kind = computing(like)
    return lambda like: np.zeros(1, kind)


def typed(value, like):
    """Convert a number to like's type."""
    raise NotImplementedError("compiled only")


@overload(typed, jit_options=INLINE)
def _typed(value, like):
    kind = like
    return lambda value, like: kind(value)


def unit_of(mean, rstd):
    """Return the unit of a plane, a power of two near rstd, and rstd in that unit, as in kernels/unit.cuh."""
    raise NotImplementedError("compiled only")


@overload(unit_of, jit_options=INLINE)
def _unit_of(mean, rstd):
    if rstd == types.float64:
        return lambda mean, rstd: (1.0, rstd)  # float64 squares must be in range in any case

    def single(mean, rstd):
        exponent = np.uint32(np.uint32(_bits(rstd) >> np.uint32(23)) & np.uint32(255))
        most = np.uint32(np.uint32(376) - np.uint32(np.uint32(_bits(mean) >> np.uint32(23)) & np.uint32(255)))
        exponent = np.uint32(253) if exponent > np.uint32(253) else exponent
        exponent = most if exponent > most else exponent
        exponent = np.uint32(1) if exponent < np.uint32(1) else exponent
        inverse = _bits(np.uint32(np.uint32(np.uint32(254) - exponent) << np.uint32(23)))
        return _bits(np.uint32(exponent << np.uint32(23))), rstd * inverse

    return single


@numba.njit(fastmath={"contract"}, **INTERNAL)
def scaled(x, unit, offset):
    """Return x * unit - offset, fused where possible: as unit is a power of two, the bits are the same."""
    return x * unit - offset


@numba.njit(fastmath={"reassoc", "nsz"}, **INTERNAL)
def add(a, b):
    """Return a + b. The compiler may reorder sums of these, and nothing else."""
    return a + b


def widen(stored):
    """Convert a stored element to computing precision."""
    raise NotImplementedError("compiled only")


@overload(widen, jit_options=INLINE)
def _widen(stored):
    if stored == types.uint16:
        return lambda stored: _bits(np.uint32(np.uint32(stored) << np.uint32(16)))
    if stored != types.int16:
        return lambda stored: stored

    def half(stored):
        code = np.uint32(stored)
        magnitude = np.uint32(np.uint32(code & np.uint32(0x7FFF)) << np.uint32(13))
        # Exponents increase by 112. Those of denormals increase by 113, then the leading 1 they lack is subtracted.
        normal = _bits(np.uint32(magnitude + np.uint32(112 << 23)))
        small = _bits(np.uint32(magnitude + np.uint32(113 << 23))) - _bits(np.uint32(113 << 23))
        value = normal if magnitude >= np.uint32(1 << 23) else small
        value = _bits(np.uint32(magnitude | np.uint32(0x7F800000))) if magnitude >= np.uint32(31 << 23) else value
        return _bits(np.uint32(_bits(value) | np.uint32(np.uint32(code & np.uint32(0x8000)) << np.uint32(16))))

    return half


def narrow(value, like):
    """Round a value to an element of like's type (to nearest, ties to even)."""
    raise NotImplementedError("compiled only")


@overload(narrow, jit_options=INLINE)
def _narrow(value, like):
    if like == types.uint16:

        def brain(value, like):
            bits = _bits(value)
            rounded = np.uint32(bits + np.uint32(0x7FFF) + np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1)))
            nan = np.uint32(bits | np.uint32(0x400000))
            is_nan = np.uint32(bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
            return np.uint16(np.uint32(nan if is_nan else rounded) >> np.uint32(16))

        return brain
    if like != types.int16:
        return lambda value, like: value

    def half(value, like):
        bits = _bits(value)
        magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
        sign = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(0x8000))
        odd = np.uint32(np.uint32(magnitude >> np.uint32(13)) & np.uint32(1))
        normal = np.uint32(np.uint32(magnitude + np.uint32(0xFFF) + odd - np.uint32(112 << 23)) >> np.uint32(13))
        # The last bit of 0.5 in float32 is the spacing of denormals, so the addition rounds.
        small = np.uint32(_bits(_bits(magnitude) + np.float32(0.5)) - np.uint32(0x3F000000))
        code = small if magnitude < np.uint32(113 << 23) else normal
        code = np.uint32(0x7C00) if magnitude >= np.uint32(143 << 23) else code
        code = np.uint32(0x7E00) if magnitude > np.uint32(0x7F800000) else code
        return np.int16(np.uint16(np.uint32(code | sign)))

    return half
