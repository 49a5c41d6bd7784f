"""Normalise a volume that is larger than the memory of the workers.

    pip install 'cupynorm[dask,cpu]' zarr
    python examples/dask_volume.py                 # 1.3 GB of float32, two workers of 640 MB each
    python examples/dask_volume.py --plain         # the same with dask's own mean, std and broadcasting

The volume (1, 1, depth, height, width) is made on the spot, in a zarr array in a temporary folder, and cut into chunks
along all spatial axes. cupynorm.dask reads each chunk twice: for its moments, and to normalise it with those of the
whole volume. So a worker holds a few chunks at a time. The mean and deviation of the result are checked at the end.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import zarr
from dask.distributed import Client, LocalCluster, progress

import cupynorm.dask as cnd


def volume(shape: tuple[int, ...], chunks: tuple[int, ...]) -> da.Array:
    """Return a volume whose brightness changes with depth: its chunks have very different means."""
    noise = da.random.default_rng(0).normal(size=shape, chunks=chunks).astype(np.float32)
    depth = da.linspace(0, 1000, shape[0], chunks=chunks[0], dtype=np.float32)
    return noise * 20 + depth[:, None, None]


def computed(what: Any, title: str) -> float:
    """Compute with dask's progress bar, and return the seconds."""
    print(title)
    start = time.perf_counter()
    running = what.persist()
    progress(running)
    dask.compute(running)  # raises if a task has failed
    print()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Normalise a volume larger than the memory of the workers.")
    parser.add_argument("--shape", type=int, nargs=3, default=(640, 512, 1024), metavar=("D", "H", "W"))
    parser.add_argument("--chunks", type=int, nargs=3, default=(32, 256, 256), metavar=("D", "H", "W"))
    parser.add_argument("--workers", type=int, default=2, help="default 2, of one thread each")
    parser.add_argument("--memory", default="640MB", help="of each worker; default 640MB")
    parser.add_argument("--plain", action="store_true", help="with dask's own mean, std and broadcasting")
    options = parser.parse_args()
    shape, chunks = tuple(options.shape), tuple(options.chunks)
    size = 4 * np.prod(shape) / 1e6
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(
            n_workers=options.workers, threads_per_worker=1, memory_limit=options.memory, dashboard_address=None,
            local_directory=folder,
        ) as cluster,
        Client(cluster) as client,
    ):  # fmt: skip
        source, target = (
            zarr.create_array(Path(folder) / name, shape=shape, chunks=chunks, dtype="float32", compressors=None)
            for name in ("volume.zarr", "normalised.zarr")
        )
        computed(volume(shape, chunks).store(source, compute=False, lock=False), f"writing a volume of {size:.0f} MB")
        client.restart()
        a = da.from_zarr(source)
        if options.plain:
            y = ((a - a.mean(dtype=np.float64)) / (a.std(dtype=np.float64) + 1e-5)).astype(np.float32)
        else:
            y = cnd.instance_norm(a[None, None])[0, 0]
        seconds = computed(y.store(target, compute=False, lock=False), "normalising it")
        peaks = client.run(_peak)
        result = da.from_zarr(target)
        mean, std = da.compute(result.mean(dtype=np.float64), result.std(dtype=np.float64))
    print(
        f"{size:.0f} MB normalised in {seconds:.1f} s by {options.workers} workers of {options.memory}, which used "
        f"{', '.join(f'{peak:.0f}' for peak in peaks.values())} MB at most; mean {mean:.1e}, deviation {std:.6f}"
    )
    if not (abs(mean) < 1e-4 and abs(std - 1) < 1e-3):
        sys.exit("the result is not normalised")


def _peak() -> float:
    """Return the most memory that this process has used, in MB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
