"""The cuda backend gives the reference backend's bits: its kernels run on the host layer here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig
from two_tiers import SeparateMemoryStreams, TwoTiers

from haq_lab.calibration.statistics import CalibrationPolicy
from haq_lab.int8.backend import Backend, PackedLinear, ReferenceBackend
from haq_lab.int8.cpu.backend import CpuBackend
from haq_lab.int8.cuda.backend import CudaBackend
from haq_lab.int8.cuda.kernels import Kernels
from haq_lab.int8.linear import Int8Linear, MergedLinear, weight_bytes
from haq_lab.int8.weight_format import WeightFormat
from haq_lab.models.int8_experts import Int8Experts
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import TinyModel
from haq_lab.offload.costs import measured as measured_costs
from haq_lab.offload.session import OffloadSession
from haq_lab.offload.settings import Offload
from haq_lab.offload.tiers.cuda_streams import Streams
from haq_lab.pipeline.sequential import PassInputs, sequential_pass
from haq_lab.quantizers.apply import quantize_group
from haq_lab.quantizers.rtn import RTN
from haq_lab.result_cache.store import Store
from haq_lab.runtime import equivalence
from haq_lab.runtime.deploy import deploy
from haq_lab.runtime.fusion import GatedMlp, QuantizedNorm
from haq_lab.runtime.grouped_experts import GroupedExperts
from haq_lab.utils.errors import UserError

from .checks import FLOATS, Draw
from .host import HostRunner
from .reference import assert_same_bits


@pytest.mark.parametrize("scheme", ["token", "tensor", "static"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("m", "k"), [(3, 64), (21, 200)])
def test_a_linear_has_the_references_bits(host: Kernels, m, k, dtype, scheme):
    draw = Draw(7)
    x, qw, sw = draw.activations(m, k, dtype), draw.int8(37, k), draw.scale(37)
    for bias in (None, draw.normal(37, dtype=dtype)):
        static = draw.scale(1)[0] if scheme == "static" else None
        results = [
            backend.linear(x, PackedLinear(backend.pack(qw), sw, bias), scheme, static)
            for backend in (CudaBackend("cpu", host), ReferenceBackend())
        ]
        assert_same_bits(*results)


FORMATS = [WeightFormat(4, group) for group in (None, 128, 64, 32)]


@pytest.mark.parametrize("scheme", ["token", "static"])
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: str(format.group))
@pytest.mark.parametrize(("m", "k"), [(0, 64), (1, 576), (3, 40), (8, 200), (9, 576), (40, 48)])
def test_a_linear_with_4_bit_weights_has_the_references_bits(host: Kernels, host_runner, m, k, format, scheme):
    """Widths that are no multiple of a block, and a last group that is shorter: 576 is 4 x 128 and 64."""
    draw, backends = Draw(7), (CudaBackend("cpu", host), ReferenceBackend())
    x, levels, scale = draw.normal(m, k), draw.int4(37, k), draw.scale(*format.scale_shape(37, k))
    static = draw.scale(1)[0] if scheme == "static" else None
    host_runner.launches.clear()
    for rotation in (1, 8):
        for dtype in (*FLOATS, torch.float64):
            for bias in (None, draw.normal(37, dtype=dtype)):
                assert_same_bits(
                    *(
                        backend.linear(
                            x.to(dtype),
                            PackedLinear(backend.pack(levels, format), scale, bias, format),
                            scheme,
                            static,
                            rotation=rotation,
                        )
                        for backend in backends
                    )
                )
    products = {launch.module for launch in host_runner.launches} - {"quantize"}
    assert products == ({"gemv4"} if 0 < m <= 8 else {"gemm4"} if m else set())


@pytest.mark.parametrize("k", [32, 40, 576])
def test_4_bit_weights_are_held_in_half_the_bytes_and_come_back(host: Kernels, k):
    backend, levels = CudaBackend("cpu", host), Draw(9).int4(5, k)
    levels[0] = -7
    packed = backend.pack(levels, FORMATS[2])
    assert packed.nbytes == 5 * 16 * -(-k // 32), "16 bytes for 32 columns"
    assert_same_bits(backend.unpack(packed, 5, k, FORMATS[2]), levels)
    linear = Int8Linear(levels, Draw(9).scale(-(-k // 64), 5), None, "token", None, backend, format=FORMATS[2])
    assert weight_bytes(linear) == packed.nbytes + linear.weight_scale.nbytes
    wanted = ReferenceBackend().dequantize(FORMATS[2].stored(levels), linear.weight_scale, k, torch.float16, FORMATS[2])
    assert_same_bits(backend.dequantize(packed, linear.weight_scale, k, torch.float16, FORMATS[2]), wanted)


def test_4_bit_linears_that_are_merged_have_the_references_bits(host: Kernels):
    """Scales of each member are then columns of one matrix, and its weights are rows of another."""
    draw, outputs = Draw(12), []
    parts = [(draw.int4(rows, 72), draw.scale(2, rows), draw.normal(rows)) for rows in (24, 8, 8)]
    x = draw.normal(3, 72)
    for backend in (CudaBackend("cpu", host), ReferenceBackend()):
        linears = [Int8Linear(*part, "token", None, backend, format=WeightFormat(4, 64)) for part in parts]
        MergedLinear(linears)
        quantized = backend.quantize(x, "token", None)
        outputs.append([linear(x) for linear in linears] + [linear.product(*quantized) for linear in linears])
    for got, wanted in zip(*outputs, strict=True):
        assert_same_bits(got, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qx": (2, 48)}, "K: 48 is not a multiple of 32"),
        ({"packed": (3, 64)}, r"packed: \(3, 64\) torch\.uint8 is not \(3, 32\)"),
        ({"sw": (3, 3)}, r"sw: \(3, 3\) torch\.float32 is not \(2, 3\)"),
        ({"group": 48}, "group: 48 is not one of 128, 64, 32"),
        ({"qx": (9, 64), "sx": (9,)}, "at most 8 rows, not 9"),
    ],
)
def test_4_bit_arguments_that_do_not_fit_are_refused_by_name(host: Kernels, change, message):
    sizes = {"qx": (2, 64), "packed": (3, 32), "sx": (2,), "sw": (2, 3), "group": 32} | change
    qx, packed = torch.ones(sizes["qx"], dtype=torch.int8), torch.ones(sizes["packed"], dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        host.four_bit.gemv(
            qx, packed, torch.ones(sizes["sx"]), torch.ones(sizes["sw"]), None, torch.float32, sizes["group"]
        )


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy that starts one element after a boundary of 16 bytes."""
    copy = torch.empty(tensor.numel() + 16, dtype=tensor.dtype)[1 : 1 + tensor.numel()].view(tensor.shape)
    assert copy.data_ptr() % 16
    return copy.copy_(tensor)


