"""Runs launches on the interpreter: a `Run` for haq_lab.int8.cuda.kernels.Kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from haq_lab.int8.cuda.launch import Launch

from . import arithmetic, movement, warp
from .block import Block, Schedule
from .memory import GlobalMemory
from .parse import Program

PARAMETER_TYPES = {
    "u64": np.uint64,
    "b64": np.uint64,
    "u32": np.int32,
    "b32": np.int32,
    "s32": np.int32,
    "f32": np.float32,
}
EXECUTE: dict[str, Callable[[Block, object, np.ndarray], None]] = {
    **dict.fromkeys(arithmetic.NAMES, arithmetic.calculate),
    "bra": movement.branch,
    "ret": movement.leave,
    "bar": movement.barrier,
    "ld": movement.load,
    "st": movement.store,
    "atom": movement.atomic,
    "red": movement.atomic,
    "cp": movement.asynchronous,
    "shfl": warp.shuffle,
    "vote": warp.vote,
    "ldmatrix": warp.load_matrix,
    "mma": warp.multiply,
}


@dataclass
class PtxRunner:
    """Executes launches from parsed PTX.

    Args:
        programs: Gives a module's kernels by name.
        schedule: Of warps and copies; may be changed between launches.
    """

    programs: Callable[[str], dict[str, Program]]
    schedule: Schedule = field(default_factory=Schedule)

    def __call__(self, launch: Launch) -> None:
        program = self.programs(launch.module)[launch.kernel]
        assert len(program.parameters) == len(launch.args)
        tensors = [argument for argument in launch.args if isinstance(argument, Tensor)]
        memory = GlobalMemory(sum(span(tensor).numel() + 1024 for tensor in tensors) + 1024)
        arguments, placed = {}, []
        for (kind, name), value in zip(program.parameters, launch.args, strict=True):
            if isinstance(value, Tensor):
                address = memory.put(span(value).numpy())
                placed.append((value, address))
                arguments[name] = np.uint64(address)
            else:
                arguments[name] = PARAMETER_TYPES[kind](0 if value is None else value)
        gx, gy, gz = launch.grid
        for index in ((x, y, z) for z in range(gz) for y in range(gy) for x in range(gx)):
            block = Block(program, memory, arguments, index, launch.grid, launch.threads, launch.shared, self.schedule)
            block.run(EXECUTE)
        for tensor, address in placed:
            memory_of = span(tensor)
            memory_of.copy_(torch.from_numpy(memory.get(address, memory_of.numel()).copy()))


def span(tensor: Tensor) -> Tensor:
    """The bytes from a tensor's first element to past its last, as a view."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start, size = tensor.storage_offset() * tensor.element_size(), (last + 1) * tensor.element_size()
    return torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())[start : start + size]
