"""How a function of one task becomes fast over many. Knows no algorithm.

`chunks` splits a meta-batch and measures the fastest size; `tracing` runs functions as traced graphs, which `graphs`
simplifies and `fingerprints` keeps valid; `kernels` are operators by kind of layer; `memory` says what is free.
"""
