"""Global memory with guarded buffers, and shared memory that notices races."""

from __future__ import annotations

import numpy as np

POISON = 0xCD
BASE = 1 << 20  # global addresses begin here, so that no shared address is one by accident
GUARD = 256
MANY = -1  # more than one warp


class PtxError(Exception):
    """The program did what CUDA forbids or leaves undefined."""


class GlobalMemory:
    """Buffers in one array, each with forbidden bytes around it."""

    def __init__(self, size: int) -> None:
        self._bytes = np.full(size, POISON, np.uint8)
        self._allowed = np.zeros(size, bool)
        self._top = GUARD

    def put(self, data: np.ndarray) -> int:
        """Copy bytes in; their address."""
        start = self._top
        self._bytes[start : start + data.size] = data
        self._allowed[start : start + data.size] = True
        self._top = -(-(start + data.size + GUARD) // GUARD) * GUARD
        return BASE + start

    def get(self, address: int, size: int) -> np.ndarray:
        """Bytes of a buffer."""
        return self._bytes[address - BASE : address - BASE + size]

    def load(self, address: np.ndarray, size: int, text: str) -> np.ndarray:
        """(lanes, size) bytes at the lanes' addresses."""
        return self._bytes[self._index(address, size, text)]

    def store(self, address: np.ndarray, data: np.ndarray, text: str) -> None:
        """Write (lanes, size) bytes."""
        self._bytes[self._index(address, data.shape[1], text)] = data

    def _index(self, address: np.ndarray, size: int, text: str) -> np.ndarray:
        if (address % size).any():
            raise PtxError(f"misaligned access: {text}")
        index = (address - BASE)[:, None] + np.arange(size)
        if index.size and (index.min() < 0 or index.max() >= self._bytes.size or not self._allowed[index].all()):
            raise PtxError(f"outside every buffer: {text}")
        return index


class SharedMemory:
    """A block's shared memory; per byte, who wrote and who read it since the last barrier.

    Two warps that touch a byte between two barriers, one of them writing, are a race, whatever order they ran in here.
    """

    def __init__(self, size: int) -> None:
        self._bytes = np.full(size, POISON, np.uint8)
        self._written = np.zeros(size, bool)
        self._owed = np.zeros(size, np.int32)  # asynchronous copies under way
        self._writer = np.zeros(size, np.int32)
        self._reader = np.zeros(size, np.int32)

    def barrier(self) -> None:
        """Forget who touched what."""
        self._writer[:] = 0
        self._reader[:] = 0

    def load(self, address: np.ndarray, size: int, warp: np.ndarray, text: str) -> np.ndarray:
        """(lanes, size) bytes; `warp`: each lane's warp, from 1."""
        index = self._index(address, size, text)
        if (self._owed[index] > 0).any():
            raise PtxError(f"read of bytes that an asynchronous copy still owes: {text}")
        if not self._written[index].all():
            raise PtxError(f"read of bytes never written: {text}")
        warps = np.broadcast_to(warp[:, None], index.shape)
        if ((self._writer[index] != 0) & (self._writer[index] != warps)).any():
            raise PtxError(f"race: read of what another warp wrote since the last barrier: {text}")
        others = (self._reader[index] != 0) & (self._reader[index] != warps)
        self._reader[index] = np.where(others, MANY, warps)
        return self._bytes[index]

    def store(self, address: np.ndarray, data: np.ndarray, warp: np.ndarray, text: str) -> None:
        """Write (lanes, size) bytes."""
        index = self._claim(address, data.shape[1], warp, text)
        self._bytes[index] = data
        self._written[index] = True

    def begin_copy(self, address: np.ndarray, size: int, warp: np.ndarray, text: str) -> None:
        """An asynchronous copy may write from now on."""
        self._owed[self._claim(address, size, warp, text)] += 1

    def end_copy(self, address: np.ndarray, data: np.ndarray, warp: np.ndarray, text: str) -> None:
        """Its bytes have landed."""
        self._owed[self._index(address, data.shape[1], text)] -= 1
        self.store(address, data, warp, text)

    def _claim(self, address: np.ndarray, size: int, warp: np.ndarray, text: str) -> np.ndarray:
        index = self._index(address, size, text)
        for touched in (self._writer[index], self._reader[index]):
            if ((touched != 0) & (touched != warp[:, None])).any():
                raise PtxError(f"race: write over what another warp touched since the last barrier: {text}")
        self._writer[index] = warp[:, None]
        return index

    def _index(self, address: np.ndarray, size: int, text: str) -> np.ndarray:
        if (address % size).any():
            raise PtxError(f"misaligned access: {text}")
        index = address[:, None] + np.arange(size)
        if index.size and (index.min() < 0 or index.max() >= self._bytes.size):
            raise PtxError(f"outside shared memory: {text}")
        return index
