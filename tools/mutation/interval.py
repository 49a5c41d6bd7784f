"""The interval of a share that was found in a sample."""

import math


def interval(killed: int, tested: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share found in a sample."""
    z, p = 1.96, killed / tested
    middle, half = p + z * z / (2 * tested), z * math.sqrt(p * (1 - p) / tested + z * z / (4 * tested**2))
    return (middle - half) / (1 + z * z / tested), (middle + half) / (1 + z * z / tested)
