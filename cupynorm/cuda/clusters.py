"""Find the largest cluster of blocks worth using on the current device, by trial launches and an occupancy query."""

from __future__ import annotations

import ctypes
import os

import cupy
from cupy_backends.cuda.api import driver

from .source import OPTIONS

NON_PORTABLE = 14  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
PORTABLE = 8  # the largest cluster that every device with clusters takes

#: A size of clusters is used if the clusters that run at a time occupy at least this share of the multiprocessors. The
#: grid's kernels, which use all multiprocessors, are 3/4 as fast on an H200 as clusters of 16 (bench/TUNING.md).
SHARE = 0.75

PROBE = 'extern "C" __global__ void __cluster_dims__(%d, 1, 1) cupynorm_probe() {}'


def largest_cluster(major: int, shared: int, sm_count: int) -> int:
    """Return the blocks of the largest cluster worth using on the current device; 1: there is none.

    major: the device's compute capability; shared: the bytes of shared memory of each block, the most that a block can
    have. CUDA guarantees no more than 8 blocks, a part of a device (MIG) may allow fewer, and a cluster must lie within
    one of the parts that a device is built of; these differ even between two devices of one name.
    """
    for size in (16, 8, 4, 2) if major >= 9 else ():
        kernel = cupy.RawKernel(PROBE % size, "cupynorm_probe", OPTIONS)
        try:
            kernel.max_dynamic_shared_size_bytes = shared
            if size > PORTABLE:
                driver.funcSetAttribute(kernel.kernel.ptr, NON_PORTABLE, 1)
            kernel((size,), (512,), (), shared_mem=shared)
        except driver.CUDADriverError:
            continue
        at_a_time = _clusters_at_a_time(kernel.kernel.ptr, size, shared)
        if at_a_time is None or size * at_a_time >= SHARE * sm_count:
            return size
    return 1


class _Config(ctypes.Structure):
    """The driver's CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("attribute_count", ctypes.c_uint),
    )  # fmt: skip


def _clusters_at_a_time(function: int, size: int, shared: int) -> int | None:
    """Return the result of cuOccupancyMaxActiveClusters, which CuPy does not wrap; None if it is not available."""
    try:
        ask = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1").cuOccupancyMaxActiveClusters
    except (OSError, AttributeError):
        return None
    clusters, config = ctypes.c_int(0), _Config((size, 1, 1), (512, 1, 1), shared)
    failed = ask(ctypes.byref(clusters), ctypes.c_void_p(function), ctypes.byref(config))
    return None if failed else clusters.value
