"""Extend numba for the CPU backend's loops: memory at an address, 16-bit floats, a task queue, a vectorisable exp.

Compiled code stores float16 as int16 and bfloat16 as uint16: the type of a stored element selects the conversion. The
element functions are free of branches, so that loops over them vectorise.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload, register_jitable

from .compiling import INLINE, INTERNAL, disk_cached

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


# The task queue of a call: its items (blocks or tiles) are divided into tasks. numbers[STARTED] and numbers[FINISHED]
# count the tasks, in separate cache lines, since threads write them concurrently. Each thread first takes the tasks of
# its own range, also counted in a separate line, and then those of other ranges: data of the last call then need not
# move from one core's caches to another's. The loops get a pair (numbers, own thread number).

STARTED, PARTS, COUNT, FIRST, FINISHED, RANGES = 0, 1, 2, 3, 8, 16
SPIN_LIMIT = 20_000  # reads of a counter, about 20 microseconds


def _atomic(operation):
    """Make a compiled atomic function (numbers, index, value) that returns the old number."""

    @intrinsic
    def atomic(typingctx, numbers, index, value):
        def generate(context, builder, signature, args):
            array = context.make_array(signature.args[0])(context, builder, args[0])
            return builder.atomic_rmw(operation, builder.gep(array.data, [args[1]]), args[2], "seq_cst")

        return types.int64(numbers, types.int64, types.int64), generate

    return atomic


_add_to, _exchange = _atomic("add"), _atomic("xchg")


def new_queue(count, parts, threads):
    """Create the numbers of a queue with `count` items, numbered from 0, in `parts` tasks for `threads` threads."""
    numbers = np.zeros(RANGES + 8 * threads, np.int64)
    numbers[PARTS], numbers[COUNT] = parts, count
    return numbers


@numba.njit(**INTERNAL)
def next_tasks(queue):
    """Start a task: return the range (first, last) of its items, excluding last; an empty one if no task is left."""
    numbers, worker = queue
    parts, count, first, ranges = numbers[PARTS], numbers[COUNT], numbers[FIRST], (len(numbers) - RANGES) // 8
    if _add_to(numbers, STARTED, 1) >= parts:
        return first, first
    while True:  # the counter guarantees that a task remains
        worker %= ranges
        part = parts * worker // ranges + _add_to(numbers, RANGES + 8 * worker, 1)
        worker += 1
        if part < parts * worker // ranges:
            return first + count * part // parts, first + count * (part + 1) // parts


@numba.njit(**INTERNAL)
def task_done(queue):
    """Count a task as finished and start the next."""
    _add_to(queue[0], FINISHED, 1)
    return next_tasks(queue)


@disk_cached
def drain(numbers):
    """Close the queue and spin briefly; True if all started tasks finished."""
    started = min(_exchange(numbers, STARTED, numbers[PARTS]), numbers[PARTS])
    spins = 0
    while _add_to(numbers, FINISHED, 0) < started and spins < SPIN_LIMIT:
        spins += 1
    return spins < SPIN_LIMIT


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


# Activations. The type of `act` selects one: None, a boolean for relu, a float (its slope) for leaky_relu, an integer
# for silu, and a tuple for gelu.


def _polynomial(coefficients, kind):
    """Compile p(t) by Horner's rule, coefficients highest first. Nested functions: a loop would not be unrolled."""
    highest, unit = kind(coefficients[0]), kind(1)
    p = register_jitable(**INLINE)(lambda t: highest * unit)
    for coefficient in coefficients[1:]:
        p = _next_power(p, kind(coefficient))
    return p


def _next_power(p, c):
    return register_jitable(**INLINE)(lambda t: p(t) * t + c)


def _exp(x):
    """Return exp(x) for x <= 0; 0 or nearly 0 where the result would be a denormal."""
    raise NotImplementedError("compiled only")


