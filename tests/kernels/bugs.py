"""Seeded bugs: one change of the source each, which the checks must notice in every kernel it touches.

A bug is a text replacement in a copy of `kernels/`, so the product's sources carry nothing for it. Five kinds of bugs
there must be for every kernel, or a reason why it can have none (`matrix`).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from haq_lab.int8.cuda.kernels import Kernels
from haq_lab.int8.cuda.launch import LARGE, MEDIUM, SMALL, Tile
from haq_lab.utils.paths import bundled

from .checks import (
    check_dequant,
    check_grouped,
    check_grouped4,
    check_product,
    check_product4,
    check_quantize,
)

F32 = torch.float32


@dataclass(frozen=True)
class Kernel:
    """A kernel, where it is, and a check whose shape reaches its edges and all of its pipeline.

    `beside`: another kernel of the module that the check launches too.
    """

    module: str
    name: str
    check: Callable[[Kernels], None]
    beside: str | None = None

    @property
    def form(self) -> str:
        """Its name without the type of its floats: the kernels of one form have one source."""
        return self.name.removesuffix("_f32").removesuffix("_f16")


def _quantizes(kind: str) -> Kernel:
    name = f"{kind}_quantize_f32".removeprefix("plain_")
    return Kernel("quantize", name, lambda kernels: check_quantize(kernels, kind, 3, 1040, F32, static=False, seed=0))


def _rotates(kind: str) -> Kernel:
    """Blocks larger than a warp's columns, so that they are finished in shared memory."""
    name = f"{kind}_rotate_quantize_f32".removeprefix("plain_")

    def check(kernels: Kernels) -> None:
        check_quantize(kernels, kind, 8, 512, F32, static=False, seed=0, rotation=512)

    return Kernel("quantize", name, check)


def _rows(tile: Tile) -> int:
    """A whole tile and a ragged one; of the larger tiles a ragged one alone, for they take the interpreter seconds."""
    return tile.rows + 3 if tile == SMALL else tile.rows - 3


def _multiplies(tile: Tile) -> Kernel:
    """More steps of K than there are stages."""

    def check(kernels: Kernels) -> None:
        m, n = _rows(tile), tile.columns - 3
        check_product(kernels, m, n, 400, F32, bias=True, seed=0, tile=tile, split=1)

    return Kernel("gemm", f"gemm_{tile.name}_f32", check)


def _sums(tile: Tile) -> Kernel:
    """The same as raw sums of two parts of K, the second one ragged."""

    def check(kernels: Kernels) -> None:
        m, n = _rows(tile), tile.columns - 3
        check_product(kernels, m, n, 592, F32, bias=False, seed=0, call="accumulate", tile=tile, split=2)

    return Kernel("gemm", f"gemm_{tile.name}_i32", check)


def _groups(tile: Tile) -> Kernel:
    """A few rows of one expert, none of the next, the most of the last."""

    def check(kernels: Kernels) -> None:
        counts = [3, 0, _rows(tile) - 1]
        check_grouped(kernels, counts, tile.columns - 3, 400, F32, bias=True, seed=0, tile=tile)

    return Kernel("grouped", f"grouped_{tile.name}_f32", check)


def _decodes(rows: int) -> Kernel:
    m = rows - (rows > 2)
    return Kernel(
        "gemv",
        f"gemv_{rows}_f32",
        lambda kernels: check_product(kernels, m, 13, 1040, F32, bias=True, seed=0, call="gemv"),
    )


def _multiplies4(tile: Tile) -> Kernel:
    """More steps of K than there are stages, the last one half; groups of several blocks and of one."""

    def check(kernels: Kernels) -> None:
        m, n = _rows(tile), tile.columns - 3
        for group in (128, 32):
            check_product4(kernels, m, n, 416, F32, group=group, bias=True, seed=0, tile=tile)

    return Kernel("gemm4", f"gemm4_{tile.name}_f32", check)


def _groups4(tile: Tile) -> Kernel:
    """As `_groups` and `_multiplies4`."""

    def check(kernels: Kernels) -> None:
        counts = [3, 0, _rows(tile) - 1]
        for group in (128, 32):
            check_grouped4(kernels, counts, tile.columns - 3, 416, F32, group=group, bias=True, seed=0, tile=tile)

    return Kernel("grouped4", f"grouped4_{tile.name}_f32", check)


def _decodes4(rows: int) -> Kernel:
    """More than one step of K, with several groups and with one."""
    m = rows - (rows > 2)

    def check(kernels: Kernels) -> None:
        for group in (128, 800):
            check_product4(kernels, m, 13, 800, F32, group=group, bias=True, seed=0, call="gemv")

    return Kernel("gemv4", f"gemv4_{rows}_f32", check)


