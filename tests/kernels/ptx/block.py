"""The state of one block, its registers, and the loop that runs it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from .memory import GlobalMemory, PtxError, SharedMemory
from .parse import Instruction, Program

TYPES = {
    **{name: np.dtype(np.int8) for name in ("s8",)},
    **{name: np.dtype(np.uint8) for name in ("u8", "b8")},
    **{name: np.dtype(np.int16) for name in ("s16",)},
    **{name: np.dtype(np.uint16) for name in ("u16", "b16")},
    **{name: np.dtype(np.int32) for name in ("s32",)},
    **{name: np.dtype(np.uint32) for name in ("u32", "b32")},
    **{name: np.dtype(np.int64) for name in ("s64",)},
    **{name: np.dtype(np.uint64) for name in ("u64", "b64")},
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
ADDRESS = re.compile(r"\[([^\]+]+?)\s*(?:\+\s*(-?\d+))?\]$")


@dataclass(frozen=True)
class Schedule:
    """`warps`: together, first_ahead or last_ahead; `eager`: asynchronous copies land at once."""

    warps: str = "together"
    eager: bool = False


class Block:
    """One block: an axis of `threads` lanes for everything."""

    def __init__(
        self,
        program: Program,
        memory: GlobalMemory,
        arguments: dict[str, np.generic],
        index: tuple[int, int, int],
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        schedule: Schedule,
    ) -> None:
        self.program, self.memory, self.arguments, self.schedule = program, memory, arguments, schedule
        self.shared = SharedMemory(shared)
        self.threads = threads
        self.warp = np.arange(threads) // 32 + 1
        self.pc = np.zeros(threads, np.int64)
        self.done = np.zeros(threads, bool)
        self.waiting = np.zeros(threads, bool)  # at a barrier
        self.copies: list[list[list[tuple[int, int, int, int]]]] = [[[]] for _ in range(threads)]
        self._prefixes = sorted(program.registers, key=len, reverse=True)
        self._registers: dict[str, np.ndarray] = {}
        self._special = {"%laneid": np.arange(threads) % 32, "%tid.x": np.arange(threads)}
        for axis, at, of, size in zip("xyz", index, grid, (threads, 1, 1), strict=True):
            self._special |= {f"%ctaid.{axis}": np.full(threads, at), f"%nctaid.{axis}": np.full(threads, of)}
            self._special[f"%ntid.{axis}"] = np.full(threads, size)

    def read(self, operand: str, kind: str) -> np.ndarray:
        """A register, special register, constant or the address of shared memory, as `kind`, one value a lane."""
        dtype = TYPES[kind]
        if operand in self._special:
            return self._special[operand].astype(dtype)
        if operand.startswith("%"):
            if operand not in self._registers:
                raise PtxError(f"register {operand} is read before it is written")
            raw = self._registers[operand]
            return raw.astype(UNSIGNED[dtype.itemsize], copy=False).view(dtype)
        if operand[:2] in ("0f", "0F"):
            return np.full(self.threads, int(operand[2:], 16), np.uint32).view(np.float32)
        if operand == "shared":
            return np.zeros(self.threads, dtype)
        bits = int(operand, 0) & ((1 << 8 * dtype.itemsize) - 1)
        return np.full(self.threads, bits, UNSIGNED[dtype.itemsize]).view(dtype)

    def predicate(self, operand: str) -> np.ndarray:
        """A predicate register or constant."""
        if operand in ("0", "1", "-1"):
            return np.full(self.threads, operand != "0")
        return self._registers[operand]

    def write(self, register: str, value: np.ndarray, mask: np.ndarray) -> None:
        """Lanes of `mask` take `value`, widened by its sign where the register is wider."""
        if register == "_":
            return
        if value.dtype != bool:
            size = self.program.registers[next(p for p in self._prefixes if register.startswith(p))]
            if value.dtype.itemsize < size:
                value = value.astype(np.int64 if value.dtype.kind == "i" else np.uint64)
            value = np.ascontiguousarray(value).view(UNSIGNED[value.dtype.itemsize]).astype(UNSIGNED[size], copy=False)
        old = self._registers.get(register)
        if old is None:
            old = np.zeros(self.threads, value.dtype)
        self._registers[register] = np.where(mask, value, old)

    def address(self, operand: str) -> np.ndarray:
        """`[register+offset]` as int64, one a lane."""
        match = ADDRESS.match(operand)
        assert match, f"not an address: {operand}"
        wide = match[1].startswith("%rd")
        return self.read(match[1], "u64" if wide else "u32").astype(np.int64) + int(match[2] or 0)

    def full_warps(self, mask: np.ndarray, text: str) -> np.ndarray:
        """First lanes of the warps in `mask`; all their lanes must be in it."""
        warps = mask.reshape(-1, 32)
        if (warps.any(axis=1) != warps.all(axis=1)).any():
            raise PtxError(f"a warp operation that not all lanes reach: {text}")
        return np.nonzero(warps[:, 0])[0] * 32

    def run(self, execute: dict) -> None:
        """Until every thread has returned. `execute`: functions by an opcode's first part."""
        code = self.program.code
        while not self.done.all():
            live = ~self.done & ~self.waiting
            if not live.any():
                self.waiting[:] = False
                self.shared.barrier()
                continue
            if self.schedule.warps != "together":
                warps = self.warp[live]
                live &= self.warp == (warps.min() if self.schedule.warps == "first_ahead" else warps.max())
            at = int(self.pc[live].min())
            mask = live & (self.pc == at)
            self.pc[mask] = at + 1
            self._step(code[at], mask, execute)
        if any(copy for thread in self.copies for group in thread for copy in group):
            raise PtxError("the block ends with asynchronous copies that nobody waited for")

    def _step(self, instruction: Instruction, mask: np.ndarray, execute: dict) -> None:
        if instruction.guard is not None:
            mask = mask & (self._registers[instruction.guard] ^ instruction.negated)
            if not mask.any():
                return
        function = execute.get(instruction.opcode[0])
        if function is None:
            raise PtxError(f"unknown instruction: {instruction.text}")
        function(self, instruction, mask)
