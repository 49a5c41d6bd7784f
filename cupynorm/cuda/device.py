"""The properties of GPUs that plans depend on, and those of known GPUs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """The properties of a GPU that plans depend on. Sizes are in bytes."""

    name: str
    capability: tuple[int, int]
    sm_count: int
    shared_per_block: int  # the opt-in limit
    l2_bytes: int
    cluster: int = 1  # most blocks of a cluster

    def __hash__(self) -> int:  # part of every call's cache key: must be fast
        return hash(self.name)


def _known(
    name: str, capability: tuple[int, int], sm_count: int, shared_kib: int, l2_mib: float, cluster: int = 1
) -> Device:
    return Device(name, capability, sm_count, shared_kib * 1024, int(l2_mib * 2**20), cluster)


#: Devices by name, for plans on any machine.
DEVICES = {
    d.name: d
    for d in (
        _known("T4", (7, 5), 40, 64, 4),
        _known("V100", (7, 0), 80, 96, 6),
        _known("A100", (8, 0), 108, 163, 40),
        _known("L4", (8, 9), 58, 99, 48),
        _known("H100", (9, 0), 132, 227, 50, 16),
        _known("H200", (9, 0), 132, 227, 60, 16),
        _known("B200", (10, 0), 148, 227, 126, 16),
        _known("RTX 5090", (12, 0), 170, 99, 96, 8),
    )
}