@pytest.mark.parametrize("scheme", ["token", "tensor", "static"])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize(
    ("m", "k", "change"),
    [
        (3, 64, misaligned),
        (21, 40, misaligned),
        (21, 64, lambda tensor: tensor.repeat_interleave(2, dim=-1)[..., ::2]),
        (0, 64, torch.clone),
        (0, 40, torch.clone),
    ],
)
def test_a_linear_takes_every_tensor_that_the_reference_takes(host: Kernels, m, k, change, dtype, scheme):
    """Slices that are not contiguous or not aligned, no rows, and float64."""
    draw = Draw(7)
    x, levels, scale, bias = draw.normal(m, k).to(dtype), draw.int8(37, k), draw.scale(37), draw.normal(37)
    static = change(draw.scale(1))[0] if scheme == "static" else None
    cuda, reference = CudaBackend("cpu", host), ReferenceBackend()
    changed = PackedLinear(change(cuda.pack(levels)), change(scale), change(bias))
    actual = cuda.linear(change(x), changed, scheme, static)
    expected = reference.linear(x, PackedLinear(levels, scale, bias), scheme, static)
    assert_same_bits(actual, expected)
    quantized, row_scale = cuda.quantize(x, scheme, static)
    assert_same_bits(cuda.product(change(quantized), change(row_scale), changed, dtype), expected)


def test_misaligned_weights_are_dequantized(host: Kernels):
    levels, scale = Draw(11).int8(7, 64), Draw(11).scale(7)
    expected = ReferenceBackend().dequantize(levels, scale, 64, torch.float16)
    actual = CudaBackend("cpu", host).dequantize(misaligned(levels), misaligned(scale), 64, torch.float16)
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("scheme", ["token", "tensor", "static"])
@pytest.mark.parametrize("k", [64, 40])
def test_an_activation_has_the_references_bits_on_every_backend(host: Kernels, k, scheme):
    """So that an expert may run on the GPU or on the CPU beside it."""
    draw = Draw(17)
    gate, up = draw.normal(5, k), draw.normal(5, k)
    static = draw.scale(1)[0] if scheme == "static" else None
    wanted = ReferenceBackend().swiglu_quantize(gate, up, scheme, static)
    for backend in (CudaBackend("cpu", host), CpuBackend()):
        levels, scale = backend.swiglu_quantize(gate, up, scheme, static)
        assert_same_bits(levels[:, :k], wanted[0])
        assert_same_bits(scale.flatten(), wanted[1].flatten())


def test_sums_are_the_references(host: Kernels):
    draw = Draw(8)
    qx, qw = draw.int8(5, 40), draw.int8(9, 40)
    assert_same_bits(CudaBackend("cpu", host).accumulate(qx, qw), ReferenceBackend().accumulate(qx, qw))


