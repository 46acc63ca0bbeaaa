"""Export a checkpoint in the format of another engine.

export(Path("checkpoints/smol"), Path("smol-vllm"), "vllm")
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from haq_lab.checkpoint.export.compressed_tensors import export_for_transformers, export_for_vllm
from haq_lab.checkpoint.export.gguf_file import export_gguf
from haq_lab.checkpoint.model import QuantizedModel
from haq_lab.int8.backend import ReferenceBackend
from haq_lab.utils.errors import UserError, invalid

ENGINES: dict[str, Callable[[QuantizedModel, Path], None]] = {
    "transformers": export_for_transformers,
    "vllm": export_for_vllm,
    "gguf": export_gguf,
}


def export(folder: Path, target: Path, engine: str = "transformers") -> None:
    """Export the checkpoint in `folder` to `target`, with one layer in memory at a time.

    Args:
        folder: A checkpoint that `checkpoint.dir` or `haq_lab.quantize` has written.
        target: Folder to create, or for `gguf` the file to create. It appears only when it is complete.
        engine: A key of `ENGINES`. `transformers` and `vllm` read compressed-tensors, `gguf` is for llama.cpp.

    Raises:
        UserError: The checkpoint is damaged, rotates inputs or has a prefix, the engine cannot run it, or `target`
            already exists.

    Example:
        >>> export(Path("checkpoints/smol"), Path("smol.gguf"), "gguf")
    """
    if engine not in ENGINES:
        raise invalid("export --for", engine, ENGINES)
    if target.exists():
        raise UserError(f"export: '{target}' already exists. Choose a new path.")
    model = QuantizedModel(folder, ReferenceBackend())
    if model.prefix is not None:
        raise UserError(
            f"export: '{folder}' has the prefix {model.prefix.text!r}, which other engines do not support. "
            "Quantise the model again with quantizer.prefix=none."
        )
    if model.manifest.rotated:
        raise UserError(
            f"export: '{folder}' rotates the inputs of its linears, which no other engine does. "
            "Quantise the model with quantizer.rotation=none."
        )
    ENGINES[engine](model, target)
