"""Steps of several models alternate, and each waits for the device that computes it."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from haq_lab.measure.timing import Generation, generate_in_turn


class Counting(nn.Module):
    """A model that notes its name and the tokens it gets, and answers with its own number."""

    def __init__(self, name: str, number: int, log: list[tuple[str, list[int]]]):
        super().__init__()
        self.name, self.number, self.log = name, number, log

    def forward(self, tokens: Tensor, cache, **options):
        self.log.append((self.name, tokens[0].tolist()))
        assert (cache is None) == (tokens.shape[1] > 1)
        return SimpleNamespace(logits=nn.functional.one_hot(torch.tensor([[self.number]]), 9), cache=self.name)


def test_the_steps_alternate_and_each_model_continues_its_own_text():
    log: list[tuple[str, list[int]]] = []
    models = [Counting("a", 3, log), Counting("b", 5, log)]
    samples = generate_in_turn(models, torch.tensor([[7, 8]]), 2)
    assert log == [("a", [7, 8]), ("b", [7, 8]), ("b", [5]), ("a", [3]), ("a", [3]), ("b", [5])]
    assert [len(one) for one in samples] == [3, 3]
    assert all(sample.wall > 0 and sample.cpu >= 0 for one in samples for sample in one)
    log.clear()
    generate_in_turn(models, torch.tensor([[7, 8]]), 0, first=1)
    assert [name for name, _ in log] == ["b", "a"]


def test_each_step_waits_for_the_models_gpu(monkeypatch):
    """With `backend.device=cuda:1 backend.share=true`, torch's current device is still GPU 0."""
    second, waited = torch.device("cuda", 1), []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    output = MagicMock()
    output.logits.__getitem__.return_value.argmax.return_value = SimpleNamespace(is_cuda=True, device=second)
    generation = Generation(lambda *tokens, **options: output, torch.zeros(1, 3))
    for _ in range(3):
        generation.step()
    assert waited == [second] * 3
