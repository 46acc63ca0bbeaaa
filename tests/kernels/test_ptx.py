"""What NVRTC emitted, interpreted: every kernel, with bounds checks and a race detector, bit-exact."""

from __future__ import annotations

from pathlib import Path

import pytest

from haq_lab.int8.cuda.kernels import Kernels
from haq_lab.int8.cuda.launch import MODULES, kernel_names

from .bugs import BUGS, FEW, Bug, Kernel, seeded
from .checks import every_kernel
from .compiled import NEWEST, programs
from .ptx.block import Schedule
from .ptx.memory import PtxError
from .ptx.runner import PtxRunner

CHECKS = every_kernel()
SCHEDULES = (Schedule("first_ahead", eager=True), Schedule("last_ahead", eager=False))


def launcher(runner: PtxRunner, architecture: int) -> Kernels:
    """Shared memory for 100 groups of eight columns, so that a row's last part is read again."""
    return Kernels(runner, architecture=architecture, multiprocessors=4, shared_limit=128 + 32 * 100)


def test_there_is_a_check_for_every_kernel():
    assert sorted(CHECKS) == sorted(name for module in MODULES for name in kernel_names(module))


@pytest.mark.every(2)
@pytest.mark.parametrize("name", CHECKS)
def test_every_kernel_as_compiled_for_sm_80(name: str):
    CHECKS[name](launcher(PtxRunner(lambda module: programs(module, 80, NEWEST)), 80), "cpu")


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.warps)
@pytest.mark.parametrize("kernel", FEW, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize(("architecture", "major"), [(75, 13), (80, 12), (120, 13), (120, 12)])
def test_architectures_compilers_and_schedules(architecture: int, major: int, kernel: Kernel, schedule: Schedule):
    runner = PtxRunner(lambda module: programs(module, architecture, major), schedule)
    kernel.check(launcher(runner, architecture))


@pytest.mark.every(5)
@pytest.mark.parametrize(
    ("bug", "kernel"),
    [pytest.param(bug, kernel, id=f"{kernel.name}-{bug.name}") for bug in BUGS for kernel in bug.kernels],
)
def test_a_seeded_bug_is_noticed(bug: Bug, kernel: Kernel, tmp_path: Path):
    folder = seeded(bug, kernel, tmp_path)

    def notices(schedule: Schedule) -> bool:
        runner = PtxRunner(lambda module: programs(module, 80, NEWEST, folder), schedule)
        try:
            kernel.check(launcher(runner, 80))
        except (PtxError, AssertionError):
            return True
        return False

    assert any(notices(schedule) for schedule in SCHEDULES)
