"""Random numbers of the tests: the same in every run, unless `--seed` says otherwise."""

from __future__ import annotations

import os
import zlib

#: What `--seed` gave (conftest); every test's own seed is made from it and from the test's id.
seed = 0


def choose(given: str) -> int:
    """Set the seed of this run: a number, or "fresh" for one that no run had before."""
    global seed  # noqa: PLW0603
    seed = int.from_bytes(os.urandom(4), "little") if given == "fresh" else int(given)
    return seed


def seed_of(name: str) -> int:
    """The seed of the test, or of whatever else has this name."""
    return zlib.crc32(f"{seed}:{name}".encode())
