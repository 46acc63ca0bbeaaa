"""Calibration windows: random crops of training text, drawn as GPTQ draws them."""

from __future__ import annotations

import random
from typing import Any, Literal

import numpy as np
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from haq_lab.calibration.statistics import MIN_TOKENS, CalibrationPolicy
from haq_lab.data.text import fingerprint, load_rows, python_docs
from haq_lab.data.windows import Count, Length, Windows, encode, own_text, random_crops
from haq_lab.utils.errors import UserError

OVERLAP_RUN = 128  # tokens in a row that no two different texts share by chance, were a token only a byte
ADVICE = "a model must not be evaluated on what it was calibrated with: choose another text or path"


@dataclass(frozen=True)
class Calibration:
    """Args:
    text: Where the text comes from.
    path: Local file in place of the hub's copy.
    samples: How many windows.
    seqlen: Tokens a window.
    seed: Of the random crops.
    inputs: Whose hidden states calibrate a layer: the full-precision model's (`fp`) or those of the model
        as quantised so far.
    route: Of a Mixture-of-Experts layer, which tokens calibrate an expert's gate and up projections: those
        that are routed to it (`topk`), or `all`. Its down projection reads only what is routed to it.
    min_tokens: An expert with fewer tokens is calibrated on the layer's.
    """

    text: Literal["wikitext2", "c4", "text", "python_docs"]
    path: str | None = None
    samples: Count = 128
    seqlen: Length = 2048
    seed: int = 0
    inputs: Literal["fp", "quantized"] = "quantized"
    route: Literal["topk", "all"] = "topk"
    min_tokens: Count = MIN_TOKENS

    @property
    def policy(self) -> CalibrationPolicy:
        """What the calibrator goes by."""
        return CalibrationPolicy(self.inputs, self.route, self.min_tokens)

    def __post_init__(self) -> None:
        if self.text == "python_docs" and self.path is not None:
            raise UserError("calibration.path: python_docs has no file; calibration=text reads one")

    def load(self, tokenizer: PreTrainedTokenizerBase) -> Windows:
        """Token windows (samples, seqlen) and where they come from."""
        if self.text == "c4":
            documents = load_rows("c4", "train", self.path, "calibration.path")
            whole = "\n".join(documents)
            tokens = random_crops(tokenizer, documents, self.samples, self.seqlen, self.seed, "calibration.seqlen")
        else:
            whole = self._whole_text()
            tokens = self._crops(encode(tokenizer, whole))
        stamp: dict[str, Any] = {
            "text": self.text,
            "source": self.path or ("hub" if self.text in ("wikitext2", "c4") else "python"),
            "samples": self.samples,
            "seqlen": self.seqlen,
            "seed": self.seed,
            "text_sha256": fingerprint(whole),
        }
        return Windows(tokens, stamp)

    def _whole_text(self) -> str:
        if self.text == "wikitext2":
            return "\n\n".join(load_rows("wikitext2", "train", self.path, "calibration.path"))
        if self.text == "python_docs":
            return python_docs("calibration")
        return own_text(self.path, "calibration.path")

    def _crops(self, tokens: Tensor) -> Tensor:
        if len(tokens) < self.seqlen:
            raise UserError(
                f"calibration.seqlen: the text has {len(tokens)} tokens, less than one window of {self.seqlen}"
            )
        draw = random.Random(self.seed)
        last = max(len(tokens) - self.seqlen - 1, 0)
        starts = [draw.randint(0, last) for _ in range(self.samples)]
        return torch.stack([tokens[start : start + self.seqlen] for start in starts])


def _runs(windows: Tensor, length: int) -> np.ndarray:
    """A hash of every run of `length` tokens within the windows."""
    powers = np.array([pow(0x9E3779B97F4A7C15, exponent, 2**64) for exponent in range(length)], dtype=np.uint64)
    rows = np.lib.stride_tricks.sliding_window_view(windows.numpy().astype(np.uint64), length, axis=1)
    return np.unique(rows @ powers)


def refuse_overlap(calibration: Tensor, evaluation: dict[str, Tensor]) -> None:
    """Raise `UserError` where a run of 128 tokens (or a whole shorter crop) calibrates and evaluates.

    Evaluation windows are taken as one row, since most protocols cut them from one text without a gap.
    """
    for name, windows in evaluation.items():
        row = windows.reshape(1, -1)
        length = min(OVERLAP_RUN, calibration.shape[1], row.shape[1])
        if len(np.intersect1d(_runs(calibration, length), _runs(row, length))):
            raise UserError(
                f"calibration: its text overlaps data.{name} ({length} tokens in a row stand in both); {ADVICE}"
            )


def refuse_same_text(calibration: Windows, evaluation: dict[str, Windows]) -> None:
    """Raise `UserError` where both come from the very same text, even if the crops miss each other."""
    for name, windows in evaluation.items():
        if calibration.protocol["text_sha256"] == windows.protocol["text_sha256"]:
            raise UserError(f"calibration: it reads the same text as data.{name}; {ADVICE}")
