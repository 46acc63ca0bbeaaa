"""Compile the CPU kernels in kernels/cpu to a shared library, once for each source, compiler and machine.

The library is compiled at first use and stored in the cache folder (`haq_lab.utils.paths`). It is written to a
temporary folder and renamed under a lock. So concurrent processes compile it once and never load a partial file.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from filelock import FileLock

from haq_lab.utils.paths import bundled, cache_folder

# No contraction to fused multiply-adds: each operation of the epilogue must be rounded separately, so that backends
# are bit-identical. Vector instructions are selected per function at run time.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-pthread")


class BuildError(Exception):
    """The library could not be compiled. The message says why."""


def source_folder() -> Path:
    """Return the folder of the CPU kernels. Raises BuildError if it is missing."""
    folder = bundled("kernels") / "cpu"
    if not (folder / "kernels.h").is_file():
        raise BuildError(f"{folder} does not contain the kernel sources. Reinstall haq-lab.")
    return folder


def compiler() -> list[str]:
    """Return the C++ compiler's command: `$CXX`, else the first of c++, g++ and clang++ on the path.

    Raises:
        BuildError: There is no compiler.
    """
    command = shlex.split(os.environ.get("CXX", ""))
    if command:
        if shutil.which(command[0]) is None:
            raise BuildError(f"CXX: no C++ compiler {command[0]} is on the path. Install it or unset CXX.")
        return command
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("There is no C++ compiler on the path. Install c++, g++ or clang++, or set CXX.")


def build() -> Path:
    """Return the path of the shared library and compile it if it is not in the cache.

    Without a compiler, a cached library of the same sources is used.

    Raises:
        BuildError: There is no compiler, or it failed.
    """
    folder, cache = source_folder(), cache_folder() / "native"
    sources = sorted(folder.glob("*.cpp"))
    try:
        stem = f"haq_cpu-{_source_key(folder)}"
        try:
            command = compiler()
        except BuildError:
            for library in sorted(cache.glob(f"{stem}-*.so")):
                return library
            raise
        version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
        library = cache / f"{stem}-{hashlib.sha256(chr(0).join([*command, version]).encode()).hexdigest()[:8]}.so"
        if library.is_file():
            return library
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{library}.lock"):
            if not library.is_file():
                with tempfile.TemporaryDirectory(dir=cache) as aside:
                    new = Path(aside) / library.name
                    _compile([*command, *FLAGS, *map(str, sources), "-o", str(new)])
                    new.replace(library)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"The CPU kernels could not be compiled: {error}.") from error
    return library


def _source_key(folder: Path) -> str:
    """Return a hash of the sources, the flags and the machine type."""
    key = hashlib.sha256("\0".join([platform.machine(), *FLAGS]).encode())
    for path in sorted([*folder.glob("*.cpp"), *folder.glob("*.h")]):
        key.update(path.name.encode() + b"\0" + path.read_bytes())
    return key.hexdigest()[:24]


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise BuildError(f"{command[0]} failed on the CPU kernels:\n{done.stderr[-2000:]}")
