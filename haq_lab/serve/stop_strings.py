"""Cut an answer before the text that stops it, also if the answer arrives in pieces."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any


class Cut:
    """Cuts a text before the first of some stop strings.

    Args:
        stops: The stop strings. None is empty.

    Example:
        >>> cut = Cut(["END"])
        >>> cut.feed("one E") + cut.feed("NDless") + cut.finish()
        'one '
    """

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held, self._found = stops, "", False

    def feed(self, piece: str) -> str:
        """Take the next piece of the text, and return what is certainly before a stop string."""
        if self._found:
            return ""
        text = self._held + piece
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self._found, self._held = True, ""
            return text[: min(places)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return the rest of the text, which looked like the beginning of a stop string."""
        rest, self._held = self._held, ""
        return rest


class CutQueue:
    """A queue of a streamed answer without the text that stops it.

    Args:
        queue: The queue of the whole answer. Its items are pieces of text, other objects, and None at the end.
        stops: The stop strings.
    """

    def __init__(self, queue: asyncio.Queue[Any], stops: Sequence[str]):
        self._queue, self._cut, self._ready = queue, Cut(stops), deque[Any]()

    async def get(self) -> Any:
        """Return the next item. Wait until there is one."""
        while not self._ready:
            self._take(await self._queue.get())
        return self._ready.popleft()

    def get_nowait(self) -> Any:
        """Return the next item.

        Raises:
            asyncio.QueueEmpty: There is none yet.
        """
        while not self._ready:
            self._take(self._queue.get_nowait())
        return self._ready.popleft()

    def _take(self, item: Any) -> None:
        is_text = type(item) is str  # transformers marks a model's reasoning by a subclass
        if text := self._cut.feed(item) if is_text else self._cut.finish():
            self._ready.append(text)
        if not is_text:
            self._ready.append(item)


def stop_strings(setting: str | Sequence[str] | None) -> list[str]:
    """Return the stop strings of transformers' generation settings as a list."""
    if setting is None:
        return []
    return [setting] if isinstance(setting, str) else list(setting)


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of the text with which the stop string begins, without a whole one."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
