"""Two processes train one model with ChainerMN, each on its own data: run by mpiexec from test_chainer_links.py."""

from __future__ import annotations

import warnings

import numpy as np

import cupynorm.chainer as cnc
from cupynorm.chainer import chainer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # CuPy's, if installed, about what it does not find
    import chainermn


class Net(chainer.Chain):
    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.conv = chainer.links.Convolution2D(1, 4, 3)
            self.norm = cnc.InstanceNormalization(4, track_avg_stats=True)
            self.head = chainer.links.Linear(4, 1)

    def forward(self, x: np.ndarray) -> chainer.Variable:
        h = chainer.functions.relu(self.norm(self.conv(x)))
        return self.head(chainer.functions.mean(h, (2, 3)))


def of_parts(mpi: chainermn.CommunicatorBase) -> None:
    """Check a link whose processes have a part of every plane each, against one process that has the whole."""
    x, gy = np.random.default_rng(5).normal(size=(2, 2, 4, 6, 9)).astype(np.float32)
    part = slice(0, 4) if mpi.rank == 0 else slice(4, 9)

    def results(x: np.ndarray, gy: np.ndarray, comm: object) -> list[np.ndarray]:
        link = cnc.InstanceNormalization2D(4, track_avg_stats=True, comm=comm)
        v = chainer.Variable(np.ascontiguousarray(x))
        y = link(v)
        y.grad = np.ascontiguousarray(gy)
        y.backward()
        return [y.array, v.grad, link.gamma.grad, link.beta.grad, link.avg_mean, link.avg_var]

    y, gx, ggamma, gbeta, *averages = results(x, gy, None)
    own = results(x[..., part], gy[..., part], mpi)
    np.testing.assert_allclose(own[0], y[..., part], atol=1e-5)
    np.testing.assert_allclose(own[1], gx[..., part], atol=1e-5)
    for i, whole in ((2, ggamma), (3, gbeta)):
        np.testing.assert_allclose(sum(mpi.mpi_comm.allgather(own[i])), whole, atol=1e-4)
    for ours, whole in zip(own[4:], averages, strict=True):
        np.testing.assert_allclose(ours, whole, atol=1e-6)
        first, second = mpi.mpi_comm.allgather(ours)
        np.testing.assert_array_equal(first, second)


def main() -> None:
    mpi = chainermn.create_communicator("naive")
    assert mpi.size == 2
    np.random.seed(mpi.rank)  # the first update sends rank 0's parameters to all
    net = Net()
    optimizer = chainermn.create_multi_node_optimizer(chainer.optimizers.Adam(), mpi).setup(net)
    rng = np.random.default_rng(10 + mpi.rank)
    for _ in range(4):
        x = rng.normal(mpi.rank, 1, (3, 1, 8, 8)).astype(np.float32)
        loss = chainer.functions.mean(net(x) ** 2)
        net.cleargrads()
        loss.backward()
        optimizer.update()
    for _, parameter in sorted(net.namedparams()):
        ours, theirs = mpi.mpi_comm.allgather(parameter.array)
        np.testing.assert_array_equal(ours, theirs)
    before = mpi.mpi_comm.allgather((net.norm.avg_mean.copy(), net.norm.avg_var.copy()))
    assert np.abs(before[0][0] - before[1][0]).max() > 1e-3  # the data differs
    chainermn.extensions.AllreducePersistent(net, mpi)()
    for i, own in enumerate((net.norm.avg_mean, net.norm.avg_var)):
        ours, theirs = mpi.mpi_comm.allgather(own)
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_allclose(own, (before[0][i] + before[1][i]) / 2, rtol=1e-6)
    with chainer.using_config("train", False):
        ours, theirs = mpi.mpi_comm.allgather(net(np.ones((1, 1, 8, 8), np.float32)).array)
    np.testing.assert_array_equal(ours, theirs)
    of_parts(mpi)
    if mpi.rank == 0:
        print("equal")


main()
