"""Record the files of a folder that the user trusts: a quantised checkpoint, or a model in the cache folder.

A record lists the files that belong to a folder, with their hashes. Files that are changed or added later are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from haq_lab.checkpoint.manifest import FILE, IDENTITY, REST, WORK, Manifest, layer_file
from haq_lab.models import build_cache
from haq_lab.storage.json_form import read_json
from haq_lab.storage.listed_files import loadable_files
from haq_lab.storage.safetensors_file import describe_shard
from haq_lab.utils.atomic_files import sha256
from haq_lab.utils.errors import UserError

_CONFIG = TypeAdapter(dict[str, Any])


def accept(folder: Path) -> list[str]:
    """Record all files of a folder that a loader could read, and their current hashes.

    Args:
        folder: A quantised checkpoint, or a model that was built in the cache folder.

    Returns:
        The names of the recorded files.

    Raises:
        UserError: The folder has no readable config, or a layer of the checkpoint is missing or damaged.
    """
    try:
        config = read_json(folder / "config.json", _CONFIG)
    except (OSError, ValueError) as error:
        raise UserError(
            f"accept: '{folder}' has no readable config.json ({error}). Choose a checkpoint or a model folder."
        ) from error
    return _accept_checkpoint(folder, config) if (folder / REST).is_file() else build_cache.record_files(folder)


def _accept_checkpoint(folder: Path, config: dict[str, Any]) -> list[str]:
    if (folder / WORK / IDENTITY).is_file():
        raise UserError(f"accept: '{folder}' is not complete. Run its command again to resume it.")
    depth = config.get("num_hidden_layers")
    shards = sorted(path.name for path in folder.glob("layer-*.safetensors"))
    if shards != [layer_file(index) for index in range(len(shards))] or len(shards) != depth:
        raise UserError(
            f"accept: '{folder}' has the layers {', '.join(shards) or 'none'}, but config.json has "
            f"num_hidden_layers={depth}. Copy the whole checkpoint."
        )
    described = {name: describe_shard(folder / name) for name in [REST, *shards]}
    others = [name for name in loadable_files(folder) if name not in {FILE, *described}]
    Manifest(described, {name: sha256(folder / name) for name in others}).write(folder)
    return [*described, *others]
