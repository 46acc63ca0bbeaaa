"""Implement `backend=cuda` with the kernels of haq_lab.int8.cuda."""

from __future__ import annotations

import torch
from torch import Tensor

from haq_lab.int8.backend import Backend, PackedLinear
from haq_lab.int8.cuda import device as cuda_device
from haq_lab.int8.cuda.gpu_lock import lock_gpu
from haq_lab.int8.cuda.kernels import GEMV_ROWS, K_MULTIPLE, Kernels, padded
from haq_lab.int8.numerics import ActivationScheme, quantize_activations, scale_of
from haq_lab.int8.sequences import Sequences
from haq_lab.utils.errors import UserError


class CudaBackend(Backend):
    """Backend on an NVIDIA GPU. It quantises, multiplies and scales in two launches.

    Weights are on the GPU. Calibration and evaluation keep hidden states on the CPU, so inputs are copied to the GPU
    and outputs back. A deployed model is completely on the GPU and copies nothing.

    Args:
        device: `cuda` for torch's current device, or a number such as `cuda:1`.
        kernels: The kernels to use; those of the device if None.
        share: Whether other processes may use the GPU at the same time. If False, the backend takes the first free
            GPU and waits if there is none.

    Raises:
        UserError: There is no GPU, the GPU is too old, or CuPy is not installed.
    """

    name = "cuda"
    uses_gpu = True

    def __init__(self, device: str = "cuda", kernels: Kernels | None = None, share: bool = False) -> None:
        self.device = _device(device) if share else lock_gpu(_device(device))
        self.fused_kernels = self._kernels = kernels or cuda_device.kernels(self.device.index)

    @property
    def kernels(self) -> str:
        return "cuda"

    def pack(self, levels: Tensor) -> Tensor:
        return padded(levels.to(self.device))

    def unpack(self, packed: Tensor, rows: int, columns: int) -> Tensor:
        return packed[:, :columns]

    def dequantize(self, packed: Tensor, weight_scale: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        return self._kernels.dequant(packed, weight_scale, dtype)[:, :columns]

    def accumulate(self, qx: Tensor, levels: Tensor) -> Tensor:
        return self._kernels.accumulate(padded(qx), padded(levels))

    def quantize(
        self, x: Tensor, scheme: ActivationScheme, static_scale: Tensor | None, sequences: Sequences | None = None
    ) -> tuple[Tensor, Tensor]:
        """Quantise as the base class does, with zero columns added up to a multiple of 16."""
        x = padded(x.to(self.device).contiguous())
        if scheme == "token":
            return self._kernels.quantize_rows(x)
        if sequences is not None:
            levels, row_scale = quantize_activations(x, scheme, static_scale, sequences)
            return levels, row_scale.flatten()
        # One scale for all rows: from this tensor's maximum or from calibration.
        scale = scale_of(x.float().abs().amax()) if scheme == "tensor" else static_scale
        assert scale is not None, "The static scheme needs a scale from calibration."
        return self._kernels.quantize_static(x, self._as_kernel_scale(scale))

    def swiglu_quantize(
        self,
        gate: Tensor,
        up: Tensor,
        scheme: ActivationScheme,
        static_scale: Tensor | None,
        sequences: Sequences | None = None,
    ) -> tuple[Tensor, Tensor]:
        if scheme == "tensor" or gate.shape[1] % K_MULTIPLE:
            return super().swiglu_quantize(gate, up, scheme, static_scale, sequences)
        scale = None if static_scale is None else self._as_kernel_scale(static_scale)
        return self._kernels.swiglu_quantize(torch.cat([gate, up], dim=1), scale)

    def _as_kernel_scale(self, scale: Tensor) -> Tensor:
        """Convert one scale for all rows to float32 (1,) on the device."""
        return scale.to(self.device, torch.float32).reshape(1)

    def product(self, qx: Tensor, row_scale: Tensor, weights: PackedLinear, dtype: torch.dtype) -> Tensor:
        product = self._kernels.gemv if len(qx) <= GEMV_ROWS else self._kernels.gemm
        bias = None if weights.bias is None else weights.bias.to(self.device, torch.float32)
        return product(qx, weights.packed, row_scale, weights.scale.to(self.device), bias, dtype)


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"backend.device: '{name}' is not a device. Choose cuda, or cuda:1 for the second GPU."
        ) from error
