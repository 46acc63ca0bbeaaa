"""Quantizers: RTN, SmoothQuant, GPTQ and HAQ, and the parts that they share."""
