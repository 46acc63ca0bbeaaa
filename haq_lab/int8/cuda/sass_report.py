"""Report the registers, spills, shared memory and important instructions of the compiled kernels.

    python -m haq_lab.int8.cuda.sass_report --write experiments/cuda_kernels.csv

compiles each kernel for each architecture with each installed NVRTC, and writes one row per combination. The registers,
stack and shared memory in the compiler's log are compared with those in the machine code. This needs no GPU, but it
needs `nvidia-cuda-nvdisasm` and `nvidia-cuda-cuobjdump` from the dev extra.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from haq_lab.int8.cuda.launch import MODULES, TILES
from haq_lab.int8.cuda.nvrtc import Compiled, Compiler, installed_libraries
from haq_lab.int8.cuda.sources import module_source
from haq_lab.utils.atomic_files import atomic_file
from haq_lab.utils.errors import UserError

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
# Shared memory per multiprocessor in KiB. From sm_80 on, a block takes one KiB more than it requests.
SHARED_KIB = {75: 64, 80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}
RESERVED = 1024  # bytes of shared memory that a block takes beyond its request
REGISTERS = 65536  # per multiprocessor
THREADS = {75: 1024, 80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
NOTED = {
    "imma": "IMMA",  # int8 tensor cores
    "ldsm": "LDSM",  # ldmatrix
    "ldgsts": "LDGSTS",  # cp.async
    "dp4a": "IDP",
    "wide_loads": "LDG.E.128",
}
FUNCTION = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
    re.DOTALL,
)
USAGE = re.compile(r"Function (\w+):\n\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
SECTION = re.compile(r"^//-+ \.text\.(\w+)\s+-+\n(.*?)(?=^//-+ \.|\Z)", re.DOTALL | re.MULTILINE)
SASS = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
FOUR_BIT = re.compile(r"[a-z]+4_")  # kernels that unpack 4-bit weights
# Instructions that PTX must not contain: they change the arithmetic, or hide which memory a pointer refers to.
FORBIDDEN = {
    "approximate arithmetic": re.compile(r"\.approx|div\.full|\.ftz"),
    "fused multiply-add": re.compile(r"\bfma\.rn\.f32"),
    "a pointer of unknown memory": re.compile(r"\bcvta\.to\.shared|\b(?:ld|st)\.(?:[bsuf]\d|v\d)"),
    "local memory": re.compile(r"\b(?:ld|st)\.local"),
}


@dataclass(frozen=True)
class KernelCode:
    """Resources and instruction counts of one kernel, compiled for one architecture.

    Instructions are counted in the code, not as executed.
    """

    kernel: str
    architecture: int
    nvrtc: str
    registers: int
    spill_bytes: int
    threads: int
    min_blocks: int
    shared_bytes: int
    imma: int
    ldsm: int
    ldgsts: int
    dp4a: int
    wide_loads: int


@dataclass(frozen=True)
class Resources:
    """Resources of a kernel.

    Attributes:
        registers: Registers per thread.
        stack: Bytes of stack per thread.
        shared: Bytes of static shared memory per block.
    """

    registers: int
    stack: int
    shared: int


def tool(name: str) -> str | None:
    """Return the path of `nvdisasm` or `cuobjdump`, from PATH or NVIDIA's Python packages, or None."""
    if path := shutil.which(name):
        return path
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    return next((str(path) for folder in folders for path in sorted(folder.glob(f"*/bin/{name}"))), None)


def _tool_output(name: str, option: str, cubin: bytes) -> str:
    """Run a tool on machine code and return its output."""
    path = tool(name)
    if path is None:
        raise UserError(f"{name} is not installed. Run `pip install nvidia-cuda-{name}`.")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, option, file.name], capture_output=True, text=True, check=True).stdout


def count_instructions(cubin: bytes) -> dict[str, Counter[str]]:
    """Count the machine instructions of each kernel."""
    text = _tool_output("nvdisasm", "-c", cubin)
    return {name: Counter(SASS.findall(body)) for name, body in SECTION.findall(text)}


def resources_in_log(log: str) -> dict[str, Resources]:
    """Return each kernel's resources from the compiler's log."""
    return {
        name: Resources(int(registers), int(stack), int(shared or 0))
        for name, stack, _, _, registers, shared in FUNCTION.findall(log)
    }


def resources_in_code(cubin: bytes, architecture: int) -> dict[str, Resources]:
    """Return each kernel's resources from the machine code. From sm_90 on, reserved shared memory is subtracted."""
    reserved = RESERVED if architecture >= 90 else 0
    return {
        name: Resources(int(registers), int(stack), max(0, int(shared) - reserved))
        for name, registers, stack, shared in USAGE.findall(_tool_output("cuobjdump", "-res-usage", cubin))
    }


def disagreements(compiled: Compiled, architecture: int) -> list[str]:
    """Return the kernels whose resources in the compiler's log differ from those in the machine code."""
    log, code = resources_in_log(compiled.log), resources_in_code(compiled.cubin, architecture)
    return [
        f"{name}: {log.get(name)} in the log, {code.get(name)} in the code"
        for name in sorted({*log, *code})
        if log.get(name) != code.get(name)
    ]


