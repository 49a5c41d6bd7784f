"""What the compiled loops have in common: a call's numbers, planes and their coefficients, tiles, runs and rows.

A step of a call is a function (call, first, last, follows) over items, which are tiles of blocks: it gets the address
of the call's numbers. In the loops an array is all memory from its first element on, and an offset is in elements.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from .llvm import (
    DOUBLE,
    FLOAT,
    HALF,
    INT,
    INT8,
    INT16,
    INT32,
    Code,
    Memory,
    Value,
    Variable,
    fused,
    least,
    most,
    vector,
    where,
)

#: A call's arrays, in the order of blocking.Arrays.
ARRAYS = ("x", "result", "dy", "residual", "dresidual", "mask")
RESULTS = 1, 4  # which of these a call writes, counted from 0

PARTIAL = 512  # elements summed in computing precision; these sums are added in float64
AHEAD = 8192  # bytes by which prefetching is ahead, even beyond the end of a plane
LINE = 64  # bytes of a cache line
WIDEST_GROUP = 512  # channels side by side that a step can process together

#: How planes are cut. A block is a plane, or a group of channels side by side; a run is contiguous.
GEOMETRY = (
    "channels", "group",  # channels per block
    "tiles",  # per block
    "runs", "length",  # runs per plane, elements of a run
    "tile_runs", "tile_length",  # the same of a tile; the last tiles may be smaller
    "plane",  # elements of a plane
    "sums",  # where the partial sums of a tile begin, if planes are copied to windows; else 0
    "run_table",  # address of the offsets of the runs of each array, (6, runs)
    "counts",  # address of the number of elements of each tile
    *(f"{array}_{axis}" for array in ARRAYS for axis in ("n", "c", "p")),  # strides over samples, channels, positions
)  # fmt: skip
#: What the calls of a kind have in common, each with its kind: q an integer, d a float64.
OPTIONS = {
    "weight_n": "q", "weight_c": "q", "bias_n": "q", "bias_c": "q",  # strides over samples and channels
    "rstd_at": "q", "mean_lo_at": "q",  # bytes from mean's address
    "spread": "q",  # elements of one of the partial sums
    "wide": "q",  # 1 if sum_g and sum_g_xhat are float64
    "eps": "d", "eps_beside": "d", "floor": "d", "count_ratio": "d", "ddof": "d",  # see rstd_of
    "least": "d",  # see least_mean_square
    "reduce": "q", "join": "q", "apply": "q", "whole": "q",  # addresses of steps
}  # fmt: skip
#: The numbers of a call: a is an array's place, the address of its address. An array object in Python has its data's
#: address in itself: it is quicker to leave looking there to the loops.
CALL = {
    "geometry": "q", "options": "q",  # their addresses
    **{array: "a" for array in ARRAYS},  # an absent one is x, and not accessed
    "weight": "a", "bias": "a",
    "mean": "a",  # (N, C); rstd and mean_lo are in the same memory
    "variance": "a",  # (N, C); the address is 0 if it is not wanted
    "partials": "a",  # partial sums, (sums, items, group)
    "sum_g": "a", "sum_g_xhat": "a",  # (N, C)
    "slopes": "a",  # (N, C), rstd_slope of a backward; not read if a Kind has none
    "count": "a",  # (N, C), the positions of planes with a mask: int64, of a backward in computing precision
    "streams": "q",  # 1 if results bypass the caches
    "slope": "d",  # negative_slope
}  # fmt: skip
FORMAT, OPTIONS_FORMAT = (
    struct.Struct("=" + "".join(numbers.values()).replace("a", "q")) for numbers in (CALL, OPTIONS)
)


class Element(NamedTuple):
    """How elements of a dtype are stored, and the type in which they compute."""

    stored: Any
    computing: Any
    size: int  # bytes
    form: str = "float"  # or "bfloat16", "unsigned", "signed"

    @property
    def computing_size(self) -> int:
        return 8 if self.computing == DOUBLE else 4

    def widen(self, value: Value) -> Value:
        """Convert stored elements to computing precision."""
        if self.form == "bfloat16":
            value = (value.to(INT32) << 16).bits(FLOAT)
        elif self.form == "unsigned":
            value = value.to(INT32)
        elif self.form == "signed":
            value = value.extended(INT32)
        elif self.stored == HALF:  # processors have no instruction between float16 and float64
            value = value.to(FLOAT)
        return value.to(self.computing)

    def narrow(self, value: Value) -> Value:
        """Round values to stored elements (to nearest, ties to even)."""
        if self.stored in (FLOAT, DOUBLE):
            return value.to(self.stored)
        value = value.to(FLOAT)
        if self.stored == HALF:
            return value.to(HALF)
        bits = value.bits(INT32)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        return (where(value == value, rounded, bits | 0x400000) >> 16).to(INT16)  # noqa: PLR0124  # NaN


ELEMENTS = {
    "float16": Element(HALF, FLOAT, 2),
    "bfloat16": Element(INT16, FLOAT, 2, "bfloat16"),
    "float32": Element(FLOAT, FLOAT, 4),
    "float64": Element(DOUBLE, DOUBLE, 8),
    "uint8": Element(INT8, FLOAT, 1, "unsigned"),
    "int8": Element(INT8, FLOAT, 1, "signed"),
    "uint16": Element(INT16, FLOAT, 2, "unsigned"),
    "int16": Element(INT16, FLOAT, 2, "signed"),
}


class Kind(NamedTuple):
    """What loops are compiled for."""

    dtype: str  # of all arrays, or of all but x
    lanes: int  # elements of a vector: no more than a run of a tile, or the channels of a group, has
    channels_last: bool = False
    activation: str | None = None
    residual: bool = False
    training: bool = False  # whether a backward's statistics are the input's own
    sloped: bool = False  # whether a backward has slopes, since its forward had other conventions
    input: str = ""  # the dtype of x, if it is another
    masked: str = ""  # with a mask "plane", or "channel" if channels side by side have different ones

    @property
    def element(self) -> Element:
        """The elements of all arrays but x."""
        return ELEMENTS[self.dtype]._replace(computing=self._computing)

    @property
    def ahead(self) -> int:
        """Elements by which prefetching is ahead, of any array; of x if its dtype is that of the others."""
        return AHEAD // self.element.size

    @property
    def source(self) -> Element:
        """The elements of x."""
        return ELEMENTS[self.input or self.dtype]._replace(computing=self._computing)

    @property
    def _computing(self) -> Any:
        return DOUBLE if "float64" in (self.dtype, self.input) else FLOAT

    def element_of(self, name: str) -> Element:
        """Return the elements of one of ARRAYS."""
        return self.source if name == "x" else ELEMENTS["uint8"] if name == "mask" else self.element


class Numbers:
    """A call's numbers, its options and its geometry's numbers, as attributes."""

    def __init__(self, code: Code, call: Memory, kind: Any):  # a Kind, or None where no array is read
        self.code, self.kind = code, kind
        self._read(call, CALL)
        self._read(code.memory(self.options, INT), OPTIONS)
        self.rstd, self.mean_lo = self.mean + self.rstd_at, self.mean + self.mean_lo_at
        geometry = code.memory(self.geometry, INT)
        for i, name in enumerate(GEOMETRY):
            setattr(self, name, geometry.load(i))

    def _read(self, memory: Memory, names: dict[str, str]) -> None:
        for i, (name, form) in enumerate(names.items()):
            value = memory.of(DOUBLE if form == "d" else INT).load(i)
            setattr(self, name, self.code.memory(value, INT).load(0) if form == "a" else value)

    def __getattr__(self, name: str) -> Any:  # for the type checker
        raise AttributeError(name)

    def array(self, name: str) -> Memory:
        return self.code.memory(getattr(self, name), self.kind.element_of(name).stored)

    def of_planes(self, name: str) -> Memory:
        """Return an array of a number for each plane or channel, in computing precision."""
        return self.code.memory(getattr(self, name), self.kind.element.computing)

    def runs_of(self, name: str) -> Memory:
        """Return the offsets of an array's runs within a plane."""
        return self.code.memory(self.run_table, INT).at(self.runs * ARRAYS.index(name))

    def start(self, name: str, n: Value, c: Value) -> Value:
        """Return the offset of a plane, or of a channel, in an array."""
        return n * getattr(self, f"{name}_n") + c * getattr(self, f"{name}_c")

    def run(self, name: str, n: Value, c: Value, r: Value) -> Memory:
        """Return a run of a plane, or of the first of channels side by side."""
        return self.array(name).at(self.start(name, n, c) + self.runs_of(name).load(r))

    def sums_of(self, number: int) -> Memory:
        """Return one of the partial sums of all items."""
        return self.code.memory(self.partials, DOUBLE).at(self.spread * number)


