"""`inference_mode`, in which layers keep nothing for a backward."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ContextDecorator
from contextvars import ContextVar
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])

# The modes that have been entered and not left. A context variable, because every thread has its own, as with
# threading.local, and so has every asyncio task: a task that awaits within the mode does not affect other tasks.
_entered: ContextVar[tuple[bool, ...]] = ContextVar("cupynorm.inference_mode", default=())


def inferring() -> bool:
    """Return True if the caller is within `inference_mode`."""
    entered = _entered.get()
    return bool(entered) and entered[-1]


class inference_mode(ContextDecorator):  # noqa: N801  # PyTorch's name
    """Context manager and function decorator within which layers keep nothing for a backward.

    Otherwise a layer holds its last input, for its backward, until the next forward. Within this mode a forward sets
    the layer's `saved` to None and so releases the arrays in it; a backward then raises RuntimeError. Results are the
    same, and in training the running statistics are updated, as in PyTorch's mode of this name. A forward that fails or
    is interrupted leaves `saved` as it was::

        with cupynorm.inference_mode():
            y = model(x)

    The mode applies to the thread, and to the asyncio task, that entered it. It can be nested. If a generator yields
    within it, the mode applies to the caller, too.

    The mode changes no return value of a function: `instance_norm_forward` still returns Saved, and the layer for thinc
    its callback (`model.predict` drops it). Chainer has `chainer.no_backprop_mode`.

    Args:
        mode: False turns an outer mode off.

    Raises:
        TypeError: mode is not a bool; or the decorated function is a generator or coroutine function, whose body runs
            after the call: use `with` in the body.
    """

    def __init__(self, mode: bool = True):
        if not isinstance(mode, bool):
            raise TypeError(f"mode must be a bool, got {mode!r}; as a decorator it is @cupynorm.inference_mode()")
        self.mode = mode

    def __enter__(self) -> None:
        before = _entered.get()
        try:
            _entered.set((*before, self.mode))
        except BaseException:  # an interrupt: the mode would never be left
            _entered.set(before)
            raise

    def __exit__(self, *error: object) -> None:
        _entered.set(_entered.get()[:-1])

    def __call__(self, function: _Function) -> _Function:
        kinds = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)
        if any(is_one(function) for is_one in kinds):
            raise TypeError(
                f"inference_mode() cannot decorate {function.__qualname__}, a generator or coroutine function, whose "
                "body runs after the call: use `with cupynorm.inference_mode():` in the body"
            )
        return super().__call__(function)