GEMM, SPLIT, GROUPED, GEMV = _multiplies(SMALL), _sums(SMALL), _groups(SMALL), _decodes(4)
FINISH = Kernel(
    "gemm",
    "finish_f32",
    lambda kernels: check_product(kernels, 3, 150, 592, F32, bias=True, seed=0, tile=SMALL, split=2),
    beside="gemm_16x64_i32",
)
DEQUANT = Kernel("dequant", "dequant_f16", lambda kernels: check_dequant(kernels, 3, 2192, torch.float16, seed=0))
QUANTIZE, SWIGLU, RMSNORM, LAYERNORM = map(_quantizes, ("plain", "swiglu", "rmsnorm", "layernorm"))
ROTATED = tuple(map(_rotates, ("plain", "swiglu", "rmsnorm", "layernorm")))

LARGER = tuple(make(tile) for make in (_multiplies, _sums, _groups) for tile in (LARGE, MEDIUM))
GEMM4, GROUPED4, GEMV4 = _multiplies4(SMALL), _groups4(SMALL), _decodes4(4)
TILED4 = (GEMM4, GROUPED4, _multiplies4(MEDIUM), _groups4(MEDIUM))
TILED8 = (GEMM, SPLIT, GROUPED, *LARGER)
TILED = (*TILED8, *TILED4)
SMALLEST = (GEMM, GROUPED, GEMM4, GROUPED4)  # where one tile size is enough: nothing in the changed line depends on it
GEMVS = (_decodes(1), _decodes(2), GEMV, _decodes(8))
GEMVS4 = (_decodes4(1), _decodes4(2), GEMV4, _decodes4(8))
ONCE = (QUANTIZE, SWIGLU)
TWICE = (RMSNORM, LAYERNORM)
ROWWISE = (*ONCE, *TWICE)
ALL = (*TILED, FINISH, *GEMVS, *GEMVS4, DEQUANT, *ROWWISE, *ROTATED)
FEW = (GEMM, SPLIT, GROUPED, GEMM4, GROUPED4, FINISH, GEMV, GEMV4, DEQUANT, *ROWWISE, *ROTATED)  # one of each source

READ, OVERWRITE, WAIT, LANES, BOUND = KINDS = (
    "barrier before a read",
    "barrier before an overwrite",
    "wait too weak",
    "lane map",
    "bound off by one",
)
OTHER = "other"


@dataclass(frozen=True)
class Bug:
    """`old` becomes `new` in `kernels/<file>`; `asynchronous`: only where there is cp.async (sm_80 and later)."""

    kind: str
    name: str
    file: str
    old: str
    new: str
    kernels: tuple[Kernel, ...]
    asynchronous: bool = False


STEP_BARRIER = (
    "    __syncthreads();             // ... and everyone's; and everyone is done with the buffer that is filled next\n"
)
STEP_WAIT = "    copy_wait<T::STAGES - 2>();  // this thread's part of the step has landed ...\n"
REFILL = """    int next = step + T::STAGES - 1;
    if (next < steps) copy_step<T>(shared + filling * T::STAGE_BYTES, in, next);
"""
W_LANES = "(lane & 7) + (lane >> 4) * 8, 2 * half + ((lane >> 3) & 1)"
W4_LANES = "(lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1"
EXPERTS = (GROUPED, GROUPED4)
HALVES = (GEMM4, GROUPED4, *GEMVS4)
COPY_BOUND = "row < rows && k < k_end"
GROUPS = "group < groups; group += blockDim.x) {\n    Eight e = unread"