def test_packed_weights_give_their_levels_back(host: Kernels):
    backend, levels = CudaBackend("cpu", host), Draw(9).int8(5, 40)
    packed = backend.pack(levels)
    assert packed.shape == (5, 48)
    assert_same_bits(backend.unpack(packed, 5, 40), levels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k", [40, 64])
def test_dequantized_weights_have_torchs_bits(host: Kernels, k, dtype):
    """Also where the floats are subnormal or overflow, and where rows are padded."""
    levels, scale = Draw(10).int8(7, k), Draw(10).scale(7)
    scale[1], scale[2] = 2.0**-24, 2.0**127  # float16's least number; beyond what either type holds
    ours, torchs = CudaBackend("cpu", host), ReferenceBackend()
    got = ours.dequantize(ours.pack(levels), scale, k, dtype)
    assert got.shape == (7, k)
    assert_same_bits(got, torchs.dequantize(torchs.pack(levels), scale, k, dtype))
    assert got[2].isinf().any()


def test_without_a_gpu_the_choice_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="backend=cuda needs an NVIDIA GPU"):
        CudaBackend()


@pytest.mark.parametrize(("device", "message"), [("gpu0", "is not a device"), ("cpu", "is not a GPU")])
def test_another_device_is_refused(device, message):
    with pytest.raises(UserError, match=rf"backend\.device: '{device}' {message}\. Choose cuda"):
        CudaBackend(device)


def test_a_gpu_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "cupy", object())
    with pytest.raises(UserError, match=r"backend\.device: 'cuda:5' does not exist\. Choose cuda:0 to cuda:1"):
        CudaBackend("cuda:5")


INT8_RTN = RTN()


def logits_of(
    model: LayeredModel, backend: Backend, prompt: torch.Tensor, quantizer: RTN = INT8_RTN
) -> tuple[torch.Tensor, ...]:
    """Of the deployed model's prompt and next token, and of the pass."""
    layers: list[torch.nn.Module] = []
    passed = sequential_pass(
        PassInputs(model, quantizer, backend, prompt, "quantized", {"text": prompt}),
        lambda index, layer: layers.append(layer),
    )
    whole = deploy(model.assemble(layers), model, backend)
    output = whole(prompt, use_cache=True)
    step = whole(prompt[:, :1], cache=output.cache, use_cache=True)
    return output.logits, step.logits, model.head(passed.hidden["text"]["quantized"])


@pytest.mark.parametrize("quantizer", [RTN(), RTN(weight_bits=4, group=32)], ids=["int8", "int4"])
def test_products_alone_generate_the_references_bits(host: Kernels, quantizer: RTN):
    """The whole way of a run, on the host layer in place of a GPU."""
    model = LayeredModel(TinyModel("llama").folder())
    prompt = torch.randint(0, 257, (1, 9))
    backend = CudaBackend("cpu", host)
    backend.fused_kernels = None
    ours, reference = (logits_of(model, one, prompt, quantizer) for one in (backend, ReferenceBackend()))
    for got, wanted in zip(ours, reference, strict=True):
        assert_same_bits(got, wanted)


