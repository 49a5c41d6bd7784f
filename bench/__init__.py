"""The benchmark: `python -m bench` in the checkout; `bash bench/gpu.sh OUTDIR` for all measurements on a GPU.

`python -m bench.host` measures the host time of a call, `bench.dram` the bytes moved to and from a GPU's memory, and
`bench.aims` compares a result with the aims.
"""
