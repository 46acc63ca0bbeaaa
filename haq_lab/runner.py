"""One run, stage by stage: load, calibrate and quantise in one pass, measure, record."""

from __future__ import annotations

import platform
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from haq_lab.checkpoint.model import QuantizedModel, open_model
from haq_lab.checkpoint.provenance import provenance
from haq_lab.checkpoint.writer import CheckpointWriter
from haq_lab.config import Experiment, build
from haq_lab.data.calibration import refuse_overlap, refuse_same_text
from haq_lab.data.windows import Windows
from haq_lab.errors import UserError
from haq_lab.figures import layer_figure
from haq_lab.files import written_aside
from haq_lab.int8.deploy import deploy
from haq_lab.measure.memory import reset_peaks
from haq_lab.measure.study import Study
from haq_lab.models.layered import LayeredModel
from haq_lab.offload.session import OffloadSession
from haq_lab.onepass import PassResult, one_pass
from haq_lab.preflight import preflight
from haq_lab.show import Progress, say, show_results
from haq_lab.tracking.run_folder import RunFolder


def run(config: DictConfig, hydra: DictConfig) -> None:
    """Run one composed config in Hydra's output folder, unless a finished run of it is there."""
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    folder = RunFolder(Path(hydra.runtime.output_dir), plain)
    label = dict(hydra.runtime.choices)
    facts = {
        "overrides": list(hydra.overrides.task),
        "sweep": str(hydra.sweep.dir) if hydra.mode.name == "MULTIRUN" else None,
        **{group: label.get(group) for group in ("quantizer", "backend", "offload", "calibration")},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    if (done := folder.finished()) is not None and not config.force:
        say(f"already finished: {folder.path} (force=true runs it again)")
        show_results(done, folder.path)
        return
    try:
        experiment = build(config)
        facts["model"] = experiment.model.label
        folder.begin(OmegaConf.to_yaml(config, resolve=True))
        _study(experiment, folder, facts)
    except (Exception, KeyboardInterrupt) as error:
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.fail(facts, error)
        raise


@torch.no_grad()
def _study(experiment: Experiment, folder: RunFolder, facts: dict[str, Any]) -> None:
    """The method section."""
    reset_peaks()
    preflight(experiment, facts["overrides"])
    with ExitStack() as held, Progress() as progress:
        # 1. The model's shell and the texts.
        progress.stage(f"model {experiment.model.label}")
        model = open_model(experiment.model, experiment.backend)
        evaluation, calibration = _texts(experiment, model)
        tokens = {name: windows.tokens for name, windows in evaluation.items()}
        folder.event("loaded", model=str(model.folder), depth=model.depth)

        # 2. One pass through the weights: calibrate, smooth, quantise, evaluate.
        layers: list[nn.Module] = []
        offload = None
        if experiment.offload is not None:
            offload = OffloadSession(experiment.offload, model, folder.path)
            held.callback(offload.close)

        def keep(layer: nn.Module) -> None:
            if offload is not None:
                offload.add(layer)
            layers.append(layer)

        deploys = any(measure.deploys for measure in experiment.measures.values())
        writer = _writer(experiment, folder.config, model, evaluation, calibration)
        if writer is not None:
            held.callback(writer.release)
        progress.layers(model.depth, "quantise" if experiment.quantizer else "evaluate")

        def finished(index: int, layer: nn.Module) -> None:
            if deploys and writer is None:
                keep(layer)
            folder.event("layer", index=index)
            progress.layer_done()

        passed = one_pass(
            model,
            experiment.quantizer,
            experiment.backend,
            None if calibration is None else calibration.tokens,
            experiment.calibration.policy,
            tokens,
            finished,
            writer,
        )
        if writer is not None:
            writer.finish()
            facts["checkpoint"], facts["resumed_from_layer"] = str(writer.folder), writer.resumed
            model = QuantizedModel(writer.folder, experiment.backend)
            for index in range(model.depth if deploys else 0):
                keep(model.load_layer(index))
        if offload is not None and layers:
            progress.stage("offload")
            if calibration is None:
                calibration = experiment.calibration.load(model.tokenizer())
            offload.engage(layers, passed.routing, calibration.tokens, experiment.calibration.text)

        # 3. Measurements on the model as deployed.
        study = Study(model, tokens, passed, deploy(model.assemble(layers), model, experiment.backend), progress.stage)
        metrics: dict[str, float] = {}
        for measure in experiment.measures.values():
            metrics |= measure(study)
        if offload is not None:
            metrics |= offload.metrics()

    # 4. The record.
    if isinstance(model, QuantizedModel):
        metrics["memory.checkpoint_bytes"] = model.manifest.bytes
    metrics |= {f"time.{stage}_s": seconds for stage, seconds in passed.stopwatch.seconds.items()}
    metrics["quantizer.fallback_modules"] = sum("fallback" in report.notes for report in passed.reports)
    if passed.reports:
        dynamic = sum(report.scheme != "static" for report in passed.reports)
        metrics["quantizer.dynamic_share"] = dynamic / len(passed.reports)
    tables = _tables(passed)
    if offload is not None:
        tables["offload"] = offload.table()
    for name, table in tables.items():
        with written_aside(folder.path / f"{name}.csv") as aside:
            table.to_csv(aside, index=False)
    figures = []
    if "layers" in tables:
        figures.append(layer_figure(tables["layers"], folder.path / "figures" / "layers.png"))
    if passed.routing is not None:
        text = experiment.calibration.text
        passed.routing.save(folder.path / "routing.safetensors", experiment.model.label, text)
    protocol: dict[str, Any] = {name: windows.protocol for name, windows in evaluation.items()}
    if calibration is not None:
        protocol["calibration"] = calibration.protocol
    if experiment.tracking is not None:
        experiment.tracking.log(folder, folder.path.name, facts["sweep"], metrics, tables, figures)
    results = folder.finish(facts, protocol, metrics)
    if writer is not None:
        writer.close()
    show_results(results, folder.path)


def _writer(
    experiment: Experiment,
    config: dict[str, Any],
    model: LayeredModel,
    evaluation: dict[str, Windows],
    calibration: Windows | None,
) -> CheckpointWriter | None:
    """Where the quantised layers go as they come, if anywhere."""
    if experiment.checkpoint is None:
        return None
    text = None if calibration is None else calibration.protocol
    origin = provenance(model.folder, experiment.model.label, config, text)
    stamps = {name: windows.protocol for name, windows in evaluation.items()}
    return CheckpointWriter(experiment.checkpoint, model, origin, stamps, force=bool(config["force"]))


def _tables(passed: PassResult) -> dict[str, pd.DataFrame]:
    """`layers`: what was done to each linear; `experts`: the tokens that each expert was calibrated on."""
    tables = {}
    if passed.reports:
        layers = pd.DataFrame([{**vars(report), **report.notes} for report in passed.reports])
        tables["layers"] = layers.drop(columns="notes")
    if passed.routing is not None:
        tables["experts"] = passed.routing.table()
    return tables


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
        refuse_same_text(calibration, evaluation)
        refuse_overlap(calibration.tokens, {name: windows.tokens for name, windows in evaluation.items()})
    return evaluation, calibration


def _refuse_too_long(setting: str, seqlen: int, model: LayeredModel) -> None:
    if seqlen > model.max_tokens:
        raise UserError(f"{setting}: {seqlen} is more than the model's {model.max_tokens} positions")
