"""A pytest plugin for compute-sanitizer: every CuPy array gets its own allocation, so that an access beyond it is
detected. Within CuPy's pool it would reach a neighbour unnoticed.
"""

import cupy

cupy.cuda.set_allocator(None)
