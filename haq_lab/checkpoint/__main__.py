"""Inspect, verify or export a quantised checkpoint: `python -m haq_lab.checkpoint`.

`haq_lab.cli.checkpoint` is the command.
"""

import runpy

# Run by name: a package does not import the command line, which lies above it.
runpy.run_module("haq_lab.cli.checkpoint", run_name="__main__")
