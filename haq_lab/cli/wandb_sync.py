"""`python -m haq_lab.tracking sync DIR...`: upload to W&B what runs below DIR have written offline."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from haq_lab.config.explain import report_user_errors
from haq_lab.tracking.run_folder import ARCHIVE
from haq_lab.utils.console import Progress, say
from haq_lab.utils.errors import UserError, nearest_beside


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m haq_lab.tracking", description=__doc__)
    actions = parser.add_subparsers(required=True)
    sync = actions.add_parser("sync", help="upload offline runs; those that were uploaded before are left out")
    sync.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a run folder, or one that holds some")
    given = parser.parse_args(arguments)
    with report_user_errors("haq_lab.tracking"):
        upload(given.folders)


def waiting(folder: Path) -> list[Path]:
    """The offline W&B runs below a folder that nobody has uploaded yet (W&B leaves `<log>.synced` beside the log).

    Archived results are left out: they were moved, and W&B knows their files by where they were.

    Raises:
        UserError: There is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder '{folder}'{nearest_beside(folder)}")
    runs = sorted(folder.rglob("wandb/offline-run-*"))
    current = [run for run in runs if ARCHIVE not in run.relative_to(folder).parts]
    return [run for run in current if not any(run.glob("*.synced"))]


def upload(folders: list[Path]) -> None:
    """Upload all that waits below the folders with W&B's own command, one run after the other.

    Raises:
        UserError: Some could not be uploaded, for want of network or of a login; they wait as before.
    """
    runs = list(dict.fromkeys(run for folder in folders for run in waiting(folder)))
    failed: dict[Path, str] = {}
    with Progress() as progress:
        progress.layers(len(runs), "upload")
        for run in runs:
            command = [sys.executable, "-m", "wandb", "sync", str(run)]
            told = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
            if told.returncode or not any(run.glob("*.synced")):
                failed[run] = (told.stderr or told.stdout).strip().rpartition("\n")[2] or "no reason given"
            progress.layer_done()
    say(f"{len(runs) - len(failed)} of {len(runs)} runs uploaded")
    if failed:
        told_of = "\n".join(f"{run}: {reason}" for run, reason in failed.items())
        raise UserError(
            f"{len(failed)} runs wait still (`wandb login`, a network?); the same command tries again\n{told_of}"
        )


if __name__ == "__main__":
    main()
