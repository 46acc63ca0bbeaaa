"""Find the weight files of a checkpoint folder by the rule of transformers' `from_pretrained`.

The order of preference is that of `transformers.modeling_utils._get_resolved_checkpoint_files`: the file that
config.json names as `transformers_weights`, `model.safetensors`, its index, `pytorch_model.bin`, its index. Full names
are compared, so a backup or an older step in the same folder is never read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from haq_lab.utils.errors import UserError

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")
ADAPTER = "adapter_config.json"  # of peft
NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt")


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a folder.

    Attributes:
        read: Files that hold the model, in the order in which they are read.
        unread: Other files of the folder that look like weights.
        index: The index that names the files in `read`; None for a single file.
    """

    read: list[Path]
    unread: list[Path]
    index: Path | None = None

    @property
    def pickled(self) -> bool:
        """Whether the files are pickles, which can run code when they are read."""
        return any(path.suffix != ".safetensors" for path in self.read)


def weight_files(folder: Path, variant: str | None = None) -> WeightFiles:
    """Return the files that transformers would read from `folder`.

    Args:
        folder: Folder with config.json.
        variant: Name of a variant, such as `fp16` for `model.fp16.safetensors`.

    Raises:
        UserError: The folder has no weights or has an adapter, or an index is damaged or names a missing file.

    Example:
        >>> weight_files(Path("Llama-2-7b-hf")).read  # doctest: +SKIP
        [PosixPath('Llama-2-7b-hf/model-00001-of-00002.safetensors'), ...]
    """
    if (folder / ADAPTER).is_file():
        raise UserError(
            f"model.name: '{folder}' has {ADAPTER}, so transformers would apply an adapter to the weights. "
            "Merge it with peft (merge_and_unload), or move the adapter's files to another folder."
        )
    for name in (_named_by_config(folder), *_usual_names(variant)):
        path = folder / name if name else None
        if path is None or not path.is_file():
            continue
        if path.name.endswith(".index.json"):
            return WeightFiles(shards := _shards(path), _unread(folder, shards), path)
        return WeightFiles([path], _unread(folder, [path]))
    others = _unread(folder, [])
    has = f" It has {', '.join(path.name for path in others[:3])}, which transformers does not read." if others else ""
    raise UserError(f"model.name: '{folder}' has no weights named {', '.join(_usual_names(variant))}.{has}")


def _usual_names(variant: str | None) -> list[str]:
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    if variant is None:
        return list(names)
    return [f"{stem}.{variant}.{rest}" for stem, _, rest in (name.partition(".") for name in names)]


def _named_by_config(folder: Path) -> str | None:
    """Return the file that config.json names, or None."""
    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("transformers_weights")
    except (OSError, ValueError, RecursionError, AttributeError):
        return None
    if name is None:
        return None
    _refuse_outside(folder / "config.json", name)
    return str(name)


def _shards(index: Path) -> list[Path]:
    """Return the files that an index names, sorted."""
    try:
        names = sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        for name in names:
            _refuse_outside(index, name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"model: '{index}' is not a readable index ({reason}). Download it again.") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(f"model: {index} names '{missing[0]}', which does not exist. Download the model again.")
    return [index.parent / name for name in names]


def _refuse_outside(source: Path, name: object) -> None:
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(
            f"model: {source} names '{name}', which lies outside the folder. Move the file into the folder."
        )


def _unread(folder: Path, read: list[Path]) -> list[Path]:
    """Return the files of the folder that look like weights and are not read."""
    files = (path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES and path.is_file())
    return [path for path in files if path not in read and path.name not in NOT_WEIGHTS]
