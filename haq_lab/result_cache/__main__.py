"""Run `haq_lab.cli.cache`, the command that lists and trims the result cache: `python -m haq_lab.result_cache`."""

import runpy

# Run by name, because this package must not import the command line.
runpy.run_module("haq_lab.cli.cache", run_name="__main__")
