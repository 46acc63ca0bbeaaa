"""Routing traces: which experts every token chose at every layer, and with what weight.

One safetensors file, memory-mapped on reading; a Mixtral trace of a million tokens takes 192 MB:

    experts  uint8    (tokens, layers, k)   chosen experts, the heaviest first
    weights  float16  (tokens, layers, k)   their gate weights
    decode   bool     (tokens,)             false: the token belongs to a prompt, which is computed as one batch
    starts   int64    (sequences,)          where each sequence begins

Metadata: `model`, `text`, `experts` (their number a layer).

    trace = Trace.open(Path("smol_moe.trace"))
    trace.experts[100, 3]        # what token 100 chose at layer 3
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from haq_lab.storage.safetensors_header import read_header
from haq_lab.utils.atomic_files import atomic_file
from haq_lab.utils.errors import UserError, nearest_beside

TENSORS = {"experts": ("U8", np.uint8), "weights": ("F16", np.float16), "decode": ("BOOL", np.bool_)}
TENSORS |= {"starts": ("I64", np.int64)}
MOST_EXPERTS = 256  # a layer; their numbers are bytes


@dataclass(frozen=True)
class Trace:
    """A routing trace; the arrays are read-only views of the file where it was opened from one.

    Attributes:
        experts: (tokens, layers, k) uint8.
        weights: (tokens, layers, k) float16.
        decode: (tokens,) bool.
        starts: (sequences,) int64, the first one 0.
        expert_count: Experts a layer, E.
        model: What was traced.
        text: On what.
    """

    experts: NDArray[np.uint8]
    weights: NDArray[np.float16]
    decode: NDArray[np.bool_]
    starts: NDArray[np.int64]
    expert_count: int
    model: str = ""
    text: str = ""

    def __post_init__(self) -> None:
        tokens = len(self.experts)
        fits = self.experts.ndim == 3 and self.weights.shape == self.experts.shape and self.decode.shape == (tokens,)
        if not fits or tokens == 0:
            raise UserError("trace: experts and weights are (tokens, layers, k), decode (tokens,), and not empty")
        starts = self.starts
        if len(starts) == 0 or starts[0] != 0 or (np.diff(starts) <= 0).any() or starts[-1] >= tokens:
            raise UserError("trace: starts must begin with 0, rise, and stay within the tokens")
        if not self.experts.max() < self.expert_count <= MOST_EXPERTS:
            raise UserError(f"trace: expert {self.experts.max()} is chosen, of {self.expert_count}")

    @property
    def tokens(self) -> int:
        return len(self.experts)

    @property
    def layers(self) -> int:
        return self.experts.shape[1]

    @property
    def k(self) -> int:
        return self.experts.shape[2]

    def ends(self) -> NDArray[np.int64]:
        """(sequences,) where each sequence ends, exclusive."""
        return np.append(self.starts[1:], self.tokens)

    def must_be_of(self, layers: int, experts: int) -> None:
        """Raise `UserError` where the trace is of another number of layers, or of experts a layer."""
        if (self.layers, self.expert_count) != (layers, experts):
            raise UserError(
                f"trace: it is of {self.layers} layers and {self.expert_count} experts a layer, "
                f"where {layers} and {experts} are wanted"
            )

    def part(self, sequences: slice) -> Trace:
        """The trace of some of the sequences."""
        starts, ends = self.starts[sequences], self.ends()[sequences]
        span = slice(starts[0], ends[-1])
        return Trace(
            self.experts[span],
            self.weights[span],
            self.decode[span],
            starts - starts[0],
            self.expert_count,
            self.model,
            self.text,
        )

    def stretched(self, layers: int, experts: int) -> Trace:
        """The routing of a model of another depth: layers at even distances, some twice or left out.

        Raises:
            UserError: The number of experts differs; routing does not carry over.
        """
        if experts != self.expert_count:
            raise UserError(f"trace: it is of {self.expert_count} experts a layer, the model has {experts}")
        taken = np.arange(layers) * self.layers // layers
        parts = self.experts[:, taken], self.weights[:, taken]
        return Trace(*parts, self.decode, self.starts, experts, f"{self.model}, stretched", self.text)

    def save(self, path: Path) -> None:
        """Write the trace to `path`, aside first."""
        tensors: dict[str, NDArray[Any]] = {
            name: np.ascontiguousarray(getattr(self, name), dtype) for name, (_, dtype) in TENSORS.items()
        }
        metadata = {"model": self.model, "text": self.text, "experts": str(self.expert_count)}
        with atomic_file(path) as aside:
            save_file(tensors, aside, metadata)

    @classmethod
    def open(cls, path: Path) -> Trace:
        """A trace file, memory-mapped.

        Raises:
            UserError: No such file, or not a trace.
        """
        if not path.is_file():
            raise UserError(f"trace: there is no file '{path}'{nearest_beside(path)}")
        try:
            header, begin = read_header(path)
            metadata = header.get("__metadata__", {})
            arrays: dict[str, Any] = {name: _mapped(path, begin, header[name], name) for name in TENSORS}
            count = int(metadata["experts"])
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"trace: '{path}' is not a routing trace, or is damaged ({error})") from error
        return cls(**arrays, expert_count=count, model=metadata.get("model", ""), text=metadata.get("text", ""))


def _mapped(path: Path, begin: int, entry: dict[str, Any], name: str) -> NDArray[Any]:
    stored, dtype = TENSORS[name]
    if entry["dtype"] != stored:
        raise ValueError(f"{name} is {entry['dtype']}, not {stored}")
    first, last = entry["data_offsets"]
    count = (last - first) // np.dtype(dtype).itemsize
    flat = np.memmap(path, dtype, "r", begin + first, (count,))
    return flat.reshape(entry["shape"])
