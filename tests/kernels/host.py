"""Builds the kernels' own sources with the host compiler and runs launches in that process (kernels/host/)."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from haq_lab.int8.cuda.launch import Argument, Launch, kernel_names
from haq_lab.utils.paths import bundled

from .ptx.runner import span

ORDERS = ("ascending", "descending", "shuffled", "first_warp_ahead", "last_warp_ahead")
COPIES = ("when_waited_for", "at_issue")
COUNTERS = ("mma_multiplies", "matrix_loads", "bank_conflicts", "async_bytes", "dot_multiplies", "barriers")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
FLAGS = ("-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas")
# Separate rounding of every operation, as on the device; and the sources read memory through several types.
MEANING = ("-ffp-contract=off", "-fno-strict-aliasing", "-DHAQ_HOST")


class HostError(Exception):
    """The run broke a rule: a sanitizer's report or one of the layer's own checks."""


@dataclass(frozen=True)
class Schedule:
    """Which thread runs next, and when asynchronous copies land."""

    order: str = "shuffled"
    copies: str = "when_waited_for"


SCHEDULES = tuple(Schedule(order, copies) for order in ORDERS for copies in COPIES)


def compiler() -> str | None:
    """The host's C++ compiler, or None."""
    return os.environ.get("CXX") or shutil.which("g++")


def _cache() -> Path:
    return Path(tempfile.gettempdir()) / f"haq-lab-host-builds-{os.getuid()}"


def _make(arguments: list[str], inputs: str, name: str) -> Path:
    """Run the compiler unless the same inputs were compiled before (wherever they lie)."""
    command = [compiler() or "g++", *arguments]
    options = [argument for argument in command if not argument.startswith("-I")]
    path = _cache() / f"{name}-{hashlib.sha256((inputs + repr(options)).encode()).hexdigest()[:20]}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.{os.getpid()}")
        done = subprocess.run([*command, "-o", str(aside)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[:4000]}")
        aside.replace(path)
    return path


def build(module: str, architecture: int, folder: Path | None = None) -> Path:
    """The executable that serves `kernels/<module>.cu` as compiled for `architecture` (75 or 80).

    Args:
        module: Such as `gemm`.
        architecture: Which path of the sources: 75 has no cp.async and the small mma.
        folder: Where the sources are, if not the project's own (a mutated copy).
    """
    folder = folder or bundled("kernels")
    host = bundled("kernels") / "host"
    common = [*FLAGS, *MEANING, *SANITIZE, f"-I{folder}", f"-I{host.parent}"]
    engine = [
        _make([*FLAGS, *MEANING, *SANITIZE, "-c", str(host / f"{part}.cpp")], _text(host), f"{part}.o")
        for part in ("simt", "fiber", "warp", "server")
    ]
    calls = "".join(f'  simt::serves("{name}", {name});\n' for name in kernel_names(module, folder))
    entry = f'#include "{module}.cu"\n#include "host/server.h"\nint main() {{\n{calls}  return simt::serve();\n}}\n'
    path = _cache() / f"{module}-{hashlib.sha256(entry.encode()).hexdigest()[:20]}.cpp"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(entry, encoding="utf-8")
    arguments = [*common, f"-D__CUDA_ARCH__={architecture}0", str(path), *map(str, engine)]
    return _make(arguments, _text(folder) + _text(host) + entry, f"{module}-sm_{architecture}")


def _text(folder: Path) -> str:
    """All text of a folder's files, as a cache key."""
    return "".join(path.read_text(encoding="utf-8") for path in sorted(folder.iterdir()) if path.is_file())


@dataclass
class HostRunner:
    """Executes launches on the host layer: a `Run` for haq_lab.int8.cuda.kernels.Kernels.

    Args:
        architecture: 75 or 80.
        schedule: Of threads and copies; may be changed between launches.
        folder: Of the sources, if not the project's own.
    """

    architecture: int = 80
    schedule: Schedule = Schedule()
    folder: Path | None = None
    counted: Counter[str] = field(default_factory=Counter)  # of the last launch
    launches: list[Launch] = field(default_factory=list)
    _servers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __call__(self, launch: Launch) -> None:
        server = self._server(launch.module)
        assert server.stdin is not None
        assert server.stdout is not None
        self.launches.append(launch)
        try:
            server.stdin.write(_request(launch, self.schedule))
            server.stdin.flush()
        except BrokenPipeError:
            pass  # it stopped on an argument; the report says why
        reply = server.stdout.readline().split()
        if not reply or reply[0] != b"ok":
            report = server.communicate()[1].decode(errors="replace")
            del self._servers[launch.module]
            raise HostError(f"{launch.kernel} {launch.grid} {self.schedule}\n{report[:3000]}")
        self.counted = Counter(dict(zip(COUNTERS, map(int, reply[1:]), strict=True)))
        for tensor in launch.args:
            if isinstance(tensor, Tensor):
                _take_back(tensor, server.stdout)

    def close(self) -> None:
        """End the processes."""
        for server in self._servers.values():
            server.communicate()
        self._servers.clear()

    def _server(self, module: str) -> subprocess.Popen[bytes]:
        if module not in self._servers:
            path = build(module, self.architecture, self.folder)
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "LD_PRELOAD": ""}
            self._servers[module] = subprocess.Popen([path], env=environment, **pipes)
        return self._servers[module]


def _request(launch: Launch, schedule: Schedule) -> bytes:
    grid = " ".join(map(str, launch.grid))
    how = f"{ORDERS.index(schedule.order)} {COPIES.index(schedule.copies)}"
    head = f"launch {launch.kernel} {grid} {launch.threads} {launch.shared} {how} {len(launch.args)}\n"
    return head.encode() + b"".join(_argument(value) for value in launch.args)


def _argument(value: Argument) -> bytes:
    if value is None:
        return b"null\n"
    if isinstance(value, Tensor):
        data = span(value).numpy().tobytes()
        return f"buffer {len(data)}\n".encode() + data
    if isinstance(value, float):
        return f"float {struct.unpack('<I', struct.pack('<f', value))[0]}\n".encode()
    return f"int {value}\n".encode()


def _take_back(tensor: Tensor, stream: IO[bytes]) -> None:
    memory = span(tensor)
    memory.copy_(torch.frombuffer(bytearray(stream.read(memory.numel())), dtype=torch.uint8))
