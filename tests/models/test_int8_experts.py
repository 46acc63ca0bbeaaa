"""Grouped int8 experts equal a loop over single tokens, bit for bit, for any routing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from haq_lab.int8.backend import FakeBackend, ReferenceBackend
from haq_lab.int8.cpu.backend import CpuBackend
from haq_lab.int8.linear import Int8Linear
from haq_lab.models.experts import Expert, Experts, gated_by
from haq_lab.models.int8_experts import Int8Experts

WIDTH, INNER, COUNT = 24, 16, 5


class Counting(ReferenceBackend):
    """Records every call."""

    def __init__(self):
        self.quantized, self.products = [], []

    def quantize(self, x, scheme, static_scale, sequences=None, rotation=1):
        self.quantized.append(tuple(x.shape))
        return super().quantize(x, scheme, static_scale, sequences, rotation)

    def accumulate(self, qx, qw):
        self.products.append((tuple(qx.shape), tuple(qw.shape)))
        return super().accumulate(qx, qw)


def experts(scheme="token", backend=None, scales=(0.02, 0.1)) -> Experts:
    generator = torch.Generator().manual_seed(7)
    backend = backend or ReferenceBackend()

    def linear(rows, columns, scale):
        levels = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)
        row_scale = 0.01 * torch.rand(rows, generator=generator) + 1e-3
        return Int8Linear(levels, row_scale, None, scheme, scale if scheme == "static" else None, backend)

    made = Experts()
    for _ in range(COUNT):
        sizes = ((INNER, WIDTH), scales[0]), ((INNER, WIDTH), scales[0]), ((WIDTH, INNER), scales[1])
        linears = [linear(*size, torch.tensor(scale)) for size, scale in sizes]
        made.append(Expert(linears, gated_by(torch.nn.functional.silu)))
    return made


def token_by_token(made: Experts, hidden, chosen, weights):
    """Compute each token alone, with its experts in the order of the router."""
    total = torch.zeros_like(hidden)
    for token in range(len(hidden)):
        for number, weight in zip(chosen[token].tolist(), weights[token], strict=True):
            expert, x = made[number], hidden[token : token + 1]
            total[token] += expert(x)[0] * weight
    return total


@st.composite
def routings(draw):
    """Draw two experts per token from a subset, so some experts have no token."""
    open_experts = draw(st.lists(st.integers(0, COUNT - 1), min_size=2, max_size=COUNT, unique=True))
    tokens = draw(st.integers(0, 9))
    pairs = [draw(st.permutations(open_experts))[:2] for _ in range(tokens)]
    return torch.tensor(pairs, dtype=torch.long).view(tokens, 2), draw(st.integers(0, 2**16))


@given(routings(), st.sampled_from(["token", "static"]))
def test_equal_to_a_loop_over_tokens(routing, scheme):
    chosen, seed = routing
    generator = torch.Generator().manual_seed(seed)
    hidden = 3 * torch.randn(len(chosen), WIDTH, generator=generator)
    weights = torch.rand(len(chosen), 2, generator=generator)
    made = experts(scheme)
    expected = token_by_token(made, hidden, chosen, weights)
    assert torch.equal(Int8Experts.of(made)(hidden, chosen, weights), expected)


@given(routings())
def test_cpu_accumulators_equal_the_reference(routing):
    chosen, seed = routing
    generator = torch.Generator().manual_seed(seed)
    hidden, weights = torch.randn(len(chosen), WIDTH, generator=generator), torch.rand(len(chosen), 2)
    cpu = Int8Experts.of(experts(backend=CpuBackend()))(hidden, chosen, weights)
    assert torch.equal(cpu, Int8Experts.of(experts())(hidden, chosen, weights))


def test_the_shared_input_is_quantised_once_and_only_active_experts_run():
    backend = Counting()
    chosen = torch.tensor([[0, 3], [3, 0], [3, 1]])
    Int8Experts.of(experts(backend=backend))(torch.randn(3, WIDTH), chosen, torch.rand(3, 2))
    assert backend.quantized[0] == (3, WIDTH)
    assert backend.quantized[1:] == [(2, INNER), (1, INNER), (3, INNER)], "then each expert's own inner rows"
    assert len(backend.products) == 9


def test_per_tensor_scales_use_all_tokens():
    hidden, weights = torch.randn(4, WIDTH), torch.rand(4, 2)
    hidden[0] *= 100
    chosen = torch.tensor([[0, 1], [2, 3], [2, 3], [2, 3]])
    got = Int8Experts.of(experts("tensor"))(hidden, chosen, weights)
    alone = Int8Experts.of(experts("tensor"))(hidden[1:], chosen[1:], weights[1:])
    assert not torch.allclose(got[1:], alone), "the large token's scale reaches experts that never see it"


def test_a_simulating_backend_and_half_precision():
    hidden, weights, chosen = torch.randn(6, WIDTH), torch.rand(6, 2), torch.randint(0, 2, (6, 1)) + torch.arange(2)
    exact = Int8Experts.of(experts())(hidden, chosen, weights)
    fake = Int8Experts.of(experts(backend=FakeBackend()))(hidden, chosen, weights)
    torch.testing.assert_close(fake, exact, rtol=1e-3, atol=1e-3)
    half = Int8Experts.of(experts())(hidden.bfloat16(), chosen, weights)
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).norm() < 0.03 * exact.norm()


def test_parameter_names_do_not_change():
    made = experts()
    assert list(Int8Experts.of(made).state_dict()) == list(made.state_dict())


def test_experts_with_different_quantisation_are_refused():
    made = experts("static")
    made[2].up_proj.input_scale = torch.tensor(0.5)
    with pytest.raises(AssertionError, match="differently"):
        Int8Experts.of(made)
    made = experts()
    made[1].down_proj = torch.nn.Linear(INNER, WIDTH)
    with pytest.raises(AssertionError, match="not quantised yet"):
        Int8Experts.of(made)