BUGS = (
    Bug(READ, "no barrier before the tile is read", "tile.cuh", STEP_BARRIER, "", TILED),
    Bug(
        OVERWRITE,
        "buffer refilled before the barrier",
        "tile.cuh",
        STEP_WAIT + STEP_BARRIER + REFILL,
        REFILL + STEP_WAIT + STEP_BARRIER,
        TILED,
    ),
    Bug(
        WAIT,
        "wait too weak by one stage",
        "tile.cuh",
        "copy_wait<T::STAGES - 2>",
        "copy_wait<T::STAGES - 1>",
        TILED,
        asynchronous=True,
    ),
    Bug(
        WAIT,
        "no commit of a step",
        "tile.cuh",
        "    copy_commit();  // an empty",
        "    // an empty",
        SMALLEST,
        asynchronous=True,
    ),
    Bug(LANES, "wrong lane map of w", "tile.cuh", W_LANES, "(lane & 15), 2 * half + (lane >> 4)", TILED8),
    Bug(LANES, "wrong lane map of packed w", "tile4.cuh", W4_LANES, "(lane & 15), lane >> 4", TILED4),
    Bug(LANES, "wrong column of a scale", "tile4.cuh", "sw[j][e & 1]", "sw[j][e >> 1]", TILED4),
    Bug(BOUND, "column bound of the scales", "tile4.cuh", "c, last)", "c, last + 1)", TILED4),
    Bug(BOUND, "block beyond K", "tile4.cuh", "    if (sums.left == 0) return;", "    //", (GEMM4, GROUPED4)),
    Bug(OTHER, "sums of the group before", "tile4.cuh", "  clear(sums.acc);\n}\n\n//", "}\n\n//", (GEMM4, GROUPED4)),
    Bug(OTHER, "scales of the group before", "tile4.cuh", "sums.scales += sums.N", "sums.scales += 0", (GEMM4,)),
    Bug(OTHER, "halves of a block exchanged", "four_bit.cuh", "return word & 0xf", "return word << 4 & 0xf", HALVES),
    Bug(LANES, "wrong lane map of the result", "tile.cuh", "+ (lane & 3) * 2;", "+ (lane & 3);", SMALLEST),
    Bug(BOUND, "row bound of the copy", "tile.cuh", COPY_BOUND, "row <= rows && k < k_end", TILED),
    Bug(BOUND, "K bound of the copy", "tile.cuh", COPY_BOUND, "row < rows && k <= k_end", SMALLEST),
    Bug(BOUND, "row bound of the store", "tile.cuh", "if (row < to.rows)", "if (row <= to.rows)", SMALLEST),
    Bug(OTHER, "sums overwritten, not added", "gemm.cu", "gridDim.z > 1", "false", (SPLIT,)),
    Bug(
        LANES,
        "wrong lane in the experts' prefix sum",
        "experts.cuh",
        "lane >= distance",
        "lane > distance",
        EXPERTS,
    ),
    Bug(BOUND, "tile bound of an expert", "experts.cuh", "through > tile", "through >= tile", EXPERTS),
    Bug(BOUND, "last rows of an expert not bounded", "experts.cuh", "min(row + BM, ", "max(row + BM, ", EXPERTS),
    Bug(OTHER, "scales of the first expert", "grouped4.cu", "(long long)found.expert * ((K", "0 * ((K", (GROUPED4,)),
    Bug(LANES, "wrong map of threads", "gemm.cu", "blockIdx.x * 128", "blockIdx.x * 256", (FINISH,)),
    Bug(BOUND, "column bound", "gemm.cu", "column >= N", "column > N", (FINISH,)),
    Bug(LANES, "wrong lane map of the sum", "gemv.cu", "int lanes = 16", "int lanes = 8", GEMVS),
    Bug(BOUND, "K bound", "gemv.cu", "k < K;", "k <= K;", GEMVS),
    Bug(BOUND, "column bound of the read", "gemv.cu", "N - 1) * K", "N) * K", (GEMV,)),
    Bug(BOUND, "column bound of the store", "gemv.cu", "column < N)", "column <= N)", (GEMV,)),
    Bug(BOUND, "row bound of the store", "gemv.cu", "r < M &&", "r <= M &&", (GEMV,)),
    Bug(LANES, "wrong lane of a group's sum", "gemv4.cu", "first_lane + of", "of", GEMVS4),
    Bug(LANES, "sum of two groups", "gemv4.cu", "lanes < sharing", "lanes <= sharing", GEMVS4),
    Bug(BOUND, "K bound", "gemv4.cu", "if (k < K)", "if (k <= K)", GEMVS4),
    Bug(BOUND, "column bound of the read", "gemv4.cu", "min(column, N - 1)", "min(column, N)", (GEMV4,)),
    Bug(BOUND, "column bound of the store", "gemv4.cu", "column < N)", "column <= N)", (GEMV4,)),
    Bug(BOUND, "row bound of the store", "gemv4.cu", "r < M &&", "r <= M &&", (GEMV4,)),
    Bug(OTHER, "scales of the step before", "gemv4.cu", "(LANES / sharing) * N", "(LANES / sharing) * 0", (GEMV4,)),
    Bug(LANES, "wrong map of threads", "dequant.cu", "blockIdx.y * 128", "blockIdx.y * 256", (DEQUANT,)),
    Bug(OTHER, "wrong order of bytes", "dequant.cu", "16 * (i & 1)", "8 * (i & 1)", (DEQUANT,)),
    Bug(BOUND, "K bound", "dequant.cu", "k >= K", "k > K", (DEQUANT,)),
    Bug(
        READ,
        "no barrier before scratch is read",
        "reduce.cuh",
        "  __syncthreads();  // all warps' results are there\n",
        "",
        ROWWISE,
    ),
    Bug(
        OVERWRITE,
        "no barrier before scratch is overwritten",
        "reduce.cuh",
        "  __syncthreads();  // all have read them: the next reduction may overwrite scratch\n",
        "",
        TWICE,
    ),
    Bug(LANES, "wrong lane map of the reduction", "reduce.cuh", "int lanes = 16", "int lanes = 8", ROWWISE),
    Bug(BOUND, "warp bound", "reduce.cuh", "lane < warps", "lane <= warps", TWICE),
    Bug(BOUND, "column bound", "quantize.cu", GROUPS, GROUPS.replace("<", "<=", 1), ROWWISE),
    Bug(
        OVERWRITE,
        "no barrier before a stage in shared memory",
        "quantize.cu",
        "    __syncthreads();  // the stage before is finished\n",
        "",
        ROTATED,
    ),
    Bug(
        READ,
        "no barrier after the last stage",
        "quantize.cu",
        "    }\n  }\n  __syncthreads();\n}",
        "    }\n  }\n}",
        ROTATED,
    ),
    Bug(
        LANES,
        "wrong sign between lanes",
        "quantize.cu",
        "second ? __fsub_rn(other",
        "!second ? __fsub_rn(other",
        ROTATED,
    ),
    Bug(BOUND, "one stage too few", "quantize.cu", "distance < block >> 3", "distance < block >> 4", ROTATED),
    Bug(OTHER, "no scale", "quantize.cu", "if (!large) scale_all", "if (large) scale_all", ROTATED),
    Bug(BOUND, "staged part one group too long", "quantize.cu", "if (group >= staged)", "if (group > staged)", ROWWISE),
)


