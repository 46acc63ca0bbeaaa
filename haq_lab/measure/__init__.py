"""Measurements: perplexity, memory, latency."""
