"""Digests of the bits of all results and statistics over the case table, to show that a change of form changes none.

    python tools/digests.py record before.json numpy compiled simt
    ... change ...
    python tools/digests.py record after.json numpy compiled simt
    python tools/digests.py compare before.json after.json

Digests depend on the machine, NumPy, llvmlite and g++: record both files on one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cupynorm as cn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from helpers import cases
from helpers.backends import use


def digest(*arrays: Any) -> str:
    """A digest of the arrays' shapes, dtypes and bits; of None where there is no array."""
    text = hashlib.sha256()
    for array in arrays:
        host = np.zeros(0) if array is None else np.ascontiguousarray(array)
        text.update(f"{host.shape} {host.dtype}".encode() + host.tobytes())
    return text.hexdigest()[:16]


def recorded(patch: pytest.MonkeyPatch, found: list[str]) -> None:
    """Append a digest to found after each public call, until the patch is undone."""
    forward, backward, double = (
        cn.instance_norm_forward, cn.instance_norm_backward, cn.instance_norm_double_backward
    )  # fmt: skip

    def noted_forward(*args: Any, **given: Any) -> Any:
        y, saved = forward(*args, **given)
        statistics = saved.mean, saved.mean_lo, saved.rstd, given.get("running_mean"), given.get("running_var")
        found.append(digest(y, *statistics))
        return y, saved

    def noted(function: Any) -> Any:
        def call(*args: Any, **given: Any) -> Any:
            results = function(*args, **given)
            found.append(digest(*results))
            return results

        return call

    patch.setattr(cn, "instance_norm_forward", noted_forward)
    patch.setattr(cn, "instance_norm_backward", noted(backward))
    patch.setattr(cn, "instance_norm_double_backward", noted(double))


def runs(name: str) -> Iterator[tuple[str, Any, cases.Case]]:
    """(name, check, case) of all that is run on a backend."""
    for case in dict.fromkeys([*cases.TABLE, *cases.SMALL]):
        yield f"{name} {case}", cases.check, case
        if name != "compiled" and case.activation is None:  # NumPy does a CPU's double backward
            yield f"{name} double {case}", cases.check_double, case
    if name == "simt":
        for case in cases.variants():
            yield f"{name} variant {case}", cases.check, case
        for case in cases.variants(("double_backward",)):
            yield f"{name} variant double {case}", cases.check_double, case


def record(names: list[str]) -> dict[str, list[str]]:
    digests: dict[str, list[str]] = {}
    for name in names:
        for number, (title, check, case) in enumerate(runs(name)):
            seed = int(hashlib.sha256(title.encode()).hexdigest()[:8], 16)
            with use(name) as backend, pytest.MonkeyPatch.context() as patch:
                recorded(patch, digests.setdefault(title, []))
                check(backend, case, np.random.default_rng(seed))
            if number % 50 == 0:
                print(f"{name}: {number} cases", file=sys.stderr, flush=True)
    return digests


def compare(before: dict[str, list[str]], after: dict[str, list[str]]) -> list[str]:
    """What differs, a line for each case."""
    lines = [f"only before: {name}" for name in before.keys() - after.keys()]
    lines += [f"only after: {name}" for name in after.keys() - before.keys()]
    lines += [f"other bits: {name}" for name in before if name in after and before[name] != after[name]]
    return sorted(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    to_record = commands.add_parser("record", help="run the case table and write the digests")
    to_record.add_argument("file", type=Path)
    to_record.add_argument("backends", nargs="+", choices=["numpy", "compiled", "simt"])
    to_compare = commands.add_parser("compare", help="compare two files")
    to_compare.add_argument("files", nargs=2, type=Path)
    given = parser.parse_args()
    if given.command == "record":
        given.file.write_text(json.dumps(record(given.backends), indent=0) + "\n")
        return 0
    before, after = (json.loads(file.read_text()) for file in given.files)
    lines = compare(before, after)
    print(*lines, f"{len(before)} cases before, {len(after)} after, {len(lines)} differences", sep="\n")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
