"""Int8 kernels on NVIDIA GPUs."""
