"""How many threads the system, the environment and other libraries allow."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def available_cpus() -> int:
    """Return the number of processors this process may use: its affinity, and a container's quota rounded up."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(1, min([count, *(math.ceil(quota) for quota in _quotas())]))


def _quotas(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[float]:
    """Yield the limits, in processors, of this process's control group and its parents (version 1 or 2)."""
    try:
        groups = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in groups:
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / controllers if controllers else root
        here = top / path.strip("/")
        for folder in (here, *here.parents):
            try:
                if controllers:
                    quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                else:
                    quota, period = (folder / "cpu.max").read_text().split()
                if quota != "max" and int(quota) > 0:
                    yield int(quota) / int(period)
            except (OSError, ValueError):
                pass  # the root has no limit; a container may not see its parents
            if folder == top:
                break


def openmp_limited(number: int) -> int:
    """Return the number, or OMP_NUM_THREADS (the first of a list) or OMP_THREAD_LIMIT if they are smaller."""
    for name in ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT"):
        first = os.environ.get(name, "").partition(",")[0].strip()
        if first.isdecimal() and int(first) > 0:
            number = min(number, int(first))
    return number


_controllers: list[Any] = []  # threadpoolctl's, once asked: to make one takes longer than to ask it


def library_limits() -> list[int]:
    """Return the thread limits that imported libraries set: threadpoolctl's, and PyTorch's in a DataLoader's worker."""
    found: list[int] = []
    threadpoolctl, data = sys.modules.get("threadpoolctl"), sys.modules.get("torch.utils.data")
    try:  # any module may have these names
        if threadpoolctl is not None:
            if not _controllers:
                _controllers.append(threadpoolctl.ThreadpoolController())
            found += [number for library in _controllers[0].lib_controllers if (number := library.num_threads)]
        if data is not None and data.get_worker_info() is not None:
            found.append(sys.modules["torch"].get_num_threads())
    except Exception:
        pass
    return found
