"""Compare what a run needs with what this machine has, before anything is loaded.

Sizes follow from the model's config. Its modules are built on the meta device and their parameters are counted.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import constants
from torch import nn

from haq_lab.calibration.calibrator import HESSIAN_BYTES
from haq_lab.config.build import Experiment
from haq_lab.measure.base import needs_reference
from haq_lab.models.families.layer_kinds import LayerKinds, empty_model
from haq_lab.models.generic import family_for
from haq_lab.models.sources import HubModel
from haq_lab.quantizers.base import NO_PREFIX
from haq_lab.storage.hidden_state_buffer import RAM_BYTES
from haq_lab.utils.console import say
from haq_lab.utils.errors import UserError
from haq_lab.utils.hugging_face import hub_is_reachable
from haq_lab.utils.paths import cache_folder

FLOAT, HALF = 4, 2  # bytes of a number: float32 to compute, 16 bits in checkpoints
LARGE = 4e9  # bytes of a model; from this size on, the table is shown even if everything fits
PROCESS = 1e9  # bytes of Python, torch and the activations of a batch
SOLVER = 4  # square matrices of the widest input in a solver: Hessian, factor, inverse and a temporary
ALL_WINDOWS = 256  # used if data.*.windows is null: the number of C4; WikiText-2 has fewer


@dataclass(frozen=True)
class Need:
    """One line of the table.

    Attributes:
        what: The resource.
        needed: Bytes that the run needs.
        there: Bytes that are available.
        hint: What the user can do if it does not fit.
    """

    what: str
    needed: float
    there: float
    hint: str = ""

    @property
    def fits(self) -> bool:
        return self.needed <= self.there


@dataclass(frozen=True)
class Size:
    """Numbers of parameters of a model.

    Attributes:
        shell: Parameters outside the layers.
        layers: Parameters of all layers.
        layer: Parameters of the largest layer.
        depth: Number of layers.
        width: Width of the hidden states.
        widest: Largest input width of a linear.
        experts: Number of experts of the model.
        expert: Parameters of one expert.
    """

    shell: int
    layers: int
    layer: int
    depth: int
    width: int
    widest: int
    experts: int
    expert: int

    @property
    def total(self) -> int:
        return self.shell + self.layers


def preflight(experiment: Experiment, overrides: list[str]) -> None:
    """Refuse a run that does not fit this machine.

    Only models from the hub and from folders are checked. The other sources make small models.

    Args:
        experiment: The run's settings.
        overrides: The overrides of the command line, for the suggested command.

    Raises:
        UserError: The run does not fit. The message has the table and a command that fits.
    """
    source = experiment.model
    if not isinstance(source, HubModel) or (config := source.config()) is None:
        return
    size = measure_size(config, source.family)
    needs = list_needs(experiment, source, size)
    lines = [f"{source.label}: {size.total / 1e9:,.1f} billion parameters in {size.depth} layers", *map(_line, needs)]
    short = [need for need in needs if not need.fits]
    if short:
        hints = [f"{need.what}: {need.hint}" for need in short if need.hint]
        raise UserError("\n".join(["this run does not fit this machine", *lines, *hints, _instead(overrides)]))
    if HALF * size.total > LARGE:
        for line in lines:
            say(line)


def measure_size(config: Any, choice: str | None = None) -> Size:
    """Count the parameters of a transformers config without allocating them.

    Args:
        config: The transformers config.
        choice: The setting `model.family`.
    """
    family = family_for(config, choice)
    kinds = LayerKinds(family, config)
    with torch.device("meta"):
        shell = _count(empty_model(config, 0))
    layers = [kinds.build(index) for index in range(config.num_hidden_layers)]
    counts = [_count(layer) for layer in layers]
    widest = max(parameter.shape[-1] for layer in layers for parameter in layer.parameters() if parameter.ndim > 1)
    experts, each = family.experts(config), 0
    if (moe := family.moe) is not None and kinds.moe_layers:
        each = _count(layers[kinds.moe_layers[0]].get_submodule(moe.experts)) // experts
    experts *= len(kinds.moe_layers)
    return Size(shell, sum(counts), max(counts), len(layers), config.hidden_size, widest, experts, each)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def list_needs(experiment: Experiment, source: HubModel, size: Size) -> list[Need]:
    """Return what a run needs and what this machine has, one `Need` a resource."""
    hidden = _hidden_bytes(experiment, size)
    memory = PROCESS + HALF * size.shell + (FLOAT + 1) * size.layer + min(hidden, RAM_BYTES)
    if experiment.quantizer is not None and experiment.quantizer.needs.hessian:
        memory += SOLVER * FLOAT * size.widest**2 + HESSIAN_BYTES
    deployed = _deployed_bytes(experiment, size)
    if experiment.quantizer is not None and experiment.quantizer.lm_head:
        deployed += size.shell  # an upper bound: the int8 head alone
    if any(map(needs_reference, experiment.measures.values())):
        deployed += FLOAT * (size.shell + size.depth * size.layer)
    on_gpu, free_on_gpu = 0.0, 0
    if experiment.backend.uses_gpu:
        on_gpu = (1 + FLOAT) * size.layer + deployed + (HALF * size.shell if _deploys(experiment) else 0)
        memory += _beside_gpu_bytes(experiment, size)
        if experiment.backend.device.type == "cuda":
            free_on_gpu, _ = torch.cuda.mem_get_info(experiment.backend.device)
    else:
        memory += deployed
    needs = [
        Need("memory", memory, psutil.virtual_memory().available),
        Need("GPU memory", on_gpu, free_on_gpu),
    ]
    missing = 0.0 if source.local else max(0.0, HALF * size.total - source.cached_bytes())
    if missing > 0.01 * HALF * size.total and not hub_is_reachable():
        needs.append(Need("the hub (it does not answer)", missing, 0, "model.name=FOLDER takes a local copy"))
    disk = [(Path(constants.HF_HUB_CACHE), missing), (cache_folder(), max(0.0, hidden - RAM_BYTES))]
    if experiment.checkpoint is not None:
        disk.append((experiment.checkpoint, HALF * size.shell + _stored(experiment) * size.layers + 2 * hidden))
    return needs + _disk_needs(disk)


def _deploys(experiment: Experiment) -> bool:
    """Return whether a measure needs the whole model, ready to run."""
    return any(measure.deploys for measure in experiment.measures.values())


def _deployed_bytes(experiment: Experiment, size: Size) -> float:
    """Return the bytes of the deployed layers on the device that computes, or 0 if no measure deploys the model.

    Of offloaded experts, only those in the fast tier count.
    """
    if not _deploys(experiment):
        return 0.0
    stored = _stored(experiment)
    if (offload := experiment.offload) is None:
        return float(stored * size.layers)
    narrow = offload.formats.fast_tier_dtype
    expert, total = (narrow.itemsize if narrow else stored) * size.expert, size.experts
    budget = offload.parsed_budget
    if budget.bytes is not None:
        tier = float(budget.bytes)
    else:
        tier = expert * (budget.share * total if budget.share is not None else (budget.experts or 0) + offload.spare)
    return stored * (size.layers - size.experts * size.expert) + tier


def _beside_gpu_bytes(experiment: Experiment, size: Size) -> float:
    """Return the bytes of host memory that layers need although a GPU computes.

    These are the offloaded experts in pinned memory, and layers that are not quantised until the model is moved.
    """
    if not _deploys(experiment):
        return 0.0
    stored, experts, lying = _stored(experiment), 0, 0.0
    if (offload := experiment.offload) is not None:
        experts, lying = size.experts * size.expert, HALF if offload.host_format == "bf16" else stored
    waiting = size.layers - experts if experiment.quantizer is None else 0
    return float(lying * experts + stored * waiting)


def _stored(experiment: Experiment) -> float:
    """Return the bytes of a weight in a finished layer."""
    return FLOAT if experiment.quantizer is None else experiment.quantizer.bytes_per_weight


def _disk_needs(files: list[tuple[Path, float]]) -> list[Need]:
    """Return one `Need` a disk, with the sum of all files on it."""
    by_disk: dict[int, tuple[Path, float]] = {}
    for path, needed in files:
        while not path.exists():
            path = path.parent
        first, before = by_disk.get(path.stat().st_dev, (path, 0.0))
        by_disk[path.stat().st_dev] = first, before + needed
    hint = "HF_HOME and HAQ_LAB_CACHE name folders on another disk"
    return [
        Need(f"disk at {path}", needed, shutil.disk_usage(path).free, hint)
        for path, needed in by_disk.values()
        if needed
    ]


def _hidden_bytes(experiment: Experiment, size: Size) -> float:
    """Return the bytes of the hidden states of all levels, including those of calibration."""
    tokens = 0
    levels = 1 if experiment.quantizer is None else 3 + (experiment.quantizer.prefix != NO_PREFIX)
    if any(measure.evaluates for measure in experiment.measures.values()):
        tokens += levels * sum((data.windows or ALL_WINDOWS) * data.seqlen for data in experiment.data.values())
    if experiment.quantizer is not None and experiment.quantizer.needs.inputs:
        passes = 2 if experiment.quantizer.needs.cross else 1
        tokens += passes * experiment.calibration.samples * experiment.calibration.seqlen
    return float(FLOAT * size.width * tokens)


def _line(need: Need) -> str:
    verdict = "fits" if need.fits else "DOES NOT FIT"
    return f"  {need.what:<32}{need.needed / 1e9:>8,.1f} GB needed {need.there / 1e9:>8,.1f} GB there   {verdict}"


def _instead(overrides: list[str]) -> str:
    kept = [override for override in overrides if not override.lstrip("+").startswith(("model=", "model."))]
    command = " ".join(["python -m haq_lab", *kept])
    return f"the same study on a small model:\n  {command} model=smol_moe\n  {command} model=tiny_mixtral"
