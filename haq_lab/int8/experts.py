"""The experts of a Mixture-of-Experts layer in int8: tokens sorted by expert, one product an expert and projection."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from haq_lab.int8.linear import Int8Linear
from haq_lab.models.experts import Experts, dispatch


class Int8Experts(Experts):
    """Experts whose projections are all `Int8Linear`s; the gate and up projections of all share one input scheme.

    The input is quantised once, whichever experts then read it.
    """

    @classmethod
    def of(cls, experts: Experts) -> Int8Experts:
        """The same experts, run in int8. Asserts that they are quantised, and alike."""
        linears = [module for expert in experts for module in expert.children() if hasattr(module, "weight")]
        assert all(isinstance(linear, Int8Linear) for linear in linears), "experts that are not quantised yet"
        inputs = [cast(Int8Linear, linear) for expert in experts for linear in (expert.gate_proj, expert.up_proj)]
        assert len({_scheme(linear) for linear in inputs}) == 1, "experts that quantise their shared input differently"
        return cls(experts)

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Hidden states (t, d), expert numbers (t, k) and gate weights (t, k) -> (t, d)."""
        first = cast(Int8Linear, self[0].gate_proj)  # any expert's: they share the scheme
        levels, scale = first.quantize(hidden)

        def run(number: int, tokens: Tensor) -> Tensor:
            expert = self.expert(number)
            gate, up, down = (
                cast(Int8Linear, linear) for linear in (expert.gate_proj, expert.up_proj, expert.down_proj)
            )
            qx, row_scale = levels[tokens], scale[tokens]
            return down(expert.act_fn(gate.product(qx, row_scale)) * up.product(qx, row_scale)).to(hidden.dtype)

        return dispatch(hidden, chosen, weights, run, self.order)


def _scheme(linear: Int8Linear) -> tuple[str, float | None]:
    return linear.scheme, None if linear.input_scale is None else float(linear.input_scale)
