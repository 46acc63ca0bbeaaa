"""Create a backend by its name, without composing a run's config."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
import yaml

from haq_lab.int8.backend import Backend
from haq_lab.utils.errors import invalid
from haq_lab.utils.paths import bundled

AUTO = "auto"


def make_backend(name: str = AUTO) -> Backend:
    """Return the backend of an option of the group `backend`, with its default settings.

    Args:
        name: The option, such as `cpu`. `auto` is `cuda` on a machine with a GPU and CuPy, else `cpu`.

    Raises:
        UserError: There is no such option, or the machine cannot run it.

    Example:
        >>> make_backend("cpu").kernels
    """
    if name == AUTO:
        has_gpu = torch.cuda.is_available() and importlib.util.find_spec("cupy") is not None
        name = "cuda" if has_gpu else "cpu"
    options = {path.stem: path for path in (bundled("conf") / "backend").glob("*.yaml")}
    if name not in options:
        raise invalid("backend", name, [AUTO, *sorted(options)])
    settings: dict[str, Any] = yaml.safe_load(options[name].read_text(encoding="utf-8"))
    module, _, cls = settings.pop("_target_").rpartition(".")
    return getattr(importlib.import_module(module), cls)(**settings)
