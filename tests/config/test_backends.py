import pytest
import torch

from haq_lab.config.backends import make_backend
from haq_lab.config.help import options
from haq_lab.utils.errors import UserError


@pytest.mark.parametrize("name", ["cpu", "reference", "fake"])
def test_an_option_gives_its_backend(name):
    assert make_backend(name).name == name


def test_auto_needs_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert make_backend().name == "cpu"


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(UserError, match=r"backend: 'cpuu' .*'cpu'"):
        make_backend("cpuu")


def test_every_option_is_known():
    assert {"cpu", "cuda", "fake", "reference"} == set(options("backend"))
