"""Serve a model by an OpenAI-compatible HTTP API. The server is that of `transformers serve`."""
