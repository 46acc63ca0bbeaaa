"""Read a GPU's driver, clocks and power limit, and find out which attention kernel torch uses on it."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from typing import Any

import torch
from torch.nn.attention import SDPBackend

# Fields of a record, and the names by which `nvidia-smi --query-gpu` reports them.
FIELDS = {
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "sm_clock_max_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "memory_clock_max_mhz": "clocks.max.mem",
    "power_limit_w": "power.limit",
}
TIMEOUT = 10  # seconds; nvidia-smi can hang if the driver has failed


def query_gpu(uuid: str) -> dict[str, Any]:
    """Ask `nvidia-smi` about a GPU.

    Args:
        uuid: The GPU's UUID, such as `GPU-6d2c...`.

    Returns:
        A value for each name in `FIELDS`: text, MHz or watts. A value is None if `nvidia-smi` cannot be run, or if the
        GPU does not report it. The clocks are those of the moment of the call.
    """
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(FIELDS.values())}",
        "--format=csv,noheader,nounits",
        f"--id={uuid}",
    ]
    answers: list[str] = []
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True)
        answers = [answer.strip() for answer in done.stdout.strip().split(",")]
    if len(answers) != len(FIELDS):
        return dict.fromkeys(FIELDS)
    return {field: _parse(answer, field) for field, answer in zip(FIELDS, answers, strict=True)}


def _parse(answer: str, field: str) -> str | float | None:
    """Return the driver's version as text and other fields as numbers. None for an answer such as `[N/A]`."""
    if field == "driver":
        return answer
    try:
        return float(answer)
    except ValueError:
        return None


def sdpa_kernel(device: torch.device, dtype: torch.dtype, heads: int, head_size: int) -> str:
    """Return the kernel that torch chooses for causal attention, such as `EFFICIENT_ATTENTION`.

    Args:
        device: Device of the attention.
        dtype: Type of queries, keys and values.
        heads: Number of heads.
        head_size: Size of a head.
    """
    x = torch.empty(1, heads, 16, head_size, device=device, dtype=dtype)
    return SDPBackend(torch._fused_sdp_choice(x, x, x, is_causal=True)).name
