"""Find the packages of optional extras, and name the command that installs them."""

from __future__ import annotations

import importlib.util

from haq_lab.utils.errors import UserError


def installed(*packages: str) -> bool:
    """Return whether all of some packages can be imported. Nothing is imported.

    Args:
        packages: Top-level names, such as `wandb`.
    """
    return all(importlib.util.find_spec(package) is not None for package in packages)


def need(feature: str, extra: str, *packages: str) -> None:
    """Check that the packages of an extra are installed, before the feature that needs them starts.

    Args:
        feature: What needs the packages, such as the setting `tracking=online`.
        extra: The extra that contains them.
        packages: Their top-level names.

    Raises:
        UserError: A package is missing. The message names the feature and the install command.

    Example:
        >>> need("tracking=online", "wandb", "wandb")
    """
    for package in packages:
        if not installed(package):
            raise UserError(
                f"{feature} needs the package '{package}', which is not installed. Run: pip install 'haq-lab[{extra}]'"
            )
