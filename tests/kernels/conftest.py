"""Executors for launches, made once a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from haq_lab.int8.cuda.kernels import Kernels

from .host import HostRunner, compiler


@pytest.fixture(autouse=True)
def _poisoned_allocations() -> Iterator[None]:
    """`torch.empty` gives NaN and largest integers: what a kernel forgets to write must not look right by luck."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session", params=[80, 75], ids=["sm_80", "sm_75"])
def host_runner(request: pytest.FixtureRequest) -> Iterator[HostRunner]:
    """The kernels' own sources on this CPU, in both of their versions, under sanitizers."""
    if compiler() is None:
        pytest.skip("needs a C++ compiler (g++) to build the kernels for this CPU")
    runner = HostRunner(architecture=request.param)
    yield runner
    runner.close()


@pytest.fixture(scope="session")
def host(host_runner: HostRunner) -> Kernels:
    """The launcher over that, as for a GPU of four multiprocessors."""
    return Kernels(host_runner, architecture=host_runner.architecture, multiprocessors=4, shared_limit=64 * 1024)
