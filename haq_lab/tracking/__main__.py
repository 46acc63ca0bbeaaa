"""Upload the W&B files of runs that were tracked offline: `python -m haq_lab.tracking`.

`haq_lab.cli.wandb_sync` is the command.
"""

import runpy

# Run by name: a package does not import the command line, which lies above it.
runpy.run_module("haq_lab.cli.wandb_sync", run_name="__main__")
