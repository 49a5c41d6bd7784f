"""Execute a kernel's machine code for the threads of a block, or of a cluster's blocks, and count the instructions.

Threads at the lowest address go first, all together; divergent ones wait for each other where the code says so (BSSY,
BSYNC). An instruction is issued once for each warp that has a thread there, whether or not its predicate holds.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cupynorm._checks import reach
from cupynorm.cuda.plan import Step

from .listing import Kernel
from .operands import I64, PT, RZ, Registers
from .operations import Decoded

PARAMETERS = 0x210  # where the arguments lie in the constant bank
STACK = 0x28  # and the end of a thread's local memory
GLOBAL = 2**32  # generic addresses below this are of shared memory
WINDOW = 0x400  # where a block's shared memory begins; the block's number in its cluster is above bit 24
LOCAL = 1024  # bytes of local memory of a thread
MOST_STEPS = 2_000_000
NOWHERE = 2**62

RUNNING, AT_BARRIER, AT_CLUSTER_BARRIER, REJOINING, DONE = range(5)


class MachineError(RuntimeError):
    """The code did something that the machine does not do, or that no GPU allows."""


class Access(NamedTuple):
    """Bytes that each thread accesses: their places in an array of bytes."""

    memory: np.ndarray
    places: np.ndarray
    size: int

    def _indices(self, mask: np.ndarray) -> np.ndarray:
        first = self.places[mask]
        if (first < 0).any() or (first + self.size > len(self.memory)).any():
            raise MachineError(f"an access at {first.min()} to {first.max()} is outside of {len(self.memory)} bytes")
        if (first % self.size).any():
            raise MachineError(f"an access of {self.size} bytes is not aligned")
        return first[:, None] + np.arange(self.size)

    def read(self, mask: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(self.memory[self._indices(mask)])

    def write(self, mask: np.ndarray, values: np.ndarray) -> None:
        self.memory[self._indices(mask)] = values


class _Range:
    """The bytes of an array, from its first to its last one."""

    def __init__(self, array: np.ndarray):
        low, high = reach(array.shape, array.strides, array.itemsize)
        self.start, self.end = array.ctypes.data + low, array.ctypes.data + high
        memory = (ctypes.c_uint8 * (self.end - self.start)).from_address(self.start)
        self.bytes = np.frombuffer(memory, np.uint8)
        self.array = array  # lives as long


class Block:
    """The threads of a block, or of the blocks of a cluster, which run together.

    Args:
        kernel: its code.
        step: its launch.
        blocks: the numbers in x of the blocks that run.
        arguments: the memory of the kernel's structure. Its pointers are addresses of the host.
        arrays: what it points to.
    """

    def __init__(self, kernel: Kernel, step: Step, blocks: Sequence[int], arguments: bytes, arrays: Sequence[Any]):
        self.kernel, self.code, threads = kernel, {}, step.threads
        count = threads * len(blocks)
        ranks = np.repeat(np.arange(len(blocks)), threads)
        bank = bytearray(PARAMETERS + len(arguments))
        for place, number in zip((0, 4, 8, 12, 16, 20), (threads, 1, 1, *step.grid, 1), strict=True):
            bank[place : place + 4] = number.to_bytes(4, "little")
        bank[STACK : STACK + 4] = LOCAL.to_bytes(4, "little")
        bank[PARAMETERS:] = arguments
        names = {
            "SR_TID.X": np.tile(np.arange(threads), len(blocks)), "SR_CTAID.X": np.asarray(blocks)[ranks],
            "SR_CgaCtaId": ranks % step.cluster, "SR_LANEID": np.arange(count) % 32,
        }  # fmt: skip
        self.registers = Registers(count, bytes(bank), names)
        self.arrays = [_Range(array) for array in arrays if array is not None and array.size]
        # Of the 1 KiB beside the dynamic memory, kernels with static memory use a part.
        self.shared = np.zeros((len(blocks), -(-step.shared // 16) * 16 + 4096), np.uint8)
        self.cluster_of = ranks // step.cluster * step.cluster
        self.local = np.zeros(count * LOCAL, np.uint8)
        self.pc = np.full(count, min(kernel.code), I64)
        self.state = np.full(count, RUNNING)
        self.ranks, self.block_threads = ranks, threads
        self.joins = np.zeros((16, count), np.int64)  # for each barrier register, the threads of the warp that rejoin
        self.joining = np.full(count, -1)
        self.reduced = np.zeros(count, bool)
        self.issued: Counter[str] = Counter()  # warp-instructions, by operation

    # Memory

    def memory(self, name: str, addresses: np.ndarray, size: int, mask: np.ndarray) -> Access:
        """Return the access of an instruction. Generic addresses below GLOBAL are of shared memory."""
        if name in ("LDL", "STL"):
            return Access(self.local, addresses + np.arange(len(self.pc)) * LOCAL, size)
        if name in ("LDS", "STS") or (name in ("LD", "ST") and (addresses[mask] < GLOBAL).all()):
            inner = (addresses & 0xFFFFFF) - WINDOW
            block = self.cluster_of + (addresses >> 24)
            return Access(self.shared.reshape(-1), inner + block * self.shared.shape[1], size)
        first = addresses[mask][0]
        for found in self.arrays:
            if found.start <= first < found.end:
                return Access(found.bytes, addresses - found.start, size)
        raise MachineError(f"no array at {first:#x}")

    # Control

    def run(self) -> None:
        """Run until all threads have ended."""
        steps = np.zeros(len(self.shared), int)  # of each block: the one that is behind goes on
        for _ in range(MOST_STEPS):
            running = self.state == RUNNING
            if not running.any():
                if (self.state == DONE).all():
                    return
                self._release()
                continue
            next_of = np.where(running, self.pc, NOWHERE).reshape(len(self.shared), -1).min(1)
            behind = np.where(next_of < NOWHERE, steps, NOWHERE).argmin()
            address = next_of[behind]
            steps[next_of == address] += 1
            together = np.repeat(next_of == address, self.block_threads)
            self._step(running & together & (self.pc == address), int(address))
        raise MachineError("it does not end")

    def _release(self) -> None:
        """Let threads go on that have waited for the others of their block or cluster."""
        for barrier, groups in ((AT_BARRIER, self.ranks), (AT_CLUSTER_BARRIER, self.cluster_of)):
            waiting = self.state == barrier
            for group in np.unique(groups[waiting]):
                of_group = groups == group
                if (waiting | (self.state == DONE))[of_group].all():
                    self.state[of_group & waiting] = RUNNING
        if not (self.state == RUNNING).any():
            raise MachineError("threads wait for ever")

    def _step(self, active: np.ndarray, address: int) -> None:
        instruction = self.code.get(address)
        if instruction is None:
            instruction = self.code[address] = Decoded(self.kernel.code[address])
        i = instruction
        self.issued[i.name] += int(active.reshape(-1, 32).any(1).sum())
        mask = active & i.guard.predicate(self.registers) if i.guard is not None else active
        if i.function is not None:
            if mask.any():
                with np.errstate(all="ignore"):
                    i.function(self, i, mask)
            self.pc[active] += 16
            return
        control = getattr(self, f"_{i.name.lower()}", None)
        if control is None:
            raise MachineError(f"unknown: {i.instruction}")
        self.pc[active] += 16
        control(i, mask, active)

    def _target(self, i: Decoded) -> int:
        label = next(text for text in i.texts if isinstance(text, str) and text.startswith("`("))
        return self.kernel.labels[label[2:-1]]

    def _bra(self, i: Decoded, mask: np.ndarray, active: np.ndarray) -> None:
        if "DIV" in i.modifiers:  # to code for warps of which not all threads are here
            warps = active.reshape(-1, 32)
            alive = (self.state != DONE).reshape(-1, 32)
            if (warps.any(1) & (warps != alive).any(1)).any():
                raise MachineError(f"a divergent warp: {i.instruction}")
            return
        if i.operands and getattr(i.operands[0], "is_predicate", False):
            mask = mask & i.operands[0].predicate(self.registers)
        self.pc[mask] = self._target(i)

    def _call(self, i: Decoded, mask: np.ndarray, active: np.ndarray) -> None:
        self.pc[mask] = self._target(i)

    def _ret(self, i: Decoded, mask: np.ndarray, active: np.ndarray) -> None:
        self.pc[mask] = i.operands[0].wide(self.registers).view(I64)[mask]

    def _exit(self, i: Decoded, mask: np.ndarray, active: np.ndarray) -> None:
        self.state[mask] = DONE
        self._rejoin()

    def _bssy(self, i: Decoded, mask: np.ndarray, active: np.ndarray) -> None:
        bits = (mask.reshape(-1, 32) @ (1 << np.arange(32))).repeat(32)
        register = int(i.texts[0][1:])
        self.joins[register, mask] = bits[mask]

    def _bsync(self, i: Decoded, mask: np.ndarray, active: np.ndarray) -> None:
        self.state[mask] = REJOINING
        self.joining[mask] = int(i.texts[0][1:])
        self._rejoin()

    def _rejoin(self) -> None:
        """Let threads go on of which all that are to rejoin have arrived or ended."""
        waiting = self.state == REJOINING
        if not waiting.any():
            return
        lanes = 1 << np.arange(32)
        done = ((self.state == DONE).reshape(-1, 32) @ lanes).repeat(32)
        for register in np.unique(self.joining[waiting]):
            here = waiting & (self.joining == register)
            arrived = (here.reshape(-1, 32) @ lanes).repeat(32)
            complete = here & ((self.joins[register] & ~(arrived | done)) == 0)
            self.state[complete] = RUNNING
            self.joining[complete] = -1

    def _bar(self, i: Decoded, mask: np.ndarray, active: np.ndarray) -> None:
        if "RED" in i.modifiers:
            found = i.operands[-1].predicate(self.registers) & mask
            for rank in range(self.shared.shape[0]):
                block = self.ranks == rank
                self.reduced[block] = self.reduced[block] | found[block].any()
        elif "SYNC" not in i.modifiers:
            raise MachineError(f"unknown: {i.instruction}")
        self.state[mask] = AT_BARRIER

    def _b2r(self, i: Decoded, mask: np.ndarray, active: np.ndarray) -> None:
        """The result of the last reduction at a barrier."""
        for target in i.operands:
            if target.value not in (PT, RZ):
                np.copyto(self.registers.file(target.kind)[target.value], self.reduced, where=mask)
        self.reduced[mask] = False

    def _ucgabar_arv(self, i: Decoded, mask: np.ndarray, active: np.ndarray) -> None:
        """The arrival at a cluster's barrier: here the wait does both."""

    def _ucgabar_wait(self, i: Decoded, mask: np.ndarray, active: np.ndarray) -> None:
        self.state[mask] = AT_CLUSTER_BARRIER
