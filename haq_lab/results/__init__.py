"""Load the results of runs as a table, print or draw them, and compare runs.

    import haq_lab

    haq_lab.results.compare("runs/first", "runs/second")

`compare` is imported when it is first used, so that importing this package stays fast.
"""

from importlib import import_module
from typing import Any

__all__ = ["compare"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("haq_lab.results.comparison"), name)
    raise AttributeError(f"module 'haq_lab.results' has no attribute '{name}'")
