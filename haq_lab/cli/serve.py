"""Serve a quantised checkpoint: `python -m haq_lab.serve DIR [offload=haq offload.budget=40%]`.

The server has the API of OpenAI, so its clients work without a change. `docs/serve.md` has examples.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from haq_lab.config.explain import report_user_errors
from haq_lab.utils.console import say
from haq_lab.utils.errors import UserError, unknown_setting
from haq_lab.utils.threads import limit_thread_spinning

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
        "overrides",
        nargs="*",
        metavar="SETTING=VALUE",
        help="backend=cpu, offload=haq, offload.budget=40%% or another setting of offloading",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on, 0 for any free one (default: 8000)")
    parser.add_argument("--name", help="name of the model in the API (default: the folder's name)")
    given = parser.parse_args(arguments)
    limit_thread_spinning()
    with report_user_errors("haq_lab.serve"):
        serve(given.folder, parse_overrides(given.overrides), given.host, given.port, given.name)


def serve(folder: Path, settings: dict[str, Any], host: str, port: int, name: str | None = None) -> None:
    """Load a checkpoint and serve it until SIGTERM or Ctrl-C.

    Args:
        folder: Folder of the checkpoint.
        settings: Arguments of `haq_lab.load`.
        host: Address to listen on.
        port: Port, or 0 for any free one.
        name: Name of the model in the API. If None, the folder's name.

    Raises:
        UserError: The extra `serve` is not installed, the checkpoint cannot be loaded, or the port is in use.
    """
    if missing := [module for module in EXTRA if importlib.util.find_spec(module) is None]:
        raise UserError(f"serve: {missing[0]} is not installed. Run: pip install 'haq-lab[serve]'")
    from haq_lab.api import load
    from haq_lab.serve.app import build_app
    from haq_lab.serve.server import open_socket, run
    from haq_lab.utils.transformers_logging import quiet_transformers

    name = name or folder.expanduser().resolve().name
    with quiet_transformers(), open_socket(host, port) as listener:
        app, queue = build_app(name, *load(folder, **settings))
        host, port = listener.getsockname()[:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        say(f"serving {name} at {address}/v1 (metrics: {address}/metrics). Stop with Ctrl-C.")
        if "offload" in settings:
            say(f"experts: {address}/experts")
        run(app, queue, listener)


def parse_overrides(overrides: list[str]) -> dict[str, Any]:
    """Translate overrides in Hydra's spelling into arguments of `haq_lab.load`.

    Args:
        overrides: Overrides of the groups `backend` and `offload`.

    Raises:
        UserError: An override belongs to another group.
        HydraException: An override cannot be parsed.

    Example:
        >>> parse_overrides(["offload=haq", "offload.budget=40%"])
        {'offload': 'haq', 'budget': '40%'}
    """
    settings = {}
    for override in OverridesParser.create().parse_overrides(overrides):
        group, _, name = override.key_or_group.partition(".")
        if override.key_or_group not in ("backend", "offload") and not (group == "offload" and name):
            raise unknown_setting(override.key_or_group, ["backend", "offload", "offload.budget"])
        settings[name or group] = override.value()
    return settings


if __name__ == "__main__":
    main()
