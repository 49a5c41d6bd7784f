"""The operations that kernels compute: their arrays, how many sums of a plane their threads add up and merge, and the
shared memory for these. Each module's text has the same numbers (`constants`)."""

from __future__ import annotations

from typing import Literal, NamedTuple

Op = Literal[
    "forward", "normalize", "moments", "backward", "frozen_backward", "gradient_sums", "input_gradient",
    "double_backward", "frozen_double_backward",
]  # fmt: skip


class Operation(NamedTuple):
    """Arrays have the names of their tensors in the kernels' arguments (arguments.py); the other fields are numbers of
    one plane."""

    inputs: tuple[str, ...]  # the arrays that are read; the last one of a double backward may be missing
    targets: tuple[str, ...]  # the arrays that are written
    residual_targets: tuple[str, ...] = ()  # the arrays that are also written if an epilogue has a residual
    sums: int = 0  # sums that the threads of a block add up together, in an area of shared memory
    areas: int = 1  # areas of that size, used in turn
    merged: int = 0  # sums of Accum that the blocks of a group add up
    partials: int = 0  # numbers of each tile that are merged, in a group or in a split

    def tensors(self, inputs: int, residual: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the names of the arrays that a call reads, and of its results. inputs: the number of given inputs."""
        read, written = self.inputs[:inputs], self.targets
        return (*read, "epilogue.residual") if residual else read, written + self.residual_targets * residual


_DOUBLE = ("inputs.x", "inputs.dy", "inputs.ddx"), ("dx", "ddy")

OPS: dict[Op, Operation] = {
    "forward": Operation(("x",), ("y",), sums=2, areas=2, merged=2, partials=4),
    "normalize": Operation(("x",), ("y",)),
    "moments": Operation(("x",), (), sums=2, areas=2),
    "backward": Operation(("x", "dy"), ("dx",), ("dresidual",), sums=2, merged=2, partials=2),
    "frozen_backward": Operation(("x", "dy"), ("dx",), ("dresidual",), sums=2, partials=2),
    "gradient_sums": Operation(("x", "dy"), (), sums=2, partials=2),
    "input_gradient": Operation(("x", "g"), ("dx",), ("dresidual",)),
    "double_backward": Operation(*_DOUBLE, sums=2 + 6, merged=6, partials=9),  # two areas, of 2 and 6 sums
    "frozen_double_backward": Operation(*_DOUBLE, sums=1),
}

#: Numbers of a plane that merge_products computes from the partials of its tiles.
COEFFICIENTS = 8

#: Threads of a block of the kernels that exist once (variants.SINGLE), and the bytes of shared memory for each thread:
#: what it merges, or the sums of two quantities. A block of those in channels.cu serves COLUMNS channels.
SINGLE_THREADS = 256
SHARED = {
    "merge_moments": 24,
    "merge_gradient_sums": 16,
    "merge_products": 48,
    "merge_dots": 8,
    "running_statistics": 24,
    "parameter_gradients": 16,
    "statistics_of_moments": 0,
    "means_of_sums": 0,
}
COLUMNS = 32


def constants() -> dict[str, int]:
    """Return the numbers above that kernels need, by the names that they have in each module's text."""
    numbers = {"COEFFICIENTS": COEFFICIENTS, "SINGLE_THREADS": SINGLE_THREADS, "COLUMNS": COLUMNS}
    numbers |= {f"{kernel.upper()}_BYTES": size for kernel, size in SHARED.items() if size}
    for op, operation in OPS.items():
        of_op = {"SUMS": operation.sums, "MERGED": operation.merged, "PARTIALS": operation.partials}
        numbers |= {f"{op.upper()}_{name}": number for name, number in of_op.items() if number}
    return numbers
