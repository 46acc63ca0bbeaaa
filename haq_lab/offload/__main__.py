"""Record and replay routing traces, plan a capacity, profile this machine: `python -m haq_lab.offload`.

`haq_lab.cli.offload` is the command.
"""

import runpy

# Run by name: a package does not import the command line, which lies above it.
runpy.run_module("haq_lab.cli.offload", run_name="__main__")
