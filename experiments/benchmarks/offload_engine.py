"""Measure the decode latency of the engine on RAM and disk, and compare it with the simulator. The last line is JSON.

    python experiments/benchmarks/offload_engine.py CHECKPOINT --profile A.trace --text FILE [--accelerate BF16_FOLDER]

CHECKPOINT is a quantised checkpoint (`checkpoint.dir=`). A reference engine decodes in turn with every configuration,
token by token. It has its own model, half resident under LRU. It prefetches, or runs missing experts in place, if the
configuration does. The simulator uses the costs that the reference engine observes. So it is not fitted to the
configuration, and other work on the machine affects both equally. With --accelerate, the bf16 model decodes through
accelerate's disk offload, in turn with the engine.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from haq_lab.checkpoint.model import QuantizedModel
from haq_lab.int8.cpu.backend import CpuBackend
from haq_lab.offload.costs.cost_model import Costs, Predictor
from haq_lab.offload.costs.measured import measure_costs
from haq_lab.offload.engine.cost_feedback import CostFeedback
from haq_lab.offload.engine.engine import Engine
from haq_lab.offload.policies.path_model import PathModel, fit_path_model
from haq_lab.offload.policies.placement import place
from haq_lab.offload.policies.policy import Policy, make_policy
from haq_lab.offload.policies.prefetch import NextGate
from haq_lab.offload.simulate.simulator import Simulator
from haq_lab.offload.tiers.disk import ExpertFile, ExpertFileWriter
from haq_lab.routing.trace import Trace

TOKENS, SPARE = 24, 4
CURVES = ("fast", "slow", "fetch", "rest", "outside", "issue", "begin", "take")
REFERENCE = ("lru", "uniform", "layer", 0.5)  # none of the configurations
CONFIGURATIONS = [
    *product(("none",), ("frequency",), ("global",), (0.25, 0.4, 0.55, 0.75), ("fetch",)),
    *product(("lru",), ("uniform",), ("layer",), (0.25, 0.4, 0.75), ("fetch",)),
    *product(("haq",), ("two_stage",), ("global",), (0.25, 0.4, 0.55, 0.75), ("fetch", "next gate")),
    ("none", "frequency", "global", 0.5, "cpu"),
    ("none", "frequency", "global", 0.5, "predict"),
    ("lru", "uniform", "layer", 0.75, "predict"),
]


def decode(whole: nn.Module, prompt: Tensor, text: Tensor, before: Callable[[], None] = lambda: None) -> list[float]:
    """Decode and return the seconds per token. The text's tokens are fed, so all configurations see the same."""
    output = whole(prompt, use_cache=True, logits_to_keep=1)
    seconds = []
    for token in text[0]:
        before()
        start = time.perf_counter()
        output = whole(token.view(1, 1), cache=output.cache, use_cache=True, logits_to_keep=1)
        seconds.append(time.perf_counter() - start)
    return seconds


class Clock:
    """A clock in seconds that can stand still while the observed engine does not run."""

    def __init__(self) -> None:
        self._lost, self._stopped = 0.0, False

    def __call__(self) -> float:
        return self._lost if self._stopped else time.perf_counter() - self._lost

    def stop(self) -> None:
        self._lost, self._stopped = self(), True

    def go(self) -> None:
        self._lost, self._stopped = time.perf_counter() - self._lost, False


class InStep:
    """Decodes a text, one token per call, in turn with another model. `seconds` has the time of each token."""

    def __init__(self, whole: nn.Module, prompt: Tensor, text: Tensor, clock: Clock | None = None):
        self.whole, self.left, self.seconds, self.clock = whole, iter(text[0]), list[float](), clock or Clock()
        self.cache = whole(prompt, use_cache=True, logits_to_keep=1).cache
        self.clock.stop()

    def __call__(self) -> None:
        token = next(self.left).view(1, 1)
        self.clock.go()
        start = time.perf_counter()
        self.cache = self.whole(token, cache=self.cache, use_cache=True, logits_to_keep=1).cache
        self.seconds.append(time.perf_counter() - start)
        self.clock.stop()


