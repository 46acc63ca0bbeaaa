"""Run `python -m haq_lab.models`, which builds a model. The command is implemented in `haq_lab.cli.models`."""

import runpy

# Run by name, because packages do not import haq_lab.cli.
runpy.run_module("haq_lab.cli.models", run_name="__main__")
