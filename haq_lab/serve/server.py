"""Run the web application until SIGTERM or Ctrl-C."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys

import uvicorn
from fastapi import FastAPI

from haq_lab.serve.generation import RequestQueue
from haq_lab.utils.errors import UserError

GRACE_SECONDS = 5  # how long a stopping server lets answers finish


def open_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Clients that connect before the server runs wait for it.

    Args:
        host: Address to listen on, such as `127.0.0.1`.
        port: Port, or 0 for any free one.

    Raises:
        UserError: The address is not one of this machine's, or the port is in use.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:  # Overflow: the port is larger than 65535
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--port: {host}:{port} cannot be used ({reason}). Choose another --port or --host.") from error
    listener.listen()
    return listener


def address_of(listener: socket.socket) -> str:
    """Return the address of a socket of `open_socket`, such as `http://127.0.0.1:8000`."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """Lets answers finish for a while after a signal, and then ends them."""

    def __init__(self, app: FastAPI, queue: RequestQueue):
        # uvicorn's own limit is for a client that does not read its answer.
        super().__init__(uvicorn.Config(app, log_level=logging.WARNING, timeout_graceful_shutdown=2 * GRACE_SECONDS))
        self._queue = queue

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(GRACE_SECONDS, self._queue.cancel_all)
        await super().shutdown(sockets)


def run(app: FastAPI, queue: RequestQueue, listener: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C. Then finish or end the answers, and return.

    Args:
        app: The application.
        queue: The queue of its requests.
        listener: Socket of `open_socket`.
    """
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        _Server(app, queue).run(sockets=[listener])
    except (KeyboardInterrupt, SystemExit):  # uvicorn sends itself the signal again when it has stopped
        pass
    finally:
        signal.signal(signal.SIGTERM, previous)
