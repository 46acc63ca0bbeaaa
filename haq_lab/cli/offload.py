"""Record and replay routing traces, plan the offloading for a GPU, and measure this machine.

trace MODEL TEXT --out FILE            record which experts the tokens of a text choose (TEXT: a file, or python_docs)
replay PROFILE TEST --out DIR          compare all policies and budgets on trace TEST, fitted on trace PROFILE
plan PROFILE TEST --out DIR            simulate placements, formats and budgets on a GPU, and print the Pareto front
profile                                measure this machine, for hardware=local

MODEL is an option of the group `model`, such as smol_moe, or a folder or hub name. The folder can be a checkpoint.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from haq_lab.config.explain import report_user_errors
from haq_lab.utils.console import Progress, say
from haq_lab.utils.errors import UserError, nearest, nearest_beside
from haq_lab.utils.extras import need


def main(arguments: list[str] | None = None) -> None:
    """Run a command of `python -m haq_lab.offload`."""
    given = _parser().parse_args(arguments)
    with report_user_errors("haq_lab.offload"):
        given.run(given)


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m haq_lab.offload", description=__doc__, formatter_class=form)
    actions = parser.add_subparsers(required=True)
    trace = actions.add_parser("trace", help="record a routing trace")
    trace.add_argument("model", help="option such as smol_moe, folder, or hub name; set its settings with --set")
    trace.add_argument("text", help="text file, or python_docs")
    trace.add_argument("--out", type=Path, required=True, metavar="FILE")
    trace.add_argument(
        "--part", choices=["calibration", "evaluation"], default="evaluation", help="part of python_docs"
    )
    trace.add_argument("--windows", type=int, default=8, help="largest number of windows; each is a sequence")
    trace.add_argument("--seqlen", type=int, default=512, help="tokens in a window")
    trace.add_argument("--prompt", type=int, default=0, help="tokens of each window that are its prompt")
    trace.add_argument("--set", nargs="*", default=[], metavar="model.SETTING=VALUE")
    trace.set_defaults(run=_trace)
    replay = actions.add_parser("replay", help="compute hit-rate curves, path statistics and drift")
    plan = actions.add_parser("plan", help="simulate formats, placements and budgets on a GPU")
    for action in (replay, plan):
        action.add_argument("profile", type=Path, help="calibration trace")
        action.add_argument("test", type=Path, help="test trace, of another text")
        action.add_argument("--out", type=Path, required=True, metavar="DIR")
    eighths = [number / 8 for number in range(1, 8)]
    replay.add_argument("--budgets", type=float, nargs="+", default=eighths, help="shares of all experts, such as 0.25")
    replay.set_defaults(run=_replay)
    plan.add_argument("--hardware", default="rtx3060_12g", help="file name in conf/hardware, or local")
    plan.add_argument(
        "--shape", default="mixtral", help="mixtral (8x7B), or folder with a config.json, such as a checkpoint"
    )
    plan.add_argument(
        "--int8-head",
        action="store_true",
        help="the head is int8, as with quantizer.lm_head=true; a checkpoint states this itself",
    )
    plan.add_argument("--context", type=int, default=2048, help="context length in tokens, whose KV cache must fit")
    plan.add_argument("--tokens", type=int, default=128, help="tokens to simulate for each combination")
    plan.set_defaults(run=_plan)
    profile = actions.add_parser("profile", help="measure this machine")
    profile.add_argument(
        "--scratch", type=Path, default=Path(), help="folder on the disk of the slow tier, for a temporary file"
    )
    profile.set_defaults(run=_profile)
    return parser


def _require_positive(given: argparse.Namespace, command: str, name: str) -> None:
    if (value := getattr(given, name)) < 1:
        raise UserError(f"{command}: --{name} {value} is not at least 1. Choose a larger number.")


def _trace(given: argparse.Namespace) -> None:
    from haq_lab.checkpoint.model import open_model
    from haq_lab.config.build import model_option
    from haq_lab.data.text import python_docs
    from haq_lab.data.windows import encode, own_documents
    from haq_lab.int8.cpu.backend import CpuBackend
    from haq_lab.routing.record import record_trace

    for name in ("windows", "seqlen"):
        _require_positive(given, "trace", name)
    model = open_model(model_option(given.model, given.set), CpuBackend())
    own = given.text == "python_docs"
    text = python_docs(given.part) if own else own_documents(given.text, "text").joined
    tokens = encode(model.tokenizer(), text)
    count = min(given.windows, len(tokens) // given.seqlen)
    if count < 1:
        raise UserError(
            f"text: '{given.text}' has {len(tokens)} tokens, fewer than one window of {given.seqlen}. Lower --seqlen."
        )
    windows = tokens[: count * given.seqlen].view(count, given.seqlen)
    with Progress() as progress:
        progress.layers(model.depth, "trace")
        label = f"python_docs, {given.part}" if own else given.text
        trace = record_trace(model, windows, label, given.prompt, progress.layer_done)
    trace.save(given.out)
    say(f"{trace.tokens} tokens, {trace.layers} layers, {trace.k} of {trace.expert_count} experts: {given.out}")


def _replay(given: argparse.Namespace) -> None:
    need("the replay", "report", "matplotlib")
    from haq_lab.offload.simulate.figures import curve_figure, heat_figure
    from haq_lab.offload.simulate.hit_rate_curves import CONTENDERS, closed, hit_rates
    from haq_lab.routing.statistics import drift, entropy, jaccard, repeat_rate
    from haq_lab.routing.trace import Trace
    from haq_lab.utils.atomic_files import atomic_file

    profile, test = Trace.open(given.profile), Trace.open(given.test)
    with Progress() as progress:
        progress.layers(len(given.budgets) * len(CONTENDERS), "replay")
        table = hit_rates(profile, test, given.budgets, progress.layer_done)
    with atomic_file(given.out / "hit_rates.csv") as aside:
        table.to_csv(aside, index=False)
    say(table.pivot(index="policy", columns="budget", values="pairs").round(4).to_string())
    first, either = repeat_rate(test)
    apart = drift(profile, test)
    near, far = jaccard(test, [1, 16]).mean(1)
    say(f"\nentropy {entropy(test).mean():.3f} bits")
    say(f"the previous token's first choice: first again {first.mean():.3f}, chosen again {either.mean():.3f}")
    say(f"Jaccard of the expert sets of neighbouring tokens {near:.3f}, 16 tokens apart {far:.3f}")
    say(f"drift from the profile's text: shares differ by {apart.distance.mean():.3f} (total variation)")
    for budget, share in closed(table).items():
        say(f"{budget:.1%} resident: HAQ closes {share:.1%} of the distance from the best of LRU, LFU to Belady")
    title = f"{test.model}\nprofiled on {profile.text}, tested on {test.text}"
    for path in (
        curve_figure(table, title, given.out / "hit_rates.png"),
        heat_figure(test, given.out / "heat_map.png"),
    ):
        say(f"figure: {path}")


def _plan(given: argparse.Namespace) -> None:
    need("the plan", "report", "matplotlib")
    from transformers import AutoConfig

    from haq_lab.checkpoint.model import has_int8_head
    from haq_lab.hardware.local import hardware
    from haq_lab.offload.costs.model_shape import MIXTRAL, Shape
    from haq_lab.offload.simulate.capacity_plan import CACHES, FORMATS, SHARES, plan
    from haq_lab.offload.simulate.figures import pareto_figure
    from haq_lab.routing.trace import Trace
    from haq_lab.utils.atomic_files import atomic_file

    machine = hardware(given.hardware)
    profile, test = Trace.open(given.profile), Trace.open(given.test)
    shape = replace(MIXTRAL, head_bytes=1) if given.int8_head else MIXTRAL
    for name in ("context", "tokens"):
        _require_positive(given, "plan", name)
    if given.shape != "mixtral":
        if not (Path(given.shape) / "config.json").is_file():
            near = nearest(given.shape, ["mixtral"]) or nearest_beside(Path(given.shape))
            raise UserError(
                f"plan: --shape '{given.shape}' is not mixtral, nor a folder with a config.json{near or '.'}"
            )
        try:
            config = AutoConfig.from_pretrained(given.shape, trust_remote_code=False)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"plan: --shape: config.json in {given.shape} cannot be used ({reason}). Choose a supported checkpoint."
            ) from error
        shape = Shape.of(config, given.int8_head or has_int8_head(Path(given.shape)))
    if {(trace.layers, trace.expert_count) for trace in (profile, test)} != {(shape.layers, shape.experts)}:
        profile, test = (trace.stretched(shape.layers, shape.experts) for trace in (profile, test))
        say(f"The trace is of another model. Its layers are repeated or left out to get {shape.layers} layers.")
    with Progress() as progress:
        progress.layers(len(FORMATS) * 2 * len(SHARES) * len(CACHES), "simulate")
        table = plan(machine, shape, profile, test, given.context, given.tokens, finished=progress.layer_done)
    with atomic_file(given.out / "plan.csv") as aside:
        table.to_csv(aside, index=False)
    front = table[table["pareto"]].sort_values("memory_bytes")
    say(f"simulated, {machine.name}: the Pareto front\n{front.drop(columns='pareto').round(3).to_string(index=False)}")
    fitting = table[table["fits"]]
    if fitting.empty:
        raise UserError(f"plan: nothing fits into the {machine.memory_gb} GB of {machine.name}. Lower --context.")
    best = fitting.sort_values("simulated_ms").iloc[0]
    choice = ", ".join(
        f"{name} {best[name]}" for name in ("host_format", "device_format", "placement", "cache", "slots")
    )
    say(f"\nfastest that fits: {choice}; simulated {best['simulated_ms']:.1f} ms a token")
    say(f"figure: {pareto_figure(table, machine.name, given.out / 'pareto.png')}")


def _profile(given: argparse.Namespace) -> None:
    from haq_lab.hardware.local import save_local
    from haq_lab.offload.costs.this_machine import measure_machine

    profile = measure_machine(given.scratch)
    say(f"{profile.int8_tops:.3f} int8 TOPS, memory {profile.bandwidth_gbs:.1f} GB/s, disk {profile.link_gbs:.2f} GB/s")
    say(f"hardware=local: {save_local(profile)}")


if __name__ == "__main__":
    main()
