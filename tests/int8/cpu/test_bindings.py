"""The CPU kernels against NumPy, bit for bit, at every instruction set that this CPU can run.

References work in float64, where int8 sums of any depth used here are exact, or in NumPy float32, whose
single operations round as the contract says.
"""

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from haq_lab.int8.cpu import bindings as native
from haq_lab.int8.cpu import build as native_build
from haq_lab.int8.cpu import library
from haq_lab.int8.cpu.float_linear import float_linear
from haq_lab.utils.errors import UserError
from tests.kernels.reference import swiglu

if not library.available():
    pytest.skip(f"no CPU kernels here: {library.unavailable_reason()}", allow_module_level=True)

ISAS = library.isas()
isas = pytest.mark.parametrize("isa", ISAS)
# Depths around groups of 4 and chunks of 32 and 64; widths around panels of 32; rows around tiles of 4, 6, 14
# and twice 16. Depths of several steps of 640 are in the tests of extremes and threads.
shapes = st.tuples(
    st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 14, 15, 16, 17, 23, 24, 25, 29, 32, 33]),
    st.sampled_from([1, 2, 31, 32, 33, 64, 65, 100]),
    st.sampled_from([1, 3, 4, 5, 31, 33, 63, 64, 65, 100, 128, 257, 576]),
)
seeds = st.integers(0, 2**32 - 1)
many = settings(max_examples=30, deadline=None, derandomize=True)


def int8s(rng, *shape, low=-127):
    return rng.integers(low, 128, shape, dtype=np.int8)


def exact(qx, qw):
    return (qx.astype(np.float64) @ qw.astype(np.float64).T).astype(np.int32)


def quantized(x, scale=None):
    """The contract in NumPy: q int8 (M, K) and the scale of each row, float32 (M,)."""
    if scale is None:
        largest = np.abs(x).max(axis=1, initial=0)
        scales = largest / np.float32(127)
        scales[scales == 0] = 1
    else:
        scales = np.full(x.shape[0], scale, np.float32)
    return np.clip(np.rint(x / scales[:, None]), -127, 127).astype(np.int8), scales


def epilogue(acc, row_scale, column_scale, bias):
    y = (acc.astype(np.float32) * row_scale[:, None]) * column_scale
    return y if bias is None else y + bias


def values(rng, m, k):
    """Rows of very different sizes, some of zeros, some with many ties at half a step."""
    x = rng.standard_normal((m, k)).astype(np.float32)
    x *= np.exp2(rng.integers(-30, 30, (m, 1))).astype(np.float32)
    kind = rng.integers(0, 4, m)
    x[kind == 0] = 0
    ties = rng.integers(-253, 254, (m, k)).astype(np.float32) / 2
    ties[:, 0] = 127  # the scale is 1, so that halves are ties
    x[kind == 1] = ties[kind == 1]
    return x


def same(got, wanted):
    got = got.numpy()
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    np.testing.assert_array_equal(got, wanted)


@isas
@many
@given(shapes, seeds)
def test_accumulate_is_exact(isa, shape, seed):
    m, n, k = shape
    rng = np.random.default_rng(seed)
    qx, qw = int8s(rng, m, k, low=-128), int8s(rng, n, k, low=-128)
    with library.forced_isa(isa):
        same(native.accumulate(torch.from_numpy(qx), native.pack(torch.from_numpy(qw))), exact(qx, qw))


@isas
@pytest.mark.parametrize("depth", [64, 2047, 2048, 2052, 5000, 16384])
@pytest.mark.parametrize("rows", [1, 3, 30])
@pytest.mark.parametrize(("left", "right"), [(127, 127), (-127, 127), (127, -127), (-127, -127), (-128, -128)])
def test_extremes_do_not_saturate(isa, depth, rows, left, right):
    qx = torch.full((rows, depth), left, dtype=torch.int8)
    qw = torch.full((33, depth), right, dtype=torch.int8)
    with library.forced_isa(isa):
        acc = native.accumulate(qx, native.pack(qw))
    assert acc.dtype == torch.int32
    assert (acc == left * right * depth).all()


