"""Generate text with a quantised model: `python -m haq_lab.generate`. `haq_lab.cli.generate` is the command."""

import runpy

# Run by name: a package does not import the command line, which lies above it.
runpy.run_module("haq_lab.cli.generate", run_name="__main__")
