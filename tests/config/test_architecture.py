"""An unknown architecture is refused by its config.json alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from haq_lab.config.architecture import refuse_unknown_architecture
from haq_lab.utils.errors import UserError


def _config(name: str, target: str = "haq_lab.models.sources.HubModel"):
    return OmegaConf.create({"model": {"_target_": target, "name": name, "revision": None}})


def test_a_folder_is_refused_by_its_model_type(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen22"}))
    with pytest.raises(UserError, match=r"architecture 'qwen22' is not in the family table .*did you mean 'qwen2'"):
        refuse_unknown_architecture(_config(str(tmp_path)))
    refuse_unknown_architecture(_config(str(tmp_path), target="haq_lab.models.sources.GgufModel"))


@pytest.mark.parametrize("content", ["{", "[1]", "{}", json.dumps({"model_type": "llama"})])
def test_other_folders_are_checked_later(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    refuse_unknown_architecture(_config(str(tmp_path)))


@pytest.mark.parametrize("name", ["", "???", "not a name", "someone/nothing"])
def test_names_that_are_not_on_this_machine_are_checked_later(name):
    refuse_unknown_architecture(_config(name))


def test_the_command_refuses_before_torch_is_imported(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "qwen22"}))
    code = [
        "import sys",
        f"sys.argv = ['haq_lab', 'model=hf', 'model.name={tmp_path / 'model'}', 'hydra.run.dir={tmp_path / 'run'}']",
        "from haq_lab.cli.main import main",
        "try:",
        "    main()",
        "except SystemExit as end:",
        "    assert end.code == 2",
        "assert not {'torch', 'transformers'} & {*sys.modules}",
    ]
    told = subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert "haq_lab: model: architecture 'qwen22' is not in the family table" in told.stderr
