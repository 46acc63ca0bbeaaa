"""Routing traces: record them, store them, and compute their statistics."""
