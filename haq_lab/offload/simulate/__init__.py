"""Simulate offloading: replay traces, predict latency on a machine, and plan the capacity of a GPU."""
