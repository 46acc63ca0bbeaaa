"""Run one experiment: load, calibrate and quantise in one pass, measure, record."""

from __future__ import annotations

import math
import platform
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from haq_lab.calibration.dataset import check_overlap
from haq_lab.checkpoint.model import open_model
from haq_lab.checkpoint.writer import remove_saved_states
from haq_lab.config.build import (
    Experiment,
    build,
    refuse_ignored_settings,
    without_default_tracker,
    without_disabled_groups,
)
from haq_lab.config.explain import is_user_error
from haq_lab.config.run_context import RunContext
from haq_lab.data.windows import Windows
from haq_lab.hardware.gpu import sdpa_kernel
from haq_lab.int8.backend import Backend
from haq_lab.measure.base import PromptedMeasure, Study
from haq_lab.measure.memory import libraries, reset_peaks
from haq_lab.measure.metrics import declared_metrics
from haq_lab.measure.prompts import PromptTexts
from haq_lab.models.families.float_share import FloatShare
from haq_lab.models.families.lookup import head_size
from haq_lab.models.layerwise import LayeredModel
from haq_lab.pipeline.assemble import Assembly
from haq_lab.pipeline.cached_pass import CachedPass
from haq_lab.pipeline.deployment import load_full_precision
from haq_lab.pipeline.input_hashes import changed_inputs, input_hashes
from haq_lab.pipeline.prefix import PrefixChoice, choose_prefix, stamp_prefix
from haq_lab.pipeline.preflight import preflight
from haq_lab.pipeline.record import write_record
from haq_lab.pipeline.sequential import PassInputs, sequential_pass
from haq_lab.quantizers.base import AUTO_PREFIX, NO_PREFIX
from haq_lab.quantizers.pass_result import PassResult
from haq_lab.result_cache.store import Store
from haq_lab.results.show_run import show_results
from haq_lab.tracking.run_folder import RunFolder
from haq_lab.utils.console import Progress, say
from haq_lab.utils.environment import machine
from haq_lab.utils.errors import UserError, invalid
from haq_lab.utils.malloc import release_memory


def run(config: DictConfig, context: RunContext) -> dict[str, Any]:
    """Run one composed config in its folder, unless the folder holds a finished run of this config.

    Args:
        config: The composed config.
        context: The run's folder, and the command line that the config was composed from.

    Returns:
        The content of `results.json`.

    Raises:
        UserError: A setting is not valid, or the run does not fit this machine.

    Example:
        >>> config, context = compose_run(["model=tiny_llama", "quantizer=rtn"])
        >>> run(config, context)["metrics"]
    """
    config = without_disabled_groups(config)
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    folder = RunFolder(context.folder, plain)
    facts = {
        "overrides": context.overrides,
        "sweep": context.sweep,
        **{
            group: context.chosen(group)
            for group in ("experiment", "quantizer", "backend", "offload", "hardware", "calibration")
        },
        "inputs": [f"{setting} {digest}" for setting, digest in input_hashes(plain).items()],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **machine(),
    }
    if (done := folder.finished()) is not None and not config.force:
        if not (changed := changed_inputs(done["run"].get("inputs", []), plain)):
            say(f"already finished: {folder.path} (force=true runs it again)")
            if config.checkpoint.dir is not None:
                remove_saved_states(Path(str(config.checkpoint.dir)).expanduser())
            show_results(done, folder.path)
            return done
        say(f"changed since: {', '.join(changed)}; running again: {folder.path}")
    with folder.locked():
        try:
            refuse_ignored_settings(config, context.overrides, sweep=context.sweep is not None)
            experiment = build(without_default_tracker(config, context.overrides))
            with closing(experiment.backend):
                facts |= {"model": experiment.model.label, "kernels": experiment.backend.kernels}
                folder.begin(OmegaConf.to_yaml(config, resolve=True))
                folder.event("kernels", used=experiment.backend.kernels)
                return _study(experiment, folder, facts)
        except (Exception, KeyboardInterrupt) as error:
            folder.fail(facts, error, is_user_error(error))
            raise


