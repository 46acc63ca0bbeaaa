"""Calibration: what the quantizers need to know about each linear's input, gathered a layer at a time."""
