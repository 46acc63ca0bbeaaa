"""Quantizers: RTN, SmoothQuant, GPTQ and HAQ, over shared parts (grid, smoothing, solver, activations)."""
