"""`warmup` on NumPy arrays compiles the loops that calls need, and no others. Its CUDA side is in test_gpu."""

from __future__ import annotations

import ctypes
import itertools
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers.backends import Backend, on, use_compiled
from helpers.compare import Bits
from helpers.loops import emitted, forget_modules, llvm, llvm_machine, loops_tasks
from helpers.pairwise import pairwise

import cupynorm as cn
from cupynorm import cpu, warm
from cupynorm._types import math_dtype

pytestmark = pytest.mark.usefixtures("threads_as_they_were")

Kinds = set[str]


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> Kinds:
    """Record the modules that are compiled, each of which is asked for once. Their steps do nothing."""
    use_compiled(monkeypatch, True)
    kinds: Kinds = set()
    (nothing,) = emitted(write_nothing, ["nothing"])
    driver = loops_tasks.driver()
    functions = driver.run, driver.drain, driver.go_through
    real = driver.whole_address, *(ctypes.cast(each, ctypes.c_void_p).value for each in functions)

    def noted(kind: str, _: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
        assert kind not in kinds
        kinds.add(kind)
        return real if kind == "driver" else (nothing,) * len(names)

    monkeypatch.setattr(llvm_machine, "compiled", noted)
    forget_modules(monkeypatch)
    return kinds


def write_nothing(module: Any) -> None:
    with module.function("nothing", llvm.MEMORY, llvm.INT, llvm.INT, llvm.INT, exported=True):
        pass


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "contiguous": lambda a: a,
    "channels_last": lambda a: np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1),
    "crop": lambda a: np.pad(a, [(0, 0)] * (a.ndim - 1) + [(1, 2)])[..., 1:-2],
    "every second": lambda a: np.repeat(a, 2, -1)[..., ::2],
    "backwards": lambda a: np.ascontiguousarray(a[..., ::-1])[..., ::-1],
    "transposed": lambda a: np.ascontiguousarray(a.swapaxes(-1, -2)).swapaxes(-1, -2),
}
#: Short planes, longer ones, many, large ones; few that are cut into tiles, which threads share.
SHAPES = [
    (2, 3, 4, 4),
    (3, 2, 70),
    (2, 3, 16, 24),
    (2, 2, 30, 40),
    (2, 2, 5, 6, 7),
    (80, 64, 8, 8),
    (2, 9, 80, 90),
    (1, 64, 160, 90),
    (1, 2, 700, 800),
]


def use(x: np.ndarray, residual: np.ndarray | None = None, activation: str | None = None) -> None:
    """Make calls of all kinds on an array."""
    n, c = x.shape[:2]
    own, wide = np.ones(c, x.dtype), np.ones(c, math_dtype(x.dtype))
    per_sample, read_only = np.ones((c, n), wide.dtype).T, wide.copy()
    read_only.flags.writeable = False
    statistics = {"running_mean": wide.copy(), "running_var": wide.copy()}
    given = {"activation": activation, "residual": residual}
    options = [{"use_input_stats": False, **statistics}]
    if x[0, 0].size > 1:
        options += [{}, statistics, {"momentum": 0.0, **statistics}]
    parameters = [(None, None), (per_sample, own), (own, None), (None, wide[::-1]), (read_only, read_only)]
    for i, (weight, bias) in enumerate(parameters):
        for more in options if i < 2 else options[-1:]:
            y, saved = cn.instance_norm_forward(x, weight, bias, **more, **given)
            cn.instance_norm_backward(y, saved)
            cn.instance_norm_backward(y, saved, out=y)
            cn.instance_norm_backward(x, saved)
            if activation is None and x.size < 10_000:  # computed by NumPy alone
                cn.instance_norm_double_backward(y, None, None, y, saved)
            if more.get("use_input_stats", True) or x[0, 0].size == 1:
                _, saved = cn.instance_norm_forward(x, weight, bias, moments=cn.moments(x), **given)
            sums = cn.gradient_sums(y, saved)
            cn.instance_norm_backward(y, saved, sums=sums)
            cn.instance_norm_backward(
                y, saved, sums=cn.GradientSums(*(np.asfortranarray(a) for a in vars(sums).values()))
            )
            if residual is not None and residual.flags.writeable:
                cn.instance_norm_forward(x, weight, bias, out=residual, **more, **given)
            if x.flags.writeable:
                cn.instance_norm_forward(x, weight, bias, out=x, **more, **given)