def counts_at(kind: Kind, mask: Memory, i: Value) -> Value:
    """Return which of the elements at i count: of a row, or of channels side by side at the position of `mask`."""
    lanes = 0 if kind.channels_last and kind.masked == "plane" else kind.lanes
    return mask.load(i if lanes else 0, lanes) != 0


class Tile(NamedTuple):
    """The ranges of a tile's runs and of its positions in a run, and its number of elements."""

    r0: Value
    r1: Value
    l0: Value
    l1: Value
    size: Value

    @property
    def length(self) -> Value:
        """The elements of each of its runs."""
        return self.l1 - self.l0


def tile_of(numbers: Numbers, tile: Value) -> Tile:
    runs, length = numbers.runs, numbers.length
    along = (length + numbers.tile_length - 1) // numbers.tile_length
    r0 = tile // along * numbers.tile_runs
    l0 = tile % along * numbers.tile_length
    r1, l1 = least(r0 + numbers.tile_runs, runs), least(l0 + numbers.tile_length, length)
    return Tile(r0, r1, l0, l1, (r1 - r0) * (l1 - l0))


class Item(NamedTuple):
    """A tile of a block: the sample, the first channel, the number of channels, the number of the tile."""

    number: Value
    n: Value
    c: Value
    width: Value
    tile: Value


