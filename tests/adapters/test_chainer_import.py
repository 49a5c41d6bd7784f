"""Importing Chainer with the adapter: NumPy stays as it is; Chainer imported before, missing, or failing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

if importlib.util.find_spec("chainer") is None:
    pytest.skip("needs Chainer (docs/guide/chainer.md)", allow_module_level=True)

pytestmark = [pytest.mark.chainer, pytest.mark.usefixtures("seeded")]
ROOT = Path(__file__).resolve().parents[2]


def python(code: str, *options: str) -> str:
    """Run code in a fresh interpreter, which must succeed; return what it prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "CUPYNORM_COMPILED": "0"}
    done = subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_import_of_chainer_leaves_numpy_unchanged() -> None:
    said = python("""
        import sys
        import numpy as np
        names = set(vars(np))
        import cupynorm
        assert "chainer" not in sys.modules
        import cupynorm.chainer
        import chainer, chainer.functions as F
        # Submodules that NumPy imports at first use are its own.
        new = {name for name in set(vars(np)) - names if "numpy." + name not in sys.modules}
        print(chainer.__version__, sorted(new), hasattr(np, "sctypes"), hasattr(np, "float"))
        # The two files of Chainer that use names NumPy has removed.
        y = F.resize_images(np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2), (3, 3))
        print(y.array.ravel().tolist())
        y = F.resize_images(np.ones((1, 1, 2, 2), np.float32), (3, 4), mode="nearest", align_corners=False)
        x = chainer.Variable(np.arange(6, dtype=np.float32))
        from chainer.functions.array.as_strided import as_strided
        F.sum(as_strided(x, (3, 2), (2, 1)) ** 2).backward()
        print(x.grad.tolist())
    """)
    first, resized, gradient = said.splitlines()
    assert first == "7.8.1 [] False False"
    assert resized == "[0.0, 0.5, 1.0, 1.0, 1.5, 2.0, 2.0, 2.5, 3.0]"
    assert gradient == "[0.0, 2.0, 4.0, 6.0, 8.0, 10.0]"


def test_without_pkg_resources() -> None:
    """Setuptools 82 and later have none."""
    said = python("""
        import sys
        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name == "pkg_resources":
                    raise ModuleNotFoundError(name)
        import importlib.util
        real = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *a: None if name == "pkg_resources" else real(name, *a)
        sys.meta_path.insert(0, Blocker())
        import cupynorm.chainer
        from chainer import gradient_check
        print(gradient_check.check_backward.__name__, "pkg_resources" in sys.modules)
    """)
    assert said.split() == ["check_backward", "False"]


def test_chainer_imported_before_is_left_unchanged() -> None:
    """Chainer may have been imported by the user's own shim, for example."""
    python("""
        import sys, types
        import numpy as np
        np.sctypes = {"int": [np.int32, np.int64], "float": [np.float32]}
        check = types.ModuleType("chainer._environment_check")
        check.check = lambda: None
        sys.modules[check.__name__] = check
        import chainer
        from chainer.functions.array import as_strided, resize_images
        before = resize_images.compute_indices_and_weights
        import cupynorm.chainer
        assert cupynorm.chainer.chainer is chainer
        assert as_strided.np is np
        assert resize_images.compute_indices_and_weights is before
        assert len(np.sctypes["int"]) == 2
        assert sys.modules[check.__name__] is check
    """)


def test_error_without_chainer() -> None:
    said = python("""
        import importlib.util
        real = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *a: None if name == "chainer" else real(name, *a)
        try:
            import cupynorm.chainer
        except ModuleNotFoundError as error:
            print(error.name, error)
    """)
    assert said.startswith("chainer ")
    assert "'cupynorm[chainer]'" in said


def test_failed_import_leaves_nothing_behind() -> None:
    python("""
        import sys
        import numpy as np
        class Broken:
            def find_spec(self, name, path=None, target=None):
                if name == "chainer.optimizers":
                    raise ImportError("broken")
        sys.meta_path.insert(0, Broken())
        try:
            import cupynorm.chainer
        except ImportError as error:
            assert str(error) == "broken", error
        else:
            raise AssertionError
        assert not hasattr(np, "sctypes")
        assert "chainer._environment_check" not in sys.modules
    """)
