"""Cut prompts from the text of a run, or draw random ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from haq_lab.calibration.dataset import Calibration
from haq_lab.data.windows import Windows
from haq_lab.models.layerwise import LayeredModel
from haq_lab.utils.errors import UserError

RANDOM = "random"
SHORTEST_WINDOW = 2  # tokens; the texts cut no shorter windows


@dataclass(frozen=True)
class PromptTexts:
    """The texts that prompts can be cut from: the first text of `data`, or the calibration text if there is none.

    Attributes:
        data: The objects of the group `data` by name, in the order in which the user names them.
        calibration: The settings of the calibration text.
    """

    data: Mapping[str, Any]
    calibration: Calibration

    def load(self, tokenizer: PreTrainedTokenizerBase, tokens: int, count: int, setting: str) -> Windows:
        """Cut prompts from the text. They do not depend on the windows on which perplexity is measured.

        Args:
            tokenizer: Tokenizer of the model.
            tokens: Tokens in a prompt.
            count: Number of prompts.
            setting: The setting that gives `tokens`, for error messages.

        Returns:
            Prompts (n, tokens) and their protocol stamp. n is less than `count` if the text is short.

        Raises:
            UserError: The text cannot be read or is shorter than one prompt.
        """
        seqlen = max(tokens, SHORTEST_WINDOW)
        if self.data:
            name, text = next(iter(self.data.items()))
            given = f"data.{name}.seqlen"
            text = replace(text, seqlen=seqlen, **({"windows": None} if hasattr(text, "windows") else {}))
        else:
            name, given = f"{self.calibration.text} (calibration)", "calibration.seqlen"
            text = replace(self.calibration, seqlen=seqlen, samples=count)
        try:
            windows = text.load(tokenizer)
        except UserError as error:  # `seqlen` is the length of a prompt here, so the message names its setting
            raise UserError(str(error).replace(given, setting)) from error
        stamp = {key: windows.protocol.get(key) for key in ("seed", "source", "split", "text_sha256")}
        return Windows(windows.tokens[:count, :tokens], {"text": name, "tokens": tokens, **stamp})


def random_prompts(vocabulary: int, tokens: int, count: int, seed: int) -> Windows:
    """Draw prompts of random token ids. Hit rates on them say nothing about text.

    Args:
        vocabulary: Number of token ids to draw from.
        tokens: Tokens in a prompt.
        count: Number of prompts.
        seed: Seed of the draw.

    Returns:
        Prompts (count, tokens) and their protocol stamp.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, vocabulary, (count, tokens), generator=generator)
    return Windows(drawn, {"text": RANDOM, "tokens": tokens, "seed": seed})


def refuse_too_long(setting: str, prompt: int, decoded: int, model: LayeredModel) -> None:
    """Raise UserError if a prompt and the tokens that are decoded after it have more positions than the model.

    Args:
        setting: The setting that gives `prompt`, for the message.
        prompt: Tokens in the prompt.
        decoded: Tokens to decode.
        model: The model.
    """
    if prompt + decoded > (limit := model.max_tokens):
        raise UserError(
            f"{setting}: {prompt} and {decoded} decoded tokens are more than the model's {limit} positions. "
            f"Choose at most {limit} for both together."
        )
