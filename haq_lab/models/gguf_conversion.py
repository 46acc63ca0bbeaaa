"""Convert a GGUF file to a checkpoint folder. transformers reads the tensors.

A file that transformers would read only in part is refused, because it fills what it does not find with random numbers
or defaults. What it leaves out of the config, and the file says, is added.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

import torch

from haq_lab.utils.errors import UserError

FIELDS = {  # that transformers does not take from the metadata of every architecture: field of the config, key
    "head_dim": "attention.key_length",
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}
ROTARY_TENSORS = ("rope_freqs.", "rope_factors_")
REMEDY = "Choose the model's safetensors files: model=hf model.name=FOLDER."

# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: the size of each scalar type by its number
SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9


def convert_gguf(path: Path, target: Path) -> None:
    """Dequantise a GGUF file to float32 and write it as a checkpoint folder.

    Args:
        path: A file that begins with `GGUF`.
        target: Folder for config.json, the tokenizer and safetensors files.

    Raises:
        UserError: The file is damaged, or transformers reads its architecture not at all or only in part.

    Example:
        >>> convert_gguf(Path("model.gguf"), Path("model"))  # doctest: +SKIP
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.integrations.gguf import read_gguf_metadata

    from haq_lab.utils.hugging_face import quiet_transformers

    with quiet_transformers():
        try:
            _check_lengths(path)
            metadata, tensors = read_gguf_metadata(str(path))
            _check_architecture(path, metadata)
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
            _complete(config, metadata)
            _check_rotation(path, config, metadata, tensors)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                config=config,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        except UserError:
            raise
        except Exception as error:  # the reader does not check its input, so it raises almost any class
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"model.path: '{path}' is damaged or not supported by transformers ({reason}). "
                "Choose another GGUF file."
            ) from error
        model, report = loaded
        if missing := sorted(report["missing_keys"]):
            raise UserError(
                f"model.path: transformers finds {len(missing)} tensors of the model not in '{path}', such as "
                f"'{missing[0]}'. {REMEDY}"
            )
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _check_architecture(path: Path, metadata: dict[str, Any]) -> None:
    """Raise UserError if transformers does not read the architecture, or would take its sizes from defaults."""
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    def letters(name: str) -> str:  # GGUF files have `qwen3moe` and `gpt-oss`, transformers has `qwen3_moe`
        return name.replace("-", "").replace("_", "")

    architecture = metadata["general.architecture"]
    known = {*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_CONFIG_ARCHS} - {"general", "tokenizer"}
    if letters(architecture) not in map(letters, known):
        raise UserError(
            f"model.path: '{path}' has the architecture '{architecture}', whose GGUF files transformers does not "
            f"read. {REMEDY}"
        )
    if f"{architecture}.block_count" not in metadata:
        raise UserError(f"model.path: '{path}' does not say how many layers it has. Choose another GGUF file.")


def _complete(config: Any, metadata: dict[str, Any]) -> None:
    """Set the fields of a config that the file states and transformers does not take from it."""
    architecture = metadata["general.architecture"]
    for field, key in FIELDS.items():
        value = metadata.get(f"{architecture}.{key}")
        if hasattr(config, field) and value is not None:
            setattr(config, field, value)
    if hasattr(config, "query_pre_attn_scalar"):  # no file states it; llama.cpp knows the Gemma models of 27B by depth
        largest = (config.model_type, config.num_hidden_layers) in (("gemma2", 46), ("gemma3_text", 62))
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if largest else config.head_dim


def _check_rotation(path: Path, config: Any, metadata: dict[str, Any], tensors: tuple[str, ...]) -> None:
    """Raise UserError if the rotary embedding of the file is not the config's."""
    architecture = metadata["general.architecture"]
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none" or any(name.startswith(ROTARY_TENSORS) for name in tensors):
        raise UserError(
            f"model.path: '{path}' scales its rotary frequencies, which transformers does not read from GGUF files. "
            f"{REMEDY}"
        )
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotary = getattr(config, "rope_parameters", None) or {}
    width = int(head * rotary.get("partial_rotary_factor", 1.0))
    stated = metadata.get(f"{architecture}.rope.dimension_count", width)
    if stated != width:
        raise UserError(
            f"model.path: '{path}' rotates {stated} channels of each head, and transformers reads it as {width}. "
            f"{REMEDY}"
        )


def _check_lengths(path: Path) -> None:
    """Check that the metadata of a GGUF file ends before the file does.

    Args:
        path: A file that begins with `GGUF`.

    Raises:
        ValueError: A value has an unknown type, is nested, or is longer than the file.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        stream.seek(8)  # magic and version
        _, values = _numbers(stream, "<QQ")
        for _ in range(values):  # ends at the end of the file
            _skip_string(stream, size)
            (kind,) = _numbers(stream, "<I")
            _skip_value(stream, kind, size)


def _skip_value(stream: BinaryIO, kind: int, size: int) -> None:
    count = 1
    if kind == ARRAY:
        kind, count = _numbers(stream, "<IQ")
    if kind == STRING:
        for _ in range(count):  # ends at the end of the file
            _skip_string(stream, size)
    elif kind in SCALAR_BYTES:
        _skip(stream, count * SCALAR_BYTES[kind], size)
    else:
        raise ValueError(f"a value has the unsupported type {kind}")


def _skip_string(stream: BinaryIO, size: int) -> None:
    _skip(stream, _numbers(stream, "<Q")[0], size)


def _skip(stream: BinaryIO, count: int, size: int) -> None:
    if stream.tell() + count > size:
        raise ValueError("its header is longer than the file")
    stream.seek(count, 1)


def _numbers(stream: BinaryIO, layout: str) -> tuple[int, ...]:
    content = stream.read(struct.calcsize(layout))
    if len(content) < struct.calcsize(layout):
        raise ValueError("its header is longer than the file")
    return struct.unpack(layout, content)