@torch.no_grad()
def _study(experiment: Experiment, folder: RunFolder, facts: dict[str, Any]) -> dict[str, Any]:
    """Load, quantise and evaluate, measure and record. Return the content of `results.json`."""
    libraries()
    reset_peaks(experiment.backend.device)
    preflight(experiment, facts["overrides"])
    with Progress() as progress:
        model = _load_model(experiment, folder, progress)
        facts |= _describe_gpu(experiment.backend, model)
        in_float = _report_float(experiment, model, folder)
        evaluation, calibration = _load_texts(experiment, model)
        store = experiment.result_cache.open()
        prefix = _choose_prefix(experiment, model, evaluation, calibration, store, folder, progress)
        model = prefix.model
        prompts = _load_prompts(experiment, model)
        with Assembly(experiment, model, folder, evaluation, calibration, store) as assembly:
            inputs = _pass_inputs(experiment, model, evaluation, calibration)
            cached = CachedPass(store, experiment, model, inputs.calibration, inputs.evaluation, assembly.deploys)
            passed = _quantise_and_evaluate(inputs, cached, assembly, folder, progress)
            progress.stage("assemble")
            if calibration is None and assembly.needs_trace(passed):
                calibration = experiment.calibration.load(model.tokenizer())
            whole = assembly.finish(passed, calibration)
            study = Study(
                assembly.model,
                inputs.evaluation,
                passed,
                whole,
                progress.stage,
                {experiment.measures[name]: loaded for name, loaded in prompts.items()},
                assembly.counting,
                {name: windows.documents for name, windows in evaluation.items() if windows.documents is not None},
                reference=lambda: _reference(experiment, whole),
                offloaded=experiment.offload is not None,
                aside=assembly.aside,
            )
            metrics = _measure(experiment, study, cached) | in_float
            metrics |= assembly.metrics() | assembly.simulated(facts["hardware"])
            metrics |= {f"time.stages_{action}_s": seconds for action, seconds in store.clock.seconds.items()}
    if prefix.report is not None:
        facts["prefix"] = prefix.report
    facts |= assembly.facts() | {"reused": [f"{count} x {stage}" for stage, count in store.reused.items()]}
    if own := declared_metrics(experiment.measures.values()):
        facts["own_metrics"] = own
    protocol = _protocol(evaluation, calibration) | {name: loaded.protocol for name, loaded in prompts.items()}
    results = write_record(experiment, folder, facts, protocol, passed, metrics, study.tables | assembly.tables())
    assembly.recorded(results)
    show_results(results, folder.path)
    return results


def _load_model(experiment: Experiment, folder: RunFolder, progress: Progress) -> LayeredModel:
    """Open the model without its layers. The pass loads these one by one."""
    progress.stage(f"model {experiment.model.label}")
    model = open_model(experiment.model, experiment.backend)
    if experiment.quantizer is not None and experiment.quantizer.lm_head:
        model.quantize_head(experiment.backend)
    folder.event("loaded", model=str(model.folder), depth=model.depth)
    if not model.quantized and (unread := model.weights.unread):
        names = [path.name for path in unread]
        say(f"model: weight files that transformers does not read are ignored: {', '.join(names)}")
        folder.event("unread_weight_files", names=names)
    return model


def _report_float(experiment: Experiment, model: LayeredModel, folder: RunFolder) -> dict[str, float]:
    """Say which parameters of the layers stay in float, and return their share as a metric."""
    if experiment.quantizer is None and not model.quantized:
        return {}
    share = FloatShare.of(model.kinds, model.depth)
    say(str(share))
    folder.event("in_float", parameters=share.parameters, by_module=share.by_module)
    return {"quantizer.float_share": share.share}


def _choose_prefix(
    experiment: Experiment,
    model: LayeredModel,
    evaluation: dict[str, Windows],
    calibration: Windows | None,
    store: Store,
    folder: RunFolder,
    progress: Progress,
) -> PrefixChoice:
    """Put the prefix before the model that `quantizer.prefix` names or searches, and add it to the stamps."""
    texts = {f"data.{name}.seqlen": windows for name, windows in evaluation.items()}
    if calibration is not None:
        texts["calibration.seqlen"] = calibration
    if experiment.quantizer is not None and experiment.quantizer.prefix != NO_PREFIX:
        progress.stage("prefix")
    prefix = choose_prefix(experiment.quantizer, model, texts, calibration, store)
    stamp_prefix(prefix.model, texts.values())
    if prefix.event is not None:
        folder.event("prefix", **prefix.event)
    return prefix


def _describe_gpu(backend: Backend, model: LayeredModel) -> dict[str, Any]:
    """Return the record of the GPU that runs a model. Empty without a GPU."""
    if (gpu := backend.describe_gpu()) is None:
        return {}
    heads = model.config.num_attention_heads
    kernel = sdpa_kernel(backend.device, model.dtype, heads, head_size(model.config))
    return {"gpu": gpu | {"sdpa_kernel": kernel}}


