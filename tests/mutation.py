"""Mutation testing: break the code in one small place, and see whether the tests notice.

    python tests/mutation.py                                all parts, each mutant (hours)
    python tests/mutation.py kernels --sample 200 --seed 1  a random sample, the same for the same seed
    python tests/mutation.py --only kernels/sums.cuh:52     the mutants of a file, or of one line
    python tests/mutation.py --list                         name them, test nothing

    --jobs N     copies of the checkout that work in parallel (2); the checkout itself is never touched
    --json OUT   the result, written after each mutant; with the same OUT, killed mutants are not tested again
    --quick      the first two stages only: a mutant that survives them counts as a survivor until tested further
    --report     report on OUT, test nothing
    --recheck    also test the survivors recorded in mutation_survivors.toml, otherwise counted as survivors

The parts: `kernels`, `backends` (the steps and loops of the CPU backend; plans, sources and launches of the CUDA
backend), `rest`.
Needs Python 3.11, g++, and the extras test and cpu; torch and NVRTC (the extra dev) add their tests.

A mutant goes through stages of tests, each of which passes on the unchanged code, and is killed by the first stage that
fails or takes far too long. A change that does not compile, or cannot be imported, is no mutant and is not counted. A
survivor counts as not killed, even if mutation_survivors.toml gives a reason; the exit status is 1 if less than 95 % of
a part is killed or a survivor has no reason. Not mutated: texts and annotations, preprocessor lines, prefetches and
constants chosen for speed, which change no result (AHEAD, SPEED), and code that only a GPU's compiler sees, which is
counted in lines.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import hashlib
import itertools
import json
import math
import os
import platform
import queue
import random
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SURVIVORS = Path(__file__).with_name("mutation_survivors.toml")
GOAL = 0.95

BACKENDS = (
    *(f"cupynorm/cpu/{name}.py" for name in (
        "__init__", "blocking", "gelu", "numba_activations", "numba_backward", "numba_forward", "numba_geometry",
        "numba_intrinsics", "numba_moves", "numba_path", "numba_rehearsal", "numba_tasks", "numpy_activations",
        "numpy_double", "numpy_path",
    )),
    *(f"cupynorm/cuda/{name}.py" for name in ("launch", "plan", "source")),
)  # fmt: skip
#: Without the modules that need a GPU or Chainer, and without commands.
REST = (
    "_checks", "_types", "backend", "config", "cpu/forks", "cpu/halves", "cpu/numba_cache", "cpu/numba_import",
    "cpu/result_pool", "cpu/running", "cpu/thread_pool", "cpu_count", "cuda/describe", "devices", "explain",
    "functional", "inference", "layers", "thinc", "warm",
)  # fmt: skip
PARTS = {
    "kernels": tuple(sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "kernels").iterdir())),
    "backends": BACKENDS,
    "rest": tuple(f"cupynorm/{name}.py" for name in REST),
}


@dataclass(frozen=True)
class Mutant:
    """text[start:end] of a file becomes `new`. Its name has no line number, so that it outlasts changes elsewhere."""

    file: str
    line: int
    start: int
    end: int
    new: str
    operator: str
    name: str
    within: str = ""  # the function or class of a Python module around it


# The mutants of a text


SWAPPED = {
    "+": "-", "-": "+", "*": "/", "/": "*", "//": "*", "%": "/", "<": "<=", "<=": "<", ">": ">=", ">=": ">",
    "==": "!=", "!=": "==", "&&": "||", "||": "&&", "and": "or", "or": "and", "<<": ">>", ">>": "<<",
    "&": "|", "|": "&", "is": "is not", "is not": "is", "in": "not in", "not in": "in",
}  # fmt: skip
#: The precedence of C's binary operators.
BINDS = {op: level for level, ops in enumerate(
    [("||",), ("&&",), ("|",), ("&",), ("==", "!="), ("<", "<=", ">", ">="), ("<<", ">>"), ("+", "-"), ("*", "/", "%")]
) for op in ops}  # fmt: skip
OPERATOR_NAMES = {1: "logic", 4: "comparison", 5: "comparison", 7: "arithmetic", 8: "arithmetic"}

Change = tuple[int, int, str, str]  # start, end, new text, operator


def reached(text: str) -> tuple[str, int]:
    """Blank out comments, preprocessor lines and code that the emulator does not see, at the same length; also return
    the number of these unseen lines."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    text = re.sub(r"//[^\n]*|/\*.*?\*/|\"[^\"\n]*\"", blank, text, flags=re.S)
    lines, out, unseen = text.splitlines(keepends=True), [], 0
    chains: list[tuple[bool, bool]] = []  # of each #if: this branch is seen, later ones may be
    continued = False
    for line in lines:
        directive = re.match(r"\s*#\s*(if|elif|else|endif)\b(.*)", line)
        if directive:
            word, condition = directive[1], directive[2]
            seen, later = (True, True) if word == "if" else chains.pop()
            if word != "endif":
                gpu = "!defined(SIMT)" in condition or ("__CUDA_ARCH__" in condition and "SIMT" not in condition)
                seen = later and not gpu
                later = later and not re.search(r"(?<!!)defined\(SIMT\)", condition)
                chains.append((seen, later))
        hidden = not all(seen for seen, _ in chains)
        preprocessor = continued or line.lstrip().startswith("#")
        continued = preprocessor and line.rstrip().endswith("\\")
        unseen += hidden and bool(line.strip()) and not directive
        out.append(re.sub(r"[^\n]", " ", line) if hidden or preprocessor else line)
    return "".join(out), unseen


