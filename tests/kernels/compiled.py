"""The kernels compiled by NVRTC, kept on disk between sessions, for the tests that look at what came out."""

from __future__ import annotations

import hashlib
import os
import pickle
import tempfile
from functools import cache
from pathlib import Path

import pytest

from haq_lab.int8.cuda.launch import MODULES
from haq_lab.int8.cuda.nvrtc import OPTIONS, Compiled, Compiler, installed_libraries
from haq_lab.int8.cuda.sources import module_source

from .ptx.parse import Program, parse

MAJORS = (12, 13)
NEWEST = max(installed_libraries(), default=13)


@cache
def compiler(major: int) -> Compiler:
    """NVRTC of a CUDA version; skips the test where it is not installed."""
    libraries = installed_libraries()
    if major not in libraries:
        pytest.skip(f"NVRTC {major} is not installed (the dev extra brings it)")
    return Compiler(libraries[major])


@cache
def compiled(module: str, architecture: int, major: int, folder: Path | None = None) -> Compiled:
    """One module, from the cache if the same text was compiled before."""
    source = module_source(module, folder)
    key = repr((compiler(major).version, architecture, OPTIONS, source)).encode()
    cache_folder = Path(tempfile.gettempdir()) / f"haq-lab-nvrtc-{os.getuid()}"
    path = cache_folder / hashlib.sha256(key).hexdigest()
    if not path.exists():
        cache_folder.mkdir(exist_ok=True)
        aside = path.with_name(f"{path.name}.{os.getpid()}")
        aside.write_bytes(pickle.dumps(compiler(major).compile(source, architecture, f"{module}.cu")))
        aside.replace(path)
    result = pickle.loads(path.read_bytes())
    assert isinstance(result, Compiled)
    return result


@cache
def programs(module: str, architecture: int, major: int, folder: Path | None = None) -> dict[str, Program]:
    """The same as parsed PTX."""
    return parse(compiled(module, architecture, major, folder).ptx)


def all_programs(architecture: int, major: int) -> dict[str, Program]:
    """Every module's kernels."""
    return {name: program for module in MODULES for name, program in programs(module, architecture, major).items()}
