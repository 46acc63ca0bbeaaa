"""Measure the latency of the deployed model: the prefill of a prompt, then each token that is decoded after it.

Each sample has its wall time and its processor time, and the run records how busy the machine was. With `against`, the
tokens of the full-precision model alternate with the model's own. With one thread, the ratio of decoding then holds on
a busy machine too. The table `latency.csv` contains every sample.
"""

from __future__ import annotations

import math
import time
from typing import Annotated, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass

from haq_lab.data.windows import Windows
from haq_lab.hardware.activity import activity, observe, wait_until_quiet
from haq_lab.hardware.gpu import query_gpu
from haq_lab.measure.base import Study
from haq_lab.measure.estimate import estimate
from haq_lab.measure.prompts import RANDOM, PromptTexts, random_prompts, refuse_too_long
from haq_lab.measure.timing import Sample, generate_in_turn
from haq_lab.models.layerwise import LayeredModel

Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0)]
COLUMNS = ("ms", "cpu_ms"), ("reference_ms", "reference_cpu_ms")  # of latency.csv: wall and processor time
RATIO = "latency.speed_vs_fp"


@dataclass(frozen=True)
class Latency:
    """Times the prefill of prompts and each token that is decoded with a KV cache.

    The first `iterations` prompts are counted by the offloading engine. If they take less than `seconds`, they are
    repeated, and only the timing goes on. So the counts do not depend on the speed.

    Args:
        prompt: Where the prompts come from: `text` is the first text of `data`, or the calibration text if there is
            none. `random` draws token ids, on which hit rates and simulated times say nothing about text.
        prompt_tokens: Tokens in a prompt.
        decode_tokens: Tokens to decode after each prompt.
        iterations: Number of prompts, and minimum number of repetitions.
        seconds: Minimum total time.
        warmup: Prompts before the first one that is timed and counted. They are other prompts than the counted ones,
            if the text is long enough.
        seed: Seed of random prompts.
        wait: Seconds to wait for a quiet moment before the first prompt. The measurement then starts anyway.
        against: `none` also runs the model without quantization (`quantizer=none`), in full precision and without
            offloading. Its tokens alternate with the model's own. None runs the model alone.

    Example:
        >>> Latency(prompt_tokens=64, decode_tokens=16)(study)  # doctest: +SKIP
        {'latency.prefill_ms': 31.2, 'latency.decode_ms_per_token.mean': 5.1, ...}
    """

    prompt: Literal["text", "random"] = "text"
    prompt_tokens: Positive = 256
    decode_tokens: Positive = 32
    iterations: Positive = 3
    seconds: Seconds = 3.0
    warmup: Annotated[int, Field(ge=0)] = 1
    seed: int = 0
    wait: Seconds = 0.0
    against: Literal["none"] | None = None

    evaluates: ClassVar[bool] = False
    deploys: ClassVar[bool] = True

    def load_prompts(self, model: LayeredModel, texts: PromptTexts) -> Windows:
        """Load the prompts: first the counted ones, then those of the warm-up.

        Args:
            model: The model that will run them.
            texts: The texts of the run.

        Returns:
            Prompts (n, prompt_tokens) and their protocol stamp. n is less than `iterations + warmup` if the text is
            short. The prompts are then repeated.

        Raises:
            UserError: The model has too few positions, or the text is too short or cannot be read.
        """
        refuse_too_long("measure.latency.prompt_tokens", self.prompt_tokens, self.decode_tokens, model)
        count = self.iterations + self.warmup
        if self.prompt == RANDOM:
            prompts = random_prompts(model.config.vocab_size, self.prompt_tokens, count, self.seed)
        else:
            setting = "measure.latency.prompt_tokens"
            prompts = texts.load(model.tokenizer(), self.prompt_tokens, count, setting)
        stamp = {"prompts": min(self.iterations, len(prompts.tokens)), "decode_tokens": self.decode_tokens}
        return Windows(prompts.tokens, prompts.protocol | stamp)

    @torch.no_grad()
    def __call__(self, study: Study) -> dict[str, float]:
        """Time the deployed model. `study.prompts` must have the prompts of this measure.

        Returns:
            Milliseconds of the prefill and of a decoded token, and decoded tokens per second. Also what tells whether
            other work disturbed them (`haq_lab.measure.disturbance`), and with `against` the speed over the
            full-precision model's with its standard error.
        """
        device = next(study.whole.parameters()).device
        prompts = study.prompts[self].tokens.to(device)
        models = [study.whole]
        if self.against is not None:
            assert study.reference is not None, "the run loads no full-precision model"
            study.progress("latency: load the full-precision model")
            models.append(study.reference())

        def generate(number: int) -> list[list[Sample]]:
            return generate_in_turn(models, prompts[number % len(prompts)][None], self.decode_tokens, first=number)

        waited = wait_until_quiet(
            self.wait, lambda share: study.progress(f"latency: wait, because others use {share:.0%} of the processors")
        )
        study.progress("latency")
        for number in range(self.warmup):
            generate(self.iterations + number)
        before, started = observe(), time.perf_counter()
        with study.counting():
            runs = [generate(number) for number in range(self.iterations)]
        while time.perf_counter() - started < self.seconds:
            runs.append(generate(len(runs) % self.iterations))
        machine = activity(before, observe()) | ({"waited_s": waited} if self.wait else {}) | _gpu_clock(device)
        samples = np.array(runs)  # (repetitions, models, 1 + decode_tokens, 2) seconds
        study.tables["latency"] = _table(samples)
        metrics = _summary(samples[:, 0])
        if not study.offloaded:  # there, samples differ by the experts that have to be moved, and waiting is part of it
            metrics["latency.spread"] = (
                metrics["latency.decode_ms_per_token.p95"] / metrics["latency.decode_ms_per_token.p50"] - 1
            )
        own_time = device.type == "cpu" and not study.offloaded
        if device.type == "cpu":
            metrics["latency.threads"] = torch.get_num_threads()
        if own_time:
            wall, cpu = samples[:, 0].sum((0, 1))
            metrics["latency.wall_over_cpu"] = wall / max(cpu, 1e-9)
        if len(models) > 1:
            metrics |= _speed_over_reference(samples[..., 1 if own_time else 0])
        metrics |= {f"latency.machine.{name}": value for name, value in machine.items()}
        return {name: float(value) for name, value in metrics.items()}


