"""Write one page about any number of runs: `python -m haq_lab.report`. `haq_lab.cli.report` is the command."""

import runpy

# Run by name: a package does not import the command line, which lies above it.
runpy.run_module("haq_lab.cli.report", run_name="__main__")
