"""Prepare quantised models to run."""
