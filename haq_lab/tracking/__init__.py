"""Sinks for what a run does: its folder, which is the truth, and W&B."""