def _pass_inputs(
    experiment: Experiment, model: LayeredModel, evaluation: dict[str, Windows], calibration: Windows | None
) -> PassInputs:
    quantizer = experiment.quantizer
    reads = calibration is not None and quantizer is not None and quantizer.needs.inputs  # not only for the prefix
    return PassInputs(
        model,
        quantizer,
        experiment.backend,
        calibration.tokens if reads and calibration is not None else None,
        experiment.calibration.policy,
        {name: windows.tokens for name, windows in evaluation.items()},
    )


def _quantise_and_evaluate(
    inputs: PassInputs, cached: CachedPass, assembly: Assembly, folder: RunFolder, progress: Progress
) -> PassResult:
    """Calibrate, smooth, quantise and evaluate in one pass, or read an earlier run's pass from the result cache."""
    progress.layers(inputs.model.depth, "quantise" if inputs.quantizer else "evaluate", assembly.resumed)

    def on_layer(index: int, layer: nn.Module) -> None:
        cached.store_layer(index, layer)
        assembly.add(layer)
        folder.event("layer", index=index)
        progress.layer_done()

    if (passed := cached.find()) is not None:
        for layer in cached.layers():
            assembly.add(layer)
            progress.layer_done()
        return passed
    passed = sequential_pass(inputs, on_layer, assembly.writer, cached.store)
    cached.store_pass(passed)
    return passed


def _measure(experiment: Experiment, study: Study, cached: CachedPass) -> dict[str, float]:
    """Run all measures. Those that need hidden states come first, so that the memory of the others is their own."""
    measures = experiment.measures.values()
    metrics: dict[str, float] = {}
    for measure in (measure for measure in measures if measure.evaluates):
        metrics |= cached.measured(measure, study)
    study.passed.hidden.clear()
    release_memory()
    for measure in (measure for measure in measures if not measure.evaluates):
        metrics |= cached.measured(measure, study)
    return metrics


def _reference(experiment: Experiment, whole: nn.Module) -> nn.Module:
    """Return the full-precision model of a run, which is the deployed model `whole` if the run changes nothing."""
    if experiment.quantizer is None and experiment.offload is None:
        return whole
    return load_full_precision(experiment.model, experiment.backend)


def _protocol(evaluation: dict[str, Windows], calibration: Windows | None) -> dict[str, Any]:
    protocol: dict[str, Any] = {name: windows.protocol for name, windows in evaluation.items()}
    if calibration is not None:
        protocol["calibration"] = calibration.protocol
    return protocol


def search_metric(name: str | None, metrics: dict[str, float | None]) -> float | None:
    """Return the metric that the setting `search_metric` names, or None if it is null.

    A metric that is not finite counts as infinity, so a search avoids it.

    Raises:
        UserError: The run has no such metric.
    """
    if name is None:
        return None
    if name not in metrics:
        raise invalid("search_metric", name, metrics)
    return math.inf if (value := metrics[name]) is None else value


def _load_texts(experiment: Experiment, model: LayeredModel) -> tuple[dict[str, Windows], Windows | None]:
    """Load evaluation windows by dataset, and calibration windows if the quantizer or its prefix needs them.

    An overlap of the two is refused.
    """
    tokenizer = model.tokenizer()
    evaluation = {}
    if any(measure.evaluates for measure in experiment.measures.values()):
        for name, data in experiment.data.items():
            _refuse_too_long(f"data.{name}.seqlen", data.seqlen, model)
            evaluation[name] = data.load(tokenizer)
    calibration = None
    quantizer = experiment.quantizer
    if quantizer is not None and (quantizer.needs.inputs or quantizer.prefix == AUTO_PREFIX):
        _refuse_too_long("calibration.seqlen", experiment.calibration.seqlen, model)
        calibration = experiment.calibration.load(tokenizer)
        check_overlap(calibration, evaluation, experiment.calibration.overlap)
    return evaluation, calibration


def _load_prompts(experiment: Experiment, model: LayeredModel) -> dict[str, Windows]:
    """Load the prompts of each measure that runs prompts, by the name of the measure."""
    texts = PromptTexts(experiment.data, experiment.calibration)
    measures = experiment.measures.items()
    prompts = {name: one.load_prompts(model, texts) for name, one in measures if isinstance(one, PromptedMeasure)}
    stamp_prefix(model, prompts.values())
    return prompts


def _refuse_too_long(setting: str, seqlen: int, model: LayeredModel) -> None:
    if seqlen > (limit := model.max_tokens):
        raise UserError(f"{setting}: {seqlen} is more than the model's {limit} positions. Choose at most {limit}.")
