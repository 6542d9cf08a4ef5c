"""How a function of one task becomes fast over many. Knows no algorithm.

`execution` runs functions in the fastest way that works: by `tracing`, as graphs that `recording` takes, `graphs` and
`hoisting` simplify and `fingerprints` keeps valid; vectorized; or in a `loop`. `trials` finds out what running a
network does beside, `chunks` splits a meta-batch, `kernels` are operators by kind of layer, `memory` says what is free.
"""
