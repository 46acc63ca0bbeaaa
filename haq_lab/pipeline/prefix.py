"""Find the prefix that `quantizer.prefix` names or searches, and put it before a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from haq_lab.calibration.cached import CachedCalibration
from haq_lab.calibration.prefix_states import cached_prefix
from haq_lab.calibration.sensitivity import measure_sensitivity
from haq_lab.calibration.statistics import CalibrationPolicy
from haq_lab.data.windows import Windows
from haq_lab.int8.numerics import ActivationScheme
from haq_lab.models.layerwise import LayeredModel
from haq_lab.quantizers.base import AUTO_PREFIX, NO_PREFIX, Quantizer
from haq_lab.quantizers.prefix_search import MOST, Effect, candidates, choose, measure_effect, read_windows
from haq_lab.result_cache.keys import about, key_of, of_text
from haq_lab.result_cache.store import Artifact, Store
from haq_lab.storage.hidden_state_buffer import HiddenStateBuffer
from haq_lab.utils.errors import UserError

STAGE = "prefix_search"


@dataclass(frozen=True)
class PrefixChoice:
    """A model with its prefix, and how it was chosen.

    Attributes:
        model: The model, with the prefix if it has one.
        report: One line that names the prefix. None if no prefix was asked for.
        event: The same for `events.jsonl`: the tokens, and for `auto` the predicted errors of all candidates.
    """

    model: LayeredModel
    report: str | None = None
    event: dict[str, Any] | None = None


def choose_prefix(
    quantizer: Quantizer | None,
    model: LayeredModel,
    texts: Mapping[str, Windows],
    calibration: Windows | None,
    store: Store,
) -> PrefixChoice:
    """Put the prefix that `quantizer.prefix` names or searches before a model.

    Args:
        quantizer: The quantizer, or None. A checkpoint has its own prefix.
        model: The model.
        texts: The windows that the model will read, by the name of the setting that gives their length.
        calibration: Calibration windows. `auto` needs them.
        store: The result cache.

    Raises:
        UserError: The prefix is empty, has unknown tokens, or does not fit the model with the windows.
    """
    if quantizer is None or quantizer.prefix == NO_PREFIX:
        return _as_it_is(model)
    if not model.family.takes_prefix:
        raise UserError(
            f"quantizer.prefix: a '{model.config.model_type}' takes no prefix, because some of its layers have no "
            "usual keys and values. Choose quantizer.prefix=none."
        )
    longest = max((windows.tokens.shape[1] for windows in texts.values()), default=1)
    tokenizer = model.tokenizer()
    if quantizer.prefix != AUTO_PREFIX:
        tokens = _named_tokens(quantizer.prefix, tokenizer, model)
        _refuse_too_long(tokens, model, texts)
        with_prefix = model.with_prefix(cached_prefix(store, model, tokens, _text(tokens, tokenizer)))
        return PrefixChoice(with_prefix, f"prefix: {_named(tokens, tokenizer)}", _entry(tokens, tokenizer))
    assert calibration is not None, "the search needs a calibration text"
    effects = _search(quantizer, model, tokenizer, read_windows(calibration.tokens), model.max_tokens - longest, store)
    chosen = choose(effects[0], effects[1:])
    found = [_entry(each.tokens, tokenizer) | each.record() for each in effects]
    event = _entry(chosen.tokens, tokenizer) | {"chosen_by": "quantizer.prefix=auto", "candidates": found}
    report = f"prefix: {_named(chosen.tokens, tokenizer)}, chosen by quantizer.prefix=auto ({_reason(chosen, effects)})"
    if chosen.tokens:
        model = model.with_prefix(cached_prefix(store, model, chosen.tokens, _text(chosen.tokens, tokenizer)))
    return PrefixChoice(model, report, event)


def stamp_prefix(model: LayeredModel, texts: Iterable[Windows]) -> None:
    """Add a model's prefix to the protocol stamps of its texts. Their figures are comparable with nothing published."""
    if model.prefix is not None:
        for windows in texts:
            windows.protocol["prefix"] = model.prefix.stamp()
            if "comparable_with" in windows.protocol:
                windows.protocol["comparable_with"] = []


