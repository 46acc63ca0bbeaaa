"""Save and restore the state of a quantization pass after each layer: hidden states, reports, routing and ranges.

The state after layer i is in `work/state-<i>`. It is written to a temporary folder, which is then renamed. Only then
is the state of layer i - 1 removed. So there is always one complete state, whenever the process is killed.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from haq_lab.calibration import channel_ranges as ranges
from haq_lab.quantizers.apply import LinearReport
from haq_lab.quantizers.pass_result import PassResult, PassState
from haq_lab.storage.safetensors_file import Shard
from haq_lab.utils.atomic_files import atomic_folder, write_json
from haq_lab.utils.errors import UserError

RECORD = "state.json"


def save_state(work: Path, index: int, state: PassState, shards: list[Shard]) -> None:
    """Save the state of the pass after layer `index` and remove older states.

    Args:
        work: Folder `work/` of the checkpoint.
        index: Index of the last finished layer.
        state: State of the pass.
        shards: Shards of the finished layers.
    """
    result = state.result
    record: dict[str, Any] = {
        "shards": [asdict(shard) for shard in shards],
        "reports": [asdict(report) for report in result.reports],
        "at": state.at,
        "experts_per_token": result.routing.chosen[0].shape[1] if result.routing and result.routing.chosen else 0,
    }
    with atomic_folder(work / f"state-{index:05}") as aside:
        for number, tensor in enumerate([*state.hidden.values(), *_routing(result)]):
            # NumPy's tofile does not report a full disk.
            (aside / f"{number}.bin").write_bytes(_bytes(tensor).numpy().data)
        result.ranges.save(aside / ranges.FILE)
        write_json(aside / RECORD, record)
    for older in _states(work)[:-1]:
        shutil.rmtree(older)


def layers_done(work: Path) -> int:
    """Return the number of layers that were finished when the newest state was saved."""
    states = _states(work)
    return int(states[-1].name.rpartition("-")[2]) + 1 if states else 0


def restore_state(work: Path, state: PassState) -> list[Shard]:
    """Restore the newest saved state into a new pass.

    Args:
        work: Folder `work/` of the checkpoint.
        state: State of a pass before its first layer. It is changed in place.

    Returns:
        The shards of the finished layers. Empty if no state was saved.

    Raises:
        UserError: A file of the state is missing or damaged.
    """
    if not layers_done(work):
        return []
    newest = _states(work)[-1]
    try:
        return _restore(work, newest, state)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise UserError(
            f"checkpoint: {newest} is damaged ({type(error).__name__}: {error}). Remove {work} to start again."
        ) from error


def _restore(work: Path, newest: Path, state: PassState) -> list[Shard]:
    done = layers_done(work)
    record = json.loads((newest / RECORD).read_text(encoding="utf-8"))
    result = state.result
    state.at.update(record["at"])
    result.reports += [LinearReport(**report) for report in record["reports"]]
    result.ranges = ranges.Ranges.open(newest / ranges.FILE)
    targets = list(state.hidden.values())
    if (routing := result.routing) is not None:
        tokens, k = routing.windows[0] * routing.windows[1], record["experts_per_token"]
        routed = [layer for layer in routing.layers if layer < done]
        routing.chosen += [torch.empty(tokens, k, dtype=routing.dtype) for _ in routed]
        routing.weights += [torch.empty(tokens, k, dtype=torch.float16) for _ in routed]
        targets += _routing(result)
    for number, tensor in enumerate(targets):
        path = newest / f"{number}.bin"
        if not path.is_file() or path.stat().st_size != tensor.nbytes:
            raise UserError(f"checkpoint: {path} is missing or has the wrong size. Remove {work} to start again.")
        _bytes(tensor).copy_(torch.from_file(str(path), shared=False, size=tensor.nbytes, dtype=torch.uint8))
    return [Shard(**shard) for shard in record["shards"]]


def _states(work: Path) -> list[Path]:
    return sorted(path for path in work.glob("state-*") if re.fullmatch(r"state-\d+", path.name))


def _routing(result: PassResult) -> list[Tensor]:
    return [] if result.routing is None else [*result.routing.chosen, *result.routing.weights]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
