"""Predict how long experts take to run and to fetch."""
