"""What the report is tested on: `studied` (tests/conftest.py), and the page of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from haq_lab.cli import report as command
from haq_lab.tracking.run_folder import RunFolder

LOSSES = {  # nats a token: per token, static
    "rtn": (0.031, 0.6),
    "smoothquant": (0.0098, 0.75),
    "gptq": (0.025, 0.5),
    "haq": (0.002, 0.0072),
}


@pytest.fixture(scope="session")
def report(studied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page about all of it, with LaTeX tables beside."""
    folder = tmp_path_factory.mktemp("report")
    command.main([str(studied), "-o", str(folder / "report.html"), "--latex", str(folder / "tables.tex")])
    return folder / "report.html"


@pytest.fixture
def write_sweep(tmp_path: Path) -> Callable[..., Path]:
    """`write_sweep("name", ["c4"])` -> folder of a sweep of four methods and two schemes.

    Each scheme has its own run of full precision. Static scales cost RTN, SmoothQuant and GPTQ 65 to 112 %.
    """

    def write(model: str = "smol", texts: tuple[str, ...] = ("wikitext2", "c4"), windows: int = 12) -> Path:
        for place, scheme in enumerate(("token", "static")):
            for method, losses in ({"haq": LOSSES["haq"], "none": (0.0, 0.0)} | LOSSES).items():
                _write_run(tmp_path / "sweep", model, method, scheme, losses[place], texts, windows)
        return tmp_path / "sweep"

    return write


def _write_run(
    sweep: Path, model: str, method: str, scheme: str, loss: float, texts: tuple[str, ...], windows: int
) -> None:
    overrides = [f"quantizer={method}", f"quantizer.activations={scheme}"]
    folder = RunFolder(sweep / ",".join(overrides), {"quantizer": {"activations": scheme}})
    folder.begin("a: 1\n")
    metrics, tables = {"memory.weights_bytes": 1e8, "latency.decode_ms_per_token.mean": 9.0}, []
    for text in texts:
        metrics |= {f"perplexity_fp.{text}": 22.5}
        if method == "none":
            metrics |= {f"perplexity.{text}": 22.5}
            continue
        noise = np.resize([1.0, -1.0, 0.5, -0.5], windows) * loss / 10
        error = float((loss + noise).std(ddof=1) / math.sqrt(windows))
        metrics |= {f"perplexity.{text}": 22.5 * math.exp(loss), f"dlnppl.{text}": loss, f"dlnppl.{text}.stderr": error}
        metrics |= {f"dlnppl.{text}.low": loss - 2.2 * error, f"dlnppl.{text}.high": loss + 2.2 * error}
        metrics |= {f"kl.{text}": loss, f"kl.{text}.stderr": error, f"token_agreement.{text}": 1 - loss / 10}
        columns = {"data": text, "window": range(windows), "document": range(windows), "nll_fp": math.log(22.5)}
        columns |= {
            "nll": math.log(22.5) + loss + noise,
            "kl": loss + noise,
            "token_agreement": 1 - (loss + noise) / 10,
        }
        tables.append(pd.DataFrame(columns))
    if tables:
        pd.concat(tables).to_csv(folder.path / "windows.csv", index=False)
    facts = {"model": model, "quantizer": method, "overrides": overrides, "sweep": "s", "offload": None}
    folder.finish(facts, {text: {"seqlen": 64, "windows": windows} for text in texts}, metrics)
