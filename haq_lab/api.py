"""The public Python API: quantise, load, evaluate, run, and read results.

    import haq_lab

    folder = haq_lab.quantize("smol", "haq", out="checkpoints/smol")
    model, tokenizer = haq_lab.load(folder)
    haq_lab.evaluate(folder, data=["python_docs"])

The command line uses the same code. docs/start/python.md has more examples.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from haq_lab.config.help import options
from haq_lab.config.override_syntax import override_value, spelling_of_path
from haq_lab.utils.errors import UserError, nearest

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ModelName = str | Path


class RunResult(NamedTuple):
    """The result of `run`.

    Attributes:
        metrics: The metrics by name, as in `results.json`. A metric that is not finite is None.
        folder: The run folder.
    """

    metrics: dict[str, float | None]
    folder: Path


def run(*overrides: str) -> RunResult:
    """Run one experiment, as `python -m haq_lab OVERRIDES` does.

    Args:
        overrides: Overrides as on the command line, such as `model=smol`.

    Returns:
        The metrics and the run folder. If the folder already has a finished run of this config, these are its metrics.

    Raises:
        UserError: A setting is not valid, or the run does not fit this machine.

    Example:
        >>> metrics, folder = haq_lab.run("model=smol", "quantizer=gptq")
        >>> metrics["perplexity.python_docs"]
    """
    return _run([*overrides], None)


def quantize(
    model: ModelName,
    quantizer: str = "haq",
    *,
    out: str | Path,
    calibration: str | Path = "python_docs",
    **settings: Any,
) -> Path:
    """Quantise a model and write a checkpoint, layer by layer. A killed call resumes.

    Args:
        model: An option of the group `model` (`smol`), a checkpoint folder, or a name on the Hugging Face hub.
        quantizer: An option of the group `quantizer`: `rtn`, `smoothquant`, `gptq` or `haq`.
        out: Folder for the checkpoint.
        calibration: An option of the group `calibration`, or a text file.
        settings: Settings of the quantizer, such as `activations="static"`.

    Returns:
        The folder of the checkpoint.

    Raises:
        UserError: A setting is not valid, or the folder has other content.

    Example:
        >>> folder = haq_lab.quantize("smol", "haq", out="checkpoints/smol", activations="static")
    """
    folder = Path(out).expanduser().resolve()
    overrides = [
        *_model_overrides(model),
        f"quantizer={quantizer}",
        *_calibration_overrides(calibration),
        *(f"quantizer.{name}={override_value(value)}" for name, value in settings.items()),
        f"checkpoint.dir={override_value(folder)}",
        "data=[]",
        "measure=[]",
        "tracking=none",
    ]
    with tempfile.TemporaryDirectory() as run_folder:
        _run(overrides, Path(run_folder))
    return folder


def load(
    folder: str | Path, backend: str = "auto", offload: str | None = None, **settings: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a quantised checkpoint, ready for `generate`.

    With offloading, `model.offload.stats()` counts hits, misses and bytes, and `model.offload.residents()` shows the
    experts in the fast tier. Experts stay there between calls.

    Args:
        folder: A folder that `quantize` or `checkpoint.dir` has written.
        backend: `cpu`, `cuda`, `reference` or `fake`. `auto` is `cuda` on a machine with a GPU and CuPy, else `cpu`.
        offload: An option of the group `offload`, such as `haq`. If None, all experts stay in memory.
        settings: Settings of offloading, such as `budget="40%"`.

    Returns:
        The model and its tokenizer, as `AutoModelForCausalLM` and `AutoTokenizer` return them.

    Raises:
        UserError: The folder is not a checkpoint, a file is damaged, or the model has no experts to offload.

    Example:
        >>> model, tokenizer = haq_lab.load("checkpoints/smol_moe", offload="haq", budget="40%")
        >>> prompt = tokenizer("Once upon a time", return_tensors="pt")
        >>> print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))
        >>> model.offload.stats()
    """
    from haq_lab.config.backends import make_backend
    from haq_lab.pipeline.deployment import load_with_options

    whole, model = load_with_options(Path(folder).expanduser(), make_backend(backend), offload, settings)
    return whole, model.tokenizer()


def evaluate(model: ModelName, data: Sequence[str] = ("python_docs",), *overrides: str) -> pd.DataFrame:
    """Measure the perplexity of a model or a checkpoint.

    Args:
        model: A checkpoint folder of `quantize`, or a full-precision model as `quantize` takes it.
        data: Options of the group `data`.
        overrides: Further overrides as on the command line, such as `data.wikitext2.windows=4`.

    Returns:
        One row a text, with the columns `data` and `perplexity`.

    Raises:
        UserError: The model or a text cannot be read.

    Example:
        >>> haq_lab.evaluate("checkpoints/smol", ["python_docs"])
    """
    import pandas as pd

    with tempfile.TemporaryDirectory() as run_folder:
        arguments = ["quantizer=none", f"data=[{','.join(data)}]", "measure=[perplexity]", "tracking=none"]
        metrics, _ = _run([*_model_overrides(model), *arguments, *overrides], Path(run_folder))
    values = [metrics.get(f"perplexity.{name}", metrics.get(f"perplexity_fp.{name}")) for name in data]
    return pd.DataFrame({"data": list(data), "perplexity": values})


def load_results(*folders: str | Path) -> pd.DataFrame:
    """Return all runs below some folders as a table, one row a run.

    Args:
        folders: Folders with runs, such as `runs`.

    Raises:
        UserError: A folder does not exist.

    Example:
        >>> haq_lab.load_results("runs")[["name", "perplexity.python_docs"]]
    """
    from haq_lab.results.load import load as load_runs

    return load_runs(*folders)


def _run(overrides: list[str], folder: Path | None) -> RunResult:
    """Run a config in `folder`, or in the folder that the command line would use."""
    from haq_lab.config.compose import compose_run
    from haq_lab.config.run_context import RunContext
    from haq_lab.pipeline.run import run as run_config

    config, hydra = compose_run(overrides)
    context = RunContext.of_hydra(hydra, folder or Path(hydra.run.dir))
    return RunResult(run_config(config, context)["metrics"], context.folder)


def _model_overrides(model: ModelName) -> list[str]:
    """Return the overrides for an option of the group `model`, a folder or a name on the hub."""
    if (name := str(model)) in (known := options("model")):
        return [f"model={name}"]
    if (spelling := spelling_of_path("model", name)) is None:
        raise UserError(
            f"model: '{name}' is no option, folder or hub name. Choose one of {', '.join(known)}, a folder, or "
            f"ORGANISATION/NAME{nearest(name, known)}"
        )
    return [spelling.option, f"{spelling.setting}={override_value(Path(name).expanduser())}"]


def _calibration_overrides(calibration: str | Path) -> list[str]:
    """Return the overrides for an option of the group `calibration`, or for a text file."""
    spelling = spelling_of_path("calibration", str(calibration))
    if spelling is None or str(calibration) in options("calibration"):
        return [f"calibration={calibration}"]
    return [spelling.option, f"{spelling.setting}={override_value(calibration)}"]
