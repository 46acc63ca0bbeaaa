"""Tiny random models, made once a session in a folder of its own; nothing is read from the user's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from haq_lab.models.layered import LayeredModel
from haq_lab.models.sources import TinyModel

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=25, database=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache folder of all tests."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAQ_LAB_CACHE", str(folder))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield folder


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    """One thread (threads that wait for each other crawl on busy cores), a fixed seed, no gradients."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(params=["opt", "llama", "mixtral", "qwen3_moe", "olmoe"])
def architecture(request: pytest.FixtureRequest) -> str:
    """OPT with biases; Llama with grouped-query heads and tied embeddings."""
    return request.param


@pytest.fixture
def tiny(architecture: str) -> LayeredModel:
    """A tiny model of each architecture, open for reading."""
    return LayeredModel(TinyModel(architecture).folder())  # type: ignore[arg-type]


@pytest.fixture
def windows() -> Tensor:
    """Token windows (5, 48); five do not divide into equal batches."""
    return torch.randint(0, 257, (5, 48), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def logits_of() -> Callable[[LayeredModel, list[nn.Module], Tensor], Tensor]:
    """Logits of a list of layers, run one after the other."""

    def run(model: LayeredModel, layers: list[nn.Module], windows: Tensor) -> Tensor:
        hidden = model.embed(windows)
        for index, layer in enumerate(layers):
            model.run(layer, index, hidden)
        return model.head(hidden)

    return run