TOKEN = re.compile(
    r"0x[\da-fA-F]+|\d[\w.]*(?:[eE][-+]\d+f?)?|[A-Za-z_]\w*"
    r"|<<=|>>=|->|\+\+|--|<<|>>|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|[^\s\w]"
)
OPEN, CLOSE = "([{", ")]}"


def of_kernel(text: str) -> Iterator[Change]:
    """The mutants of a CUDA source. Its binary operators have spaces around them, its template brackets do not."""
    code, _ = reached(text)
    tokens = [(m.start(), m.end(), m[0]) for m in TOKEN.finditer(code)]
    depths, inside, opened = [], [], [""]  # of each token: its depth in brackets, and the innermost bracket
    for *_, token in tokens:
        if token in CLOSE:
            opened.pop()
        depths.append(len(opened))
        inside.append(opened[-1])
        if token in OPEN:
            opened.append(token)

    def binary(i: int) -> bool:
        start, end, token = tokens[i]
        return token in BINDS and code[start - 1] in " \n" and code[end] in " \n"

    def operand(i: int, step: int, level: int) -> int:
        """The last token of an operand of the operator at i: it ends before an operator that binds no tighter."""
        j = i + step
        while True:
            token = tokens[j][2]
            if depths[j] < depths[i] or (depths[j] == depths[i] and (
                token in (";", ",", "?", ":", "=", "return", "{", "}") or (len(token) > 1 and token[-1] == "=" and
                token not in BINDS) or (binary(j) and BINDS[token] + (step > 0) <= level)
            )):  # fmt: skip
                return j - step
            j += step

    def closing(i: int) -> int:
        return next(j for j in range(i + 1, len(tokens)) if depths[j] == depths[i] and tokens[j][2] in CLOSE)

    def begins_statement(i: int) -> bool:
        before = tokens[i - 1][2] if i else ";"
        if inside[i] not in ("", "{"):  # the parts of a for
            return False
        if before == ")":
            j = next(j for j in range(i - 2, -1, -1) if depths[j] == depths[i - 1])
            return tokens[j - 1][2] in ("if", "for", "while")
        return before in (";", "{", "}", "else")

    for i, (start, end, token) in enumerate(tokens):
        before = tokens[i - 1][2] if i else ";"
        if binary(i):
            level = BINDS[token]
            yield start, end, SWAPPED[token], OPERATOR_NAMES.get(level, "bits")
            if level in (0, 1, 7, 8) and token != "%":
                yield tokens[i - 1][1], tokens[operand(i, 1, level)][1], "", "drop a term"
                if token in "+*":
                    yield tokens[operand(i, -1, level)][0], tokens[i + 1][0], "", "drop a term"
        elif re.fullmatch(r"[-+*/]=|\|=", token):
            yield start, end, "=", "accumulate"
        elif re.fullmatch(r"\d+", token) and before != "unroll":
            yield start, end, str(int(token) + 1), "off by one"
        elif token in ("if", "while") and tokens[i + 1][2] == "(":
            last = closing(i + 1)
            inner = text[tokens[i + 1][1] : tokens[last][0]]
            yield tokens[i + 1][1], tokens[last][0], f"!({inner})", "negate"
        elif token == "?":
            colon = next(j for j in range(i + 1, len(tokens)) if depths[j] == depths[i] and tokens[j][2] == ":")
            last = operand(colon, 1, -1)
            yes, no = text[tokens[i + 1][0] : tokens[colon - 1][1]], text[tokens[colon + 1][0] : tokens[last][1]]
            yield tokens[i + 1][0], tokens[last][1], f"{no} : {yes}", "negate"
        elif re.match(r"[a-z_*]", token) and begins_statement(i):
            last = next((j for j in range(i, len(tokens)) if tokens[j][2] == ";" and depths[j] == depths[i]), None)
            if last is not None and _is_statement([t for *_, t in tokens[i:last]], code[start:]):
                yield start, tokens[last][0], "", "drop a statement"


