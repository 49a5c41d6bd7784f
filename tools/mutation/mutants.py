"""The mutants of a text: each is one small change of a kernel or of a Python module."""

from __future__ import annotations

import ast
import itertools
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Mutant:
    """text[start:end] of a file becomes `new`. Its name has the function around it, but neither the number nor the text
    of its line, so that it outlasts changes of other lines."""

    file: str
    line: int
    start: int
    end: int
    new: str
    operator: str
    name: str
    within: str = ""  # the function, class or struct around it, or "class.method"


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
        directive = re.match(r"\s*#\s*(ifn?def|if|elif|else|endif)\b(.*)", line)
        if directive:
            word, condition = directive[1], directive[2]
            seen, later = (True, True) if word.startswith("if") else chains.pop()
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
    called = re.match(r"[a-z_]\w*(\.(template )?\w+)?(<[\w, ]+>)?\(", text)
    return bool(assigned or called) and tokens[0] not in ("if", "for", "while", "return", "constexpr", "static_assert")


def scopes_of(text: str) -> list[tuple[int, int, str]]:
    """Return the start, end and name of each struct and each function of a CUDA source, inner ones first. Whatever is
    inside a function belongs to it."""
    code, _ = reached(text)
    found = []
    opened = [(0, "", False)]  # of each brace: where its header begins, the name, and whether it is in a function
    begin = 0  # of a header
    for mark in re.finditer("[{};]", code):
        if mark[0] == "{":
            _, outer, in_function = opened[-1]
            own, is_function = ("", False) if in_function else _named(code[begin : mark.start()])
            opened.append((begin, ".".join(filter(None, (outer, own))), in_function or is_function))
        elif mark[0] == "}":
            start, name, _ = opened.pop()
            if name != opened[-1][1]:
                found.append((start, mark.end(), name))
        begin = mark.end()
    return found


def _named(header: str) -> tuple[str, bool]:
    """Return the name of the struct or function before a brace, or "", and whether it is a function."""
    header = re.sub(r"template\s*<[^<>]*>", "", header)
    header = re.split(r"(?<!:):(?!:)", header)[0]  # without bases or initialisers
    if re.search(r"\bstruct\b", header):
        match = re.search(r"\w+(<[^()]*>)?\s*$", header)
        return (match[0].strip() if match else "", False)
    while header != (header := re.sub(r"\([^()]*\)", "@", header)):
        pass
    names = [] if "=" in header else re.findall(r"(\w+)@", header)
    return (names[-1], True) if names else ("", False)


class _OfPython(ast.NodeVisitor):
    """Collect the mutants of a Python source, as (start, end, new text, operator, within)."""

    def __init__(self, text: str):
        self.text = text
        self.rows = text.splitlines(keepends=True)
        self.begins = [0, *itertools.accumulate(map(len, self.rows))]
        self.within, self.in_function = "", False
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
                | ast.Expr(value=ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)))
                | ast.If(test=ast.Name(id=name))
                | ast.Assign(targets=[ast.Name(id=name) | ast.Tuple(elts=[ast.Name(id=name), *_])])
            ) if name in AHEAD | SPEED:
                return
        super().visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        defaults = [default for default in (*node.args.defaults, *node.args.kw_defaults) if default is not None]
        self.visit_inside(node.name, [*defaults, *node.body], True)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.visit_inside(node.name, node.body, False)

    def visit_inside(self, name: str, nodes: Iterable[ast.AST], is_function: bool) -> None:
        """Visit the nodes of a function or class. Whatever is inside a function belongs to it."""
        outer = self.within, self.in_function
        if not self.in_function:
            self.within, self.in_function = f"{self.within}.{name}".lstrip("."), is_function
        for node in nodes:
            self.visit(node)
        self.within, self.in_function = outer

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
AHEAD = {
    "prefetch",
    "prefetcher",
    "ahead",
    "fetch",
    "fetches",
    "beside",
    "AHEAD",
    "NEAR",
    "NEAREST",
    "near",
    "away",
    "follows",
}
#: Choices for speed, and guesses of a mean that save a pass: they change no result, and tests repeat no measured
#: numbers.
SPEED = {
    "BLOCK_BYTES", "MIN_CHANNELS", "MIN_CHANNEL_TILE",
    "SHORT_ROW", "TILE", "MOST_RUNS", "MIN_CHANNELS_COMPILED", "SPARE", "SMALL_TABLE", "PAYS", "pays", "STREAM",
    "LONG_RUN", "PLANE_COSTS", "FORWARD_SHORT", "TOGETHER", "BACKWARD_SHORT", "GUESS_PLACES", "TILE_BYTES",
    "CHANNEL_TILE_BYTES", "FEW_THREADS",
    "SPIN_LIMIT", "LEAST", "FEW", "CHUNK", "_guess_place", "WIDE", "LONGEST", "LONGEST_FORWARD",
    "LONGEST_BACKWARD", "CACHED", "ROOM", "NEXT", "AT_A_TIME", "CACHED_BOXES", "FAIR", "WINDOW", "LARGER",
}  # fmt: skip


def mutants_of(file: str, text: str) -> list[Mutant]:
    """Return all mutants of a file, in order of position."""
    if file.endswith(".py"):
        changes, outside = _OfPython(text).found, "<module>"
    else:
        scopes, outside = scopes_of(text), "<file>"
        changes = [
            (*change, next((name for start, end, name in scopes if start <= change[0] < end), ""))
            for change in of_kernel(text)
        ]
    known: Counter[str] = Counter()
    mutants = []
    for start, end, new, operator, within in sorted(set(changes)):
        old, short = (_short(" ".join(part.split())) for part in (text[start:end], new))
        name = f"{file}: {within or outside}: {old} -> {short or 'nothing'}"
        known[name] += 1
        number = f" ({known[name]})" if known[name] > 1 else ""
        line = text.count("\n", 0, start) + 1
        mutants.append(Mutant(file, line, start, end, new, operator, name + number, within))
    return mutants


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:40]} … {text[-19:]}"


def sample(mutants: list[Mutant], count: int | None, seed: int) -> list[Mutant]:
    """Draw `count` mutants at random; a larger sample of the same seed contains a smaller one."""
    return mutants if count is None else random.Random(seed).sample(mutants, len(mutants))[:count]
