"""Compose a run's config from overrides, outside the command line."""

from __future__ import annotations

from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict

from haq_lab.utils.paths import bundled, folder_name

OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)  # conf/config.yaml names run folders with it


def compose_run(overrides: Sequence[str]) -> tuple[DictConfig, DictConfig]:
    """Compose the config of one run.

    Args:
        overrides: Overrides as on the command line, such as `model=smol`.

    Returns:
        The run's config, and Hydra's own config, which names the run folder and the chosen options.

    Raises:
        HydraException: An override is not valid. `haq_lab.config.explain.explain` returns its message.

    Example:
        >>> config, hydra = compose_run(["model=tiny_llama", "quantizer=rtn"])
    """
    before = GlobalHydra.instance().hydra  # of a caller that uses Hydra too, or None
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(bundled("conf").resolve()), version_base="1.3"):
            whole = compose("config", [*overrides], return_hydra_config=True)
    finally:
        GlobalHydra.instance().hydra = before
    config = whole.copy()
    with open_dict(config):
        del config["hydra"]
    return config, whole.hydra
