"""Compare SmolLM2-135M in int8 with full precision in torch, on one thread. The last line is JSON.

    python experiments/benchmarks/cpu_model.py
    python experiments/benchmarks/cpu_model.py --forms int8 "int8, head in bfloat16" "int8, head too"
    python experiments/benchmarks/cpu_model.py --moe --rounds 5
    python experiments/benchmarks/cpu_model.py --forms int8 "int8, rotated" --rounds 15

Each form reads a prompt and decodes greedily with a KV cache, through the same calls of the same model. The forms run
in turn. A ratio is the median over the rounds of the ratio to the first form within a round, in wall time and in CPU
time. Other work disturbs CPU time less. With `--windows`, each form's perplexity on Python's own texts is measured
too.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from typing import Any

import torch
from cpu_gemm import machine
from model_speed import Seconds, model, one_round, ratios, whole

from haq_lab.data.windows import PythonDocs
from haq_lab.int8.cpu import library
from haq_lab.models.layerwise import LayeredModel
from haq_lab.quantizers.rtn import RTN

FORMS: dict[str, Callable[[LayeredModel], Any]] = {
    "torch fp32": lambda smol: whole(smol, None),
    "int8, Python between the products": lambda smol: whole(smol, RTN(), fused=False),
    "int8": lambda smol: whole(smol, RTN()),  # the head as the checkpoint has it, in float32
    "int8, rotated": lambda smol: whole(
        smol, RTN(rotation="block")
    ),  # as HAQ: blocks of 64, and of 128 in front of down
    "int8, head in bfloat16": lambda smol: whole(smol, RTN(), head=torch.bfloat16),
    "int8, head too": lambda smol: whole(smol, RTN(), head=torch.int8),  # as quantizer.lm_head=true
}


def perplexity(form, windows: torch.Tensor) -> float:
    """Return the perplexity per token, computed window by window."""
    total = 0.0
    for window in windows:
        logits = form(window[None], use_cache=False).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits.float(), window[1:], reduction="sum"))
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=[*FORMS], metavar="FORM", help=", ".join(FORMS))
    parser.add_argument("--moe", action="store_true", help="use the model upcycled to 8 experts, 2 per token")
    parser.add_argument("--windows", type=int, default=0, help="number of windows of 512 tokens for perplexity")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    smol = model(arguments.moe)
    forms = {name: FORMS[name](smol) for name in arguments.forms}
    first = arguments.forms[0]
    prompt = torch.randint(0, smol.config.vocab_size, (1, arguments.prompt), generator=torch.Generator().manual_seed(0))
    seconds = {name: Seconds() for name in forms}
    for turn in range(arguments.rounds + 1):
        for name, form in forms.items():
            one_round(form, prompt, arguments.tokens, seconds[name] if turn else Seconds())  # the first is a warm-up
    result = {
        "machine": machine(),
        "isa": library.isa() if library.available() else None,
        "threads": arguments.threads,
        "torch": torch.__version__,
        "model": smol.folder.name,
        "prompt": arguments.prompt,
        "first": first,
        "times_faster_than_the_first": {name: ratios(took, seconds[first]) for name, took in seconds.items()},
        "tokens_per_cpu_second": {
            name: {
                "prefill": round(arguments.prompt / min(cpu for _, cpu in took.prefill)),
                "decode": round(1 / min(cpu for _, cpu in took.decode), 1),
            }
            for name, took in seconds.items()
        },
    }
    if arguments.windows:
        tokens = PythonDocs(windows=arguments.windows, seqlen=512).load(smol.tokenizer()).tokens
        result["perplexity"] = {name: round(perplexity(form, tokens), 4) for name, form in forms.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
