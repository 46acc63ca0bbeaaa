"""Test that half the sensitivity times the variance of a small disturbance is the KL divergence that it causes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from haq_lab.calibration.sensitivity import _differentiate_head, _draw_labels, measure_sensitivity
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import TinyModel
from haq_lab.storage.hidden_state_buffer import HiddenStateBuffer


def predictions(
    model: LayeredModel, windows: Tensor, at: int = 0, noisy: str = "", side: str = "in", size: float = 0.0
) -> Tensor:
    """Log-probabilities (n, t, vocabulary), with Gaussian noise at one linear of layer `at`."""
    hidden = model.embed(windows)
    for index in range(model.depth):
        layer = model.load_layer(index)
        if index == at and noisy:
            linear = layer.get_submodule(noisy)
            if side == "in":
                linear.register_forward_pre_hook(lambda _, x: (x[0] + size * torch.randn_like(x[0]),))
            else:
                linear.register_forward_hook(lambda _, x, y: y + size * torch.randn_like(y))
        hidden = model.run(layer, index, hidden)
    return F.log_softmax(model.head(hidden), -1)


@pytest.fixture(scope="module")
def measured() -> dict[str, tuple[LayeredModel, Tensor, list]]:
    """Each tiny model with windows and its sensitivity."""
    windows = torch.randint(0, 257, (24, 32), generator=torch.Generator().manual_seed(2))
    models = {name: LayeredModel(TinyModel(name).folder()) for name in ("opt", "llama", "mixtral")}  # type: ignore[arg-type]
    with torch.no_grad():
        return {
            name: (model, windows, measure_sensitivity(model, windows, HiddenStateBuffer()))
            for name, model in models.items()
        }


@pytest.mark.parametrize(
    ("architecture", "at", "linear"),
    [
        ("opt", 0, "self_attn.out_proj"),
        ("opt", 0, "fc2"),
        ("llama", 0, "self_attn.o_proj"),
        ("llama", 0, "mlp.down_proj"),
        (
            "mixtral",
            -1,
            "mlp.experts.1.down_proj",
        ),  # the last layer: a later router's choice jumps, and has no gradient
    ],
)
@pytest.mark.parametrize("side", ["in", "out"])
def test_half_the_sensitivity_times_the_noise_is_the_divergence(measured, architecture, at, linear, side):
    model, windows, found = measured[architecture]
    clean = predictions(model, windows)
    known = found[at][linear]
    total = float((known.channels if side == "in" else known.outputs).sum())
    size = (2 * 2e-4 / total) ** 0.5  # aims at a divergence of 2e-4 nats
    noisy = [predictions(model, windows, at % model.depth, linear, side, size) for _ in range(8)]
    divergence = sum(float(F.kl_div(other, clean, reduction="sum", log_target=True)) for other in noisy)
    assert divergence / len(noisy) / windows.numel() == pytest.approx(2e-4, rel=0.25)


def test_labels_are_drawn_by_their_probabilities():
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    labels = _draw_labels(probabilities.expand(20000, 6), torch.Generator().manual_seed(0))
    assert labels.shape == (20000, 1)
    shares = labels.flatten().bincount(minlength=6) / 20000
    assert (shares[probabilities == 0] == 0).all()
    torch.testing.assert_close(shares, probabilities, rtol=0, atol=0.015)


def test_linears_that_share_an_input_are_disturbed_together(measured):
    """The gradient is the sum over q, k and v, not the gradient of one of them."""
    model, _windows, found = measured["llama"]
    known = found[0]["self_attn.q_proj"]
    weights = [model.load_layer(0).get_submodule(f"self_attn.{name}_proj").weight for name in "qkv"]
    assert len(known.outputs) == sum(len(weight) for weight in weights)
    # Were the outputs' gradients uncorrelated, the inputs' would follow from them.
    expected = torch.cat(weights).square().t() @ known.outputs
    assert 0.2 < float(known.channels.sum() / expected.sum()) < 5


def test_every_group_of_every_layer_has_one(measured):
    for model, _, found in measured.values():
        assert len(found) == model.depth
        for layer in found:
            assert set(layer) == {group.site for group in model.groups_of(0)}
            assert all(torch.isfinite(known.channels).all() and known.channels.sum() > 0 for known in layer.values())


def test_it_is_repeatable(measured):
    model, windows, found = measured["mixtral"]
    again = measure_sensitivity(model, windows, HiddenStateBuffer(limit=0))
    for before, after in zip(found, again, strict=True):
        for site, known in before.items():
            assert torch.equal(known.channels, after[site].channels)


def test_a_shared_input_counts_all_of_its_readers():
    """q, k and v of the last layer read its first norm: theirs is the squared gradient at the norm's output."""
    model = LayeredModel(TinyModel("llama").folder())
    windows = torch.randint(0, 257, (3, 16), generator=torch.Generator().manual_seed(3))
    hidden = model.embed(windows)
    for index in range(model.depth - 1):
        hidden = model.run(model.load_layer(index), index, hidden)
    layer, last = model.load_layer(model.depth - 1), model.depth - 1
    after = model.run(layer, last, hidden.clone())
    _differentiate_head(model, after)
    outputs = []

    def keep(module, arguments, output):
        output.retain_grad()
        outputs.append(output)

    layer.input_layernorm.register_forward_hook(keep)
    with torch.enable_grad():
        model.forward(layer, last, hidden.clone().requires_grad_()).backward(after)
    wanted = outputs[0].grad.double().square().sum((0, 1)) / windows.numel()
    found = measure_sensitivity(model, windows, HiddenStateBuffer())[-1]["self_attn.q_proj"]
    torch.testing.assert_close(found.channels.double(), wanted, rtol=1e-4, atol=1e-12)
