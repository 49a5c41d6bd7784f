"""Every kernel variant that suits a plane, timed beside a copy of the same bytes: what today's plans leave to be had.

A variant is a scope, the residency of its tile, how many threads a block has and how many 16-byte vecs each of them
holds. One after the other is forced upon the plans, checked against the reference and timed; the table sets the
best beside the one that is planned today. Clusters and grids come last: they can hang a GPU where they are wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cupynorm import devices
from cupynorm.cuda import plan, variants
from cupynorm.cuda.device import Device
from cupynorm.cuda.layout import choose_layout, contiguous_desc
from cupynorm.cuda.plan import Plan
from cupynorm.cuda.source import Module
from cupynorm.cuda.variants import Variant

from ..core import peers, report, traces
from ..core.cases import (
    ACCESSES,
    DTYPES,
    LAYOUTS,
    SWEEP_ELEMENTS,
    TOLERANCE,
    Arrays,
    Case,
    buffer_sets,
    sweep_layers,
    words,
)
from ..core.timing import Contestant, DeviceClock, HostClock, Race, Timing, summarise

SPILLED = 128  # most bytes of a thread's local memory with which a variant is timed: a few cost little
OPS = ("forward", "backward")
GROUPED = ("cluster", "grid")  # scopes whose blocks wait for each other
Variants = dict[str, tuple[Variant, ...]]


@contextlib.contextmanager
def forced(lists: Variants) -> Iterator[None]:
    """Within it plans choose from these lists: of one variant, or of none, which is the split."""

    before = dict(variants.FORCED)
    variants.FORCED.update(lists)
    traces.forget()
    try:
        yield
    finally:
        variants.FORCED.clear()
        variants.FORCED.update(before)
        traces.forget()


@dataclass(frozen=True)
class Trial:
    """A variant, by itself or as the one of the split."""

    variant: Variant
    split: bool = False

    @property
    def name(self) -> str:
        r = self.variant
        scope = "split" if self.split else "shared" if (r.scope, r.residency) == ("block", "shared") else r.scope
        size = r.cluster if r.scope == "cluster" else ""
        held = f"x{r.vecs_per_thread}" if r.vecs_per_thread else ""
        return f"{scope}{size} {r.threads}{held}" + (f", {r.resident} resident" if r.resident else "")

    @property
    def grouped(self) -> bool:
        return self.variant.scope in GROUPED

    def lists(self, op: str) -> Variants:
        return {op: (), "split": (self.variant,)} if self.split else {op: (self.variant,)}


#: The split as it is planned.
SPLIT = Trial(variants.VARIANTS["split"][0], split=True)


def catalogue(op: str) -> list[Trial]:
    """Every variant of an operation, today's among them.

    Where a variant's registers are not bound as today's are (resident_threads), it says how many threads must fit.
    """
    threads, vecs = (64, 128, 256, 512, 1024), (1, 2, 4, 8)
    found = [Variant("subwarp", "registers", t, k) for k in (8, 4, 16) for t in (256, 128, 512)]
    found += [Variant("warp", "registers", 128, k) for k in vecs]
    found += [Variant("block", "registers", t, k) for t in threads for k in vecs]
    found += [Variant("block", "shared", t, 0) for t in (256, 512, 1024)]
    found += [Variant("cluster", "shared", t, 0, size) for size in (2, 4, 8, 16) for t in (512, 256)]
    found += [Variant("cluster", "registers", t, k, size) for size in (2, 4, 8, 16) for t in (512, 256) for k in (8, 4)]
    if op == "forward":  # 1024 threads have 64 registers each; without spilling, 32 are enough for one vec
        found += [Variant("block", "registers", t, 1, resident=2048) for t in threads]
    else:  # 1024 have nearly enough for what shared memory needs
        found += [Variant("warp", "registers", 128, 4, resident=1024)]
        found += [Variant("block", "registers", 512, k, resident=1024) for k in (1, 2)]
        found += [Variant("block", "shared", 512, 0, resident=1024)]
        found += [Variant("cluster", "shared", 512, 0, size, resident=1024) for size in (2, 4, 8, 16)]
    found += [Variant("grid", "shared", t, 0) for t in (512, 256)]
    found += [Variant("grid", "registers", t, k) for t in (512, 256) for k in (8, 4)]
    of_split = [Variant("block", "registers", t, k) for t, k in ((256, 4), (512, 4), (1024, 2))]
    return [*map(Trial, found), SPLIT, *(Trial(variant, split=True) for variant in of_split)]


class Entry(NamedTuple):
    """A trial for a case: its plan, the modules of the plan's steps, and whether it is today's plan."""

    trial: Trial
    plan: Plan
    modules: tuple[Module, ...]
    today: bool


def planned(case: Case, device: Device, lists: Variants) -> tuple[Plan, tuple[Module, ...]]:
    """The plan of a call on new arrays with these lists of variants, and the modules of its steps."""
    n, c, *spatial = case.shape
    kind = "channels_last" if case.layout == "channels_last" else "channels_first"
    kind, layouts, _ = choose_layout((contiguous_desc(case.shape, case.itemsize, kind),) * ACCESSES[case.op])
    op: Any = case.op
    with forced(lists):
        made = plan.plan(op, (n, c, math.prod(spatial)), case.dtype, kind, layouts, device, sums=False, reduced=False)
        return made, tuple(Module.of(step, made) for step in made.steps)


def _sensible(trial: Trial, made: Plan, case: Case) -> bool:
    """Whether a plan is the variant's, and its threads have something to do: a quarter of what they can hold."""
    variant, step = trial.variant, made.steps[0]
    if trial.split:
        return step.tiles > 1
    if made.regime == "split":  # it does not fit
        return False
    vecs = math.prod(case.shape[2:]) // made.vec_size
    if made.kind == "channels_last":
        vecs *= made.vec_size * step.channel_vecs
    if variant.scope == "subwarp":  # a lane moves whole 16-byte vecs (staging.cuh)
        return variant.vecs_per_thread % (16 // case.itemsize) == 0
    if variant.residency == "registers":
        return 4 * vecs >= variant.size * variant.vecs_per_thread * step.tiles
    return vecs >= 2 * variant.threads * step.tiles


def entries(case: Case, device: Device) -> list[Entry]:
    """Return the variants that fit a case."""
    today, _ = planned(case, device, {})
    found = []
    for trial in catalogue(case.op):
        made, modules = planned(case, device, trial.lists(case.op))
        same = made.steps == today.steps and trial.split == (today.regime == "split")
        if same or _sensible(trial, made, case):
            found.append(Entry(trial, made, modules, same))
    return found


class ForcingClock(HostClock):
    """Another clock, with a contestant's variants forced while its calls are timed."""

    def __init__(self, clock: HostClock, lists: dict[str, Variants]):
        self.clock, self.lists = clock, lists

    def seconds(self, contestant: Contestant, calls: list[int]) -> float:
        with forced(self.lists.get(contestant.name, {})):
            return self.clock.seconds(contestant, calls)


def resources(runtime: Any, entry: Entry) -> dict[str, int]:
    """Return registers and bytes of local memory of a thread, and the blocks that a multiprocessor holds, of the most
    demanding step; nothing if the runtime's kernels are not CuPy's."""
    rows = []
    for step, module in zip(entry.plan.steps, entry.modules, strict=True):
        if step.name.endswith(entry.trial.variant.name):
            try:
                driver = importlib.import_module("cupy_backends.cuda.api.driver")
                number = importlib.import_module("cupy").cuda.runtime.getDevice()
                kernel = runtime._kernels[number, module, step.name]
                kernel = getattr(kernel, "raw", kernel)  # CuPy's own
                blocks = driver.occupancyMaxActiveBlocksPerMultiprocessor(kernel.kernel.ptr, step.threads, step.shared)
                rows.append({"registers": kernel.num_regs, "local_bytes": kernel.local_size_bytes, "blocks": blocks})
            except Exception:  # facts, not results
                return {}
    return max(rows, key=lambda row: (row["local_bytes"], row["registers"]))


class Bench:
    """One run: measures a row for each variant of each case.

    xp, runtime and clock: the arrays' library, what runs the kernels and what times them. say: prints a line.
    """

    def __init__(
        self, xp: Any, runtime: Any, clock: HostClock, options: argparse.Namespace, say: Callable[[str], None]
    ):
        self.xp, self.runtime, self.clock, self.options, self.say = xp, runtime, clock, options, say
        self.start = time.monotonic()
        self.facts = report.device_facts(xp)
        self.device: Device = runtime.device()
        self.rows: list[dict[str, Any]] = []
        self.faults: dict[Module, str] = {}  # modules that do not compile or load
        self.compile_seconds = 0.0
        self.lost = False  # an error that no later call recovers from

    @property
    def late(self) -> bool:
        return bool(self.options.time_limit) and time.monotonic() - self.start > self.options.time_limit

    def prepare(self, modules: Iterable[Module]) -> None:
        """Compile modules in parallel."""

        def load(module: Module) -> None:
            try:
                with contextlib.nullcontext() if self.xp is np else self.xp.cuda.Device(number):
                    self.runtime.load(module)
            except Exception as failure:  # the rows of its variants give this reason
                self.faults[module] = _told(failure)

        start = time.monotonic()
        number = 0 if self.xp is np else self.xp.cuda.runtime.getDevice()
        different = list(dict.fromkeys(modules))
        with ThreadPoolExecutor() as pool:
            list(pool.map(load, different))
        seconds = time.monotonic() - start
        self.compile_seconds += seconds
        self.say(f"{len(different)} modules compiled in {seconds:.1f} s, {len(self.faults)} failures so far")

    def row(self, case: Case, entry: Entry) -> dict[str, Any]:
        step = entry.plan.steps[0]
        return {
            "op": case.op,
            "shape": list(case.shape),
            "dtype": case.dtype,
            "layout": case.layout,
            "variant": entry.trial.name,
            "kernel": step.name,
            "regime": entry.plan.regime,
            "today": entry.today,
            "grid": math.prod(step.grid),
            "threads": step.threads,
            "shared": step.shared,
            **resources(self.runtime, entry),
        }

    def own(self, case: Case, arrays: Arrays) -> Contestant:
        """Return the operation; the split, which fits every plane, runs the forward that a backward needs."""
        with forced(SPLIT.lists("forward")):
            return peers.cupynorm_itself(case.op, arrays)

    def checked(self, case: Case, arrays: Arrays, own: Contestant, entry: Entry) -> dict[str, Any]:
        """Return the row of a variant, with its error or with the reason not to time it."""
        row = self.row(case, entry)
        broken = [self.faults[module] for module in entry.modules if module in self.faults]
        if broken or (row.get("local_bytes", 0) > SPILLED and not entry.today):
            return {**row, "failure": broken[0] if broken else f"spills: {row['local_bytes']} B of local memory"}
        try:
            with forced(entry.trial.lists(case.op)):
                error = arrays.error(own.answers(own.run(0)), case.op)
        except Exception as failure:  # any failure becomes a row
            return {**row, "failure": _told(failure)}
        if not error <= TOLERANCE[case.dtype]:
            return {**row, "failure": f"wrong: error {error:.2g}, allowed {TOLERANCE[case.dtype]:.0e}"}
        return {**row, "max_error": error}

    def measure(self, case: Case, arrays: Arrays, mine: list[Entry]) -> None:
        """Check the variants of a case, and time them in turn with a copy; their rows are kept in any case."""
        own, found, lists = self.own(case, arrays), [], {}
        for entry in mine:
            row = self.checked(case, arrays, own, entry)
            self.rows.append(row)
            if "failure" not in row:
                found.append(row)
                lists[row["variant"]] = entry.trial.lists(case.op)
            elif not self.alive():
                return
        contestants = [replace(own, name=name) for name in lists]
        race = Race(ForcingClock(self.clock, lists), arrays.sets, self.options.batch_ms / 1e3)
        try:
            samples = race.run([peers.copy(case.minimal_bytes, arrays), *contestants], self.options.rounds)
        except Exception as failure:
            for row in found:
                row["failure"] = f"while all were timed: {_told(failure)}"
            self.alive()
            return
        copy = summarise(samples["copy"])
        for row in found:
            timing: Timing = summarise(samples[row["variant"]])
            row |= {
                "median_ms": timing.median * 1e3,
                "spread_ms": timing.spread * 1e3,
                "copy_ms": copy.median * 1e3,
                "gbps": case.minimal_bytes / timing.median / 1e9,
                "of_copy": copy.median / timing.median,
            }

    def alive(self) -> bool:
        """True if the device still answers."""
        try:
            if self.xp is not np:
                self.xp.cuda.Device().synchronize()
        except Exception as failure:
            self.lost = True
            self.say(f"the device is lost: {_told(failure)}")
        return not self.lost

    def run(self, cases: list[Case]) -> None:
        """Measure the cases, grouped by arrays; first without clusters and grids, then with them."""
        suiting = {case: entries(case, self.device) for case in cases}
        before = [replace(case, op="forward") for case in cases if case.op == "backward"]
        needed = [module for case in before for module in planned(case, self.device, SPLIT.lists("forward"))[1]]
        for grouped in (False, True):
            some = {case: [e for e in found if e.trial.grouped == grouped] for case, found in suiting.items()}
            some = {case: found for case, found in some.items() if found}
            if not some or self.lost or self.late:
                continue
            self.prepare([*needed, *(module for found in some.values() for e in found for module in e.modules)])
            for key in dict.fromkeys(case.arrays for case in some):
                if self.lost or self.late:
                    break
                self._on_arrays([case for case in some if case.arrays == key], some)
                self.write()
        missing = [case for case in cases if not any(_same(row, case) and "of_copy" in row for row in self.rows)]
        if missing:
            self.say(f"{len(missing)} of {len(cases)} cases not measured")

    def _on_arrays(self, cases: list[Case], some: dict[Case, list[Entry]]) -> None:
        """Measure the cases on one set of arrays."""
        case = cases[0]
        sets = 2
        if self.xp is not np:
            touched = 2 * math.prod(case.shape) * case.itemsize
            sets = max(sets, buffer_sets(touched, 3 * self.facts["l2_bytes"], 512))
        try:
            arrays = Arrays(self.xp, case.shape, case.dtype, case.layout, False, sets)
            for each in cases:
                if not self.lost and not self.late:
                    self.measure(each, arrays, some[each])
                    self.say(_progress(each, self.rows, time.monotonic() - self.start))
        except Exception as failure:  # out of memory, for example: measure the other sizes
            self.say(f"failed at {case}: {_told(failure)}")
            self.alive()
        arrays = None
        if self.xp is not np and not self.lost:
            self.xp.get_default_memory_pool().free_all_blocks()

    def write(self) -> None:
        if self.options.json:
            timed = [row for row in self.rows if "of_copy" in row]
            result = report.document(self.facts, timed) | {"compile_seconds": self.compile_seconds, "rows": self.rows}
            report.write_json(result, self.options.json)


def _told(failure: Exception) -> str:
    return f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:200]}"


