"""How many tokens an expert needs, and whose: weights solved on calibration tokens, judged on unseen ones.

    python -m haq_lab.models build smol_moe
    python experiments/expert_calibration.py --model FOLDER --text wikitext2/train.txt --layers 1 6

For the experts of full-precision layers: tr(dW H dW^T) over the tokens of the last third of the windows that are
routed to the expert, of weights solved under several Hessians of the first two thirds, relative to rounding to
nearest. All are smoothed alike first (SmoothQuant's factor, strength 0.5). JSON as the last line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor

from haq_lab.calibration.dataset import Calibration
from haq_lab.calibration.hooks import captured_inputs
from haq_lab.calibration.statistics import InputStatistics
from haq_lab.models.layerwise import LayeredModel
from haq_lab.quantizers.gptq_solver import factorize, solve
from haq_lab.quantizers.grid import round_to_nearest, row_scale
from haq_lab.quantizers.smoothing import smoothing_factor

FEW = (8, 32, 128, 512)


def statistics(x: Tensor, stands_in: bool = False) -> InputStatistics:
    """Of all these rows."""
    return InputStatistics(len(x), x.abs().amax(0), x.t() @ x / len(x), stands_in=stands_in)


def candidates(x: Tensor, own: Tensor, seen: int) -> Iterator[tuple[str, InputStatistics]]:
    """What could calibrate an expert, from its inputs (tokens, k) for every token, of which the first may be seen."""
    mine, others = x[:seen][own[:seen]], x[:seen][~own[:seen]]
    shuffled = mine[torch.randperm(len(mine))]
    yield "own", statistics(mine)
    yield "all", statistics(x[:seen])
    yield "others", statistics(others[:: max(1, len(others) // (4 * x.shape[1]))], stands_in=True)
    for count in FEW:
        if count <= len(mine):
            yield f"own {count}", statistics(shuffled[:count])


def errors(weight: Tensor, x: Tensor, own: Tensor, seen: int) -> dict[str, float]:
    """Error on unseen tokens over that of rounding, by what was calibrated on; `+` where the Hessian is shrunk."""
    factor = smoothing_factor(x[:seen].abs().amax(0), weight.abs().amax(0), 0.5)
    x, weight = x / factor, weight * factor
    unseen = x[seen:][own[seen:]]
    scale = row_scale(weight, 8)

    def error(levels: Tensor) -> float:
        return float((unseen @ (levels * scale[:, None] - weight).t()).square().sum())

    nearest, found = error(round_to_nearest(weight, scale, 8)), {}
    for name, given in candidates(x, own, seen):
        for mark, hessian in (("", given.hessian), ("+", given.shrunk_hessian())):
            assert hessian is not None
            factored = factorize(hessian, 0.01, act_order=True)
            assert factored is not None
            found[name + mark] = error(solve(weight, factored, scale, 8)) / nearest
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a Mixture-of-Experts checkpoint")
    parser.add_argument("--text", required=True, help="plain text")
    parser.add_argument("--layers", type=int, nargs="+", default=[1])
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--seqlen", type=int, default=1024)
    chosen = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    model = LayeredModel(chosen.model)
    text = Calibration("text", path=chosen.text, samples=chosen.windows, seqlen=chosen.seqlen)
    hidden = model.embed(text.load(model.tokenizer()).tokens)
    seen = chosen.windows * 2 // 3 * chosen.seqlen
    rows: list[dict[str, Any]] = []
    for index in range(max(chosen.layers) + 1):
        layer: Any = model.load_layer(index)
        if index in chosen.layers:
            parts = []
            for batch in hidden.split(model.batch_size(hidden)):
                with captured_inputs(layer, ["mlp.gate"], stop=True) as inputs:
                    model.forward(layer, index, batch)
                parts.append(inputs["mlp.gate"][0].reshape(-1, hidden.shape[-1]))
            x = torch.cat(parts)
            _, _, routed = layer.mlp.gate(x)
            for number, expert in enumerate(layer.mlp.experts):
                own = (routed == number).any(dim=1)
                if int(own[:seen].sum()) < min(FEW) or not own[seen:].any():
                    continue
                inner = {"gate, up": (torch.cat([expert.gate_proj.weight, expert.up_proj.weight]), x)}
                inner["down"] = (expert.down_proj.weight, expert.activate(x))
                for name, (weight, received) in inner.items():
                    facts = {"layer": index, "expert": number, "linear": name, "tokens": int(own[:seen].sum())}
                    rows.append(facts | errors(weight, received, own, seen))
                    print(" ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()))
        model.run(layer, index, hidden)
    means = {
        name: {
            key: geometric_mean(row[key] for row in own if key in row)
            for key in own[0]
            if isinstance(own[0][key], float)
        }
        for name in ("gate, up", "down")
        if (own := [row for row in rows if row["linear"] == name])
    }
    print(json.dumps({"geometric_means": means, "rows": rows}))


if __name__ == "__main__":
    main()
