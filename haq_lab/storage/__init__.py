"""Read and write weight files and tensor buffers."""
