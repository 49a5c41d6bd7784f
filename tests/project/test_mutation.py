"""The mutation tool (tools/mutation): the mutants of small sources, their names, samples, and selection of tests."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from helpers import cases

from tools.mutation import __main__ as mutation
from tools.mutation import mutants, stages
from tools.mutation.mutants import Mutant, mutants_of
from tools.mutation.stages import PARTS, ROOT

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
    return {(m.operator, text[m.start : m.end], m.new) for m in mutants_of(file, text)}


def names(file: str, text: str) -> list[str]:
    return [m.name.removeprefix(f"{file}: ") for m in mutants_of(file, text)]


@cache
def today(file: str) -> list[Mutant]:
    return mutants_of(file, (ROOT / file).read_text(encoding="utf-8"))


def test_mutants_of_a_kernel() -> None:
    found = changes("kernels/a.cu", KERNEL)
    assert {
        ("off by one", "0", "1"), ("comparison", "<", "<="), ("accumulate", "+=", "="), ("arithmetic", "*", "/"),
        ("drop a term", "x[i] *", ""), ("drop a term", "* 2", ""), ("drop a statement", "sum += x[i] * 2", ""),
        ("negate", "n == 7", "!(n == 7)"), ("comparison", "==", "!="), ("drop a statement", "__syncthreads()", ""),
        ("logic", "&&", "||"), ("drop a term", "&& x", ""), ("negate", "sum + n : n", "n : sum + n"),
        ("drop a term", "sum +", ""), ("drop a term", "+ n", ""),
    } <= {(operator, old.strip(), new.strip()) for operator, old, new in found}  # fmt: skip
    assert {m.line for m in mutants_of("kernels/a.cu", KERNEL)} == {5, 6, 7, 8}  # nothing else is touched
    assert mutants.reached(KERNEL)[1] == 1


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
def prefetcher(rows, near):
    ahead = 1 if near else AHEAD + 1
    return lambda i: rows[0].prefetch(i + ahead)
def f(x, y, follows):
    away = 1 + 1
    if follows:
        x.prefetch(away)
    y.prefetch(AHEAD + 1, writes=True)
""",
    )
    assert changes("cupynorm/a.py", "if following:\n    get(1)\nahead = 1") == {
        ("negate", "following", "(not following)"), ("drop a statement", "get(1)", "pass"), ("off by one", "1", "2"),
    }  # fmt: skip


def test_exempt_names_exist() -> None:
    """Prefetches and constants for speed that are not mutated (AHEAD, SPEED)."""
    files = [file for part in PARTS.values() for file in part if file.endswith(".py")]
    words = {word for file in files for word in re.findall(r"\w+", (ROOT / file).read_text(encoding="utf-8"))}
    assert not (mutants.AHEAD | mutants.SPEED) - words


@pytest.mark.full
@pytest.mark.parametrize("part", PARTS)
def test_every_mutant_has_stages(part: str) -> None:
    for file in PARTS[part]:
        for stage in {stage for m in [Mutant(file, 1, 0, 1, "", "", ""), *today(file)] for stage in stages.stages(m)}:
            paths = [word for word in stage if word.startswith("tests/")]
            assert paths
            assert all((ROOT / path).exists() for path in paths), (file, stage)


def test_tables_of_stages_have_mutated_files_only() -> None:
    assert {f"kernels/{file}" for file in stages.USERS} == set(PARTS["kernels"])
    assert set(stages.FIRST) <= set(stages.USERS)
    modules = {Path(file.replace("/__init__", "")).stem for file in (*PARTS["backends"], *PARTS["rest"])}
    assert stages.LOOPS | set(stages.TESTS) <= modules


def test_a_stage_needs_an_existing_file() -> None:
    with pytest.raises(LookupError, match=r"0 files tests/\*/test_no_such\.py"):
        stages.file_of("no_such")


SCOPES = """
constexpr int ROW = sizeof(T) / 4;
struct alignas(16 * ROW) Wide { float v[ROW]; };
template <int N> struct Tile : Base<N> {
    static constexpr int size = N * 2;
    const int rank;
    __device__ Tile(int (&s)[N]) : rank(s[0] % N) { }
    __device__ int get(int k) const {
        const auto more = [&](int i) { return i + 1; };
        return more(k);
    }
};
template <> struct Tile<GRID> { __device__ int get() { return 3; } };
template <class T> __device__ inline void fold(const T (&s)[4], T* out) {
    struct Pair { T a, b; };
    out[5] = s[5];
}
KERNEL(64, 1) merge(Arguments call) { if (call.n) return; }
"""


def test_names_of_kernel_mutants() -> None:
    found = mutants_of("kernels/a.cu", SCOPES)
    scopes = ["", "Wide", "Tile", "Tile.Tile", "Tile.get", "Tile<GRID>.get", "fold", "merge"]
    assert list(dict.fromkeys(m.within for m in found)) == scopes
    assert {
        "<file>: / -> *", "<file>: / 4 -> nothing", "Wide: 16 -> 17", "Tile: 2 -> 3", "Tile.Tile: % -> /",
        "Tile.get: i + -> nothing", "Tile<GRID>.get: 3 -> 4", "merge: call.n -> !(call.n)", "merge: return -> nothing",
        "fold: 4 -> 5", "fold: out[5] = s[5] -> nothing", "fold: 5 -> 6", "fold: 5 -> 6 (2)",
    } <= set(names("kernels/a.cu", SCOPES))  # fmt: skip


