"""Seeded bugs: one change of the source each, which the checks must notice in every kernel it touches.

A bug is a text replacement in a copy of `kernels/`, so the product's sources carry nothing for it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from haq_lab.int8.cuda import Kernels
from haq_lab.int8.launch import SMALL
from haq_lab.int8.sources import kernel_folder

from .checks import check_dequant, check_grouped, check_product, check_quantize

F32 = torch.float32


@dataclass(frozen=True)
class Kernel:
    """A kernel, where it is, and a check whose shape reaches its edges and all of its pipeline."""

    module: str
    name: str
    check: Callable[[Kernels], None]


def _quantizes(kind: str) -> Callable[[Kernels], None]:
    return lambda kernels: check_quantize(kernels, kind, 3, 1040, F32, static=False, seed=0)


GEMM = Kernel(
    "gemm",
    "gemm_16x64_f32",
    lambda kernels: check_product(kernels, 19, 61, 400, F32, bias=True, seed=0, tile=SMALL, split=1),
)
SPLIT = Kernel(
    "gemm",
    "gemm_16x64_i32",
    lambda kernels: check_product(
        kernels, 19, 61, 592, F32, bias=False, seed=0, call="accumulate", tile=SMALL, split=2
    ),
)
GROUPED = Kernel(
    "grouped",
    "grouped_16x64_f32",
    lambda kernels: check_grouped(kernels, [3, 0, 18], 61, 400, F32, bias=True, seed=0, tile=SMALL),
)
GEMV = Kernel(
    "gemv",
    "gemv_4_f32",
    lambda kernels: check_product(kernels, 3, 13, 1040, F32, bias=True, seed=0, call="gemv"),
)
DEQUANT = Kernel("dequant", "dequant_f16", lambda kernels: check_dequant(kernels, 3, 208, torch.float16, seed=0))
QUANTIZE = Kernel("quantize", "quantize_f32", _quantizes("plain"))
SWIGLU = Kernel("quantize", "swiglu_quantize_f32", _quantizes("swiglu"))
RMSNORM = Kernel("quantize", "rmsnorm_quantize_f32", _quantizes("rmsnorm"))
LAYERNORM = Kernel("quantize", "layernorm_quantize_f32", _quantizes("layernorm"))

TILED = (GEMM, GROUPED)
ROWWISE = (QUANTIZE, SWIGLU, RMSNORM, LAYERNORM)
ALL = (*TILED, SPLIT, GEMV, DEQUANT, *ROWWISE)


@dataclass(frozen=True)
class Bug:
    """`old` becomes `new` in `kernels/<file>`; `asynchronous`: only where there is cp.async (sm_80 and later)."""

    name: str
    file: str
    old: str
    new: str
    kernels: tuple[Kernel, ...]
    asynchronous: bool = False


STEP_BARRIER = (
    "    __syncthreads();             // ... and everyone's; and everyone is done with the buffer that is filled next\n"
)
WAIT = "    copy_wait<T::STAGES - 2>();  // this thread's part of the step has landed ...\n"
REFILL = """    int next = step + T::STAGES - 1;
    if (next < steps) copy_step<T>(shared + filling * T::STAGE_BYTES, in, next);
