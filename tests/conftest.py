"""Tiers, backends and seeds of the tests (tests/README.md), and their common fixtures."""

from __future__ import annotations

import gc
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from helpers import backends, compare, optional, pairwise, seeds, tiers
from helpers.backends import Backend

from cupynorm import config, cpu, devices
from cupynorm.cpu import numpy_small


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the full tier too: all that CI runs")
    parser.addoption("--nightly", action="store_true", help="run everything: whole products of parameters (hours)")
    parser.addoption("--seed", default="0", help="seed of the random numbers: a number, or `fresh` for a new one")


def pytest_configure(config: pytest.Config) -> None:
    tiers.asked = "nightly" if config.option.nightly else "full" if config.option.full else "default"
    if config.option.markexpr == "quick":
        cpu.compiled = False  # first calls compile
        backends.left_out.update(set(backends.BACKENDS) - {"numpy"})
        optional.left_out.add("torch")  # its import takes seconds
        collect_ignore_glob.append("adapters/*")
    config.option.seed = str(seeds.choose(config.option.seed))  # pytest-xdist's workers get this seed


def pytest_report_header(config: pytest.Config) -> list[str]:
    there = [name for name in backends.BACKENDS if not backends.missing(name)]
    absent = [f"no tests for {name}: {why}" for name in backends.BACKENDS if (why := backends.missing(name))]
    absent += [f"no {files}: {NEEDED[files]} is not installed" for files in NEEDED if files in collect_ignore_glob]
    absent += [f"without {package}" for package in sorted(optional.left_out)]
    return [f"seed {seeds.seed} (--seed); backends: {', '.join(there)}; " + "; ".join(absent)]


#: Packages that some test files need; without its package a file is not even imported.
NEEDED = {
    "adapters/test_chainer*.py": "chainer",
    "adapters/test_dask.py": "dask",
    "adapters/test_thinc.py": "thinc",
    "conformance/test_checkpoints.py": "torch",
    "kernels/test_fakegpu*.py": "cupy",
    "kernels/test_gpu.py": "cupy",
}
collect_ignore_glob = [files for files, package in NEEDED.items() if find_spec(package) is None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise a test with its backends and its covering array."""
    marker = metafunc.definition.get_closest_marker("on")
    found = backends.parameters(marker.args if marker else ()) if "backend" in metafunc.fixturenames else []
    if metafunc.definition.get_closest_marker("pairwise"):
        pairwise.parametrize(metafunc, found)
    elif found:
        metafunc.parametrize("backend", found, indirect=True)


def pytest_assertrepr_compare(op: str, left: Any, right: Any) -> list[str] | None:
    """Explain where arrays differ that must have the same bits."""
    return compare.difference(left, right) if op == "==" else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests of higher tiers than the one being run and of missing backends; mark the quick tier, and tests
    above the default one."""
    asked = tiers.TIERS.index(tiers.asked)
    ranks = tiers.ranks(items)
    more = tiers.beyond((item for item in items if not ranks[item]), "numpy")
    kept, left_out = [], []
    for item in items:
        names = {mark.name for mark in item.iter_markers()}
        lacks = any(mark and mark.name in names and backends.missing(name) for name, mark in backends.BACKENDS.items())
        (left_out if lacks or "absent" in names or ranks[item] > asked else kept).append(item)
        if ranks[item]:
            item.add_marker(pytest.mark.above)
        elif not names.intersection(tiers.NOT_QUICK) and item not in more:
            item.add_marker(pytest.mark.quick)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)
    gc.freeze()  # the collected tests stay: garbage collection in a test need not scan them


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Each available backend, or each that @on names (helpers.backends).

    On NumPy alone, half of the tests compute small samples as they do large ones.
    """
    if request.param == "numpy" and zlib.crc32(request.node.name.encode()) % 2:
        print("small samples as large ones")
        monkeypatch.setattr(numpy_small, "MOST", 0)
    return backends.started(request.param, monkeypatch)


@pytest.fixture
def run_on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run the public functions on NumPy arrays, with a runtime that replaces the GPU's."""

    def made(runtime: Any) -> Any:
        backends.started("simt", monkeypatch, runtime)
        return runtime

    return made


@pytest.fixture
def threads_as_they_were():
    before = config.num_threads.given
    yield
    config.num_threads.given = before


@pytest.fixture
def fresh_gpu_status():
    """The status of the GPU is found out anew, and again after the test."""
    devices.gpu_status.cache_clear()
    yield
    devices.gpu_status.cache_clear()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that are the same in every run of this test, unless --seed gives others."""
    print(f"random numbers of --seed={seeds.seed}")
    return np.random.default_rng(seeds.seed_of(request.node.nodeid))
