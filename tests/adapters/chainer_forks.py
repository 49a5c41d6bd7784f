"""Links in the two styles of the forks in circulation, for comparison: the faults of each are kept."""

from __future__ import annotations

from typing import Any

from cupynorm.chainer import chainer

F = chainer.functions


class _Fork(chainer.Link):
    def __init__(self, size: int, eps: float = 2e-5, dtype: Any = None):
        super().__init__()
        self.eps = eps
        dtype = chainer.get_dtype(dtype)
        with self.init_scope():
            self.gamma = chainer.Parameter(chainer.initializers.One(dtype), size)
            self.beta = chainer.Parameter(chainer.initializers.Zero(dtype), size)


class _OwnGradient(chainer.FunctionNode):
    """Statistics of each plane, but a backward with the sums and the element count of batch normalisation."""

    def __init__(self, eps: float):
        self.eps = eps

    def forward(self, inputs: tuple[Any, ...]) -> tuple[Any]:
        x, gamma, beta = inputs
        self.retain_inputs((1,))
        self.rstd = (x.var((2, 3), keepdims=True) + self.eps) ** -0.5
        self.xhat = (x - x.mean((2, 3), keepdims=True)) * self.rstd
        return (gamma[:, None, None] * self.xhat + beta[:, None, None],)

    def backward(self, indexes: tuple[int, ...], grad_outputs: tuple[Any]) -> tuple[Any, ...]:
        (gamma,) = (v.array[:, None, None] for v in self.get_retained_inputs())
        gy = grad_outputs[0].array
        count = gy.size // gamma.size  # N * H * W, where a plane has H * W
        gbeta, ggamma = gy.sum((0, 2, 3)), (gy * self.xhat).sum((0, 2, 3))
        sums = self.xhat * ggamma[:, None, None] + gbeta[:, None, None]
        return tuple(map(chainer.Variable, (gamma * self.rstd * (gy - sums / count), ggamma, gbeta)))


class OwnGradient(_Fork):
    """A link with its own backward, whose input gradient is wrong for N > 1."""

    def forward(self, x: Any) -> Any:
        return _OwnGradient(self.eps).apply((x, self.gamma, self.beta))[0]


class BatchOfOne(_Fork):
    """Batch normalisation of (1, N * C, H, W) with copies of the parameters' arrays: gamma and beta never train."""

    def forward(self, x: Any) -> Any:
        samples, channels, *spatial = x.shape
        gamma, beta = (self.xp.tile(p.array, samples) for p in (self.gamma, self.beta))
        y = F.batch_normalization(F.reshape(x, (1, samples * channels, *spatial)), gamma, beta, eps=self.eps)
        return F.reshape(y, x.shape)


InstanceNormalization = OwnGradient
