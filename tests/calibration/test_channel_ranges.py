"""Test the ranges of the inputs, and that a run writes them."""

from __future__ import annotations

import torch
from launching import TINY, launch

from haq_lab.calibration.channel_ranges import FILE, Ranges


def test_saved_ranges_are_read_unchanged(tmp_path):
    ranges = Ranges()
    for layer in range(3):
        ranges.add("mlp.gate_proj", torch.rand(8) + layer, torch.rand(8))
    ranges.save(tmp_path / FILE)
    back = Ranges.open(tmp_path / FILE)
    for mine, other in ((ranges.before, back.before), (ranges.after, back.after)):
        assert torch.equal(torch.stack(mine["mlp.gate_proj"]), torch.stack(other["mlp.gate_proj"]))


def test_a_run_writes_them_and_smoothing_lowers_the_largest(tmp_path):
    outcome = launch(*TINY, "quantizer=smoothquant", f"hydra.run.dir={tmp_path}")
    assert outcome.code == 0, outcome.err
    ranges = Ranges.open(tmp_path / FILE)
    before, after = (torch.stack(sites["self_attn.q_proj"]) for sites in (ranges.before, ranges.after))
    assert before.shape == after.shape == (2, 64)
    assert ((after.amax(1) / after.median(1).values) < (before.amax(1) / before.median(1).values)).all()
    assert torch.equal(*(torch.stack(sites["self_attn.o_proj"]) for sites in (ranges.before, ranges.after)))
    assert sorted(ranges.smoothed) == ["mlp.gate_proj", "self_attn.q_proj"]


def test_experts_own_inputs_are_left_out(tmp_path):
    model = ["model=tiny_mixtral", "model.layers=1", "quantizer=smoothquant"]
    assert launch(*TINY, *model, f"hydra.run.dir={tmp_path}").code == 0
    assert set(Ranges.open(tmp_path / FILE).before) == {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate"}


def test_layers_of_another_width_have_their_own_name():
    ranges = Ranges()
    for width in (4, 2, 4, 2):
        ranges.add("o_proj", torch.full((width,), 2.0), torch.ones(width))
    found = Ranges.of(ranges.tensors())
    assert {site: [len(row) for row in rows] for site, rows in found.before.items()} == {
        "o_proj": [4, 4],
        "o_proj (2 channels)": [2, 2],
    }
    assert found.smoothed == ["o_proj", "o_proj (2 channels)"]
