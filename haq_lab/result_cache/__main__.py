"""List or trim the results that runs share: `python -m haq_lab.result_cache`. `haq_lab.cli.cache` is the command."""

import runpy

# Run by name: a package does not import the command line, which lies above it.
runpy.run_module("haq_lab.cli.cache", run_name="__main__")
