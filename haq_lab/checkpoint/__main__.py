"""Run `python -m haq_lab.checkpoint`, which inspects, verifies, accepts or exports a quantised checkpoint.

The command is implemented in `haq_lab.cli.checkpoint`.
"""

import runpy

# Run by name, because packages do not import haq_lab.cli.
runpy.run_module("haq_lab.cli.checkpoint", run_name="__main__")
