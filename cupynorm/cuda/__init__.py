"""The backend of CuPy arrays: kernels compiled by NVRTC, from the sources in kernels/.

The first call on arrays with some shapes, strides, dtypes and alignments is planned as pure data and traced; later
calls replay the trace on their arrays. Kernels are launched when a call is committed.

    device, layout                properties of GPUs; how arrays lie in memory, and which kind of kernels reads them
    variants                      the kernels that exist
    ops, arguments                the arrays and numbers of an operation; the structure of each kernel's arguments
    plan                          which variants a call launches, as pure data
    describe                      plans in words, for `explain`
    source                        the text of each module
    calls, trace                  what each operation allocates, copies and launches; it is traced once
    replay, launch                later calls: the trace on their arrays; the backend
    numpy_runtime                 the arrays of runtimes without a GPU (tests, benchmark)
    runtime, clusters, backend    the runtime of CuPy; these alone need CuPy and a driver
"""
