"""Build the CPU kernels in `kernels/cpu` into a shared library, once for each source, compiler and machine.

The library is built at first use and kept in the cache folder (`haq_lab.utils.paths`). It is written aside and renamed
under a lock, so that processes that start together build it once and none loads half a file.
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

# The epilogue's multiplications and additions must stay apart (one numerics for every backend), hence no
# contraction into fused multiply-adds. Vector instructions are chosen function by function at run time.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared", "-pthread")


class BuildError(Exception):
    """The library could not be built; the message says why."""


def source_folder() -> Path:
    """The CPU kernels' folder."""
    folder = bundled("kernels") / "cpu"
    if not (folder / "kernels.h").is_file():
        raise BuildError(f"the kernel sources are not in {folder}")
    return folder


def compiler() -> list[str]:
    """The C++ compiler's command: `$CXX`, else the first of c++, g++ and clang++ on the path."""
    asked = shlex.split(os.environ.get("CXX", ""))
    if asked:
        if shutil.which(asked[0]) is None:
            raise BuildError(f"no C++ compiler: CXX={asked[0]} is not on the path")
        return asked
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler: none of c++, g++, clang++ is on the path, and CXX is not set")


def build() -> Path:
    """Path of the shared library, built if it is not in the cache. Raises BuildError.

    Without a compiler, a library that was built from these very sources before will do.
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
                    built = Path(aside) / library.name
                    _compile([*command, *FLAGS, *map(str, sources), "-o", str(built)])
                    built.replace(library)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the CPU kernels could not be built: {error}") from error
    return library


def _source_key(folder: Path) -> str:
    """Of the sources, the flags and the machine."""
    key = hashlib.sha256("\0".join([platform.machine(), *FLAGS]).encode())
    for path in sorted([*folder.glob("*.cpp"), *folder.glob("*.h")]):
        key.update(path.name.encode() + b"\0" + path.read_bytes())
    return key.hexdigest()[:24]


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise BuildError(f"{command[0]} failed on the CPU kernels:\n{done.stderr[-2000:]}")
