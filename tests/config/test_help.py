"""`--help` lists all groups, options and settings, and is fast."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from launching import launch

from haq_lab.config.help import GROUPS, options
from haq_lab.utils.paths import bundled

TEXT = launch("--help").out


def test_every_group_has_a_line():
    groups = {path.name for path in bundled("conf").iterdir() if path.is_dir()} - {"hydra"}  # not options of a run
    assert groups == set(GROUPS)
    for group in groups:
        assert re.search(rf"^{group}: \S", TEXT, flags=re.MULTILINE)


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_and_setting_has_a_line(group):
    section = TEXT.split(f"\n{group}: ")[1]
    for option in options(group):
        assert re.search(rf"^  {option} +\S", section, flags=re.MULTILINE), option
        if group == "experiment":
            continue
        for line in (bundled("conf") / group / f"{option}.yaml").read_text().splitlines():
            if re.match(r"(?!defaults:)[a-z]", line):
                assert line in section


def test_an_option_that_begins_with_another_says_so():
    section = TEXT.split("\noffload: ")[1].split("\n  lru ")[1]
    assert section.splitlines()[1].strip() == "(settings of haq, except:)"


@pytest.mark.parametrize("group", GROUPS)
def test_what_an_option_begins_with_is_an_option_of_its_group(group):
    section = re.split(r"\n\w+: ", TEXT.split(f"\n{group}: ")[1])[0]
    assert set(re.findall(r"\(settings of (.*), except:\)", section)) <= set(options(group))


def test_help_loads_no_torch():
    program = (
        "import sys; sys.argv[1:] = ['--help']; from haq_lab.cli.main import main; main();"
        "assert not {'torch', 'transformers', 'datasets', 'wandb'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
