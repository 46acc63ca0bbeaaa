"""Measure perplexity, memory, latency and tasks of a quantised model."""
