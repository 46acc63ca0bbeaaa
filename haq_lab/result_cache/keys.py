"""Keys: the hash of all that a stage's result depends on, and of nothing else.

Models count by their content, texts by the tokens that come of them, and the code by its own source: an artefact of
an older version is never taken for one of this version, and nobody has to remember a version number.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from haq_lab.models.layerwise import LayeredModel
from haq_lab.result_cache.import_closure import import_closure
from haq_lab.storage.content_hash import file_hashes
from haq_lab.utils.environment import machine, versions
from haq_lab.utils.paths import PACKAGE, bundled


def key_of(stage: str, modules: tuple[str, ...], **depends: Any) -> str:
    """Return the key of a stage's result.

    Args:
        modules: Names of the modules that compute the result. All that they import from `haq_lab` counts as well.
        depends: Everything else: hashes, and settings that JSON can hold.
    """
    here = {"stage": stage, "code": _code_hash(modules), "versions": versions(), "machine": machine()}
    return hashlib.sha256(json.dumps(here | depends, sort_keys=True).encode()).hexdigest()[:40]


def of_text(model: LayeredModel, windows: Tensor) -> dict[str, Any]:
    """What the result of running token windows (n, t) through a full-precision model depends on."""
    return {"model": model_hash(model.folder), "tokens": tokens_hash(windows)}


def about(model: LayeredModel, windows: Tensor) -> str:
    """The same in words, for lists."""
    return f"{model.folder.name}, {len(windows)} x {windows.shape[1]} tokens"


def tokens_hash(tokens: Tensor) -> str:
    """Of token windows (n, t), their shape included."""
    return hashlib.sha256(repr(tuple(tokens.shape)).encode() + tokens.numpy().tobytes()).hexdigest()


def model_hash(folder: Path) -> str:
    """Of a checkpoint folder's weights and config."""
    return hashlib.sha256(json.dumps(file_hashes(folder), sort_keys=True).encode()).hexdigest()


@functools.cache
def _code_hash(modules: tuple[str, ...]) -> str:
    """Hash the import closure of `modules`, with the kernels if `int8` is part of it."""
    files = import_closure(*modules)
    whole = hashlib.sha256()
    for path in sorted(files):
        whole.update(str(path.relative_to(PACKAGE)).encode() + path.read_bytes())
    if any(path.is_relative_to(PACKAGE / "int8") for path in files):
        kernels = bundled("kernels")
        for path in sorted(kernels.rglob("*")):
            if path.suffix in (".cpp", ".h", ".cu", ".cuh"):
                whole.update(str(path.relative_to(kernels)).encode() + path.read_bytes())
    return whole.hexdigest()
