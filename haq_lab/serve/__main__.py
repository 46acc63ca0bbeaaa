"""Run `python -m haq_lab.serve`, which serves a quantised checkpoint.

The command is implemented in `haq_lab.cli.serve`.
"""

import runpy

# Run by name, because packages do not import haq_lab.cli.
runpy.run_module("haq_lab.cli.serve", run_name="__main__")
