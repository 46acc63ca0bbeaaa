"""Draw calibration windows from the training part of a text, as GPTQ draws them, and check them for overlap."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic.dataclasses import dataclass
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from haq_lab.calibration.statistics import MIN_TOKENS, CalibrationPolicy
from haq_lab.data.text import fingerprint
from haq_lab.data.windows import TEXTS, Count, Length, Windows, encode, random_crops, random_windows
from haq_lab.utils.console import say
from haq_lab.utils.errors import UserError, invalid

OVERLAP_RUN = 128  # tokens in a row that two different texts do not share by chance, even if a token is one byte
Overlap = Literal["refuse", "warn"]
ADVICE = "A model must not be evaluated on its calibration text: choose another text or path."


@dataclass(frozen=True)
class Calibration:
    """The calibration text, and how statistics are gathered on it.

    Args:
        text: Name of a registered text of the group `data`. Its training part is read.
        path: Local file or folder to read instead of the hub's copy.
        samples: Number of windows.
        seqlen: Tokens in a window.
        seed: Seed of the random windows.
        inputs: Model whose hidden states calibrate a layer: the full-precision model (`fp`), or the model as quantised
            so far (`quantized`).
        route: Tokens that calibrate the gate and up projections of a Mixture-of-Experts layer: those routed to the
            expert (`topk`), or `all`. The down projection always reads the routed tokens only.
        min_tokens: An expert with fewer tokens uses the statistics of the whole layer.
        column: Field of JSON or parquet that holds the text.
        overlap: What happens if the text shares runs of 128 tokens with an evaluation text: `refuse` or `warn`.

    Raises:
        UserError: If there is no such text, or if `path` is given for a text that is not read from a file.

    Example:
        >>> windows = Calibration("python_docs", samples=32, seqlen=512).load(tokenizer)  # doctest: +SKIP
    """

    text: str
    path: str | None = None
    samples: Count = 128
    seqlen: Length = 2048
    seed: int = 0
    inputs: Literal["fp", "quantized"] = "quantized"
    route: Literal["topk", "all"] = "topk"
    min_tokens: Count = MIN_TOKENS
    column: str = "text"
    overlap: Overlap = "refuse"

    @property
    def policy(self) -> CalibrationPolicy:
        """The settings that the calibrator uses."""
        return CalibrationPolicy(self.inputs, self.route, self.min_tokens)

    def __post_init__(self) -> None:
        if self.text not in TEXTS:
            raise invalid("calibration.text", self.text, TEXTS)
        if self.path is not None and not self._has_path:
            raise UserError(
                f"calibration.path: {self.text} has no file, so '{self.path}' would be ignored. "
                "Add calibration=text to read this file (WikiText-2: calibration=wikitext2)."
            )

    @property
    def _has_path(self) -> bool:
        return "path" in getattr(TEXTS[self.text], "__dataclass_fields__", {})

    @property
    def _place(self) -> dict[str, Any]:
        """What the class of the text needs to find it."""
        fields = getattr(TEXTS[self.text], "__dataclass_fields__", {})
        return {name: getattr(self, name) for name in ("path", "column") if name in fields}

    def load(self, tokenizer: PreTrainedTokenizerBase) -> Windows:
        """Draw the calibration windows.

        Returns:
            Token windows (samples, seqlen), and a stamp that says where they come from.

        Raises:
            UserError: If the text cannot be read or is shorter than one window.
        """
        text = TEXTS[self.text](**self._place).training_text("calibration.path")
        if text.documents:
            tokens, _ = random_crops(tokenizer, text.rows, self.samples, self.seqlen, self.seed, "calibration.seqlen")
        else:
            whole = encode(tokenizer, text.rows[0])
            tokens = random_windows(whole, self.samples, self.seqlen, self.seed, "calibration.seqlen")
        stamp: dict[str, Any] = {
            "text": self.text,
            "source": self.path or text.source,
            "samples": self.samples,
            "seqlen": self.seqlen,
            "seed": self.seed,
            "text_sha256": fingerprint("\n".join(text.rows)),
        }
        return Windows(tokens, stamp)


def _hashes_of_runs(windows: Tensor, length: int) -> np.ndarray:
    """Hash every run of `length` tokens within the windows."""
    powers = np.array([pow(0x9E3779B97F4A7C15, exponent, 2**64) for exponent in range(length)], dtype=np.uint64)
    rows = np.lib.stride_tricks.sliding_window_view(windows.numpy().astype(np.uint64), length, axis=1)
    return np.unique(rows @ powers)


def overlap_share(calibration: Tensor, evaluation: Tensor) -> tuple[float, int]:
    """Return the share of the evaluation text's runs of tokens that the calibration windows contain.

    A run has 128 tokens, or fewer if the windows are shorter. Evaluation windows are joined first, because most
    protocols cut them from one text without gaps.

    Args:
        calibration: Token windows (n, t).
        evaluation: Token windows (m, u).

    Returns:
        The share (0: no run is shared), and the length of a run.
    """
    row = evaluation.reshape(1, -1)
    length = min(OVERLAP_RUN, calibration.shape[1], row.shape[1])
    runs = _hashes_of_runs(row, length)
    return len(np.intersect1d(_hashes_of_runs(calibration, length), runs)) / len(runs), length


def check_overlap(calibration: Windows, evaluation: dict[str, Windows], overlap: Overlap = "refuse") -> None:
    """Raise an error if a model would be evaluated on its calibration text.

    Args:
        calibration: The calibration windows.
        evaluation: The evaluation windows of each text of the group `data`. With `warn`, the stamp of a text that
            shares runs gets `calibration_overlap`, the share.
        overlap: What happens if some runs of tokens are shared, such as boilerplate: `refuse`, or `warn` and go on.

    Raises:
        UserError: Both read the same text, or they share a run of 128 tokens and `overlap` is `refuse`.
    """
    for name, windows in evaluation.items():
        if calibration.protocol["text_sha256"] == windows.protocol["text_sha256"]:
            raise UserError(f"calibration: it reads the same text as data.{name}. {ADVICE}")
        share, length = overlap_share(calibration.tokens, windows.tokens)
        if not share:
            continue
        found = f"its text overlaps data.{name}: {share:.2%} of the runs of {length} tokens in a row are in both"
        if overlap == "refuse":
            raise UserError(f"calibration: {found}. {ADVICE} For shared boilerplate set calibration.overlap=warn.")
        say(f"calibration: {found}.")
        windows.protocol["calibration_overlap"] = share
