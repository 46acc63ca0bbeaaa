"""Instructions that a whole warp executes together."""

from __future__ import annotations

import numpy as np

from .block import Block
from .memory import PtxError
from .parse import Instruction, names

LANE = np.arange(32)
GROUP, QUAD = LANE // 4, LANE % 4
BYTE = np.arange(4)
# Coordinates of each lane's bytes in the fragments of mma, as the PTX ISA documents them: (lane, register, byte).
A_ROW = GROUP[:, None, None] + 8 * np.array([0, 1, 0, 1])[None, :, None] + 0 * BYTE
A_K = QUAD[:, None, None] * 4 + 16 * np.array([0, 0, 1, 1])[None, :, None] + BYTE
B_K = QUAD[:, None, None] * 4 + 16 * np.array([0, 1])[None, :, None] + BYTE
B_COLUMN = GROUP[:, None, None] + 0 * B_K
D_ROW = GROUP[:, None] + 8 * np.array([0, 0, 1, 1])
D_COLUMN = QUAD[:, None] * 2 + np.array([0, 1, 0, 1])


def shuffle(block: Block, i: Instruction, mask: np.ndarray) -> None:
    """shfl.sync with all lanes and the whole warp as one segment."""
    block.full_warps(mask, i.text)
    to, _, flag = i.operands[0].partition("|")
    value, by = block.read(i.operands[1], "b32"), block.read(i.operands[2], "u32").astype(np.int64)
    lane = np.arange(block.threads)
    within = lane % 32
    match i.opcode[2]:
        case "bfly":
            source = within ^ by
        case "idx":
            source = by % 32
        case "up":
            source = np.where(within >= by, within - by, within)
        case _:
            raise PtxError(f"unknown instruction: {i.text}")
    block.write(to, value[lane - within + source], mask)
    if flag:
        block.write(flag, np.ones(block.threads, bool), mask)


def vote(block: Block, i: Instruction, mask: np.ndarray) -> None:
    """vote.sync.ballot."""
    if i.opcode[2] != "ballot":
        raise PtxError(f"unknown instruction: {i.text}")
    predicate, votes = block.predicate(i.operands[1]), np.zeros(block.threads, np.uint32)
    for first in block.full_warps(mask, i.text):
        votes[first : first + 32] = sum(1 << lane for lane in range(32) if predicate[first + lane])
    block.write(i.operands[0], votes, mask)


def load_matrix(block: Block, i: Instruction, mask: np.ndarray) -> None:
    """ldmatrix.x4: lane 8 m + r gives row r of matrix m; lane 4 r + c gets bytes 4 c of row r."""
    address, registers = block.address(i.operands[1]), names(i.operands[0])
    values = np.zeros((block.threads, len(registers)), np.uint32)
    for first in block.full_warps(mask, i.text):
        rows = address[first : first + 8 * len(registers)]
        data = block.shared.load(rows, 16, block.warp[first : first + len(rows)], i.text)
        words = np.ascontiguousarray(data).view(np.uint32).reshape(len(registers), 32)  # (matrix, 4 r + c)
        values[first : first + 32] = words.T
    for n, register in enumerate(registers):
        block.write(register, values[:, n].copy(), mask)


def multiply(block: Block, i: Instruction, mask: np.ndarray) -> None:
    """mma.sync of int8: m16n8k32, and m8n8k16, which is its upper left quarter."""
    large = "m16n8k32" in i.opcode
    if not large and "m8n8k16" not in i.opcode:
        raise PtxError(f"unknown instruction: {i.text}")
    to, a, b, c = (names(operand) for operand in i.operands)
    read_a, read_b = (np.stack([block.read(r, "u32") for r in part], axis=1) for part in (a, b))
    total = np.stack([block.read(r, "s32") for r in c], axis=1)
    for first in block.full_warps(mask, i.text):
        lanes = slice(first, first + 32)
        left, right = np.zeros((16, 32), np.int32), np.zeros((32, 8), np.int32)
        left[A_ROW[:, : len(a)], A_K[:, : len(a)]] = read_a[lanes].view(np.int8).reshape(32, len(a), 4)
        right[B_K[:, : len(b)], B_COLUMN[:, : len(b)]] = read_b[lanes].view(np.int8).reshape(32, len(b), 4)
        total[lanes] += (left @ right)[D_ROW[:, : len(c)], D_COLUMN[:, : len(c)]]
    for n, register in enumerate(to):
        block.write(register, total[:, n].copy(), mask)