def shared_bytes(kernel: str, architecture: int) -> int:
    """Return the dynamic shared memory that the launcher requests, in row kernels for 1,024 columns."""
    tile = next((tile for tile in TILES if f"_{tile.name}_" in kernel), None)
    if tile:
        return tile.shared(architecture, 4 if FOUR_BIT.match(kernel) else 8)
    return 128 + 32 * 128 if "quantize" in kernel else 0


def kernel_codes(compiled: Compiled, architecture: int, nvrtc: str) -> list[KernelCode]:
    """Return one row for each kernel of a compiled module."""
    opcodes, rows = count_instructions(compiled.cubin), []
    for name, _, stores, loads, registers, _ in FUNCTION.findall(compiled.log):
        header = compiled.ptx[compiled.ptx.index(f".entry {name}(") :].split("{", 1)[0]
        limits = dict(re.findall(r"\.(maxntid|minnctapersm)\s+(\d+)", header))
        counts = {
            column: sum(n for opcode, n in opcodes[name].items() if opcode.startswith(start))
            for column, start in NOTED.items()
        }
        rows.append(
            KernelCode(
                kernel=name,
                architecture=architecture,
                nvrtc=nvrtc,
                registers=int(registers),
                spill_bytes=int(stores) + int(loads),
                threads=int(limits["maxntid"]),
                min_blocks=int(limits.get("minnctapersm", 1)),
                shared_bytes=shared_bytes(name, architecture),
                **counts,
            )
        )
    return rows


def complaints(code: KernelCode) -> list[str]:
    """Return what is wrong with a kernel: spills, too low occupancy, or a missing instruction."""
    problems = []
    if code.spill_bytes:
        problems.append(f"{code.spill_bytes} bytes spilled")
    warps = code.threads // 32
    registers = -(-code.registers * 32 // 256) * 256 * warps * code.min_blocks  # allocated in units of 256 per warp
    if registers > REGISTERS:
        problems.append(f"{code.registers} registers: fewer than {code.min_blocks} blocks fit")
    if code.threads * code.min_blocks > THREADS[code.architecture]:
        problems.append(f"{code.min_blocks} blocks of {code.threads} threads don't fit")
    reserved = RESERVED if code.architecture >= 80 else 0
    if (code.shared_bytes + reserved) * code.min_blocks > SHARED_KIB[code.architecture] * 1024:
        problems.append(f"{code.shared_bytes} bytes of shared memory: fewer than {code.min_blocks} blocks fit")
    return problems + [f"no {NOTED[column]}" for column in required(code) if not getattr(code, column)]


def required(code: KernelCode) -> list[str]:
    """Return the columns of the instructions that a fast kernel of this kind must use."""
    if code.kernel.startswith(("gemm", "grouped")):
        return ["imma", "ldsm", *(["ldgsts"] if code.architecture >= 80 else [])]
    if code.kernel.startswith("gemv"):
        return ["dp4a", "wide_loads"]
    return ["wide_loads"] if code.kernel.startswith("dequant") or "quantize" in code.kernel else []


def forbidden(ptx: str) -> list[str]:
    """Return the forbidden instructions that the PTX contains."""
    return [f"{what}: {match[0]}" for what, pattern in FORBIDDEN.items() if (match := pattern.search(ptx))]


def table(compilers: list[Compiler]) -> tuple[list[KernelCode], list[str]]:
    """Compile all kernels. Returns the rows, and the differences between log and machine code."""
    rows, wrong = [], []
    for compiler in compilers:
        version = ".".join(map(str, compiler.version))
        for architecture in ARCHITECTURES:
            for module in MODULES:
                compiled = compiler.compile(module_source(module), architecture, f"{module}.cu")
                rows += kernel_codes(compiled, architecture, version)
                wrong += [f"sm_{architecture} NVRTC {version}, {one}" for one in disagreements(compiled, architecture)]
    return rows, wrong


def write(rows: list[KernelCode], path: Path) -> None:
    """Write the rows as CSV."""
    with atomic_file(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(KernelCode.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(vars(row) for row in rows)


def main() -> int:
    """Run the command. Returns 1 if a kernel has a problem, else 0."""
    parser = argparse.ArgumentParser(
        description="Compile all kernels and report their registers, spills and instructions."
    )
    parser.add_argument("--write", type=Path, help="Write the report to this CSV file.")
    arguments = parser.parse_args()
    rows, wrong = table([Compiler(path) for _, path in sorted(installed_libraries().items())])
    if arguments.write:
        write(rows, arguments.write)
    bad = [(row, problems) for row in rows if (problems := complaints(row))]
    for row, problems in bad:
        print(f"{row.kernel} sm_{row.architecture} NVRTC {row.nvrtc}: {'; '.join(problems)}")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    print(f"{len(rows)} kernels compiled, {len(bad)} with problems, {len(wrong)} whose log differs from the code")
    return 1 if bad or wrong or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