def _is_statement(tokens: list[str], text: str) -> bool:
    """True for an assignment, a call, return or continue; not for declarations, which other code needs to compile."""
    if tokens in (["return"], ["continue"]):
        return True
    assigned = re.match(r"\*?[a-z_][\w.]*(->\w+)?(\[[^;=]*?\])?(\.\w+(\[[^;=]*?\])?)? ([-+*/|]?=) ", text)
    called = re.match(r"[a-z_]\w*(\.\w+)?(<[\w, ]+>)?\(", text)
    return bool(assigned or called) and tokens[0] not in ("if", "for", "while", "return", "constexpr", "static_assert")


class _OfPython(ast.NodeVisitor):
    """Collect the mutants of a Python source, as (start, end, new text, operator, within)."""

    def __init__(self, text: str):
        self.text = text
        self.rows = text.splitlines(keepends=True)
        self.begins = [0, *itertools.accumulate(map(len, self.rows))]
        self.within = ""
        self.found: list[tuple[int, int, str, str, str]] = []
        self.visit(ast.parse(text))

    def at(self, line: int, column: int) -> int:
        return self.begins[line - 1] + len(self.rows[line - 1].encode()[:column].decode())  # ast counts bytes

    def span(self, node: Any) -> tuple[int, int]:
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)

    def source(self, node: Any) -> str:
        start, end = self.span(node)
        text = self.text[start:end]
        return f"({text})" if isinstance(node, (ast.BinOp, ast.BoolOp, ast.Compare, ast.IfExp)) else text

    def put(self, node: Any, new: str, operator: str) -> None:
        self.found.append((*self.span(node), new, operator, self.within))

    def swap(self, left: Any, right: Any, operator: str) -> None:
        """Swap the operator between two expressions, which may have brackets and comments beside it."""
        first, last = self.span(left)[1], self.span(right)[0]
        match = re.search(r"//|<=|>=|==|!=|not in|is not|[-+*/%<>]|\b(?:is|in|and|or)\b", self.text[first:last])
        if match and match[0] in SWAPPED:
            new = SWAPPED[match[0]]
            self.found.append((first + match.start(), first + match.end(), new, operator, self.within))

    def visit(self, node: ast.AST) -> None:
        match node:
            case (
                ast.FunctionDef(name=name)
                | ast.Expr(value=ast.Call(func=ast.Name(id=name)))
                | ast.If(test=ast.Name(id=name))
                | ast.Assign(targets=[ast.Name(id=name) | ast.Tuple(elts=[ast.Name(id=name), *_])])
            ) if name in AHEAD | SPEED:
                return
        super().visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        before = self.within
        self.within = before or node.name
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        for statement in node.body:
            self.visit(statement)
        self.within = before

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        before = self.within
        self.within = before or node.name
        for statement in node.body:
            self.visit(statement)
        self.within = before

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass  # texts are not mutated

    def visit_Raise(self, node: ast.Raise) -> None:
        self.put(node, "pass", "drop a statement")

    def visit_Assign(self, node: ast.Assign) -> None:
        if isinstance(node.targets[0], ast.Name) and node.targets[0].id in ("__all__", "Index"):
            return
        targets = [t for target in node.targets for t in getattr(target, "elts", [target])]
        if not all(isinstance(target, ast.Name) for target in targets):  # otherwise a name is undefined
            self.put(node, "pass", "drop a statement")
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self.put(node, "pass", "drop a statement")
            self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.put(node, f"{self.source(node.target)} = {self.source(node.value)}", "accumulate")
        self.put(node, "pass", "drop a statement")
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if any(isinstance(n, ast.JoinedStr) or (isinstance(n, ast.Constant) and isinstance(n.value, str))
               for n in ast.walk(node)):  # fmt: skip
            return
        if isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod)):
            self.swap(node.left, node.right, "arithmetic")
            self.put(node, self.source(node.left), "drop a term")
            if isinstance(node.op, (ast.Add, ast.Mult)):
                self.put(node, self.source(node.right), "drop a term")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        for i, (left, right) in enumerate(zip(node.values, node.values[1:], strict=False)):
            if len(node.values) == 2:
                self.swap(left, right, "logic")
            others = [self.source(value) for j, value in enumerate(node.values) if j != i + 1]
            self.put(node, (" and " if isinstance(node.op, ast.And) else " or ").join(others), "drop a term")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for left, right in zip([node.left, *node.comparators], node.comparators, strict=False):
            self.swap(left, right, "comparison")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if type(node.value) is int:
            self.put(node, str(node.value + 1), "off by one")

    def visit_If(self, node: ast.If | ast.IfExp | ast.While) -> None:
        self.put(node.test, f"(not {self.source(node.test)})", "negate")
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.visit_If(node)

    def visit_While(self, node: ast.While) -> None:
        self.visit_If(node)


