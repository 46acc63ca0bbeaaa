"""The scheme `tensor` has one scale per sequence, so a sequence has the same bits alone and in any batch."""

from __future__ import annotations

from threading import Thread

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from haq_lab.int8.backend import Backend, PackedExpert, ReferenceBackend
from haq_lab.int8.cpu.backend import CpuBackend
from haq_lab.int8.linear import Int8Linear, MergedLinear
from haq_lab.int8.numerics import quantize_activations
from haq_lab.int8.sequences import Sequences, batch_of, declare_batches, only_rows, sequences_of

BACKENDS = {"reference": ReferenceBackend(), "cpu": CpuBackend()}  # `fake` multiplies floats, so its bits may differ
LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=5)


def draw(seed: int, rows: int, columns: int) -> Tensor:
    """Draw rows of very different magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.randn(rows, 1, generator=generator).exp()


def linear(backend: Backend, rows: int, columns: int, seed: int = 0) -> Int8Linear:
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)
    scale, bias = torch.rand(rows, generator=generator) + 0.1, torch.randn(rows, generator=generator)
    return Int8Linear(levels, scale, bias, "tensor", None, backend)


@given(LENGTHS, st.integers(1, 40), st.integers(0, 99), st.randoms(use_true_random=False))
def test_scales_equal_those_of_numpy(lengths, columns, seed, random):
    """A sequence's rows may be anywhere in the batch, as after a router."""
    owners = [number for number, length in enumerate(lengths) for _ in range(length)]
    random.shuffle(owners)
    x, index = draw(seed, len(owners), columns), torch.tensor(owners, dtype=torch.long)
    levels, scale = quantize_activations(x, "tensor", None, Sequences(index, len(lengths)))
    for number in set(owners):
        own = (index == number).numpy()
        expected = np.abs(x.numpy()[own]).max() / np.float32(127)
        assert (scale.numpy()[own] == expected).all()
        assert (levels.numpy()[own] == np.rint(x.numpy()[own] / expected)).all()


@pytest.mark.parametrize("name", BACKENDS)
@given(lengths=LENGTHS, seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_every_operation_of_a_backend_gives_a_sequence_the_bits_that_it_has_alone(name, lengths, seed, dtype):
    backend = BACKENDS[name]
    gate, up, down = (linear(backend, *shape).weights for shape in ((16, 24), (16, 24), (24, 16)))
    expert = PackedExpert(*(weights._replace(bias=None) for weights in (gate, up, down)), "tensor")
    owners = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    x = draw(seed, len(owners), 24).to(dtype)

    def run(rows: Tensor, sequences: Sequences | None) -> tuple[Tensor, ...]:
        quantized = backend.quantize(rows, "tensor", None, sequences)
        inner = backend.swiglu_quantize(rows.float(), rows.float() - 1, "tensor", None, sequences)
        multiplied = backend.linear(rows, gate, "tensor", None, sequences)
        return *quantized, *inner, multiplied, backend.expert(*quantized, expert, sequences)

    together = run(x, Sequences(owners, len(lengths)))
    for number, length in enumerate(lengths):
        if length:
            own = owners == number
            for got, expected in zip(together, run(x[own], None), strict=True):
                assert torch.equal(got[own], expected)


def test_zero_rows_and_tiny_rows_share_a_scale():
    """The scale of a zero row alone is 1. In a sequence it must not hide that of smaller rows."""
    x = torch.tensor([[0.0, 0.0], [1e-6, -2e-6], [0.0, 0.0]])
    _, scale = quantize_activations(x, "tensor", None, Sequences(torch.tensor([0, 0, 1]), 2))
    assert scale.flatten().tolist() == pytest.approx([2e-6 / 127, 2e-6 / 127, 1])


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("shape", [(3, 7), (5, 1), (1, 4), (2, 0)])
def test_a_linear_takes_the_sequences_from_the_shape_or_from_the_declared_batch(backend, shape):
    module, other = linear(backend, 32, 24), linear(backend, 64, 24, seed=1)
    merged = [linear(backend, 32, 24), linear(backend, 64, 24, seed=1)]
    MergedLinear(merged)
    x = draw(1, shape[0] * shape[1], 24).view(*shape, 24)
    alone = torch.cat([module(row[None]) for row in x])
    assert torch.equal(module(x), alone)
    assert torch.equal(merged[0](x), alone)
    assert torch.equal(merged[1](x), torch.cat([other(row[None]) for row in x]))
    with batch_of(*shape):
        assert torch.equal(module(x.flatten(0, 1)), alone.flatten(0, 1))
        assert torch.equal(module(x), alone)
    assert sequences_of(x.flatten(0, 1)) is None


def test_selected_rows_keep_their_sequences():
    rows = torch.tensor([5, 0, 4])
    with batch_of(2, 3):
        with only_rows(rows):
            selected = sequences_of(torch.ones(3, 8))
        assert sequences_of(torch.ones(6, 8)).index.tolist() == [0, 0, 0, 1, 1, 1]
    assert selected.index.tolist() == [1, 0, 1]
    with only_rows(rows):
        assert sequences_of(torch.ones(3, 8)) is None, "without a declared batch, all rows are one sequence"


def test_other_schemes_do_not_compute_the_sequences(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Sequences, "of_batch", None)
    module = linear(ReferenceBackend(), 8, 24)
    module.scheme = "token"
    with batch_of(2, 3), only_rows(torch.arange(4)):
        module(draw(0, 4, 24))


def test_a_batch_is_declared_for_its_own_thread_only():
    seen = []
    with batch_of(2, 3):
        thread = Thread(target=lambda: seen.append(sequences_of(torch.ones(6, 8))))
        thread.start()
        thread.join()
    assert seen == [None]


class Model(nn.Module):
    """Flattens its batch before a linear, as OPT does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = linear(ReferenceBackend(), 8, 24)
        declare_batches(self)

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, error=None) -> Tensor:
        x = draw(3, 1, 24) * input_ids[..., None] if inputs_embeds is None else inputs_embeds
        if error is not None:
            raise error
        return self.linear(x.flatten(0, 1)).view(*x.shape[:2], -1)


def test_padding_does_not_change_a_sequence():
    """On either side, given by name or by place, and with earlier tokens in the mask."""
    model, tokens = Model(), torch.tensor([[9.0, 1, 2, 3], [1, 2, 3, 4]])
    expected = model(tokens[:1, 1:])
    left, right = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    assert torch.equal(model(tokens, left)[:1, 1:], expected)
    assert torch.equal(model(attention_mask=left, input_ids=tokens)[:1, 1:], expected)
    assert torch.equal(model(tokens[:1], left[:1])[:, 1:], expected), "a batch of one"
    assert torch.equal(model(tokens.roll(-1, 1), right)[:1, :3], expected)
    assert not torch.equal(model(tokens)[:1, 1:], expected), "without a mask, all tokens count"
    earlier = torch.cat([torch.zeros(2, 5, dtype=torch.long), left], dim=1)
    assert torch.equal(model(tokens, earlier)[:1, 1:], expected)
    embedded = draw(3, 1, 24) * tokens[..., None]
    assert torch.equal(model(inputs_embeds=embedded, attention_mask=left)[:1, 1:], expected)


def test_a_batch_ends_with_the_forward_even_if_it_fails():
    model = Model()
    with pytest.raises(KeyError):
        model(torch.ones(2, 3), error=KeyError())
    assert sequences_of(torch.ones(6, 8)) is None
    with pytest.raises(TypeError):
        model(None)
