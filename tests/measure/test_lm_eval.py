"""lm-evaluation-harness on the deployed model: the harness's wrapper scores what the int8 model says."""

from __future__ import annotations

import json
import sys

import pandas as pd
import pytest
import torch
from launching import TINY, launch
from measure.conftest import study_of

from haq_lab.int8.linear import Int8Linear
from haq_lab.measure import lm_eval
from haq_lab.measure.lm_eval import OWN, LmEval
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import TinyModel
from haq_lab.quantizers.rtn import RTN
from haq_lab.utils.errors import UserError

pytest.importorskip("lm_eval", reason="the extra lm_eval is not installed")

TASK = """
task: own_task
dataset_path: json
dataset_kwargs: {data_files: {test: "own data.jsonl"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def own(tmp_path):
    """A folder with a task of the user's own."""
    rows = [{"question": f"{word} is", "choices": ["a word", "b", "none at all"], "answer": 1} for word in "xyz"]
    (tmp_path / "own_task.yaml").write_text(TASK)
    (tmp_path / "own data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.fixture
def study(windows):
    return study_of(LayeredModel(TinyModel("llama").folder()), RTN(weight_bits=4), windows)


def test_the_harness_scores_the_int8_model_itself(study, capfd):
    assert any(isinstance(module, Int8Linear) for module in study.whole.modules())
    metrics = LmEval(limit=6)(study)
    assert capfd.readouterr().err == ""
    tokenizer = study.model.tokenizer()
    rows = [json.loads(line) for line in (OWN / "python_topics.jsonl").read_text().splitlines()][:6]
    right = [_likeliest(study.whole, tokenizer, row) == row["answer"] for row in rows]
    assert metrics["lm_eval.python_topics.acc"] == pytest.approx(sum(right) / 6)
    table = study.tables["lm_eval"]
    assert set(table["metric"]) == {"acc", "acc_norm"}
    assert table["examples"].tolist() == [6, 6]


def _likeliest(whole, tokenizer, row) -> int:
    """The choice of the highest likelihood after the question, summed by hand."""
    scores = []
    context = tokenizer(row["question"])["input_ids"]
    for choice in row["choices"]:
        tokens = torch.tensor(tokenizer(f"{row['question']} {choice}")["input_ids"])
        log = whole(tokens[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
        scores.append(float(log.gather(1, tokens[1:, None])[len(context) - 1 :].sum()))
    return max(range(len(scores)), key=scores.__getitem__)


def test_a_task_of_ones_own_with_local_data(own, tmp_path, capfd):
    folder = [f"measure.lm_eval.folder={own}", "measure.lm_eval.tasks=[own_task]"]
    outcome = launch(*TINY, "measure=[lm_eval]", *folder, f"hydra.run.dir={tmp_path / 'run'}")
    assert outcome.code == 0, outcome.err
    assert (outcome.err, capfd.readouterr().err) == ("", "")  # git has nothing to complain of, where there is none
    metrics = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    assert 0 <= metrics["lm_eval.own_task.acc"] <= 1
    assert pd.read_csv(tmp_path / "run" / "lm_eval.csv")["examples"].tolist() == [3]


def test_unknown_tasks_name_the_nearest(study, monkeypatch):
    class Manager:
        """Knows two tasks; the harness's own takes long to read thousands."""

        def __init__(self, **settings):
            self.all_tasks = ["hellaswag", "arc_easy"]

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Manager)
    with pytest.raises(UserError, match=r"'hellaswagg' is neither .*did you mean 'hellaswag'"):
        LmEval(tasks=["hellaswagg"])(study)


def test_data_that_is_missing_is_told(own, study):
    (own / "own data.jsonl").unlink()
    with pytest.raises(UserError, match="own_task cannot run"):
        LmEval(tasks=["own_task"], folder=str(own))(study)


def test_without_the_extra_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'haq-lab\[lm-eval\]'"):
        LmEval()
    with pytest.raises(UserError, match="there is no folder"):
        LmEval(folder="nowhere")


def test_the_shipped_task_is_whole():
    rows = [json.loads(line) for line in (lm_eval.OWN / "python_topics.jsonl").read_text().splitlines()]
    assert len(rows) == 40
    assert all(len(set(row["choices"])) == 4 and row["answer"] in range(4) for row in rows)