def _table(samples: NDArray[np.float64]) -> pd.DataFrame:
    """Return one row for each step of the model, with the times of the full-precision model's step beside it.

    Args:
        samples: (repetitions, models, steps, 2) seconds of wall and processor time.
    """
    table = pd.DataFrame({"phase": ["prefill" if step == 0 else "decode" for step in range(samples.shape[2])]})
    table = pd.concat([table.assign(repetition=number) for number in range(len(samples))], ignore_index=True)
    for model, names in enumerate(COLUMNS[: samples.shape[1]]):
        for kind, name in enumerate(names):
            table[name] = 1e3 * samples[:, model, :, kind].flatten()
    return table


def _summary(samples: NDArray[np.float64]) -> dict[str, float]:
    """Return the metrics of wall time from samples (repetitions, steps, 2) in seconds."""
    prefill, decode = 1e3 * samples[:, 0, 0], 1e3 * samples[:, 1:, 0].flatten()
    return {
        "latency.prefill_ms": prefill.mean(),
        "latency.decode_ms_per_token.mean": decode.mean(),
        "latency.decode_ms_per_token.p50": np.percentile(decode, 50),
        "latency.decode_ms_per_token.p95": np.percentile(decode, 95),
        "latency.decode_ms_per_token.std": decode.std(),
        "latency.tokens_per_s": 1e3 / decode.mean(),
    }


def _speed_over_reference(samples: NDArray[np.float64]) -> dict[str, float]:
    """Return how many times as fast as the reference the model is.

    It is the geometric mean over pairs of neighbouring steps. The steps of a repetition share their disturbances, so
    the error comes from the repetitions.

    Args:
        samples: (repetitions, 2, steps) seconds of the model and of the reference.
    """
    logs = np.log(samples[:, 1] / samples[:, 0])
    metrics = {}
    for phase, values in (("prefill", logs[:, :1]), ("decode", logs[:, 1:])):
        repetition = np.repeat(np.arange(len(values)), values.shape[1])
        mean = estimate(values.flatten(), list(repetition))
        metrics[f"{RATIO}.{phase}"] = math.exp(mean.mean)
        if not math.isnan(mean.stderr):
            metrics[f"{RATIO}.{phase}.stderr"] = math.exp(mean.mean) * mean.stderr
    return metrics


def _gpu_clock(device: torch.device) -> dict[str, float]:
    """Return the clock of the GPU in MHz, right after its work. Empty without a GPU, or if it is not known."""
    if device.type != "cuda":
        return {}
    clock = query_gpu(f"GPU-{torch.cuda.get_device_properties(device).uuid}")["sm_clock_mhz"]
    return {} if clock is None else {"gpu_mhz": float(clock)}
