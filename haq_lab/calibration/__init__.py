"""Calibration: gather the input statistics that quantizers need, one decoder layer at a time."""
