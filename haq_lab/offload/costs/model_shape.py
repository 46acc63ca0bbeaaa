"""Describe a Mixture-of-Experts model by its sizes, for costs, budgets and plans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from haq_lab.models.families.family import Family, Group
from haq_lab.models.families.layer_kinds import LayerKinds
from haq_lab.models.families.lookup import family_of
from haq_lab.utils.errors import UserError


@dataclass(frozen=True)
class Shape:
    """Sizes of a Mixture-of-Experts model.

    Attributes:
        layers: Number of decoder layers with experts.
        experts: Number of experts in such a layer.
        k: Number of experts that each token chooses.
        expert: Weights of one expert.
        rest: Weights of all decoder layers without the experts that a router chooses, divided by `layers`. Shared
            experts and dense layers are part of it.
        outside: Weights of the head. The embedding has as many.
        kv_per_token: Numbers in the KV cache per token, over all layers.
        work_per_token: Numbers per token that a running layer holds: hidden states and their norm, the outputs of the
            linears, the inputs of the output projections, and the outputs of gate, up and down projection of the k
            chosen experts. It is that of the layer with most.
        head_bytes: Bytes per weight of the head: 2, or 1 if it is int8 (`quantizer.lm_head`).
        tied: Whether the head shares the embedding's tensor. It does so only if both have 16 bits.
        quantized_bytes: Bytes per weight of a quantised expert, with its scales if it has 4 bits. It is a mean if
            experts have different bits.
    """

    layers: int
    experts: int
    k: int
    expert: int
    rest: int
    outside: int
    kv_per_token: int
    work_per_token: int
    head_bytes: int = 2
    tied: bool = False
    quantized_bytes: float = 1.0

    @property
    def tables_bytes(self) -> int:
        """Bytes of the embedding (16 bits), and of the head if it is a separate tensor."""
        shared = self.tied and self.head_bytes == 2
        return (2 if shared else 2 + self.head_bytes) * self.outside

    @classmethod
    def of(cls, config: Any, int8_head: bool = False, family: Family | None = None) -> Shape:
        """Return the shape of an MoE model. Its layers are built without memory, and their weights are counted.

        Args:
            config: The transformers config.
            int8_head: Whether the head is in int8.
            family: The model's row. None takes it from the family table (`haq_lab.models.families`).

        Raises:
            UserError: The architecture is not in the family table, or has no experts.
        """
        family = family or family_of(config)
        kinds, moe = LayerKinds(family, config), family.moe
        if moe is None or not kinds.moe_layers:
            raise UserError(f"model: '{config.model_type}' is a dense model. Choose a Mixture of Experts.")
        hidden, active, count = config.hidden_size, moe.active(config), moe.count(config)
        rest = cached = expert = work = 0
        for index in range(config.num_hidden_layers):
            layer = kinds.build(index)
            linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
            chosen = 0
            if index in kinds.moe_layers:
                expert = _weights(layer.get_submodule(moe.experts)) // count
                rest -= expert * count
                chosen = active * (2 * moe.width(config) + hidden)
            rest += _weights(layer)
            held = [linears[name].out_features for name in family.cached if name in linears]
            cached += sum(held) + sum(held[:1]) * (len(family.cached) - len(held))  # without values, keys are values
            work = max(work, 2 * hidden + _held(linears, kinds.groups(index)) + chosen)
        return cls(
            layers=len(kinds.moe_layers),
            experts=count,
            k=active,
            expert=expert,
            rest=-(-rest // len(kinds.moe_layers)),
            outside=hidden * config.vocab_size,
            kv_per_token=cached,
            work_per_token=work,
            head_bytes=1 if int8_head else 2,
            tied=config.tie_word_embeddings,
        )


def _weights(module: nn.Module) -> int:
    """Return the number of weights of a module, without vectors such as norms and biases of linears."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)


def _held(linears: dict[str, nn.Linear], groups: tuple[Group, ...]) -> int:
    """Return the numbers per token that linears outside the experts write, or read if they are output projections."""
    outputs = {name for group in groups if group.kind != "norm" for name in group.consumers}
    return sum(each.in_features if name in outputs else each.out_features for name, each in linears.items())


MIXTRAL = Shape(  # 8x7B
    layers=32,
    experts=8,
    k=2,
    expert=3 * 4096 * 14336,
    rest=2 * 4096 * (4096 + 1024) + 8 * 4096,
    outside=4096 * 32000,
    kv_per_token=32 * 2 * 1024,
    work_per_token=2 * 4096 + 2 * (4096 + 1024) + 2 * (2 * 14336 + 4096),
)
