"""Sparse upcycling (Komatsuzaki et al., arXiv 2212.05055): a dense Llama becomes a Mixtral.

Every expert is a copy of the dense MLP. The router of a layer is made from real text: its rows are the k-means
centroids of what the layer's MLP receives, centred. Since Mixtral's gate weights sum to one, equal experts give
exactly the dense model's output: the model keeps its perplexity, its outliers are real, and its routing follows
the text, uneven and with memory from token to token. What it cannot show is a routing mistake.

    python -m haq_lab.models build smol_moe
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from transformers import MixtralConfig, PreTrainedConfig

from haq_lab.calibration.dataset import Calibration
from haq_lab.calibration.hooks import record_inputs
from haq_lab.data.text import fingerprint, python_docs
from haq_lab.models.architectures import family_of
from haq_lab.models.build_cache import build_once
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import ModelSource
from haq_lab.storage.hf_shard_writer import ShardWriter
from haq_lab.utils.console import Progress
from haq_lab.utils.errors import UserError
from haq_lab.zoo.kmeans import kmeans
from haq_lab.zoo.sanity_check import whole_model_facts

STORED = torch.bfloat16
MLP_INPUT = "mlp.gate_proj"
FIRST_CHOICE = 0.5  # mean probability of a token's first expert: sharp, and the second still counts
SAME_PERPLEXITY = 1e-4  # relative; float32 sums in another order leave about 1e-6
TEXT = Calibration("python_docs", samples=32, seqlen=512)


@dataclass(frozen=True)
class UpcycledModel:
    """A dense model turned into a Mixture of Experts, once, and kept in the cache folder.

    Args:
        dense: The model it is made from: any Llama or Mistral without biases.
        experts: Experts a layer.
        active: How many of them a token takes.
        seed: Of the text's crops and of k-means.
    """

    dense: Any  # a ModelSource; a protocol, which pydantic cannot check
    experts: Annotated[int, Field(ge=2)] = 8
    active: Annotated[int, Field(ge=1)] = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.dense, ModelSource):
            raise UserError(f"model.dense: '{self.dense}' is no model; model@model.dense=OPTION chooses one")
        if self.active > self.experts:
            raise UserError(f"model.active: {self.active} is more than the {self.experts} of model.experts")

    @property
    def label(self) -> str:
        return f"{self.dense.label}-moe{self.experts}"

    def folder(self) -> Path:
        dense = self.dense.folder()
        text = fingerprint(python_docs("calibration"))[:8]
        name = f"{dense.name}-moe{self.experts}top{self.active}-{text}-{self.seed}"
        return build_once(name, lambda target: upcycle(dense, target, self.experts, self.active, self.seed))

    def check(self) -> list[str]:
        """Lines on its perplexity and routing. Raises `UserError` unless the perplexity is the dense model's."""
        dense = whole_model_facts(self.dense.folder(), STORED)
        sparse = whole_model_facts(self.folder(), STORED)
        if abs(sparse.perplexity / dense.perplexity - 1) > SAME_PERPLEXITY:
            raise UserError(
                f"model: the perplexity of {self.folder()} is {sparse.perplexity:.4f}, that of the dense model "
                f"{dense.perplexity:.4f}; remove the folder and build it again"
            )
        line = f"dense model, weights in bfloat16: perplexity {dense.perplexity:.4f}"
        return [line, *sparse.lines(f"{self.experts} experts, top {self.active}")]


@torch.no_grad()
def upcycle(dense: Path, target: Path, experts: int, active: int, seed: int, text: Calibration = TEXT) -> None:
    """Write the Mixtral checkpoint made from the folder `dense` into the folder `target`, in bfloat16.

    One layer is in memory at a time. The same arguments give the same bytes.

    Raises:
        UserError: The dense model is none that a Mixtral can hold.
    """
    model = LayeredModel(dense)
    config = _mixtral_config(model.config, experts, active)
    windows = Calibration(text.text, text.path, text.samples, text.seqlen, seed).load(model.tokenizer()).tokens
    _round(model.shell)
    family, writer = family_of(config), ShardWriter(target, model.depth + 1)
    writer.add({name: _stored(tensor) for name, tensor in model.outside().items()})
    hidden = model.embed(windows)
    with Progress() as progress:
        progress.layers(model.depth, "upcycle")
        for index in range(model.depth):
            layer = _round(model.load_layer(index))
            received = record_inputs(model, layer, index, hidden, [MLP_INPUT])[MLP_INPUT]
            router = _stored(router_rows(received, experts, seed))
            tensors, prefix = _sparse_layer(layer, router), f"{family.layers}.{index}."
            writer.add({family.checkpoint_name(prefix + name): tensor for name, tensor in tensors.items()})
            progress.layer_done()
    writer.finish()
    config.save_pretrained(target)
    model.tokenizer().save_pretrained(target)


def router_rows(received: Tensor, experts: int, seed: int) -> Tensor:
    """A router's weight (experts, d) from the vectors (n, d) that an MLP receives.

    The mean is taken out of the rows too, so that a logit depends on the centred vector alone: Mixtral's
    router has no bias that could make up for it. The scale is the one at which a token's first expert has
    a probability of `FIRST_CHOICE` on average.
    """
    points = received.double()
    mean = points.mean(0)
    centroids, _ = kmeans(points - mean, experts, seed)
    direction = mean / mean.norm()
    rows = centroids - (centroids @ direction)[:, None] * direction
    logits = points @ rows.t()
    low, high = -12.0, 12.0  # log2 of the scale, relative to logits of standard deviation one
    rows, logits = rows / logits.std(), logits / logits.std()
    for _ in range(40):
        middle = (low + high) / 2
        sharp = (logits * 2**middle).softmax(1).amax(1).mean() > FIRST_CHOICE
        low, high = (low, middle) if sharp else (middle, high)
    return (rows * 2**low).float()


def _mixtral_config(dense: PreTrainedConfig, experts: int, active: int) -> MixtralConfig:
    """Whatever the two architectures share, taken over."""
    given = dense.to_dict()
    if dense.model_type not in ("llama", "mistral") or given.get("attention_bias") or given.get("mlp_bias"):
        raise UserError(f"model.dense: a '{dense.model_type}' like this one cannot be turned into a Mixtral")
    own = {field.name for field in fields(MixtralConfig)} - {"transformers_version", "architectures", "dtype"}
    shared = {name: value for name, value in given.items() if name in own}
    config = MixtralConfig(**shared, num_local_experts=experts, num_experts_per_tok=active)
    config.architectures = ["MixtralForCausalLM"]
    config.dtype = STORED
    return config


def _sparse_layer(layer: torch.nn.Module, router: Tensor) -> dict[str, Tensor]:
    """A dense decoder layer's tensors, the MLP's once an expert, and the router."""
    tensors = {"mlp.gate.weight": router}
    for name, tensor in layer.state_dict().items():
        if name.startswith("mlp."):
            part = name.removeprefix("mlp.")
            tensors |= dict.fromkeys((f"mlp.experts.{expert}.{part}" for expert in range(len(router))), _stored(tensor))
        else:
            tensors[name] = _stored(tensor)
    return tensors


def _stored(tensor: Tensor) -> Tensor:
    return tensor.to(STORED)


def _round(module: torch.nn.Module) -> torch.nn.Module:
    """Weights as they will be stored: the routing is learnt from the very model that is written."""
    for parameter in module.parameters():
        parameter.copy_(_stored(parameter))
    return module
