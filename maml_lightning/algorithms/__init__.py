"""The mathematics on torch.func: inner loop, meta-gradients, inner optimizers, what adapts at which learning rate."""
