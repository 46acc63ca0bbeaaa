"""Quantizers: RTN, SmoothQuant, GPTQ, AWQ and HAQ, and the parts that they share."""
