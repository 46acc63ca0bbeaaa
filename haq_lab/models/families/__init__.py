"""Describe the supported architectures: one row of a table for each."""
