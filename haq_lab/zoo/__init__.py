"""Build models from other models or by training, and check them."""