class Bench:
    """A quantised model with its experts in a store."""

    def __init__(self, checkpoint: Path, profile: Trace, path_model: PathModel, tokens: Tensor, scratch: Path):
        self.model = QuantizedModel(checkpoint, CpuBackend())
        self.profile, self.path_model = profile, path_model
        self.prompt, self.text = tokens[:, :64], tokens[:, 64:]
        self.layers: list[nn.Module] = []
        with ExpertFileWriter(scratch / "experts.bin") as writer:
            for index in range(self.model.depth):
                layer = self.model.load_layer(index)
                writer.add(layer.mlp.experts)  # type: ignore[arg-type, union-attr]
                self.layers.append(layer)
            self.store: ExpertFile = writer.open()
        self.forwards = [layer.mlp.experts.__dict__.copy() for layer in self.layers]  # type: ignore[union-attr]
        self.whole = self.model.assemble(self.layers)

    def policy(self, configuration: tuple[Any, ...], costs: Costs) -> Policy:
        rule, placement, scope, share, miss = configuration
        slots = round(share * self.profile.layers * self.profile.expert_count)
        resident = place(placement, self.profile, slots)
        policy = make_policy(rule, resident, self.profile, scope, self.path_model)
        if miss == "cpu":
            policy.decide = lambda resident, missing: list(missing)
        elif miss == "predict":
            policy.decide = Predictor(costs).decide
        return policy

    def engaged(self, *configuration: Any, costs: Costs) -> Engine:
        """Return an engine that serves the model. It corrects `costs` while it runs."""
        for layer, untouched in zip(self.layers, self.forwards, strict=True):
            layer.mlp.experts.__dict__.clear()  # type: ignore[union-attr]
            layer.mlp.experts.__dict__.update(untouched)  # type: ignore[union-attr]
        router = self.model.family.moe.router  # type: ignore[union-attr]
        gates = NextGate([layer.get_submodule(router) for layer in self.layers])
        ahead = configuration[-1] == "next gate"
        self.clock = Clock()
        observer = CostFeedback(costs, "max", self.model.depth, self.clock)
        policy, guesses = self.policy(configuration, costs), self.profile.k if ahead else 0
        engine = Engine(self.store, policy, SPARE, gates if ahead else None, guesses, observer)
        engine.attach(self.layers, self.model.family.moe)  # type: ignore[arg-type]
        return engine

    def measured(
        self, *configuration: Any, costs: Costs, before: Callable[[], None] = lambda: None
    ) -> tuple[list[float], Engine]:
        """Return the seconds per token. The run corrects `costs`. `before` is called before each token."""
        engine = self.engaged(*configuration, costs=costs)

        def meanwhile() -> None:
            self.clock.stop()
            before()
            self.clock.go()

        seconds = decode(self.whole, self.prompt, self.text, meanwhile)
        engine.transfer.stop()
        return seconds, engine

    def simulated(self, *configuration: Any, engine: Engine, costs: Costs) -> list[float]:
        """Return the simulated seconds of the same steps."""
        prefetch = engine.recorder.prefetch() if engine.prefetch is not None else None
        policy = self.policy(configuration, costs)
        return Simulator(costs, policy, prefetch, engine.guesses, SPARE).run(engine.recorder.trace()).token_s


def against_accelerate(bench: Bench, folder: Path, costs: Costs, scratch: Path) -> dict[str, float]:
    """Decode the text with accelerate's disk offload, with a warm page cache and with one dropped for each token.

    The engine decodes in turn: `haq` at 25 % with next-gate prefetching. accelerate may keep as many bytes in RAM as
    the engine's fast tier has. Values are medians.
    """
    from accelerate import infer_auto_device_map
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    configuration = "haq", "two_stage", "global", 0.25, "next gate"
    limits = {"cpu": bench.engaged(*configuration, costs=costs).arena.bytes, "disk": 10**12}
    placed = infer_auto_device_map(empty, limits, no_split_module_classes=["MixtralDecoderLayer"], dtype=torch.bfloat16)
    whole = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        device_map=placed,
        offload_folder=str(scratch / "accelerate"),
        trust_remote_code=False,
    )
    files = [*folder.glob("*.safetensors"), *(scratch / "accelerate").glob("*")]
    found: dict[str, float] = {}
    for state in ("warm", "cold"):
        engine = bench.engaged(*configuration, costs=costs)
        ours = InStep(bench.whole, bench.prompt, bench.text)

        def before(state: str = state, ours: InStep = ours) -> None:
            ours()
            if state == "cold":
                drop(files)

        theirs = decode(whole, bench.prompt, bench.text[:, :8], before)
        engine.transfer.stop()
        ms, own_ms = (1e3 * float(np.median(seconds)) for seconds in (theirs, ours.seconds))
        found |= {f"accelerate_{state}_ms": ms, f"beside_{state}_ms": own_ms, f"times_faster_{state}": ms / own_ms}
    return found


def drop(files: list[Path]) -> None:
    """Drop the files from the page cache. The engine's own reads pass the cache too."""
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
    parser.add_argument("--part", type=int, choices=[0, 1, 2], help="run only this third of the configurations")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens to decode per configuration")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=given.checkpoint.parent) as name:
        scratch = Path(name)
        tokenizer = QuantizedModel(given.checkpoint, CpuBackend()).tokenizer()
        ids = tokenizer.encode(given.text.read_text(encoding="utf-8")[:20_000])[: 64 + given.tokens]
        profile = Trace.open(given.profile)
        path_model = fit_path_model(profile)
        folders = scratch / "one", scratch / "other"
        bench, other = (Bench(given.checkpoint, profile, path_model, torch.tensor([ids]), each) for each in folders)
        fresh = measure_costs(bench.layers[0], bench.model.family.moe, bench.store, bench.model)  # type: ignore[arg-type]
        whole = ("none", "frequency", "global", 1.0, "fetch")
        resident_ms = 1e3 * float(np.mean(bench.measured(*whole, costs=deepcopy(fresh))[0]))
        for configuration in CONFIGURATIONS if given.part is None else CONFIGURATIONS[given.part :: 3]:
            costs, own, miss = deepcopy(fresh), deepcopy(fresh), configuration[-1]
            reference = other.engaged(*REFERENCE, "fetch" if miss == "predict" else miss, costs=costs)
            seconds, engine = bench.measured(
                *configuration, costs=own, before=InStep(other.whole, other.prompt, other.text, other.clock)
            )
            reference.transfer.stop()
            simulated = bench.simulated(*configuration, engine=engine, costs=costs)
            row: dict[str, Any] = {
                "configuration": " ".join(map(str, configuration)),
                "ms": 1e3 * float(np.mean(seconds)),
            }
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
            result |= against_accelerate(bench, given.accelerate, fresh, scratch)
    print(json.dumps({"all_resident_ms": resident_ms, "rows": rows, **result}))


if __name__ == "__main__":
    main()