def _same(row: dict[str, Any], case: Case) -> bool:
    facts = case.op, list(case.shape), case.dtype, case.layout
    return facts == (row["op"], row["shape"], row["dtype"], row["layout"])


def _progress(case: Case, rows: list[dict[str, Any]], seconds: float) -> str:
    mine = [row for row in rows if _same(row, case)]
    return f"{seconds:6.1f} s  {case}: {sum('of_copy' in row for row in mine)} of {len(mine)} variants timed"


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """Format the table: for each dtype, layout and operation, today's and the best variant of every plane size.

    Fractions are of the copy's bandwidth; the loss is the share of today's time that the best variant would save.
    """
    out = []
    for kind in dict.fromkeys((row["dtype"], row["layout"], row["op"]) for row in rows):
        mine = [row for row in rows if (row["dtype"], row["layout"], row["op"]) == kind]
        out += ["", " ".join(kind), f"{'plane':>11}  {'today':22} of copy  {'best':28} of copy   loss  regs"]
        for shape in sorted({tuple(row["shape"]) for row in mine}, key=lambda shape: math.prod(shape[2:])):
            timed = [row for row in mine if tuple(row["shape"]) == shape and "of_copy" in row]
            best = max(timed, key=lambda row: row["of_copy"], default=None)
            today = next((row for row in timed if row["today"]), None)
            loss = f"{1 - today['of_copy'] / best['of_copy']:6.1%}" if today and best else "     –"
            registers = best.get("registers", "–") if best else "–"
            plane = "x".join(map(str, shape[2:]))
            out.append(f"{plane:>11}  {_cell(today, 22):31} {_cell(best, 28):36} {loss} {registers:>5}")
    failed = [
        f"{row['op']} {row['dtype']} {row['layout']}, planes of {report.shape_text(row['shape'][2:])}: "
        f"{row['variant']}: {row['failure']}"
        for row in rows
        if "failure" in row
    ]
    return [*out[1:], *([""] if failed else []), *failed]


