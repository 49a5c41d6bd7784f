"""The package as shipped: its import, the contents of its archives, the facts of pyproject.toml."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest

import cupynorm as cn
from cupynorm import devices

pytestmark = [pytest.mark.long, pytest.mark.extras]  # CuPy without a GPU
ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(cn.__file__).resolve().parent

#: Hides any GPU.
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
#: Without the compiled loops, too.
NUMPY_ALONE = NO_GPU | {"CUPYNORM_COMPILED": "0"}

BLOCKERS = {
    "in sys.modules": "import sys; sys.modules['cupy'] = None",
    "by a finder": """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("cupy", "cupyx", "cupy_backends"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
""",
}

USE = """
import numpy, cupynorm
layer = cupynorm.InstanceNorm2d(3, affine=True)
assert layer.device == "cpu", layer.device
y = layer.forward(numpy.ones((2, 3, 4, 5), numpy.float32))
assert layer.backward(y).shape == (2, 3, 4, 5)
"""


def python(
    code: str, *, path: Path | None = PACKAGE.parent, cwd: Path | None = None, env: dict[str, str] | None = None
) -> str:
    """Run code in a fresh interpreter, which must succeed and write nothing to stderr; return what it prints."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "CUPYNORM", "COV"))}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment | (env or {}),
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


# Import


def test_import_prints_nothing() -> None:
    assert python("import cupynorm") == ""
    assert python("import cupynorm", env=NO_GPU) == ""


def test_cupy_is_not_imported_without_a_driver() -> None:
    assert python(USE + "import sys; print('cupy' in sys.modules)", env=NUMPY_ALONE).split() == ["False"]


@pytest.mark.parametrize("how", BLOCKERS)
def test_without_cupy(how: str) -> None:
    code = f"""
{BLOCKERS[how]}
{USE}
try:
    cupynorm.InstanceNorm2d(3, device="cuda")
except RuntimeError as error:
    print(error)
"""
    assert "pip install 'cupynorm[cuda12]'" in python(code, env=NUMPY_ALONE)


@pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="needs CuPy")
@pytest.mark.parametrize("first", ["cupy", "cupynorm"])
def test_with_cupy_and_no_driver(first: str) -> None:
    """CuPy itself imports without a driver; the order does not matter."""
    code = f"""
import warnings
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # CuPy's own
    import {first}
    import cupy
{USE}
try:
    layer.to_gpu()
except RuntimeError as error:
    print(error)
"""
    assert "is not usable: " in python(code, env=NUMPY_ALONE)


@pytest.mark.parametrize("blocked", [True, False])
def test_plans_and_sources_need_no_cupy(blocked: bool) -> None:
    code = BLOCKERS["in sys.modules"] if blocked else ""
    code += """
import sys
import cupynorm.cuda.plan, cupynorm.cuda.source
print(len(cupynorm.cuda.source.all_modules()), sys.modules.get("cupy"))
"""
    count, cupy = python(code, env=NO_GPU).split()
    assert int(count) > 0
    assert cupy == "None"


@pytest.mark.parametrize("home", ["missing", "read-only", "empty"])
def test_home_is_not_needed(tmp_path: Path, home: str) -> None:
    folder = tmp_path / "home"
    if home != "missing":
        folder.mkdir(mode=0o500 if home == "read-only" else 0o700)
    env = {name: str(folder) for name in ("HOME", "USERPROFILE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME")}
    assert python(USE, env=env | NUMPY_ALONE) == ""
    assert list(tmp_path.rglob("*")) == ([] if home == "missing" else [folder])  # and nothing is written there


def test_import_is_light() -> None:
    """Beyond NumPy and pathlib (which brings urllib.parse on some Pythons): this package, and nothing heavy of the
    standard library."""
    code = """
import sys
import numpy, pathlib
before = set(sys.modules)
import cupynorm
print(*sorted(set(sys.modules) - before))
"""
    added = set(python(code, env=NO_GPU).split())
    top = {name.partition(".")[0] for name in added}
    assert top - sys.stdlib_module_names == {"cupynorm"}
    heavy = {"asyncio", "concurrent", "email", "http", "multiprocessing", "sqlite3", "subprocess", "unittest", "urllib"}
    assert not top & (heavy | {"logging", "tkinter", "xml"})
    assert "cupynorm.__main__" not in added