@pytest.mark.compiled
@pairwise(
    dtype=["float32", "float16", "bfloat16", "float64"],
    layout=[*LAYOUTS],
    activation=[None, "relu", "leaky_relu", "silu", "gelu"],
    residual=[None, "contiguous", "channels_last"],
)
def test_warmup_compiles_the_loops_of_later_calls(
    met: Kinds, monkeypatch: pytest.MonkeyPatch, dtype: str, layout: str, activation: str | None, residual: str | None
) -> None:
    """No loop is missing for other sizes, several threads or one, and parameters of all kinds.

    No other loops are compiled, except copying loops: the planes may be too short to need all of them.
    """

    def arrays(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray | None]:
        ones = np.ones(shape, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        return LAYOUTS[layout](ones), None if residual is None else LAYOUTS[residual](ones.copy())

    compiled: Kinds = set()
    needed: Kinds = set()
    for shape in (*SHAPES, (1, 2, 7000, 80)):  # crops of the last have runs too short to be read in place
        if layout == "transposed" and len(shape) == 3:  # the same as channels-last
            continue
        cn.set_num_threads(1)
        x, other = arrays((3, shape[1], 7, 9))
        x.flags.writeable = False
        cn.warmup(x, activation=activation, residual=other, parts=True)
        warm_kinds = met.copy()
        met.clear()
        forget_modules(monkeypatch)
        for threads in (1, 3):
            cn.set_num_threads(threads)
            use(*arrays(shape), activation)
        assert met <= warm_kinds
        compiled |= warm_kinds
        needed |= met
        met.clear()
        forget_modules(monkeypatch)
    assert {kind for kind in compiled - needed if not kind.startswith("moves ")} == set()


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("input", "dtype"), [("uint16", "float32"), ("uint8", "float16"), ("float16", "float32"), ("float32", "float64")]
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_results_of_another_dtype(
    met: Kinds, monkeypatch: pytest.MonkeyPatch, layout: str, input: str, dtype: str
) -> None:
    """Forwards, moments, and gradients of floats, for which arrays are converted."""
    cn.warmup(LAYOUTS[layout](np.zeros((3, 32, 7, 9), input)), dtype=dtype, activation="relu", parts=True)
    compiled = met.copy()
    met.clear()
    forget_modules(monkeypatch)
    for threads, shape in itertools.product((1, 3), ((2, 32, 16, 24), (2, 32, 4, 4), (1, 32, 160, 90))):
        cn.set_num_threads(threads)
        x = LAYOUTS[layout](np.zeros(shape, input))
        y, saved = cn.instance_norm_forward(x, dtype=dtype, activation="relu")
        _, given = cn.instance_norm_forward(x, dtype=dtype, activation="relu", moments=cn.moments(x))
        if x.dtype.kind == "f":
            cn.instance_norm_backward(y, saved)
            cn.instance_norm_backward(y, given, sums=cn.gradient_sums(y, given))
    assert met <= compiled
    assert met or layout == "transposed"


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:invalid value")  # since the steps count nothing
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_masks_and_conventions(met: Kinds, monkeypatch: pytest.MonkeyPatch, layout: str, shared: bool) -> None:
    """A mask that channels share, or one of each; with given moments and sums, too."""

    def made(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        mask = np.ones(shape[2:], bool) if shared else LAYOUTS[layout](np.ones(shape, bool))
        return LAYOUTS[layout](np.zeros(shape, np.float32)), mask

    options = {"ddof": 1, "eps_mode": "std"}
    x, mask = made((3, 32, 7, 9))
    cn.warmup(x, activation="relu", parts=True, mask=mask, **options)
    cn.warmup(x, activation="relu", **options)
    compiled = met.copy()
    met.clear()
    forget_modules(monkeypatch)
    for threads, shape in itertools.product((1, 3), ((2, 32, 16, 24), (2, 32, 8, 8), (1, 32, 160, 90))):
        cn.set_num_threads(threads)
        x, mask = made(shape)
        for given in ({"mask": mask}, {"mask": mask, "moments": cn.moments(x, mask=mask)}, {}):
            y, saved = cn.instance_norm_forward(x, activation="relu", **given, **options)
            cn.instance_norm_backward(y, saved)
            if given:
                cn.instance_norm_backward(y, saved, sums=cn.gradient_sums(y, saved))
    assert met and met <= compiled
    with pytest.raises(ValueError, match="no double backward with a mask"):
        cn.warmup(x, mask=mask, double_backward=True)


@pytest.mark.compiled
@pytest.mark.parametrize(("warm", "later"), [(9, 300), (300, 9)])
def test_arrays_of_longer_and_shorter_runs(met: Kinds, monkeypatch: pytest.MonkeyPatch, warm: int, later: int) -> None:
    """Long runs of a crop are read in place, and planes of short ones are copied: both are compiled for either."""
    cn.set_num_threads(1)
    cn.warmup(LAYOUTS["crop"](np.zeros((3, 2, 7, warm), np.float32)), parts=True)
    compiled = met.copy()
    met.clear()
    forget_modules(monkeypatch)
    use(LAYOUTS["crop"](np.zeros((3, 2, 7, later), np.float32)))
    assert met and met <= compiled
    assert any(kind.startswith("moves ") for kind in compiled)


@pytest.mark.compiled
def test_training_loops_are_not_compiled_for_one_position(met: Kinds, monkeypatch: pytest.MonkeyPatch) -> None:
    cn.warmup(np.zeros((5, 3, 1, 1), np.float32), parts=True)
    compiled = met.copy()
    met.clear()
    forget_modules(monkeypatch)
    use(np.zeros((2, 3, 1, 1), np.float32))
    cn.set_num_threads(2)
    use(np.zeros((300, 200, 1, 1), np.float32))
    assert met and met <= compiled
    assert not {kind for kind in compiled if kind.startswith(("short_forward", "across_forward"))}


@pytest.mark.compiled
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("plane", [(3, 2), (2, 2), (3, 3), (5, 3)], ids=str)
def test_planes_of_fewer_elements_than_a_vector(
    met: Kinds, monkeypatch: pytest.MonkeyPatch, layout: str, plane: tuple[int, int]
) -> None:
    """Loops for those of x's own size are compiled, too."""
    cn.set_num_threads(1)
    cn.warmup(LAYOUTS[layout](np.zeros((3, 2, *plane), np.float32)), parts=True)
    compiled = met.copy()
    met.clear()
    forget_modules(monkeypatch)
    for shape in ((7, 2, *plane), (500, 2, *plane), (7, 2, 9, 11)):
        use(LAYOUTS[layout](np.zeros(shape, np.float32)))
    assert met and met <= compiled


@pytest.mark.compiled
def test_nothing_is_compiled_if_numpy_alone_computes(met: Kinds, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.zeros((2, 3, 4, 5), np.float32)
    unaligned = np.zeros(x.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(x.shape)
    records = np.zeros(x.shape, [("a", np.float32), ("b", np.int8)])["a"]
    for array in (unaligned, records, x[:0], x[..., :0]):
        cn.warmup(array)
        assert not met
    monkeypatch.setattr(cpu, "compiled", False)
    cn.warmup(x)
    assert not met


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("dtype", "activation"), [("float32", None), pytest.param("float16", "silu", marks=pytest.mark.full)]
)
def test_calls_afterwards_compile_nothing(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator, dtype: str, activation: str | None
) -> None:
    use_compiled(monkeypatch, True)
    x = rng.standard_normal((2, 3, 4, 5)).astype(dtype)
    before = Bits(x)
    forget_modules(monkeypatch)
    cn.set_num_threads(1)
    cn.warmup(x, activation=activation, parts=True)
    assert Bits(x) == before

    def compiled(kind: str, *_: Any) -> None:
        raise AssertionError(f"{kind} is compiled")

    monkeypatch.setattr(llvm_machine, "compiled", compiled)
    cn.set_num_threads(3)
    for shape in SHAPES:
        use(rng.standard_normal(shape).astype(x.dtype), None, activation)
    with pytest.raises(AssertionError, match="is compiled"):
        cn.instance_norm(x, activation="relu" if activation is None else None)


# Progress


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has been done, of steps in the place of loops to compile."""
    done: list[str] = []
    names = ["forward", "forward", "backward"]
    monkeypatch.setattr(
        cpu, "rehearsals", lambda *_, **__: [(name, lambda name=name: done.append(name)) for name in names]
    )
    return done


X = np.zeros((2, 3, 4, 5), np.float32)


def test_progress_callback(steps: list[str]) -> None:
    told: list[Any] = []
    cn.warmup(X, progress=lambda *how_far: told.append((*how_far, len(steps))))
    assert told == [(0, 3, "forward", 0), (1, 3, "forward", 1), (2, 3, "backward", 2), (3, 3, "done", 3)]


@on("compiled", "cupy")
def test_progress_of_real_compilation(backend: Backend) -> None:
    told: list[Any] = []
    cn.warmup(backend.array(X), progress=lambda *how_far: told.append(how_far))
    total = len(told) - 1
    assert [done for done, _, _ in told] == [*range(total + 1)]
    assert {of for _, of, _ in told} == {total}
    assert [what for _, _, what in told].index("done") == total > 3


@pytest.mark.parametrize(
    ("progress", "terminal", "quiet", "says"),
    [
        (True, False, 1e9, True), (True, True, 1e9, True), (False, True, 0, False), (None, True, 0, True),
        (None, True, 1e9, False), (None, False, 0, False),
    ],
)  # fmt: skip
def test_messages(
    steps: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    progress: bool | None, terminal: bool, quiet: float, says: bool,
) -> None:  # fmt: skip
    """A line for each thing that takes several steps, on stderr alone."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(warm, "QUIET", quiet)
    cn.warmup(X, progress=progress)
    said = capsys.readouterr()
    assert said.out == ""
    assert [line.rsplit(",", 1)[0] for line in said.err.splitlines()] == says * [
        "cupynorm.warmup: forward, 0 of 3", "cupynorm.warmup: backward, 2 of 3", "cupynorm.warmup: done, 3 of 3",
    ]  # fmt: skip


def test_without_a_stderr(
    steps: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As under pythonw: nothing is said, least of all on stdout."""
    monkeypatch.setattr(sys, "stderr", None)
    for progress in (None, True):
        cn.warmup(X, progress=progress)
    assert len(steps) == 6
    assert capsys.readouterr().out == ""


def test_warmup_without_compiled_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "compiled", False)
    told: list[Any] = []
    cn.warmup(X, progress=lambda *how_far: told.append(how_far))
    assert told == [(0, 0, "done")]


def test_an_interrupt_ends_it(steps: list[str]) -> None:
    def interrupted(done: int, total: int, what: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cn.warmup(X, progress=interrupted)
    assert steps == ["forward"]


def test_refusals_come_before_anything(steps: list[str]) -> None:
    for error, message, wrong in [
        (TypeError, "progress must be None, a bool or a function", {"progress": "bar"}),
        (TypeError, "progress must be None, a bool or a function", {"progress": 1}),
        (ValueError, "activation must be None or one of", {"activation": "tanh"}),
        (TypeError, "negative_slope must be a number", {"negative_slope": "steep"}),
        (ValueError, "residual has shape", {"residual": X[:1]}),
        (ValueError, "no double backward through", {"activation": "relu", "double_backward": True}),
    ]:
        with pytest.raises(error, match=message):
            cn.warmup(X, **wrong)
    with pytest.raises(ValueError, match="at least 3 dimensions"):
        cn.warmup(X[0, 0])
    assert not steps
