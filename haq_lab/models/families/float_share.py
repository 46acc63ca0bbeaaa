"""Find which parameters of a model's decoder layers stay in float when the model is quantised.

share = FloatShare.of(model.kinds, model.depth)
share.share              # 0.013
str(share)               # "1.3 % of the layers' parameters stay in float: mlp.gate (1.2 %), norms (0.1 %)"
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from haq_lab.models.families.layer_kinds import LayerKinds

NORMS = "norms"
SHOWN = 6  # modules that the text names


@dataclass(frozen=True)
class FloatShare:
    """The parameters of the decoder layers that stay in float.

    Attributes:
        parameters: Number of parameters of all decoder layers.
        by_module: Number of parameters in float by the module that has them, largest first. Norms are one entry.
    """

    parameters: int
    by_module: dict[str, int]

    @classmethod
    def of(cls, kinds: LayerKinds, depth: int) -> FloatShare:
        """Count the parameters of a model with `depth` decoder layers.

        Args:
            kinds: What its layers consist of.
            depth: Number of decoder layers.
        """
        total, in_float = 0, Counter[str]()
        for index in range(depth):
            layer, moe = kinds.build(index), kinds.moe(index)
            quantised = {name for group in kinds.groups(index) for name in group.consumers}
            for name, parameter in layer.named_parameters():
                total += parameter.numel()
                module = name.rpartition(".")[0]
                if module not in quantised and (moe is None or module != moe.experts):
                    in_float[_described(layer, module)] += parameter.numel()
        return cls(total, dict(in_float.most_common()))

    @property
    def share(self) -> float:
        """The share of the layers' parameters that stay in float."""
        return sum(self.by_module.values()) / self.parameters

    def __str__(self) -> str:
        shares = [f"{name} ({count / self.parameters:.2%})" for name, count in self.by_module.items()]
        named = [*shares[:SHOWN], *([f"{len(shares) - SHOWN} more"] if len(shares) > SHOWN else [])]
        return f"{self.share:.2%} of the layers' parameters stay in float: {', '.join(named)}"


def _described(layer: nn.Module, module: str) -> str:
    """Return the module's name, or `norms` if all its parameters are vectors and its name says so."""
    vectors = all(parameter.dim() == 1 for parameter in layer.get_submodule(module).parameters())
    return NORMS if vectors and "norm" in module.rpartition(".")[2] else module
