"""Which combinations the full tier builds, since all would take minutes: by the emulator, by NVRTC, as compiled loops.
All tests choose the same ones, so that each is built once."""

from __future__ import annotations

from typing import Any

from cupynorm.cuda.variants import EPILOGUES

#: Dtypes of x and of the results, the first for the default tier. Together: every dtype of either, and elements of a
#: quarter to four times the result's size.
PAIRS = [
    ("uint16", "float32"), ("uint8", "float32"), ("int8", "bfloat16"), ("int16", "float64"),
    ("float16", "float32"), ("float32", "float16"), ("bfloat16", "float16"), ("float32", "float64"),
    ("float64", "float32"), ("float64", "bfloat16"),
]  # fmt: skip
#: The pair that is tested with silu and gelu, too.
SMOOTH_PAIR = ("float32", "float16")
#: Dtypes and codes of epilogues of calls with a mask; float32 without one or with relu is for the default tier.
MASKED = {"float32": (0, 1, 2), "float16": (1,), "bfloat16": (0,), "float64": (1,)}


def code_of(activation: str | None, residual: bool) -> int:
    """Return the code of an epilogue (cupynorm.cuda.variants.EPILOGUES), 0 for none."""
    return EPILOGUES[activation] if activation or residual else 0


def rare_pair(pair: tuple[str, str], activation: str | None) -> bool:
    """Return True for results of another dtype that only the nightly tier builds."""
    return pair not in PAIRS or (activation in ("silu", "gelu") and pair != SMOOTH_PAIR)


def rare_mask(given: dict[str, Any]) -> bool:
    """Return True for calls with a mask that only the nightly tier builds."""
    return code_of(given["activation"], given["residual"]) not in MASKED[given["dtype"]]
