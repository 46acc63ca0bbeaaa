"""Run an experiment: the sequential pass through the layers, the measurements and the record."""
