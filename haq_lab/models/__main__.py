"""Build a model that the project makes itself: `python -m haq_lab.models`. `haq_lab.cli.models` is the command."""

import runpy

# Run by name: a package does not import the command line, which lies above it.
runpy.run_module("haq_lab.cli.models", run_name="__main__")
