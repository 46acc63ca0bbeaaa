"""Register haq_lab checkpoints with transformers.

After `import haq_lab.hf`, transformers loads a checkpoint like any other model, with int8 weights and our kernels:

    import haq_lab.hf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("checkpoints/smol")
    tokenizer = AutoTokenizer.from_pretrained("checkpoints/smol")
    print(tokenizer.decode(model.generate(**tokenizer("Once upon a time", return_tensors="pt"))[0]))

This module imports neither torch nor transformers. transformers imports its quantizers when it first loads a model,
which takes about a second, and the method is registered then.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

QUANTIZERS = "transformers.quantizers.auto"  # the module that has the tables of quantization methods


class _RegisterAfterImport(MetaPathFinder):
    """Finds transformers' quantizers on the import path, and registers the method when they are imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != QUANTIZERS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    from haq_lab.hf.quantizer import register

    register()


if QUANTIZERS in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterAfterImport())