#: Prefetches: the function, its arguments, and its condition.
AHEAD = {"prefetch_run", "AHEAD", "NEAR", "away", "follows"}
#: Choices for speed, and guesses of a mean that save a pass: they change no result, and tests repeat no measured
#: numbers.
SPEED = {
    "BLOCK_BYTES", "MIN_CHANNELS", "MIN_CHANNEL_TILE",
    "SHORT_ROW", "TILE", "MOST_RUNS", "MIN_CHANNELS_COMPILED", "SPARE", "SMALL_TABLE", "PAYS", "pays", "STREAM",
    "LONG_RUN", "PLANE_COSTS", "FORWARD_SHORT", "TOGETHER", "BACKWARD_SHORT", "GUESS_PLACES", "TILE_BYTES",
    "CHANNEL_TILE_BYTES", "FEW_THREADS",
    "SPIN_LIMIT", "LEAST", "FEW", "CHUNK", "_guess", "_guess_channels", "_middle",
    "CLOSE", "AT_A_TIME", "CACHED_BOXES", "FAIR", "WINDOW", "LARGER",
}  # fmt: skip


def mutants_of(file: str, text: str) -> list[Mutant]:
    """Return all mutants of a file, in order of position."""
    python = file.endswith(".py")
    changes = _OfPython(text).found if python else [(*change, "") for change in of_kernel(text)]
    known: Counter[str] = Counter()
    rows = text.splitlines()
    mutants = []
    for start, end, new, operator, within in sorted(set(changes)):
        line = text.count("\n", 0, start) + 1
        where = rows[line - 1].strip()
        old = " ".join(text[start:end].split())
        long = " ".join(new.split())
        name = f"{file}: {where}: {_short(old)} -> {_short(long) or 'nothing'}"
        known[name] += 1
        name += f" ({known[name]})" if known[name] > 1 else ""
        mutants.append(Mutant(file, line, start, end, new, operator, name, within))
    return mutants


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:40]} … {text[-19:]}"


