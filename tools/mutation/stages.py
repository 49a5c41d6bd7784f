"""The files that are mutated, and the tests of a mutant in stages: quick ones first."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tools.mutation.mutants import Mutant

ROOT = Path(__file__).resolve().parents[2]

BACKENDS = (
    *(f"cupynorm/cpu/{name}.py" for name in (
        "__init__", "blocking", "gelu", "llvm", "loops_across", "loops_activations", "loops_backward", "loops_forward",
        "loops_moves", "loops_path", "loops_places", "loops_rehearsal", "loops_short", "loops_tasks",
        "numpy_activations", "numpy_double", "numpy_masks", "numpy_path", "windows",
    )),
    *(f"cupynorm/cuda/{name}.py" for name in (
        "arguments", "calls", "launch", "layout", "ops", "plan", "replay", "source", "trace",
    )),
)  # fmt: skip
#: Without the modules that need a GPU or Chainer, without commands, and without tables of devices and variants.
REST = (
    "_checks", "_types", "backend", "config", "conventions", "cpu/forks", "cpu/halves", "cpu/llvm_machine",
    "cpu/result_pool", "cpu/running", "cpu/thread_pool", "cpu_count", "cuda/describe", "devices", "explain",
    "distributed", "functional", "inference", "layers", "mixed", "parameters", "scores", "statistics", "thinc", "warm",
)  # fmt: skip
PARTS = {
    "kernels": tuple(sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "kernels").iterdir())),
    "backends": BACKENDS,
    "rest": tuple(f"cupynorm/{name}.py" for name in REST),
}

#: The compiled loops, and the modules that only calls of these loops use.
LOOPS = {
    "llvm", "loops_across", "loops_activations", "loops_backward", "loops_forward", "loops_moves", "loops_path",
    "loops_places", "loops_short", "loops_tasks", "windows",
}  # fmt: skip

#: Names in TESTS and in stages that stand for several files.
SEVERAL = {
    "cpu": "cpu blocks threads",
    "epilogue": "epilogue epilogue_arguments epilogue_layers",
    "functional": "functional out",
    "layers": "layers layer_state inference_mode",
    "refusals": "refusals untrusted_state",
    "semantics": "semantics_results semantics_arguments semantics_state",
}
#: The tests of the other modules. They run without the compiled loops and the emulator; the first come first.
TESTS = {
    "_checks": "devices refusals functional parts layers semantics",
    "_types": "functional refusals cpu",
    "arguments": "launch plan",
    "backend": "house functional",
    "calls": "launch functional",
    "blocking": "choices cpu double_backward",
    "config": "house threads memory invariance",
    "conventions": "conventions",
    "cpu": "choices cpu conventions masks parts double_backward explain epilogue semantics functional accuracy"
    " together",
    "cpu_count": "threads",
    "describe": "explain functional info invariance dtypes",
    "devices": "devices functional layers checkpoints refusals info package",
    "explain": "explain scores functional info invariance semantics",
    "forks": "forks together",
    "functional": "functional dtypes conventions masks parts refusals semantics properties double_backward epilogue"
    " layers",
    "gelu": "choices epilogue accuracy",
    "halves": "halves cpu",
    "inference": "inference_mode semantics refusals",
    "launch": "launch traces plan explain semantics functional refusals invariance together",
    "layers": "layers loops checkpoints refusals together functional",
    "layout": "plan variants explain launch invariance functional info",
    "mixed": "dtypes",
    "numpy_activations": "choices epilogue accuracy semantics",
    "numpy_double": "choices double_backward cpu",
    "numpy_masks": "masks",
    "numpy_path": "choices cpu conventions masks parts epilogue semantics functional accuracy layers",
    "ops": "plan variants explain launch",
    "plan": "plan variants explain invariance functional info",
    "replay": "launch traces functional refusals",
    "result_pool": "memory cpu together",
    "running": "together refusals semantics cpu parts",
    "distributed": "distributed",
    "parameters": "layers refusals devices",
    "scores": "scores devices",
    "statistics": "parts",
    "source": "plan launch package",
    "thinc": "thinc",
    "trace": "launch traces plan functional",
    "thread_pool": "threads cpu together info memory",
    "warm": "warmup_launches warmup explain",
}

#: Which kernels use a file of kernels/: those of forward and backward, those of the steps by themselves, those of the
#: double backward, or forward, backward and double backward.
USERS = {
    file: users
    for users, files in {
        "single": "backward.cu epilogue.cuh forward.cu frozen.cu gradient.cuh moments.cuh normalize.cuh split.cu"
        " scale.cuh steps.cuh",
        "parts": "given.cu mask.cuh parts.cu",
        "double": "double.cuh double_backward.cu double_split.cu frozen_double_backward.cu",
        "both": "affine.cuh arrays.cuh channels.cu device.cuh group.cuh merge.cuh merges.cu partition.cuh round.cuh"
        " staging.cuh sums.cuh tile.cuh types.cuh unaligned.cuh unit.cuh",
    }.items()
    for file in files.split()
}
#: The first cases of the files that the small ones do not reach, or reach late.
FIRST = {
    "epilogue.cuh": "test_table and (relu or silu or gelu)",
    "group.cuh": "test_variant and (registers4 or grid)",
    "merge.cuh": "test_variant and (registers4 or grid) or test_small",
    "merges.cu": "test_small or test_double_small",
    "scale.cuh": "test_small",
    "unaligned.cuh": "test_variant and unaligned",
}


#: What no table above names: the quick tier, with all cases on NumPy.
QUICK = (
    "tests/conformance", "tests/cpu", "tests/kernels", "tests/project",
    "-m", "not (above or long or simt or compiled or nvrtc or gpu or fakegpu or chainer)",
)  # fmt: skip


@cache
def file_of(name: str) -> str:
    """Return the path of tests/*/test_<name>.py."""
    found = list((ROOT / "tests").glob(f"*/test_{name}.py"))
    if len(found) != 1:
        raise LookupError(f"there are {len(found)} files tests/*/test_{name}.py; a stage needs one")
    return found[0].relative_to(ROOT).as_posix()


