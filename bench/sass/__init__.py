"""Machine code of kernels, for sm_90: compiled by NVRTC, disassembled by nvdisasm, and executed in NumPy to count the
instructions that a call issues.

    listing      compile and disassemble; the parsed instructions
    operands     registers, constants and immediates of an instruction
    operations   what each instruction computes
    machine      threads of a block: which instruction they execute next, memory and barriers
"""
