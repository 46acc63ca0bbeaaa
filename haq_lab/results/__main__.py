"""Print all runs below some folders as one table: `python -m haq_lab.results`. `haq_lab.cli.results` is the command."""

import runpy

# Run by name: a package does not import the command line, which lies above it.
runpy.run_module("haq_lab.cli.results", run_name="__main__")
