"""Settings of the documentation: `python -m sphinx -W --keep-going docs out/docs` builds it."""

from __future__ import annotations

import http.client
import inspect
import sys
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import benchmark_tables  # noqa: E402  # found by the path above

import cupynorm  # noqa: E402

project = "cupynorm"
author = "The cupynorm authors"
copyright = f"2026, {author}"
version = release = cupynorm.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["benchmarks/generated", "_build"]
default_role = "py:obj"
suppress_warnings = ["config.cache"]  # the gallery's settings have a function

# Prose
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
copybutton_prompt_text = "$ "

# Reference
autosummary_generate = True
autodoc_typehints = "none"  # the signatures say it
autodoc_member_order = "bysource"
autodoc_mock_imports = ["chainer", "thinc"]
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
toc_object_entries_show_parents = "hide"


def _reachable(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}objects.inv", timeout=5):
            return True
    except (OSError, http.client.HTTPException):
        return False


# Links to the documentation of other projects; without a network they are left out.
_OTHERS = {
    "python": "https://docs.python.org/3/",
    "numpy": "https://numpy.org/doc/stable/",
    "scipy": "https://docs.scipy.org/doc/scipy/",
    "cupy": "https://docs.cupy.dev/en/stable/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "dask": "https://docs.dask.org/en/stable/",
}
intersphinx_timeout = 10
intersphinx_mapping = {name: (address, None) for name, address in _OTHERS.items() if _reachable(address)}


def _arguments(settings: Any, script: Any) -> list[str]:
    """Return the arguments of an example: the volume larger than memory is a small one here."""
    small = ["--shape", "64", "256", "256", "--chunks", "16", "128", "64"]
    return small if "dask_volume" in script["src_file"] else []


# Gallery. A CUDA graph is shown without its result where there is no GPU.
sphinx_gallery_conf = {
    "examples_dirs": str(ROOT / "examples"),
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$" if cupynorm.devices.gpu_status()[0] else r"(?<!cuda_graph)\.py$",
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "show_memory": False,
    "write_computation_times": False,
    "reset_argv": _arguments,
}

# Pages
html_theme = "pydata_sphinx_theme"
html_title = "cupynorm"
html_favicon = "_static/icon.svg"
html_context = {"default_mode": "auto"}
html_static_path = ["_static"]
html_css_files = ["cupynorm.css"]
html_show_sourcelink = False
html_theme_options = {
    "navbar_align": "left",
    "show_toc_level": 2,
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "navigation_with_keys": False,
}
templates_path = ["_templates"]


def _escape_stars(app: Any, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    """Escape what docstrings write as in code, (N, C, *spatial), and reStructuredText reads as emphasis."""
    lines[:] = [line.replace("*spatial", r"\*spatial") for line in lines]


def _own_signature(app: Any, what: str, name: str, found: Any, options: Any, signature: str, returns: str) -> Any:
    """Show the arguments of a link of Chainer: its base class is a stand-in, which takes any."""
    if what == "class" and name.startswith("cupynorm.chainer."):
        _self, *arguments = inspect.signature(found.__init__).parameters.values()
        signature = str(inspect.Signature([a.replace(annotation=inspect.Parameter.empty) for a in arguments]))
    return signature, returns


def setup(app: Any) -> None:
    benchmark_tables.write(ROOT / "bench" / "results", ROOT / "docs" / "benchmarks" / "generated")
    app.connect("autodoc-process-docstring", _escape_stars)
    app.connect("autodoc-process-signature", _own_signature)