def test_numpy_path_needs_numpy_alone() -> None:
    """Every other dependency is blocked."""
    code = f"""
import sys
for name in ("cupy", "ml_dtypes", "rich", "matplotlib", "sklearn", "torch", "scipy", "setuptools"):
    sys.modules[name] = None
{USE}
try:
    cupynorm.InstanceNorm2d(3, dtype="bfloat16")
except ImportError as error:
    print(error)
"""
    assert "pip install 'cupynorm[bf16]'" in python(code, env=NO_GPU)


# Archives


@dataclass
class Built:
    """A copy of the checkout, the archives made from it, and the wheel unpacked."""

    checkout: Path
    sdist: Path
    wheel: Path
    installed: Path


def build(kind: str, source: Path, target: Path) -> Path:
    """Call setuptools as a build front end does, without isolation; return the archive, made in `target`."""
    code = f"import setuptools.build_meta as b, sys; b.build_{kind}(sys.argv[1])"
    command = [sys.executable, "-c", code, str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = target.iterdir()
    return archive


#: Each test process builds the archives once.
archives = pytest.mark.full


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The sdist, and the wheel made from the sdist."""
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        version = "0"
    if int(version.partition(".")[0]) < 77:
        pytest.skip("needs setuptools 77 or later: pip install 'cupynorm[test]'")
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("needs a checkout")
    folder = tmp_path_factory.mktemp("built")
    ignored = shutil.ignore_patterns(".git", "__pycache__", "*.egg-info", "build", "dist", ".*_cache", ".venv", "venv")
    checkout = folder / "checkout"
    shutil.copytree(ROOT, checkout, ignore=ignored)
    for name in ("sdist", "wheel", "unpacked"):
        (folder / name).mkdir()
    sdist = build("sdist", checkout, folder / "sdist")
    with tarfile.open(sdist) as archive:
        safe: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(folder / "unpacked", **safe)
    (unpacked,) = (folder / "unpacked").iterdir()
    wheel = build("wheel", unpacked, folder / "wheel")
    installed = folder / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    return Built(checkout, sdist, wheel, installed)


@archives
def test_names_of_the_archives(built: Built) -> None:
    assert built.sdist.name == f"cupynorm-{cn.__version__}.tar.gz"
    assert built.wheel.name == f"cupynorm-{cn.__version__}-py3-none-any.whl"


@archives
def test_contents_of_the_wheel(built: Built) -> None:
    """Every file of the package and of the CUDA sources, and nothing else."""
    with zipfile.ZipFile(built.wheel) as archive:
        names = set(archive.namelist())
    info = f"cupynorm-{cn.__version__}.dist-info"
    package = {name for name in names if not name.startswith(f"{info}/")}
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "cupynorm").rglob("*.py")}
    kernels = {f"cupynorm/kernels/{p.name}" for p in (ROOT / "kernels").iterdir() if p.suffix in (".cu", ".cuh")}
    assert {"cupynorm/__init__.py", "cupynorm/kernels/forward.cu", "cupynorm/kernels/types.cuh"} <= modules | kernels
    assert package == modules | kernels | {"cupynorm/py.typed"}
    assert f"{info}/licenses/LICENSE" in names


@archives
def test_metadata_of_the_wheel(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        text = archive.read(f"cupynorm-{cn.__version__}.dist-info/METADATA").decode()
    metadata = Parser().parsestr(text)
    assert metadata["Name"] == "cupynorm"
    assert metadata["Version"] == cn.__version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.10"
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert len(required) == 1
    assert re.match(r"numpy\b", required[0])
    assert set(metadata.get_all("Provides-Extra")) >= {"cuda12", "cuda13", "bf16", "demo", "bench", "test", "dev"}
    assert metadata["Description-Content-Type"] == "text/markdown"


@archives
def test_contents_of_the_sdist(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    kernels = {f"kernels/{p.name}" for p in (ROOT / "kernels").iterdir() if p.suffix in (".cu", ".cuh")}
    assert names >= kernels | {"pyproject.toml", "README.md", "LICENSE", "cupynorm/py.typed", "cupynorm/layers.py"}


FIND = """
import cupynorm
from cupynorm.cuda import source
for module in source.all_modules():
    assert module.source and module.kernels
print(cupynorm.__file__)
print(source.kernel_folder())
"""


@archives
def test_installed_package_finds_its_kernels(built: Built, tmp_path: Path) -> None:
    module, kernels = python(FIND + USE, path=built.installed, cwd=tmp_path, env=NUMPY_ALONE).splitlines()
    assert Path(module) == built.installed / "cupynorm/__init__.py"
    assert Path(kernels) == built.installed / "cupynorm/kernels"


@archives
def test_checkout_finds_its_kernels(built: Built, tmp_path: Path) -> None:
    for path, cwd in ((built.checkout, tmp_path), (Path("."), built.checkout)):
        module, kernels = python(FIND + USE, path=path, cwd=cwd, env=NUMPY_ALONE).splitlines()
        assert (cwd / module).resolve() == built.checkout / "cupynorm/__init__.py"
        assert Path(kernels) == built.checkout / "kernels"


@archives
def test_editable_install_finds_its_kernels(built: Built, tmp_path: Path) -> None:
    (tmp_path / "wheel").mkdir()
    with zipfile.ZipFile(build("editable", built.checkout, tmp_path / "wheel")) as archive:
        archive.extractall(tmp_path / "site")
    # The tests may run from an editable install themselves: replace it.
    code = f"""
import site, sys
for finder in [f for f in sys.meta_path if getattr(f, "__module__", "").startswith("__editable__")]:
    sys.meta_path.remove(finder)
    del sys.modules[finder.__module__]
sys.path.insert(0, {str(tmp_path / "site")!r})
site.addsitedir({str(tmp_path / "site")!r})
{FIND}{USE}"""
    module, kernels = python(code, path=None, cwd=tmp_path, env=NUMPY_ALONE).splitlines()
    assert Path(module) == built.checkout / "cupynorm/__init__.py"
    assert Path(kernels) == built.checkout / "kernels"


@archives
def test_missing_kernels_are_named(built: Built, tmp_path: Path) -> None:
    shutil.copytree(built.installed / "cupynorm", tmp_path / "cupynorm", ignore=shutil.ignore_patterns("kernels"))
    code = """
from cupynorm.cuda import source
try:
    source.kernel_folder()
except FileNotFoundError as error:
    print(error)
"""
    said = python(USE + code, path=tmp_path, cwd=tmp_path, env=NUMPY_ALONE)  # NumPy needs none of them
    assert str(tmp_path / "cupynorm" / "kernels") in said
    assert str(tmp_path / "kernels") in said


# Facts


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_version_has_one_place(project: dict[str, Any]) -> None:
    """The package's `__version__`, from which the build takes it; the changelog has an entry of it."""
    assert "version" not in project and "version" in project["dynamic"]
    assert re.search(rf"^## {re.escape(cn.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)


def test_dependencies(project: dict[str, Any]) -> None:
    assert [re.split(r"[^\w-]", d)[0] for d in project["dependencies"]] == ["numpy"]
    assert project["requires-python"] == ">=3.10"
    assert project["license"] == "MIT"
    extras = project["optional-dependencies"]
    assert extras["cuda12"] == ["cupy-cuda12x[ctk]>=14"]
    assert extras["cuda13"] == ["cupy-cuda13x[ctk]>=14"]
    assert [re.split(r"[^\w-]", d)[0] for d in extras["bf16"]] == ["ml_dtypes"]
    assert {"demo", "bench", "test", "dev"} <= set(extras)
    everything = " ".join(" ".join(lines) for lines in extras.values())
    assert "torch" not in everything
    assert all(f"cupynorm[{name}]" not in " ".join(project["dependencies"]) for name in extras)


def test_typed_and_licensed() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")


def test_messages_name_existing_extras(project: dict[str, Any]) -> None:
    """Every extra that a message names exists."""
    for file in (ROOT / "cupynorm").rglob("*.py"):
        for names in re.findall(r"cupynorm\[([\w,]+)\]", file.read_text(encoding="utf-8")):
            assert set(names.split(",")) <= set(project["optional-dependencies"]), file


def test_gpu_status_never_raises() -> None:
    usable, why = devices.gpu_status()
    assert isinstance(usable, bool)
    assert why
