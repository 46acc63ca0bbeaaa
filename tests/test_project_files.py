"""The files around the code agree with it and with each other: version, workflows, containers."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


def test_there_is_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert newest is not None
    assert PROJECT["version"] == citation["version"] == newest.group(1)


def test_the_paper_is_the_preferred_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["type"] == "software"
    assert citation["preferred-citation"]["url"] == PROJECT["urls"]["Paper"]
    assert len(citation["preferred-citation"]["authors"]) == 7


def test_the_changelog_has_the_sections_of_keep_a_changelog():
    headings = re.findall(r"^### (.*)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert set(headings) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_all_has_every_extra_for_users_but_those_of_one_driver():
    extras = PROJECT["optional-dependencies"]
    (everything,) = extras["all"]
    named = set(re.fullmatch(r"haq-lab\[(.*)\]", everything).group(1).split(","))
    assert named == set(extras) - {"all", "dev", "docs", "cuda12", "cuda13"}


def test_the_messages_name_extras_that_exist():
    texts = [path.read_text() for path in [*(ROOT / "haq_lab").rglob("*.py"), *(ROOT / "conf").rglob("*.yaml")]]
    named = {extra for text in texts for extra in re.findall(r"haq-lab\[([a-z0-9-]+)\]", text)}
    named |= {extra for text in texts for extra in re.findall(r"\bneed\([^,]+, \"([\w-]+)\"", text)}
    assert {"wandb", "report", "serve", "lm-eval"} <= named <= set(PROJECT["optional-dependencies"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_only_calls_make_or_ci_run(path):
    """So that whatever fails there can be run here."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    jobs = yaml.safe_load(path.read_text())["jobs"]
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert runs
    for command in runs:
        assert command == ".ci/run" or re.fullmatch(r"make ([\w-]+)( .*)?", command).group(1) in targets


def test_only_the_job_that_publishes_may_ask_for_a_token():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    assert [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})] == ["publish"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_a_container_runs_the_demo_without_root_and_keeps_its_cache(path):
    steps = [line.partition(" ")[::2] for line in path.read_text().splitlines() if re.match(r"[A-Z]+ ", line)]
    told = {name: value for name, value in steps if name in ("USER", "VOLUME", "CMD")}
    assert told == {"USER": "1000", "VOLUME": "/cache", "CMD": '["haq-lab-demo"]'}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    for value in (value for name, value in steps if name == "COPY"):
        *sources, _ = [word for word in value.split() if not word.startswith("--")]
        for source in sources:
            assert (ROOT / source).exists()
            assert f"!{source}" in ignored


def test_make_and_the_containers_run_the_same_demo():
    assert "\t@PATH=" in (makefile := (ROOT / "Makefile").read_text())
    assert "./demo.sh\n" in makefile
    assert all("COPY --chmod=755 demo.sh " in path.read_text() for path in DOCKERFILES)


def test_the_demo_ends_with_commands_to_try_next(tmp_path):
    """The commands have the path at which they are found."""
    command = tmp_path / ".venv" / "bin" / "haq-lab"
    command.parent.mkdir(parents=True)
    command.write_text('#!/bin/sh\necho "$@" >> commands\n')
    command.chmod(0o755)
    environment = {"PATH": f"{command.parent}:/usr/bin:/bin"}
    shown = subprocess.run(
        [ROOT / "demo.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    ran = (tmp_path / "commands").read_text().splitlines()
    assert [line.split()[0] for line in ran] == ["-m", "results"]
    following = [line.strip() for line in shown.stdout.partition("What to do next:")[2].splitlines() if line]
    assert len(following) == 3
    assert all(line.startswith(".venv/bin/haq-lab ") for line in following)


def test_hadolint_finds_nothing():
    if (hadolint := shutil.which("hadolint", path=str(Path(sys.executable).parent))) is None:
        pytest.skip("hadolint is not installed")
    told = subprocess.run([hadolint, *map(str, DOCKERFILES)], capture_output=True, text=True, check=False)
    assert (told.returncode, told.stdout) == (0, "")
