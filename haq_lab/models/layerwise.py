"""Run a causal language model with one decoder layer in memory at a time.

Only the modules outside the layers stay in memory: embeddings, final norm and head. Each layer is read from the
checkpoint when it is needed. The other arguments of a layer (attention mask, rotary embeddings) are recorded during
the model's own forward, because they change between transformers releases.

    model = LayeredModel(folder)
    hidden = model.embed(windows)                       # (n, t, d)
    for index in range(model.depth):
        hidden = model.run(model.load_layer(index), index, hidden)
    logits = model.head(hidden)                         # (n, t, vocabulary)
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from haq_lab.int8.backend import Backend
from haq_lab.int8.linear import Int8Linear
from haq_lab.int8.sequences import batch_of, declare_batches
from haq_lab.models.checkpoint_reader import Weights
from haq_lab.models.embeddings import keep_stored_type, table_names
from haq_lab.models.experts import Experts, split_fused
from haq_lab.models.families.family import WRAPPED, Family, Group, Moe
from haq_lab.models.families.layer_kinds import LayerKinds, empty_model, set_depth
from haq_lab.models.families.lookup import GENERIC, check_model_type, text_config_of
from haq_lab.models.families.recorder import Recorder
from haq_lab.models.families.stored_forms import in_module_form
from haq_lab.models.generic import family_for
from haq_lab.prefix.attention import IMPLEMENTATION, attach
from haq_lab.prefix.contents import Prefix
from haq_lab.prefix.positions import ShiftedPositions, number_padded_batches
from haq_lab.storage.narrow_floats import refused_format
from haq_lab.utils.errors import UserError
from haq_lab.utils.hugging_face import quiet_transformers

TOKENS_PER_BATCH = 4096  # bounds the activations in memory; larger gains nothing on a CPU
M = TypeVar("M", bound=nn.Module)
Allocate = Callable[..., Tensor]  # like `torch.empty`: shape and dtype -> tensor
COMPUTED = "rotary_emb.inv_freq"  # old checkpoints store it in every layer, but it follows from the config


class LayeredModel:
    """A causal language model that is read layer by layer from a checkpoint folder.

    Args:
        folder: Checkpoint folder with config.json, safetensors files and a tokenizer.
        dtype: Floating-point type of the layers' weights and of the hidden states.
        allow_nonfinite: Accept weights with NaN or infinite entries.
        family: `generic` finds the linears by running the layers. None takes them from the family table.

    Attributes:
        quantized: Whether the layers are stored in int8 (`haq_lab.checkpoint.model`).
        config: The transformers config.
        family: The row of the architecture in the family table.
        experts: Number of experts in a layer that has experts. 0 for a dense model.
        kinds: What each layer consists of: its linears, grouped by shared input, and its experts.
        depth: Number of decoder layers.
        shell: The transformers model with recorders in place of its layers.
        int8_head: The int8 head, or None.
        prefix: The prefix that stands before every sequence, or None.

    Raises:
        UserError: The config is not supported, or the tensors outside the layers do not fit it.
    """

    quantized = False
    prefix: Prefix | None = None

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        allow_nonfinite: bool = False,
        family: str | None = None,
    ):
        self._allow_nonfinite = allow_nonfinite
        self.config = _read_config(folder, self.quantized, family)
        self.folder = folder
        self.dtype = dtype
        self.family: Family = family_for(self.config, family)
        self.depth: int = self.config.num_hidden_layers
        self.kinds = LayerKinds(self.family, self.config)
        self.experts = self.family.experts(self.config) if self.kinds.moe_layers else 0
        self.shell = self._build_shell()
        self.int8_head: Int8Linear | None = None
        self._bare = self
        self._arguments: dict[int, list[dict[str, Any]]] = {}

    @cached_property
    def weights(self) -> Weights:
        """Return the reader of the checkpoint's tensors."""
        return Weights(self.folder, self._allow_nonfinite)

    # The shell is the model without its layers.

    def _build_shell(self) -> PreTrainedModel:
        with no_init_weights():  # memory pages that are never written are never allocated
            shell = empty_model(self.config, 0, self.dtype).eval()
        self.config._attn_implementation = shell.config._attn_implementation
        self.config._experts_implementation = shell.config._experts_implementation  # of experts that stay fused
        set_depth(shell, self.depth)
        self.recorders = [Recorder() for _ in range(self.depth)]
        shell.set_submodule(self.family.layers, nn.ModuleList(self.recorders))
        tables = table_names(shell)
        tensors = {
            name: tensor if name in tables else tensor.to(self.dtype) for name, tensor in self._shell_tensors().items()
        }
        try:
            result = shell.load_state_dict(tensors, strict=False, assign=True)
        except RuntimeError as error:
            raise UserError(f"model: the tensors of {self.folder} do not fit its config: {error}.") from error
        tied = set(shell.all_tied_weights_keys)
        missing = sorted(set(result.missing_keys) - tied)
        if missing:
            raise UserError(f"model: {self.folder} lacks the tensors {', '.join(missing[:5])}. Download it again.")
        with quiet_transformers():
            shell.tie_weights(missing_keys=set(result.missing_keys))  # a stored head is not tied
        embedding, head = shell.get_input_embeddings(), shell.get_output_embeddings()
        if head is not None and head.weight is not embedding.weight:
            shell.config.tie_word_embeddings = self.config.tie_word_embeddings = False
        keep_stored_type(shell, self.dtype)
        declare_batches(shell.get_submodule(self.family.layers.rpartition(".")[0]))
        return shell.requires_grad_(False)

    def _shell_tensors(self) -> dict[str, Tensor]:
        """Return the tensors outside the layers in their own memory. Those that are read are views of mapped files."""
        return {name: tensor.clone() for name, tensor in self.read_outer_tensors().items()}

    def read_outer_tensors(self) -> dict[str, Tensor]:
        """Return the tensors outside the layers as stored, with their names in our modules."""
        names = [name for name in self.weights.names() if not self._is_layer_tensor(name)]
        if any(WRAPPED in name for name in names):
            names = [name for name in names if WRAPPED in name or name.startswith("lm_head.")]
        return {self._module_name(name): tensor for name, tensor in self.weights.read(names).items()}

    # Some checkpoints omit the base model's prefix ("decoder.layers.0" for "model.decoder.layers.0").

    def _module_name(self, name: str) -> str:
        prefix = f"{self.family.layers.split('.')[0]}."
        name = self.family.module_name(name)
        return name if name.startswith((prefix, f"{self.family.head}.")) else prefix + name

    def _is_layer_tensor(self, name: str) -> bool:
        return self._module_name(name).startswith(f"{self.family.layers}.")

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the checkpoint's tokenizer.

        Raises:
            UserError: The folder has no usable tokenizer, or it has more tokens than the embedding.
        """
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        except Exception as error:  # the tokenizers library raises the base class
            reason = " ".join(str(error).split())
            raise UserError(
                f"model: no usable tokenizer in {self.folder} ({reason}). Copy the tokenizer's files there."
            ) from error
        # If the files of OPT's tokenizer are missing, transformers returns a tokenizer with an empty vocabulary.
        if not tokenizer.encode("text", add_special_tokens=False):
            raise UserError(
                f"model: no usable tokenizer in {self.folder} (no vocabulary). Copy the tokenizer's files there."
            )
        # More rows than tokens are usual padding. Added tokens are harmless unless a text has them, see `embed`.
        vocabulary = tokenizer.get_vocab().items() - tokenizer.get_added_vocab().items()
        self._refuse_tokens_beyond_embedding(max((number for _, number in vocabulary), default=0))
        return tokenizer

    def _refuse_tokens_beyond_embedding(self, largest: int) -> None:
        rows = len(cast(Tensor, self.shell.get_input_embeddings().weight))
        if largest >= rows:
            raise UserError(
                f"model: the tokenizer in {self.folder} has {largest + 1} tokens or more, but the embedding has {rows} "
                "rows. Use the model's own tokenizer, or call resize_token_embeddings."
            )

    def groups_of(self, index: int) -> tuple[Group, ...]:
        """Return the linears of decoder layer `index`, grouped by shared input (`LayerKinds.groups`)."""
        return self.kinds.groups(index)

    def moe_of(self, index: int) -> Moe | None:
        """Return the names of the router and the experts of decoder layer `index`, or None if it has no experts."""
        return self.kinds.moe(index)

    def new_layer(self, index: int) -> nn.Module:
        """Return decoder layer `index` on the meta device, without weights and with split experts."""
        layer = self.kinds.build(index)
        if (moe := self.moe_of(index)) is not None:
            with torch.device("meta"):
                layer.set_submodule(moe.experts, Experts.unfused(layer.get_submodule(moe.experts)))
        return layer

    def load_layer(self, index: int) -> nn.Module:
        """Return decoder layer `index` with its weights.

        Raises:
            UserError: A tensor is missing, superfluous, not finite or has the wrong shape.
        """
        layer = self.new_layer(index)
        prefix = f"{self.family.layers}.{index}."
        names = {
            name: self._module_name(name).removeprefix(prefix)
            for name in self.weights.names()
            if self._module_name(name).startswith(prefix) and not name.endswith(COMPUTED)
        }
        tensors = {names[name]: tensor for name, tensor in self.weights.read(names, self.dtype).items()}
        if self.family.probed:
            tensors = in_module_form(tensors, self.config.model_type)
        if (moe := self.moe_of(index)) is not None:
            tensors = split_fused(tensors, moe, cast(Experts, layer.get_submodule(moe.experts)).layout)
        try:
            layer.load_state_dict(tensors, strict=True, assign=True)
        except RuntimeError as error:
            raise UserError(f"model: layer {index} of {self.folder} does not fit its config: {error}.") from error
        if self.prefix is not None and (states := self.prefix.states) is not None:
            attach(layer.get_submodule(self.family.attention), states.keys[index], states.values[index])
        return layer.requires_grad_(False)

    def with_prefix(self, prefix: Prefix) -> LayeredModel:
        """Return the model with a prefix before every sequence. It shares everything else with this one.

        The layers that it loads have the prefix's keys and values, and fewer positions are left for text.

        Raises:
            UserError: The model's attention is not `sdpa`, which the prefix needs.
        """
        if (attention := self.config._attn_implementation) not in ("sdpa", IMPLEMENTATION):
            raise UserError(
                f"quantizer.prefix: '{self.family.model_type}' has {attention} attention, which takes no prefix. "
                "Choose quantizer.prefix=none."
            )
        twin = copy.copy(self)
        twin._use_prefix(prefix)
        return twin

    def _use_prefix(self, prefix: Prefix) -> None:
        self._bare, self.prefix, self._arguments = copy.copy(self), prefix, {}
        for config in (self.config, self.shell.config):
            config._attn_implementation = IMPLEMENTATION  # without the buffers of a prefix it is transformers' `sdpa`
        number_padded_batches(self.shell.get_submodule(self.family.layers.rpartition(".")[0]))
        self.shell = _shallow_copy(self.shell)
        self.shell.config = copy.deepcopy(self.shell.config)
        self.shell.config.max_position_embeddings = self.max_tokens  # `generate`, tasks and the server read it
        if (name := self.family.learned_positions) is not None:
            table = ShiftedPositions(self.shell.get_submodule(name), len(prefix))
            self.shell = _with_submodule(self.shell, name, table)

    def without_prefix(self) -> LayeredModel:
        """Return the model without its prefix, which shares everything else. Layers that it loads have no prefix."""
        return self._bare

    def embed_at(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Return the hidden states (1, t, d) of tokens (1, t), and the keyword arguments of each layer for them.

        Args:
            tokens: Token ids.
            positions: Their positions (1, t), which may be negative if the model has rotary embeddings.
        """
        return self._embed(tokens, positions), [recorder.arguments for recorder in self.recorders]

    def embed(self, windows: Tensor, allocate: Allocate = torch.empty) -> Tensor:
        """Return the hidden states (n, t, d) that the first decoder layer receives.

        Args:
            windows: Token windows (n, t) int64.
            allocate: Creates the tensor for the hidden states. It is called like `torch.empty`.
        """
        self._refuse_tokens_beyond_embedding(int(windows.max()) if windows.numel() else 0)
        width = self._embed(windows[:1]).shape[-1]
        hidden = allocate((*windows.shape, width), dtype=self.dtype)
        size = self.batch_size(windows)
        for batch, states in zip(windows.split(size), hidden.split(size), strict=True):
            states.copy_(self._embed(batch))
        return hidden

    def run(self, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Run decoder layer `index` on hidden states (n, t, d) in batches, in place. Return `hidden`."""
        for batch in hidden.split(self.batch_size(hidden)):
            batch.copy_(self.forward(layer, index, batch))
        return hidden

    def forward(self, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """Run decoder layer `index` on one batch of hidden states (n, t, d) and return its output (n, t, d)."""
        arguments = self._arguments_for(hidden.shape[1])[index]
        with batch_of(*hidden.shape[:2]):
            return layer(hidden, **arguments)

    def quantize_head(self, backend: Backend) -> None:
        """Add an int8 head, which assembled models use. The float head and a tied embedding do not change."""
        head, embeddings = self.shell.get_output_embeddings(), self.shell.get_input_embeddings()
        self.int8_head = Int8Linear.rounded(head, backend, copied=head.weight is embeddings.weight)

    def head(self, hidden: Tensor, quantized: bool = False) -> Tensor:
        """Return the logits (n, t, vocabulary).

        Args:
            hidden: Hidden states (n, t, d) after the last decoder layer.
            quantized: Use the int8 head if there is one.
        """
        recorder, device = self.recorders[-1], self.shell.device  # a deployed model may have moved the shared weights
        recorder.replay = hidden.to(device)
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=device)
        try:
            shell = self._with_int8_head() if quantized else self.shell
            return shell(tokens, use_cache=False).logits.to(hidden.device)
        finally:
            recorder.replay = None

    def _arguments_for(self, length: int) -> list[dict[str, Any]]:
        """Return the keyword arguments of each layer for windows of `length` tokens. They broadcast over a batch."""
        if length not in self._arguments:
            self._embed(torch.zeros(1, length, dtype=torch.long))
            self._arguments = {length: [recorder.arguments for recorder in self.recorders]}
        return self._arguments[length]

    def _embed(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Run the shell without the head. The recorders then have the arguments of each layer."""
        self.shell.base_model(tokens, position_ids=positions, use_cache=False)
        return cast(Tensor, self.recorders[0].received)

    def batch_size(self, windows: Tensor) -> int:
        """Return the number of windows (n, t, ...) in a batch."""
        return max(1, TOKENS_PER_BATCH // windows.shape[1])

    def assemble(self, layers: list[nn.Module]) -> nn.Module:
        """Return the whole transformers model with the given decoder layers, for generation and latency."""
        return _with_submodule(self._with_int8_head(), self.family.layers, nn.ModuleList(layers))

    def _with_int8_head(self) -> PreTrainedModel:
        """Return a shallow copy of the shell with the int8 head if there is one."""
        twin = _shallow_copy(self.shell)
        if self.int8_head is not None:
            twin.set_output_embeddings(self.int8_head)
        return twin

    @property
    def max_tokens(self) -> int:
        """Return the largest number of tokens in a sequence, after the prefix."""
        return self.config.max_position_embeddings - len(self.prefix or ())


def _shallow_copy(module: M) -> M:
    """Return a copy that shares parameters and children. Replacing a child does not change the original."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def _with_submodule(module: M, name: str, submodule: nn.Module) -> M:
    """Return a copy of a module that shares everything but the submodule `name`."""
    first, _, rest = name.partition(".")
    twin = _shallow_copy(module)
    child = cast(nn.Module, module._modules[first])
    twin._modules[first] = _with_submodule(child, rest, submodule) if rest else submodule
    return twin


def _read_config(folder: Path, quantized: bool, family: str | None) -> Any:
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if family != GENERIC:
            check_model_type(fields.get("model_type"))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if "quantization_config" in fields:
            if not quantized and (form := refused_format(fields["quantization_config"])) is not None:
                raise UserError(
                    f"model: {folder} is already quantised by {form}. Choose a checkpoint in float32, float16, "
                    "bfloat16, float8 or MXFP4. Use model=quantized for haq_lab checkpoints."
                )
            del config.quantization_config
        return text_config_of(config)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError, StrictDataclassError) as error:
        raise UserError(
            f"model: config.json in {folder} cannot be used ({error}). Choose a supported checkpoint."
        ) from error
