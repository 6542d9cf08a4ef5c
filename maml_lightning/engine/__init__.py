"""How a function of one task becomes fast over many: tracing, kernels, chunks, memory. Knows no algorithm."""
