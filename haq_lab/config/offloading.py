"""Create the settings of offloading from an option of the group `offload`, without a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from haq_lab.calibration.dataset import Calibration
from haq_lab.config.build import build, refuse_ignored_settings
from haq_lab.config.compose import compose_run
from haq_lab.config.explain import explain
from haq_lab.config.override_syntax import override_value
from haq_lab.offload.settings import Offload
from haq_lab.utils.errors import UserError


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
