"""Random numbers of the tests: the same in every run, unless `--seed` says otherwise."""

from __future__ import annotations

import os
import zlib

#: The value of `--seed` (conftest); each test's own seed is derived from it and from the test's id.
seed = 0


def choose(given: str) -> int:
    """Set the seed of this run: a number, or "fresh" for a random one."""
    global seed  # noqa: PLW0603
    seed = int.from_bytes(os.urandom(4), "little") if given == "fresh" else int(given)
    return seed


def seed_of(name: str) -> int:
    """Return the seed derived from a name, such as a test's id."""
    return zlib.crc32(f"{seed}:{name}".encode())
