"""Write a quantised checkpoint while the pass goes on, and go on with one that was killed.

checkpoint.dir=DIR
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import nn

from haq_lab.checkpoint.layer_tensors import layer_content, storable
from haq_lab.checkpoint.manifest import FILE, IDENTITY, REST, WORK, Manifest, layer_file
from haq_lab.checkpoint.provenance import differences
from haq_lab.checkpoint.resume_state import layers_done, restore_state, save_state
from haq_lab.models.layerwise import LayeredModel
from haq_lab.quantizers.pass_result import PassState
from haq_lab.storage.safetensors_file import Shard, write_shard
from haq_lab.utils.atomic_files import sha256, write_json
from haq_lab.utils.errors import UserError

METHOD = "haq_lab"  # a quantization method that no other loader knows, so none takes int8 levels for weights


class CheckpointWriter:
    """A checkpoint in the making; the pass's `LayerStore`. `resumed` says how many layers an earlier run had done.

    Args:
        folder: Where it goes: absent, empty, or one that the same run began.
        model: The model that is quantised.
        provenance: Where the checkpoint comes from.
        evaluation: Stamps of the evaluation texts, whose hidden states are kept too.
        force: Begin again, whichever checkpoint is there.

    Raises:
        UserError: The folder holds something else, or another run is writing there.
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
        began = record.is_file()
        if not began:
            self._refuse_what_is_there(force)
        try:
            self.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            where = f" at '{error.filename}'" if error.filename else ""
            raise UserError(f"checkpoint.dir: '{self.folder}' cannot be made: {error.strerror}{where}") from error
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"checkpoint.dir: another run is writing to '{self.folder}'") from None
        for left in [*self.folder.glob(".*.part"), *self.work.glob(".*.part")]:  # what a killed run wrote aside
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        if force:
            self._clear()
        elif began and (others := list(differences(identity, json.loads(record.read_text(encoding="utf-8"))))):
            self.release()
            raise UserError(
                f"checkpoint.dir: '{self.folder}' was begun by a run that differs in {', '.join(others[:5])}; "
                "choose another folder, or set force=true to begin again"
            )
        write_json(record, identity)

    def _clear(self) -> None:
        """Remove what an earlier run wrote, which another model's would not overwrite all of."""
        if (self.folder / FILE).is_file():
            manifest = Manifest.read(self.folder, "checkpoint.dir")
            (self.folder / FILE).unlink()
            for file in [*manifest.shards, *manifest.files]:
                (self.folder / Path(file).name).unlink(missing_ok=True)
        for shard in self.folder.glob("layer-*.safetensors"):
            shard.unlink()
        for state in self.work.glob("state-*"):
            shutil.rmtree(state)

    def _refuse_what_is_there(self, force: bool) -> None:
        """What is not of our making is left alone, `force` or not: all of `work/` is removed in the end."""
        if (self.folder / FILE).is_file():
            Manifest.read(self.folder, "checkpoint.dir")
            if not force:
                raise UserError(
                    f"checkpoint.dir: '{self.folder}' holds a finished checkpoint (model=quantized model.path="
                    f"{self.folder} runs it); choose another folder, or set force=true to write it again"
                )
        elif self.folder.is_dir() and any(item != self.work or _used(item) for item in self.folder.iterdir()):
            raise UserError(f"checkpoint.dir: '{self.folder}' is not empty; choose another folder")

    def restore(self, state: PassState) -> int:
        """See `haq_lab.quantizers.pass_result.LayerStore`."""
        self.shards = restore_state(self.work, state)
        return self.resumed

    def keep(self, index: int, layer: nn.Module, state: PassState) -> None:
        """Write a layer's shard, then the state after it."""
        prefix = f"{self.model.family.layers}.{index}."
        own, schemes = layer_content(layer)
        tensors = {prefix + name: tensor for name, tensor in own.items()}
        named = json.dumps({prefix + name: scheme for name, scheme in schemes.items()})
        shard = write_shard(self.folder / layer_file(index), tensors, {"schemes": named})
        self.shards.append(shard)
        save_state(self.work, index, state, self.shards)

    def finish(self) -> None:
        """Write what lies outside the layers, the tokenizer, the config, and the manifest last."""
        rest = {name: storable(tensor) for name, tensor in self.model.outside().items()}
        shards = {shard.file: shard for shard in [write_shard(self.folder / REST, rest, {}), *self.shards]}
        self.model.tokenizer().save_pretrained(self.folder)
        config = json.loads(self.model.config.to_json_string())
        head = self.model.int8_head is not None  # made again on reading: it follows from the float one
        config["quantization_config"] = {"quant_method": METHOD, "int8_head": head, "provenance": self.provenance}
        write_json(self.folder / "config.json", config)
        others = (path for path in self.folder.iterdir() if path.is_file() and not path.name.startswith("."))
        files = {path.name: sha256(path) for path in sorted(others) if path.name not in {*shards, FILE}}
        Manifest(shards, files).write(self.folder)

    def close(self) -> None:
        """Remove the hidden states: nothing is left to be resumed."""
        shutil.rmtree(self.work)

    def release(self) -> None:
        """Let others write there."""
        self._lock.release()


def _used(folder: Path) -> bool:
    """Whether more is there than a start leaves that was killed at once: a lock, and what was written aside."""
    return not folder.is_dir() or any(not item.name.startswith(".") for item in folder.iterdir())
