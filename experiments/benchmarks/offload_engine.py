"""The real engine on the RAM and disk tiers: decode latency by configuration, and the simulator held against it.

    python experiments/benchmarks/offload_engine.py CHECKPOINT --profile A.trace --text FILE [--accelerate BF16_FOLDER]

CHECKPOINT is a quantised one (`checkpoint.dir=`). Before and after every configuration a reference decodes, half
resident under LRU: the mean of what the engine's observer finds there are the costs that the configuration is simulated
by. (Where missing experts run in place, what that takes is from a reference in which all of them do: reading so slows
all else down.) So nothing is fitted on it, and the machine's mood, which other work moves by a factor, is the same for
both. With --accelerate, the same model in bf16 through accelerate's disk
offload decodes in the same run. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from haq_lab.checkpoint.model import QuantizedModel
from haq_lab.int8.cpu import CpuBackend
from haq_lab.offload.costs import Costs, Predictor
from haq_lab.offload.engine import Engine
from haq_lab.offload.measured_costs import measure_costs
from haq_lab.offload.observer import Observer
from haq_lab.offload.path_model import fit_path_model
from haq_lab.offload.placement import place
from haq_lab.offload.policy import Policy, make_policy
from haq_lab.offload.prefetch import NextGate
from haq_lab.offload.simulator import Simulator
from haq_lab.offload.store import ExpertStore, StoreWriter
from haq_lab.offload.trace import Trace

TOKENS, SPARE = 24, 4
CURVES = ("fast", "slow", "fetch", "rest", "outside", "issue", "take")
REFERENCE = ("lru", "uniform", "layer", 0.5)
CONFIGURATIONS = [
    *product(("none",), ("frequency",), ("global",), (0.25, 0.4, 0.55, 0.75), ("fetch",)),
    *product(("lru",), ("uniform",), ("layer",), (0.25, 0.4, 0.75), ("fetch",)),
    *product(("haq",), ("two_stage",), ("global",), (0.25, 0.4, 0.55, 0.75), ("fetch", "next gate")),
    ("none", "frequency", "global", 0.5, "cpu"),
    ("none", "frequency", "global", 0.5, "predict"),
    ("lru", "uniform", "layer", 0.75, "predict"),
]


def decode(whole: nn.Module, prompt: Tensor, text: Tensor, before: Callable[[], None] = lambda: None) -> list[float]:
    """Seconds of each decoded token, the text's own tokens being fed (so that every configuration sees the same)."""
    output = whole(prompt, use_cache=True, logits_to_keep=1)
    seconds = []
    for token in text[0]:
        before()
        start = time.perf_counter()
        output = whole(token.view(1, 1), cache=output.cache, use_cache=True, logits_to_keep=1)
        seconds.append(time.perf_counter() - start)
    return seconds


class Bench:
    """A quantised model whose experts lie in a store."""

    def __init__(self, checkpoint: Path, profile: Trace, tokens: Tensor, scratch: Path):
        self.model = QuantizedModel(checkpoint, CpuBackend())
        self.profile, self.path_model = profile, fit_path_model(profile)
        self.prompt, self.text = tokens[:, :64], tokens[:, 64 : 64 + TOKENS]
        self.layers: list[nn.Module] = []
        with StoreWriter(scratch / "experts.bin") as writer:
            for index in range(self.model.depth):
                layer = self.model.load_layer(index)
                writer.add(layer.mlp.experts)  # type: ignore[arg-type, union-attr]
                self.layers.append(layer)
            self.store: ExpertStore = writer.open()
        self.forwards = [layer.mlp.experts.__dict__.copy() for layer in self.layers]  # type: ignore[union-attr]
        self.whole = self.model.assemble(self.layers)

    def policy(self, rule: str, placement: str, scope: str, share: float, miss: str, costs: Costs) -> Policy:
        slots = round(share * self.profile.layers * self.profile.expert_count)
        resident = place(placement, self.profile, slots)
        policy = make_policy(rule, resident, self.profile, scope, self.path_model)  # type: ignore[arg-type]
        if miss == "cpu":
            policy.decide = lambda resident, missing: list(missing)
        elif miss == "predict":
            policy.decide = Predictor(costs).decide
        return policy

    def measured(
        self, *configuration: Any, costs: Costs, before: Callable[[], None] = lambda: None
    ) -> tuple[list[float], Engine]:
        """Seconds a token; `costs` are corrected by the run. `before` is called before each."""
        for layer, untouched in zip(self.layers, self.forwards, strict=True):
            layer.mlp.experts.__dict__.clear()  # type: ignore[union-attr]
            layer.mlp.experts.__dict__.update(untouched)  # type: ignore[union-attr]
        router = self.model.family.moe.router  # type: ignore[union-attr]
        gates = NextGate([layer.get_submodule(router) for layer in self.layers])
        guesser = (gates, self.profile.k) if configuration[-1] == "next gate" else (None, 0)
        observer = Observer(costs, "max", self.model.depth)
        engine = Engine(self.store, self.policy(*configuration, costs), SPARE, *guesser, observer)
        engine.attach(self.layers, self.model.family.moe)  # type: ignore[arg-type]
        seconds = decode(self.whole, self.prompt, self.text, before)
        engine._reader.shutdown()
        return seconds, engine

    def reference(self, fresh: Costs, in_place: bool) -> Costs:
        """What everything takes just now, as the reference configuration finds it."""
        costs = deepcopy(fresh)
        self.measured(*REFERENCE, "fetch", costs=costs)
        if in_place:
            other = deepcopy(fresh)
            self.measured(*REFERENCE, "cpu", costs=other)
            costs.slow = other.slow
        return costs

    def simulated(self, *configuration: Any, engine: Engine, costs: Costs) -> list[float]:
        """The same steps on the virtual clock."""
        prefetch = engine.heard.prefetch() if engine.prefetch is not None else None
        policy = self.policy(*configuration, costs)
        return Simulator(costs, policy, prefetch, engine.guesses, SPARE).run(engine.heard.trace()).token_s


