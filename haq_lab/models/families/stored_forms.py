"""Convert a layer's tensors from the form of checkpoints to that of transformers' modules, such as fused experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter


def in_module_form(tensors: Mapping[str, Tensor], model_type: str) -> dict[str, Tensor]:
    """Return a layer's tensors as transformers' modules hold them.

    Args:
        tensors: The tensors of one decoder layer as stored, by their name within the layer.
        model_type: The architecture. transformers lists how its checkpoints differ from its modules.

    Example:
        >>> in_module_form({"mlp.experts.0.down_proj.weight": a, "mlp.experts.1.down_proj.weight": b}, "dots1").keys()
        dict_keys(['mlp.experts.down_proj'])
    """
    listed = get_checkpoint_conversion_mapping(model_type) or []  # our own copy, with an empty state
    found: dict[str, WeightConverter] = {}
    converted: dict[str, Tensor] = {}
    for name in sorted(tensors, key=_by_number):  # experts are stacked in this order
        for converter in (entry for entry in listed if isinstance(entry, WeightConverter)):
            target, pattern = converter.rename_source_key(name)
            if pattern is not None:
                found[target] = converter
                converter.add_tensor(target, name, pattern, cast(Any, tensors[name]))  # it takes tensors and futures
                break
        else:
            converted[name] = tensors[name]
    for target, converter in found.items():
        converted |= converter.convert(target)
    return converted


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
