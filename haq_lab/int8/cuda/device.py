"""Create the CUDA kernels of a device once per process."""

from __future__ import annotations

from functools import cache

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
