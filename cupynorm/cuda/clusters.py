"""Which clusters of blocks the current device takes: tried and asked for, once for each device."""

from __future__ import annotations

import ctypes
import os

import cupy
from cupy_backends.cuda.api import driver

from .source import OPTIONS

NON_PORTABLE = 14  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
PORTABLE = 8  # the largest cluster that every device with clusters takes

#: Clusters of a size are used if those that run at a time have this share of the multiprocessors. The grid's kernels,
#: which use all of them, are 3/4 as fast on an H200 as clusters of 16 (bench/TUNING.md).
SHARE = 0.75

PROBE = 'extern "C" __global__ void __cluster_dims__(%d, 1, 1) cupynorm_probe() {}'


def largest_cluster(major: int, shared: int, sm_count: int) -> int:
    """Most blocks of a cluster on the current device, of compute capability `major`; 1: it has none worth using.

    A block of the cluster has all the shared memory a block can have, `shared` bytes. More than 8 blocks are not
    promised, a part of a device (MIG) may have fewer, and a cluster must lie within one of the parts that a device is
    built of; those differ even between two of one name.
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
    """What cuOccupancyMaxActiveClusters, which CuPy does not have, says of a kernel; None if it cannot be asked."""
    try:
        ask = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1").cuOccupancyMaxActiveClusters
    except (OSError, AttributeError):
        return None
    clusters, config = ctypes.c_int(0), _Config((size, 1, 1), (512, 1, 1), shared)
    failed = ask(ctypes.byref(clusters), ctypes.c_void_p(function), ctypes.byref(config))
    return None if failed else clusters.value
