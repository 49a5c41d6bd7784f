"""A small language for compiled loops: Python functions write LLVM instructions through values with operators.

A function of a module is written by Python code that runs once. Its loops and branches over `Value`s become those of
the compiled function; Python's own loops and branches choose what is written:

    with module.function("double", MEMORY, INT) as (code, array, count):
        numbers = array.of(FLOAT)
        with code.loop(0, count, 4) as i:
            numbers.store(i, numbers.load(i, 4) * 2)

Integers have 64 bits and are signed. Vectors have a fixed number of lanes, the same on every machine: LLVM takes them
apart for the registers that there are. So the order of a sum does not depend on the machine. Only `fused` does: it is
one instruction with one rounding where the processor has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir

INT, INT32, INT16, INT8, BIT = (ir.IntType(bits) for bits in (64, 32, 16, 8, 1))
FLOAT, DOUBLE, HALF = ir.FloatType(), ir.DoubleType(), ir.HalfType()
MEMORY = ir.PointerType()


def element_of(kind: Any) -> Any:
    """Return the type of a vector's lanes; another type itself."""
    return kind.element if isinstance(kind, ir.VectorType) else kind


def lanes_of(kind: Any) -> int:
    """Return the number of a vector type's lanes; 0 for other types."""
    return kind.count if isinstance(kind, ir.VectorType) else 0


def vector(kind: Any, lanes: int) -> Any:
    """Return the type of a vector; with 0 lanes, the type itself."""
    return ir.VectorType(kind, lanes) if lanes else kind


def _is_float(kind: Any) -> bool:
    return isinstance(element_of(kind), (ir.FloatType, ir.DoubleType, ir.HalfType))