"""

BUGS = (
    Bug("no barrier before the tile is read", "tile.cuh", STEP_BARRIER, "", TILED),
    Bug(
        "buffer refilled before the barrier",
        "tile.cuh",
        WAIT + STEP_BARRIER + REFILL,
        REFILL + WAIT + STEP_BARRIER,
        TILED,
    ),
    Bug(
        "wait too weak by one stage",
        "tile.cuh",
        "copy_wait<T::STAGES - 2>",
        "copy_wait<T::STAGES - 1>",
        TILED,
        True,
    ),
    Bug("no commit of a step", "tile.cuh", "    copy_commit();  // an empty", "    // an empty", TILED, True),
    Bug(
        "wrong lane map of w",
        "tile.cuh",
        "(lane & 7) + (lane >> 4) * 8, 2 * half + ((lane >> 3) & 1)",
        "(lane & 15), 2 * half + (lane >> 4)",
        TILED,
    ),
    Bug("wrong lane map of the result", "tile.cuh", "+ (lane & 3) * 2;", "+ (lane & 3);", TILED),
    Bug(
        "row bound of the copy off by one",
        "tile.cuh",
        "row < rows && k < k_end",
        "row <= rows && k < k_end",
        TILED,
    ),
    Bug(
        "K bound of the copy off by one",
        "tile.cuh",
        "row < rows && k < k_end",
        "row < rows && k <= k_end",
        TILED,
    ),
    Bug("row bound of the store off by one", "tile.cuh", "if (row < to.rows)", "if (row <= to.rows)", TILED),
    Bug("sums overwritten, not added", "gemm.cu", "gridDim.z > 1", "false", (SPLIT,)),
    Bug(
        "wrong lane in the experts' prefix sum",
        "grouped.cu",
        "lane >= distance",
        "lane > distance",
        (GROUPED,),
    ),
    Bug("tile bound of an expert off by one", "grouped.cu", "through > tile", "through >= tile", (GROUPED,)),
    Bug("last rows of an expert not bounded", "grouped.cu", "min(row + BM, ", "max(row + BM, ", (GROUPED,)),
    Bug("wrong lane map of the sum", "gemv.cu", "int lanes = 16", "int lanes = 8", (GEMV,)),
    Bug("K bound off by one", "gemv.cu", "k < K;", "k <= K;", (GEMV,)),
    Bug("column bound of the read off by one", "gemv.cu", "N - 1) * K", "N) * K", (GEMV,)),
    Bug("column bound of the store off by one", "gemv.cu", "column < N)", "column <= N)", (GEMV,)),
    Bug("row bound of the store off by one", "gemv.cu", "r < M &&", "r <= M &&", (GEMV,)),
    Bug("wrong order of bytes", "dequant.cu", "16 * (i & 1)", "8 * (i & 1)", (DEQUANT,)),
    Bug("K bound off by one", "dequant.cu", "k >= K", "k > K", (DEQUANT,)),
    Bug(
        "no barrier before scratch is read",
        "reduce.cuh",
        "  __syncthreads();  // all warps' results are there\n",
        "",
        ROWWISE,
    ),
    Bug(
        "no barrier before scratch is overwritten",
        "reduce.cuh",
        "  __syncthreads();  // all have read them: the next reduction may overwrite scratch\n",
        "",
        (RMSNORM, LAYERNORM),
    ),
    Bug("wrong lane map of the reduction", "reduce.cuh", "int lanes = 16", "int lanes = 8", ROWWISE),
    Bug("warp bound off by one", "reduce.cuh", "lane < warps", "lane <= warps", (RMSNORM, LAYERNORM)),
    Bug(
        "column bound off by one",
        "quantize.cu",
        "group < groups; group += blockDim.x) {\n    Eight e = unread",
        "group <= groups; group += blockDim.x) {\n    Eight e = unread",
        ROWWISE,
    ),
    Bug(
        "staged part one group too long",
        "quantize.cu",
        "if (group >= staged)",
        "if (group > staged)",
        ROWWISE,
    ),
)


def alone(kernel: Kernel, folder: Path) -> Path:
    """A copy of the sources in `folder` whose module instantiates this one kernel, which builds faster."""
    copy = folder / "kernels"
    shutil.copytree(kernel_folder(), copy, ignore=shutil.ignore_patterns("host", "cpu"))
    path = copy / f"{kernel.module}.cu"
    text = path.read_text(encoding="utf-8")
    others = rf"^[A-Z_]+_KERNEL\((?!{kernel.name},)\w+, .*\n"
    path.write_text(re.sub(others, "", text, flags=re.MULTILINE), encoding="utf-8")
    return copy


def seeded(bug: Bug, kernel: Kernel, folder: Path) -> Path:
    """The same with the bug in it."""
    copy = alone(kernel, folder)
    path = copy / bug.file
    text = path.read_text(encoding="utf-8")
    assert text.count(bug.old) == 1, f"'{bug.old}' occurs {text.count(bug.old)} times in {bug.file}: update the bug"
    path.write_text(text.replace(bug.old, bug.new), encoding="utf-8")
    return copy
