"""No kernel without its seeded bugs: the matrix of kernels and kinds is whole, and it is the one on the page."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from haq_lab.int8.cuda.launch import MODULES, kernel_names

from .bugs import ALL, BUGS, KINDS, OTHER, Bug, Kernel, matrix, reasons, seeds

PAGE = Path(__file__).parents[2] / "experiments" / "cuda_kernels.md"
FLOATS = ("_f16", "_bf16", "_f32")


def test_every_form_of_every_kernel_is_seeded():
    """Those that differ in the type of their floats alone count as one."""
    names = [name for module in MODULES for name in kernel_names(module)]
    forms = {name.rpartition("_")[0] if name.endswith(FLOATS) else name for name in names}
    assert Counter(kernel.form for kernel in ALL) == Counter(forms)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", ALL, ids=lambda kernel: kernel.name)
def test_every_kernel_has_every_kind_of_bug_or_a_reason(kernel: Kernel, kind: str):
    assert bool(seeds(kernel, kind)) != (len(reasons(kernel, kind)) == 1)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.file}-{bug.name}")
def test_every_bug_has_a_kind_and_a_kernel(bug: Bug):
    assert bug.kind in (*KINDS, OTHER)
    assert bug.kernels
    assert set(bug.kernels) <= set(ALL)


def test_the_page_shows_the_matrix():
    assert matrix() in PAGE.read_text(encoding="utf-8")
