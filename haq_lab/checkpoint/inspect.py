"""Summarise and verify quantised checkpoints."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from haq_lab.checkpoint.layer_tensors import read_formats, read_forms
from haq_lab.checkpoint.manifest import FILE, Manifest
from haq_lab.checkpoint.model_card import CARD
from haq_lab.int8.linear import InputForm
from haq_lab.int8.rotation import NO_ROTATION
from haq_lab.int8.weight_format import WeightFormat
from haq_lab.storage.listed_files import ACCEPT, TEMPLATES
from haq_lab.storage.safetensors_file import read_shard, read_shard_header
from haq_lab.utils.errors import UserError


def summarize(folder: Path) -> tuple[Table, dict[str, Any]]:
    """Return a table of the checkpoint's tensors by kind, and its provenance.

    Raises:
        UserError: `folder` is not a complete checkpoint.
    """
    manifest = Manifest.read(folder)
    kinds: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0])
    for shard in manifest.shards.values():
        header, _ = read_shard_header(folder / shard.file)
        metadata = header.pop("__metadata__", {})
        path = folder / shard.file
        forms, formats = read_forms(metadata, path), read_formats(metadata, path)
        for name, entry in header.items():
            linear, _, tensor = name.rpartition(".")
            form = forms.get(linear) if tensor in ("weight", "weight_packed") else None
            narrow = tensor == "weight_packed" and linear in formats
            dtype = describe_weights(formats[linear]) if narrow else entry["dtype"]
            count = kinds[re.sub(r"\.\d+\.", ".*.", name), dtype, "" if form is None else describe(form)]
            count[0] += 1
            count[1] += entry["data_offsets"][1] - entry["data_offsets"][0]
    table = Table(
        Column("tensors", overflow="fold"),
        "dtype",
        "activations",
        "count",
        "MB",
        title=str(folder),
        title_justify="left",
    )
    for (name, dtype, activations), (number, size) in kinds.items():
        table.add_row(name, dtype, activations, str(number), f"{size / 1e6:,.2f}")
    total = sum(size for _, size in kinds.values())
    table.add_section()
    table.add_row("all", "", "", str(sum(number for number, _ in kinds.values())), f"{total / 1e6:,.2f}")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return table, config["quantization_config"]["provenance"]


def describe(form: InputForm) -> str:
    """Return how a linear takes its input, such as `token` or `token, rotated by 64`."""
    return form.scheme if form.rotation == NO_ROTATION else f"{form.scheme}, rotated by {form.rotation}"


def describe_weights(format: WeightFormat) -> str:
    """Describe a weight format in a few words, such as `I4 in groups of 64`."""
    return f"I{format.bits}" + ("" if format.group is None else f" in groups of {format.group}")


def find_problems(folder: Path) -> Iterator[str]:
    """Yield a message for each damaged, missing or superfluous file of a checkpoint.

    Every file is compared with its hash in the manifest.

    Raises:
        UserError: `folder` is not a complete checkpoint.
    """
    manifest = Manifest.read(folder)
    for file in manifest.files:
        if problem := _problem(partial(manifest.check_file, folder, file)):
            yield problem
    for shard in manifest.shards.values():
        if problem := _problem(partial(read_shard, folder, shard)):
            yield problem
    known = {FILE, CARD, *manifest.files, *manifest.shards}
    for path in sorted([*folder.iterdir(), *(folder / TEMPLATES).glob("*")]):
        if path.is_file() and path.relative_to(folder).as_posix() not in known:
            yield f"checkpoint: {path} does not belong to the checkpoint. Remove it, or run `{ACCEPT} {folder}`."


def _problem(check: Callable[[], object]) -> str | None:
    try:
        check()
    except UserError as error:
        return str(error)
    return None
