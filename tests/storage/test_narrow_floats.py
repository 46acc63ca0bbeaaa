"""Float8 and MXFP4 weights become the floats that their levels and scales stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from haq_lab.storage.narrow_floats import refused_format, stored_parts, widen_float8, widen_mxfp4

sizes = st.integers(1, 9)


def levels_of(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(torch.float8_e4m3fn)


@given(rows=sizes, columns=sizes, block=st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_each_block_has_its_scale(rows, columns, block):
    levels = levels_of(rows, columns)
    scales = 2.0 ** torch.randint(-3, 3, (-(-rows // block[0]), -(-columns // block[1])))
    wide = widen_float8(levels, scales, torch.float32, block)
    for row in range(rows):
        for column in range(columns):
            expected = levels[row, column].float() * scales[row // block[0], column // block[1]]
            assert wide[row, column] == expected


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_for_the_tensor(shape):
    levels = levels_of(6, 4)
    assert torch.equal(widen_float8(levels, torch.full(shape, 0.5), torch.bfloat16), (levels.float() / 2).bfloat16())


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_one_scale_for_each_row(shape):
    levels, scales = levels_of(6, 4), torch.rand(6)
    assert torch.equal(widen_float8(levels, scales.view(shape), torch.float32), levels.float() * scales[:, None])


def test_fused_experts_have_blocks_too():
    levels, scales = levels_of(3, 8, 4), torch.rand(3, 2, 2)
    wide = widen_float8(levels, scales, torch.float32, (4, 2))
    for number in range(3):
        assert torch.equal(wide[number], widen_float8(levels[number], scales[number], torch.float32, (4, 2)))


@pytest.mark.parametrize("shape", [(3, 1), (7,), (2, 5)])
def test_scales_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=r"do not fit weights \(6, 4\)"):
        widen_float8(levels_of(6, 4), torch.ones(shape), torch.float32, (128, 128))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_is_read_as_by_transformers(dtype):
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 140, (3, 10, 2), dtype=torch.uint8, generator=generator)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    ours = widen_mxfp4(blocks, scales, dtype)
    assert ours.shape == (3, 64, 10)
    assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="do not fit blocks"):
        widen_mxfp4(blocks, scales[:, :, :1], dtype)


def test_weights_and_their_scales_have_one_name():
    names = ["a.weight", "a.weight_scale_inv", "b.weight", "b.weight_scale", "b.input_scale", "c.bias", "e_blocks"]
    names += ["experts.down_proj_blocks", "experts.down_proj_scales", "experts.down_proj_bias"]
    assert stored_parts(names) == {
        "a.weight": ("a.weight", "a.weight_scale_inv"),
        "b.weight": ("b.weight", "b.weight_scale"),
        "c.bias": ("c.bias",),
        "e_blocks": ("e_blocks",),
        "experts.down_proj": ("experts.down_proj_blocks", "experts.down_proj_scales"),
        "experts.down_proj_bias": ("experts.down_proj_bias",),
    }


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, None),
        ({"quant_method": "mxfp4"}, None),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, None),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors, pack-quantized"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt, NVFP4"),
        ({"quant_method": "gptq", "bits": 4}, "gptq, 4 bits"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
    ],
)
def test_formats_of_integers_have_a_name(config, name):
    assert refused_format(config) == name
