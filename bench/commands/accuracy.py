"""Accuracy of cupynorm and its peers on difficult data: python -m bench accuracy --help.

The exact answer is computed in extended precision (NumPy's longdouble) from the values as stored. An error is counted
in **roundings**: 1 is the most that rounding the exact answer to the dtype costs, half a unit in its last place. An
error is relative to the sum of the element's size and the root mean square of its plane, since x - mean cancels; for dx
this sum includes rstd * |dy|, from which dx is computed by subtraction. An error of dweight or dbias is relative to its
own size plus the root of the sum of the squared terms, where |xhat| counts as at least min(1, |mean| * rstd). Results
of the double backward (cupynorm alone) are sums and differences, too: their errors are relative to the parts.

CuPy compiles with flush-to-zero, and the emulator does the same: float32 numbers below 1.2e-38 become 0. Errors due to
flush-to-zero are excluded for these two: those from x, its mean and x - mean where they are as small, from the rounding
error of the mean, and, in the double backward, from rstd.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import cupynorm
from cupynorm import cpu, devices
from cupynorm._types import math_dtype
from cupynorm.backend import MODULES

from ..core import peers, report
from ..core.cases import EPS, Arrays

FLUSHED = 2.0**-126  # the least normal number of float32
FLUSHING = "emulated", "CUDA"  # these compute smaller numbers as 0, except in float64
#: Roundings allowed in every answer of cupynorm.
ALLOWED = 8.0

#: The answers with a number for each element of x.
ELEMENTS = "y", "dx", "ddy", "double dx"

DEFAULT = 4, 8, 64, 64
LARGE = 1 << 22  # elements of a plane that is too large for the emulator


class Hard(NamedTuple):
    """A row of the table: x = make(random numbers, shape), rounded to the dtype."""

    name: str
    make: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
    dtype: str = "float32"
    shape: tuple[int, ...] = DEFAULT
    eps: float = EPS
    dy: float = 1.0  # the deviation of dy

    def __str__(self) -> str:
        eps = "" if self.eps == EPS else f", eps = {self.eps:g}"
        shape = "" if self.shape == DEFAULT else f", {report.shape_text(self.shape)}"
        dy = "" if self.dy == 1 else f", dy of {self.dy:g}"
        return f"{self.name}, {self.dtype}{shape}{eps}{dy}"


def _normal(mean: float, deviation: float = 1) -> Callable[..., np.ndarray]:
    return lambda rng, shape: mean + deviation * rng.standard_normal(shape)


def _constant(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Fill each plane with a number of its own; the first is 0."""
    values = rng.standard_normal(shape[:2]) * 10.0 ** rng.integers(-2, 4, shape[:2])
    values[0, 0] = 0
    return np.broadcast_to(values.reshape(*shape[:2], *(1,) * (len(shape) - 2)), shape)


