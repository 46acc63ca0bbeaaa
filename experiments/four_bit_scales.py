"""How to choose the scales of 4-bit weights: the error on unseen text of some linears, relative to rounding to nearest.

    python -m haq_lab.models build smol
    python experiments/four_bit_scales.py --model FOLDER --train wikitext2/train.txt --test wikitext2/test.txt

For linears of full-precision layers in groups of 64: tr(dW H dW^T) over unseen text, of weights solved with the Hessian
of 12 x 1,024 tokens of the training text. `rotated`: behind the closed-form factor (with the weights' energy as cost)
and a block Hadamard rotation. The rows:

- static, act order: scales from the weights; columns are solved by falling diag(H) and keep the scale of their group
- static, in order: the same, with the columns in their order
- dynamic, in order: a group's scale is computed when the solver reaches it, from the weights as compensated so far
- search: the scale of each group minimises its rounding error, weighted by the conditional variance; then act order
- search, least squares: then the scales are fitted to the levels by least squares under the Hessian

The last line is JSON with the mean over the linears.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from haq_lab.calibration.hooks import captured_inputs
from haq_lab.int8.rotation import block_size, rotate
from haq_lab.int8.weight_format import WeightFormat, spread_scales
from haq_lab.models.layerwise import LayeredModel
from haq_lab.quantizers.gptq_solver import Factor, factorize, solve
from haq_lab.quantizers.grid import round_to_nearest, row_scale, searched_scale, weight_scale

GROUP = 64
FORMAT = WeightFormat(4, GROUP)
LAYERS = (3, 8, 11)
LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def windows(model: LayeredModel, path: Path, count: int) -> Tensor:
    """Return the first token windows (count, 1024) of a text."""
    tokens = model.tokenizer()(path.read_text(encoding="utf-8")[:400_000])["input_ids"]
    return torch.tensor(tokens[: count * 1024]).view(count, 1024)


def hessians(model: LayeredModel, tokens: Tensor) -> dict[tuple[int, str], Tensor]:
    """Return the mean of x x^T of each studied linear's input in the full-precision model."""
    hidden = model.embed(tokens)
    found: dict[tuple[int, str], Tensor] = {}
    for index in range(max(LAYERS) + 1):
        layer = model.load_layer(index)
        for window in hidden.split(1) if index in LAYERS else ():
            with captured_inputs(layer, list(LINEARS), stop=True) as inputs:
                model.forward(layer, index, window)
            for name, (x, *_) in inputs.items():
                rows = x.reshape(-1, x.shape[-1])
                found[index, name] = found.get((index, name), 0) + rows.t() @ rows / tokens.numel()
        model.run(layer, index, hidden)
    return found


def error(weight: Tensor, levels: Tensor, scale: Tensor, hessian: Tensor) -> float:
    """Return tr(dW H dW^T) of rounded weights."""
    difference = levels.float() * spread_scales(scale, weight.shape[1], GROUP) - weight
    return float(torch.einsum("nk,kj,nj->", difference, hessian, difference))


def dynamic(weight: Tensor, factor: Factor) -> tuple[Tensor, Tensor]:
    """Round column by column in their order. A group's scale is that of its compensated weights."""
    weight, levels, scales = weight.clone(), torch.empty_like(weight), []
    for column in range(weight.shape[1]):
        if column % GROUP == 0:
            scales.append(row_scale(weight[:, column : column + GROUP], 4))
        levels[:, column] = (weight[:, column] / scales[-1]).round().clamp(-7, 7)
        rest = (weight[:, column] - levels[:, column] * scales[-1]) / factor.upper[column, column]
        weight[:, column + 1 :] -= rest[:, None] * factor.upper[column, column + 1 :]
    return levels.to(torch.int8), torch.stack(scales)


def fitted(weight: Tensor, levels: Tensor, scale: Tensor, hessian: Tensor) -> Tensor:
    """Return the scales (groups, n) that fit the levels best under a Hessian. Implausible ones stay as they are."""
    parts = levels.float().split(GROUP, 1)
    products = [part @ rows for part, rows in zip(parts, hessian.split(GROUP), strict=True)]
    columns = [slice(first, first + GROUP) for first in range(0, weight.shape[1], GROUP)]
    normal = torch.stack(
        [
            torch.stack([(own[:, place] * part).sum(1) for place, part in zip(columns, parts, strict=True)], 1)
            for own in products
        ],
        1,
    )
    wanted = torch.stack([(own * weight).sum(1) for own in products], 1)
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal.add_(1e-6 * diagonal.mean(1, keepdim=True) + 1e-12)
    found = torch.linalg.solve(normal, wanted[..., None])[..., 0].t()
    return torch.where((found > 0.5 * scale) & (found < 1.5 * scale), found, scale).contiguous()


def compare(weight: Tensor, seen: Tensor, unseen: Tensor, tokens: int) -> dict[str, float]:
    """Return each way's error on unseen text over that of rounding to nearest."""
    width = len(seen)
    hessian = seen * (tokens / (tokens + width))
    hessian.diagonal().copy_(seen.diagonal())
    ordered, natural = factorize(hessian, 0.01, True), factorize(hessian, 0.01, False)
    assert ordered is not None
    assert natural is not None
    plain = weight_scale(weight, FORMAT)
    searched = searched_scale(weight, ordered.conditional_variance(), FORMAT)
    levels = solve(weight, ordered, searched, 4, GROUP)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(width)
    ways = {
        "static, act order": (solve(weight, ordered, plain, 4, GROUP), plain),
        "static, in order": (solve(weight, natural, plain, 4, GROUP), plain),
        "dynamic, in order": dynamic(weight, natural),
        "search": (levels, searched),
        "search, least squares": (levels, fitted(weight, levels, searched, damped)),
    }
    nearest = error(weight, round_to_nearest(weight, plain, 4, GROUP), plain, unseen)
    return {name: error(weight, *way, unseen) / nearest for name, way in ways.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "train", "test"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    chosen = parser.parse_args()
    torch.set_grad_enabled(False)
    model = LayeredModel(chosen.model)
    train = windows(model, chosen.train, 12)
    seen, unseen = hessians(model, train), hessians(model, windows(model, chosen.test, 4))
    means: dict[str, dict[str, list[float]]] = {"plain": {}, "rotated": {}}
    for index, name in seen:
        weight: Tensor = model.load_layer(index).get_submodule(name).weight  # type: ignore[assignment]
        block = block_size(weight.shape[1], 128)
        factor = (seen[index, name].diagonal() / weight.square().sum(0)) ** 0.25
        inputs = {"plain": (weight, seen[index, name], unseen[index, name])}
        outer = factor[:, None] * factor
        turned = [rotate(rotate(one / outer, block).t(), block) for one in (seen[index, name], unseen[index, name])]
        inputs["rotated"] = (rotate(weight * factor, block), *turned)  # type: ignore[assignment]
        for kind, matrices in inputs.items():
            ratios = compare(*matrices, train.numel())
            print(index, name, kind, {way: round(ratio, 4) for way, ratio in ratios.items()}, flush=True)
            for way, ratio in ratios.items():
                means[kind].setdefault(way, []).append(ratio)
    print(
        json.dumps({kind: {way: round(sum(r) / len(r), 4) for way, r in ways.items()} for kind, ways in means.items()})
    )


if __name__ == "__main__":
    main()