@pytest.mark.parametrize(
    ("architecture", "fused"),
    [
        ("llama", {"rmsnorm_quantize_f32", "swiglu_quantize_f32"}),
        ("opt", {"layernorm_quantize_f32"}),
        ("mixtral", {"rmsnorm_quantize_f32", "swiglu_quantize_f32", "grouped_16x64_f32"}),
    ],
)
def test_a_deployed_model_generates_as_the_reference_does(
    host: Kernels, host_runner: HostRunner, architecture: str, fused: set[str]
):
    """With fused norms, activations and experts, whose last places differ; the pass measures without them."""
    model = LayeredModel(TinyModel(architecture).folder())
    prompt = torch.randint(0, 257, (1, 9))
    host_runner.launches.clear()
    *got, measured = logits_of(model, CudaBackend("cpu", host), prompt)
    assert fused <= {launch.kernel for launch in host_runner.launches}
    *wanted, reference = logits_of(model, ReferenceBackend(), prompt)
    assert_same_bits(measured, reference)
    for ours, theirs in zip(got, wanted, strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm(), "values that fall to another level are rare and small"


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_weights_and_a_deployed_model_lie_on_the_device(monkeypatch: pytest.MonkeyPatch, architecture):
    """`meta` stands for a GPU: another device than the CPU, that any machine has. It has no numbers to try with."""
    for part in (QuantizedNorm, GatedMlp):
        monkeypatch.setattr(part, "reproduces", lambda *tried: True)
    monkeypatch.setattr(equivalence, "nearly_equal", lambda *tried: True)
    model = LayeredModel(TinyModel(architecture).folder())
    idle = Kernels(lambda launch: None, architecture=80, multiprocessors=4, shared_limit=64 * 1024)
    backend = CudaBackend("meta", idle)
    layer = model.load_layer(0)
    for group in model.groups_of(0):
        quantize_group(layer, 0, group, RTN(), None, None, backend)
    assert layer.self_attn.q_proj.packed.is_meta
    if model.family.moe is not None:
        layer.mlp.experts = Int8Experts.of(layer.mlp.experts)
    whole = deploy(model.assemble([layer]), model, backend)
    assert all(tensor.is_meta for tensor in [*whole.parameters(), *whole.buffers()])
    assert layer.self_attn.q_proj.merged.weight_scale.is_meta
    held = [value for module in layer.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
    assert all(tensor.is_meta for tensor in held), "and what is no parameter"
    assert isinstance(layer.input_layernorm, QuantizedNorm)
    assert isinstance(*((layer.mlp, GatedMlp) if model.family.moe is None else (layer.mlp.experts, GroupedExperts)))


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral whose experts' rows, of 40 and 56 columns, are packed with zeros after them."""
    folder = tmp_path_factory.mktemp("odd")
    sizes = {"hidden_size": 40, "intermediate_size": 56, "num_attention_heads": 2, "num_key_value_heads": 1}
    more = {"num_hidden_layers": 2, "num_local_experts": 4, "vocab_size": 257, "max_position_embeddings": 128}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MixtralConfig(**sizes, **more)).save_pretrained(folder)
    return folder


def test_offloaded_experts_keep_the_padded_layout(host: Kernels, odd: Path):
    """Of slots for three of eight experts, on the host layer in place of a GPU."""
    placed = TwoTiers(CudaBackend("cpu", host), Streams(), odd, steps=2)
    engine, whole = placed.engine("lru", slots=1, prefetch="gate")
    shapes = {part.name: part.shape for part in engine.slow_tier.layouts.distinct[0].parts}
    assert (shapes["gate_proj.packed"], shapes["down_proj.packed"]) == ((56, 48), (40, 64))
    assert_same_bits(placed.generate(whole), placed.expected)
    assert engine.counters.read.sum() > 7, "experts have come and gone"
    engine.close()


@pytest.mark.parametrize("rule", ["none", "lru"])
def test_experts_run_on_the_device_or_beside_it_and_no_bit_tells(host: Kernels, rule: str):
    """Grouped and fused with all of them on the device; by twos beside it, on the CPU, and fetched and packed anew."""
    placed = TwoTiers(CudaBackend("cpu", host), SeparateMemoryStreams("cpu"), steps=3)
    ran: list[int] = []

    def decide(present: dict[int, int], missing: dict[int, int]) -> list[int]:
        beside = list(missing)[::2]
        ran.extend(beside)
        return beside

    engine, whole = placed.engine(rule, slots=4, prefetch="gate", decide=decide)
    assert_same_bits(placed.generate(whole), placed.expected)
    engine.check()
    assert ran
    assert engine.counters.read.sum() > 0, "others were fetched"
    assert {part.shape for part in engine.slow_tier.layouts.distinct[0].parts if part.name == "gate_proj.packed"} == {
        (96, 64)
    }
    engine.close()
    whole_offload, other = placed.engine(rule, slots=4)
    assert_same_bits(placed.generate(other), placed.expected)
    whole_offload.close()


def test_a_session_decides_by_measured_costs_where_experts_run(host: Kernels, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(measured_costs, "TOKENS", (1,))
    monkeypatch.setattr(measured_costs, "REPEATS", 1)
    backend, outputs = CudaBackend("cpu", host), []
    windows = torch.randint(0, 257, (2, 32), generator=torch.Generator().manual_seed(1))
    for offload in (None, Offload(budget="30%", spare=2, eviction="lru", on_miss="predict")):
        model, layers = LayeredModel(TinyModel("mixtral").folder()), []
        session = offload and OffloadSession(offload, None, model, tmp_path, Store(), SeparateMemoryStreams("cpu"))

        def finished(index: int, layer: torch.nn.Module, session=session, layers=layers) -> None:
            if session is not None:
                session.add(layer)
            layers.append(layer)

        sequential_pass(PassInputs(model, RTN(), backend, None, CalibrationPolicy(), {}), finished)
        if session is not None:
            session.find_profile(None, windows, "random")
        whole = deploy(model.assemble(layers), model, backend)
        if session is not None:
            session.engage(layers)
        outputs.append(whole(windows[:1, :8]).logits)
        if session is not None:
            assert session.metrics()["offload.hit_rate_pairs"] < 1
            session.close()
    assert_same_bits(*outputs)
