"""Measure KL divergence with its standard error over windows, with and without a prefix.

    python experiments/prefix.py --prefix none '\\n' auto --activations static token -- \\
        model=smol data=[wikitext2] data.wikitext2.windows=4 data.wikitext2.seqlen=1024 data.wikitext2.path=FILE \\
        calibration=wikitext2 calibration.samples=16 calibration.seqlen=1024 calibration.path=FILE

Each row is compared with full precision behind the same prefix. A prefix's perplexities are those of the same tokens.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from haq_lab.checkpoint.model import open_model
from haq_lab.config.build import build
from haq_lab.config.compose import compose_run
from haq_lab.config.override_syntax import override_value
from haq_lab.data.windows import Windows
from haq_lab.pipeline.prefix import choose_prefix
from haq_lab.pipeline.sequential import PassInputs, sequential_pass


def window_scores(model, tokens, hidden) -> dict[str, list[float]]:
    """Return the mean negative log-likelihood by level, and the mean KL divergence, of each window."""
    scores: dict[str, list[float]] = {level: [] for level in [*hidden, "kl"]}
    for number, window in enumerate(tokens):
        logs = {level: model.head(states[number : number + 1])[0, :-1].float() for level, states in hidden.items()}
        logs = {level: F.log_softmax(logits, dim=-1) for level, logits in logs.items()}
        for level, values in logs.items():
            scores[level].append(float(F.nll_loss(values, window[1:])))
        divergence = F.kl_div(logs["quantized"], logs["fp"], reduction="sum", log_target=True) / len(window[1:])
        scores["kl"].append(float(divergence))
    return scores


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Return the mean and its standard error over windows."""
    return sum(values) / len(values), float(torch.tensor(values).std()) / math.sqrt(len(values))


@torch.no_grad()
def measure(overrides: list[str]) -> str:
    """Run one pass and return its row of the table."""
    config, _ = compose_run([*overrides, "measure=[perplexity]", "tracking=none"])
    experiment = build(config)
    model = open_model(experiment.model, experiment.backend)
    tokenizer = model.tokenizer()
    texts: dict[str, Windows] = {name: data.load(tokenizer) for name, data in experiment.data.items()}
    calibration, store = experiment.calibration.load(tokenizer), experiment.result_cache.open()
    started = time.perf_counter()
    choice = choose_prefix(experiment.quantizer, model, texts, calibration, store)
    searched = time.perf_counter() - started
    name, windows = next(iter(texts.items()))
    inputs = PassInputs(
        choice.model, experiment.quantizer, experiment.backend, calibration.tokens, experiment.calibration.policy,
        {name: windows.tokens},
    )  # fmt: skip
    passed = sequential_pass(inputs, lambda index, layer: None, None, store)
    scores = window_scores(choice.model, windows.tokens, passed.hidden[name])
    change, change_error = mean_and_error([q - fp for q, fp in zip(scores["quantized"], scores["fp"], strict=True)])
    kl, kl_error = mean_and_error(scores["kl"])
    full = {level: math.exp(mean_and_error(scores[level])[0]) for level in ("fp", "fp_no_prefix") if level in scores}
    shown = [f"{full['fp']:.3f}", f"{full.get('fp_no_prefix', full['fp']):.3f}"]
    shown += [f"{100 * math.expm1(change):+.2f} ± {100 * change_error:.2f} %", f"{kl:.5f} ± {kl_error:.5f}"]
    return " | ".join([*shown, f"{searched:.0f} s", choice.report or "", str(choice.event or "")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prefix", nargs="+", default=["none", "\\n", "auto"])
    parser.add_argument("--activations", nargs="+", default=["static"])
    parser.add_argument("--out", type=Path, help="file to append the rows to")
    parser.add_argument("overrides", nargs="*", help="overrides of the run, after --")
    given = parser.parse_args()
    for activations in given.activations:
        for prefix in given.prefix:
            settings = [f"quantizer.activations={activations}", f"quantizer.prefix={override_value(prefix)}"]
            row = f"| {activations} | `{prefix}` | {measure([*given.overrides, *settings])} |"
            print(row, flush=True)
            if given.out is not None:
                with given.out.open("a") as stream:
                    stream.write(row + "\n")


if __name__ == "__main__":
    main()
