"""
A volume larger than memory
===========================

``cupynorm.dask`` normalises a volume that is larger than the memory of the workers. The example is for those who
process large volumes, such as those of light-sheet microscopes, with dask. It writes ``dask_volume.png``.

Run it with ``python examples/dask_volume.py``: 1.3 GB of float32, and two workers of 640 MB each. With ``--plain`` it
does the same with dask's own mean, std and broadcasting; ``--help`` names the other options.
``pip install '.[dask,cpu]' matplotlib 'zarr>=3'`` installs the packages it needs.

The volume (depth, height, width) is made on the spot, in a zarr array in a temporary folder, and cut into chunks along
all axes. ``cupynorm.dask`` reads each chunk twice: for its moments, and to normalise it with those of the whole volume.
So a worker holds a few chunks at a time. The mean and the deviation of the result are checked at the end. The figure
shows one section through the volume, before and after, and what comes out if each chunk is normalised alone.
"""

from __future__ import annotations

import argparse
import logging
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

import cupynorm as cn
import cupynorm.dask as cnd


def volume(shape: tuple[int, ...], chunks: tuple[int, ...]) -> da.Array:
    """Return a ball of sponge in the dark, with noise: its chunks have very different means and deviations."""
    axes = (da.linspace(-1, 1, size, chunks=chunk, dtype=np.float32) for size, chunk in zip(shape, chunks, strict=True))
    z, y, x = (axis[(slice(None), *(None,) * after)] for axis, after in zip(axes, (2, 1, 0), strict=True))
    ball = z * z + y * y + x * x < 0.8
    a, b, c = (axis * np.float32(12) for axis in (z, y, x))
    sponge = da.sin(a) * da.cos(b) + da.sin(b) * da.cos(c) + da.sin(c) * da.cos(a) > 0  # a gyroid
    noise = da.random.default_rng(0).normal(size=shape, chunks=chunks).astype(np.float32)
    return ball * (sponge + np.float32(0.3)) * (700 - 300 * z) + 20 * noise + 100


def computed(what: Any, title: str) -> float:
    """Compute, on a terminal with dask's progress bar, and return the seconds."""
    print(title)
    start = time.perf_counter()
    running = what.persist()
    if sys.stdout.isatty():
        progress(running)
    dask.compute(running)  # raises if a task has failed
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Normalise a volume larger than the memory of the workers.")
    parser.add_argument("--shape", type=int, nargs=3, default=(640, 512, 1024), metavar=("D", "H", "W"))
    parser.add_argument("--chunks", type=int, nargs=3, default=(32, 256, 256), metavar=("D", "H", "W"))
    parser.add_argument("--workers", type=int, default=2, help="default 2, of one thread each")
    parser.add_argument("--memory", default="640MB", help="of each worker; default 640MB")
    parser.add_argument("--plain", action="store_true", help="with dask's own mean, std and broadcasting")
    parser.add_argument("--output", default="dask_volume.png", help="default dask_volume.png")
    options = parser.parse_args()
    logging.getLogger("distributed.nanny").setLevel(logging.ERROR)  # the restart of the workers is intended
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
        alone = a.map_blocks(lambda chunk: cn.instance_norm(chunk[None, None])[0, 0], meta=a._meta)
        sections = da.compute(*(each[:, shape[1] // 2] for each in (a, result, alone)))
    print(
        f"{size:.0f} MB normalised in {seconds:.1f} s by {options.workers} workers of {options.memory}, which used "
        f"{', '.join(f'{peak:.0f}' for peak in peaks.values())} MB at most; mean {mean:.1e}, deviation {std:.6f}"
    )
    if not (abs(mean) < 1e-4 and abs(std - 1) < 1e-3):
        sys.exit("the result is not normalised")
    draw(sections, options.output)


def _peak() -> float:
    """Return the most memory that this process has used, in MB; NaN where the system is not Linux."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), float("nan"))


def draw(sections: tuple[np.ndarray, ...], path: str) -> None:
    """Draw a section, (D, W), of the volume, of the result, and of the chunks normalised alone."""
    import matplotlib.pyplot as plt  # here: the workers import this script, too, and need their memory for chunks

    figure, axes = plt.subplots(1, 3, figsize=(9.6, 4), layout="constrained", sharey=True)
    titles = "the volume", "the volume normalised", "each chunk normalised alone"
    for axis, section, title in zip(axes, sections, titles, strict=True):
        like = sections[0 if title == titles[0] else 1]  # one scale for both results
        drawn = axis.imshow(section, cmap="magma", aspect="auto", vmin=like.min(), vmax=like.max())
        axis.set(title=title, xlabel="width (voxels)")
        unit = "intensity" if title == titles[0] else "standard deviations"
        figure.colorbar(drawn, ax=axis, label=unit, location="bottom")
    axes[0].set_ylabel("depth (voxels)")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
