"""Create a backend by its name, without composing a run's config."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from omegaconf import OmegaConf

from haq_lab.config.help import options
from haq_lab.config.object_specs import specify
from haq_lab.int8.backend import Backend
from haq_lab.utils.errors import invalid
from haq_lab.utils.paths import bundled

AUTO = "auto"


def make_backend(name: str = AUTO, **settings: Any) -> Backend:
    """Return the backend of an option of the group `backend`.

    Args:
        name: The option, such as `cpu`. `auto` is `cuda` on a machine with a GPU and CuPy, else `cpu`.

        settings: Settings of the option that differ from its defaults, such as `device="cuda:1"`.

    Raises:
        UserError: There is no such option or setting, or the machine cannot run it.

    Example:
        >>> make_backend("cpu").kernels
    """
    if name == AUTO:
        has_gpu = torch.cuda.is_available() and importlib.util.find_spec("cupy") is not None
        name = "cuda" if has_gpu else "cpu"
    if name not in (known := options("backend")):
        raise invalid("backend", name, [AUTO, *known])
    defaults = OmegaConf.load(bundled("conf") / "backend" / f"{name}.yaml")
    spec = specify(OmegaConf.merge(defaults, settings), "backend")
    assert spec is not None
    backend: Backend = spec.create(Backend)
    return backend
