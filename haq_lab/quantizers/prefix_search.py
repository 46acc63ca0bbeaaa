"""Choose the prefix of a model: the tokens behind which quantizing the activations loses least.

A few tokens have activations that are far larger than all others (PrefixQuant, arXiv 2410.05265): the first token of a
sequence, and in some models also delimiters. In a prefix they keep full precision, and the text has none of them. The
search finds these tokens on the calibration text. It then predicts the error of the activations of all linears behind
each candidate, and chooses the smallest one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from haq_lab.calibration.hooks import captured_inputs
from haq_lab.calibration.observers import channels_of
from haq_lab.calibration.sensitivity import LayerSensitivity
from haq_lab.calibration.statistics import Accumulator, Needs
from haq_lab.int8.numerics import ActivationScheme
from haq_lab.models.layerwise import LayeredModel
from haq_lab.quantizers.haq.noise import COARSE, best_static_scale, dynamic_noise

RATIO = 64  # PrefixQuant's threshold: largest magnitude of an outlier token over the median token's
WINDOWS, LENGTH = 4, 512  # calibration windows that the search reads, and the most tokens of each
ENOUGH = 1024  # tokens; of more, one in COARSE sampled rows is enough
FREQUENT = 2  # outlier tokens that are candidates of their own
MOST = 5  # tokens of a candidate
WORTH = 0.9  # a prefix is chosen if it lowers the predicted error to this share at most
TIE = 1.02  # candidates within this ratio of the best are ties; the first one wins


@dataclass(frozen=True)
class Effect:
    """What a prefix does to the activations of the calibration text.

    Attributes:
        tokens: The prefix. Empty for none.
        error: Predicted KL divergence in nats a token from quantizing the activations of all linears, unsmoothed.
        at_start: Number of outlier tokens that are the first of their window.
        elsewhere: Token ids of the other outlier tokens, and how often each is one. The most frequent come first.
    """

    tokens: tuple[int, ...]
    error: float
    at_start: int
    elsewhere: list[tuple[int, int]]

    def record(self) -> dict[str, Any]:
        """Return all but the tokens, for JSON."""
        return {"error": self.error, "at_start": self.at_start, "elsewhere": self.elsewhere}


def read_windows(windows: Tensor) -> Tensor:
    """Return the part of the calibration windows (n, t) that the search reads."""
    return windows[:WINDOWS, :LENGTH].contiguous()


def candidates(
    tokenizer: PreTrainedTokenizerBase, outliers: Sequence[tuple[int, int]], room: int
) -> list[tuple[int, ...]]:
    """Return the prefixes to try: a newline, the tokens that begin or end texts, and frequent outlier tokens.

    Args:
        tokenizer: The model's tokenizer.
        outliers: `Effect.elsewhere` without a prefix.
        room: Largest number of tokens.
    """
    newline = tokenizer.encode("\n", add_special_tokens=False)
    special = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if isinstance(token, int)]
    frequent = [token for token, count in outliers if count > 1]
    single = [(newline[0],)] * (len(newline) == 1) + [(token,) for token in [*special, *frequent[:FREQUENT]]]
    # Several tokens can be outliers at once. Then the first token of the text must not be one of them.
    joined = [(*frequent[: MOST - 1], *special[:1])] if len(frequent) > 1 else []
    return [tokens for tokens in dict.fromkeys([*single, *joined]) if len(tokens) <= room]


def choose(bare: Effect, effects: Sequence[Effect]) -> Effect:
    """Return the effect of the prefix to use. This is `bare`, no prefix, unless another one is clearly better.

    Args:
        bare: The effect of no prefix.
        effects: Those of the candidates, the preferred ones first.
    """
    best = min((effect.error for effect in effects), default=bare.error)
    if best > WORTH * bare.error:
        return bare
    return next(effect for effect in effects if effect.error <= TIE * best)


@torch.no_grad()
def measure_effect(
    model: LayeredModel,
    windows: Tensor,
    scheme: ActivationScheme,
    sensitivity: list[LayerSensitivity],
) -> Effect:
    """Measure the outliers and the predicted error of the activations behind a model's prefix.

    Args:
        model: The full-precision model, with a prefix or without.
        windows: Token windows (n, t).
        scheme: Activation scheme.
        sensitivity: Sensitivity by layer and site, of the model without a prefix.
    """
    hidden = model.embed(windows)
    ratios = torch.zeros(windows.shape)
    error = 0.0
    for index in range(model.depth):
        layer = model.load_layer(index)
        sites = {group.site: channels_of(layer, group) for group in model.groups_of(index)}
        seen = {site: Accumulator(width, windows.numel(), Needs(sample=True)) for site, width in sites.items()}
        first = 0
        for batch in hidden.split(model.batch_size(hidden)):
            with captured_inputs(layer, list(sites)) as inputs:
                output = model.forward(layer, index, batch)
            for site, (x, *_) in inputs.items():
                seen[site].add(x, None)
                if x.numel() == batch.shape[0] * batch.shape[1] * sites[site]:  # an expert has some of the tokens
                    largest = x.abs().amax(dim=-1).view(batch.shape[:2])
                    part = ratios[first : first + len(batch)]
                    torch.maximum(part, largest / largest.median().clamp(min=1e-12), out=part)
            batch.copy_(output)
            first += len(batch)
        error += sum(_error(own, scheme, sensitivity[index][site].channels) for site, own in seen.items())
    is_outlier = ratios > RATIO
    elsewhere = Counter(windows[:, 1:][is_outlier[:, 1:]].tolist()).most_common()
    tokens = () if model.prefix is None else model.prefix.tokens
    return Effect(tokens, error, int(is_outlier[:, 0].sum()), elsewhere)


def _error(seen: Accumulator, scheme: ActivationScheme, cost: Tensor) -> float:
    """Return the predicted KL divergence from quantizing one input, given the cost (k,) of errors in its channels."""
    if not seen.count:
        return 0.0
    statistics = seen.finish()
    if scheme == "static":
        every = COARSE if seen.count > ENOUGH else 1  # an expert may have one token
        return best_static_scale(statistics, cost, every)[1] / 2
    return float(dynamic_noise(statistics, scheme == "token") @ cost) / 2