@isas
@many
@given(st.integers(0, 9), st.integers(1, 200), seeds)
def test_quantization_is_bit_identical_to_torch(isa, m, k, seed):
    x = values(np.random.default_rng(seed), m, k)
    with library.forced_isa(isa):
        q, scale = native.quantize_rows(torch.from_numpy(x))
        wanted_q, wanted_scale = quantized(x)
        same(q, wanted_q)
        same(scale, wanted_scale)
        by_torch = torch.round(torch.from_numpy(x) / scale[:, None]).clamp(-127, 127)
        assert torch.equal(q.float(), by_torch)
        same(native.quantize_static(torch.from_numpy(x), 0.37), quantized(x, np.float32(0.37))[0])


@isas
def test_quotients_beside_a_half_are_divided(isa):
    """All neighbours of every tie, for scales whose inverse is inexact: where multiplying would go wrong."""
    halves = np.arange(-126.5, 127, dtype=np.float64)
    with library.forced_isa(isa):
        for scale in np.float32([0.1, 0.3, 1 / 3, 0.7, 1.1, 3e-38, 1e-39, 2e36]):
            tie = (halves * np.float64(scale)).astype(np.float32)
            x = np.stack([tie, np.nextafter(tie, np.float32(np.inf)), np.nextafter(tie, np.float32(-np.inf))])
            q = native.quantize_static(torch.from_numpy(x), float(scale))
            same(q, quantized(x, scale)[0])


@isas
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@many
@given(shapes, seeds, st.booleans(), st.sampled_from([None, 0.02]))
def test_linear_is_bit_identical_to_the_definition(isa, dtype, shape, seed, with_bias, activation_scale):
    m, n, k = shape
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(values(rng, m, k)).to(dtype)
    qw = int8s(rng, n, k)
    column_scale = rng.random(n, np.float32) + np.float32(0.01)
    bias = rng.standard_normal(n).astype(np.float32) if with_bias else None
    qx, row_scale = quantized(x.float().numpy(), activation_scale)
    wanted = torch.from_numpy(epilogue(exact(qx, qw), row_scale, column_scale, bias)).to(dtype)
    with library.forced_isa(isa):
        linear = native.Linear(
            native.pack(torch.from_numpy(qw)),
            torch.from_numpy(column_scale),
            None if bias is None else torch.from_numpy(bias),
            activation_scale,
        )
        assert torch.equal(linear(x), wanted)
        out = torch.empty_like(wanted)
        assert linear(x, out) is out
        assert torch.equal(out, wanted)


@isas
@pytest.mark.parametrize(("rows", "depth"), [(1, 300), (5, 300), (100, 1500), (600, 300)])
def test_threads_change_nothing(isa, rows, depth):
    rng = np.random.default_rng(rows)
    qx, qw = torch.from_numpy(int8s(rng, rows, depth)), torch.from_numpy(int8s(rng, 900, depth))
    before = torch.get_num_threads()
    try:
        with library.forced_isa(isa):
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                same(native.accumulate(qx, native.pack(qw)), exact(qx.numpy(), qw.numpy()))
    finally:
        torch.set_num_threads(before)


def test_several_weights_are_one_product():
    rng = np.random.default_rng(0)
    parts = [int8s(rng, n, 50) for n in (3, 40, 1)]
    x = torch.from_numpy(rng.standard_normal((2, 7, 50)).astype(np.float32))
    scale = torch.from_numpy(rng.random(44, np.float32))
    together = native.linear(x, native.pack([torch.from_numpy(p) for p in parts]), scale)
    first = 0
    for part, y in zip(parts, together.split([3, 40, 1], dim=-1), strict=True):
        alone = scale[first : first + len(part)].clone()
        assert torch.equal(y, native.linear(x, native.pack(torch.from_numpy(part)), alone))
        first += len(part)


@isas
def test_nan_reaches_the_output(isa):
    x = torch.ones(2, 70)
    x[1, 66] = float("nan")
    with library.forced_isa(isa):
        y = native.linear(x, native.pack(torch.ones(5, 70, dtype=torch.int8)), torch.ones(5))
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


@isas
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_silu_mul(isa, dtype):
    x = torch.linspace(-100, 100, 3 * 2 * 333).reshape(3, -1).to(dtype)
    gate, up = x.double().chunk(2, dim=-1)
    with library.forced_isa(isa):
        got = native.silu_mul(x)
    wanted = torch.nn.functional.silu(gate) * up
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=1e-30)


