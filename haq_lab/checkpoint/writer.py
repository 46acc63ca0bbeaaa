"""Write a quantised checkpoint during the quantization pass, and resume an interrupted one.

The setting `checkpoint.dir=DIR` turns it on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import nn

from haq_lab.checkpoint.layer_tensors import layer_content, read_forms, to_storable
from haq_lab.checkpoint.manifest import FILE, IDENTITY, REST, ROUTING, WORK, Manifest, layer_file
from haq_lab.checkpoint.model_card import CARD
from haq_lab.checkpoint.provenance import differences
from haq_lab.checkpoint.resume_state import layers_done, restore_state, save_state
from haq_lab.int8.rotation import NO_ROTATION
from haq_lab.models.companion_files import copy_companion_files
from haq_lab.models.families.lookup import GENERIC
from haq_lab.models.layerwise import LayeredModel
from haq_lab.quantizers.pass_result import PassState
from haq_lab.routing.trace import Trace
from haq_lab.storage.safetensors_file import Shard, read_shard_header, write_shard
from haq_lab.utils.atomic_files import atomic_folder, sha256, write_json
from haq_lab.utils.errors import UserError

INDEX = "model.safetensors.index.json"  # the file by which transformers finds the shards
METHOD = "haq_lab"


class CheckpointWriter:
    """Writes a quantised checkpoint layer by layer. It is the `LayerStore` of the quantization pass.

    Args:
        folder: Target folder. It must be absent or empty, or contain an unfinished checkpoint of the same run.
        model: The model that is quantised.
        provenance: Provenance of the checkpoint (`haq_lab.checkpoint.provenance`).
        evaluation: Source and hash of each evaluation text, because their hidden states are saved too.
        force: Start again and overwrite a checkpoint in `folder`.

    Attributes:
        resumed: Number of layers that an earlier run has finished.

    Raises:
        UserError: The folder has other content, cannot be created, or another run is writing to it.
    """

    def __init__(
        self, folder: Path, model: LayeredModel, provenance: dict[str, Any], evaluation: dict[str, Any], force: bool
    ):
        self.folder, self.model, self.provenance = folder, model, provenance
        self.work = folder / WORK
        self.shards: list[Shard] = []
        self._lock = FileLock(self.work / ".lock")
        self._begin(json.loads(json.dumps({"provenance": provenance, "evaluation": evaluation})), force)
        self.resumed = layers_done(self.work)

    def _begin(self, identity: dict[str, Any], force: bool) -> None:
        record = self.work / IDENTITY
        resuming = record.is_file()
        if not resuming:
            self._refuse_other_content(force)
        try:
            self.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            where = f" at '{error.filename}'" if error.filename else ""
            raise UserError(
                f"checkpoint.dir: '{self.folder}' cannot be created: {error.strerror}{where}. Choose another folder."
            ) from error
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"checkpoint.dir: another run is writing to '{self.folder}'. Wait for it or choose another folder."
            ) from None
        for partial in [*self.folder.glob(".*.part"), *self.work.glob(".*.part")]:  # temporary files of a killed run
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        if force:
            self._clear()
        elif resuming and (others := list(differences(identity, json.loads(record.read_text(encoding="utf-8"))))):
            self.release()
            raise UserError(
                f"checkpoint.dir: '{self.folder}' was begun by a run that differs in {', '.join(others[:5])}. "
                "Choose another folder, or set force=true to start again."
            )
        write_json(record, identity)

    def _clear(self) -> None:
        """Remove the files of an earlier run. A model with fewer layers would not overwrite all of them."""
        if (self.folder / FILE).is_file():
            manifest = Manifest.read(self.folder, "checkpoint.dir")
            (self.folder / FILE).unlink()
            (self.folder / CARD).unlink(missing_ok=True)
            for file in [*manifest.shards, *manifest.files]:
                (self.folder / Path(file).name).unlink(missing_ok=True)
        for shard in self.folder.glob("layer-*.safetensors"):
            shard.unlink()
        for state in self.work.glob("state-*"):
            shutil.rmtree(state)

    def _refuse_other_content(self, force: bool) -> None:
        """Raise UserError if the folder has other content. `force` overwrites a checkpoint, but no other files."""
        if (self.folder / FILE).is_file():
            Manifest.read(self.folder, "checkpoint.dir")
            if not force:
                raise UserError(
                    f"checkpoint.dir: '{self.folder}' contains a finished checkpoint. Choose another folder, set "
                    f"force=true to write it again, or run it with model=quantized model.path={self.folder}."
                )
        elif self.folder.is_dir() and any(item != self.work or _has_content(item) for item in self.folder.iterdir()):
            raise UserError(f"checkpoint.dir: '{self.folder}' is not empty. Choose another folder.")

    def restore(self, state: PassState) -> int:
        """Restore the state of an interrupted run and return the number of finished layers (`LayerStore.restore`)."""
        self.shards = restore_state(self.work, state)
        return self.resumed

    def keep(self, index: int, layer: nn.Module, state: PassState) -> None:
        """Write the shard of a layer, then save the state of the pass (`LayerStore.keep`)."""
        prefix = f"{self.model.family.layers}.{index}."
        content = layer_content(layer).renamed(lambda name: prefix + name)
        shard = write_shard(self.folder / layer_file(index), content.tensors, content.metadata)
        self.shards.append(shard)
        save_state(self.work, index, state, self.shards)

    def finish(self, routing: Trace | None = None) -> None:
        """Write the tensors outside the layers, the tokenizer, the config, and last the manifest.

        Args:
            routing: The routing trace of the calibration pass, if it was recorded. Offloading uses it after loading.
        """
        rest = {name: to_storable(tensor) for name, tensor in self.model.read_outer_tensors().items()}
        shards = {shard.file: shard for shard in [write_shard(self.folder / REST, rest, {}), *self.shards]}
        # Files that are in the folder for another reason must not be listed, so write ours to a folder of their own.
        with atomic_folder(self.work / "files") as aside:
            self._write_listed_files(aside, shards.values())
            if routing is not None:
                routing.save(aside / ROUTING)
        files = {path.relative_to(self.work / "files").as_posix(): path for path in (self.work / "files").rglob("*")}
        hashes = {name: sha256(path) for name, path in sorted(files.items()) if path.is_file()}
        for name in hashes:
            (self.folder / name).parent.mkdir(exist_ok=True)
            files[name].replace(self.folder / name)
        Manifest(shards, hashes, self._rotated()).write(self.folder)

    def _rotated(self) -> bool:
        """Return whether a linear rotates its input. An earlier run may have written the layers."""
        file = self.folder / layer_file(0)
        header, _ = read_shard_header(file)
        return any(form.rotation != NO_ROTATION for form in read_forms(header.get("__metadata__", {}), file).values())

    def _write_listed_files(self, folder: Path, shards: Collection[Shard]) -> None:
        """Write all files of the checkpoint other than the shards. The manifest lists what is written here."""
        copy_companion_files(self.model, folder)
        config = json.loads(self.model.config.to_json_string())
        head = self.model.int8_head is not None  # not stored: loading quantises the float head again
        config["quantization_config"] = {
            "quant_method": METHOD,
            "int8_head": head,
            "dtype": config.get("dtype"),
            "provenance": self.provenance,
        }
        if self.model.family.probed:  # loading must find the same linears
            config["quantization_config"]["family"] = GENERIC
        if self.model.prefix is not None:  # its keys and values are in the files of the layers
            config["quantization_config"]["prefix"] = self.model.prefix.stamp()
        # transformers skips a method that it does not know. It refuses to build a model in an integer type, so it does
        # not read the levels as float weights unless haq_lab.hf is imported.
        config["dtype"] = "int8"
        write_json(folder / "config.json", config)
        write_json(folder / INDEX, _hub_index(shards))

    def close(self) -> None:
        """Remove the saved states. The finished checkpoint does not need them."""
        shutil.rmtree(self.work)

    def release(self) -> None:
        """Release the lock on the folder."""
        self._lock.release()


def _hub_index(shards: Collection[Shard]) -> dict[str, Any]:
    """Return the content of `model.safetensors.index.json`, by which transformers finds the shards."""
    weight_map = {name: shard.file for shard in shards for name in shard.tensors}
    return {"metadata": {"total_size": sum(shard.bytes for shard in shards)}, "weight_map": weight_map}


def remove_saved_states(folder: Path) -> None:
    """Remove the saved states of a finished checkpoint, unless a run is writing to it.

    They are left if a run was killed after it had written its results.

    Args:
        folder: The checkpoint folder. Other folders are not changed.
    """
    work = folder / WORK
    if not ((folder / FILE).is_file() and (work / IDENTITY).is_file()):
        return
    with suppress(Timeout, OSError), FileLock(work / ".lock", timeout=0):
        shutil.rmtree(work)


def _has_content(folder: Path) -> bool:
    """Return whether `work/` has more than the lock and temporary files of a run that was killed at its start."""
    return not folder.is_dir() or any(not item.name.startswith(".") for item in folder.iterdir())
