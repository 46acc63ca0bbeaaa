"""Find models, describe their architectures and load them layer by layer."""
