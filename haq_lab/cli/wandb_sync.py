"""Upload the W&B files that runs wrote offline: `python -m haq_lab.tracking sync DIR...`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from haq_lab.config.explain import report_user_errors
from haq_lab.tracking.run_folder import ARCHIVE
from haq_lab.tracking.wandb import IDENTITY
from haq_lab.utils.console import Progress, say
from haq_lab.utils.errors import UserError, nearest_beside
from haq_lab.utils.extras import need


def main(arguments: list[str] | None = None) -> None:
    """Parse the arguments and upload.

    Args:
        arguments: Command line arguments. If None, those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m haq_lab.tracking", description="Upload offline runs to W&B.")
    actions = parser.add_subparsers(required=True)
    sync = actions.add_parser("sync", help="upload all offline runs that were not uploaded before")
    sync.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folder of a run, or of several runs")
    given = parser.parse_args(arguments)
    with report_user_errors("haq_lab.tracking"):
        upload(given.folders)


def pending_runs(folder: Path) -> list[Path]:
    """Return the folders of the offline W&B runs below a folder that were not uploaded yet.

    W&B writes `<log>.synced` beside a log that it has uploaded. Archived runs are left out, because W&B stores the
    full paths of their files, and the files were moved.

    Raises:
        UserError: The folder does not exist.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder '{folder}'{nearest_beside(folder) or '. Name an existing one.'}")
    runs = sorted(folder.rglob("wandb/offline-run-*"))
    current = [run for run in runs if ARCHIVE not in run.relative_to(folder).parts]
    return [run for run in current if not any(run.glob("*.synced"))]


def upload(folders: list[Path]) -> None:
    """Upload all pending runs below some folders with `wandb sync`, one after the other.

    Raises:
        UserError: Some runs could not be uploaded. The same command tries again.
    """
    need("sync", "wandb", "wandb")
    runs = list(dict.fromkeys(run for folder in folders for run in pending_runs(folder)))
    environment = {name: value for name, value in os.environ.items() if name not in IDENTITY}
    failed: dict[Path, str] = {}
    with Progress() as progress:
        progress.layers(len(runs), "upload")
        for run in runs:
            command = [sys.executable, "-m", "wandb", "sync", str(run)]
            ended = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=environment
            )
            if ended.returncode or not any(run.glob("*.synced")):
                failed[run] = (ended.stderr or ended.stdout).strip().rpartition("\n")[2] or "no reason given"
            progress.layer_done()
    say(f"{len(runs) - len(failed)} of {len(runs)} runs uploaded")
    if failed:
        reasons = "\n".join(f"{run}: {reason}" for run, reason in failed.items())
        raise UserError(
            f"{len(failed)} of {len(runs)} runs could not be uploaded. Check the network and `wandb login`, then run "
            f"the same command again.\n{reasons}"
        )


if __name__ == "__main__":
    main()
