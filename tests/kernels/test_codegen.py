"""What NVRTC makes of the kernels, for every architecture and with two versions of the compiler."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from haq_lab.int8.cuda import sass_report as codegen
from haq_lab.int8.cuda.launch import MODULES, TILES, kernel_names
from haq_lab.int8.cuda.nvrtc import cubin_file, default_compiler
from haq_lab.int8.cuda.sass_report import ARCHITECTURES, KernelCode, complaints, disagreements, forbidden, kernel_codes
from haq_lab.utils.errors import UserError

from .bugs import DEQUANT, GEMM, QUANTIZE, Kernel, alone
from .checks import FOUR_BIT_TILES
from .compiled import MAJORS, NEWEST, compiled, compiler, programs

# The newest compiler for every architecture; the other for the one without cp.async and the first and last with it.
COMPILATIONS = [(NEWEST, architecture) for architecture in ARCHITECTURES] + [
    (major, architecture) for major in MAJORS if major != NEWEST for architecture in (75, 80, 120)
]
TABLE = Path(__file__).parents[2] / "experiments" / "cuda_kernels.csv"


def needs(tool: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(codegen.tool(tool) is None, reason=f"needs {tool} (the dev extra brings it)")


@needs("nvdisasm")
@pytest.mark.every(3)
@pytest.mark.parametrize(("major", "architecture"), COMPILATIONS)
@pytest.mark.parametrize("module", MODULES)
def test_every_kernel_compiles_to_the_right_code(module: str, major: int, architecture: int):
    result = compiled(module, architecture, major)
    assert forbidden(result.ptx) == []
    codes = kernel_codes(result, architecture, str(major))
    assert sorted(code.kernel for code in codes) == sorted(kernel_names(module))
    assert {code.kernel: found for code in codes if (found := complaints(code))} == {}


@needs("cuobjdump")
@pytest.mark.parametrize(("major", "architecture"), COMPILATIONS)
def test_the_log_says_what_stands_in_the_code(major: int, architecture: int):
    for module in MODULES:
        result = compiled(module, architecture, major)
        assert set(codegen.resources_in_code(result.cubin, architecture)) == set(kernel_names(module))
        assert disagreements(result, architecture) == []


# A stack and static shared memory, which none of our kernels has.
GREEDY = """
extern "C" __global__ void greedy(float* x, int at) {
  __shared__ float row[128];
  float own[64];
  for (int i = 0; i < at; i++) own[i & 63] = x[i];
  row[threadIdx.x] = own[threadIdx.x & 63];
  __syncthreads();
  x[at] = row[127 - threadIdx.x];
}
"""


@needs("cuobjdump")
@pytest.mark.parametrize("major", MAJORS)
@pytest.mark.parametrize("architecture", [80, 120])
def test_a_stack_and_shared_memory_are_seen_in_both(major: int, architecture: int):
    result = compiler(major).compile(GREEDY, architecture)
    (seen,) = codegen.resources_in_code(result.cubin, architecture).values()
    assert (seen.stack, seen.shared) == (256, 512)
    assert codegen.resources_in_log(result.log) == {"greedy": seen}


@needs("cuobjdump")
@pytest.mark.parametrize(
    ("pattern", "new"),
    [
        (r"Used \d+ registers", "Used 200 registers"),
        (r"\d+ bytes stack frame", "8 bytes stack frame"),
        (r"barriers", "barriers, 512 bytes smem"),
        (r"entry function '\w+'", "entry function 'another'"),
    ],
)
@pytest.mark.parametrize("architecture", [80, 90])
def test_a_log_that_says_something_else_is_noticed(architecture: int, pattern: str, new: str):
    result = compiled("dequant", architecture, NEWEST)
    changed = replace(result, log=re.sub(pattern, new, result.log, count=1))
    assert changed.log != result.log
    assert disagreements(changed, architecture) != []


@pytest.mark.parametrize("architecture", [75, 80])
def test_the_launchers_tiles_are_the_kernels_tiles(architecture: int):
    for module, tiles in (("gemm", TILES), ("grouped", TILES), ("gemm4", FOUR_BIT_TILES), ("grouped4", FOUR_BIT_TILES)):
        compiled_for = set()
        for name, program in programs(module, architecture, NEWEST).items():
            for tile in TILES:
                if f"_{tile.name}_" in name:
                    assert program.limits == {"maxntid": tile.threads, "minnctapersm": tile.min_blocks}
                    compiled_for.add(tile)
        assert compiled_for == set(tiles), module


CODE = KernelCode("gemm_64x64_f16", 86, "13.5", 120, 0, 128, 3, 32768, 16, 8, 24, 0, 0)


def test_packed_weights_take_half_the_shared_memory():
    assert codegen.shared_bytes("gemm_64x64_f16", 80) == 4 * (64 + 64) * 64
    for kernel in ("gemm4_64x64_f16", "grouped4_64x64_f16"):
        assert codegen.shared_bytes(kernel, 80) == 4 * (64 + 32) * 64
        assert codegen.shared_bytes(kernel, 75) == 2 * (64 + 32) * 64


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"spill_bytes": 8}, "8 bytes spilled"),
        ({"registers": 176}, "fewer than 3 blocks fit"),
        ({"shared_bytes": 40000}, "fewer than 3 blocks fit"),
        ({"imma": 0}, "no IMMA"),
        ({"ldgsts": 0}, "no LDGSTS"),
        ({"kernel": "gemm4_64x64_f16", "imma": 0}, "no IMMA"),
        ({"kernel": "gemv_1_f16"}, "no IDP"),
        ({"kernel": "gemv4_1_f16"}, "no IDP"),
    ],
)
def test_code_that_got_worse_is_noticed(change: dict, complaint: str):
    assert complaints(CODE) == []
    assert complaint in "; ".join(complaints(replace(CODE, **change)))


def test_the_recorded_table_has_every_kernel_and_nothing_worse_than_asked_for():
    with TABLE.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kernels = {name for module in MODULES for name in kernel_names(module)}
    assert {row["kernel"] for row in rows} == kernels
    assert {int(row["architecture"]) for row in rows} == set(ARCHITECTURES)
    assert len({row["nvrtc"] for row in rows}) == 2
    for row in rows:
        numbers = {key: int(value) for key, value in row.items() if key not in ("kernel", "nvrtc")}
        assert complaints(KernelCode(kernel=row["kernel"], nvrtc=row["nvrtc"], **numbers)) == []


@pytest.mark.parametrize(
    ("kernel", "file", "old", "new"),
    [
        pytest.param(QUANTIZE, "numeric.cuh", "__fdiv_rn(x, scale)", "__fdividef(x, scale)", id="approximate division"),
        pytest.param(GEMM, "numeric.cuh", "__fadd_rn(__fmul_rn(", "__fmaf_rn(1.0f, __fmul_rn(", id="fused"),
    ],
)
def test_ptx_that_breaks_the_contract_is_noticed(kernel: Kernel, file: str, old: str, new: str, tmp_path: Path):
    folder = alone(kernel, tmp_path)
    text = (folder / file).read_text(encoding="utf-8")
    assert old in text
    (folder / file).write_text(text.replace(old, new), encoding="utf-8")
    assert forbidden(compiled(kernel.module, 80, NEWEST, folder).ptx) != []


# Says where the compiled module is, in a process that cannot compile.
FOUND = """
from haq_lab.int8.cuda import nvrtc
del nvrtc.Compiler.compile
print(nvrtc.cubin_file("dequant", 80, nvrtc.default_compiler({major})))
"""


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiled module in a cache of its own."""
    monkeypatch.setenv("HAQ_LAB_CACHE", str(tmp_path))
    path = cubin_file("dequant", 80, compiler(NEWEST))
    assert path.is_relative_to(tmp_path)
    return path