def _as_it_is(model: LayeredModel) -> PrefixChoice:
    if model.prefix is None:
        return PrefixChoice(model)
    text = json.dumps(model.prefix.text, ensure_ascii=False)
    return PrefixChoice(model, f"prefix: {text}, of the checkpoint", model.prefix.stamp())


def _named_tokens(
    prefix: str | tuple[int, ...], tokenizer: PreTrainedTokenizerBase, model: LayeredModel
) -> tuple[int, ...]:
    """Return the token ids of a text, or check those that the user names."""
    if isinstance(prefix, str):
        if not (tokens := tuple(tokenizer.encode(prefix, add_special_tokens=False))):
            raise UserError(
                f"quantizer.prefix: '{prefix}' has no token in this model's vocabulary. Choose another text."
            )
        return tokens
    rows = len(model.shell.get_input_embeddings().weight)  # type: ignore[arg-type]
    for token in prefix:
        if not 0 <= token < rows:
            nearest = min(max(token, 0), rows - 1)
            raise UserError(
                f"quantizer.prefix: there is no token {token}, because the model has the tokens 0 to {rows - 1} "
                f"(nearest: {nearest})."
            )
    return prefix


def _refuse_too_long(tokens: tuple[int, ...], model: LayeredModel, texts: Mapping[str, Windows]) -> None:
    limit = model.max_tokens
    if len(tokens) >= limit:
        raise UserError(
            f"quantizer.prefix: {len(tokens)} tokens are too many for the model's {limit} positions. Choose a few."
        )
    for setting, windows in texts.items():
        if len(tokens) + (length := windows.tokens.shape[1]) > limit:
            raise UserError(
                f"quantizer.prefix: {len(tokens)} and the {length} tokens of {setting} are more than the model's "
                f"{limit} positions. Choose {setting}={limit - len(tokens)} or less, or quantizer.prefix=none."
            )


def _search(
    quantizer: Quantizer,
    model: LayeredModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Tensor,
    room: int,
    store: Store,
) -> list[Effect]:
    """Return the effects of no prefix and of all candidates, from the result cache if they are there.

    Args:
        windows: Calibration windows (n, t).
        room: Positions that the windows leave for a prefix.
    """
    scheme: ActivationScheme = "static" if quantizer.activations == "auto" else quantizer.activations

    def measure() -> Artifact:
        cached = CachedCalibration(store, model, windows, CalibrationPolicy())
        buffer = HiddenStateBuffer(limit=0)
        costs = cached.sensitivity(len(windows), lambda tokens: measure_sensitivity(model, tokens, buffer))
        effects = [measure_effect(model, windows, scheme, costs)]
        for tokens in candidates(tokenizer, effects[0].elsewhere, room):
            trial = model.with_prefix(cached_prefix(store, model, tokens, _text(tokens, tokenizer)))
            effects.append(measure_effect(trial, windows, scheme, costs))
        return Artifact(facts=[[list(each.tokens), *each.record().values()] for each in effects])

    if store.folder is None:
        facts = measure().facts
    else:
        usual = candidates(tokenizer, [], room)
        key = key_of(
            STAGE, (__name__,), **of_text(model, windows), scheme=scheme, candidates=usual, room=min(room, MOST)
        )
        facts = store.fetch(STAGE, key, measure, about(model, windows)).facts
    return [Effect(tuple(tokens), *record) for tokens, *record in facts]


def _text(tokens: tuple[int, ...], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(tokens)))


def _entry(tokens: tuple[int, ...], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {"tokens": list(tokens), "text": _text(tokens, tokenizer)}


def _named(tokens: tuple[int, ...], tokenizer: PreTrainedTokenizerBase) -> str:
    return json.dumps(_text(tokens, tokenizer), ensure_ascii=False) if tokens else NO_PREFIX


def _reason(chosen: Effect, effects: list[Effect]) -> str:
    bare = effects[0].error
    if chosen.tokens:
        return f"predicted error {chosen.error:.2g} nats a token, {bare:.2g} without"
    if len(effects) == 1:
        return "the windows leave no position for it"
    best = min(effect.error for effect in effects[1:])
    return f"predicted error {bare:.2g} nats a token, at best {best:.2g} with one"