def _cell(row: dict[str, Any] | None, width: int) -> str:
    return f"{row['variant']:{width}} {row['of_copy']:7.1%}" if row else "–"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench variants",
        description=f"{__doc__} With CUPYNORM_EAGER=0 in the environment nothing else is compiled.",
    )
    parser.add_argument("--dtype", type=lambda t: words(t, DTYPES, "--dtype"), default=["float32", "bfloat16"])
    parser.add_argument("--op", type=lambda t: words(t, OPS, "--op"), default=list(OPS))
    parser.add_argument("--layout", type=lambda t: words(t, LAYOUTS, "--layout"), default=["channels_first"])
    parser.add_argument(
        "--sizes",
        type=lambda t: [int(word) for word in t.split(",")],
        help="sides of planes, powers of 2; default: all",
    )
    parser.add_argument(
        "--elements", type=int, default=SWEEP_ELEMENTS["gpu"], help="elements, a power of 4; few to rehearse"
    )
    parser.add_argument("--rounds", type=int, default=7, help="in each, every variant runs a batch; default 7")
    parser.add_argument("--batch-ms", type=float, default=1, help="length of a batch; default 1")
    parser.add_argument("--time-limit", type=float, default=130, metavar="S", help="start nothing after S; default 130")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every timing, updated after each plane size")
    return parser


def cases(options: argparse.Namespace) -> list[Case]:
    """Return the cases that the options select, small planes first."""
    shapes = [layer.shape for layer in sweep_layers(options.elements)]
    return [
        Case(op, shape, dtype, layout, False)
        for layout in options.layout
        for shape in shapes
        if not options.sizes or shape[-1] in options.sizes
        for dtype in options.dtype
        for op in options.op
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    usable, why = devices.gpu_status()
    if not usable:
        parser.error(f"no usable GPU: {why}")
    asked = cases(options)
    if not asked:
        parser.error("--sizes: none of the sweep's")
    from cupynorm.cuda.backend import runtime

    bench = Bench(
        importlib.import_module("cupy"), runtime, DeviceClock(), options, lambda line: print(line, flush=True)
    )
    try:
        bench.run(asked)
    except KeyboardInterrupt:
        bench.say("interrupted: results up to here")
    bench.write()
    print(*lines(bench.rows), sep="\n", flush=True)
    timed = [row for row in bench.rows if "of_copy" in row]
    today = sum(row["today"] for row in timed)
    return 0 if today == len(asked) and not bench.lost else 1
