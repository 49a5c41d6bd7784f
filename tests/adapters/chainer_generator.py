"""A generator in the style of CycleGAN (Zhu, Park, Isola, Efros 2017), written against a fork's link."""

from __future__ import annotations

from typing import Any

import numpy as np
from chainer_forks import InstanceNormalization

from cupynorm.chainer import chainer

F, L = chainer.functions, chainer.links


def reflect(x: Any, pad: int) -> Any:
    """Reflection padding of the last two axes."""
    rows, columns = (np.pad(np.arange(size), pad, mode="reflect") for size in x.shape[2:])
    return x[:, :, rows][:, :, :, columns]


class Block(chainer.Chain):
    """A convolution without bias, normalisation, and optionally relu."""

    def __init__(self, convolution: chainer.Link, channels: int, *, reflected: int = 0, relu: bool = True):
        super().__init__()
        self.reflected, self.relu = reflected, relu
        with self.init_scope():
            self.convolution = convolution
            self.norm = InstanceNormalization(channels)

    def forward(self, x: Any) -> Any:
        h = self.norm(self.convolution(reflect(x, self.reflected) if self.reflected else x))
        return F.relu(h) if self.relu else h


class Residual(chainer.Chain):
    def __init__(self, channels: int):
        super().__init__()
        with self.init_scope():
            self.first = Block(L.Convolution2D(channels, channels, 3, nobias=True), channels, reflected=1)
            self.second = Block(L.Convolution2D(channels, channels, 3, nobias=True), channels, reflected=1, relu=False)

    def forward(self, x: Any) -> Any:
        return x + self.second(self.first(x))


class Generator(chainer.Chain):
    """A 7x7 convolution, two of stride 2, residual blocks, a deconvolution, an upsampling, and a 7x7 convolution."""

    def __init__(self, channels: int = 4, blocks: int = 2):
        super().__init__()
        c = channels
        with self.init_scope():
            self.head = Block(L.Convolution2D(3, c, 7, nobias=True), c, reflected=3)
            self.down1 = Block(L.Convolution2D(c, 2 * c, 3, 2, 1, nobias=True), 2 * c)
            self.down2 = Block(L.Convolution2D(2 * c, 4 * c, 3, 2, 1, nobias=True), 4 * c)
            self.body = chainer.Sequential(*(Residual(4 * c) for _ in range(blocks)))
            self.up1 = Block(L.Deconvolution2D(4 * c, 2 * c, 4, 2, 1, nobias=True), 2 * c)
            self.up2 = Block(L.Convolution2D(2 * c, c, 3, nobias=True), c, reflected=1)
            self.tail = L.Convolution2D(c, 3, 7)

    def forward(self, x: Any) -> Any:
        h = self.up1(self.body(self.down2(self.down1(self.head(x)))))
        h = self.up2(F.unpooling_2d(h, 2, cover_all=False))
        return F.tanh(self.tail(reflect(h, 3)))
