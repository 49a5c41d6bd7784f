"""Time cupynorm beside its peers: python -m bench speed --help."""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from cupynorm import devices

from ..core import peers, report
from ..core.cases import (
    ACCESSES,
    DTYPES,
    EPILOGUES,
    LAYOUTS,
    SWEEP_ELEMENTS,
    TOLERANCE,
    Arrays,
    Case,
    buffer_sets,
    cases_of,
    parse_shapes,
    words,
)
from ..core.timing import Contestant, DeviceClock, HostClock, Race, Timing, summarise

CPU_CACHE_BYTES = 64 << 20  # of the buffer sets on a CPU: more than the cache of most cores
CPU_MAX_BYTES = 64 << 20


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench speed",
        description="Time instance normalisation: cupynorm, its peers, and a copy of the same bytes. "
        "Each answer is checked against float64 before it is timed.",
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), help="default: gpu if there is a usable one")
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=["real"],
        metavar="SHAPE",
        help="real (from real networks, the default), sweep (plane sizes at equal bytes), short (planes of 9 to 2048 "
        "elements in arrays of 0.1 to 16 MB), random (drawn by --seed), or N,C,H,W of any rank >= 3",
    )
    parser.add_argument("--seed", type=int, help="of the random shapes; default: a new one, which is printed")
    parser.add_argument(
        "--hot", action="store_true", help="repeat calls on the same arrays, which may then be in a core's caches"
    )
    ops, names = tuple(ACCESSES), tuple(peers.PEERS)
    parser.add_argument("--op", type=lambda t: words(t, ops, "--op"), default=list(ops), help="forward,backward,both")
    parser.add_argument(
        "--dtype", type=lambda t: words(t, DTYPES, "--dtype"), default=["float32"], help="default float32"
    )
    parser.add_argument(
        "--layout",
        type=lambda t: words(t, LAYOUTS, "--layout"),
        default=["channels_first"],
        help="channels_first,channels_last; default channels_first",
    )
    parser.add_argument(
        "--epilogue",
        type=lambda t: words(t, EPILOGUES, "--epilogue"),
        default=["none"],
        help="none,fused; default none. fused: each real shape with its network's activation and per-sample affine, "
        "which peers compose; a shape with neither stays plain",
    )
    parser.add_argument(
        "--affine",
        action=argparse.BooleanOptionalAction,
        help="with or without weight and bias; default: as in the shape's network, else without",
    )
    parser.add_argument(
        "--peers",
        type=lambda t: [] if t == "none" else words(t, names, "--peers"),
        help=f"{','.join(names)} or none; default: all installed ones but {', '.join(sorted(peers.ON_REQUEST))}",
    )
    parser.add_argument(
        "--compile-limit",
        type=float,
        metavar="S",
        help=f"run {' and '.join(sorted(peers.COMPILING))}, which compile for each case, only in forward + backward, "
        "and each only until preparing it has taken S seconds; default: no limit",
    )
    parser.add_argument("--rounds", type=int, default=11, help="in each, every contestant runs a batch; default 11")
    parser.add_argument("--batch-ms", type=float, help="length of a batch; default 5 on a CPU, 2 on a GPU")
    parser.add_argument(
        "--time-limit", type=float, default=170, metavar="S", help="start no case after S seconds; default 170; 0: off"
    )
    parser.add_argument(
        "--max-bytes",
        type=int,
        metavar="B",
        help="skip inputs larger than this; default 64 MiB on a CPU, 1/16 of a GPU's memory",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result, updated after each shape")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the rows of the JSON file, and measure only cases that it lacks or that lack one of --peers",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="plot the result")
    return parser


def _needed(*modules: str) -> None:
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError:
            sys.exit(f"python -m bench needs {module}: pip install 'cupynorm[bench]' or pip install rich matplotlib")