def sample(mutants: list[Mutant], count: int | None, seed: int) -> list[Mutant]:
    """Draw `count` mutants at random; a larger sample of the same seed contains a smaller one."""
    return mutants if count is None else random.Random(seed).sample(mutants, len(mutants))[:count]


# The tests of a mutant


def k(file: str, expression: str) -> tuple[str, ...]:
    return (f"tests/test_{file}.py", "-k", expression)


#: The compiled loops, and the modules that only calls of these loops use.
LOOPS = {
    "numba_activations", "numba_backward", "numba_forward", "numba_geometry", "numba_intrinsics", "numba_moves",
    "numba_path", "numba_tasks",
}  # fmt: skip
#: Functions and classes outside numba_moves that only copies to windows use.
FOR_MOVES = {"MovedWork", "transposition", "_copy", "copy_row"}


def stages(mutant: Mutant) -> list[tuple[str, ...]]:
    """Return arguments of pytest for each stage, quick ones first: compiling a module or a loop takes seconds."""
    path = Path(mutant.file)
    name = path.parent.name if path.stem == "__init__" else path.stem
    if mutant.file.startswith("kernels/"):
        return _kernel_stages(name)
    without = ("-m", "not simt and not compiled and not nvrtc")
    if name == "numba_rehearsal" or mutant.within == "rehearsals":
        return [
            ("tests/test_warmup.py", "-m", "compiled", "-k", "not really and not afterwards"),
            ("tests/test_warmup.py", "-m", "compiled"),
        ]
    if name in LOOPS or mutant.within == "_choose":
        return _loop_stages(name, mutant.within)
    if name == "numba_cache":
        return [("tests/test_compiling.py", "-m", "compiled")]
    if name == "numba_import":
        return [("tests/test_cpu.py", "CUPYNORM_COMPILED=1", "-k", "without_numba or a_numba or numba_is_imported")]
    files = {
        "_checks": "refusals functional layers semantics",
        "_types": "functional refusals cpu",
        "backend": "house functional",
        "blocking": "choices cpu double_backward",
        "config": "house cpu memory invariance",
        "cpu": "choices cpu double_backward plan epilogue semantics functional accuracy layers together",
        "cpu_count": "cpu",
        "describe": "plan functional info invariance",
        "devices": "functional layers checkpoints refusals info package",
        "explain": "functional info plan invariance semantics",
        "forks": "together",
        "functional": "functional refusals semantics properties double_backward epilogue layers",
        "gelu": "choices epilogue accuracy",
        "halves": "halves cpu",
        "inference": "layers semantics refusals",
        "launch": "launch plan semantics functional refusals invariance together",
        "layers": "layers loops checkpoints refusals together functional",
        "numpy_activations": "choices epilogue accuracy semantics",
        "numpy_double": "choices double_backward cpu",
        "numpy_path": "choices cpu epilogue semantics functional accuracy layers",
        "plan": "plan invariance functional info",
        "result_pool": "memory cpu together",
        "running": "together refusals semantics cpu",
        "source": "plan package",
        "thinc": "thinc",
        "thread_pool": "cpu together info memory",
        "warm": "warmup plan",
    }[name]
    own = tuple((f"tests/test_{file}.py", *without) for file in files.split())
    if name in ("cpu", "blocking", "gelu") or name.startswith("numpy_"):
        double = "double" if name == "numpy_double" else "not double"
        numpy = [k("cases", f"numpy and {double} and float32"), own[0], k("cases", "numpy"), *own[1:]]
        importing = ("tests/test_cpu.py", "-m", "compiled", "-k", "without_numba")
        return [*numpy, importing] if name == "cpu" else numpy
    if name in ("launch", "plan", "source"):
        emulated = [
            k("cases", "simt and float32 and (table or small)"), k("simt", "launches or reach"),
            k("cases", "simt and float32"), k("simt", "not barrier and not detects"), k("cases", "simt"),
            *((f"tests/test_{file}.py", "-m", "simt") for file in ("semantics", "epilogue", "double_backward")),
        ]  # fmt: skip
        return [*own[:1], *emulated, *own[1:]]
    return [*own, ("tests/test_cases.py", "-k", "numpy and float32")]


