"""The backend of CuPy arrays: kernels compiled by NVRTC, from the sources in kernels/.

A call is planned as pure data, its kernels' arguments are filled in by name, and all is launched when it is committed.

    device, layout                properties of GPUs; how arrays lie in memory, and which kind of kernels reads them
    variants                      the kernels that exist
    ops, arguments                the arrays and numbers of an operation; the structure of each kernel's arguments
    plan                          which variants a call launches, as pure data
    describe                      plans in words, for `explain`
    source                        the text of each module
    launches, launch              the launches of a call; the operations on a runtime
    runtime, clusters, backend    the runtime of CuPy; these alone need CuPy and a driver
"""
