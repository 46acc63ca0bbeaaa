"""Tiny random models, made once a session in a folder of its own; nothing is read from the user's cache."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from launching import TINY, launch
from thinning import thin
from torch import Tensor, nn

from haq_lab.models.layerwise import LayeredModel
from haq_lab.models.sources import TinyModel
from haq_lab.routing.trace import Trace

MakeTrace = Callable[..., Trace]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")

settings.register_profile("all", derandomize=True, deadline=None, max_examples=25, database=None)
settings.register_profile("some", settings.get_profile("all"), max_examples=10)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="whole grids of parameters, and more random examples")


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("all" if config.getoption("--all") else "some")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu"):  # a second worker would wait for the first one's lock on the GPU
            item.add_marker(pytest.mark.xdist_group("gpu"))
    if config.getoption("--all"):
        return
    items[:], left_out = thin(items)
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache folder of all tests."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAQ_LAB_CACHE", str(folder))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield folder


@pytest.fixture(scope="session")
def studied(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results as a user has them: a sweep of a dense model (`dense`), one of offloading (`experts`), the replay of two
    traces (`replay`), and a run that failed."""
    from haq_lab.cli.offload import main as offload

    folder = tmp_path_factory.mktemp("studied")
    quick = ["measure=[perplexity,memory,latency]", "measure.latency.seconds=0", "measure.latency.prompt_tokens=16"]
    quick += ["measure.latency.decode_tokens=4"]
    dense = ["quantizer=none,rtn,smoothquant", f"hydra.sweep.dir={folder / 'dense'}"]
    experts = ["model=tiny_mixtral", "quantizer=gptq", "offload=haq", "offload.budget=75%,80%", "model.layers=1"]
    assert launch("-m", *TINY, *quick, *dense).code == 0
    assert launch("-m", *TINY, *quick, *experts, f"hydra.sweep.dir={folder / 'experts'}").code == 0
    launch(*TINY, "quantizer._target_=launching.Broken", f"hydra.run.dir={folder / 'failed'}")
    traces = [str(folder / "profile.trace"), str(folder / "test.trace")]
    for trace, part in zip(traces, ("calibration", "evaluation"), strict=True):
        offload(
            ["trace", "tiny_mixtral", "python_docs", "--part", part, "--windows=2", "--seqlen=32", f"--out={trace}"]
        )
    offload(["replay", *traces, "--budgets", "0.5", f"--out={folder / 'replay'}"])
    return folder


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


@pytest.fixture(scope="session")
def make_trace() -> MakeTrace:
    """Traces (tokens, layers, k) whose tokens are of a few kinds; a kind prefers its own experts at every layer."""

    def make(tokens=400, layers=4, experts=8, k=2, kinds=5, seed=0, prompt=0, sequences=2) -> Trace:
        rng = np.random.default_rng(seed)
        taste = rng.gumbel(size=(kinds, layers, experts)) * 1.5
        kind, chosen = 0, []
        for _ in range(tokens):
            kind = (kind + 1) % kinds if rng.random() < 0.6 else rng.integers(kinds)
            scores = taste[kind] + rng.gumbel(size=(layers, experts))
            chosen.append(np.argsort(-scores, -1)[:, :k])
        starts = np.arange(sequences, dtype=np.int64) * (tokens // sequences)
        since = np.arange(tokens) - starts[np.searchsorted(starts, np.arange(tokens), "right") - 1]
        weights = np.full((tokens, layers, k), 1 / k, np.float16)
        return Trace(np.array(chosen, np.uint8), weights, since >= prompt, starts, experts, "made", "up")

    return make


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium, driven by playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser here ({', '.join(BROWSERS)}); on Debian: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


# --- disks that are full or cannot be written to, where mounting is allowed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)  # W&B's service, or a map of a file, may linger


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """Makes a folder read-only, for root too, until the test ends."""
    mounted: list[Path] = []

    def freeze(folder: Path) -> None:
        if subprocess.run(["mount", "--bind", "-o", "ro", folder, folder], capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")
        mounted.append(folder)

    yield freeze
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)  # as above
