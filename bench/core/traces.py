"""Forget how earlier calls were planned and traced."""

from cupynorm import functional
from cupynorm.cuda import calls, plan


def forget() -> None:
    """Plan and trace all calls anew, after a change of the variants or of the runtime's functions."""
    plan.plan.cache_clear()
    calls.traced.cache_clear()
    functional._known.clear()
