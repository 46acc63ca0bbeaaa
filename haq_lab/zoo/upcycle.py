"""Turn a dense Llama into a Mixtral by sparse upcycling (Komatsuzaki et al., arXiv 2212.05055).

Every expert is a copy of the dense MLP. The rows of a router are the centred k-means centroids of the MLP's inputs on
real text. Mixtral's gate weights sum to one, so the output equals the dense model's output.

The model has the perplexity and the outliers of the dense model. Its routing depends on the text, is uneven and
correlates between successive tokens. Because all experts are equal, the model cannot reveal a wrong routing.

    python -m haq_lab.models build smol_moe
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from transformers import MixtralConfig, PreTrainedConfig

from haq_lab.calibration.dataset import Calibration
from haq_lab.calibration.hooks import record_inputs
from haq_lab.data.text import fingerprint, python_docs
from haq_lab.models.build_cache import build_once
from haq_lab.models.companion_files import copy_companion_files
from haq_lab.models.families.family import PROJECTIONS, Moe
from haq_lab.models.families.lookup import family_of
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import ModelSource
from haq_lab.storage.hf_shard_writer import ShardWriter
from haq_lab.utils.console import Progress
from haq_lab.utils.errors import UserError
from haq_lab.zoo.kmeans import kmeans
from haq_lab.zoo.sanity_check import check_model

STORED = torch.bfloat16
MLP_INPUT = f"mlp.{PROJECTIONS[0]}"
FIRST_CHOICE = 0.5  # mean gate probability of a token's first expert, so that the second still matters
SAME_PERPLEXITY = 1e-4  # relative tolerance; float32 sums in another order differ by about 1e-6
TEXT = Calibration("python_docs", samples=32, seqlen=512)


@dataclass(frozen=True)
class UpcycledModel:
    """A dense model turned into an MoE model, once, and stored in the cache folder.

    Args:
        dense: The dense model: a Llama or Mistral without biases.
        experts: Number of experts in a layer.
        active: Number of active experts for each token.
        seed: Seed of the text windows and of k-means.
    """

    dense: Any  # a ModelSource, which is a protocol that pydantic cannot check
    experts: Annotated[int, Field(ge=2)] = 8
    active: Annotated[int, Field(ge=1)] = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.dense, ModelSource):
            raise UserError(f"model.dense: '{self.dense}' is not a model. Choose one with model@model.dense=OPTION.")
        if self.active > self.experts:
            raise UserError(
                f"model.active: {self.active} is more than the {self.experts} of model.experts. "
                f"Choose at most {self.experts}."
            )

    @property
    def label(self) -> str:
        return f"{self.dense.label}-moe{self.experts}"

    def folder(self) -> Path:
        dense = self.dense.folder()
        text = fingerprint(python_docs("calibration"))[:8]
        name = f"{dense.name}-moe{self.experts}top{self.active}-{text}-{self.seed}"
        return build_once(name, lambda target: upcycle(dense, target, self.experts, self.active, self.seed))

    def check(self) -> list[str]:
        """Return lines of text with perplexity and routing.

        Raises:
            UserError: The perplexity differs from that of the dense model.
        """
        dense = check_model(self.dense.folder(), STORED)
        sparse = check_model(self.folder(), STORED)
        if abs(sparse.perplexity / dense.perplexity - 1) > SAME_PERPLEXITY:
            raise UserError(
                f"model: the perplexity of {self.folder()} is {sparse.perplexity:.4f}, but the dense model has "
                f"{dense.perplexity:.4f}. Remove the folder and build it again."
            )
        line = f"dense model, weights in bfloat16: perplexity {dense.perplexity:.4f}"
        return [line, *sparse.lines(f"{self.experts} experts, top {self.active}")]


@torch.no_grad()
def upcycle(dense: Path, target: Path, experts: int, active: int, seed: int, text: Calibration = TEXT) -> None:
    """Turn a dense checkpoint into a Mixtral checkpoint in bfloat16.

    One layer is in memory at a time. The same arguments give the same bytes.

    Args:
        dense: Folder of the dense model.
        target: Existing folder for the Mixtral checkpoint.
        experts: Number of experts in a layer.
        active: Number of active experts for each token.
        seed: Seed of the text windows and of k-means.
        text: Text from which the routers are computed.

    Raises:
        UserError: The dense model is not a Llama or Mistral without biases.
    """
    model = LayeredModel(dense)
    config = _mixtral_config(model.config, experts, active)
    windows = Calibration(text.text, text.path, text.samples, text.seqlen, seed).load(model.tokenizer()).tokens
    _round(model.shell)
    family, writer = family_of(config), ShardWriter(target, model.depth + 1)
    writer.add({name: _stored(tensor) for name, tensor in model.read_outer_tensors().items()})
    hidden = model.embed(windows)
    with Progress() as progress:
        progress.layers(model.depth, "upcycle")
        for index in range(model.depth):
            layer = _round(model.load_layer(index))
            received = record_inputs(model, layer, index, hidden, [MLP_INPUT])[MLP_INPUT]
            router = _stored(router_rows(received, experts, seed))
            tensors, prefix = _sparse_layer(layer, router, cast(Moe, family.moe)), f"{family.layers}.{index}."
            writer.add({family.checkpoint_name(prefix + name): tensor for name, tensor in tensors.items()})
            progress.layer_done()
    writer.finish()
    config.save_pretrained(target)
    copy_companion_files(model, target)


def router_rows(received: Tensor, experts: int, seed: int) -> Tensor:
    """Return a router's weight whose rows are k-means centroids of the MLP's inputs.

    Mixtral's router has no bias. So the direction of the mean is removed from the rows, and the mean input does not
    change the logits. The rows are scaled so that a token's first expert has a probability of `FIRST_CHOICE` on
    average.

    Args:
        received: (n, d) inputs of the dense MLP.
        experts: Number of experts.
        seed: Seed of k-means.

    Returns:
        (experts, d) float32.
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
    """Return a Mixtral config with the fields that it shares with the dense config."""
    dense_fields = dense.to_dict()
    has_biases = dense_fields.get("attention_bias") or dense_fields.get("mlp_bias")
    if dense.model_type not in ("llama", "mistral") or has_biases:
        kind = f"'{dense.model_type}' with biases" if has_biases else f"'{dense.model_type}'"
        raise UserError(
            f"model.dense: architecture {kind} cannot be turned into a Mixtral. "
            "Choose a Llama or Mistral without biases."
        )
    known = {field.name for field in fields(MixtralConfig)} - {"transformers_version", "architectures", "dtype"}
    shared = {name: value for name, value in dense_fields.items() if name in known}
    config = MixtralConfig(**shared, num_local_experts=experts, num_experts_per_tok=active)
    config.architectures = ["MixtralForCausalLM"]
    config.dtype = STORED
    return config


def _sparse_layer(layer: torch.nn.Module, router: Tensor, moe: Moe) -> dict[str, Tensor]:
    """Return the tensors of an MoE layer: the router, the dense layer's tensors, and its MLP once for each expert."""
    tensors = {f"{moe.router}.weight": router}
    for name, tensor in layer.state_dict().items():
        if name.startswith("mlp."):
            part = name.removeprefix("mlp.")
            tensors |= dict.fromkeys(
                (f"{moe.experts}.{expert}.{part}" for expert in range(len(router))), _stored(tensor)
            )
        else:
            tensors[name] = _stored(tensor)
    return tensors


def _stored(tensor: Tensor) -> Tensor:
    return tensor.to(STORED)


def _round(module: torch.nn.Module) -> torch.nn.Module:
    """Round the weights as they will be stored, because the router must fit the stored model."""
    for parameter in module.parameters():
        parameter.copy_(_stored(parameter))
    return module