def test_a_compiled_module_is_kept_on_disk_for_other_processes(cached: Path):
    assert cached.read_bytes() == compiled("dequant", 80, NEWEST).cubin
    command = [sys.executable, "-c", FOUND.format(major=NEWEST)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(cached)


def test_each_architecture_and_each_text_is_compiled_for_itself(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert cubin_file("dequant", 86, compiler(NEWEST)) != cached
    folder = alone(DEQUANT, tmp_path)
    header = folder / "numeric.cuh"
    header.write_text(header.read_text(encoding="utf-8").replace("#pragma once", "// changed"), encoding="utf-8")
    monkeypatch.setattr("haq_lab.int8.cuda.sources.bundled", lambda name: folder)
    assert cubin_file("dequant", 80, compiler(NEWEST)) != cached
    assert cached.exists()


@pytest.mark.parametrize("damage", [lambda cubin: cubin[:-1], lambda cubin: b"\0" + cubin[1:], lambda cubin: b""])
def test_a_damaged_file_is_compiled_again(cached: Path, damage: Callable[[bytes], bytes]):
    whole = cached.read_bytes()
    cached.write_bytes(damage(whole))
    assert cubin_file("dequant", 80, compiler(NEWEST)).read_bytes() == whole


def test_an_architecture_that_the_compiler_does_not_know_is_named():
    with pytest.raises(UserError, match="not for sm_70"):
        compiler(NEWEST).compile("", 70)


def test_an_error_in_the_source_shows_the_compilers_log():
    with pytest.raises(RuntimeError, match="undefined_thing"):
        compiler(NEWEST).compile("__global__ void k() { undefined_thing(); }", 80)


def test_the_default_compiler_is_the_one_asked_for():
    for major in MAJORS:
        expected = compiler(major).version
        assert default_compiler(major).version == expected
