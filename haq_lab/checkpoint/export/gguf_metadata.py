"""Describe a model to llama.cpp: its architecture and the settings in the header of a GGUF file.

The names and the values are those of llama.cpp's `convert_hf_to_gguf.py` (conversion/base.py and conversion/llama.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from haq_lab.checkpoint.model import QuantizedModel
from haq_lab.models.families.lookup import head_size
from haq_lab.utils.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp.

    Attributes:
        number: Its number in the gguf package.
        interleaved: Whether llama.cpp rotates neighbouring rows of a head. transformers rotates row i with row i + d/2
            of a head of d rows, so the rows of query and key projections change their order.
        normalized: Whether llama.cpp divides a token's gate weights by their sum. None for a dense model.
        scaled_rope: Whether llama.cpp reads `rope_freqs.weight`, one divisor for each rotary frequency.
    """

    number: gguf.MODEL_ARCH
    interleaved: bool
    normalized: bool | None = None
    scaled_rope: bool = False

    def row_order(self, module: str, config: Any) -> Tensor | slice:
        """Return the order in which llama.cpp stores the rows of a module.

        Args:
            module: Name of the module.
            config: The model's transformers config.
        """
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        projection = module.rpartition(".")[2]
        if not self.interleaved or projection not in heads:
            return slice(None)
        return torch.arange(heads[projection] * head_size(config)).view(heads[projection], 2, -1).mT.flatten()


_LLAMA = Architecture(gguf.MODEL_ARCH.LLAMA, interleaved=True, scaled_rope=True)
ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2, interleaved=False),
    "qwen3": Architecture(gguf.MODEL_ARCH.QWEN3, interleaved=False),
    "mixtral": Architecture(gguf.MODEL_ARCH.LLAMA, interleaved=True, normalized=True, scaled_rope=True),
    "qwen3_moe": Architecture(gguf.MODEL_ARCH.QWEN3MOE, interleaved=False, normalized=True),
    "olmoe": Architecture(gguf.MODEL_ARCH.OLMOE, interleaved=False, normalized=False),
}


def architecture_of(model: QuantizedModel) -> Architecture:
    """Return llama.cpp's architecture for a model.

    Raises:
        UserError: The export does not support the architecture, or llama.cpp has not this variant of it.
    """
    config, family = model.config, model.family
    if family.model_type not in ARCHITECTURES:
        raise UserError(
            f"export --for gguf: architecture '{family.model_type}' is not supported. Choose --for transformers, or a "
            f"model of the architectures {', '.join(ARCHITECTURES)}."
        )
    found = ARCHITECTURES[family.model_type]
    if model.experts and len(model.kinds.moe_layers) < model.depth:
        raise UserError(
            f"export --for gguf: llama.cpp's '{family.model_type}' has experts in every layer, but this model has them "
            f"in {len(model.kinds.moe_layers)} of {model.depth}. Choose --for transformers."
        )
    rope = config.rope_parameters["rope_type"]
    needs: dict[str, tuple[object, object]] = {
        "hidden_act": (config.hidden_act, "silu"),
        "rope_type": (rope, rope if found.scaled_rope and rope in ("linear", "llama3") else "default"),
        "use_sliding_window": (getattr(config, "use_sliding_window", False), False),
        "partial_rotary_factor": (config.rope_parameters.get("partial_rotary_factor", 1.0), 1.0),
    }
    if family.moe is not None:
        needs["norm_topk_prob"] = (family.moe.is_normalized(config), found.normalized)
    if found.number is gguf.MODEL_ARCH.OLMOE:  # llama.cpp expects a key norm of the hidden size
        needs["num_key_value_heads"] = (config.num_key_value_heads, config.num_attention_heads)
    for field, (value, needed) in needs.items():
        if value != needed:
            raise UserError(
                f"export --for gguf: {field} is {value}, but llama.cpp's {gguf.MODEL_ARCH_NAMES[found.number]} models "
                f"need {needed}. Choose --for transformers."
            )
    return found


def add_model(writer: gguf.GGUFWriter, model: QuantizedModel) -> None:
    """Add the model's name and settings to the metadata of a GGUF file.

    Args:
        writer: Writer whose header is not yet written.
        model: The checkpoint.
    """
    config, moe = model.config, model.family.moe
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(model.folder.resolve().name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(model.depth)
    writer.add_context_length(model.max_tokens)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_rope_dimension_count(head_size(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if moe is not None:
        writer.add_expert_count(moe.count(config))
        writer.add_expert_used_count(moe.active(config))
        writer.add_expert_feed_forward_length(moe.width(config))


def frequency_factors(model: QuantizedModel) -> Tensor | None:
    """Return what each rotary frequency is divided by, float32 (d / 2,), or None if they are not scaled."""
    rope = model.config.rope_parameters
    if rope["rope_type"] == "default":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](model.config, torch.device("cpu"))
    plain = rope["rope_theta"] ** -(torch.arange(0, head_size(model.config), 2) / head_size(model.config))
    return plain / scaled
