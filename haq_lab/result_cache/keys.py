"""Compute the keys of results: the hash of everything that a result depends on, and of nothing else.

A model is hashed by its content, a text by its tokens, and the code by its source. So a result of an older version of
the code is never used by a newer one, and there is no version number to maintain.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from haq_lab.models.families.lookup import GENERIC
from haq_lab.models.layerwise import LayeredModel
from haq_lab.result_cache.import_closure import import_closure
from haq_lab.storage.content_hash import file_hashes
from haq_lab.utils.environment import machine, versions
from haq_lab.utils.paths import PACKAGE, bundled


def key_of(stage: str, modules: tuple[str, ...], **depends: Any) -> str:
    """Return the key of a stage's result, 40 hexadecimal digits.

    Args:
        stage: Name of the stage.
        modules: Names of the modules that compute the result. All modules of `haq_lab` that they import count too.
        depends: Everything else that the result depends on: hashes, and settings that JSON can represent.

    Example:
        >>> len(key_of("sensitivity", ("haq_lab.calibration.sensitivity",), model="3f2a", tokens="91bc"))
        40
    """
    here = {"stage": stage, "code": _code_hash(modules), "versions": versions(), "machine": machine()}
    return hashlib.sha256(json.dumps(here | depends, sort_keys=True).encode()).hexdigest()[:40]


def of_text(model: LayeredModel, windows: Tensor) -> dict[str, Any]:
    """Return the part of a key that identifies a full-precision model, its settings and its token windows (n, t)."""
    return {"model": model_hash(model.folder), "tokens": tokens_hash(windows)} | of_settings(model)


def of_settings(model: LayeredModel) -> dict[str, Any]:
    """Return the part of a key that identifies a prefix and a family that is not of the table. Empty without them."""
    prefix = {} if model.prefix is None else {"prefix": list(model.prefix.tokens)}
    return prefix | ({"family": GENERIC} if model.family.probed else {})


def about(model: LayeredModel, windows: Tensor) -> str:
    """Describe the model and the windows (n, t) for `python -m haq_lab.result_cache ls`."""
    return f"{model.folder.name}, {len(windows)} x {windows.shape[1]} tokens"


def tokens_hash(tokens: Tensor) -> str:
    """Hash token windows (n, t), including their shape."""
    return hashlib.sha256(repr(tuple(tokens.shape)).encode() + tokens.numpy().tobytes()).hexdigest()


def model_hash(folder: Path) -> str:
    """Hash the weights and the config of a checkpoint folder."""
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
