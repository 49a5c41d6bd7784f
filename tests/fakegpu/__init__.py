"""A fake CUDA device under the real CuPy, for machines without a GPU: README.md in this folder."""
