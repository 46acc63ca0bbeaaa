"""Find the row of the family table that describes a model."""

from __future__ import annotations

from typing import Any

from haq_lab.models.families.dense import DENSE
from haq_lab.models.families.family import Family
from haq_lab.models.families.moe import MIXTURES
from haq_lab.utils.errors import UserError, nearest

FAMILIES = DENSE + MIXTURES
GENERIC = "generic"  # value of `model.family` that runs the layers to make a row (`haq_lab.models.generic`)


def family_of(config: Any) -> Family:
    """Return the first row of `FAMILIES` that describes a transformers config.

    Raises:
        UserError: No row describes the config. A guess could silently leave layers unquantised.
    """
    check_model_type(config.model_type)
    rows = [family for family in FAMILIES if family.model_type == config.model_type]
    for family in rows:
        if not family.unsupported(config):
            return family
    field, values = rows[-1].unsupported(config)[0]  # the last row of a model type requires least
    raise UserError(
        f"model: this variant of '{config.model_type}' is not supported: {field}={getattr(config, field)!r}. "
        f"Choose a model with {field}={values[0]!r}, or add a row to haq_lab/models/families."
    )


def check_model_type(model_type: object) -> None:
    """Raise UserError if no row of `FAMILIES` has this model type."""
    known = sorted({family.model_type for family in FAMILIES})
    if model_type not in known and model_type not in {family.wrapper for family in FAMILIES}:
        raise UserError(
            f"model: architecture '{model_type}' is not in the family table (haq_lab/models/families). "
            f"Choose one of {', '.join(known)}, or model.family={GENERIC}, "
            f"or add a row there{nearest(model_type, known)}."
        )


def text_config_of(config: Any) -> Any:
    """Return the config of the language model, if a config is of a multimodal model that contains a supported one."""
    wrapped = any(family.wrapper == config.model_type for family in FAMILIES)
    return config.get_text_config() if wrapped else config


def head_size(config: Any) -> int:
    """Return the width of an attention head, which not every config states."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
