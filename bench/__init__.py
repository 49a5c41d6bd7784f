"""The benchmark: `python -m bench` from the checkout; `bash bench/gpu.sh OUTDIR` for everything a GPU can show."""
