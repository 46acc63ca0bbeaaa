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
from haq_lab.storage.content_hash import file_hashes
from haq_lab.utils.environment import machine, versions
from haq_lab.utils.paths import PACKAGE, bundled


def key_of(stage: str, code: tuple[str, ...], **depends: Any) -> str:
    """The key of a stage's result.

    Args:
        code: Parts of `haq_lab` that compute it: subpackages, or modules as `onepass.py`.
        depends: Everything else: hashes, and settings that JSON can hold.
    """
    here = {"stage": stage, "code": _code_hash(("result_cache", *code)), "versions": versions(), "machine": machine()}
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
def _code_hash(parts: tuple[str, ...]) -> str:
    """Of the source of these parts; the kernels belong to `int8`."""
    whole = hashlib.sha256()
    for root in [*(PACKAGE / part for part in parts), *([bundled("kernels")] if "int8" in parts else [])]:
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                whole.update(path.name.encode() + path.read_bytes())
    return whole.hexdigest()
