"""Implement `backend=cuda` with the kernels of haq_lab.int8.cuda."""

from __future__ import annotations

import weakref
from typing import Annotated, Any

import torch
from pydantic import Field, validate_call
from torch import Tensor

from haq_lab.int8.backend import Backend, PackedLinear
from haq_lab.int8.cuda import device as cuda_device
from haq_lab.int8.cuda.four_bit import BLOCK, pack_blocks, unpack_blocks
from haq_lab.int8.cuda.gpu_lock import GpuLock
from haq_lab.int8.cuda.kernels import Kernels
from haq_lab.int8.cuda.launch import GEMV_ROWS, K_MULTIPLE, TYPE_NAMES, aligned, padded
from haq_lab.int8.numerics import ActivationScheme, quantize_activations, scale_of
from haq_lab.int8.rotation import NO_ROTATION, rotate
from haq_lab.int8.sequences import Sequences
from haq_lab.int8.weight_format import INT8, WeightFormat
from haq_lab.utils.errors import UserError


class CudaBackend(Backend):
    """Backend on an NVIDIA GPU. It quantises, multiplies and scales in two launches.

    Weights are on the GPU. Calibration and evaluation keep hidden states on the CPU, so inputs are copied to the GPU
    and outputs back. A deployed model is completely on the GPU and copies nothing.

    Args:
        device: A GPU such as `cuda:1`. `cuda` is the first free GPU, or torch's current one if `share` is True.
        kernels: The kernels to use; those of the device if None.
        share: Whether other processes may use the GPU at the same time. If False, the backend reserves the GPU until
            `close`.
        lock_timeout: Seconds to wait while other jobs use the GPU. None waits without a limit.

    Raises:
        UserError: There is no GPU, the GPU is too old, CuPy is not installed, or other jobs use the GPU too long.
    """

    name = "cuda"
    uses_gpu = True

    @validate_call(config={"arbitrary_types_allowed": True})
    def __init__(
        self,
        device: str = "cuda",
        kernels: Kernels | None = None,
        share: bool = False,
        lock_timeout: Annotated[float, Field(ge=0)] | None = None,
    ) -> None:
        self.device = _parse_device(device, simulated=kernels is not None)
        self._lock = None if share else GpuLock(self.device, lock_timeout)
        if self._lock is not None:
            self.device = self._lock.device
            # Also without `close`, for example if a loaded model is deleted. At exit the system releases the lock.
            weakref.finalize(self, self._lock.release).atexit = False
        try:
            self.fused_kernels = self._kernels = kernels or cuda_device.kernels(self.device.index)
        except BaseException:
            self.close()
            raise
        if self.device == torch.device("cuda"):
            self.device = torch.device("cuda", torch.cuda.current_device())

    def close(self) -> None:
        """Release the GPU for other jobs. This process, such as a worker of a sweep, may live on."""
        try:
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()  # otherwise torch keeps the memory of freed tensors for this process
        finally:  # a kernel's error makes every later CUDA call fail
            if self._lock is not None:
                self._lock.release()

    @property
    def kernels(self) -> str:
        return "cuda"

    def describe_gpu(self) -> dict[str, Any] | None:
        return cuda_device.describe_gpu(self.device) if self.device.type == "cuda" else None

    def pack(self, levels: Tensor, format: WeightFormat = INT8) -> Tensor:
        levels = levels.to(self.device)
        return pack_blocks(levels) if format.bits == 4 else padded(levels)

    def unpack(self, packed: Tensor, rows: int, columns: int, format: WeightFormat = INT8) -> Tensor:
        return unpack_blocks(packed, columns) if format.bits == 4 else packed[:, :columns]

    def dequantize(
        self,
        packed: Tensor,
        weight_scale: Tensor,
        columns: int,
        dtype: torch.dtype,
        format: WeightFormat = INT8,
    ) -> Tensor:
        if format.bits == 4:
            return super().dequantize(packed, weight_scale, columns, dtype, format)
        return self._kernels.dequant(aligned(packed), aligned(weight_scale), dtype)[:, :columns]

    def accumulate(self, qx: Tensor, levels: Tensor) -> Tensor:
        return self._kernels.accumulate(padded(qx), padded(levels))

    def quantize(
        self,
        x: Tensor,
        scheme: ActivationScheme,
        static_scale: Tensor | None,
        sequences: Sequences | None = None,
        rotation: int = NO_ROTATION,
    ) -> tuple[Tensor, Tensor]:
        """Quantise as the base class does, with zero columns added up to a multiple of 16."""
        x = padded(x.to(self.device, x.dtype if x.dtype in TYPE_NAMES else torch.float32))
        if scheme == "tensor" or not self._kernels.can_rotate(x.shape[1], rotation):
            x, rotation = rotate(x, rotation), NO_ROTATION
        if scheme == "token":
            return self._kernels.quantize_rows(x, rotation)
        if sequences is not None:
            levels, row_scale = quantize_activations(x, scheme, static_scale, sequences)
            return levels, row_scale.flatten()
        if scheme == "tensor":
            static_scale = scale_of(x.float().abs().amax()) if x.numel() else torch.ones(1)
        assert static_scale is not None, "The static scheme needs a scale from calibration."
        return self._kernels.quantize_static(x, self._as_kernel_scale(static_scale), rotation)

    def swiglu_quantize(
        self,
        gate: Tensor,
        up: Tensor,
        scheme: ActivationScheme,
        static_scale: Tensor | None,
        sequences: Sequences | None = None,
        rotation: int = NO_ROTATION,
    ) -> tuple[Tensor, Tensor]:
        k = gate.shape[1]
        if scheme == "tensor" or k % K_MULTIPLE or not self._kernels.can_rotate(k, rotation):
            return super().swiglu_quantize(gate, up, scheme, static_scale, sequences, rotation)
        scale = None if static_scale is None else self._as_kernel_scale(static_scale)
        return self._kernels.swiglu_quantize(torch.cat([gate, up], dim=1), scale, rotation)

    def _as_kernel_scale(self, scale: Tensor) -> Tensor:
        """Convert one scale for all rows to float32 (1,) on the device."""
        return aligned(scale.to(self.device, torch.float32).reshape(1))

    def product(self, qx: Tensor, row_scale: Tensor, weights: PackedLinear, dtype: torch.dtype) -> Tensor:
        packed, scale = aligned(weights.packed), aligned(weights.scale.to(self.device))
        bias = None if weights.bias is None else aligned(weights.bias.to(self.device, torch.float32))
        # The kernels have no float64 output. Rounded to float32 first, it has the reference's bits.
        out_dtype, row_scale = dtype if dtype in TYPE_NAMES else torch.float32, aligned(row_scale)
        few = len(qx) <= GEMV_ROWS
        if weights.format.bits == 8:
            product = self._kernels.gemv if few else self._kernels.gemm
            return product(aligned(qx), packed, row_scale, scale, bias, out_dtype).to(dtype)
        rows, scale = padded(qx, BLOCK), scale.view(-1, weights.rows)
        product4 = self._kernels.four_bit.gemv if few else self._kernels.four_bit.gemm
        group = weights.format.group or rows.shape[1]
        return product4(rows, packed, row_scale, scale, bias, out_dtype, group).to(dtype)


def _parse_device(name: str, simulated: bool) -> torch.device:
    """Return the device of a name. Simulated kernels run on any device of torch."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"backend.device: '{name}' is not a device. Choose cuda, or cuda:1 for the second GPU."
        ) from error
    if device.type != "cuda" and not simulated:
        raise UserError(f"backend.device: '{name}' is not a GPU. Choose cuda, or cuda:1 for the second GPU.")
    return device
