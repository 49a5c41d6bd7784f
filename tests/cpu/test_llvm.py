"""The language of the compiled loops: each of its words does what Python or NumPy does with the same numbers."""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers.compare import assert_equal, assert_same
from helpers.loops import emitted, llvm, llvm_machine, loops_places, python_step

pytestmark = pytest.mark.compiled

INTEGERS = [np.int64, np.int32, np.int16]
FLOATS = [np.float32, np.float64]
BINARY = {
    "floats": (operator.add, operator.sub, operator.mul, operator.truediv),
    "integers": (operator.add, operator.sub, operator.mul, operator.and_, operator.or_),
}


def kind_of(dtype: Any) -> Any:
    names = {"i8": "INT", "i4": "INT32", "i2": "INT16", "f8": "DOUBLE", "f4": "FLOAT", "f2": "HALF"}
    return getattr(llvm, names[np.dtype(dtype).str[1:]])


def compiled(write: Callable[..., None], number: int) -> Callable[..., None]:
    """Compile a function whose arguments are arrays: write(code, *memories)."""

    def module(made: Any) -> None:
        with made.function("test", *[llvm.MEMORY] * number, exported=True) as (code, *memories):
            write(code, *memories)

    function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * number)(*emitted(module, ["test"]))

    def call(*arrays: np.ndarray) -> None:
        assert len(arrays) == number and all(array.flags.c_contiguous for array in arrays)
        function(*(array.ctypes.data for array in arrays))

    return call