def test_names_of_python_mutants() -> None:
    text = """
ONE = 1
class A:
    one = 1
    def f(self, x=1):
        return 1
    class B:
        def f(self):
            return 1
def g():
    def h():
        return 1
    return h
def g():
    return 1
"""
    scopes = ["<module>", "A", "A.f", "A.f", "A.B.f", "g", "g"]
    numbers = ["", "", "", " (2)", "", "", " (2)"]
    assert names("cupynorm/a.py", text) == [f"{s}: 1 -> 2{n}" for s, n in zip(scopes, numbers, strict=True)]
    assert {"f: x * (x - 1) -> x", "f: * -> /", "f: 1 -> 2 (2)"} <= set(names("cupynorm/a.py", PYTHON))


@pytest.mark.parametrize(("file", "text", "line", "changed"), [
    ("kernels/a.cu", KERNEL, "return n > 1", [
        ("sum += x[i] * 2", "sum |= x[i] % 3"),
        ("__device__ int f", "__device__ int e(int n) { return n == 1 && n > 1; }\n\n__device__ int f"),
    ]),
    ("cupynorm/a.py", PYTHON, "return x * (x - 1)", [
        ("x += 2", "x -= 3"), ("def f", "def e(x):\n    return x * (x - 2) - 1\n\ndef f"),
    ]),
], ids=["kernel", "python"])  # fmt: skip
def test_names_outlast_changes_elsewhere(file: str, text: str, line: str, changed: list[tuple[str, str]]) -> None:
    def names_of_line(text: str) -> list[str]:
        return [m.name for m in mutants_of(file, text) if line in text.splitlines()[m.line - 1]]

    before = names_of_line(text)
    assert len(before) > 5
    for old, new in changed:
        text = text.replace(old, new)
        assert names_of_line(text) == before


@pytest.mark.full
def test_names_are_unique() -> None:
    for part, files in PARTS.items():
        known = Counter(m.name for file in files for m in today(file))
        assert len(known) > 1000, part
        assert [name for name, count in known.items() if count > 1] == []


@pytest.mark.full
@pytest.mark.parametrize("part", ["backends", "rest"])
def test_python_mutants_parse(part: str) -> None:
    for file in PARTS[part]:
        text = (ROOT / file).read_text(encoding="utf-8")
        for m in mutants.sample(today(file), 5, 0):
            compile(text[: m.start] + m.new + text[m.end :], file, "exec")


def test_samples_are_reproducible_and_nested() -> None:
    every, sample = mutants_of("kernels/a.cu", KERNEL), mutants.sample
    assert sample(every, 9, 3)[:5] == sample(every, 5, 3) != sample(every, 5, 4)
    assert sample(every, None, 3) == every


@pytest.mark.long
def test_recorded_survivors_are_mutants_with_a_reason() -> None:
    pytest.importorskip("tomllib", reason="needs Python 3.11")
    recorded = mutation.recorded()
    known = {m.name for file in {name.partition(": ")[0] for name in recorded} for m in today(file)}
    for name, reason in recorded.items():
        assert name in known, f"{name}: the code has changed: run it again, and record it anew if it survives"
        assert re.match(r"equivalent: |unobservable: |unseen: ", reason), name


def test_first_stage_of_clusters_and_grids_selects_cases() -> None:
    """The first stage of kernels/group.cuh selects cases by the devices that clusters and grids need."""
    expression = " ".join(stages.stages(Mutant("kernels/group.cuh", 1, 0, 1, "", "", ""))[0])
    words = re.findall(r"\((\w+) or (\w+)\)", expression)[0]
    known = [str(case) for case in cases.variants(turns=True) if case.dtype == "float32"]
    assert all(any(word in name for name in known) for word in words)


def test_interval() -> None:
    low, high = mutation.interval(95, 100)
    assert 0.88 < low < 0.9 and 0.97 < high < 0.98


@pytest.mark.nightly
@pytest.mark.parametrize(("old", "new", "how"), [
    ("FEW_THREADS = ", "1 / 0\nFEW_THREADS = ", "invalid"), ("FEW_THREADS = 128", "FEW_THREADS = 64", "killed"),
])  # fmt: skip
def test_import_failure_is_no_mutant(tmp_path: Path, old: str, new: str, how: str) -> None:
    copy, file = mutation.Copy(tmp_path, 0), "cupynorm/cuda/plan.py"
    text = (copy.root / file).read_text(encoding="utf-8")
    start = text.index(old)
    mutant = Mutant(file, 1, start, start + len(old), new, "", "")
    limits = dict.fromkeys(stages.stages(mutant), 120.0)  # so that no stage runs on the unchanged code first
    assert copy.test(mutant, limits).split()[0] == how
    assert (copy.root / file).read_text(encoding="utf-8") == text