@overload(_exp, jit_options=INLINE)
def _exp_overload(x):
    double = x == types.float64
    kind = np.float64 if double else np.float32
    # x = k ln 2 + r with |r| <= ln 2 / 2, exp(x) = 2^k exp(r), and exp(r) by its series.
    lowest, per_ln2 = kind(-708.0 if double else -87.0), kind(1 / math.log(2))
    shifter = kind(1.5 * 2**52 if double else 1.5 * 2**23)  # adding it rounds to an integer
    high = kind(0.693147180369123816490 if double else 0.693359375)  # few digits: k * high is exact
    low = kind(1.90821492927058770002e-10 if double else -2.12194440e-4)
    series = _polynomial([1 / math.factorial(k) for k in range(13 if double else 7, -1, -1)], kind)
    if double:

        def power(k):
            return _bits(np.uint64(np.int64(k) + 1023) << np.uint64(52))
    else:

        def power(k):
            return _bits(np.uint32(np.uint32(np.int32(np.int32(k) + np.int32(127))) << np.uint32(23)))

    power = register_jitable(**INLINE)(power)

    def impl(x):
        x = x if x > lowest else (lowest if x <= lowest else x)
        k = (x * per_ln2 + shifter) - shifter
        r = (x - k * high) - k * low
        return series(r) * power(k)

    return impl


def _tail_and_density(size, act):
    """Return 1 - F(|z|) and F'(|z|) of |z|, with the logistic or the normal distribution F."""
    raise NotImplementedError("compiled only")


@overload(_tail_and_density, jit_options=INLINE)
def _tail_and_density_overload(size, act):
    from .cpu import ERFCX_CENTRE, half_erfcx  # not at the top: cpu imports this module

    double = size == types.float64
    kind = np.float64 if double else np.float32
    one, half, centre, scale = kind(1), kind(-0.5), kind(ERFCX_CENTRE), kind(1 / math.sqrt(2 * math.pi))
    if isinstance(act, types.Integer):

        def logistic(size, act):
            e = _exp(-size)
            tail = e / (one + e)
            return tail, tail / (one + e)

        return logistic
    scaled_tail = _polynomial(half_erfcx(20 if double else 10), kind)

    def normal(size, act):
        e = _exp(half * (size * size))
        return scaled_tail((size - centre) / (size + centre)) * e, e * scale

    return normal


def activate(z, act):
    """Return activation(z)."""
    raise NotImplementedError("compiled only")


@overload(activate, jit_options=INLINE)
def _activate(z, act):
    kind = np.float64 if z == types.float64 else np.float32
    nothing, bound = kind(0), kind(800 if kind is np.float64 else 200)
    if isinstance(act, types.NoneType):
        return lambda z, act: z
    if isinstance(act, types.Boolean):
        return lambda z, act: nothing if z <= nothing else z
    if isinstance(act, types.Float):
        return lambda z, act: z * act if z <= nothing else z

    def smooth(z, act):
        size = abs(z)
        size = bound if size > bound else size
        tail, _ = _tail_and_density(size, act)
        return (nothing if z <= nothing else z) - size * tail

    return smooth


def times_slope(g, z, act):
    """Return g * activation'(z)."""
    raise NotImplementedError("compiled only")


@overload(times_slope, jit_options=INLINE)
def _times_slope(g, z, act):
    kind = np.float64 if z == types.float64 else np.float32
    nothing, one, bound = kind(0), kind(1), kind(800 if kind is np.float64 else 200)
    if isinstance(act, types.NoneType):
        return lambda g, z, act: g
    if isinstance(act, types.Boolean):
        return lambda g, z, act: nothing if z <= nothing else g
    if isinstance(act, types.Float):
        return lambda g, z, act: g * act if z <= nothing else g

    def smooth(g, z, act):
        size = abs(z)
        size = bound if size > bound else size
        tail, density = _tail_and_density(size, act)
        h = density * size - tail
        return g * (one + h if z >= nothing else -h)

    return smooth
