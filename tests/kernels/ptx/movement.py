"""Branches, barriers, loads, stores and asynchronous copies."""

from __future__ import annotations

import numpy as np

from .block import TYPES, Block
from .memory import PtxError
from .parse import Instruction, names


def branch(block: Block, i: Instruction, mask: np.ndarray) -> None:
    block.pc[mask] = block.program.labels[i.operands[0]]


def leave(block: Block, i: Instruction, mask: np.ndarray) -> None:
    block.done |= mask


def barrier(block: Block, i: Instruction, mask: np.ndarray) -> None:
    if block.done.any():
        raise PtxError("a barrier that some threads have left behind")
    after = block.pc[mask][0]
    if (block.pc[block.waiting] != after).any():
        raise PtxError("threads wait at different barriers")
    block.waiting |= mask


def _shape(i: Instruction) -> tuple[str, int]:
    """Element type and number of elements of a load or store."""
    count = next((int(part[1:]) for part in i.opcode if part in ("v2", "v4")), 1)
    return i.opcode[-1], count


def load(block: Block, i: Instruction, mask: np.ndarray) -> None:
    kind, count = _shape(i)
    if i.opcode[1] == "param":
        value = block.arguments[i.operands[1].strip("[]")]
        block.write(i.operands[0], np.full(block.threads, value).astype(value.dtype), mask)
        return
    address, size = block.address(i.operands[1])[mask], TYPES[kind].itemsize * count
    if i.opcode[1] == "shared":
        data = block.shared.load(address, size, block.warp[mask], i.text)
    elif i.opcode[1] == "global":
        data = block.memory.load(address, size, i.text)
    else:
        raise PtxError(f"unknown memory: {i.text}")
    values = np.zeros((block.threads, count), TYPES[kind])
    values[mask] = np.ascontiguousarray(data).view(TYPES[kind])
    for n, register in enumerate(names(i.operands[0])):
        block.write(register, values[:, n].copy(), mask)


def store(block: Block, i: Instruction, mask: np.ndarray) -> None:
    kind, count = _shape(i)
    values = np.stack([block.read(register, kind)[mask] for register in names(i.operands[1])], axis=1)
    data = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), count * TYPES[kind].itemsize)
    address = block.address(i.operands[0])[mask]
    if i.opcode[1] == "shared":
        block.shared.store(address, data, block.warp[mask], i.text)
    elif i.opcode[1] == "global":
        block.memory.store(address, data, i.text)
    else:
        raise PtxError(f"unknown memory: {i.text}")


def atomic(block: Block, i: Instruction, mask: np.ndarray) -> None:
    """atom and red: addition to global memory, one lane after another."""
    if "global" not in i.opcode or "add" not in i.opcode:
        raise PtxError(f"unknown instruction: {i.text}")
    returns = i.opcode[0] == "atom"
    where, what = (1, 2) if returns else (0, 1)
    address, value = block.address(i.operands[where]), block.read(i.operands[what], "u32")
    before = np.zeros(block.threads, np.uint32)
    for lane in np.nonzero(mask)[0]:
        at = address[lane : lane + 1]
        before[lane] = block.memory.load(at, 4, i.text).view(np.uint32).item()
        total = (before[lane : lane + 1] + value[lane : lane + 1]).view(np.uint8)
        block.memory.store(at, total.reshape(1, 4), i.text)
    if returns:
        block.write(i.operands[0], before, mask)


def asynchronous(block: Block, i: Instruction, mask: np.ndarray) -> None:
    """cp.async: copy, commit_group and wait_group."""
    if i.opcode[2] == "commit_group":
        for lane in np.nonzero(mask)[0]:
            block.copies[lane].append([])
    elif i.opcode[2] == "wait_group":
        for lane in np.nonzero(mask)[0]:
            while len(block.copies[lane]) - 1 > int(i.operands[0]):
                for copy in block.copies[lane].pop(0):
                    _land(block, lane, copy, i.text)
    elif i.opcode[2] == "cg" and i.operands[2] == "16":
        _begin(block, i, mask)
    else:
        raise PtxError(f"unknown instruction: {i.text}")


def _begin(block: Block, i: Instruction, mask: np.ndarray) -> None:
    to, source, valid = (
        block.address(i.operands[0]),
        block.address(i.operands[1]),
        block.read(i.operands[3], "u32"),
    )
    if (source[mask] % 16).any() or not np.isin(valid[mask], (0, 16)).all():
        raise PtxError(f"misaligned or partial copy: {i.text}")
    block.shared.begin_copy(to[mask], 16, block.warp[mask], i.text)
    for lane in np.nonzero(mask)[0]:
        copy = (int(to[lane]), int(source[lane]), int(valid[lane]), int(block.pc[lane]))
        if block.schedule.eager:
            _land(block, lane, copy, i.text)
        else:
            block.copies[lane][-1].append(copy)


def _land(block: Block, lane: int, copy: tuple[int, int, int, int], text: str) -> None:
    to, source, valid, _ = copy
    data = np.zeros((1, 16), np.uint8)
    if valid:
        data = block.memory.load(np.array([source]), 16, text)
    block.shared.end_copy(np.array([to]), data, block.warp[lane : lane + 1], text)
