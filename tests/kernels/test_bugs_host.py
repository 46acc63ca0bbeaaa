"""Every seeded bug is noticed when the mutated source runs on the host layer, and the true source is not accused."""

from __future__ import annotations

from pathlib import Path

import pytest

from haq_lab.int8.cuda.kernels import Kernels

from .bugs import ALL, BUGS, GEMM, Bug, Kernel, alone, seeded
from .host import HostError, HostRunner, Schedule, compiler

# Each alone is blind to something: threads in step never overwrite too early, and copies that land at once never land
# too late.
REVEALING = (
    Schedule("first_warp_ahead", "when_waited_for"),
    Schedule("last_warp_ahead", "at_issue"),
    Schedule("first_warp_ahead", "at_issue"),
    Schedule("last_warp_ahead", "when_waited_for"),
)
# The staged part is bounded only where a row does not fit: 100 groups of eight columns.
SHARED_LIMIT = 128 + 32 * 100

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler (g++)")


def complaint(kernel: Kernel, architecture: int, folder: Path) -> str | None:
    """What is wrong with a kernel by any of the revealing schedules, or None."""
    runner = HostRunner(architecture=architecture, folder=folder)
    launcher = Kernels(runner, architecture=architecture, multiprocessors=4, shared_limit=SHARED_LIMIT)
    try:
        for schedule in REVEALING:
            runner.schedule = schedule
            kernel.check(launcher)
    except (HostError, AssertionError) as error:
        return str(error)
    finally:
        runner.close()
    return None


# Every kernel as for sm_80; where copies are synchronous (sm_75), what differs is in the product alone.
CASES = [(80, kernel) for kernel in ALL] + [(75, GEMM)]


@pytest.mark.parametrize(
    ("architecture", "kernel"), [pytest.param(*case, id=f"sm_{case[0]}-{case[1].name}") for case in CASES]
)
def test_the_true_source_passes(architecture: int, kernel: Kernel, tmp_path: Path):
    assert complaint(kernel, architecture, alone(kernel, tmp_path)) is None


@pytest.mark.every(4)
@pytest.mark.parametrize(
    ("architecture", "bug", "kernel"),
    [
        pytest.param(architecture, bug, kernel, id=f"sm_{architecture}-{kernel.name}-{bug.name}")
        for architecture, kernel in CASES
        for bug in BUGS
        if kernel in bug.kernels and (architecture >= 80 or not bug.asynchronous)
    ],
)
def test_a_seeded_bug_is_noticed(architecture: int, bug: Bug, kernel: Kernel, tmp_path: Path):
    assert complaint(kernel, architecture, seeded(bug, kernel, tmp_path)) is not None