class Value:
    """A number, or a vector of numbers, in a compiled function. Operators and methods write instructions.

    Python numbers take the type of the other operand, and single numbers the lanes of a vector.
    """

    __slots__ = ("builder", "value")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, builder: ir.IRBuilder, value: Any):
        self.builder, self.value = builder, value

    @property
    def kind(self) -> Any:
        return self.value.type

    @property
    def lanes(self) -> int:
        return lanes_of(self.kind)

    def constant(self, number: Any, kind: Any = None) -> Value:
        """Return a constant of this value's type, or of another."""
        kind = kind or self.kind
        lanes = lanes_of(kind)
        return Value(self.builder, ir.Constant(kind, [number] * lanes if lanes else number))

    def splat(self, lanes: int) -> Value:
        """Return a vector of equal lanes."""
        if not lanes or self.lanes:
            return self
        kind = vector(self.kind, lanes)
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), self.value, ir.Constant(INT32, 0))
        zeros = ir.Constant(vector(INT32, lanes), [0] * lanes)
        return Value(self.builder, self.builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros))

    def pair(self, other: Any) -> tuple[Value, Value]:
        """Return this value and another with the same type."""
        if not isinstance(other, Value):
            return self, self.constant(other)
        return self.splat(other.lanes), other.splat(self.lanes)

    def _apply(self, other: Any, for_floats: str, for_ints: str, swapped: bool = False) -> Value:
        a, b = self.pair(other)
        if swapped:
            a, b = b, a
        write = getattr(self.builder, for_floats if _is_float(a.kind) else for_ints)
        return Value(self.builder, write(a.value, b.value))

    def __add__(self, other: Any) -> Value:
        return self._apply(other, "fadd", "add")

    def __radd__(self, other: Any) -> Value:
        return self._apply(other, "fadd", "add")

    def __sub__(self, other: Any) -> Value:
        return self._apply(other, "fsub", "sub")

    def __rsub__(self, other: Any) -> Value:
        return self._apply(other, "fsub", "sub", swapped=True)

    def __mul__(self, other: Any) -> Value:
        return self._apply(other, "fmul", "mul")

    def __rmul__(self, other: Any) -> Value:
        return self._apply(other, "fmul", "mul")

    def __truediv__(self, other: Any) -> Value:
        return self._apply(other, "fdiv", "fdiv")

    def __rtruediv__(self, other: Any) -> Value:
        return self._apply(other, "fdiv", "fdiv", swapped=True)

    def __floordiv__(self, other: Any) -> Value:
        """Divide integers that are not negative."""
        return self._apply(other, "udiv", "udiv")

    def __mod__(self, other: Any) -> Value:
        return self._apply(other, "urem", "urem")

    def __and__(self, other: Any) -> Value:
        return self._apply(other, "and_", "and_")

    def __or__(self, other: Any) -> Value:
        return self._apply(other, "or_", "or_")

    def __lshift__(self, other: Any) -> Value:
        return self._apply(other, "shl", "shl")

    def __rshift__(self, other: Any) -> Value:
        return self._apply(other, "lshr", "lshr")

    def __neg__(self) -> Value:
        if _is_float(self.kind):
            return Value(self.builder, self.builder.fneg(self.value))
        return 0 - self

    def _compare(self, other: Any, relation: str) -> Value:
        a, b = self.pair(other)
        compare = self.builder.fcmp_ordered if _is_float(a.kind) else self.builder.icmp_signed
        return Value(self.builder, compare(relation, a.value, b.value))

    def __lt__(self, other: Any) -> Value:
        return self._compare(other, "<")

    def __le__(self, other: Any) -> Value:
        return self._compare(other, "<=")

    def __gt__(self, other: Any) -> Value:
        return self._compare(other, ">")

    def __ge__(self, other: Any) -> Value:
        return self._compare(other, ">=")

    def __eq__(self, other: Any) -> Value:  # type: ignore[override]
        return self._compare(other, "==")

    def __ne__(self, other: Any) -> Value:  # type: ignore[override]
        return self._compare(other, "!=")

    def __invert__(self) -> Value:
        """Negate a condition: NaN makes all comparisons false, so x > y is not the negation of x <= y."""
        return Value(self.builder, self.builder.not_(self.value))

    def __bool__(self) -> bool:
        raise TypeError("a Value is known when the compiled code runs: use where(...) or code.when(...)")

    def to(self, kind: Any) -> Value:
        """Convert numbers to another type, rounding to nearest; floats to integers by cutting off."""
        source, target = element_of(self.kind), element_of(kind)
        if source == target:
            return self
        sizes = [_size(each) if _is_float(each) else 0 for each in (source, target)]
        if all(sizes):
            write = self.builder.fpext if sizes[0] < sizes[1] else self.builder.fptrunc
        elif sizes[1]:
            write = self.builder.sitofp
        elif sizes[0]:
            write = self.builder.fptosi
        else:
            write = self.builder.zext if source.width < target.width else self.builder.trunc
        return Value(self.builder, write(self.value, vector(target, self.lanes)))

    def extended(self, kind: Any) -> Value:
        """Convert integers to a longer type, with their sign."""
        return Value(self.builder, self.builder.sext(self.value, vector(kind, self.lanes)))

    def bits(self, kind: Any) -> Value:
        """Reinterpret numbers as another type of the same size."""
        return Value(self.builder, self.builder.bitcast(self.value, vector(element_of(kind), self.lanes)))

    def part(self, first: int, count: int) -> Value:
        """Return some neighbouring lanes."""
        return self.shuffled(self, range(first, first + count))

    def shuffled(self, other: Value, lanes: Sequence[int]) -> Value:
        """Return a vector of lanes of this vector and another, whose lanes are numbered on from this one's."""
        mask = ir.Constant(vector(INT32, len(lanes)), list(lanes))
        return Value(self.builder, self.builder.shuffle_vector(self.value, other.value, mask))

    def lane(self, number: int) -> Value:
        return Value(self.builder, self.builder.extract_element(self.value, ir.Constant(INT, number)))

    def folded(self, lanes: int) -> Value:
        """Add the upper half of the lanes to the lower half until so many are left."""
        value = self
        while value.lanes > lanes:
            half = value.lanes // 2
            value = value.part(0, half) + value.part(half, half)
        return value

    def sum(self) -> Value:
        """Return the sum of all lanes, in the order of `folded`."""
        return self.folded(1).lane(0) if self.lanes else self

    def any(self) -> Value:
        """Return whether any lane of a condition is true."""
        if not self.lanes:
            return self
        packed = self.builder.bitcast(self.value, ir.IntType(self.lanes))
        return Value(self.builder, self.builder.icmp_unsigned("!=", packed, ir.Constant(packed.type, 0)))


def _intrinsic(name: str, *values: Value) -> Value:
    builder, kind = values[0].builder, values[0].kind
    suffix = f"v{lanes_of(kind)}" if lanes_of(kind) else ""
    name += f".{suffix}{'f32' if element_of(kind) == FLOAT else 'f64'}"
    function = _declared(builder, name, kind, [each.kind for each in values])
    return Value(builder, builder.call(function, [each.value for each in values]))


def _declared(builder: ir.IRBuilder, name: str, returns: Any, kinds: Sequence[Any]) -> Any:
    """Return one of LLVM's own functions."""
    module = builder.module
    return module.globals.get(name) or ir.Function(module, ir.FunctionType(returns, kinds), name)


def fused(a: Value, b: Any, c: Any) -> Value:
    """Return a * b + c, with one rounding where the processor has an instruction for it."""
    a, b = a.pair(b)
    a, c = a.pair(c)
    return _intrinsic("llvm.fmuladd", a, a.pair(b)[1], c)


