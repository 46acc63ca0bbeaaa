"""A tiny Mixtral for the tests of offloading."""

from __future__ import annotations

import pytest
import torch

from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import TinyModel


@pytest.fixture(scope="module")
def model() -> LayeredModel:
    """Two layers of eight experts, a module's own."""
    torch.set_num_threads(1)
    return LayeredModel(TinyModel("mixtral", layers=2).folder())
