"""The mathematics on torch.func, one idea a file.

`steps` is one inner step and the inner loop; `unrolled`, `implicit` and `reptile` are the algorithms, `registry` their
names; `optimizers` are those of the inner loop, `adaptation` says which parameters adapt at which learning rate;
`inner_loop` runs an algorithm over a meta-batch.
"""