@dataclass(frozen=True)
class Impossible:
    """A kind of bug that some kernels cannot have."""

    kinds: tuple[str, ...]
    kernels: tuple[Kernel, ...]
    why: str


IMPOSSIBLE = (
    Impossible((READ, OVERWRITE), (FINISH, *GEMVS, *GEMVS4, DEQUANT), "no shared memory, so no barrier"),
    Impossible((OVERWRITE,), ONCE, "one reduction: nothing in shared memory is written twice"),
    Impossible(
        (WAIT,), (FINISH, *GEMVS, *GEMVS4, DEQUANT, *ROWWISE, *ROTATED), "no asynchronous copy, so nothing to wait for"
    ),
)


def seeds(kernel: Kernel, kind: str) -> list[Bug]:
    """The bugs of a kind that are seeded in a kernel."""
    return [bug for bug in BUGS if bug.kind == kind and kernel in bug.kernels]


def reasons(kernel: Kernel, kind: str) -> list[str]:
    """Why a kernel cannot have a kind of bug; none where it can."""
    return [no.why for no in IMPOSSIBLE if kind in no.kinds and kernel in no.kernels]


def matrix() -> str:
    """Kernels by kinds of bugs as a table of Markdown: how many are seeded, or a letter for why there can be none."""
    letters = {no.why: chr(ord("a") + index) for index, no in enumerate(IMPOSSIBLE)}

    def cells(kernel: Kernel) -> str:
        marks = (len(seeds(kernel, kind)) or ", ".join(letters[why] for why in reasons(kernel, kind)) for kind in KINDS)
        return " | ".join(map(str, marks))

    rows = [
        f"| {', '.join(kernel.form for kernel in kernels)} | {marks} |"
        for marks, kernels in groupby(sorted(ALL, key=lambda kernel: (cells(kernel), kernel.form)), key=cells)
    ]
    notes = "; ".join(f"{letter}: {why}" for why, letter in letters.items())
    return "\n".join([f"| kernel | {' | '.join(KINDS)} |", "|---" * (1 + len(KINDS)) + "|", *rows, "", f"{notes}."])


def alone(kernel: Kernel, folder: Path) -> Path:
    """A copy of the sources in `folder` whose module instantiates this one kernel, which builds faster."""
    copy = folder / "kernels"
    shutil.copytree(bundled("kernels"), copy, ignore=shutil.ignore_patterns("host", "cpu"))
    path = copy / f"{kernel.module}.cu"
    text = path.read_text(encoding="utf-8")
    others = rf"^[A-Z_]+_KERNEL\((?!({kernel.name}|{kernel.beside}),)\w+, .*\n"
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
