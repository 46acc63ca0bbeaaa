"""Keep the embeddings and the head in the type in which the checkpoint stores them.

They are a large part of a small model. Only the entries that are read are converted to the compute type. 16-bit
entries convert to float32 exactly, so the results equal those of float32 tables.

    keep_stored_type(shell, torch.float32)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from haq_lab.models.half_linear import HalfLinear


def table_names(shell: PreTrainedModel) -> set[str]:
    """Return the names of the weights of all embeddings and of the head."""
    head = shell.get_output_embeddings()
    return {
        f"{name}.weight" for name, module in shell.named_modules() if module is head or isinstance(module, nn.Embedding)
    }


def keep_stored_type(shell: PreTrainedModel, dtype: torch.dtype) -> None:
    """Change a model in place so that its embeddings and its head may have another type than its layers.

    A tied embedding stays tied.

    Args:
        shell: The model.
        dtype: Type in which the layers compute.
    """
    for module in shell.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda module, tokens, rows: _widened(module, tokens[0], rows, dtype))
    linear: Any = shell.get_output_embeddings()
    shell.set_output_embeddings(HalfLinear(linear))


def _widened(embedding: nn.Embedding, tokens: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows of tokens in `dtype`. A scale, as in Gemma, would be rounded to the stored type otherwise."""
    scale = getattr(embedding, "embed_scale", None)
    if scale is None or rows.dtype == dtype:
        return rows.to(dtype)
    return nn.Embedding.forward(embedding, tokens).to(dtype) * scale.to(dtype)
