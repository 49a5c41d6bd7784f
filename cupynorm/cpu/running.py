"""Update running statistics on the CPU: exactly once per batch, even with threads and signal handlers.

There is no lock: a signal handler or a finaliser may run between two steps of the code it interrupts, and a call in it
would wait forever for a lock held by that code. Instead, new values are computed from the current ones and written in a
single step in C. If another call has written in the meantime, that step stops before it writes anything, and the update
is computed again.
"""

from __future__ import annotations

import operator
import os
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from .._types import Array, commit

#: One object, the version of all statistics in the process. A writer removes it and adds a new one.
_present: set[object] = {object()}


def move(pairs: Sequence[tuple[Array, np.ndarray]], momentum: float | np.ndarray, *writes: partial[Any]) -> None:
    """running <- (1 - momentum) * running + momentum * mean, in float64, for each pair (running, mean of the batch).

    momentum: a number, or one for each channel.
    `writes`, partials of functions in C, are run in the same step, all or nothing.
    """
    while True:
        seen = tuple(_present)
        if not seen:  # another thread is writing, for microseconds: it has released the interpreter to copy
            time.sleep(0)
            continue
        with np.errstate(all="ignore"):  # as on the GPU, overflow and NaN are valid results
            moves = [_moved(*pair, momentum) for pair in pairs]
        try:
            # The last writes may free arrays and so run Python code; other calls may write again by then.
            commit(partial(_present.remove, *seen), *moves, partial(_present.add, object()), *writes)
        except KeyError:
            continue
        except BaseException:
            if not _present:  # a copy has failed
                _present.add(object())
            raise
        return


def _moved(running: Array, mean: np.ndarray, momentum: float | np.ndarray) -> partial[None]:
    moved = (1 - momentum) * running.astype(np.float64) + momentum * mean
    return partial(operator.setitem, running, ..., moved.astype(running.dtype))


def _after_fork() -> None:
    _present.clear()  # a thread of the parent may have been writing
    _present.add(object())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