def files_of(names: str) -> tuple[str, ...]:
    """Return the paths of tests/*/test_<name>.py for each name, or for each that it stands for, each once."""
    every = [each for name in names.split() for each in SEVERAL.get(name, name).split()]
    return tuple(file_of(each) for each in dict.fromkeys(every))


def chosen(name: str, expression: str) -> tuple[str, ...]:
    return file_of(name), "-k", expression


def compiled(name: str, expression: str = "") -> tuple[str, ...]:
    return *files_of(name), "-m", "compiled", *(("-k", expression) if expression else ())


def stages(mutant: Mutant) -> list[tuple[str, ...]]:
    """Return arguments of pytest for each stage: compiling a module or a loop takes seconds."""
    path = Path(mutant.file)
    if path.parts[0] == "kernels":
        return _kernel_stages(path.name)
    name = path.parent.name if path.stem == "__init__" else path.stem
    scope = mutant.within.partition(".")[0]
    if name == "loops_rehearsal" or scope == "rehearsals":
        return [compiled("warmup", "not real_compilation and not afterwards"), compiled("warmup")]
    if name in LOOPS or scope == "_choose":
        return _loop_stages(name, scope)
    if name == "llvm_machine":
        return [compiled("code_cache"), compiled("compiling")]
    own = [(file, "-m", "not simt and not compiled and not nvrtc") for file in files_of(TESTS[name])]
    if name in ("cpu", "blocking", "gelu") or name.startswith("numpy_"):
        double = "double" if name == "numpy_double" else "not double"
        numpy = [chosen("cases", f"numpy and {double} and float32"), own[0], chosen("cases", "numpy"), *own[1:]]
        return [*numpy, chosen("compiling", "llvmlite"), chosen("code_cache", "llvmlite")] if name == "cpu" else numpy
    if mutant.file in BACKENDS:  # of CUDA
        emulated = [
            chosen("cases", "simt and float32 and (table or small)"), chosen("simt", "launches or reach"),
            chosen("cases", "simt and float32"), chosen("simt", "not barrier and not detects"),
            chosen("cases", "simt"),
            *((file, "-m", "simt") for file in files_of("semantics conventions masks epilogue double_backward parts")),
        ]  # fmt: skip
        return [*own[:1], *emulated, *own[1:]]
    if name == "config":
        own.append(compiled("code_cache", "folder_of_the_cache"))
    if name == "forks":
        own.append(compiled("forks"))
    if name == "warm":
        own.append(compiled("compile_command"))
    return [*own, chosen("cases", "numpy and float32"), QUICK]


def _loop_stages(name: str, scope: str) -> list[tuple[str, ...]]:
    small = chosen("cases", "test_small and compiled and float32")
    own = {
        "llvm": ["llvm"], "loops_moves": ["moves"], "windows": ["moves"], "loops_path": ["loops_layouts"],
        "loops_tasks": ["loops_tasks"], "loops_short": ["loops_short"], "loops_across": ["loops_short"],
    }.get(name, ["loops_sums"])  # fmt: skip
    if scope == "MovedWork":
        own = ["moves"]
    return [
        *(compiled(each) for each in own), small, chosen("cases", "test_table and compiled and float32"),
        chosen("cases", "compiled"), compiled("cpu"), compiled("moves"),
        (*files_of("conventions masks accuracy semantics epilogue properties"), "-m", "compiled"),
    ]  # fmt: skip


def _kernel_stages(file: str) -> list[tuple[str, ...]]:
    users = USERS[file]
    of_parts = [(file_of("parts"), "-m", "simt"), (file_of("parts"), "-m", "simt", "--full")]
    if file == "mask.cuh":
        return [(file_of("masks"), "-m", "simt")]
    if users == "parts":
        more = (*files_of("conventions masks"), "-m", "simt")
        return [(*of_parts[0], "-k", "every_kernel"), *of_parts, more, (file_of("compile"),)]
    plain = "and double" if users == "double" else "and not double and not epilogue_variant"
    first = FIRST.get(file, "test_double_small" if users == "double" else "test_small")
    return [
        chosen("cases", f"simt and float32 and ({first})"),
        (
            file_of("simt"),
            *chosen("cases", f"simt and float32 {plain} or same_bits or sixteen or more_tiles or two_dimensions"),
        ),
        *(chosen("cases", f"simt and {dtype} {plain}") for dtype in ("float16", "float64", "bfloat16")),
        *([] if users == "double" else [(*files_of("epilogue"), "-m", "simt", "-k", "float32")]),
        *([chosen("cases", "simt and double")] if users == "both" else []),
        *([] if users == "double" else of_parts),
        (file_of("accuracy"), "-m", "simt", "-k", "not every_row"),
        (*files_of("conventions masks semantics properties double_backward"), "-m", "simt"),
        chosen("simt", "address_sanitizer"),
        (file_of("compile"),),
    ]
