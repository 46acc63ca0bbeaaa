"""Store and read routing traces: the experts that every token chose at every layer, and their gate weights.

A trace is one safetensors file. Reading maps it into memory. A Mixtral trace of a million tokens takes 192 MB.

    experts  uint8    (tokens, layers, k)   chosen experts, the one with the largest weight first;
                                            uint16 if a layer has more than 256 experts
    weights  float16  (tokens, layers, k)   their gate weights
    decode   bool     (tokens,)             false for tokens of a prompt, which is computed as one batch
    starts   int64    (sequences,)          index of the first token of each sequence

The metadata are `model`, `text` and `experts` (the number of experts in a layer).

    trace = Trace.open(Path("smol_moe.trace"))
    trace.experts[100, 3]        # the experts that token 100 chose at layer 3
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from haq_lab.storage.safetensors_file import write_shard
from haq_lab.storage.safetensors_header import read_header
from haq_lab.utils.errors import UserError, nearest_beside

FILE_TYPES = {"U8": np.uint8, "U16": np.uint16, "F16": np.float16, "BOOL": np.bool_, "I64": np.int64}
TENSORS = {"experts": ("U8", "U16"), "weights": ("F16",), "decode": ("BOOL",), "starts": ("I64",)}  # and their types
MAX_EXPERTS = 2**16  # in a layer
MAX_HEADER = 1 << 20  # bytes; a header has four tensors and three texts
# Python raises these errors for a damaged header: a wrong type, a missing entry, a huge number, deep nesting.
DAMAGE = (OSError, ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError, MemoryError)


def expert_dtype(experts: int) -> type[np.uint8] | type[np.uint16]:
    """Return the NumPy type of expert indices for a number of experts in a layer."""
    return np.uint8 if experts <= 256 else np.uint16


@dataclass(frozen=True)
class Trace:
    """A routing trace. If it was opened from a file, the arrays are read-only views of the file.

    Attributes:
        experts: (tokens, layers, k) uint8, or uint16 for more than 256 experts in a layer. Chosen experts.
        weights: (tokens, layers, k) float16. Gate weights.
        decode: (tokens,) bool. Whether the token is decoded, not part of a prompt.
        starts: (sequences,) int64. Index of the first token of each sequence, ascending from 0.
        expert_count: Number of experts in a layer, E.
        model: Name of the model.
        text: Name of the text.

    Raises:
        ValueError: The arrays do not fit together.
    """

    experts: NDArray[np.uint8] | NDArray[np.uint16]
    weights: NDArray[np.float16]
    decode: NDArray[np.bool_]
    starts: NDArray[np.int64]
    expert_count: int
    model: str = ""
    text: str = ""

    def __post_init__(self) -> None:
        # Compiled code indexes with these values and does not check them.
        if self.experts.ndim != 3 or self.experts.size == 0:
            raise ValueError(f"experts has the shape {self.experts.shape}, not (tokens, layers, k)")
        if self.weights.shape != self.experts.shape or self.decode.shape != self.experts.shape[:1]:
            raise ValueError("experts, weights and decode have shapes that do not match")
        starts = self.starts
        if starts.ndim != 1 or len(starts) == 0 or starts[0] != 0 or (starts[1:] <= starts[:-1]).any():
            raise ValueError("starts does not ascend from 0")
        if starts[-1] >= self.tokens:
            raise ValueError(f"a sequence starts at token {starts[-1]}, but there are {self.tokens} tokens")
        if not self.experts.max() < self.expert_count <= MAX_EXPERTS:
            raise ValueError(
                f"it has expert {self.experts.max()} and {self.expert_count} experts a layer "
                f"(at most {MAX_EXPERTS} are supported)"
            )

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.experts)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.experts.shape[1]

    @property
    def k(self) -> int:
        """Number of experts that each token chooses in a layer."""
        return self.experts.shape[2]

    def ends(self) -> NDArray[np.int64]:
        """Return the end (exclusive) of each sequence, (sequences,)."""
        return np.append(self.starts[1:], self.tokens)

    def must_be_of(self, layers: int, experts: int) -> None:
        """Check that the trace fits a model.

        Args:
            layers: Number of layers of the model.
            experts: Number of experts in a layer of the model.

        Raises:
            UserError: The trace has another number of layers or experts.
        """
        if (self.layers, self.expert_count) != (layers, experts):
            raise UserError(
                f"trace: it has {self.layers} layers with {self.expert_count} experts each, but {layers} layers with "
                f"{experts} experts are needed. Record a trace of this model."
            )

    def part(self, sequences: slice) -> Trace:
        """Return the trace of some of the sequences."""
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
        """Return the trace for a model with another number of layers.

        Layers are taken at even distances, so some are repeated or left out.

        Args:
            layers: Number of layers of the result.
            experts: Number of experts in a layer. It must be that of the trace.

        Raises:
            UserError: The number of experts differs, so the routing cannot be used.
        """
        if experts != self.expert_count:
            raise UserError(
                f"trace: it has {self.expert_count} experts a layer, but the model has {experts}. "
                "Record a trace of a model with the same number of experts."
            )
        taken = np.arange(layers) * self.layers // layers
        parts = self.experts[:, taken], self.weights[:, taken]
        return Trace(*parts, self.decode, self.starts, experts, f"{self.model}, stretched", self.text)

    def save(self, path: Path) -> None:
        """Write the trace to a file atomically. The same trace always gives the same bytes.

        Args:
            path: The file to write.
        """
        tensors: dict[str, NDArray[Any]] = {
            "experts": _contiguous(self.experts, expert_dtype(self.expert_count)),
            "weights": _contiguous(self.weights, np.float16),
            "decode": _contiguous(self.decode, np.bool_),
            "starts": _contiguous(self.starts, np.int64),
        }
        metadata = {"model": self.model, "text": self.text, "experts": str(self.expert_count)}
        write_shard(path, {name: torch.from_numpy(array) for name, array in tensors.items()}, metadata)

    @classmethod
    def open(cls, path: Path) -> Trace:
        """Open a trace file, mapped into memory.

        Args:
            path: The file.

        Raises:
            UserError: The file does not exist, is damaged, or is not a trace.
        """
        if not path.is_file():
            raise UserError(f"trace: there is no file '{path}'{nearest_beside(path) or '.'}")
        try:
            return _read(path)
        except DAMAGE as error:
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            raise UserError(
                f"trace: '{path}' is damaged or is not a routing trace ({reason[:200]}). "
                "Record it again with python -m haq_lab.offload trace."
            ) from error


def _contiguous(values: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
    return np.ascontiguousarray(values, dtype)


def _read(path: Path) -> Trace:
    """Map a trace file. Raise one of `DAMAGE` if it is not valid."""
    with path.open("rb") as stream:
        if int.from_bytes(stream.read(8), "little") > MAX_HEADER:
            raise ValueError(f"its header has more than {MAX_HEADER:,} bytes")
    header, begin = read_header(path)
    metadata = header.get("__metadata__", {})
    if missing := {*TENSORS} - {*header}:
        raise ValueError(f"it lacks the tensor {min(missing)}")
    if "experts" not in metadata:
        raise ValueError("its metadata lack the number of experts")
    arrays: dict[str, Any] = {name: _map_tensor(path, begin, name, header[name]) for name in TENSORS}
    if arrays["decode"].view(np.uint8).max() > 1:
        raise ValueError("decode has values other than false and true")
    model, text = str(metadata.get("model", "")), str(metadata.get("text", ""))
    return Trace(**arrays, expert_count=int(metadata["experts"]), model=model, text=text)


def _map_tensor(path: Path, begin: int, name: str, entry: dict[str, Any]) -> NDArray[Any]:
    """Map one tensor of a file whose data begin at byte `begin`."""
    if entry["dtype"] not in TENSORS[name]:
        raise ValueError(f"{name} is {entry['dtype']}, not {' or '.join(TENSORS[name])}")
    if not all(type(size) is int and size > 0 for size in entry["shape"]):
        raise ValueError(f"{name} has the shape {entry['shape']}")
    first, last = entry["data_offsets"]
    if not 0 <= first < last:
        raise ValueError(f"{name} has the offsets {entry['data_offsets']}")
    return np.memmap(path, FILE_TYPES[entry["dtype"]], "r", begin + first, tuple(entry["shape"]))
