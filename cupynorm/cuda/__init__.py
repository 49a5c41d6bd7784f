"""The CuPy backend. Its modules backend, clusters and runtime need CuPy and a driver; the others need neither."""
