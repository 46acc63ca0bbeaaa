"""Loading needs little more memory than the file size, because no weight is converted or copied."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from haq_lab.calibration.statistics import CalibrationPolicy
from haq_lab.checkpoint.writer import CheckpointWriter
from haq_lab.int8.backend import ReferenceBackend
from haq_lab.measure.memory import RESET
from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import TinyModel
from haq_lab.pipeline.sequential import PassInputs, sequential_pass
from haq_lab.quantizers.rtn import RTN

SHARE = 1.15  # of the file's bytes, that the peak may lie above the process before

LOAD = """
import sys
from pathlib import Path
import psutil
from haq_lab.checkpoint.model import QuantizedModel
from haq_lab.int8.backend import ReferenceBackend
from haq_lab.measure.memory import peak_rss, reset_peaks

def load(folder):
    model = QuantizedModel(Path(folder), ReferenceBackend())
    return model.assemble([model.load_layer(index) for index in range(model.depth)])

load(sys.argv[1])  # whatever is imported late, is now
reset_peaks()
before = psutil.Process().memory_info().rss
whole = load(sys.argv[2])
print(peak_rss() - before)
"""


def _write(folder: Path, hidden: int, layers: int) -> Path:
    model = LayeredModel(TinyModel("mixtral", layers=layers, hidden=hidden).folder())
    writer = CheckpointWriter(folder, model, {}, {}, force=False)
    sequential_pass(
        PassInputs(model, RTN(), ReferenceBackend(), None, CalibrationPolicy(), {}), lambda *_: None, writer
    )
    writer.finish()
    writer.close()
    return folder


@pytest.mark.skipif(not RESET.exists(), reason="the peak cannot be reset on this system")
def test_peak_while_loading(tmp_path):
    small, large = _write(tmp_path / "small", 64, 1), _write(tmp_path / "large", 512, 3)
    outcome = subprocess.run([sys.executable, "-c", LOAD, small, large], capture_output=True, text=True, check=True)
    size = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    assert 0.8 < int(outcome.stdout) / size < SHARE
