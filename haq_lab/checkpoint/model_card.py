"""Write the model card of a checkpoint, `README.md`, in the form that the Hugging Face hub reads.

The manifest does not list the card, because no loader reads it. So its text can be changed, also on the hub.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from haq_lab.checkpoint.layer_tensors import read_formats, read_forms
from haq_lab.checkpoint.manifest import Manifest
from haq_lab.int8.linear import InputForm
from haq_lab.int8.rotation import NO_ROTATION
from haq_lab.int8.weight_format import INT8, WeightFormat
from haq_lab.storage.safetensors_file import read_shard_header
from haq_lab.utils.atomic_files import write_text
from haq_lab.utils.console import format_change

CARD = "README.md"
PAPERS = {"AWQ": "2306.00978", "SmoothQuant": "2211.10438", "GPTQ": "2210.17323", "HAQ": "2508.07329"}
ACTIVATIONS = {
    "token": "one scale per token, computed at run time",
    "tensor": "one scale per tensor, computed at run time",
    "static": "one scale per tensor, from calibration",
}
LOADING = """\
## Use

```python
import haq_lab.hf  # registers the format
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
```

`python -m haq_lab.checkpoint export` writes it for vLLM (`--for vllm`) or llama.cpp (`--for gguf`).
"""


def write_model_card(folder: Path, metrics: dict[str, float | None], protocol: dict[str, Any]) -> None:
    """Write `README.md` in a finished checkpoint.

    Args:
        folder: The checkpoint folder. Its `config.json` has the provenance.
        metrics: Metrics of the run that wrote it. The card shows the perplexities.
        protocol: Description of each evaluation text by its name.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    made = config["quantization_config"]["provenance"]
    settings = made["settings"]["quantizer"]
    method = settings["_target_"].rpartition(".")[2]
    forms, formats = _count(folder)
    bits = "-".join(sorted({str(format.bits) for format in formats}, reverse=True)) or "8"
    name, revision = made["model"]["label"], made["model"]["revision"]
    data = ModelCardData(
        base_model=made["settings"]["model"]["name"] if revision else None,  # only snapshots of the hub have a revision
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["haq_lab", "quantized", "int8", f"w{bits}a8", method.lower()],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}, quantised with {method}",
        "\n".join(_facts(made, method, formats, forms, config["quantization_config"].get("prefix"))),
        *_perplexities(metrics, protocol),
        LOADING,
    ]
    write_text(folder / CARD, "\n\n".join(parts))


def _count(folder: Path) -> tuple[Counter[InputForm], Counter[WeightFormat]]:
    """Return the number of linears that take their input in each form, and that have each weight format."""
    forms: Counter[InputForm] = Counter()
    formats: Counter[WeightFormat] = Counter()
    for file in Manifest.read(folder).shards:
        header, _ = read_shard_header(folder / file)
        metadata = header.get("__metadata__", {})
        own, narrow = read_forms(metadata, folder / file), read_formats(metadata, folder / file)
        forms.update(own.values())
        formats.update(narrow.get(linear, INT8) for linear in own)
    return forms, formats


def _facts(
    made: dict[str, Any],
    method: str,
    formats: Counter[WeightFormat],
    forms: Counter[InputForm],
    prefix: dict[str, Any] | None,
) -> Iterator[str]:
    """Yield the rows of a table that says how the checkpoint was made."""
    yield "| | |\n|---|---|"
    revision = made["model"]["revision"]
    yield f"| base model | {made['model']['label']}{f', revision {revision}' if revision else ''} |"
    paper = f" ([arXiv {PAPERS[method]}](https://arxiv.org/abs/{PAPERS[method]}))" if method in PAPERS else ""
    yield f"| method | {method}{paper} |"
    for format, count in formats.most_common():
        shared = "one scale per output channel" if format.group is None else f"one scale per {format.group} inputs"
        which = "" if len(formats) == 1 else f" of {count} linears"
        yield f"| weights{which} | int{format.bits}, {shared} |"
    for form, count in forms.most_common():
        rotated = "" if form.rotation == NO_ROTATION else f", after a Hadamard rotation in blocks of {form.rotation}"
        yield f"| activations of {count} linears | int8, {ACTIVATIONS[form.scheme]}{rotated} |"
    if prefix is not None:
        yield f"| prefix | `{json.dumps(prefix['text'])}` before every sequence, in full precision |"
    if (text := made["calibration"]) is not None:
        windows = f"{text['samples']} windows of {text['seqlen']:,} tokens"
        yield f"| calibration | {text['text']}: {windows}, seed {text['seed']} |"
    versions = [f"{library} {version}" for library, version in made["versions"].items()]
    yield f"| made with | haq_lab, {', '.join(versions)} |"


def _perplexities(metrics: dict[str, float | None], protocol: dict[str, Any]) -> Iterator[str]:
    """Yield a section with the measured perplexities, if there are any."""
    rows = []
    for text in protocol:
        full, quantised = metrics.get(f"perplexity_fp.{text}"), metrics.get(f"perplexity.{text}")
        if full is not None and quantised is not None:
            windows = f"{protocol[text]['windows']} windows of {protocol[text]['seqlen']:,} tokens"
            change = format_change(quantised, full, metrics.get(f"dlnppl.{text}.stderr"))
            rows.append(f"| {text} | {windows} | {full:.3f} | {quantised:.3f} | {change} |")
    if rows:
        header = "| text | evaluated on | full precision | quantised | change |\n|---|---|---|---|---|"
        yield "\n".join(["## Perplexity\n", header, *rows])
