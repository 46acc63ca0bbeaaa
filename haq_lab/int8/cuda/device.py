"""Create the CUDA kernels of a device once per process, and describe the device. CuPy is imported on the first call."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from haq_lab.int8.cuda.kernels import Kernels


@cache
def kernels(device: int | None = None) -> Kernels:
    """Return the kernels of one CUDA device.

    Args:
        device: Index of the CUDA device; None for torch's current one.

    Raises:
        UserError: There is no GPU, the GPU is older than sm_75, or CuPy or NVRTC is not installed.
    """
    from haq_lab.int8.cuda import cupy_runner

    return cupy_runner.kernels(device)


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """Describe a GPU for a run's record, as `cupy_runner.describe_gpu`."""
    from haq_lab.int8.cuda import cupy_runner

    return cupy_runner.describe_gpu(device)
