"""Copy the files beside a model's weights: the tokenizer, its chat template and the generation config."""

from __future__ import annotations

import shutil
from pathlib import Path

from haq_lab.models.layerwise import LayeredModel

GENERATION = "generation_config.json"  # end tokens and sampling; a chat model often has several end tokens


def copy_companion_files(model: LayeredModel, target: Path) -> None:
    """Write the tokenizer with its chat template to a folder, and copy the generation config if there is one.

    Args:
        model: The model whose files are copied.
        target: Existing folder.

    Raises:
        UserError: The model has no usable tokenizer.
    """
    model.tokenizer().save_pretrained(target)
    if (model.folder / GENERATION).is_file():
        shutil.copyfile(model.folder / GENERATION, target / GENERATION)  # unchanged, because saving validates values
