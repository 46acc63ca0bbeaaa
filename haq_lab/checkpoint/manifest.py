"""Read and write `manifest.json`, which lists the files of a checkpoint with their hashes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NotRequired  # pydantic needs it before Python 3.12

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from haq_lab.storage.json_form import read_json
from haq_lab.storage.listed_files import ACCEPT, is_inside, unlisted_files
from haq_lab.storage.safetensors_file import Shard
from haq_lab.utils.atomic_files import sha256, write_json
from haq_lab.utils.errors import UserError, nearest

FILE = "manifest.json"
WORK = "work"
IDENTITY = "identity.json"  # in WORK: settings of the run that began the checkpoint
REST = "rest.safetensors"
ROUTING = "routing.trace"  # the router's choices on the calibration text, if the run recorded them
VERSION = 2  # version 1 has no rotations; a checkpoint without them is still written as version 1


class _Version(TypedDict):
    format: str
    version: int


class _Content(TypedDict):
    files: dict[str, str]
    shards: list[Shard]
    rotated: NotRequired[bool]


_VERSION, _CONTENT = TypeAdapter(_Version), TypeAdapter(_Content)


def layer_file(index: int) -> str:
    """Return the file name of the shard with decoder layer `index`."""
    return f"layer-{index:05}.safetensors"


@dataclass(frozen=True)
class Manifest:
    """The files of a checkpoint and their hashes.

    Attributes:
        shards: Safetensors files by name.
        files: SHA-256 of the other files by name.
        rotated: Whether some linears rotate their input (`haq_lab.int8.rotation`). The layers' files say which.
    """

    shards: dict[str, Shard]
    files: dict[str, str]
    rotated: bool = False

    @property
    def bytes(self) -> int:
        """Return the size of all shards: the weights in their stored dtypes."""
        return sum(shard.bytes for shard in self.shards.values())

    def write(self, folder: Path) -> None:
        """Write `manifest.json`. It makes the folder a complete checkpoint, so call this last."""
        shards = [asdict(shard) for shard in self.shards.values()]
        header = {"version": VERSION, "rotated": True} if self.rotated else {"version": 1}
        write_json(folder / FILE, {"format": "haq_lab", **header, "files": self.files, "shards": shards})

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
            advice = (
                f"Copy the whole folder, or run `{ACCEPT} {folder}` if you trust its files."
                if (folder / REST).is_file()
                else "Choose another folder."
            )
            raise UserError(f"{setting}: '{folder}' is not a haq_lab checkpoint because it has no {FILE}. {advice}")
        try:
            version = read_json(path, _VERSION)
            if version["format"] == "haq_lab" and version["version"] > VERSION:
                raise UserError(
                    f"{setting}: '{folder}' was written by a newer version of haq_lab: its format is "
                    f"{version['version']}, and this version reads {VERSION}. Update haq_lab."
                )
            if version["format"] != "haq_lab" or version["version"] < 1:
                raise UserError(
                    f"{setting}: {path} is not in format haq_lab, version 1 to {VERSION}. Write the checkpoint again."
                )
            content = read_json(path, _CONTENT)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{setting}: {path} is not a readable manifest ({error}). Write the checkpoint again."
            ) from error
        shards = {shard.file: shard for shard in content["shards"]}
        for name in (*shards, *content["files"]):
            if not is_inside(name):
                raise UserError(f"{setting}: {path} names '{name}', which is outside the checkpoint. Do not use it.")
        return cls(shards, content["files"], content.get("rotated", False))

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

    def check_files(self, folder: Path) -> None:
        """Check every file other than the shards, and refuse files that are not listed but that a loader would read.

        A shard is checked when it is read.

        Args:
            folder: The checkpoint folder.

        Raises:
            UserError: A file is missing, was changed, or was added.
        """
        for file in self.files:
            self.check_file(folder, file)
        for name in unlisted_files(folder, {FILE, *self.files, *self.shards}):
            raise UserError(
                f"checkpoint: {folder / name} is not listed in {FILE}, but a loader would read it. "
                f"Remove it, or run `{ACCEPT} {folder}` if you trust it."
            )

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
