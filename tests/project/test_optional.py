"""Optional packages of the tests: any failure at import counts as missing, a warning does not."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
from helpers.optional import imported, required

BROKEN = {
    "raises": "raise RuntimeError('built for another NumPy')",
    "exits": "raise SystemError('initialization failed')",
    "lacks": "import a_package_that_is_not_there",
    "asserts": "assert False",
}


@pytest.mark.parametrize("name", [*BROKEN, "missing"])
def test_failure_at_import_counts_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    module = f"cupynorm_test_{name}"
    if name in BROKEN:
        (tmp_path / f"{module}.py").write_text(BROKEN[name] + "\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert imported(module) is None
    assert module not in sys.modules
    with pytest.raises(pytest.skip.Exception, match=f"needs {module}") as skipped:
        required(module)
    assert skipped.value.allow_module_level


def test_warning_at_import_counts_as_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although warnings are errors in the tests."""
    text = "import warnings\nwarnings.warn('old', DeprecationWarning)\nvalue = 5\n"
    (tmp_path / "cupynorm_test_warns.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert imported("cupynorm_test_warns").value == 5
        assert required("cupynorm_test_warns") is imported("cupynorm_test_warns")
        with pytest.raises(UserWarning):  # still errors afterwards
            warnings.warn("new", UserWarning, stacklevel=1)
    monkeypatch.delitem(sys.modules, "cupynorm_test_warns")
