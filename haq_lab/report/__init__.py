"""Write one self-contained page about any number of runs: `python -m haq_lab.report DIR -o report.html`."""
