"""Running statistics of arrays on the CPU: each batch moves them once, whichever threads and signal handlers call.

There is no lock. A signal handler or a finaliser runs between two steps of the Python code that it interrupts: a call
made there would wait for ever for a lock that this code holds. New values are computed from the present ones, and
written in a single step in C. If others have written since, that step stops before it writes anything, and all is done
again.
"""

from __future__ import annotations

import operator
import os
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from .functional import Array, at_once

#: One object, which stands for everybody's statistics as they are. Who writes takes it away, and leaves a new one.
_present: set[object] = {object()}


def move(pairs: Sequence[tuple[Array, np.ndarray]], momentum: float, writes: Sequence[partial[Any]]) -> None:
    """running <- (1 - momentum) * running + momentum * mean, in float64, for each pair (running, mean of the batch).

    What else is to be written goes with it, all or nothing: `writes`, partials of functions in C.
    """
    while True:
        seen = tuple(_present)
        if not seen:  # another thread is writing, for microseconds: it has let go of the interpreter to copy
            time.sleep(0)
            continue
        with np.errstate(all="ignore"):  # as on the GPU, overflow and NaN are answers
            moves = [_moved(*pair, momentum) for pair in pairs]
        try:
            # Of the last writes arrays may end, and Python code follow from that: others may write again by then.
            at_once(partial(_present.remove, *seen), *moves, partial(_present.add, object()), *writes)
        except KeyError:
            continue
        except BaseException:
            if not _present:  # a copy has failed
                _present.add(object())
            raise
        return


def _moved(running: Array, mean: np.ndarray, momentum: float) -> partial[None]:
    moved = (1 - momentum) * running.astype(np.float64) + momentum * mean
    return partial(operator.setitem, running, ..., moved.astype(running.dtype))


def _after_fork() -> None:
    _present.clear()  # another thread of the parent may have been writing
    _present.add(object())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