def _loop_stages(name: str, within: str) -> list[tuple[str, ...]]:
    small = "test_small and compiled and float32"
    moves = name == "numba_moves" or within in FOR_MOVES
    kind = re.search("channel|short", within)
    case = f"{small} and {'2x8x5x6' if moves else '1x2x100x100'}"
    if name == "numba_activations":
        case = "test_table and compiled and 3x4x6x7 and float32"
    elif kind:
        case = {"channel": "test_table and compiled and 2x32x5x6", "short": f"{small} and 2x3x5x7"}[kind[0]]
    layouts = ("tests/test_cpu.py", "-m", "compiled", "-k", "layouts_find")  # compiles nothing, like choices
    choices = (f"tests/test_{'moves' if moves else 'choices'}.py", "-m", "compiled")
    quick = ("NUMBA_OPT=0", "-W", "ignore:Cannot cache", *k("cases", case))
    chooses = name == "numba_path" or within in ("planes_together", "_choose")
    return [
        *[layouts] * (within == "Layout"),
        *((choices, quick) if chooses else (quick, choices)),
        k("cases", small),
        k("cases", "test_table and compiled"),
        ("tests/test_cpu.py", "-m", "compiled"),
        ("tests/test_accuracy.py", "tests/test_semantics.py", "tests/test_epilogue.py", "tests/test_properties.py",
         "-m", "compiled"),
    ]  # fmt: skip


#: Headers that the double backward uses as well.
SHARED = ("affine", "channels", "staging", "group", "plane", "sums", "tiles", "types")


def _kernel_stages(name: str) -> list[tuple[str, ...]]:
    double = "double" in name
    plain = "and double" if double else "and not double and not epilogue_variant"
    first = {
        "epilogue": "simt and (relu or silu or gelu) and float32 and test_table",
        "group": "simt and float32 and (registers4 or grid) and not double and not epilogue_variant",
    }.get(name, f"simt and float32 and {'test_double_small' if double else 'test_small'}")
    return [
        k("cases", first),
        (
            "tests/test_simt.py",
            *k("cases", f"simt and float32 {plain} or same_bits or sixteen or more_tiles or two_dimensions"),
        ),
        k("cases", f"simt and float16 {plain}"),
        k("cases", f"simt and float64 {plain}"),
        k("cases", f"simt and bfloat16 {plain}"),
        *([] if double else [("tests/test_epilogue.py", "-m", "simt", "-k", "float32")]),
        *([k("cases", "simt and double")] if name in SHARED else []),
        ("tests/test_accuracy.py", "-m", "simt", "-k", "not every_row"),
        ("-m", "simt", "tests/test_semantics.py", "tests/test_properties.py", "tests/test_double_backward.py"),
        ("tests/test_compile.py",),
    ]  # fmt: skip


#: Errors of a kernel that does not compile, and of a Python module that cannot be imported.
NO_MUTANT = (r"SimtError: .* does not compile:", r"while loading conftest|TypingError|LoweringError|SyntaxError")
#: Saves numba's seconds if no compiled loop is mutated.
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
            "PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1", "NUMBA_CACHE_DIR": str(folder / "numba"),
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


def interval(killed: int, tested: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share found in a sample."""
    z, p = 1.96, killed / tested
    middle, half = p + z * z / (2 * tested), z * math.sqrt(p * (1 - p) / tested + z * z / (4 * tested**2))
    return (middle - half) / (1 + z * z / tested), (middle + half) / (1 + z * z / tested)


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        totals[part] = len(every)
        chosen[part] = sample(every, options.sample, options.seed)
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
