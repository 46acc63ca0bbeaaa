"""One run, stage by stage: load, calibrate and quantise in one pass, measure, record."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from haq_lab.calibration.dataset import check_overlap
from haq_lab.checkpoint.model import open_model
from haq_lab.config.build import Experiment, build, effective, refuse_idle
from haq_lab.config.help import is_user_error
from haq_lab.data.windows import Windows
from haq_lab.measure.base import Study
from haq_lab.measure.memory import reset_peaks
from haq_lab.models.layerwise import LayeredModel
from haq_lab.pipeline.assemble import Assembly
from haq_lab.pipeline.cached_pass import CachedPass
from haq_lab.pipeline.preflight import preflight
from haq_lab.pipeline.record import write_record
from haq_lab.pipeline.sequential import sequential_pass
from haq_lab.tracking.run_folder import RunFolder
from haq_lab.utils.console import Progress, say, show_results
from haq_lab.utils.environment import machine
from haq_lab.utils.errors import UserError, invalid


def run(config: DictConfig, hydra: DictConfig) -> float | None:
    """Run one composed config in Hydra's output folder, unless a finished run of it is there.

    Returns:
        The metric that `search_metric` names, for a search; None where it names none.
    """
    config = effective(config)
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    folder = RunFolder(Path(hydra.runtime.output_dir), plain)
    label = dict(hydra.runtime.choices)
    facts = {
        "overrides": list(hydra.overrides.task),
        "sweep": str(hydra.sweep.dir) if hydra.mode.name == "MULTIRUN" else None,
        **{
            group: label.get(group)
            for group in ("experiment", "quantizer", "backend", "offload", "hardware", "calibration")
        },
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **machine(),
    }
    if (done := folder.finished()) is not None and not config.force:
        say(f"already finished: {folder.path} (force=true runs it again)")
        show_results(done, folder.path)
        return _search_metric(config.search_metric, done["metrics"])
    try:
        refuse_idle(config, hydra.overrides.task, sweep=facts["sweep"] is not None)
        experiment = build(config)
        facts |= {"model": experiment.model.label, "kernels": experiment.backend.kernels}
        folder.begin(OmegaConf.to_yaml(config, resolve=True))
        results = _study(experiment, folder, facts)
    except (Exception, KeyboardInterrupt) as error:
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.fail(facts, error, is_user_error(error))
        raise
    return _search_metric(config.search_metric, results["metrics"])


@torch.no_grad()
def _study(experiment: Experiment, folder: RunFolder, facts: dict[str, Any]) -> dict[str, Any]:
    """The method section."""
    reset_peaks()
    preflight(experiment, facts["overrides"])
    with Progress() as progress:
        # 1. The model's shell and the texts.
        progress.stage(f"model {experiment.model.label}")
        model = open_model(experiment.model, experiment.backend)
        if experiment.quantizer is not None and experiment.quantizer.lm_head:
            model.quantize_head(experiment.backend)
        evaluation, calibration = _texts(experiment, model)
        tokens = {name: windows.tokens for name, windows in evaluation.items()}
        folder.event("loaded", model=str(model.folder), depth=model.depth)
        store = experiment.result_cache.open()

        with Assembly(experiment, model, folder, evaluation, calibration, store) as assembly:
            calibrated = None if calibration is None else calibration.tokens
            stages = CachedPass(store, experiment, model, calibrated, tokens, assembly.deploys)

            # 2. One pass through the weights: calibrate, smooth, quantise, evaluate. Or what another run's pass left.
            progress.layers(model.depth, "quantise" if experiment.quantizer else "evaluate", assembly.resumed)

            def finished(index: int, layer: nn.Module) -> None:
                stages.keep_layer(index, layer)
                assembly.add(layer)
                folder.event("layer", index=index)
                progress.layer_done()

            if (passed := stages.find()) is not None:
                for layer in stages.layers():
                    assembly.add(layer)
                    progress.layer_done()
            else:
                passed = sequential_pass(
                    model,
                    experiment.quantizer,
                    experiment.backend,
                    calibrated,
                    experiment.calibration.policy,
                    tokens,
                    finished,
                    assembly.writer,
                    store,
                )
                stages.keep(passed)

            # 3. Measurements on the model as deployed.
            progress.stage("assemble")
            if calibration is None and assembly.needs_trace(passed):
                calibration = experiment.calibration.load(model.tokenizer())
            whole = assembly.finish(passed, calibration)
            study = Study(assembly.model, tokens, passed, whole, progress.stage)
            metrics: dict[str, float] = {}
            for measure in experiment.measures.values():
                metrics |= stages.measured(measure, study)
            metrics |= assembly.metrics() | assembly.simulated(facts["hardware"])
            metrics |= {f"time.stages_{what}_s": spent for what, spent in store.clock.seconds.items()}

    # 4. The record.
    protocol: dict[str, Any] = {name: windows.protocol for name, windows in evaluation.items()}
    if calibration is not None:
        protocol["calibration"] = calibration.protocol
    facts |= assembly.facts() | {"reused": [f"{count} x {stage}" for stage, count in store.reused.items()]}
    results = write_record(experiment, folder, facts, protocol, passed, metrics, study.tables | assembly.tables())
    assembly.recorded()
    show_results(results, folder.path)
    return results


def _search_metric(name: str | None, metrics: dict[str, float]) -> float | None:
    if name is not None and name not in metrics:
        raise invalid("search_metric", name, metrics)
    return None if name is None else metrics[name]


def _texts(experiment: Experiment, model: LayeredModel) -> tuple[dict[str, Windows], Windows | None]:
    """Evaluation windows by dataset, and calibration windows where the quantizer needs any; they don't overlap."""
    tokenizer = model.tokenizer()
    evaluation = {}
    if any(measure.evaluates for measure in experiment.measures.values()):
        for name, data in experiment.data.items():
            _refuse_too_long(f"data.{name}.seqlen", data.seqlen, model)
            evaluation[name] = data.load(tokenizer)
    calibration = None
    if experiment.quantizer is not None and experiment.quantizer.needs.inputs:
        _refuse_too_long("calibration.seqlen", experiment.calibration.seqlen, model)
        calibration = experiment.calibration.load(tokenizer)
        check_overlap(calibration, evaluation, experiment.calibration.overlap)
    return evaluation, calibration


def _refuse_too_long(setting: str, seqlen: int, model: LayeredModel) -> None:
    if seqlen > model.max_tokens:
        raise UserError(f"{setting}: {seqlen} is more than the model's {model.max_tokens} positions")
