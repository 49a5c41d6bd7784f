"""The import of numba."""

from __future__ import annotations

import threading


def load_numba() -> None:
    """Import numba and the modules it imports at its first compilation, so that an interrupt cannot break it.

    Some of numba's modules cannot be executed twice: after an interrupt among them, no call in this process could
    compile. Interrupts come to the main thread, so another thread imports them, and goes on if this one stops waiting.

    Raises:
        ImportError: numba is not installed. Exception: it does not work with this NumPy.
    """
    failures: list[Exception] = []

    def load() -> None:
        try:
            import numba  # first, so that its absence is the reason given
            import numba.core.boxing  # noqa: F401
            from numba.core.registry import cpu_target

            cpu_target.typing_context.refresh()
            cpu_target.target_context.refresh()
        except Exception as failure:
            failures.append(failure)

    loading = threading.Thread(target=load, name="cupynorm imports numba", daemon=True)
    try:
        loading.start()
    except RuntimeError:  # no more threads
        load()
    else:
        loading.join()
    if failures:
        try:
            raise failures[0]
        finally:
            failures.clear()  # else the failure would refer to itself, and so keep its callers' arrays
