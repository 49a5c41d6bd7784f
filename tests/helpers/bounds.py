"""The launch bounds of kernels, as the sources ask for them."""

from __future__ import annotations

import re
from functools import lru_cache

from cupynorm.cuda.source import Module


@lru_cache(maxsize=None)
def bounds_of(module: Module) -> dict[str, tuple[int, int, int]]:
    """Return for each kernel of a module its threads per block, blocks per multiprocessor and blocks per cluster."""
    text = module.source

    def number(word: str) -> int:
        return int(word if word.isdigit() else re.search(rf"\bint {word} = (\d+);", text)[1])  # type: ignore[index]

    asked = re.findall(r"^KERNEL\((\w+), (\d+)\)(?: CLUSTER_OF\((\d+)\))? (\w+)\(", text, re.M)
    return {name: (number(threads), int(blocks), int(cluster or 1)) for threads, blocks, cluster, name in asked}
