"""Create the settings of offloading from an option of the group `offload`, without a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from haq_lab.calibration.dataset import Calibration
from haq_lab.config.build import build, refuse_ignored_settings
from haq_lab.config.compose import compose_run
from haq_lab.config.explain import explain
from haq_lab.config.help import options, settings_of
from haq_lab.config.override_syntax import override_value
from haq_lab.offload.settings import Offload
from haq_lab.utils.errors import UserError, unknown_setting


def make_offload(option: str, settings: Mapping[str, Any]) -> tuple[Offload | None, Calibration]:
    """Return the settings of offloading, and the default calibration text for its routing profile.

    Args:
        option: The option, such as `haq`.
        settings: Settings of the option by name, such as `{"budget": "40%"}`.

    Returns:
        The settings, or None for the option `none`, and the calibration.

    Raises:
        UserError: There is no such option, or a setting is not valid. The message is that of a run.

    Example:
        >>> offload, _ = make_offload("haq", {"budget": "40%"})
        >>> offload.budget
        '40%'
    """
    overrides = [f"offload={option}", *(f"offload.{name}={override_value(value)}" for name, value in settings.items())]
    try:
        config, _ = compose_run([*overrides, "backend=reference", "tracking=none"])
        refuse_ignored_settings(config, overrides, sweep=False)
        experiment = build(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error
    return experiment.offload, experiment.calibration


def parse_offload(overrides: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    """Split overrides of the group `offload` into the option and its settings, as `haq_lab.load` takes them.

    Args:
        overrides: Overrides such as `offload=haq` and `offload.budget=40%`.

    Returns:
        The option, or None if there is none, and the settings by name.

    Raises:
        HydraException: An override cannot be parsed.
        UserError: There is no such setting, or an override has several values.

    Example:
        >>> parse_offload(["offload=haq", "offload.budget=40%"])
        ('haq', {'budget': '40%'})
    """
    option: str | None = None
    settings: dict[str, Any] = {}
    known = {name for choice in options("offload") for name in settings_of("offload", choice)}
    for override in OverridesParser.create().parse_overrides([*overrides]):
        key = override.key_or_group
        if override.is_sweep_override():
            raise UserError(f"{key}: '{override.input_line}' gives several values. Choose one.")
        name = key.removeprefix("offload").removeprefix(".")
        if not name:
            option = str(override.value())
        elif name in known:
            settings[name] = override.value()
        else:
            raise unknown_setting(key, known)
    return option, settings
