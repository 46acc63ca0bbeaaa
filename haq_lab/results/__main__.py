"""Print all runs below some folders as one table: `python -m haq_lab.results`.

The command itself is in `haq_lab.cli.results`.
"""

import runpy

# The command is run by name, because this package must not import the command line.
runpy.run_module("haq_lab.cli.results", run_name="__main__")