def _outlier(size: float) -> Callable[..., np.ndarray]:
    def make(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        x = rng.standard_normal(shape)
        x.reshape(*shape[:2], -1)[..., int(rng.integers(np.prod(shape[2:])))] = size
        return x

    return make


def _checkerboard(size: float) -> Callable[..., np.ndarray]:
    return lambda rng, shape: size * (1 - 2.0 * (np.indices(shape).sum(0) % 2))


def rows(quick: bool = False) -> list[Hard]:
    """Return all rows; quick: with small planes, and none of 2**24 elements and more."""
    signed = [sign * offset for offset in (1, 1e2, 1e4, 1e6) for sign in (1, -1)]
    found = [Hard(f"N({offset:g}, 1)", _normal(offset)) for offset in (0, *signed)]
    found += [Hard(f"N({offset:g}, 1)", _normal(offset), "float64") for offset in (0, 1e6)]
    found += [
        Hard(f"N({offset:g}, 1)", _normal(offset), dtype) for dtype in ("float16", "bfloat16") for offset in (0, 100)
    ]
    found += [Hard("constant planes", _constant, dtype) for dtype in ("float32", "float16")]
    found += [Hard(f"N(0, 1), one {size:g} in each plane", _outlier(size)) for size in (1e6, 1e25)]
    found += [Hard("N(0, 1), one 60000 in each plane", _outlier(60000), "float16")]
    found += [
        Hard("N(0, 1e-20)", _normal(0, 1e-20)), Hard("N(0, 1e-20)", _normal(0, 1e-20), eps=0.0),
        Hard("N(1e-20, 1e-22)", _normal(1e-20, 1e-22), eps=0.0), Hard("N(0, 1e-30)", _normal(0, 1e-30), eps=0.0),
        Hard("N(0, 1e25)", _normal(0, 1e25)), Hard("N(1e25, 1e22)", _normal(1e25, 1e22)),
        Hard("N(0, 1e25)", _normal(0, 1e25), shape=(16, 32, 5, 5)),
        Hard("N(0, 1e-20)", _normal(0, 1e-20), shape=(16, 32, 5, 5), eps=0.0),
        Hard("N(0, 1e25)", _normal(0, 1e25), "bfloat16"), Hard("N(0, 1e-20)", _normal(0, 1e-20), "bfloat16", eps=0.0),
        Hard("N(0, 1e36)", _normal(0, 1e36), dy=100.0), Hard("N(1e36, 1e35)", _normal(1e36, 1e35)),
        Hard("N(1e38, 1e36)", _normal(1e38, 1e36)), Hard("±1e38 checkerboard", _checkerboard(1e38)),
        Hard("N(0, 1e36)", _normal(0, 1e36), shape=(16, 32, 5, 5)),
        Hard("N(0, 1e36)", _normal(0, 1e36), "bfloat16", dy=100.0),
        Hard("N(0, 1e34)", _normal(0, 1e34), dy=1e-4), Hard("N(0, 1)", _normal(0), dy=1e-30),
        Hard("N(0, 1e-30)", _normal(0, 1e-30), eps=0.0, dy=1e-30), Hard("N(0, 1e-30)", _normal(0, 1e-30), dy=1e-30),
        Hard("N(1e-3, 1e-6)", _normal(1e-3, 1e-6)), Hard("N(10, 1e-5)", _normal(10, 1e-5)),
        Hard("N(1e-3, 1e-6)", _normal(1e-3, 1e-6), shape=(16, 32, 5, 5)),
        Hard("±512 checkerboard", _checkerboard(512), "float16"),
        Hard("±65504 checkerboard", _checkerboard(65504), "float16"),
        Hard("64000 to 65504", lambda rng, shape: rng.uniform(64000, 65504, shape), "float16"),
        Hard("mostly denormal, N(0, 1e-38)", _normal(0, 1e-38)),
        Hard("mostly denormal, N(0, 1e-38)", _normal(0, 1e-38), "bfloat16"),
        Hard("denormal, N(0, 1e-6)", _normal(0, 1e-6), "float16"),
    ]  # fmt: skip
    if quick:
        return [row._replace(shape=(2, 3, 16, 16)) if row.shape == DEFAULT else row for row in found]
    large = [((1, 1, 4096, 4096), 0), ((1, 1, 4096, 4096), 100), ((1, 1, 4096, 8192), 100)]
    return found + [Hard(f"N({offset:g}, 1)", _normal(offset), shape=shape) for shape, offset in large]


class Given(Arrays):
    """The arrays of a row, for the peers; weight is 1 and bias 0, so that they have gradients and change nothing."""

    def __init__(self, xp: Any, row: Hard):
        rng = np.random.default_rng(22)
        storage = devices.dtype_of(row.dtype)
        self.xp, self.shape, self.dtype, self.eps = xp, row.shape, row.dtype, row.eps
        self.layout, self.affine, self.sets, self.activation, self.slope = "channels_first", True, 1, None, 1.0
        self.negative_slope = 0.01
        self.host_x = np.ascontiguousarray(row.make(rng, row.shape)).astype(storage)
        self.host_dy = (row.dy * rng.standard_normal(row.shape, np.float32)).astype(storage)
        self.host_ddx = rng.standard_normal(row.shape, np.float32).astype(storage)
        compute = math_dtype(storage)
        self.host_weight, self.host_bias = np.ones(row.shape[1], compute), np.zeros(row.shape[1], compute)
        self.weight, self.bias = xp.asarray(self.host_weight), xp.asarray(self.host_bias)
        self.x, self.dy = [xp.asarray(self.host_x)], [xp.asarray(self.host_dy)]
        self.ddx = xp.asarray(self.host_ddx)


class Answer(NamedTuple):
    """The exact answer; the scale of each element's error, in which half the dtype's epsilon is one rounding; and how
    much flush-to-zero may change the element.
    """

    exact: np.ndarray
    scale: np.ndarray
    flushed: np.ndarray


def answers(arrays: Given) -> dict[str, Answer]:
    """Return y, dx, dweight, dbias and a double backward's results, as (planes, positions) and (channels,)."""
    n, c = arrays.shape[:2]
    planes = n * c
    found: dict[str, list[Any]] = {name: [] for name in ELEMENTS}
    terms = {name: np.zeros((3, c), np.longdouble) for name in ("dweight", "dbias")}
    x, dy, ddx = (a.reshape(planes, -1) for a in (arrays.host_x, arrays.host_dy, arrays.host_ddx))
    for plane in range(planes):
        a, g, u = (v[plane].astype(np.float64).astype(np.longdouble) for v in (x, dy, ddx))
        mean = a.mean()
        lost = _flushes(a) + _flushes(mean)
        a = a - mean
        a -= a.mean()
        lost += _flushes(a)
        variance = (a * a).mean() + np.longdouble(arrays.eps)
        rstd = 1 / np.sqrt(variance)
        xhat = a * rstd
        c_mean = (g * xhat).mean()
        dx = rstd * (g - g.mean() - xhat * c_mean)
        # In xhat; everywhere, if the rounding error of the mean is flushed.
        rest = FLUSHED * rstd * _flushes(mean * np.finfo(np.float32).eps)
        lost = FLUSHED * rstd * lost + rest
        of_dx = rstd * (lost * np.abs(c_mean) + np.abs(xhat) * (lost * np.abs(g)).mean())
        # The double backward as in cupynorm.functional, e.g. ddy = v - mean(v * xhat) * xhat with v = rstd * u.
        g0, v = g - g.mean(), rstd * (u - u.mean())
        a_mean = (v * xhat).mean()
        s_mean = (v * g0).mean() - a_mean * c_mean
        size_a, size_c, size_s = (np.sqrt((each * each).mean()) for each in (v * xhat, g * xhat, v * g))
        ddy = v - a_mean * xhat
        dx2 = -rstd * (a_mean * (g0 - xhat * c_mean) + c_mean * (v - xhat * a_mean) + s_mean * xhat)
        of_v = FLUSHED * (1 + np.abs(xhat)) + lost * np.abs(a_mean) + _flushes(rstd) * (np.abs(v) + np.abs(ddy))
        parts = rstd * (size_a * np.abs(g) + size_c * rstd * np.abs(u) + (size_s + size_a * size_c) * np.abs(xhat))
        of_dx2 = rstd * (of_v * (size_c + size_s) + FLUSHED * np.abs(g)) + lost * rstd * (size_s + size_a * size_c)
        for name, value, more, flushed in (
            ("y", xhat, 0, lost),
            ("dx", dx, rstd * np.abs(g), of_dx),
            ("ddy", ddy, rstd * np.abs(u) + size_a * np.abs(xhat), of_v),
            ("double dx", dx2, parts, of_dx2),
        ):
            scale = np.abs(value) + np.sqrt((value * value).mean()) + more
            found[name].append(Answer(value, scale, FLUSHED + flushed))
        size = np.maximum(np.abs(xhat), min(1, abs(mean) * rstd))
        for name, value, term, flushed in (
            ("dweight", g * xhat, g * size, (lost * np.abs(g)).sum()),
            ("dbias", g, g, 0),
        ):
            terms[name][:, plane % c] += value.sum(), (term * term).sum(), FLUSHED + flushed
    exact = {name: Answer(*(np.stack(each) for each in zip(*found[name], strict=True))) for name in found}
    return exact | {
        name: Answer(total, np.abs(total) + np.sqrt(squares), flushed)
        for name, (total, squares, flushed) in terms.items()
    }


def _flushes(values: Any) -> Any:
    """Return 1 where flush-to-zero turns a number into 0, else 0."""
    return ((values != 0) & (np.abs(values) < FLUSHED)).astype(np.float64)


def roundings(got: np.ndarray, answer: Answer, dtype: np.dtype, flushing: bool) -> float:
    """Return the largest error in roundings; if flushing, without errors due to flush-to-zero. It is infinite if the
    answer is not finite where the exact one, in the dtype, is.
    """
    import ml_dtypes

    limits = ml_dtypes.finfo(dtype)
    exact, scale, flushed = (a.ravel() for a in answer)
    values = got.astype(np.float64).astype(np.longdouble).reshape(exact.shape)
    judged = np.abs(exact) <= np.longdouble(float(limits.max))
    exact, scale, values, flushed = exact[judged], scale[judged], values[judged], flushed[judged] * flushing
    one = np.longdouble(float(limits.eps)) / 2 * scale + np.longdouble(float(limits.smallest_subnormal)) / 2
    with np.errstate(all="ignore"):
        errors = np.maximum(np.abs(values - exact) - flushed, 0) / one
    if not errors.size:
        return 0.0
    return float(errors.max()) if np.isfinite(errors).all() else float("inf")


# Contestants


@contextlib.contextmanager
def _set(place: Any, name: str, value: Any) -> Iterator[None]:
    before = place[name]
    place[name] = value
    try:
        yield
    finally:
        place[name] = before


def _ours(arrays: Given, compiled: bool) -> dict[str, Any]:
    if compiled and cpu.llvmlite is None:
        raise peers.UnavailableError(str(cpu.without_llvmlite))
    with _set(vars(cpu), "compiled", compiled):
        return _itself(arrays)


def _emulated(arrays: Given) -> dict[str, Any]:
    """The CUDA kernels on the tests' emulator."""
    if np.prod(arrays.shape[2:]) >= LARGE:
        raise peers.UnavailableError("too slow for planes of this size")
    if shutil.which("g++") is None:
        raise peers.UnavailableError("needs g++")
    tests = str(report.ROOT / "tests")
    if tests not in sys.path:
        sys.path.append(tests)
    try:
        importlib.import_module("emulator.backend")
    except ImportError as error:
        raise peers.UnavailableError(f"needs a checkout's tests ({error})") from None
    with _set(MODULES, "cpu", "emulator.backend"):
        return _itself(arrays)


def _asked(peer: Any, arrays: Given) -> dict[str, Any]:
    op = "forward" if peer is peers.onnx_runtime else "both"
    contestant = peer(op, arrays)
    result: dict[str, Any] = contestant.answers(contestant.run(0))
    return result


def _itself(arrays: Given) -> dict[str, Any]:
    y, saved = cupynorm.instance_norm_forward(arrays.x[0], arrays.weight, arrays.bias, eps=arrays.eps)
    dx, dweight, dbias = cupynorm.instance_norm_backward(arrays.dy[0], saved)
    ddy, dx2, _ = cupynorm.instance_norm_double_backward(arrays.ddx, None, None, arrays.dy[0], saved)
    return {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias, "ddy": ddy, "double dx": dx2}


def contestants(gpu: bool) -> dict[str, tuple[Callable[[Given], dict[str, Any]], bool]]:
    """Return, by name, the function that computes the answers, and True if it needs arrays on the GPU."""
    found: dict[str, Any] = {
        "NumPy": (lambda a: _ours(a, False), False),
        "compiled": (lambda a: _ours(a, True), False),
        "emulated": (_emulated, False),
    }
    if gpu:
        found["CUDA"] = (_itself, True)
    for name in ("torch", "jax", "onnxruntime", "textbook"):
        peer = peers.PEERS[name]
        found[name] = (lambda a, peer=peer: _asked(peer, a), False)
        if gpu and name == "torch":
            found["torch, GPU"] = (lambda a, peer=peer: _asked(peer, a), True)
    return found


OURS = "NumPy", "compiled", "emulated", "CUDA"


def measure(row: Hard, asked: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Measure one row of the result: roundings by contestant and by answer."""
    host = Given(np, row)
    exact, dtype = answers(host), devices.dtype_of(row.dtype)
    places = {False: host}
    errors: dict[str, Any] = {}
    for name, (ask, gpu) in asked.items():
        try:
            if gpu and gpu not in places:
                places[True] = Given(importlib.import_module("cupy"), row)
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")  # of overflow, for example: the error shows it
                got = ask(places[gpu])
            found = {}
            for part, value in got.items():
                # dweight and dbias are in the parameters' dtype, which is as wide or wider.
                kind = dtype if part in ELEMENTS else host.host_weight.dtype
                found[part] = roundings(
                    devices.to_host(value), exact[part], kind, name in FLUSHING and row.dtype != "float64"
                )
            errors[name] = found
        except peers.UnavailableError as reason:
            say(f"{name} left out: {reason}")
        except Exception as failure:  # any failure of a peer is only reported
            say(f"{name} failed at {row}: {type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:90]}")
            if name in OURS:
                errors[name] = {"y": float("inf")}
    return {
        "row": row.name, "dtype": row.dtype, "shape": list(row.shape), "eps": row.eps, "dy": row.dy,
        "roundings": errors,
    }  # fmt: skip


def _cell(errors: dict[str, float | None] | None) -> str:
    """Format the worst errors of forward / backward / double backward; None, as in a file, is infinite."""
    if errors is None:
        return "–"
    errors = {name: float("inf") if value is None else value for name, value in errors.items()}
    kinds = ("y",), ("dx", "dweight", "dbias"), ("ddy", "double dx")
    worst = [max((errors[name] for name in kind if name in errors), default=None) for kind in kinds]
    return " / ".join(_count(value) for value in worst if value is not None)


def _count(value: float) -> str:
    if value == float("inf"):
        return "not finite"
    return f"{value:.1f}" if value < 100 else f"{value:.0e}".replace("e+0", "e")


def table(result: dict[str, Any]) -> list[list[str]]:
    """Return the header and the rows as text."""
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["roundings"]))
    lines = [["x", *names]]
    for row in result["rows"]:
        title = str(Hard(row["row"], _constant, row["dtype"], tuple(row["shape"]), row["eps"], row.get("dy", 1.0)))
        lines.append([title, *(_cell(row["roundings"].get(name)) for name in names)])
    return lines


def markdown(result: dict[str, Any]) -> str:
    """Return the table for README."""
    head, *lines = ["| " + " | ".join(line) + " |" for line in table(result)]
    return "\n".join([head, "|---" * len(table(result)[0]) + "|", *lines])


def missed(result: dict[str, Any]) -> list[str]:
    """List the rows in which an answer of cupynorm is more than ALLOWED roundings from the exact one."""
    return [
        f"{line[0]}: {name} {_cell(errors)}"
        for line, row in zip(table(result)[1:], result["rows"], strict=True)
        for name, errors in row["roundings"].items()
        if name in OURS and not max(errors.values()) <= ALLOWED
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench accuracy", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="small planes, and none of 2**24 elements and more; takes seconds"
    )
    parser.add_argument("--only", metavar="NAME,...", help=f"of {', '.join((*OURS, 'torch', 'jax', 'onnxruntime'))} …")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    parser.add_argument("--markdown", type=Path, metavar="FILE.md", help="write the table")
    options = parser.parse_args(arguments)
    try:
        importlib.import_module("ml_dtypes")
    except ImportError:
        sys.exit("python -m bench accuracy needs ml_dtypes, for bfloat16: pip install 'cupynorm[bf16]'")
    gpu = devices.gpu_status()[0]
    asked = contestants(gpu)
    if options.only:
        unknown = [name for name in options.only.split(",") if name not in asked]
        if unknown:
            parser.error(f"--only: {', '.join(asked)}; got {', '.join(unknown)}")
        asked = {name: asked[name] for name in options.only.split(",")}
    said: set[str] = set()

    def say(line: str) -> None:
        if line not in said:
            said.add(line)
            print(line, flush=True)

    found = []
    for row in rows(options.quick):
        found.append(measure(row, asked, say))
        print(f"{row}: " + "; ".join(f"{n} {_cell(e)}" for n, e in found[-1]["roundings"].items()), flush=True)
    result = {
        "schema": report.SCHEMA, "device": report.device_facts(importlib.import_module("cupy") if gpu else np),
        "versions": report.versions(), "commit": report.commit(), "allowed": ALLOWED, "rows": found,
    }  # fmt: skip
    if options.json:
        plain = [
            row | {"roundings": {name: {part: v if v < float("inf") else None for part, v in errors.items()}
                                 for name, errors in row["roundings"].items()}}
            for row in found
        ]  # fmt: skip
        report.write_json(result | {"rows": plain}, options.json)
    if options.markdown:
        options.markdown.write_text(markdown(result) + "\n", encoding="utf-8")
    bad = missed(result)
    verdict = "MISSED" if bad else "held"
    print(f"forward / backward / double backward in roundings; cupynorm at most {ALLOWED:g} everywhere: {verdict}")
    print(*bad, sep="\n", end="\n" if bad else "")
    return 1 if bad else 0