class Bench:
    """One run: measures cases into rows, and prints a line for everything left out."""

    def __init__(self, xp: Any, options: argparse.Namespace, say: Any):
        self.xp, self.options, self.say = xp, options, say
        self.device = report.device_facts(xp)
        #: Each case's row, and the distance between its quartiles in milliseconds if this run measured it.
        self.rows: dict[Any, dict[str, Any]] = {}
        self.spreads: dict[Any, float] = {}
        if options.resume and options.json and options.json.is_file():
            there = json.loads(options.json.read_text(encoding="utf-8"))
            if there.get("hot", False) != options.hot:
                sys.exit(
                    "--resume: the rows of the file were measured "
                    + ("with --hot" if there.get("hot") else "without --hot")
                )
            self.rows = {report.key(row): row for row in there["rows"]}
        self.failures = 0  # cases in which cupynorm itself could not be measured
        gpu = xp is not np
        self.plan_device = None
        if gpu:
            from cupynorm.cuda.backend import runtime

            self.plan_device = runtime.device()
        self.clock = DeviceClock() if gpu else HostClock()
        self.cache_bytes = 3 * self.device["l2_bytes"] if gpu else CPU_CACHE_BYTES
        self.most_sets = 512 if gpu else 16
        self.max_bytes = options.max_bytes or (xp.cuda.Device().mem_info[1] // 16 if gpu else CPU_MAX_BYTES)
        self.batch_seconds = (options.batch_ms or (2 if gpu else 5)) / 1e3
        self.preparation: dict[str, float] = {}  # seconds spent on each peer before timing it
        self.names = options.peers
        if self.names is None:
            self.names = [name for name in peers.PEERS if name not in peers.ON_REQUEST]
        self._said: set[str] = set()

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self.say(line)

    def arrays(self, case: Case) -> Arrays:
        """Make arrays for all operations on this case's shape; on a GPU, whose caches are large, at least two sets."""
        touched = 2 * case.minimal_bytes // ACCESSES[case.op]  # x and y, the least of the three operations
        sets = 1 if self.options.hot else buffer_sets(touched, self.cache_bytes, self.most_sets)
        if self.xp is not np and not self.options.hot:
            sets = max(sets, 2)
        return Arrays(
            self.xp,
            case.shape,
            case.dtype,
            case.layout,
            case.affine,
            sets,
            activation=case.activation,
            negative_slope=case.negative_slope,
        )

    def takes_part(self, name: str, case: Case) -> bool:
        """True if --compile-limit lets a peer run this case."""
        limit = self.options.compile_limit
        if limit is None or name not in peers.COMPILING:
            return True
        if case.op == "both" and self.preparation.get(name, 0) <= limit:
            return True
        self._say_once(f"{name}: forward + backward only, until preparing it has taken {limit:g} s")
        return False

    def checked(self, name: str, make: Any, case: Case, arrays: Arrays) -> tuple[Contestant, float] | None:
        """Return a contestant and its error if its answer is right; else print a line and return None."""
        start = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a peer: they do not matter here
                contestant = make(case.op, arrays)
                error = arrays.error(contestant.answers(contestant.run(0)), case.op)
        except peers.UnavailableError as reason:
            self._say_once(f"{name} left out: {reason}")
            return None
        except Exception as failure:  # any failure of a peer is only reported
            text = (str(failure).splitlines() or [""])[0][:200]
            self._say_once(f"{name} failed at {case}: {type(failure).__name__}: {text}")
            return None
        finally:
            self.preparation[name] = self.preparation.get(name, 0) + time.monotonic() - start
        if not error <= TOLERANCE[case.dtype]:
            self.say(f"{name} is wrong at {case}: error {error:.2g}, allowed {TOLERANCE[case.dtype]:.0e}; not timed")
            return None
        return contestant, error

    def measure(self, case: Case, arrays: Arrays) -> None:
        own = self.checked("cupynorm", peers.cupynorm_itself, case, arrays)
        if own is None:
            self.failures += 1
            return
        found = {"cupynorm": own}
        for name in self.names:
            if not self.takes_part(name, case):
                continue
            entry = self.checked(name, peers.PEERS[name], case, arrays)
            if entry is not None:
                found[name] = entry
        contestants = [peers.copy(case.minimal_bytes, arrays), *(contestant for contestant, _ in found.values())]
        if self.xp is np:
            contestants.append(peers.new_copy(case.minimal_bytes, arrays))
        race = Race(self.clock, arrays.sets, self.batch_seconds)
        samples = race.run(contestants, self.options.rounds)
        timings: dict[str, Timing] = {name: summarise(values) for name, values in samples.items()}
        errors = {name: error for name, (_, error) in found.items()}
        row = report.row(case, *report.planned(case.op, arrays.x[0], self.plan_device), timings, errors)
        self.rows[report.key(row)] = row
        self.spreads[report.key(row)] = timings["cupynorm"].spread * 1e3

    def has(self, case: Case) -> bool:
        """True if a resumed result has the case with all requested peers."""
        row = self.rows.get(case.key)
        return row is not None and set(self.names) <= set(row["peers"])

    def run(self, cases: list[Case], advance: Any) -> None:
        """Measure the cases; neighbours of equal `arrays` share them."""
        start = time.monotonic()
        done = 0
        if hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5 and self.xp is np:
            self.say("this machine is busy: contestants with several threads will look slower than they are")
        for _, group in itertools.groupby(cases, lambda case: case.arrays):
            arrays: Arrays | None = None
            for case in group:
                advance(str(case))
                if self.options.time_limit and time.monotonic() - start > self.options.time_limit:
                    self.say(f"time limit of {self.options.time_limit:g} s: {len(cases) - done} cases not measured")
                    return
                done += 1
                if self.has(case):
                    continue
                size = case.minimal_bytes // ACCESSES[case.op]
                if size > self.max_bytes:
                    self._say_once(f"{case.shape} {case.dtype} left out: {size >> 20} MiB > {self.max_bytes >> 20} MiB")
                    continue
                try:
                    arrays = arrays or self.arrays(case)
                    self.measure(case, arrays)
                except Exception as failure:  # out of memory, for example: measure the other cases
                    self.failures += 1
                    self.say(f"failed at {case}: {type(failure).__name__}: {str(failure)[:200]}")
            del arrays
            if self.xp is not np:  # other contestants need the memory
                self.xp.get_default_memory_pool().free_all_blocks()
            if self.options.json:
                report.write_json(self.result(), self.options.json)

    def result(self) -> dict[str, Any]:
        """Return the result so far, with what other measurements have added to the file."""
        document = report.document(self.device, list(self.rows.values())) | {"hot": self.options.hot}
        if "random" in self.options.shapes:
            document["seed"] = self.options.seed
        if self.options.resume and self.options.json and self.options.json.is_file():
            document = json.loads(self.options.json.read_text(encoding="utf-8")) | document
        return document


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    _needed("rich", *(("matplotlib",) if options.plot else ()))
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    usable, why = devices.gpu_status()
    if options.device == "gpu" and not usable:
        parser.error(f"--device gpu: no usable GPU: {why}")
    xp: Any = np
    if usable and options.device != "cpu":
        xp = importlib.import_module("cupy")
    if options.seed is None:
        options.seed = int(np.random.SeedSequence().generate_state(1)[0])
    if "random" in options.shapes:
        print(f"random shapes of --seed {options.seed}")
    try:
        layers = parse_shapes(options.shapes, SWEEP_ELEMENTS["cpu" if xp is np else "gpu"], options.seed)
    except ValueError as error:
        parser.error(str(error))
    cases = cases_of(layers, options.dtype, options.layout, options.epilogue, options.op, options.affine)

    console = Console()
    if not console.is_terminal:
        console = Console(width=180)  # a file has no width of its own
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bench = Bench(xp, options, lambda line: progress.console.print(line, style="yellow", highlight=False))
        task = progress.add_task("", total=len(cases))
        completed = itertools.count()
        try:
            bench.run(cases, lambda what: progress.update(task, description=what, completed=next(completed)))
        except KeyboardInterrupt:
            progress.console.print("interrupted: results up to here")
            bench.failures += 1
    if not bench.rows:
        console.print("nothing was measured")
        return 1
    result = bench.result()
    title = f"{result['device']['name']}: a large copy runs at {result['copy_gbps']:.0f} GB/s"
    measured = [row for key, row in bench.rows.items() if key in bench.spreads]
    spreads = [bench.spreads[report.key(row)] for row in measured]
    console.print(report.rich_table(measured, spreads, title))
    if options.json:
        report.write_json(result, options.json)
        console.print(f"wrote {options.json}")
    if options.plot:
        report.plot(result, options.plot)
        console.print(f"wrote {options.plot}")
    return 1 if bench.failures else 0
