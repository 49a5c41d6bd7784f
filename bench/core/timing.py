"""The measurement: contestants take turns, in an order that rotates, each with its own batch of calls.

On the GPU two CUDA events on the current stream, which PyTorch shares, measure the time. A waiting kernel is launched
before them, so that the calls are queued when the first one starts, and the host's time is not measured. A contestant
with its own stream (JAX) is measured by the host's clock, from an idle device to an idle device; its figures therefore
include the host's time if that is longer, as it is for small arrays. On the CPU the host's clock measures all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

MOST_CALLS = 128  # in a batch


@dataclass
class Contestant:
    """An implementation of the operation.

    run: one call on buffer set i. answers: the named results of a call, as arrays of the device, shape (N, C, ...).
    finish: waits for a result; None if it is on the current stream, or ready when run returns.
    """

    name: str
    run: Callable[[int], Any]
    answers: Callable[[Any], dict[str, Any]]
    finish: Callable[[Any], None] | None = None


class Timing(NamedTuple):
    median: float  # seconds of one call
    spread: float  # between the quartiles


def summarise(samples: list[float]) -> Timing:
    if len(samples) < 2:
        return Timing(samples[0], 0.0)
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(statistics.median(samples), high - low)


def rotated(items: list[Any], turn: int) -> list[Any]:
    """A B C, B C A, C A B, A B C …"""
    turn %= max(len(items), 1)
    return items[turn:] + items[:turn]


class HostClock:
    """The host's clock."""

    pause = 0.002  # lets the previous contestant's threads fall asleep
    short = 0.05  # seconds of a batch that waking threads and processors would prolong

    def __init__(self) -> None:
        self.last: dict[str, float] = {}  # seconds of a batch, by contestant

    def seconds(self, contestant: Contestant, calls: list[int]) -> float:
        """Time the calls on these buffer sets. Results are kept until the end, so that they leave the cache, too."""
        kept: dict[int, Any] = {}
        if self.pause:
            time.sleep(self.pause)
            if self.last.get(contestant.name, 0) < self.short:
                awake = contestant.run(calls[0] - 1)  # the previous set, which is needed again last
                if contestant.finish is not None:
                    contestant.finish(awake)
                del awake
        start = time.perf_counter()
        for i in calls:
            kept[i] = contestant.run(i)
        if contestant.finish is not None:
            contestant.finish(kept[calls[-1]])
        self.last[contestant.name] = time.perf_counter() - start
        return self.last[contestant.name]


HOLD = r"""
extern "C" __global__ void hold(const unsigned long long nanoseconds) {
    unsigned long long start, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
    do {
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    } while (now - start < nanoseconds);
}
"""


class DeviceClock(HostClock):
    """CUDA events on CuPy's current stream; the host's clock for contestants with their own stream."""

    pause = 0.0
    longest_wait = 50_000_000  # ns

    def __init__(self) -> None:
        super().__init__()
        import cupy

        self.cupy = cupy
        self.hold = cupy.RawKernel(HOLD, "hold")
        self.begin, self.end = cupy.cuda.Event(), cupy.cuda.Event()
        self.queueing: dict[str, float] = {}  # seconds the host needs to queue one call, by contestant

    def seconds(self, contestant: Contestant, calls: list[int]) -> float:
        cupy = self.cupy
        cupy.cuda.Device().synchronize()
        if contestant.finish is not None:
            return super().seconds(contestant, calls)
        kept: dict[int, Any] = {}
        nanoseconds = int(2e9 * self.queueing.get(contestant.name, 0) * len(calls)) + 20_000
        self.hold((1,), (1,), (cupy.uint64(min(nanoseconds, self.longest_wait)),))
        self.begin.record()
        start = time.perf_counter()
        for i in calls:
            kept[i] = contestant.run(i)
        self.queueing[contestant.name] = (time.perf_counter() - start) / len(calls)
        self.end.record()
        self.end.synchronize()
        return float(cupy.cuda.get_elapsed_time(self.begin, self.end)) / 1e3


class Race:
    """Rounds of batches; a batch is as many calls as fill `batch_seconds`. Calls rotate through the buffer sets."""

    def __init__(self, clock: HostClock, sets: int, batch_seconds: float):
        self.clock, self.sets, self.batch_seconds = clock, sets, batch_seconds

    def warm_up(self, contestant: Contestant) -> int:
        """Make a few calls whose times do not count; return how many calls make a batch."""
        each, spent = float("inf"), 0.0
        for i in range(8):  # the first ones may compile, or wake threads
            seconds = self.clock.seconds(contestant, [i % self.sets])
            each, spent = min(each, seconds), spent + seconds
            if i and spent > 10 * self.batch_seconds:
                break
        return max(1, min(MOST_CALLS, int(self.batch_seconds / max(each, 1e-9))))

    def run(self, contestants: list[Contestant], rounds: int) -> dict[str, list[float]]:
        """Return the seconds per call of each batch, by contestant."""
        batch = {c.name: self.warm_up(c) for c in contestants}
        turn = dict.fromkeys(batch, 0)
        samples: dict[str, list[float]] = {name: [] for name in batch}
        for round_ in range(rounds):
            for contestant in rotated(contestants, round_):
                name, count = contestant.name, batch[contestant.name]
                calls = [(turn[name] + i) % self.sets for i in range(count)]
                turn[name] += count
                samples[name].append(self.clock.seconds(contestant, calls) / count)
        return samples
