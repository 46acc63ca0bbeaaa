"""SmolLM2-135M on a padded batch: the native layers against the Python layers; JSON as the last line.

    python experiments/benchmarks/cpu_batch.py
    python experiments/benchmarks/cpu_batch.py --least 16     # shorter prompts, so more padding

Both forms have the same int8 products and the same float32 head weights. "Python layers" runs transformers' layers
around the products and torch's head, as every padded batch did before the native layers had padding. The forms take
turns. A ratio is the median over the rounds of the ratio within a round, with the smallest and the largest beside it.

`prefill` and `decode`: left-padded prompts and greedy tokens with a KV cache, as `generate` runs them. `loglikelihood`:
right-padded texts without a cache and the logits of all tokens, as lm-evaluation-harness runs them.
"""

from __future__ import annotations

import argparse
import json
from statistics import median
from typing import Any

import torch
from cpu_gemm import machine
from model_speed import clock, model, since, whole
from torch import Tensor, nn

from haq_lab.int8.cpu import library
from haq_lab.models.layerwise import LayeredModel
from haq_lab.quantizers.rtn import RTN

Times = dict[str, tuple[float, float]]  # of each part: seconds by the wall clock and of CPU time


def python_layers(smol: LayeredModel) -> Any:
    """The deployed model with the original layers instead of native stacks, and torch's head."""
    deployed: Any = whole(smol, RTN())
    stacks = deployed.get_submodule(smol.family.layers)
    deployed.set_submodule(smol.family.layers, nn.ModuleList(layer for stack in stacks for layer in stack.layers))
    deployed.set_output_embeddings(smol.shell.get_output_embeddings())
    return deployed


def make_batch(arguments: argparse.Namespace, vocabulary: int, side: str) -> tuple[Tensor, Tensor]:
    """Random token ids and the attention mask, each (batch, prompt)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (arguments.batch, arguments.prompt), generator=generator)
    lengths = torch.randint(arguments.least, arguments.prompt + 1, (arguments.batch, 1), generator=generator)
    lengths[0] = arguments.prompt
    mask = torch.arange(arguments.prompt)[None] < lengths
    return ids, (mask.flip(1) if side == "left" else mask).long()


def generate(form: Any, ids: Tensor, mask: Tensor, tokens: int) -> Times:
    """Time a prompt and, by their median, the tokens after it."""
    took, cache = [], None
    for _ in range(1 + tokens):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        start = clock()
        output = form(ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True, logits_to_keep=1)
        ids, cache = output.logits[:, -1:].argmax(-1), output.cache
        took.append(since(start))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    wall, cpu = (median(seconds[i] for seconds in took[1:]) for i in (0, 1))
    return {"prefill": took[0], "decode": (wall, cpu)}


def score(form: Any, ids: Tensor, mask: Tensor) -> Times:
    """Time the logits of all tokens."""
    start = clock()
    form(ids, attention_mask=mask, use_cache=False)
    return {"loglikelihood": since(start)}


def compare(rounds: list[tuple[Times, Times]], part: str, i: int) -> dict[str, float]:
    """How many times faster the second of each pair is, on one of the clocks."""
    ratios = [slow[part][i] / fast[part][i] for slow, fast in rounds]
    return {name: round(value, 2) for name, value in
            (("median", median(ratios)), ("least", min(ratios)), ("most", max(ratios)))}  # fmt: skip


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the longest prompt")
    parser.add_argument("--least", type=int, default=48, help="tokens of the shortest prompt, at least")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    smol = model()
    forms = python_layers(smol), whole(smol, RTN())
    left, right = (make_batch(arguments, smol.config.vocab_size, side) for side in ("left", "right"))
    rounds = []
    for _ in range(arguments.rounds + 1):
        slow, fast = (generate(form, *left, arguments.tokens) | score(form, *right) for form in forms)
        rounds.append((slow, fast))
    del rounds[0]  # it warms up
    parts = ("prefill", "decode", "loglikelihood")
    result = {
        "machine": machine(),
        "isa": library.isa(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "lengths": left[1].sum(1).tolist(),
        "milliseconds_of_cpu_time": {
            name: {part: round(1e3 * median(pair[i][part][1] for pair in rounds), 1) for part in parts}
            for i, name in enumerate(("Python layers", "native layers"))
        },
        "times_faster_than_the_python_layers": {
            f"{part}.{name}": compare(rounds, part, i) for part in parts for i, name in enumerate(("wall", "cpu"))
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
