"""Int8 products on the CPU."""
