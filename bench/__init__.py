"""The benchmark: `python -m bench` from the checkout; `bash bench/gpu.sh OUTDIR` for everything a GPU can show.

`python -m bench.host` measures what a call costs the host, `bench.dram` the bytes a GPU's memory sees, and `bench.aims`
sets a result beside what is aimed at.
"""