def between(before: Costs, after: Costs) -> Costs:
    """The mean of two corrections."""
    costs = deepcopy(before)
    for name in CURVES:
        curve = getattr(costs, name)
        curve.correction = (curve.correction + getattr(after, name).correction) / 2
    return costs


def accelerate_seconds(
    folder: Path, prompt: Tensor, text: Tensor, scratch: Path, budget: float
) -> tuple[list[float], list[float]]:
    """The same text through accelerate's disk offload, page cache warm, then dropped before each token.

    `budget` bytes may stay in RAM.
    """
    from accelerate import infer_auto_device_map
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    limits = {"cpu": int(budget), "disk": 10**12}
    placed = infer_auto_device_map(empty, limits, no_split_module_classes=["MixtralDecoderLayer"], dtype=torch.bfloat16)
    whole = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map=placed, offload_folder=str(scratch / "accelerate")
    )
    files = [*folder.glob("*.safetensors"), *(scratch / "accelerate").glob("*")]
    cold = partial(drop, files)
    return decode(whole, prompt, text), decode(whole, prompt, text, before=cold)


def drop(files: list[Path]) -> None:
    """Out of the page cache, as the engine does with what it reads."""
    for path in files:
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@torch.no_grad()
def main() -> None:
    """Measure, predict and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--accelerate", type=Path)
    parser.add_argument("--part", type=int, choices=[0, 1, 2], help="of the configurations: a third of them")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=given.checkpoint.parent) as name:
        scratch = Path(name)
        tokenizer = QuantizedModel(given.checkpoint, CpuBackend()).tokenizer()
        ids = tokenizer.encode(given.text.read_text(encoding="utf-8")[:20_000])[: 64 + TOKENS]
        bench = Bench(given.checkpoint, Trace.open(given.profile), torch.tensor([ids]), scratch)
        moe, store = bench.model.family.moe, bench.store
        fresh = measure_costs(bench.layers[0], moe, store, bench.model)  # type: ignore[arg-type]
        whole = ("none", "frequency", "global", 1.0, "fetch")
        resident_ms = 1e3 * float(np.mean(bench.measured(*whole, costs=deepcopy(fresh))[0]))
        for configuration in CONFIGURATIONS if given.part is None else CONFIGURATIONS[given.part :: 3]:
            in_place = configuration[-1] in ("cpu", "predict")
            before = bench.reference(fresh, in_place)
            own = deepcopy(before)
            seconds, engine = bench.measured(*configuration, costs=own)
            after = bench.reference(fresh, in_place)
            costs = between(before, after)
            simulated = bench.simulated(*configuration, engine=engine, costs=costs)
            row = {"configuration": " ".join(map(str, configuration)), "ms": 1e3 * float(np.mean(seconds))}
            row |= {"std_ms": 1e3 * float(np.std(seconds)), "simulated_ms": 1e3 * float(np.mean(simulated))}
            row |= {"error": row["simulated_ms"] / row["ms"] - 1, "over_resident": row["ms"] / resident_ms}
            row |= {"hit_rate": engine.stats()["offload.hit_rate_pairs"], "fast_tier_bytes": engine.arena.bytes}
            row |= {"mape": engine.stats()["predictor.mape"], "median_ms": 1e3 * float(np.median(seconds))}
            row |= {f"cost_{name}": getattr(costs, name).correction for name in CURVES}
            row |= {f"own_{name}": getattr(own, name).correction for name in CURVES}
            rows.append(row)
            print(
                f"{row['configuration']:<38}{row['ms']:8.1f} ms  simulated {row['simulated_ms']:8.1f} ms "
                f"({row['error']:+.1%})  x{row['over_resident']:.2f}  hits {row['hit_rate']:.3f}  "
                f"mape {row['mape']:.2f}",
                flush=True,
            )
        result["mean_error"] = float(np.mean([abs(row["error"]) for row in rows]))
        print(f"mean error {result['mean_error']:.1%}")
        if given.accelerate:
            half = next(row for row in rows if row["configuration"] == "haq two_stage global 0.25 fetch")
            budget = half["fast_tier_bytes"]
            both = accelerate_seconds(given.accelerate, bench.prompt, bench.text[:, :8], scratch, budget)
            for name, seconds in zip(("warm", "cold"), both, strict=True):
                ms = 1e3 * float(np.median(seconds))
                result |= {f"accelerate_{name}_ms": ms, f"times_faster_than_{name}": ms / half["ms"]}
    print(json.dumps({"all_resident_ms": resident_ms, "rows": rows, **result}))


if __name__ == "__main__":
    main()
