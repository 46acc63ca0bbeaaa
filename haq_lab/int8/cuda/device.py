"""Return the CUDA kernels' calls for one device."""

from __future__ import annotations

from functools import cache

from haq_lab.int8.cuda.kernels import Kernels


@cache
def kernels(device: int | None = None) -> Kernels:
    """The calls for CUDA device `device`, torch's current one if None.

    Raises:
        UserError: No GPU, no CuPy, no NVRTC, or a GPU older than sm_75: one message that says which.
    """
    from haq_lab.int8.cuda import cupy_runner

    return cupy_runner.kernels(device)
