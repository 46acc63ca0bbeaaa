"""Run the experts of an MoE layer in int8. Tokens are grouped by expert, so each projection is one matrix product."""

from __future__ import annotations

from typing import Self, cast

from torch import Tensor

from haq_lab.int8.backend import Backend, PackedExpert
from haq_lab.int8.linear import Int8Linear
from haq_lab.int8.numerics import ActivationScheme
from haq_lab.int8.sequences import sequences_of
from haq_lab.models.experts import Expert, Experts, dispatch


class Int8Experts(Experts):
    """The int8 experts of an MoE layer. All gate and up projections use the same activation scheme.

    The input is rotated and quantised once for all experts, so with the `tensor` scheme its scale covers all tokens of
    a sequence. The input of a down projection has one scale for those tokens of a sequence that its expert receives.

    An expert's weights are read only through `expert`, and only if a token has chosen it.

    Attributes:
        scheme: Activation scheme of the shared input.
        backend: Backend that quantises the shared input.
        input_scale: Static scale of the shared input, or None.
        rotation: Block of the shared input's rotation; 1 for none. The router reads the input before it is rotated.
        swiglu: Use `Backend.swiglu_quantize` between the products. Its bits are the same on all backends. The last
            digits of the model's own activation function depend on the device.
        beside: Some experts of the next call run on another device (`Engine.beside`). Their input is copied there
            before the other experts occupy their device.
    """

    scheme: ActivationScheme
    backend: Backend
    input_scale: Tensor | None
    rotation: int
    swiglu: bool = False
    beside: bool = False

    @classmethod
    def of(cls, experts: Experts) -> Self:
        """Return the int8 experts with the linears of `experts`, which must all be quantised, with one input scheme."""
        int8 = cls(cast(Expert, expert) for expert in experts)
        linears = [linear for expert in int8 for linear in projections(cast(Expert, expert))]
        assert all(isinstance(linear, Int8Linear) for linear in linears), "some experts are not quantised yet"
        readers = [linear for expert in int8 for linear in projections(cast(Expert, expert))[:2]]
        assert len({linear.input_quantization for linear in readers}) == 1, (
            "the experts quantise their shared input differently"
        )
        int8.scheme, int8.backend, int8.rotation = readers[0].scheme, readers[0].backend, readers[0].rotation
        int8.register_buffer("input_scale", readers[0].input_scale, persistent=False)
        return int8

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum (t, d) of the chosen experts' outputs.

        Args:
            hidden: (t, d) hidden states.
            chosen: (t, k) expert indices.
            weights: (t, k) gate weights.
        """
        sequences = sequences_of(hidden) if self.scheme == "tensor" else None
        quantized = self.backend.quantize(hidden, self.scheme, self.input_scale, sequences, self.rotation)
        elsewhere = copy_to_host(*quantized, hidden.shape[1]) if self.beside else quantized

        def run(number: int, tokens: Tensor) -> Tensor:
            expert = self.expert(number)
            gate, up, down = projections(expert)
            levels, scale = quantized if gate.backend is self.backend else elsewhere
            own = (levels, scale) if len(tokens) == len(hidden) == 1 else (levels[tokens], scale[tokens])
            if self.swiglu:
                weights = PackedExpert(
                    gate.weights, up.weights, down.weights, down.scheme, down.input_scale, down.rotation
                )
                own_sequences = sequences_of(own[0]) if down.scheme == "tensor" else None
                return down.backend.expert(*own, weights, own_sequences).to(hidden)
            return down(expert.gating(gate.product(*own), up.product(*own))).to(hidden)

        return dispatch(hidden, chosen, weights, run, self.order)


def copy_to_host(levels: Tensor, scale: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Return quantised rows (m, padded columns) and scales as the CPU backend expects: (m, columns) and (m, 1)."""
    return levels[:, :columns].cpu().contiguous(), scale.reshape(-1, 1).cpu()


def projections(expert: Expert) -> tuple[Int8Linear, Int8Linear, Int8Linear]:
    """Return the gate, up and down projections of an expert. Gate and up read the shared input."""
    return cast(tuple[Int8Linear, Int8Linear, Int8Linear], (expert.gate_proj, expert.up_proj, expert.down_proj))
