"""A missing extra is one line that names the feature and the install command."""

from __future__ import annotations

import pytest

from haq_lab.utils import extras
from haq_lab.utils.errors import UserError


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    with pytest.raises(UserError) as error:
        extras.need("tracking=online", "wandb", "json", "no_such_package")
    assert str(error.value) == (
        "tracking=online needs the package 'no_such_package', which is not installed. Run: pip install 'haq-lab[wandb]'"
    )


def test_installed_packages_pass():
    extras.need("a feature", "an extra", "json", "csv")
    assert extras.installed("json")
    assert not extras.installed("json", "no_such_package")
