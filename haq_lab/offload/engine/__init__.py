"""Run a model whose experts are moved between a slow and a fast tier."""
