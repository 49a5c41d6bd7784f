"""The benchmark: `python -m bench --help` in the checkout; `bash bench/gpu.sh OUTDIR` for all measurements on a GPU.

`commands` has a module for each command, `core` what they share.
"""