@contextmanager
def each_item(numbers: Numbers, first: Value, last: Value, *, tiles_backwards: bool = False) -> Iterator[Item]:
    """Go through items.

    tiles_backwards: begin with the last one, which is still in the cache if items are tiles. Whole planes, which the
    hardware prefetches, come in the order of memory.
    """
    groups = (numbers.channels + numbers.group - 1) // numbers.group
    with numbers.code.loop(first, last) as i:
        number = where(numbers.tiles > 1, first + last - 1 - i, i) if tiles_backwards else i
        block = number // numbers.tiles
        n = block // groups
        c = (block - n * groups) * numbers.group
        width = least(numbers.group, numbers.channels - c)
        yield Item(number, n, c, width, number - block * numbers.tiles)


@contextmanager
def each_channel(numbers: Numbers, first: Value, last: Value) -> Iterator[tuple[Value, Value, Value]]:
    """Go through the channels of blocks: where the sums of the first tile are, the sample and the channel."""
    code, group = numbers.code, numbers.group
    groups = (numbers.channels + group - 1) // group
    with code.loop(first, last) as block:
        n = block // groups
        c = (block - n * groups) * group
        with code.loop(0, least(group, numbers.channels - c)) as j:
            yield block * numbers.tiles * group + j, n, c + j


class Coefficients(NamedTuple):
    """z = (x * unit - mean) * scale + intercept, without the residual; mean is in the unit."""

    unit: Value
    mean: Value
    scale: Value
    intercept: Value

    def centred(self, x: Value) -> Value:
        return fused(x, self.unit, -self.mean)  # as unit is a power of two, the bits are the same if it is not fused

    def z(self, centred: Value) -> Value:
        return fused(centred, self.scale, self.intercept)


def unit_of(mean: Value, rstd: Value) -> tuple[Value, Value]:
    """Return the unit of planes, a power of two near rstd, and rstd in that unit, as in kernels/unit.cuh."""
    if rstd.kind == vector(DOUBLE, rstd.lanes):
        return rstd.constant(1), rstd  # float64 squares must be in range in any case
    exponent = (rstd.bits(INT32) >> 23) & 255
    limit = 376 - ((mean.bits(INT32) >> 23) & 255)
    exponent = least(exponent, 253)
    exponent = most(least(exponent, limit), 1)
    return (exponent << 23).bits(FLOAT), rstd * ((254 - exponent) << 23).bits(FLOAT)


