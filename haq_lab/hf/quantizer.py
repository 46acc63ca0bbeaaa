"""Define how transformers loads a haq_lab checkpoint: its `quantization_config` and its quantizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from haq_lab.int8.backend import Backend

METHOD = "haq_lab"


class HaqLabConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint.

    To change a setting, load the config first:

        config = AutoConfig.from_pretrained("checkpoints/smol_moe")
        config.quantization_config |= {"offload": "haq", "offload_settings": {"budget": "40%"}}
        model = AutoModelForCausalLM.from_pretrained("checkpoints/smol_moe", config=config)
        model.offload.stats()

    Args:
        backend: Backend of the int8 linears: `cpu`, `cuda`, `reference` or `fake`. If None, `cuda` is used if
            `device_map` names a GPU, and `cpu` if not.
        offload: An option of the group `offload`, such as `haq`. If None, all experts stay in memory.
        offload_settings: Settings of offloading, such as `{"budget": "40%"}`.
        record: The other entries of the checkpoint's config: its provenance and whether its head is quantised.
    """

    def __init__(
        self,
        backend: str | None = None,
        offload: str | None = None,
        offload_settings: dict[str, Any] | None = None,
        **record: Any,
    ):
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers' enumeration has only its own methods
        self.backend, self.offload, self.offload_settings = backend, offload, offload_settings
        self.__dict__.update({name: value for name, value in record.items() if name != "quant_method"})


class HaqLabQuantizer(HfQuantizer):
    """Loads a haq_lab checkpoint inside `from_pretrained`, through the loader that `model=quantized` uses.

    transformers builds an empty model and would then copy tensors into it. This class takes the model's modules away
    before, so that nothing is copied, and puts the loaded modules in afterwards.
    """

    quantization_config: HaqLabConfig

    def __init__(self, quantization_config: HaqLabConfig, **arguments: Any):
        super().__init__(quantization_config, **arguments)
        self._device = "cpu"
        self._folder: Path | None = None

    def update_device_map(self, device_map: Any) -> None:
        """Remember the device and return None, because the loaded modules are on their device already."""
        if device_map is not None:
            self._device = _one_device(device_map)

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return float32. The checkpoint's config says int8 to stop loaders that do not know the format."""
        return torch.float32

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **arguments: Any) -> None:
        self._folder = _local_folder(str(model.config.name_or_path), arguments["checkpoint_files"])
        model._modules.clear()
        model.all_tied_weights_keys = {}
        model._keys_to_ignore_on_load_unexpected = {".*"}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **arguments: Any) -> None:
        from haq_lab.pipeline.deployment import load_with_options

        assert self._folder is not None
        settings = self.quantization_config
        backend = self._make_backend(settings.backend)
        whole, _ = load_with_options(self._folder, backend, settings.offload, settings.offload_settings or {})
        if (session := getattr(whole, "offload", None)) is not None:
            model.offload = session
        whole.config.dtype = model.config.dtype
        whole.config.name_or_path = model.config.name_or_path
        whole.config.quantization_config = self.quantization_config
        model.config, model._modules = whole.config, whole._modules
        model.all_tied_weights_keys = whole.all_tied_weights_keys

    def _make_backend(self, name: str | None) -> Backend:
        """Return the backend that the config names, or the one for the device of `device_map`."""
        from haq_lab.config.backends import make_backend

        name = name or ("cpu" if self._device == "cpu" else "cuda")
        on_gpu = name == "cuda" and self._device != "cpu"
        return make_backend(name, device=self._device) if on_gpu else make_backend(name)

    def is_serializable(self) -> bool:
        """Return False. Copy the checkpoint folder, or export it with `python -m haq_lab.checkpoint export`."""
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def register() -> None:
    """Register the method with transformers, if it is not registered yet."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(HaqLabConfig)
        register_quantizer(METHOD)(HaqLabQuantizer)


def _one_device(device_map: Any) -> str:
    """Return the device that a `device_map` names: `cpu`, `cuda` or, for example, `cuda:1`."""
    from haq_lab.utils.errors import UserError

    if device_map in ("auto", "balanced", "sequential"):
        return "cuda" if torch.cuda.is_available() else "cpu"
    devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    names = {f"cuda:{device}" if isinstance(device, int) else str(device) for device in devices}
    name = names.pop()
    if names or not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"device_map: {device_map} is not supported. Choose one device, such as 'cpu' or 'cuda:0'.")
    return name


def _local_folder(name: str, checkpoint_files: list[str]) -> Path:
    """Return the folder of a checkpoint. Download the files from the hub that transformers has not downloaded."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    snapshot = Path(checkpoint_files[0]).parent
    return Path(snapshot_download(name, revision=snapshot.name))
