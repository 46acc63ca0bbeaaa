"""Read and write `manifest.json`, which lists the files of a checkpoint with their hashes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from haq_lab.storage.safetensors_file import Shard
from haq_lab.utils.atomic_files import sha256, write_json
from haq_lab.utils.errors import UserError, nearest

FILE = "manifest.json"
WORK = "work"
IDENTITY = "identity.json"  # in WORK: settings of the run that began the checkpoint
REST = "rest.safetensors"
VERSION = 1


def layer_file(index: int) -> str:
    """Return the file name of the shard with decoder layer `index`."""
    return f"layer-{index:05}.safetensors"


@dataclass(frozen=True)
class Manifest:
    """The files of a checkpoint and their hashes.

    Attributes:
        shards: Safetensors files by name.
        files: SHA-256 of the other files by name.
    """

    shards: dict[str, Shard]
    files: dict[str, str]

    @property
    def bytes(self) -> int:
        """Return the size of all shards: the weights in their stored dtypes."""
        return sum(shard.bytes for shard in self.shards.values())

    def write(self, folder: Path) -> None:
        """Write `manifest.json`. It makes the folder a complete checkpoint, so call this last."""
        shards = [asdict(shard) for shard in self.shards.values()]
        write_json(folder / FILE, {"format": "haq_lab", "version": VERSION, "files": self.files, "shards": shards})

    @classmethod
    def read(cls, folder: Path, setting: str = "checkpoint") -> Manifest:
        """Return the manifest of a checkpoint folder.

        Args:
            folder: The checkpoint folder.
            setting: Name of the setting that gave the folder, for error messages.

        Raises:
            UserError: `folder` is not a checkpoint, is not complete, or has an unreadable manifest.
        """
        path = folder / FILE
        if not folder.is_dir():
            beside = [other.parent for other in folder.parent.glob(f"*/{FILE}")]
            raise UserError(f"{setting}: there is no folder '{folder}'{nearest(folder, beside)}.")
        if not path.is_file():
            if (folder / WORK / IDENTITY).is_file():
                raise UserError(f"{setting}: '{folder}' is not complete. Run its command again to resume it.")
            raise UserError(
                f"{setting}: '{folder}' is not a haq_lab checkpoint because it has no {FILE}. Choose another folder."
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != "haq_lab" or content["version"] != VERSION:
                raise UserError(
                    f"{setting}: {path} is not in format haq_lab, version {VERSION}. Write the checkpoint again."
                )
            shards = {entry["file"]: Shard(**entry) for entry in content["shards"]}
            files = dict(content["files"])
            for name in (*shards, *files):
                if Path(name).name != name or name in ("", ".."):
                    raise UserError(
                        f"{setting}: {path} names '{name}', which is outside the checkpoint. Do not use it."
                    )
            return cls(shards, files)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{setting}: {path} is not a readable manifest ({error}). Write the checkpoint again."
            ) from error

    def shard(self, folder: Path, file: str) -> Shard:
        """Return the entry of a safetensors file.

        Args:
            folder: The checkpoint folder, for error messages.
            file: Name of the file.

        Raises:
            UserError: The manifest has no such file.
        """
        if file not in self.shards:
            raise UserError(
                f"checkpoint: {folder / FILE} has no '{file}'. The checkpoint is incomplete. Write it again."
            )
        return self.shards[file]

    def check_file(self, folder: Path, file: str) -> None:
        """Check that a file other than a shard exists and matches its hash.

        Args:
            folder: The checkpoint folder.
            file: Name of the file.

        Raises:
            UserError: The file is missing, was changed, or is not in the manifest.
        """
        if file not in self.files:
            raise UserError(f"checkpoint: {folder / FILE} has no '{file}'. Write the checkpoint again.")
        if not (folder / file).is_file():
            raise UserError(f"checkpoint: {folder / file} is missing. Restore it or write the checkpoint again.")
        if sha256(folder / file) != self.files[file]:
            raise UserError(
                f"checkpoint: {folder / file} does not match its hash. Restore it or write the checkpoint again."
            )