def coefficients(mean: Value, mean_lo: Value, rstd: Value, weight: Value, bias: Value) -> tuple[Coefficients, Value]:
    """Return planes' Coefficients, and rstd in the unit."""
    unit, r = unit_of(mean, rstd)
    scale = r * weight
    return Coefficients(unit, mean * unit, scale, bias - mean_lo * unit * scale), r


class Planes:
    """The numbers of planes or channels, in computing precision."""

    def __init__(self, numbers: Numbers):
        self.numbers = numbers
        self.arrays = {name: numbers.of_planes(name) for name in ("mean", "mean_lo", "rstd", "weight", "bias")}

    def statistics(self, n: Value, c: Value) -> tuple[Value, Value, Value]:
        """Return mean, mean_lo and rstd of a plane."""
        at = n * self.numbers.channels + c
        return tuple(self.arrays[name].load(at) for name in ("mean", "mean_lo", "rstd"))  # type: ignore[return-value]

    def parameters(self, n: Value, c: Value) -> tuple[Value, Value]:
        """Return weight and bias of a plane."""
        return tuple(
            self.arrays[name].load(n * getattr(self.numbers, f"{name}_n") + c * getattr(self.numbers, f"{name}_c"))
            for name in ("weight", "bias")
        )  # type: ignore[return-value]

    def coefficients(self, n: Value, c: Value) -> tuple[Coefficients, Value]:
        return coefficients(*self.statistics(n, c), *self.parameters(n, c))


class Table:
    """Vectors of channels side by side, or of short planes, on the stack."""

    def __init__(self, code: Code, kind: Any, names: Sequence[str], size: int):
        self.rooms = {name: code.room(kind, size) for name in names}

    def store(self, j: Any, **values: Value) -> None:
        for name, value in values.items():
            self.rooms[name].store(j, value)

    def load(self, j: Any, lanes: int, *names: str) -> list[Value]:
        return [self.rooms[name].load(j, lanes) for name in names]

    def coefficients(self, j: Any, lanes: int) -> Coefficients:
        """Return the Coefficients of channels or planes from the j-th on."""
        return Coefficients(*self.load(j, lanes, *Coefficients._fields))

    def coefficients_of(self, j: Any, lanes: int) -> Coefficients:
        """Return the Coefficients of the j-th plane, in all lanes."""
        return Coefficients(*(self.rooms[name].load(j).splat(lanes) for name in Coefficients._fields))


def set_coefficients(table: Table, planes: Planes, item: Item) -> None:
    """Set the Coefficients of a group of channels in a table."""
    with planes.numbers.code.loop(0, item.width) as j:
        table.store(j, **planes.coefficients(item.n, item.c + j)[0]._asdict())


def counted_lanes(code: Code, lanes: int, rest: Value) -> Value:
    """Return a condition that is true for the last `rest` lanes."""
    return code.numbers(INT32, range(lanes)) >= (lanes - rest).to(INT32)


def map_row(
    code: Code, count: Value, lanes: int, compute: Callable[[Value], Sequence[tuple[Memory, Value]]],
    beside: Callable[[Value], None] | None = None,
) -> None:  # fmt: skip
    """Compute a row of no fewer elements than a vector has.

    compute(i) returns memories and the vectors to store in them at i. The last vector overlaps the one before it. As
    results may replace what they are computed from, it is computed first, and stored last. beside(i): what else is
    done.
    """
    rest = count % lanes
    whole, tail = count - rest, count - lanes
    late: list[tuple[Memory, Variable]] = []
    with code.when(rest != 0):
        late = [(memory, code.variable(value)) for memory, value in compute(tail)]
    with code.loop(0, whole, lanes) as i:
        if beside is not None:
            beside(i)
        for memory, value in compute(i):
            memory.store(i, value)
    with code.when(rest != 0):
        for memory, variable in late:
            memory.store(tail, variable.get())


