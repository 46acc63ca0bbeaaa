"""What a checkpoint folder must hold, to the byte."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from haq_lab.storage.safetensors_file import Shard
from haq_lab.utils.atomic_files import sha256, write_json
from haq_lab.utils.errors import UserError, nearest

FILE = "manifest.json"
WORK = "work"
IDENTITY = "identity.json"  # in there: whose work it is
REST = "rest.safetensors"
VERSION = 1


def layer_file(index: int) -> str:
    """The name of a layer's shard."""
    return f"layer-{index:05}.safetensors"


@dataclass(frozen=True)
class Manifest:
    """Attributes:
    shards: By file.
    files: SHA-256 of the other files.
    """

    shards: dict[str, Shard]
    files: dict[str, str]

    @property
    def bytes(self) -> int:
        """Of all shards: what the weights take on disk, each tensor in its stored dtype."""
        return sum(shard.bytes for shard in self.shards.values())

    def write(self, folder: Path) -> None:
        """Write `manifest.json`: from here on the folder is a checkpoint."""
        shards = [asdict(shard) for shard in self.shards.values()]
        write_json(folder / FILE, {"format": "haq_lab", "version": VERSION, "files": self.files, "shards": shards})

    @classmethod
    def read(cls, folder: Path, setting: str = "checkpoint") -> Manifest:
        """The manifest of a checkpoint folder, which `setting` named.

        Raises `UserError` where it is none, or not a whole one.
        """
        path = folder / FILE
        if not folder.is_dir():
            beside = [other.parent for other in folder.parent.glob(f"*/{FILE}")]
            raise UserError(f"{setting}: there is no folder '{folder}'{nearest(folder, beside)}")
        if not path.is_file():
            if (folder / WORK / IDENTITY).is_file():
                raise UserError(f"{setting}: '{folder}' is not finished; the command that began it goes on with it")
            raise UserError(f"{setting}: '{folder}' is no checkpoint of haq_lab (it has no {FILE})")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != "haq_lab" or content["version"] != VERSION:
                raise UserError(f"{setting}: {path} is of another format or version than haq_lab {VERSION}")
            shards = {entry["file"]: Shard(**entry) for entry in content["shards"]}
            files = dict(content["files"])
            for name in (*shards, *files):
                if Path(name).name != name or name in ("", ".."):
                    raise UserError(f"{setting}: {path} names '{name}', which lies outside the checkpoint")
            return cls(shards, files)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{setting}: {path} is not a readable manifest ({error})") from error

    def shard(self, folder: Path, file: str) -> Shard:
        """One entry. Raises `UserError` where there is none."""
        if file not in self.shards:
            raise UserError(f"checkpoint: {folder / FILE} has no '{file}'; the checkpoint is not whole")
        return self.shards[file]

    def check_file(self, folder: Path, file: str) -> None:
        """Raise `UserError` unless a file that is no shard is there and as it was written."""
        if file not in self.files:
            raise UserError(f"checkpoint: {folder / FILE} has no '{file}'")
        if not (folder / file).is_file():
            raise UserError(f"checkpoint: {folder / file} is missing")
        if sha256(folder / file) != self.files[file]:
            raise UserError(f"checkpoint: {folder / file} does not match its hash; it was changed")
