"""The command line: Hydra composes the config, `runner.run` does the work, mistakes are told in one message.

Exit codes: 0 done (or already done), 1 a bug, 2 a user's mistake. `HYDRA_FULL_ERROR=1` shows stack traces.
"""

from __future__ import annotations

import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from haq_lab.errors import UserError
from haq_lab.help import explain_hydra, help_text
from haq_lab.paths import bundled

FULL_ERROR = "HYDRA_FULL_ERROR"


@hydra.main(version_base="1.3", config_path=str(bundled("conf").resolve()), config_name="config")
def _job(config: DictConfig) -> None:
    from haq_lab.runner import run  # torch and transformers load here, not for --help

    run(config, HydraConfig.get())


def main() -> None:
    """Parse the command line, run, exit."""
    if any(argument in ("--help", "-h") for argument in sys.argv[1:]):
        Console(highlight=False).print(help_text(), markup=False)
        return
    wanted = os.environ.get(FULL_ERROR)
    os.environ[FULL_ERROR] = "1"  # Hydra then raises what happened instead of printing it and exiting with 1
    try:
        _job()
    except (UserError, HydraException, OmegaConfBaseException, OSError) as error:
        if wanted:
            raise
        Console(stderr=True, highlight=False).print(f"haq_lab: {explain_hydra(error)}", markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("haq_lab: interrupted; the same command starts the unfinished runs again")
        sys.exit(130)
    finally:
        if wanted is None:
            os.environ.pop(FULL_ERROR, None)
