"""Stop the work on a request when its client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class CancelOnDisconnect:
    """ASGI middleware that cancels a request if its client disconnects.

    Without it, only streams stop. A plain request would be computed to its end, and all others would wait for it.

    Args:
        app: The application.
    """

    def __init__(self, app: App):
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        messages: asyncio.Queue[Message] = asyncio.Queue()
        answer = asyncio.ensure_future(self._app(scope, messages.get, send))
        client = asyncio.ensure_future(_forward(receive, messages))
        try:
            await asyncio.wait({answer, client}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            client.cancel()
            if not answer.done():
                answer.cancel()
        with suppress(asyncio.CancelledError):
            await answer


async def _forward(receive: Receive, messages: asyncio.Queue[Message]) -> None:
    """Put the messages of the client into a queue, until it disconnects."""
    while True:
        message = await receive()
        messages.put_nowait(message)
        if message["type"] == "http.disconnect":
            return
