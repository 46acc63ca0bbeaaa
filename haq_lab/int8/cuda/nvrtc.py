"""Compile CUDA C++ with NVRTC, NVIDIA's run-time compiler. This needs no GPU and no driver.

NVRTC is called through ctypes, because CuPy's binding has three limits. It asks the driver for the architecture, it
cuts the last byte of a cubin, and it cannot load several versions.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import importlib.util
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from haq_lab.int8.cuda.sources import module_source
from haq_lab.utils.atomic_files import atomic_file
from haq_lab.utils.errors import UserError
from haq_lab.utils.paths import cache_folder

# No fused multiply-add: each operation is rounded separately, as haq_lab.int8.numerics defines.
OPTIONS = ("--std=c++17", "-fmad=false", "--ptxas-options=-v")


@dataclass(frozen=True)
class Compiled:
    """Result of one compilation.

    Attributes:
        cubin: The machine code.
        ptx: The PTX code that it was made from.
        log: The compiler's log.
    """

    cubin: bytes
    ptx: str
    log: str


class Compiler:
    """One loaded NVRTC library.

    Args:
        library: Path or name of the shared library.

    Attributes:
        version: Major and minor version.
    """

    def __init__(self, library: Path | str) -> None:
        if Path(library).is_absolute():  # NVRTC 13.0 opens this part of itself by name, and does not look beside itself
            for part in sorted(Path(library).parent.glob("libnvrtc-builtins.so.*")):
                ctypes.CDLL(str(part))
        self._library = ctypes.CDLL(str(library))
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = (major.value, minor.value)

    def architectures(self) -> list[int]:
        """Return the architectures that it supports, such as 80 for sm_80."""
        count = ctypes.c_int()
        self._check(self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        numbers = (ctypes.c_int * count.value)()
        self._check(self._library.nvrtcGetSupportedArchs(numbers))
        return list(numbers)

    def compile(self, source: str, architecture: int, name: str = "kernel.cu") -> Compiled:
        """Compile a source for one architecture.

        Args:
            source: The CUDA C++ code.
            architecture: Such as 80 for sm_80.
            name: File name in the compiler's messages.

        Raises:
            UserError: This version does not support the architecture.
            RuntimeError: The source has an error. The message is the compiler's log.
        """
        if architecture not in (known := self.architectures()):
            raise UserError(
                f"NVRTC {self.version[0]}.{self.version[1]} compiles for sm_{known[0]} to sm_{known[-1]}, "
                f"not for sm_{architecture}. Run `pip install -U 'haq-lab[cuda13]'` for a newer version."
            )
        program = ctypes.c_void_p()
        created = self._library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
        self._check(created)
        try:
            options = [
                f"--gpu-architecture=sm_{architecture}".encode(),
                *(option.encode() for option in OPTIONS),
            ]
            arguments = (ctypes.c_char_p * len(options))(*options)
            status = self._library.nvrtcCompileProgram(program, len(options), arguments)
            log = self._text(program, "ProgramLog").decode().rstrip("\0\n")
            if status:
                raise RuntimeError(f"{name} for sm_{architecture}:\n{log}")
            ptx = self._text(program, "PTX").decode().rstrip("\0")
            return Compiled(cubin=self._text(program, "CUBIN"), ptx=ptx, log=log)
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _text(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def _check(self, status: int) -> None:
        if status:
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise RuntimeError(f"NVRTC: {self._library.nvrtcGetErrorString(status).decode()}")


def installed_libraries() -> dict[int, Path]:
    """Return the NVRTC libraries in NVIDIA's Python packages, by CUDA's major version."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    libraries: dict[int, Path] = {}
    for path in sorted(library for folder in folders for library in folder.glob("*/lib/libnvrtc.so.*")):
        if match := re.fullmatch(r"libnvrtc\.so\.(\d+)", path.name):
            libraries[int(match[1])] = path
    return libraries


@cache
def default_compiler(major: int | None = None) -> Compiler:
    """Return the compiler that a run uses.

    Args:
        major: Preferred major version of CUDA. Otherwise the newest installed one is used, then the system's.

    Raises:
        UserError: NVRTC is not installed.
    """
    if libraries := installed_libraries():
        newest = max(libraries)
        return Compiler(libraries.get(major or newest, libraries[newest]))
    toolkit = Path(os.environ.get("CUDA_PATH", "/usr/local/cuda")) / "lib64" / "libnvrtc.so"
    library = str(toolkit) if toolkit.exists() else ctypes.util.find_library("nvrtc")
    if library is None:
        raise UserError(
            "backend=cuda needs NVRTC, which is not installed. Run `pip install 'haq-lab[cuda13]'`, or "
            "`pip install 'haq-lab[cuda12]' 'torch==2.10.*'` for a driver below 580."
        )
    return Compiler(library)


def cubin_file(module: str, architecture: int, compiler: Compiler) -> Path:
    """Return the path of the compiled `kernels/<module>.cu`, and compile it on first use.

    The file name contains a hash of everything that determines the code, so a changed source or compiler gets a new
    file. It also contains a hash of the content, so a damaged file is compiled again.

    Args:
        module: Name of the source without its suffix, such as `gemm`.
        architecture: Such as 80 for sm_80.
        compiler: The compiler to use.

    Raises:
        UserError: The compiler does not support the architecture.
    """
    source = module_source(module)
    key = _digest(repr((compiler.version, architecture, OPTIONS, source)).encode())
    folder, stem = cache_folder() / "cuda", f"{module}-sm_{architecture}-{key}"
    for path in folder.glob(f"{stem}.*.cubin"):
        if path.name == f"{stem}.{_digest(path.read_bytes())}.cubin":
            return path
        path.unlink(missing_ok=True)  # another process may have removed it already
    cubin = compiler.compile(source, architecture, f"{module}.cu").cubin
    path = folder / f"{stem}.{_digest(cubin)}.cubin"
    with atomic_file(path) as aside:
        aside.write_bytes(cubin)
    return path


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
