"""Report the library versions and the machine that results depend on."""

from __future__ import annotations

import platform
from typing import Any

import safetensors
import torch
import transformers


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that compute results and write files."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
    }


def machine() -> dict[str, Any]:
    """Return the CPU capability and thread count. The last bits of floating-point sums depend on them."""
    return {"cpu": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
