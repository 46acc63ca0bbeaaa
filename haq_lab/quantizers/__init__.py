"""Quantizers: RTN, SmoothQuant, GPTQ and HAQ, over shared parts (README.md says which is where)."""
