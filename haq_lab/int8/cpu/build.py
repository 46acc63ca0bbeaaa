"""Compile the CPU kernels in kernels/cpu to a shared library, once for each source, compiler and machine.

The library is compiled at first use and stored in the cache folder (`haq_lab.utils.paths`). It is written to a
temporary folder and renamed under a lock. So concurrent processes compile it once and never load a partial file.
The file name contains a hash of the content. A damaged file would crash the process, so it is compiled again.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from haq_lab.utils.atomic_files import remove_leftovers, sha256, temporary_folder
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
    """Return the path of the shared library and compile it if the cache has no intact one.

    Without a compiler, a cached library of the same sources is used.

    Raises:
        BuildError: There is no compiler, or it failed.
    """
    folder, cache = source_folder(), cache_folder() / "native"
    sources = sorted(folder.glob("*.cpp"))
    remove_leftovers(cache)
    try:
        stem = f"haq_cpu-{_source_key(folder)}"
        try:
            command = compiler()
        except BuildError:
            if (library := _cached(cache, stem)) is not None:
                return library
            raise
        version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
        stem = f"{stem}-{hashlib.sha256(chr(0).join([*command, version]).encode()).hexdigest()[:8]}"
        if (library := _cached(cache, stem)) is not None:
            return library
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{stem}.lock"):
            if (library := _cached(cache, stem)) is None:
                library = _compile_into(cache, stem, [*command, *FLAGS, *map(str, sources)])
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"The CPU kernels could not be compiled: {error}.") from error
    return library


def _cached(cache: Path, stem: str) -> Path | None:
    """Return a cached library whose content has the hash in its name. Remove damaged libraries."""
    for library in sorted(cache.glob(f"{stem}-*.so")):
        if library.name.endswith(f"-{_content_key(library)}.so"):
            return library
        with suppress(OSError):  # read-only, or another process has removed it
            library.unlink()
    return None


def _compile_into(cache: Path, stem: str, command: list[str]) -> Path:
    """Compile the library, and name it by its content."""
    with temporary_folder(cache / stem) as aside:
        new = aside / "library.so"
        _compile([*command, "-o", str(new)])
        return new.replace(cache / f"{stem}-{_content_key(new)}.so")


def _content_key(library: Path) -> str:
    return sha256(library)[:16]


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
