"""The experts of a Mixture-of-Experts layer in int8: tokens sorted by expert, one product an expert and projection."""

from __future__ import annotations

from typing import Self, cast

from torch import Tensor

from haq_lab.int8.backend import Backend, PackedExpert
from haq_lab.int8.linear import Int8Linear
from haq_lab.int8.numerics import ActivationScheme
from haq_lab.models.experts import Expert, Experts, dispatch


class Int8Experts(Experts):
    """Experts whose projections are all `Int8Linear`s; the gate and up projections of all share one input scheme.

    The input is quantised once, whichever experts then read it. An expert's weights are asked for through
    `expert` alone, and only where a token has chosen it.

    Attributes:
        swiglu: What lies between the products is `Backend.swiglu_quantize`, whose bits no backend changes, and not the
            model's own activation, whose last places depend on the device.
        beside: Some experts of the next call compute on another device than the rest (`Engine.beside`): what they
            read is brought there before the rest keep their device busy.
    """

    scheme: ActivationScheme
    backend: Backend
    input_scale: Tensor | None
    swiglu: bool = False
    beside: bool = False

    @classmethod
    def of(cls, experts: Experts) -> Self:
        """The same experts, run in int8. Asserts that they are quantised for good, and alike."""
        made = cls(cast(Expert, expert) for expert in experts)
        linears = [linear for expert in made for linear in projections(cast(Expert, expert))]
        assert all(isinstance(linear, Int8Linear) for linear in linears), "experts that are not quantised yet"
        readers = [linear for expert in made for linear in projections(cast(Expert, expert))[:2]]
        assert len({linear.input_quantization for linear in readers}) == 1, (
            "experts that quantise their shared input differently"
        )
        made.scheme, made.backend = readers[0].scheme, readers[0].backend
        made.register_buffer("input_scale", readers[0].input_scale, persistent=False)
        return made

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Hidden states (t, d), expert numbers (t, k) and gate weights (t, k) -> (t, d)."""
        here = self.backend.quantize(hidden, self.scheme, self.input_scale)
        there = on_the_host(*here, hidden.shape[1]) if self.beside else here

        def run(number: int, tokens: Tensor) -> Tensor:
            expert = self.expert(number)
            gate, up, down = projections(expert)
            levels, scale = here if gate.backend is self.backend else there
            own = (levels, scale) if len(tokens) == len(hidden) == 1 else (levels[tokens], scale[tokens])
            if self.swiglu:
                weights = PackedExpert(gate.weights, up.weights, down.weights, down.scheme, down.input_scale)
                return down.backend.expert(*own, weights).to(hidden)
            return down(expert.act_fn(gate.product(*own)) * up.product(*own)).to(hidden)

        return dispatch(hidden, chosen, weights, run, self.order)


def on_the_host(levels: Tensor, scale: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Quantised rows (m, padded columns) and scales of any backend as the CPU's takes them: (m, columns), (m, 1)."""
    return levels[:, :columns].cpu().contiguous(), scale.reshape(-1, 1).cpu()


def projections(expert: Expert) -> tuple[Int8Linear, Int8Linear, Int8Linear]:
    """What reads the shared input, gate and up, then down."""
    return cast(tuple[Int8Linear, Int8Linear, Int8Linear], (expert.gate_proj, expert.up_proj, expert.down_proj))
