"""Upload the W&B files of runs that were tracked offline: `python -m haq_lab.tracking`.

The command itself is in `haq_lab.cli.wandb_sync`.
"""

import runpy

# The command is run by name, because this package must not import the command line.
runpy.run_module("haq_lab.cli.wandb_sync", run_name="__main__")
