"""Mutation testing of the kernels and the package: `python -m tools.mutation --help`."""
