"""The mutation tool (mutation.py): the mutants of small sources, reproducible samples, its selection of tests."""

from __future__ import annotations

import re
from pathlib import Path

import cases
import mutation
import pytest

KERNEL = """
// a + b is a comment
#define SUM(a, b) a + b
__device__ int f(const int* x, int n) {
    int sum = 0;
    for (int i = 0; i < n; i++) sum += x[i] * 2;
    if (n == 7) __syncthreads();
    return n > 1 && x ? sum + n : n;
}
#if !defined(SIMT)
__device__ int g(int n) { return n + 1; }
#endif
"""

PYTHON = '''
def f(x: int = 1) -> int:
    """Text 1 + 1."""
    if x < 3 and x:
        x += 2
    self.put(x)
    if not x:
        raise ValueError(f"{x + 1} is too " + "much")
    return x * (x - 1)
'''


def changes(file: str, text: str) -> set[tuple[str, str, str]]:
    return {(m.operator, text[m.start : m.end], m.new) for m in mutation.mutants_of(file, text)}


def test_mutants_of_a_kernel() -> None:
    found = changes("kernels/a.cu", KERNEL)
    assert {
        ("off by one", "0", "1"), ("comparison", "<", "<="), ("accumulate", "+=", "="), ("arithmetic", "*", "/"),
        ("drop a term", "x[i] *", ""), ("drop a term", "* 2", ""), ("drop a statement", "sum += x[i] * 2", ""),
        ("negate", "n == 7", "!(n == 7)"), ("comparison", "==", "!="), ("drop a statement", "__syncthreads()", ""),
        ("logic", "&&", "||"), ("drop a term", "&& x", ""), ("negate", "sum + n : n", "n : sum + n"),
        ("drop a term", "sum +", ""), ("drop a term", "+ n", ""),
    } <= {(operator, old.strip(), new.strip()) for operator, old, new in found}  # fmt: skip
    assert {m.line for m in mutation.mutants_of("kernels/a.cu", KERNEL)} == {5, 6, 7, 8}  # nothing else is touched
    assert mutation.reached(KERNEL)[1] == 1


def test_mutants_of_a_python_module() -> None:
    found = changes("cupynorm/a.py", PYTHON)
    assert found == {
        ("off by one", "1", "2"), ("off by one", "3", "4"), ("off by one", "2", "3"),
        ("comparison", "<", "<="), ("logic", "and", "or"), ("drop a term", "x < 3 and x", "(x < 3)"),
        ("negate", "x < 3 and x", "(not (x < 3 and x))"), ("negate", "not x", "(not not x)"),
        ("accumulate", "x += 2", "x = 2"), ("drop a statement", "x += 2", "pass"),
        ("drop a statement", "self.put(x)", "pass"),
        ("drop a statement", 'raise ValueError(f"{x + 1} is too " + "much")', "pass"),
        ("arithmetic", "*", "/"), ("drop a term", "x * (x - 1)", "x"), ("drop a term", "x * (x - 1)", "(x - 1)"),
        ("arithmetic", "-", "+"), ("drop a term", "x - 1", "x"),
    }  # fmt: skip


def test_prefetches_are_not_mutated() -> None:
    assert not changes(
        "cupynorm/a.py",
        """
AHEAD = 4096
def prefetch_run(x, o, lo, hi):
    for i in range(lo, hi, 1 + 1):
        prefetch(x, o + i)
def f(x, o, lo, hi):
    away, away_dy = x[0, 1], x[2, 1]
    follows = hi - lo < 2
    if follows:
        prefetch_run(x, o + away, lo, hi)
    prefetch_run(x, o + AHEAD, lo, hi)
""",
    )
    assert changes("cupynorm/a.py", "if following:\n    fetch(1)\nahead = 1") == {
        ("negate", "following", "(not following)"), ("drop a statement", "fetch(1)", "pass"), ("off by one", "1", "2"),
    }  # fmt: skip


@pytest.mark.parametrize("part", mutation.PARTS)
def test_every_mutant_has_stages(part: str) -> None:
    for file in mutation.PARTS[part]:
        mutants = mutation.mutants_of(file, (mutation.ROOT / file).read_text(encoding="utf-8"))
        assert all(mutation.stages(m) for m in mutants)


def test_mutants_know_what_they_are_within() -> None:
    text = "ONE = 1\nclass A:\n    def f():\n        return 1\ndef g():\n    def h():\n        return 1\n"
    assert [m.within for m in mutation.mutants_of("cupynorm/a.py", text)] == ["", "A", "g"]


@pytest.mark.full
@pytest.mark.parametrize("part", mutation.PARTS)
def test_python_mutants_parse_and_have_unique_names(part: str) -> None:
    names = []
    for file in mutation.PARTS[part]:
        text = (mutation.ROOT / file).read_text(encoding="utf-8")
        mutants = mutation.mutants_of(file, text)
        names += [m.name for m in mutants]
        for m in mutation.sample([m for m in mutants if file.endswith(".py")], 5, 0):
            compile(text[: m.start] + m.new + text[m.end :], file, "exec")
    assert len(names) == len(set(names)) > 1000


def test_samples_are_reproducible_and_nested() -> None:
    mutants = mutation.mutants_of("kernels/a.cu", KERNEL)
    assert mutation.sample(mutants, 9, 3)[:5] == mutation.sample(mutants, 5, 3) != mutation.sample(mutants, 5, 4)
    assert mutation.sample(mutants, None, 3) == mutants


@pytest.mark.long
def test_recorded_survivors_are_mutants_with_a_reason() -> None:
    pytest.importorskip("tomllib", reason="needs Python 3.11")
    recorded = mutation.recorded()
    names = {
        m.name
        for file in {name.partition(": ")[0] for name in recorded}
        for m in mutation.mutants_of(file, (mutation.ROOT / file).read_text(encoding="utf-8"))
    }
    for name, reason in recorded.items():
        assert name in names, f"{name}: the code has changed: run it again, and record it anew if it survives"
        assert re.match(r"equivalent: |unobservable: |unseen: ", reason), name


def test_first_stage_of_clusters_and_grids_selects_cases() -> None:
    """The first stage of kernels/group.cuh selects cases by the devices that clusters and grids need."""
    expression = " ".join(mutation.stages(mutation.Mutant("kernels/group.cuh", 1, 0, 1, "", "", ""))[0])
    words = re.findall(r"\((\w+) or (\w+)\)", expression)[0]
    names = [str(case) for case in cases.variants(turns=True) if case.dtype == "float32"]
    assert all(any(word in name for name in names) for word in words)


def test_interval() -> None:
    low, high = mutation.interval(95, 100)
    assert 0.88 < low < 0.9 and 0.97 < high < 0.98


@pytest.mark.full
@pytest.mark.parametrize(("old", "new", "how"), [
    ("FEW_THREADS = ", "1 / 0\nFEW_THREADS = ", "invalid"), ("FEW_THREADS = 128", "FEW_THREADS = 64", "killed"),
])  # fmt: skip
def test_import_failure_is_no_mutant(tmp_path: Path, old: str, new: str, how: str) -> None:
    copy, file = mutation.Copy(tmp_path, 0), "cupynorm/cuda/plan.py"
    text = (copy.root / file).read_text(encoding="utf-8")
    start = text.index(old)
    mutant = mutation.Mutant(file, 1, start, start + len(old), new, "", "")
    limits = dict.fromkeys(mutation.stages(mutant), 120.0)  # so that no stage runs on the unchanged code first
    assert copy.test(mutant, limits).split()[0] == how
    assert (copy.root / file).read_text(encoding="utf-8") == text