@contextmanager
def each_vector(code: Code, width: Value, lanes: int) -> Iterator[tuple[Value, Value]]:
    """Go through channels side by side, `lanes` at a time, no fewer than there are.

    The last vector may overlap the one before it: the second value says which of its lanes are new.
    """
    with code.loop(0, width, lanes) as first:
        j = least(first, width - lanes)
        yield j, code.numbers(INT32, range(lanes)) >= (first - j).to(INT32)


def prefetch(kind: Kind, memory: Memory, i: Value, *, writes: bool = False, soon: bool = True) -> None:
    """Prefetch the cache lines of a vector at i."""
    for line in range(0, kind.lanes, LINE // memory.size):
        memory.prefetch(i + line, writes=writes, soon=soon)


def prefetch_next(code: Code, kind: Kind, memories: Sequence[Memory], soon: Value) -> None:
    """Prefetch vectors of the next plane while one is written. soon: whether into the L1 cache."""
    with code.choice(soon != 0) as (near, far):
        for context, into_l1 in ((near, True), (far, False)):
            with context:
                for memory in memories:
                    prefetch(kind, memory, code.integer(0), soon=into_l1)


def prefetcher(numbers: Numbers, near: Value, rows: Sequence[Memory], result: Memory) -> Callable[[Value], None]:
    """Return a function (i) that prefetches beside the sums over rows.

    If results are near, which are written next, it fetches their lines; else what of the rows is twice kind.ahead of i.
    """
    code = numbers.code
    near_ = near != 0
    ahead, step = where(near_, code.integer(0), 2 * numbers.kind.ahead), near_.to(INT)
    target = code.memory(where(near_, result.address(), rows[0].address()), numbers.kind.element.stored)

    def fetch(i: Value) -> None:
        for row in rows:
            prefetch(numbers.kind, row, i + ahead, soon=False)
        prefetch(numbers.kind, target, i * step, writes=True)

    return fetch


class Product(NamedTuple):
    """A term of a sum: a * b."""

    a: Value
    b: Value


def only(counted: Value, term: Any) -> Any:
    """Return a term that is 0 in the lanes that do not count."""
    if isinstance(term, Product):
        return Product(where(counted, term.a, 0), term.b)
    return where(counted, term, 0)


def added(total: Value, term: Any) -> Value:
    return fused(*term, total) if isinstance(term, Product) else total + term


class Sums:
    """Sums of vectors in float64, by way of sums of up to PARTIAL elements in computing precision."""

    def __init__(self, code: Code, kind: Kind, number: int):
        self.zero = code.number(vector(kind.element.computing, kind.lanes), 0)
        wide = code.number(vector(DOUBLE, kind.lanes), 0)
        self.partial = [code.variable(self.zero) for _ in range(number)]
        self.total = [code.variable(wide) for _ in range(number)]

    def add(self, terms: Sequence[Any], counted: Value | None = None) -> None:
        """Add terms, of which only some lanes may count."""
        for partial, term in zip(self.partial, terms, strict=True):
            partial.set(added(partial.get(), term if counted is None else only(counted, term)))

    def widen(self) -> None:
        """Add the partial sums to the totals."""
        for partial, total in zip(self.partial, self.total, strict=True):
            total.add(partial.get().to(DOUBLE))
            partial.set(self.zero)

    def values(self) -> list[Value]:
        return [total.get().sum() for total in self.total]


def sum_row(
    code: Code, count: Value, sums: Sums, terms: Callable[[Value], Sequence[Any]], beside: Callable[[Value], None]
) -> None:
    """Add up a row of no fewer elements than a vector has. terms(i): vectors at i. beside(i): what else is done."""
    lanes = sums.zero.lanes
    rest = count % lanes
    whole = count - rest
    with code.when(rest != 0):  # the last vector, without what the one before it has
        sums.add(terms(count - lanes), counted_lanes(code, lanes, rest))
    with code.loop(0, whole, PARTIAL) as lo:
        with code.loop(lo, least(lo + PARTIAL, whole), lanes) as i:
            beside(i)
            sums.add(terms(i))
        sums.widen()
