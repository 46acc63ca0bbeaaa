"""Nothing is computed twice: what a run's stages make is kept under the hash of what it depends on."""
