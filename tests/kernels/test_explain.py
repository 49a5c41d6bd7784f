"""What `explain` says of a call: its accesses and launches, with masks, of parts, of a double backward; refusals."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from helpers.plans import desc_of

import cupynorm as cn
from cupynorm import cpu
from cupynorm.cuda.describe import plan_for
from cupynorm.cuda.device import DEVICES


@pytest.mark.long
def test_explain() -> None:
    x = np.zeros((20, 100, 35, 45), np.float32)
    text = cn.explain(x, device="H100")
    assert "block-registers" in text
    assert "2 accesses of 4 B per element, 16 B at a time" in text
    assert "3 accesses of 4 B" in text
    assert "read in place" in text
    assert "copied first" in cn.explain(x.transpose(0, 1, 3, 2), device="H100")
    assert "4 accesses" in cn.explain(x.transpose(0, 1, 3, 2), device="H100")
    apart = np.zeros(x.size + 1, np.float32)[1:].reshape(x.shape)
    assert "combined" not in text and "combined from two" in cn.explain(apart, device="H100")
    assert "combined" not in cn.explain(apart[..., :5, :7], device="H100")
    # A warp moves short planes together; three channels side by side form no vec.
    assert "subwarp-registers" in (short := cn.explain(x[..., :5, :7].copy(), device="H100"))
    assert short.count(", 16 B at a time") == 2
    rows = np.zeros((2, 100, 100, 3), np.float32).transpose(0, 3, 1, 2)
    assert cn.explain(rows, device="H100").count(", 4 B at a time") == 2
    # 2 M elements of float16 fit in the registers of 40 x 4 blocks of 256 threads with 8 vecs of 8 each; x and dy do
    # not fit in those of 40 x 2 blocks.
    text = cn.explain(np.zeros((1, 1, 2048, 1024), np.float16), device="T4")
    assert "forward: grid-registers" in text
    assert "backward: split" in text
    assert "refused" in cn.explain(x[:, :, :1, :1], device="H100")
    assert "empty" in cn.explain(x[:0], device="H100")
    assert "CPU" in cn.explain(x)
    assert "tiles" in cn.explain(np.zeros((1, 1, 1024, 1024), np.float16))
    with pytest.raises(ValueError, match="RTX 5090"):
        cn.explain(x, device="GTX 1")
    with pytest.raises(TypeError, match="int64"):
        cn.explain(x.astype(np.int64))
    with pytest.raises(ValueError, match="'tanh'"):
        cn.explain(x, activation="tanh", device="H100")


@pytest.mark.long
def test_explain_with_a_mask() -> None:
    """It is read as often as x; a split reads both twice."""
    text = cn.explain(np.zeros((2, 3, 35, 45), np.float32), mask=True, device="H100")
    assert text.count("a byte of the mask per element, read once") == 2
    assert "2 accesses of 4 B" in _lines(text, "forward") and "3 accesses of 4 B" in _lines(text, "backward")
    text = cn.explain(_large((1, 1, 8192, 8192)), mask=True, device="H100")
    assert text.count("a byte of the mask per element, read twice") == 2
    assert "mask" not in cn.explain(np.zeros((2, 3, 35, 45), np.float32), device="H100")
    with pytest.raises(ValueError, match="no double backward of a forward with a mask"):
        cn.explain(np.zeros((2, 3, 35, 45), np.float32), mask=True, double_backward=True)


def test_explain_parts() -> None:
    """The steps by themselves: every array is read once, and a part may have one position."""
    x = np.zeros((2, 8, 100, 400), np.float32)
    text = cn.explain(x, parts=True, activation="relu", residual=True, device="H100")
    for name, accesses, launches in (
        ("moments", 1, ("moments_block_registers_256x8", "merge_moments")),
        ("forward with moments=", 3, ("statistics_of_moments", "normalize_block_registers_256x4")),
        ("gradient sums", 3, ("gradient_sums_block_registers_256x8", "merge_gradient_sums")),
        ("backward with sums=", 5, ("means_of_sums", "input_gradient_block_registers_256x8")),
    ):
        lines = text.split(f"\n  {name}: ")[1].split("    bits")[0].splitlines()
        assert f"{accesses} accesses" in lines[2]
        assert [line.split(":")[0].strip() for line in lines[3:]] == list(launches)
    # One thread for each of 4,000 planes turns given moments, or given sums, into what the kernels read.
    many = cn.explain(np.zeros((40, 100, 9, 9), np.float32), parts=True, device="H100")
    for name in ("statistics_of_moments", "means_of_sums"):
        blocks, threads = map(int, re.search(rf"{name}: (\d+) blocks of (\d+) threads", many).groups())
        assert 4000 <= blocks * threads < 4000 + threads
    small = cn.explain(x[..., :1, :1], parts=True, device="H100")
    assert small.count("refused") == 2 and "moments_warp_registers_128x1: " in small
    assert "gradient sums" in cn.explain(x, parts=True)


@pytest.mark.long
@pytest.mark.parametrize("residual", [False, pytest.param(True, marks=pytest.mark.full)])
def test_explain_double_backward(residual: bool) -> None:
    x = np.zeros((2, 3, 1000, 1100), np.float16)
    for device in ("H100", "L4") if residual else ("H100",):
        without = cn.explain(x, residual=residual, device=device)
        text = cn.explain(x, residual=residual, double_backward=True, device=device)
        assert text.startswith(without + "\n  double backward: ")
        made, _ = plan_for("double_backward", desc_of(x), "float16", DEVICES[device])
        more = text[len(without) :]
        assert f"double backward: {made.regime}" in more
        assert f" {made.accesses} accesses of 2 B" in more
        assert all(step.name in more for step in made.steps)
    transposed = cn.explain(x.swapaxes(2, 3), double_backward=True, device="H100").split("double backward: ")[1]
    assert "copied first" in transposed
    assert "7 accesses" in transposed
    assert "double backward: refused" in cn.explain(x[..., :1, :1], double_backward=True, device="H100")
    assert cn.explain(x[:0], double_backward=True) == cn.explain(x[:0])
    without = cn.explain(x, residual=residual)
    more = cn.explain(x, residual=residual, double_backward=True)[len(without) :]
    assert re.fullmatch(r"\n  double backward: NumPy, \d+ block\(s\).* tiles, .*\n  .* of \d+", more)


@pytest.mark.parametrize("ask", [cn.warmup, cn.explain])
def test_explain_and_warmup_refuse_double_backward_of_an_activation(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "compiled", False)  # else loops are compiled
    x = np.zeros((2, 3, 5, 7), np.float32)
    ask(x, activation="silu")
    ask(x, double_backward=True)
    with pytest.raises(ValueError, match="no double backward through the fused activation 'silu'"):
        ask(x, activation="silu", double_backward=True)


def _lines(text: str, op: str) -> str:
    """Return the part of an explanation about forward or backward."""
    forward, backward = text.split("\n  backward: ")
    return forward if op == "forward" else backward


def test_explain_accesses_of_an_epilogue() -> None:
    x = np.zeros((20, 100, 35, 45), np.float16)
    for activation, residual, forward, backward in [
        ("silu", False, 2, 3), (None, True, 3, 3), ("relu", True, 3, 5), (None, False, 2, 3),
    ]:  # fmt: skip
        text = cn.explain(x, activation=activation, residual=residual, device="H100")
        assert f" {forward} accesses of 2 B" in _lines(text, "forward")
        assert f" {backward} accesses of 2 B" in _lines(text, "backward")


def _large(shape: tuple[int, ...]) -> np.ndarray:
    """Return a float32 array with the shape and strides of a large one, without its memory."""
    strides = [4]
    for size in shape[:0:-1]:
        strides.insert(0, strides[0] * size)
    return np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), shape, strides)


@pytest.mark.long
def test_explain_launches() -> None:
    # 7 x 7: 4 threads with 16 of 49 elements each, backward 8 with 8 each. 128 threads take 32 of 6144 planes, or 16.
    text = cn.explain(_large((64, 96, 7, 7)), device="H100")
    assert "subwarp-registers" in text
    assert "192 blocks of 128 threads" in _lines(text, "forward")
    assert "8 plane(s) per warp" in _lines(text, "forward")
    assert "384 blocks of 128 threads" in _lines(text, "backward")
    assert "4 plane(s) per warp" in _lines(text, "backward")
    # The same if x is off by a single element.
    assert "16 B at a time" in cn.explain(np.zeros(2 * 3 * 9 + 1, np.float32)[1:].reshape(2, 3, 9), device="H100")
    # 22 500 vecs of x, and of dy, are 5.5 for each of 16 x 256 threads; 10 000 are 4.9 for each of 8 x 256.
    text = cn.explain(_large((4, 64, 300, 300)), device="H100")
    assert "360000 B of one plane stay in 6 vecs in each of 256 threads of each of 16 blocks" in _lines(text, "forward")
    assert "clusters of 16, one for each plane" in _lines(text, "forward")
    assert "720000 B of one plane stay in 12 vecs in each of 256 threads of each of" in _lines(text, "backward")
    text = cn.explain(_large((4, 64, 200, 200)), device="H100")
    assert "clusters of 8, one for each plane" in _lines(text, "forward")
    assert "clusters of 8, one for each plane" in _lines(text, "backward")
    # 518 400 vecs are 8 for each of 256 threads in 254 blocks; 132 x 4 blocks are resident, backward 132 x 2.
    text = cn.explain(_large((2, 3, 1080, 1920)), device="H100")
    assert "508 blocks of 256 threads" in _lines(text, "forward")
    assert "all resident, in groups of 254; 2 group(s), each serving one plane at a time" in _lines(text, "forward")
    assert "all resident, in groups of 254; 1 group(s), each serving one plane at a time" in _lines(text, "backward")
    # 1 200 000 vecs, more than 528 blocks hold in registers, are 18 for each of 131 x 512 threads, in shared memory:
    # 147 456 B. To these come 2 areas of 2 sums of 8 B for each of 16 warps, and the 4 numbers that a block puts.
    text = cn.explain(_large((1, 8, 2400, 2000)), device="H100")
    assert "19200000 B of one plane stay in 147984 B of shared memory of each of 131 blocks" in _lines(text, "forward")
    assert "all resident, in groups of 131; 1 group(s), each serving one plane at a time" in _lines(text, "forward")
    text = cn.explain(_large((8, 64, 1600, 1250)), device="L4")
    assert "171 rounds of the first three launches, each over 3 of 512 units; a unit is" in _lines(text, "forward")
    assert "512 rounds of the first three launches, each over 1 of 512 units" in _lines(text, "backward")
    assert "rounds of the" not in cn.explain(_large((1, 1, 4096, 4096)), device="H100")


def test_plan_for() -> None:
    x = np.zeros((2, 3, 5, 7), np.float32)
    made, copies = plan_for("backward", desc_of(x), "float32", DEVICES["H100"])
    assert copies == 0
    assert made.op == "backward"
    assert made.steps[0].module == "backward"
    made, _ = plan_for("forward", desc_of(x), "float32", DEVICES["H100"], "gelu", True)
    assert (made.epilogue, made.accesses) == (3, 3)
    # A residual without an activation has an epilogue in forward, none in backward.
    assert plan_for("forward", desc_of(x), "float32", DEVICES["H100"], None, True)[0].epilogue == 1
    assert plan_for("backward", desc_of(x), "float32", DEVICES["H100"], None, True)[0].epilogue == 0
