"""Write one page about any number of runs: `python -m haq_lab.report`.

The command itself is in `haq_lab.cli.report`.
"""

import runpy

# The command is run by name, because this package must not import the command line.
runpy.run_module("haq_lab.cli.report", run_name="__main__")
