"""Mutation testing: break the code in one small place, and see whether the tests notice.

    python -m tools.mutation                                all parts, each mutant (hours)
    python -m tools.mutation kernels --sample 200 --seed 1  a random sample, the same for the same seed
    python -m tools.mutation --only kernels/sums.cuh:52     the mutants of a file, or of one line
    python -m tools.mutation --list                         name them, test nothing

    --jobs N     copies of the checkout that work in parallel (2); the checkout itself is never touched
    --json OUT   the result, written after each mutant; with the same OUT, killed mutants are not tested again
    --quick      the first two stages only: a mutant that survives them counts as a survivor until tested further
    --report     report on OUT, test nothing
    --recheck    also test the survivors recorded in survivors.toml, otherwise counted as survivors

Run it from the root of the checkout. The parts: `kernels`, `backends` (the steps and loops of the CPU backend; plans,
arguments, sources and launches of the CUDA backend), `rest`. Needs Python 3.11, g++ and the extras test, cpu and thinc.
torch and NVRTC (the extra dev) add their tests.

A mutant's name is its file, the function around it and the change, with a number from the second equal change in the
function on. A mutant goes through stages of tests, each of which passes on the unchanged code, and is killed by the
first stage that fails or takes far too long. A change that does not compile, or cannot be imported, is no mutant and is
not counted. A survivor counts as not killed, even if survivors.toml gives a reason; the exit status is 1 if less than
95 % of a part is killed or a survivor has no reason. Not mutated: texts and annotations, preprocessor lines, prefetches
and constants chosen for speed, which change no result (AHEAD, SPEED in mutants.py), and code that only a GPU's compiler
sees, which is counted in lines.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import os
import platform
import queue
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tools.mutation.interval import interval
from tools.mutation.mutants import Mutant, mutants_of, reached, sample
from tools.mutation.stages import PARTS, ROOT, stages

SURVIVORS = Path(__file__).with_name("survivors.toml")
GOAL = 0.95

#: Errors of a kernel that does not compile, and of a Python module that cannot be imported.
NO_MUTANT = (r"SimtError: .* does not compile:", r"while loading conftest|LLVM IR parsing error|SyntaxError")
#: Where no compiled loop is mutated.
NUMPY_ALONE = {"CUPYNORM_COMPILED": "0"}
_clean: defaultdict[tuple[str, ...], threading.Lock] = defaultdict(threading.Lock)


class Copy:
    """A copy of the checkout, in which one mutant at a time is tested."""

    def __init__(self, folder: Path, seed: int):
        self.seed = seed
        self.root = folder / "checkout"
        shutil.copytree(
            ROOT, self.root, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*_cache", ".venv", "venv")
        )
        self.environment = os.environ | {
            "PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1", "CUPYNORM_CACHE_DIR": str(folder / "loops"),
        }  # fmt: skip

    def run(self, stage: tuple[str, ...], limit: float | None = None) -> tuple[str, str]:
        """Return the outcome ("passed", "failed", "timeout", or "nothing" if no test is found) and pytest's output. The
        limit is on processor time, which does not depend on the machine's load; the limit on wall time is five times
        that.
        """
        settings = {} if any("compiled" in word and "not compiled" not in word for word in stage) else NUMPY_ALONE
        settings = settings | dict(word.split("=") for word in stage if re.match(r"[A-Z_]+=", word))
        stage = tuple(word for word in stage if not re.match(r"[A-Z_]+=", word))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=short", "--full",
                   f"--seed={self.seed}", *stage]  # fmt: skip
        seconds = resource.RLIM_INFINITY if limit is None else math.ceil(limit)
        with subprocess.Popen(
            command, cwd=self.root, env=self.environment | settings, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, errors="replace", start_new_session=True,
        ) as process:  # fmt: skip
            resource.prlimit(process.pid, resource.RLIMIT_CPU, (seconds, seconds))
            try:
                said, _ = process.communicate(timeout=limit and 5 * limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                return "timeout", process.communicate()[0]
        if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
            return "timeout", said
        if process.returncode in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
            return "nothing", said
        return ("failed" if process.returncode else "passed"), said

    def clean(self, stage: tuple[str, ...], limits: dict[tuple[str, ...], float]) -> None:
        """Check that a stage passes on the unchanged code. A mutant may take twice as long plus 30 s; see run."""
        began = time.monotonic()
        how, said = self.run(stage)
        if how != "passed":
            what = "tests nothing" if how == "nothing" else "fails"
            raise RuntimeError(f"{' '.join(stage)} {what} on the unchanged code:\n{said[-3000:]}")
        limits[stage] = 30 + 2 * (time.monotonic() - began)
        print(f"clean: {time.monotonic() - began:4.0f} s  {' '.join(stage)}", flush=True)

    def test(self, mutant: Mutant, limits: dict[tuple[str, ...], float], quick: bool = False) -> str:
        """Return the outcome: "survived", "invalid", or "killed by …"."""
        path = self.root / mutant.file
        text = path.read_text(encoding="utf-8")
        broken = text[: mutant.start] + mutant.new + text[mutant.end :]
        for stage in stages(mutant)[: 2 if quick else None]:
            with _clean[stage]:
                if stage not in limits:
                    self.clean(stage, limits)
            path.write_text(broken, encoding="utf-8")
            how, said = self.run(stage, limits[stage])
            path.write_text(text, encoding="utf-8")
            # A module that cannot be imported: of the package, or of the loops, whose tests are left out then.
            if how == "nothing" or (how == "failed" and re.search(NO_MUTANT[path.suffix == ".py"], said)):
                return "invalid"
            if how != "passed":
                by = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.M)
                return f"killed by {by[1] if by and how == 'failed' else f'{how} of {stage[0]}'}"
        return "survived"


# The result


def summary(mutants: list[Mutant], outcomes: dict[str, str], reasons: dict[str, str]) -> dict[str, Any]:
    """Counts of the mutants that have been tested."""
    ended: Counter[str] = Counter(outcomes[m.name].split()[0] for m in mutants if m.name in outcomes)
    survived = [m.name for m in mutants if outcomes.get(m.name) == "survived"]
    equivalent = sum(reasons.get(name, "").startswith("equivalent") for name in survived)
    tested = ended["killed"] + ended["survived"]
    return {
        "killed": ended["killed"], "tested": tested, "invalid": ended["invalid"],
        "share": ended["killed"] / tested if tested else None,
        "interval": interval(ended["killed"], tested) if tested else None,
        "share_without_equivalent": ended["killed"] / (tested - equivalent) if tested > equivalent else None,
        "recorded": sum(name in reasons for name in survived),
        "unexplained": sum(name not in reasons for name in survived),
    }  # fmt: skip


def recorded() -> dict[str, str]:
    """The recorded survivors, each with its reason."""
    import tomllib

    with SURVIVORS.open("rb") as file:
        return {entry["mutant"]: entry["reason"] for entry in tomllib.load(file).get("survivor", [])}


def said(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip().split("\n")[0]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.mutation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    parser.add_argument("--sample", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="FILE[:LINE]")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--recheck", action="store_true")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(unknown)}")

    chosen: dict[str, list[Mutant]] = {}
    totals: dict[str, int] = {}
    unseen = 0
    for part in options.parts or PARTS:
        every: list[Mutant] = []
        for file in PARTS[part]:
            text = (ROOT / file).read_text(encoding="utf-8")
            every += mutants_of(file, text)
            unseen += 0 if file.endswith(".py") else reached(text)[1]
        if options.only:
            file, _, line = options.only.partition(":")
            every = [m for m in every if m.file == file and (not line or m.line == int(line))]
            if not every:
                continue
        totals[part] = len(every)
        chosen[part] = sample(every, options.sample, options.seed)
    if not chosen:
        parser.error(f"no mutants in {options.only}")
    if options.list:
        for mutant in (m for part in chosen.values() for m in part):
            print(f"{mutant.operator:17}{mutant.line:5} {mutant.name}")
        print({part: f"{len(chosen[part])} of {totals[part]}" for part in chosen})
        return 0

    reasons = recorded()
    sources = {
        part: hashlib.sha256(b"".join((ROOT / file).read_bytes() for file in PARTS[part])).hexdigest()[:16]
        for part in chosen
    }
    outcomes: dict[str, str] = {}
    if options.json and options.json.exists():
        before = json.loads(options.json.read_text(encoding="utf-8"))
        same = {file for part in chosen if before["sources"].get(part) == sources[part] for file in PARTS[part]}
        outcomes = {
            name: how for name, how in before["outcomes"].items()
            if name.partition(":")[0] in same and (how != "survived" or options.report)  # there may be new tests
        }  # fmt: skip
    if not options.recheck:
        outcomes |= dict.fromkeys(reasons, "survived")

    def result() -> dict[str, Any]:
        done = {part: [m for m in mutants if m.name in outcomes] for part, mutants in chosen.items()}
        by_operator: dict[str, dict[str, Any]] = {}
        for part, mutants in done.items():
            operators = defaultdict(list)
            for mutant in mutants:
                operators[mutant.operator].append(mutant)
            by_operator[part] = {
                name: {key: summary(group, outcomes, reasons)[key] for key in ("killed", "tested", "invalid")}
                for name, group in sorted(operators.items())
            }
        names = [m.name for mutants in done.values() for m in mutants]
        return {
            "date": datetime.date.today().isoformat(),
            "commit": said("git", "rev-parse", "HEAD"), "sources": sources,
            "python": platform.python_version(), "g++": said("g++", "--version"),
            "quick": options.quick, "seed": options.seed,
            "sample": {part: len(mutants) for part, mutants in chosen.items()},
            "mutants": totals, "lines_out_of_the_emulators_reach": unseen,
            "parts": {part: summary(mutants, outcomes, reasons) for part, mutants in done.items()},
            "by_operator": by_operator,
            "survivors": {name: reasons.get(name) for name in names if outcomes[name] == "survived"},
            "outcomes": {name: outcomes[name] for name in names},
        }  # fmt: skip

    work = [m for mutants in chosen.values() for m in mutants if m.name not in outcomes and not options.report]
    with tempfile.TemporaryDirectory(prefix="cupynorm-mutation-") as folder:
        copies: queue.Queue[Copy] = queue.Queue()
        for number in range(options.jobs):
            copies.put(Copy(Path(folder, str(number)), options.seed))
        limits: dict[tuple[str, ...], float] = {}
        lock = threading.Lock()

        def test(mutant: Mutant) -> None:
            copy = copies.get()
            began = time.monotonic()
            try:
                how = copy.test(mutant, limits, options.quick)
            finally:  # otherwise others wait for the copy, and an error shows only at the end
                copies.put(copy)
            with lock:
                outcomes[mutant.name] = how
                print(f"{time.monotonic() - began:4.0f} s  {how}  {mutant.name}", flush=True)
                if options.json:
                    options.json.write_text(json.dumps(result(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(test, work))

    end = result()
    if options.json:
        options.json.write_text(json.dumps(end, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    bad = False
    for part, counts in end["parts"].items():
        if not counts["tested"]:
            print(f"{part}: none tested")
            bad = True
            continue
        low, high = counts["interval"]
        print(
            f"{part}: {counts['killed']} of {counts['tested']} killed, {counts['share']:.1%}"
            f" (of {totals[part]} mutants; 95 % interval {low:.1%} to {high:.1%}); without the proven equivalent"
            f" {counts['share_without_equivalent']:.1%}; {counts['recorded']} survivors recorded,"
            f" {counts['unexplained']} unexplained; {counts['invalid']} were no mutants"
        )
        bad |= bool(counts["unexplained"]) or (part != "rest" and counts["share"] < GOAL)
    print(f"out of the emulator's reach: {unseen} lines of the kernels")
    for name, reason in end["survivors"].items():
        print(f"  {name}\n      {reason or 'unexplained'}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
