"""Find what each decoder layer of a model consists of. Layers may differ: dense ones and ones with experts.

    kinds = LayerKinds(family, config)
    kinds.groups(0)          # the linears of the first layer, grouped by shared input
    kinds.moe_layers         # indices of the layers with experts

The modules that transformers builds say what a layer has, so no config field has to be interpreted.
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from haq_lab.models.families.family import Family, Group, Moe
from haq_lab.utils.errors import UserError
from haq_lab.utils.hugging_face import quiet_transformers


class LayerKinds:
    """The groups and the experts of each layer of a model, read from the modules that transformers builds.

    Args:
        family: The model's row of the family table.
        config: The transformers config.
    """

    def __init__(self, family: Family, config: Any):
        self._family, self._config = family, config
        self._modules: dict[int, frozenset[str]] = {}
        self._groups: dict[frozenset[str], tuple[Group, ...]] = {}
        with torch.device("meta"):
            self._layer_class = type(empty_model(config, 1).get_submodule(f"{family.layers}.0"))

    def build(self, index: int) -> nn.Module:
        """Return a decoder layer on the meta device, as transformers defines it."""
        with torch.device("meta"), no_init_weights():
            layer: nn.Module = self._layer_class(self._config, index)
        return layer.eval().requires_grad_(False)

    def groups(self, index: int) -> tuple[Group, ...]:
        """Return the linears of a layer, grouped by shared input.

        Raises:
            UserError: The layer has a linear that the family table does not name, so it would silently stay in float.
        """
        modules = self._modules_of(index)
        if modules not in self._groups:
            groups = self._family.resolve(self._config, modules)
            self._refuse_unnamed(index, groups)
            self._groups[modules] = groups
        return self._groups[modules]

    def moe(self, index: int) -> Moe | None:
        """Return the names of a layer's router and experts, or None if it has no experts."""
        return None if self._family.moe is None else self._family.moe_in(self._modules_of(index))

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """The indices of the layers with experts."""
        return tuple(index for index in range(self._config.num_hidden_layers) if self.moe(index) is not None)

    def _modules_of(self, index: int) -> frozenset[str]:
        if index not in self._modules:
            self._modules[index] = frozenset(name for name, _ in self.build(index).named_modules())
        return self._modules[index]

    def float_linears(self, index: int) -> list[str]:
        """Return the names of a layer's linears that stay in float."""
        quantised = {name for group in self.groups(index) for name in group.consumers}
        return [name for name in self._linears_of(index) if name not in quantised]

    def _linears_of(self, index: int) -> list[str]:
        return [name for name, module in self.build(index).named_modules() if isinstance(module, nn.Linear)]

    def _refuse_unnamed(self, index: int, groups: tuple[Group, ...]) -> None:
        named = {name for group in groups for name in group.readers} | {*self._family.in_float}
        for name in self._linears_of(index):
            if name not in named:
                raise UserError(
                    f"model: '{name}' of layer {index} is not in the family table's row of "
                    f"'{self._family.model_type}'. Choose another variant of the model, or add it to "
                    "haq_lab/models/families."
                )


def empty_model(config: Any, layers: int, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Return a model with this number of decoder layers and random or no weights.

    Args:
        config: The transformers config. It is not changed.
        layers: Number of decoder layers.
        dtype: Type of the weights. If None, that of the config.
    """
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if layers and getattr(config, "layer_types", None):  # a model without layers still makes the masks of all types
        config.layer_types = config.layer_types[:layers]
    with quiet_transformers():  # transformers chooses `sdpa`, or `eager` for attention that sdpa cannot compute
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)


def set_depth(model: PreTrainedModel, layers: int) -> None:
    """Tell a model that was built without layers how many it has. Gemma 4 counts them when it is built."""
    model.config.num_hidden_layers = layers
    if hasattr(model.base_model, "first_kv_shared_layer_idx"):
        model.base_model.first_kv_shared_layer_idx = layers - model.config.num_kv_shared_layers
