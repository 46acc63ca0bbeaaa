"""A study of a tiny model quantised by RTN, for every measurement."""

from __future__ import annotations

import pytest

from haq_lab.calibration.dataset import Calibration
from haq_lab.data.windows import PythonDocs
from haq_lab.int8.backend import ReferenceBackend
from haq_lab.measure.base import Study
from haq_lab.measure.prompts import PromptTexts
from haq_lab.pipeline.sequential import PassInputs, sequential_pass
from haq_lab.quantizers.rtn import RTN

TEXTS = PromptTexts({"python_docs": PythonDocs()}, Calibration("python_docs"))


def study_of(model, quantizer, windows) -> Study:
    """A study of a model."""
    layers: list = []
    evaluation = {"text": windows}
    passed = sequential_pass(
        PassInputs(model, quantizer, ReferenceBackend(), windows, "fp", evaluation),
        lambda index, layer: layers.append(layer),
    )
    return Study(model, evaluation, passed, model.assemble(layers), lambda stage: None)


@pytest.fixture
def quantized(tiny, windows) -> Study:
    """With RTN at 4 bits, so that there is a difference to measure."""
    return study_of(tiny, RTN(weight_bits=4), windows)


@pytest.fixture
def full(tiny, windows) -> Study:
    """Without a quantizer."""
    return study_of(tiny, None, windows)
