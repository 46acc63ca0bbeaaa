"""Run `python -m haq_lab.offload`. The command is defined in `haq_lab.cli.offload`."""

import runpy

# Run by name: a package does not import the command line, which lies above it.
runpy.run_module("haq_lab.cli.offload", run_name="__main__")
