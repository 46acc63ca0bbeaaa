"""Serve a quantised checkpoint: `python -m haq_lab.serve DIR [offload=haq offload.budget=40%]`.

The server has the API of OpenAI, so its clients work without a change. `docs/guides/serve.md` has examples.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from haq_lab.config.explain import report_user_errors
from haq_lab.hardware.threads import limit_thread_spinning
from haq_lab.utils.console import say
from haq_lab.utils.extras import need

EXTRA = ("fastapi", "uvicorn", "openai", "prometheus_client")  # modules of the extra `serve`


def main(arguments: list[str] | None = None) -> None:
    """Parse the arguments, load the checkpoint and serve it until SIGTERM or Ctrl-C.

    Args:
        arguments: Command line arguments. If None, those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m haq_lab.serve", description="Serve a quantised checkpoint with the API of OpenAI."
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the checkpoint")
    parser.add_argument(
        "offload",
        nargs="*",
        metavar="SETTING=VALUE",
        help="settings of offloading: offload=haq, offload.budget=40%%",
    )
    parser.add_argument(
        "--backend", default="auto", metavar="NAME", help="auto (default), cpu, cuda, reference or fake"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on, 0 for any free one (default: 8000)")
    parser.add_argument("--name", help="name of the model in the API (default: the folder's name)")
    given = parser.parse_intermixed_args(arguments)
    limit_thread_spinning()
    with report_user_errors("haq_lab.serve"):
        _serve(given)


def _serve(given: argparse.Namespace) -> None:
    """Load the checkpoint and serve it until SIGTERM or Ctrl-C."""
    need("the server", "serve", *EXTRA)
    from haq_lab.api import load
    from haq_lab.config.offloading import parse_offload
    from haq_lab.serve.app import build_app
    from haq_lab.serve.server import address_of, open_socket, run
    from haq_lab.utils.hugging_face import quiet_transformers

    option, settings = parse_offload(given.offload)
    name = given.name or given.folder.expanduser().resolve().name
    with quiet_transformers(), open_socket(given.host, given.port) as listener:
        model, tokenizer = load(given.folder, given.backend, option, **settings)
        app, queue = build_app(name, model, tokenizer)
        address = address_of(listener)
        say(f"serving {name} at {address}/v1, metrics at {address}/metrics. Stop it with Ctrl-C.")
        if hasattr(model, "offload"):
            say(f"experts at {address}/experts")
        run(app, queue, listener)


if __name__ == "__main__":
    main()
