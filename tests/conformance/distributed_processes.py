"""Processes train one network, each on a part of every plane: run by mpiexec from test_distributed.py."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from mpi4py import MPI

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.ranks import train

import cupynorm as cn

comm = MPI.COMM_WORLD
parts = [slice(0, 25), slice(25, 60)] if comm.size == 2 else [slice(0, 1), slice(1, 1), slice(1, 60)]
losses, parameters = train(comm, parts[comm.rank])
for others in comm.allgather(parameters):
    for ours, theirs in zip(parameters, others, strict=True):
        np.testing.assert_array_equal(ours, theirs)
expected, alone = train(None, slice(None))
np.testing.assert_allclose(losses, expected, rtol=1e-12)
for ours, theirs in zip(parameters, alone, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)

layer = cn.InstanceNorm1d(5, comm=comm, device="cpu")
try:
    layer.forward(np.zeros((2, 5, 8) if comm.rank else 5, np.float32))
except (ValueError, RuntimeError) as error:
    told = comm.allgather(str(error))
assert told[0] == "expected 2D or 3D input (got 1D input)", told
assert all(f"failed on rank 0: ValueError: {told[0]}" in each for each in told[1:]), told
if comm.rank == 0:
    print("equal", losses[0], losses[-1])
