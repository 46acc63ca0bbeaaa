"""Launch kernels on a GPU through CuPy, on torch's memory and current stream."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from haq_lab.hardware.gpu import query_gpu
from haq_lab.int8.cuda.kernels import Kernels
from haq_lab.int8.cuda.launch import Argument, Launch
from haq_lab.int8.cuda.nvrtc import Compiler, cubin_file, default_compiler
from haq_lab.utils.errors import UserError

OLDEST = 75  # sm_75 (Turing), the first GPUs with int8 tensor cores
DEFAULT_SHARED = 48 * 1024  # bytes of shared memory; a kernel must opt in to use more
INSTALL = "`pip install 'haq-lab[cuda13]'`, or `pip install 'haq-lab[cuda12]' 'torch==2.10.*'` for a driver below 580"


def marshal(args: tuple[Argument, ...]) -> tuple[np.generic, ...]:
    """Convert arguments to the types of the kernel's parameters: addresses, int32 and float32."""

    def one(value: Argument) -> np.generic:
        if value is None:
            return np.uint64(0)
        if isinstance(value, Tensor):
            return np.uint64(value.data_ptr())
        return np.int32(value) if isinstance(value, int) else np.float32(value)

    return tuple(one(value) for value in args)


class StreamHandle:
    """A torch stream in the form that CuPy accepts. Before 2.10, torch's streams lack `__cuda_stream__`.

    Args:
        stream: A stream of torch. It stays alive as long as the handle.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        """Return the version of the CUDA stream protocol and the address of the stream."""
        return 0, self._stream.cuda_stream


class CupyRunner:
    """Launches kernels on one device. Each module is loaded once from its compiled file on disk.

    Args:
        cupy: The imported package.
        device: Index of the CUDA device.
        architecture: Compute capability of the device, such as 86 for 8.6.
        compiler: Compiles modules that are not on disk.
    """

    def __init__(self, cupy: ModuleType, device: int, architecture: int, compiler: Compiler) -> None:
        self._cupy = cupy
        self._device = device
        self._architecture = architecture
        self._compiler = compiler
        self._functions: dict[tuple[str, str], Any] = {}

    def __call__(self, launch: Launch) -> None:
        stream = self._cupy.cuda.Stream.from_external(StreamHandle(torch.cuda.current_stream(self._device)))
        with self._cupy.cuda.Device(self._device), stream:
            function = self._function(launch.module, launch.kernel)
            if launch.shared > max(DEFAULT_SHARED, function.max_dynamic_shared_size_bytes):
                function.max_dynamic_shared_size_bytes = launch.shared
            function(launch.grid, (launch.threads, 1, 1), marshal(launch.args), shared_mem=launch.shared)

    def _function(self, module: str, kernel: str) -> Any:
        if (module, kernel) not in self._functions:
            path = cubin_file(module, self._architecture, self._compiler)
            self._functions[module, kernel] = self._cupy.RawModule(path=str(path)).get_function(kernel)
        return self._functions[module, kernel]


def check_architecture(architecture: int, name: str) -> None:
    """Raise UserError if a GPU has no int8 tensor cores."""
    if architecture < OLDEST:
        raise UserError(
            f"backend=cuda needs compute capability 7.5 (Turing) or later, but {name} has "
            f"{architecture // 10}.{architecture % 10}. Choose backend=cpu or backend=reference."
        )


def kernels(device: int | None) -> Kernels:
    """Return the kernels for one device.

    Args:
        device: Index of the CUDA device; None for torch's current one.

    Raises:
        UserError: There is no GPU, the GPU is too old, or CuPy or NVRTC is not installed.
    """
    if not torch.cuda.is_available():
        raise UserError("backend=cuda needs an NVIDIA GPU, and torch finds none. Choose backend=cpu.")
    if importlib.util.find_spec("cupy") is None:
        raise UserError(f"backend=cuda needs CuPy, which is not installed. Run {INSTALL}.")
    import cupy

    index = torch.cuda.current_device() if device is None else device
    if index >= (count := torch.cuda.device_count()):
        raise UserError(f"backend.device: 'cuda:{index}' does not exist. Choose cuda:0 to cuda:{count - 1}, or cuda.")
    properties = torch.cuda.get_device_properties(index)
    architecture = 10 * properties.major + properties.minor
    check_architecture(architecture, properties.name)
    compiler = _compiler(cupy)
    return Kernels(
        CupyRunner(cupy, index, architecture, compiler),
        architecture=architecture,
        multiprocessors=properties.multi_processor_count,
        shared_limit=cupy.cuda.Device(index).attributes["MaxSharedMemoryPerBlockOptin"],
    )


def _compiler(cupy: ModuleType) -> Compiler:
    """Return the NVRTC of the CUDA version that CuPy is built for, if it is installed."""
    return default_compiler(cupy.cuda.runtime.runtimeGetVersion() // 1000)


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """Describe a GPU for a run's record.

    Args:
        device: The GPU.

    Returns:
        Its name, the fields of `haq_lab.hardware.gpu.query_gpu`, and the versions of torch's CUDA, CuPy and NVRTC.
    """
    import cupy

    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        **query_gpu(f"GPU-{properties.uuid}"),
        "cuda": torch.version.cuda,
        "cupy": cupy.__version__,
        "nvrtc": ".".join(map(str, _compiler(cupy).version)),
    }
