"""Write a tokenizer to a GGUF file, as llama.cpp's `convert_hf_to_gguf.py` does (conversion/base.py).

llama.cpp splits a text by a regular expression that it has built in, and a GGUF file names that expression.
`convert_hf_to_gguf.py` recognises a tokenizer by a hash of the tokens of a sample text. Here, its pre-tokenizer is
compared with those of llama.cpp (src/llama-vocab.cpp), so fine-tuned and extended vocabularies are recognised too.
"""

from __future__ import annotations

import json
import re
from typing import Any, cast

from gguf import GGUFWriter, SpecialVocab, TokenType
from transformers import PreTrainedTokenizerFast

from haq_lab.checkpoint.model import QuantizedModel
from haq_lab.utils.errors import UserError

Spec = dict[str, Any]  # the content of tokenizer.json
_SEQUENCES = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}  # fields of a part of type Sequence
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp's names. The key has the steps of the pre-tokenizer (a Split by its regular expression), and whether words
# of the vocabulary become one token without merges.
_NAMES = {
    (("ByteLevel",), False): "gpt-2",
    (("Digits", "ByteLevel"), False): "smollm",
    ((rf"{_WORDS}|\p{{N}}{{1,3}}{_REST}",), True): "llama-bpe",
    ((rf"{_WORDS}|\p{{N}}{{1,3}}{_REST}",), False): "smaug-bpe",
    ((rf"{_WORDS}|\p{{N}}{_REST}",), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
}


def add_tokenizer(writer: GGUFWriter, model: QuantizedModel, rows: int) -> None:
    """Add the tokenizer, its special tokens and its chat template to the metadata of a GGUF file.

    Args:
        writer: Writer whose header is not yet written.
        model: The checkpoint.
        rows: Rows of the embedding. Rows without a token get an unused one.

    Raises:
        UserError: llama.cpp has no such tokenizer.
    """
    tokenizer = model.tokenizer()
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise _unsupported(model, f"it is a {type(tokenizer).__name__}, which has no tokenizer.json")
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    if spec["model"]["type"] != "BPE":
        raise _unsupported(model, f"it is of type {spec['model']['type']}")
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < rows]  # the model has no others
    has_byte_tokens = spec["model"]["byte_fallback"]
    special = SpecialVocab(model.folder, load_merges=not has_byte_tokens, n_vocab=rows)
    tokens = _tokens(spec, rows)
    if has_byte_tokens:  # made from a SentencePiece model
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_adds_space(spec))
        writer.add_token_scores(_scores(spec, tokens))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer_name(spec, model))
        # llama.cpp refuses a file without merges. This pair never occurs.
        special.merges = special.merges or ["[PAD] [PAD]"]
    writer.add_token_list(tokens)
    writer.add_token_types(_types(spec, tokens))
    special.add_to_gguf(writer, quiet=True)


def _tokens(spec: Spec, rows: int) -> list[str]:
    tokens = [f"[PAD{number}]" for number in range(rows)]
    for token, number in spec["model"]["vocab"].items():
        tokens[number] = token
    for added in spec["added_tokens"]:
        tokens[added["id"]] = added["content"]
    return tokens


def _types(spec: Spec, tokens: list[str]) -> list[TokenType]:
    types = [TokenType.UNUSED] * len(tokens)
    for token, number in spec["model"]["vocab"].items():
        is_byte = spec["model"]["byte_fallback"] and re.fullmatch("<0x[0-9A-F]{2}>", token)
        types[number] = TokenType.BYTE if is_byte else TokenType.NORMAL
    for added in spec["added_tokens"]:
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        if added["content"] == spec["model"]["unk_token"]:
            types[added["id"]] = TokenType.UNKNOWN
    return types


def _scores(spec: Spec, tokens: list[str]) -> list[float]:
    """Return a score for each token, by which llama.cpp orders the merges. An earlier merge has a higher score."""
    rank: dict[str, int] = {}
    for number, pair in enumerate(spec["model"]["merges"]):
        rank.setdefault("".join(pair), number)
    return [-float(rank.get(token, len(rank))) for token in tokens]


def _adds_space(spec: Spec) -> bool:
    """Return whether the tokenizer puts a space before a text."""
    return any(
        part["type"] == "Prepend" or part.get("prepend_scheme", "never") != "never"
        for part in (*_parts(spec, "normalizer"), *_parts(spec, "pre_tokenizer"))
    )


def _pre_tokenizer_name(spec: Spec, model: QuantizedModel) -> str:
    normalizers = {part["type"] for part in _parts(spec, "normalizer")}
    if normalizers - {"NFC"}:
        raise _unsupported(model, f"it has the normalizer {', '.join(sorted(normalizers))}")
    parts = _parts(spec, "pre_tokenizer")
    steps = tuple(
        cast(str, part["pattern"].get("Regex")) if part["type"] == "Split" else cast(str, part["type"])
        for part in parts
        if part["type"] != "ByteLevel" or part["use_regex"]
    )
    name = _NAMES.get((steps, spec["model"]["ignore_merges"]))
    if name is None or any(part.get("add_prefix_space") for part in parts):
        raise _unsupported(model, f"it has the pre-tokenizer {json.dumps(spec['pre_tokenizer'])[:120]}")
    return name


def _parts(spec: Spec, kind: str) -> list[Spec]:
    """Return the normalizers or pre-tokenizers in the order in which they run."""
    part = spec[kind]
    if part is None:
        return []
    return part[_SEQUENCES[kind]] if part["type"] == "Sequence" else [part]


def _unsupported(model: QuantizedModel, reason: str) -> UserError:
    return UserError(
        f"export --for gguf: llama.cpp has no tokenizer like that of '{model.folder}': {reason}. "
        "Choose --for transformers or --for vllm."
    )
