"""A pytest plugin for compute-sanitizer: every CuPy array is an allocation of its own, so that an access beyond it is
seen. Within CuPy's pool it would land in a neighbour unnoticed.
"""

import cupy

cupy.cuda.set_allocator(None)
