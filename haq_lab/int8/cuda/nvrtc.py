"""NVRTC, NVIDIA's run-time compiler for CUDA C++: text in, machine code out. Needs no GPU and no driver.

Called through ctypes rather than CuPy's binding, for three things that one lacks: the architecture is given and not
asked of a driver, the last byte of a cubin is kept, and several versions can be loaded side by side.
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

# No fused multiply-add: each operation is rounded on its own, as the numerics contract says.
OPTIONS = ("--std=c++17", "-fmad=false", "--ptxas-options=-v")


@dataclass(frozen=True)
class Compiled:
    """What one compilation gives: the machine code, the PTX it was made from and the compiler's log."""

    cubin: bytes
    ptx: str
    log: str


class Compiler:
    """One loaded NVRTC library."""

    def __init__(self, library: Path | str) -> None:
        self._library = ctypes.CDLL(str(library))
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = (major.value, minor.value)

    def architectures(self) -> list[int]:
        """The architectures it compiles for, such as 80 for sm_80."""
        count = ctypes.c_int()
        self._check(self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        numbers = (ctypes.c_int * count.value)()
        self._check(self._library.nvrtcGetSupportedArchs(numbers))
        return list(numbers)

    def compile(self, source: str, architecture: int, name: str = "kernel.cu") -> Compiled:
        """Compile `source` for one architecture.

        Raises:
            UserError: This version doesn't know the architecture.
            RuntimeError: The source has an error; the message is the compiler's log.
        """
        if architecture not in (known := self.architectures()):
            raise UserError(
                f"NVRTC {self.version[0]}.{self.version[1]} compiles for sm_{known[0]} to sm_{known[-1]}, "
                f"not for sm_{architecture}: install a newer one (`pip install -U 'haq-lab[cuda13]'`)"
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
    """The NVRTC libraries of NVIDIA's Python packages, by CUDA's major version."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    found: dict[int, Path] = {}
    for path in sorted(library for folder in folders for library in folder.glob("*/lib/libnvrtc.so.*")):
        if match := re.fullmatch(r"libnvrtc\.so\.(\d+)", path.name):
            found[int(match[1])] = path
    return found


@cache
def default_compiler(major: int | None = None) -> Compiler:
    """The compiler a run uses: of CUDA `major` if that is installed, else the newest, else the system's.

    Raises:
        UserError: There is none.
    """
    if found := installed_libraries():
        return Compiler(found.get(major or max(found), found[max(found)]))
    toolkit = Path(os.environ.get("CUDA_PATH", "/usr/local/cuda")) / "lib64" / "libnvrtc.so"
    library = str(toolkit) if toolkit.exists() else ctypes.util.find_library("nvrtc")
    if library is None:
        raise UserError("backend=cuda needs NVRTC, which is not here: `pip install 'haq-lab[cuda13]'` (or cuda12)")
    return Compiler(library)


def cubin_file(module: str, architecture: int, compiler: Compiler) -> Path:
    """The compiled `kernels/<module>.cu` on disk, made on first use.

    The name holds a digest of all that determines the code, so a changed source or compiler makes a new file, and one
    of the content: a file that was damaged is not loaded but made again.
    """
    source = module_source(module)
    key = _digest(repr((compiler.version, architecture, OPTIONS, source)).encode())
    folder, stem = cache_folder() / "cuda", f"{module}-sm_{architecture}-{key}"
    for path in folder.glob(f"{stem}.*.cubin"):
        if path.name == f"{stem}.{_digest(path.read_bytes())}.cubin":
            return path
        path.unlink(missing_ok=True)  # another process may have found it damaged too
    cubin = compiler.compile(source, architecture, f"{module}.cu").cubin
    path = folder / f"{stem}.{_digest(cubin)}.cubin"
    with atomic_file(path) as aside:
        aside.write_bytes(cubin)
    return path


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