def applied(compute: Callable[..., Sequence[Any]], *inputs: Any, code: bool = False) -> list[np.ndarray]:
    """Return what a compiled function makes of numbers, or of arrays as vectors. Conditions become 0 and 1.

    code: whether the function gets the Code, too, as its first argument.
    """
    given = [np.asarray(array) for array in inputs]
    results: list[np.ndarray] = []

    def write(made: Any, *memories: Any) -> None:
        *memories, target = memories
        values = [
            memory.of(kind_of(array.dtype)).load(0, array.size if array.ndim else 0)
            for memory, array in zip(memories, given, strict=True)
        ]
        for i, result in enumerate(compute(made, *values) if code else compute(*values)):
            value, lanes = result, result.lanes
            if llvm.element_of(result.kind) == llvm.BIT:
                value = llvm.where(result, made.number(llvm.vector(llvm.INT, lanes), 1), 0)
            dtype = next(
                d for d in (*INTEGERS, *FLOATS, np.float16) if kind_of(d) == llvm.element_of(value.kind)
            )  # fmt: skip
            results.append(np.zeros(lanes or (), dtype))
            target.of(kind_of(dtype)).at(i * (4096 // np.dtype(dtype).itemsize)).store(0, value)

    function = compiled(write, len(given) + 1)
    room = np.zeros((len(results), 4096), np.uint8)
    function(*map(np.ascontiguousarray, given), room)
    return [row[: r.nbytes].view(r.dtype).reshape(r.shape) for row, r in zip(room, results, strict=True)]


def numbers(rng: np.random.Generator, dtype: Any, lanes: int) -> np.ndarray:
    """Return a vector of random numbers, or a single one for 0 lanes; of integers also those at the ends."""
    if np.dtype(dtype).kind == "f":
        return (8 * rng.standard_normal(lanes or ())).astype(dtype)
    ends = np.iinfo(dtype)
    some = rng.integers(ends.min, ends.max, lanes or (), dtype, endpoint=True)
    if lanes:
        some[0] = ends.min
    return some


@pytest.mark.parametrize("lanes", [0, 1, 3, 16])
@pytest.mark.parametrize("dtype", FLOATS)
def test_arithmetic_of_floats(rng: np.random.Generator, dtype: Any, lanes: int) -> None:
    a, b = (numbers(rng, dtype, lanes) for _ in range(2))

    def compute(a: Any, b: Any) -> list[Any]:
        found = [each(*pair) for each in BINARY["floats"] for pair in ((a, b), (a, 2.5), (2.5, a))]
        return [*found, -a, llvm.sqrt(llvm.magnitude(a)), llvm.magnitude(a)]

    half = dtype(2.5)
    expected = [each(*pair) for each in BINARY["floats"] for pair in ((a, b), (a, half), (half, a))]
    for got, value in zip(applied(compute, a, b), [*expected, -a, np.sqrt(np.abs(a)), np.abs(a)], strict=True):
        assert_same(got, np.asarray(value))


@pytest.mark.parametrize("lanes", [0, 1, 3, 16])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_arithmetic_of_integers(rng: np.random.Generator, dtype: Any, lanes: int) -> None:
    """They wrap around. Division takes them for numbers that are not negative, as shifts do."""
    a, b = (numbers(rng, dtype, lanes) for _ in range(2))
    positive, shift = np.abs(a // 2), numbers(rng, dtype, lanes) & (8 * a.itemsize - 1)

    def compute(a: Any, b: Any, positive: Any, shift: Any) -> list[Any]:
        found = [each(*pair) for each in BINARY["integers"] for pair in ((a, b), (a, 5))]
        found += [5 + a, 5 - a, 5 * a, -a, positive // 7, positive % 7, positive // (shift + 1), positive % (shift + 1)]
        return [*found, a << shift, a >> shift, a >> 3]

    with np.errstate(over="ignore"):
        five, unsigned = dtype(5), a.view(f"u{a.itemsize}")
        expected = [each(*pair) for each in BINARY["integers"] for pair in ((a, b), (a, five))]
        expected += [five + a, five - a, five * a, -a, positive // dtype(7), positive % dtype(7)]
        expected += [positive // (shift + dtype(1)), positive % (shift + dtype(1)), a << shift]
        expected += [(unsigned >> shift.view(unsigned.dtype)), (unsigned >> unsigned.dtype.type(3))]
    for got, value in zip(applied(compute, a, b, positive, shift), expected, strict=True):
        assert_equal(got, np.asarray(value).view(dtype))


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS])
def test_comparisons(dtype: Any) -> None:
    """Integers have a sign. NaN makes all comparisons false, even the one for inequality."""
    some = [-3, 0, 2, *([-0.0, np.inf, np.nan] if dtype in FLOATS else [])]
    a, b = (each.ravel().astype(dtype) for each in np.meshgrid(some, some))
    relations = [operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne]

    def compute(a: Any, b: Any) -> list[Any]:
        found = [each(a, b) for each in relations]
        both = [found[1] & found[3], found[0] | found[2]]
        return [*found, *(~each for each in found), *both, *(each(a, 2) for each in relations)]

    ordered = ~(np.isnan(a.astype(float)) | np.isnan(b.astype(float)))
    expected = [each(a, b) & ordered for each in relations]
    expected = [*expected, *(~each for each in expected), (a == b) & ordered, (a != b) & ordered]
    expected += [each(a, 2) & ~np.isnan(a.astype(float)) for each in relations]
    for got, value in zip(applied(compute, a, b), expected, strict=True):
        assert_equal(got, value)


def test_choices_by_lane(rng: np.random.Generator) -> None:
    """Single numbers, Python's or compiled ones, take the lanes of the others."""
    a, b = rng.standard_normal((2, 8)).astype(np.float32)
    a[0], one = np.nan, np.float32(0.25)

    def compute(a: Any, b: Any, one: Any) -> list[Any]:
        return [
            llvm.where(a < b, a, b), llvm.where(a < b, 1, b), llvm.where(a < b, a, 0), llvm.where(one < 1, a, b),
            llvm.where(a < b, one, b), llvm.where(one > 1, a, one), llvm.least(a, b), llvm.most(a, b),
            llvm.least(a, one), llvm.most(one, b), llvm.least(a, -1), a + one, one - a, one * 2,
            llvm.where(a < b, one, 3),
        ]  # fmt: skip

    with np.errstate(invalid="ignore"):
        less = a < b
    expected = [
        np.where(less, a, b), np.where(less, 1, b), np.where(less, a, 0), a, np.where(less, one, b), np.full(8, one),
        np.where(less, a, b), np.where(a > b, a, b), np.where(a < one, a, one), np.where(one > b, one, b),
        np.where(a < -1, a, -1), a + one, one - a, one * 2, np.where(less, one, 3),
    ]  # fmt: skip
    for got, value in zip(applied(compute, a, b, one), expected, strict=True):
        assert_same(got, np.asarray(value, np.float32))


@pytest.mark.parametrize("dtype", FLOATS)
def test_fused_multiplication(rng: np.random.Generator, dtype: Any) -> None:
    """Rounded once or twice, as the processor has it; never otherwise."""
    a = rng.standard_normal(16).astype(dtype)
    c = (-a * a).astype(dtype)  # what is left is the rounding of the product
    once = (a.astype(np.longdouble) * a + c).astype(dtype)
    if dtype is np.float64:  # extended precision has too few digits: by exact fractions
        from fractions import Fraction

        once = np.array(
            [float(Fraction(x) * Fraction(x) + Fraction(y)) for x, y in zip(a.tolist(), c.tolist(), strict=True)]
        )
    fused, single, numbers_ = applied(
        lambda a, c: [llvm.fused(a, a, c), llvm.fused(a.lane(0), 2.0, c), llvm.fused(a, 0.5, -3.0)], a, c
    )
    assert (once != 0).any()
    assert ((fused == once) | (fused == 0)).all()
    assert len({*(fused[once != 0] == 0).tolist()}) == 1
    exact = a[0].astype(np.longdouble) * 2 + c
    assert_same(single, exact.astype(dtype))
    assert_same(numbers_, (a.astype(np.longdouble) / 2 - 3).astype(dtype))


@pytest.mark.parametrize("lanes", [1, 2, 16])
def test_sums_of_lanes(rng: np.random.Generator, lanes: int) -> None:
    """The upper half is added to the lower half, again and again: no other order has these bits."""
    order_shows = False
    while not order_shows:
        values = (10.0 ** rng.uniform(-3, 3, lanes) * rng.choice([-1, 1], lanes)).astype(np.float32)
        parts = {lanes: values}
        while (size := min(parts)) > 1:
            parts[size // 2] = parts[size][: size // 2] + parts[size][size // 2 :]
        order_shows = lanes < 16 or parts[1][0] != np.cumsum(values)[-1]
    found = applied(lambda a: [a.sum(), a.folded(1), a.folded(2), a.lane(0).sum()], values)
    for got, value in zip(found, (parts[1][0], parts[1], parts[min(lanes, 2)], values[0]), strict=True):
        assert_same(got, np.asarray(value))


def test_any(rng: np.random.Generator) -> None:
    for lanes in (1, 3, 16):
        for where in (None, 0, lanes - 1):
            values = np.zeros(lanes, np.int64)
            if where is not None:
                values[where] = 1
            assert applied(lambda a: [(a == 1).any(), (a.lane(0) == 1).any()], values) == [where is not None, values[0]]


def test_lanes_are_taken_and_put_together(rng: np.random.Generator) -> None:
    a, b = rng.integers(0, 1000, (2, 8))
    some = [3, 3, 15, 8, 0]

    def compute(a: Any, b: Any) -> list[Any]:
        return [a.part(2, 5), a.shuffled(b, some), a.lane(6), a.lane(1).splat(4), a.splat(8)]

    expected = [a[2:7], np.concatenate([a, b])[some], a[6], [a[1]] * 4, a]
    for got, value in zip(applied(compute, a, b), expected, strict=True):
        assert_equal(got, value, strict=False)
        assert got.shape == np.shape(value)


def test_conversions(rng: np.random.Generator) -> None:
    """Rounded to nearest, ties to even; from floats to integers cut off; of fewer bits without a sign."""
    wide = np.array([1 + 2.0**-24, 1 + 3 * 2.0**-24, -1e300, 1e-46, 3e-45, -0.0, np.inf, 2.5, -2.75, 1e10])
    whole = np.array([-(2**62) + 1, 2**24 + 1, -3, 2**31 - 1])
    short = np.array([-1, 5, -(2**15)], np.int16)

    def compute(wide: Any, whole: Any, short: Any) -> list[Any]:
        return [
            wide.to(llvm.FLOAT), wide.to(llvm.FLOAT).to(llvm.DOUBLE), wide.part(7, 3).to(llvm.INT),
            whole.to(llvm.FLOAT), whole.to(llvm.DOUBLE), whole.to(llvm.INT32), whole.to(llvm.INT), short.to(llvm.INT32),
            wide.to(llvm.FLOAT).bits(llvm.INT32), whole.bits(llvm.DOUBLE).bits(llvm.INT), whole.lane(2).to(llvm.DOUBLE),
        ]  # fmt: skip

    with np.errstate(over="ignore", under="ignore"):
        narrow = wide.astype(np.float32)
    expected = [
        narrow, narrow.astype(float), wide[7:].astype(np.int64), whole.astype(np.float32), whole.astype(float),
        whole.astype(np.int32), whole, short.view(np.uint16).astype(np.int32), narrow.view(np.int32), whole,
        np.float64(-3),
    ]  # fmt: skip
    for got, value in zip(applied(compute, wide, whole, short), expected, strict=True):
        assert_same(got, np.asarray(value))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_elements_are_widened_and_narrowed(rng: np.random.Generator, dtype: str) -> None:
    """All 16-bit numbers; and numbers beside them, in the middle between two, and beyond the largest."""
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    element, lanes = loops_places.ELEMENTS[dtype], 16
    computing = np.dtype(np.float64 if dtype == "float64" else np.float32)
    assert (element.size, element.computing_size) == (kind.itemsize, computing.itemsize)

    def write(code: Any, stored: Any, wide: Any, source: Any, target: Any, count: Any) -> None:
        with code.loop(0, count.of(llvm.INT).load(0), lanes) as i:
            wide.of(element.computing).store(i, element.widen(stored.of(element.stored).load(i, lanes)))
            target.of(element.stored).store(i, element.narrow(source.of(element.computing).load(i, lanes)))

    if kind.itemsize == 2:
        stored = np.arange(2**16, dtype=np.uint16).view(kind)
        values = stored.astype(computing).view(np.uint32)
        apart = 13 if dtype == "float16" else 16  # bits fewer
        least = {"float16": 2.0**-24, "bfloat16": 2.0**-133}[dtype]
        middles = np.float32(least) * (np.arange(2**10, dtype=np.float32) + np.float32(0.5))  # of denormal numbers
        near = [values + (each << (apart - 2)) + by for each in (1, 2, 3) for by in (0, 1, 2**32 - 1)]
        source = np.concatenate([*near, values]).astype(np.uint32).view(np.float32)
        source = np.concatenate([source, middles, -middles, np.nextafter(middles, np.float32(1))])
    else:
        stored = rng.integers(0, 256, (2**10, kind.itemsize), np.uint8).view(kind).ravel()
        source = stored.astype(computing)
    size = max(stored.size, -(-source.size // lanes) * lanes)
    stored, source = np.resize(stored, size), np.resize(source, size)
    wide, target = np.empty(size, computing), np.empty(size, kind)
    compiled(write, 5)(stored, wide, source, target, np.array([size]))
    with np.errstate(all="ignore"):
        for got, value in ((wide, stored.astype(computing)), (target, source.astype(kind))):
            plain = ~np.isnan(value.astype(np.float64))
            assert_same(got[plain], value[plain])
            assert np.isnan(got[~plain].astype(np.float64)).all()


def test_loops_and_cases() -> None:
    """Loops from and to any number, in steps, within each other; what leaves a loop leaves the innermost."""

    def write(code: Any, target: Any) -> None:
        target = target.of(llvm.INT)
        at = code.variable(code.integer(0))

        def note(value: Any) -> None:
            target.store(at.get(), code.integer(value))
            at.add(1)

        with code.loop(2, 9, 3) as i:
            note(i)
        with code.loop(5, 5):
            note(-1)
        with code.loop(5, code.integer(-2)):
            note(-1)
        with code.loop(0, 3) as i, code.loop(i, 3) as j:
            note(i * 10 + j)
        with code.loop(0, 3) as i, code.forever():
            note(i + 100)
            with code.loop(0, 9) as j:
                code.leave_if(j > i)
                note(j + 200)
            code.leave_if(at.get() > 20)
        with code.loop(0, 4) as i, code.choice(i % 2 == 0) as (even, odd):
            with even:
                note(i + 300)
            with odd, code.when(i > 1):
                note(i + 400)

    expected = [2, 5, 8, 0, 1, 2, 11, 12, 22]
    for i in range(3):
        while True:
            expected += [i + 100, *(j + 200 for j in range(i + 1))]
            if len(expected) > 20:
                break
    expected += [300, 302, 403]
    target = np.full(64, -7)
    compiled(write, 1)(target)
    assert target.tolist() == expected + [-7] * (64 - len(expected))


def test_variables_are_changed(rng: np.random.Generator) -> None:
    """Single numbers and vectors, by Python's numbers too."""
    values = rng.standard_normal(8).astype(np.float32)

    def compute(code: Any, values: Any) -> list[Any]:
        total, count = code.variable(values), code.variable(code.integer(3))
        with code.loop(0, 5):
            total.add(values)
            count.add(2)
        other = code.variable(values)
        other.set(1.5)
        third = code.variable(values)
        third.set(values.lane(3))
        return [total.get(), count.get(), other.get(), third.get()]

    expected: Any = values.copy()
    for _ in range(5):
        expected = expected + values
    found = applied(compute, values, code=True)
    for got, value in zip(found, (expected, 13, [1.5] * 8, [values[3]] * 8), strict=True):
        assert_equal(got, value)


def test_constants() -> None:
    def compute(code: Any) -> list[Any]:
        vector = code.number(llvm.vector(llvm.FLOAT, 4), 2.5)
        return [
            code.integer(-5),
            vector,
            code.number(llvm.DOUBLE, 3),
            code.numbers(llvm.INT32, range(5)),
            vector.constant(7),
        ]

    found = applied(compute, code=True)
    for got, value in zip(found, (-5, [2.5] * 4, 3.0, range(5), [7.0] * 4), strict=True):
        assert_equal(got, value)


def test_memory(rng: np.random.Generator) -> None:
    """Elements and vectors at any offset, in elements of the type at hand; nothing beside them is written."""
    source = rng.standard_normal(64).astype(np.float32)

    def write(code: Any, source: Any, target: Any, addresses: Any) -> None:
        a, b = source.of(llvm.FLOAT), target.of(llvm.FLOAT)
        b.store(0, a.load(5))
        b.store(code.integer(1), a.at(3).at(code.integer(2)).load(-4, 5))
        b.at(8).store(0, 1.5)
        b.of(llvm.DOUBLE).store(5, a.load(0).to(llvm.DOUBLE))
        b.of(llvm.INT16).store(26, 3)
        again = code.memory(b.at(16).address(), llvm.FLOAT)
        again.store(-1, a.load(7))
        room = code.room(llvm.FLOAT, 9)
        code.fill(room, 9, a.load(1))
        room.store(4, a.load(2, 3))
        b.store(20, room.load(1, 8))
        a.prefetch(2**40)  # nobody's memory
        addresses.of(llvm.INT).store(0, room.address())
        addresses.of(llvm.INT).store(1, source.address())

    target, addresses = np.full(32, 7, np.float32), np.zeros(2, np.int64)
    compiled(write, 3)(source, target, addresses)
    expected = np.full(32, 7, np.float32)
    expected[0], expected[1:6], expected[8], expected[15] = source[5], source[1:6], 1.5, source[7]
    expected[10:12] = np.array([source[0]], np.float64).view(np.float32)
    expected.view(np.int16)[26] = 3
    expected[20:28] = [source[1]] * 3 + [*source[2:5]] + [source[1]] * 2
    assert_same(target, expected)
    assert addresses[0] % 64 == 0 and addresses[1] == source.ctypes.data


def test_stores_past_the_caches(rng: np.random.Generator) -> None:
    """They need whole cache lines, and write the same."""
    memory = np.zeros(64, np.float32)
    first = -memory.ctypes.data // 4 % 16
    values = rng.standard_normal(16).astype(np.float32)
    compiled(lambda code, a, b: b.of(llvm.FLOAT).store(0, a.of(llvm.FLOAT).load(0, 16), streams=True), 2)(
        values, memory[first:]
    )
    assert_same(memory[first : first + 16], values)
    assert np.count_nonzero(memory) == 16

    def module(made: Any) -> None:
        with made.function("test", llvm.MEMORY, exported=True) as (code, a):
            a.of(llvm.FLOAT).store(0, code.number(llvm.vector(llvm.FLOAT, 16), 1), streams=True)
            assert "nontemporal" in str(made.module)

    assert llvm_machine.emit(module)


def test_atomic_changes() -> None:
    def write(code: Any, array: Any, old: Any) -> None:
        array, old = array.of(llvm.INT), old.of(llvm.INT)
        old.store(0, array.atomic("add", 1, 5))
        old.store(1, array.atomic("add", code.integer(1), code.integer(-2)))
        old.store(2, array.atomic("xchg", 0, 9))

    array, old = np.array([3, 40]), np.zeros(3, np.int64)
    compiled(write, 2)(array, old)
    assert (array.tolist(), old.tolist()) == ([9, 43], [40, 45, 3])


def test_functions_call_each_other() -> None:
    """Those of the module, with results, and those that are only known by an address."""
    seen: list[Any] = []
    address, step = python_step(lambda _, *given: seen.append(given))

    def module(made: Any) -> None:
        with made.function("plus", llvm.INT, llvm.MEMORY, returns=llvm.INT) as (code, a, memory):
            code.builder.ret((a + memory.of(llvm.INT).load(0)).value)
            plus = code.function
        with made.function("test", llvm.MEMORY, llvm.INT, exported=True) as (code, memory, address):
            memory.of(llvm.INT).store(1, code.call(plus, 30, memory))
            code.call(address, memory, code.integer(4), 5, 0)

    (found,) = emitted(module, ["test"])
    numbers_ = np.array([12, 0])
    ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(found)(numbers_.ctypes.data, address)
    assert step is not None
    assert numbers_[1] == 42
    assert seen == [(4, 5, 0)]


def test_values_have_no_truth() -> None:
    """Python's `if`, `and`, `or`, `in` and comparisons in chains would choose while the code is written."""

    def module(made: Any) -> None:
        with made.function("test", llvm.INT, exported=True) as (code, a):
            for wrong in (
                lambda: bool(a), lambda: a if a > 0 else -a, lambda: a > 0 and a < 3, lambda: 0 < a < 3,
                lambda: not a, lambda: a in [code.integer(3)], lambda: max(a, code.integer(3)),
            ):  # fmt: skip
                with pytest.raises(TypeError, match="known when the compiled code runs"):
                    wrong()
            with pytest.raises(TypeError, match="unhashable"):
                hash(a)

    assert llvm_machine.emit(module)
