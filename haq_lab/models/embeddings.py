"""Embeddings and head in the type that the checkpoint has them in; only what is read of them is widened.

    hold_as_stored(shell, torch.float32)

They are much of a small model, and 16-bit entries widen exactly: the numbers are those of float32 tables.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from haq_lab.models.half_linear import HalfLinear


def tables_of(shell: PreTrainedModel) -> set[str]:
    """The names of the tensors that are tables: of tokens, of positions, and the head."""
    head = shell.get_output_embeddings()
    return {
        f"{name}.weight" for name, module in shell.named_modules() if module is head or isinstance(module, nn.Embedding)
    }


def hold_as_stored(shell: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let the model's tables, in whatever type they are, serve layers that compute in `dtype`, in place.

    Tied tables stay tied.
    """
    for module in shell.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda module, tokens, rows: rows.to(dtype))
    linear: Any = shell.get_output_embeddings()
    shell.set_output_embeddings(HalfLinear(linear))
