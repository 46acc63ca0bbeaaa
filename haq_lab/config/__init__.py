"""Validate configs, create the objects of a run, and explain errors in a config."""