def sqrt(a: Value) -> Value:
    return _intrinsic("llvm.sqrt", a)


def magnitude(a: Value) -> Value:
    """Return |a| of floats."""
    return _intrinsic("llvm.fabs", a)


def joined(parts: Sequence[Value]) -> Value:
    """Return a vector of the lanes of several equally long ones, a power of two of them."""
    values = [*parts]
    while len(values) > 1:
        values = [a.shuffled(b, range(2 * a.lanes)) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def where(condition: Value, a: Any, b: Any) -> Value:
    """Return a where the condition is true, else b, lane by lane; both are computed."""
    a, b = a.pair(b) if isinstance(a, Value) else b.pair(a)[::-1]
    lanes = max(condition.lanes, a.lanes)
    a, b, condition = a.splat(lanes), b.splat(lanes), condition.splat(lanes)
    return Value(a.builder, a.builder.select(condition.value, a.value, b.value))


def least(a: Value, b: Any) -> Value:
    a, b = a.pair(b)
    return where(a < b, a, b)


def most(a: Value, b: Any) -> Value:
    a, b = a.pair(b)
    return where(a > b, a, b)


def _size(kind: Any) -> int:
    """Return the bytes of an element."""
    return {HALF: 2, FLOAT: 4, DOUBLE: 8}.get(kind) or kind.width // 8


class Memory:
    """Memory from an address on, as elements of one type. Indices and offsets are in elements."""

    __slots__ = ("builder", "kind", "pointer")

    def __init__(self, builder: ir.IRBuilder, pointer: Any, kind: Any = None):
        self.builder, self.pointer, self.kind = builder, pointer, kind

    @property
    def size(self) -> int:
        """Return the bytes of an element."""
        return _size(self.kind)

    def of(self, kind: Any) -> Memory:
        """Return the same memory as elements of another type."""
        return Memory(self.builder, self.pointer, kind)

    def at(self, offset: Any) -> Memory:
        """Return the memory from an element on."""
        index = offset.value if isinstance(offset, Value) else ir.Constant(INT, offset)
        pointer = self.builder.gep(self.pointer, [index], source_etype=self.kind)
        return Memory(self.builder, pointer, self.kind)

    def load(self, index: Any, lanes: int = 0) -> Value:
        """Return an element, or several from it on."""
        kind = vector(self.kind, lanes)
        return Value(self.builder, self.builder.load(self.at(index).pointer, typ=kind, align=_size(self.kind)))

    def store(self, index: Any, value: Any, *, streams: bool = False) -> None:
        """Store a value from an element on; if it streams, to whole cache lines and past the caches."""
        if not isinstance(value, Value):
            value = Value(self.builder, ir.Constant(self.kind, value))
        align = 64 if streams else _size(self.kind)
        store = self.builder.store(value.value, self.at(index).pointer, align=align)
        if streams:
            store.set_metadata("nontemporal", self.builder.module.add_metadata([INT32(1)]))

    def prefetch(self, index: Any, *, writes: bool = False, soon: bool = True) -> None:
        """Prefetch the cache line of an element, to write it or to read it. The address need not be valid.

        soon: into the L1 cache, too, not the L2 cache alone.
        """
        function = _declared(self.builder, "llvm.prefetch.p0", ir.VoidType(), [MEMORY, INT32, INT32, INT32])
        self.builder.call(function, [self.at(index).pointer, INT32(int(writes)), INT32(3 if soon else 2), INT32(1)])

    def address(self) -> Value:
        return Value(self.builder, self.builder.ptrtoint(self.pointer, INT))

    def atomic(self, operation: str, index: Any, value: Any) -> Value:
        """Change an integer at once, by "add" or "xchg", and return the old one."""
        value = value.value if isinstance(value, Value) else ir.Constant(INT, value)
        return Value(self.builder, self.builder.atomic_rmw(operation, self.at(index).pointer, value, "seq_cst"))


def _room(builder: ir.IRBuilder, kind: Any, align: int | None = None) -> Any:
    """Return a pointer to memory on the stack."""
    with builder.goto_entry_block():
        room = builder.alloca(kind)
        room.align = align
        room.type = MEMORY
    return room


class Variable:
    """A value that changes."""

    def __init__(self, builder: ir.IRBuilder, initial: Value):
        self.builder = builder
        self.place, self.kind = _room(builder, initial.kind), initial.kind
        self.set(initial)

    def get(self) -> Value:
        return Value(self.builder, self.builder.load(self.place, typ=self.kind))

    def set(self, value: Any) -> None:
        value = self.get().pair(value)[1] if not isinstance(value, Value) or not value.lanes else value
        self.builder.store(value.value, self.place)

    def add(self, value: Any) -> None:
        self.set(self.get() + value)


class Code:
    """The code of a function that is being written."""

    def __init__(self, builder: ir.IRBuilder):
        self.builder = builder
        self._ends: list[Any] = []  # of the loops around the present place

    def integer(self, number: Any) -> Value:
        return number if isinstance(number, Value) else Value(self.builder, ir.Constant(INT, number))

    def number(self, kind: Any, number: Any) -> Value:
        """Return a constant; of a vector type, with equal lanes."""
        return self.integer(0).constant(number, kind)

    def numbers(self, kind: Any, numbers: Sequence[Any]) -> Value:
        """Return a constant vector."""
        return Value(self.builder, ir.Constant(vector(kind, len(numbers)), list(numbers)))

    def variable(self, initial: Value) -> Variable:
        return Variable(self.builder, initial)

    def memory(self, address: Value, kind: Any) -> Memory:
        return Memory(self.builder, self.builder.inttoptr(address.value, MEMORY), kind)

    def room(self, kind: Any, count: int) -> Memory:
        """Return memory on the stack, aligned to a cache line, with undefined contents."""
        return Memory(self.builder, _room(self.builder, ir.ArrayType(kind, count), 64), kind)

    def fill(self, memory: Memory, count: Any, value: Value) -> None:
        with self.loop(0, count) as i:
            memory.store(i, value)

    @contextmanager
    def loop(self, first: Any, last: Any, step: int = 1) -> Iterator[Value]:
        """Count from first on while less than last."""
        builder = self.builder
        first, last = self.integer(first), self.integer(last)
        test, body, after, end = (builder.append_basic_block(name) for name in ("test", "body", "next", "end"))
        before = builder.block
        builder.branch(test)
        builder.position_at_end(test)
        index = builder.phi(INT)
        index.add_incoming(first.value, before)
        i = Value(builder, index)
        builder.cbranch((i < last).value, body, end)
        builder.position_at_end(body)
        self._ends.append(end)
        yield i
        self._ends.pop()
        builder.branch(after)
        builder.position_at_end(after)
        index.add_incoming((i + step).value, after)
        builder.branch(test)
        builder.position_at_end(end)

    @contextmanager
    def forever(self) -> Iterator[None]:
        """Repeat until `leave_if` leaves the loop."""
        builder = self.builder
        body, end = builder.append_basic_block("forever"), builder.append_basic_block("end")
        builder.branch(body)
        builder.position_at_end(body)
        self._ends.append(end)
        yield
        self._ends.pop()
        builder.branch(body)
        builder.position_at_end(end)

    def leave_if(self, condition: Value) -> None:
        """Leave the innermost loop."""
        after = self.builder.append_basic_block("stay")
        self.builder.cbranch(condition.value, self._ends[-1], after)
        self.builder.position_at_end(after)

    @contextmanager
    def when(self, condition: Value, likely: bool | None = None) -> Iterator[None]:
        with self.builder.if_then(condition.value, likely):
            yield

    @contextmanager
    def choice(self, condition: Value) -> Iterator[tuple[Any, Any]]:
        """Yield two contexts, for the code of either case."""
        with self.builder.if_else(condition.value) as cases:
            yield cases

    def call(self, function: Any, *arguments: Any) -> Value:
        """Call a function: one of this module, or an address together with its arguments' types."""
        values = [self.integer(each).value if isinstance(each, (int, Value)) else each.pointer for each in arguments]
        if isinstance(function, Value):
            kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
            function = self.builder.inttoptr(function.value, kind.as_pointer())
        return Value(self.builder, self.builder.call(function, values))


class Module:
    """Functions that are compiled together."""

    def __init__(self) -> None:
        self.module = ir.Module("cupynorm")

    @contextmanager
    def function(
        self, name: str, *kinds: Any, returns: Any = None, exported: bool = False
    ) -> Iterator[Any]:  # (code, *arguments)
        """Write a function. Exported ones have an address outside."""
        function = ir.Function(self.module, ir.FunctionType(returns or ir.VoidType(), kinds), name)
        function.linkage = "" if exported else "internal"
        if not exported:
            function.attributes.add("noinline")
        builder = ir.IRBuilder(function.append_basic_block("entry"))
        start = function.append_basic_block("start")
        builder.position_at_end(start)
        code = Code(builder)
        arguments = [
            Memory(builder, each) if each.type == MEMORY else Value(builder, each) for each in function.args
        ]  # fmt: skip
        code.function = function  # type: ignore[attr-defined]
        yield (code, *arguments)
        if returns is None:
            builder.ret_void()
        with builder.goto_block(function.entry_basic_block):
            builder.branch(start)