@isas
@many
@given(width=st.integers(1, 300), seed=seeds)
def test_silu_mul_is_bit_identical_to_the_cuda_kernels(isa, width, seed):
    gate, up = np.random.default_rng(seed).normal(0, 20, (2, 3, width)).astype(np.float32)
    gate[0, ::7] *= 10  # beyond where exp is clipped
    with library.forced_isa(isa):
        got = native.silu_mul(torch.from_numpy(np.concatenate([gate, up], axis=1)))
    assert torch.equal(got, torch.from_numpy(swiglu(gate, up)))


@isas
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@many
@given(shape=shapes, seed=seeds)
def test_float_linear(isa, dtype, shape, seed):
    m, n, k = shape
    generator = torch.Generator().manual_seed(seed % 2**31)
    x, weight = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator).to(dtype)
    weight[:, ::5] = torch.finfo(dtype).smallest_normal / 4  # denormal numbers widen too
    weight[:, ::7] *= -1000
    with library.forced_isa(isa):
        got = float_linear(x, weight)
        for row in range(m):
            assert torch.equal(float_linear(x[row : row + 1], weight)[0], got[row])
    bound = 1e-7 * (k + 20) * (x.abs().double() @ weight.abs().double().t())
    assert ((got - x.double() @ weight.double().t()).abs() <= bound + 1e-38).all()


@isas
def test_read_bytes_reads_all(isa):
    data = torch.ones(5 << 17, dtype=torch.uint8)
    with library.forced_isa(isa):
        assert native.read_bytes(data) == (5 << 17) // 8 * 0x0101010101010101 % 2**64


def test_wrong_arguments_raise():
    with pytest.raises(ValueError, match="weight must be float32, bfloat16 or float16"):
        float_linear(torch.ones(1, 8), torch.ones(2, 8).double())
    with pytest.raises(ValueError, match="x must be"):
        float_linear(torch.ones(1, 7), torch.ones(2, 8).bfloat16())
    packed = native.pack(torch.ones(4, 8, dtype=torch.int8))
    scale = torch.ones(4)
    with pytest.raises(ValueError, match=r"x must be .* \(\.\.\., 8\)"):
        native.linear(torch.ones(2, 9), packed, scale)
    with pytest.raises(ValueError, match="x must be"):
        native.linear(torch.ones(8, 2).T, packed, scale)
    with pytest.raises(ValueError, match="x must be"):
        native.linear(torch.ones(2, 8, dtype=torch.float64), packed, scale)
    with pytest.raises(ValueError, match="weight_scale must be"):
        native.linear(torch.ones(2, 8), packed, torch.ones(5))
    with pytest.raises(ValueError, match="out must be"):
        native.linear(torch.ones(2, 8), packed, scale, out=torch.ones(2, 5))
    with pytest.raises(ValueError, match="activation scale"):
        native.linear(torch.ones(2, 8), packed, scale, None, 0.0)
    with pytest.raises(ValueError, match="weight must be"):
        native.pack(torch.ones(4, 8))
    with pytest.raises(UserError, match="did you mean 'scalar'"), library.forced_isa("scaler"):
        pass


def test_without_a_compiler_the_reason_is_given(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    loaded, reason = library._load.__wrapped__()
    assert loaded is None
    assert reason.startswith("There is no C++ compiler on the path. Install c++, g++ or clang++")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert library._load.__wrapped__()[1].startswith("CXX: no C++ compiler no-such-compiler is on the path")


def test_the_environment_chooses_the_instruction_set(monkeypatch):
    monkeypatch.setenv("HAQ_LAB_ISA", "scalar")
    assert library._default_level.__wrapped__() == 0
    monkeypatch.setenv("HAQ_LAB_ISA", "avx3")
    with pytest.raises(UserError, match=r"HAQ_LAB_ISA: 'avx3' is not supported by this CPU.*\. Choose one of scalar"):
        library._default_level.__wrapped__()


@pytest.mark.slow
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(tmp_path, sanitizers):
    sources = sorted(native_build.source_folder().glob("*.cpp"))
    driver = Path(__file__).with_name("native_driver.cpp")
    program = tmp_path / "driver"
    command = [*native_build.compiler(), "-std=c++17", "-O1", "-g", "-pthread", "-ffp-contract=off"]
    command += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", f"-I{native_build.source_folder()}"]
    built = subprocess.run([*command, *sources, driver, "-o", program], capture_output=True, text=True)
    if built.returncode != 0 and "cannot find" in built.stderr:
        pytest.skip(f"the compiler has no {sanitizers} sanitizer")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == f"ok {len(ISAS)}"
