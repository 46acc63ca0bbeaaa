"""haq_lab compresses large language models, Mixtures of Experts above all, to run on one edge machine.

    import haq_lab

    folder = haq_lab.quantize("smol", "haq", out="checkpoints/smol")
    model, tokenizer = haq_lab.load(folder)
    haq_lab.results.compare("runs/first", "runs/second")

The functions are imported when they are first used, so `import haq_lab` is fast and loads no torch.
Their types are in `__init__.pyi`. This file must not name them in an import, because then every key of the result cache
would depend on the whole project (`haq_lab.result_cache.import_closure`).
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

__all__ = ["__version__", "evaluate", "load", "load_results", "quantize", "results", "run"]

try:
    __version__ = version("haq-lab")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name == "results":
        return import_module("haq_lab.results")
    if name in __all__:
        return getattr(import_module("haq_lab.api"), name)
    raise AttributeError(f"module 'haq_lab' has no attribute '{name}'")
