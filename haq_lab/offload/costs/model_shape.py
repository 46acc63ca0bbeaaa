"""Describe a Mixture-of-Experts model by its sizes, for costs, budgets and plans."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from haq_lab.models.families.lookup import family_of, head_size
from haq_lab.utils.errors import UserError


@dataclass(frozen=True)
class Shape:
    """Sizes of a Mixture-of-Experts model.

    Attributes:
        layers: Number of decoder layers. All have experts.
        experts: Number of experts per layer.
        k: Number of experts that each token chooses.
        expert: Weights of one expert.
        rest: Weights of one layer without its experts.
        outside: Weights of the head. The embedding has as many.
        kv_per_token: Numbers in the KV cache per token, over all layers.
        work_per_token: Numbers per token that a running layer holds: hidden states and their norm, queries, keys,
            values, attention output, and the outputs of gate, up and down projection of the k chosen experts.
        head_bytes: Bytes per weight of the head: 2, or 1 if it is int8 (`quantizer.lm_head`).
        tied: Whether the head shares the embedding's tensor. It does so only if both have 16 bits.
        quantized_bytes: Bytes per weight of a quantised expert, with its scales if it has 4 bits.
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
    def of(cls, config: Any, experts: int, int8_head: bool = False) -> Shape:
        """Return the shape of an MoE model.

        Args:
            config: The transformers config of a model in the family table (`haq_lab.models.families`).
            experts: Number of experts in a layer.
            int8_head: Whether the head is in int8.

        Raises:
            UserError: The architecture is not in the family table, or has no experts.
        """
        moe = family_of(config).moe
        if moe is None:
            raise UserError(f"model: '{config.model_type}' is a dense model. Choose a Mixture of Experts.")
        hidden, layers = config.hidden_size, config.num_hidden_layers
        width, active = moe.width(config), moe.active(config)
        head = head_size(config)
        keys = config.num_key_value_heads * head
        queries = config.num_attention_heads * head
        return cls(
            layers=layers,
            experts=experts,
            k=active,
            expert=3 * hidden * width,
            rest=2 * hidden * queries + 2 * hidden * keys + hidden * experts,
            outside=hidden * config.vocab_size,
            kv_per_token=2 * keys * layers,
            work_per_token=2 * hidden + 2 * queries + 2 * keys + active * (2 * width + hidden),
            head_bytes=1 if int8_head else 2,
            tied=config.tie_word_embeddings,
        )


MIXTRAL = Shape.of(  # 8x7B
    SimpleNamespace(
        model_type="mixtral",
        hidden_size=4096,
        num_hidden_layers=32,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_experts_per_tok=2,
        vocab_size=32000,
        tie_word_embeddings=False,
    ),
    experts=8,
)
