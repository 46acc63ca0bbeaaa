"""Export checkpoints for other engines: transformers, vLLM and llama.cpp."""
