"""Copy the files beside a model's weights: the tokenizer, its chat template and the generation config."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers.utils import GENERATION_CONFIG_NAME

from haq_lab.models.layerwise import LayeredModel


def copy_companion_files(model: LayeredModel, target: Path) -> None:
    """Write the tokenizer with its chat template to a folder, and copy the generation config if there is one.

    Args:
        model: The model whose files are copied.
        target: Existing folder.

    Raises:
        UserError: The model has no usable tokenizer.
    """
    model.tokenizer().save_pretrained(target)
    generation = model.folder / GENERATION_CONFIG_NAME
    if generation.is_file():
        shutil.copyfile(generation, target / generation.name)  # unchanged, because saving validates values
