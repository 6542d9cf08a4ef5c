"""Recurrent layers as a loop over time in terms of operators that vmap and double backward know.

Torch's own add the input's and the state's part of a gate in place, which vmap cannot do where the state is the same
for all tasks, as the zeros are that a layer begins with; cuDNN's and oneDNN's have no second derivative. Here the
input's part is one matrix product for all time steps.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maml_lightning.engine.kernels.lstm import lstm_layer
from maml_lightning.engine.kernels.recurrent_unit import recurrent_layer
from maml_lightning.engine.kernels.swapping import swapping

State = tuple[Tensor, ...]
Cell = Callable[[Tensor, State, Tensor, Tensor | None], State]


def _lstm_step(gates: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
    h, c = state
    i, f, g, o = (gates + F.linear(h, weight, bias)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_step(gates: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
    (h,) = state
    (r, z, n), (r_h, z_h, n_h) = gates.chunk(3, -1), F.linear(h, weight, bias).chunk(3, -1)
    n = (n + (r + r_h).sigmoid() * n_h).tanh()
    return (n + (z + z_h).sigmoid() * (h - n),)


def _rnn_step(gates: Tensor, state: State, weight: Tensor, bias: Tensor | None, activation: Callable) -> State:
    return (activation(gates + F.linear(state[0], weight, bias)),)


def _direction(
    kind: str, x: Tensor, state: State, weights: Sequence[Tensor], has_biases: bool, reverse: bool
) -> tuple[Tensor, State]:
    """One layer in one direction over ``[L, B, F]``: the outputs ``[L, B, H]`` and the last state.

    Args:
        weights: of input and state, their biases, and with projections that of the output.
    """
    to_gates, to_state, *others = weights
    biases, projection = (others[:2], others[2:]) if has_biases else ((None, None), others)
    gates = F.linear(x, to_gates, biases[0])
    if not projection and x.dim() == 3:
        bias = gates.new_zeros(len(to_state)) if biases[1] is None else biases[1]
        bias, weight, h, *c = (value.to(gates.dtype) for value in (bias, to_state, *state))  # autocast
        gates = gates.flip(0) if reverse else gates
        if kind == "lstm":
            outputs, *last = lstm_layer(gates + bias, h, c[0], weight)
        else:
            outputs = recurrent_layer(kind, gates, h, weight, bias)
            last = [outputs[-1]]
        return outputs.flip(0) if reverse else outputs, tuple(last)
    each = gates.unbind(0)
    results = []
    for now in reversed(each) if reverse else each:
        h, *rest = _STEPS[kind](now, state, to_state, biases[1])
        state = (F.linear(h, projection[0]) if projection else h, *rest)
        results.append(state[0])
    return torch.stack(results[::-1] if reverse else results), state


def _layers(
    kind: str,
    own: Callable[..., Any],
    input: Tensor,
    hx: Any,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool = False,
) -> tuple[Tensor, ...]:
    """The layers of ``torch.lstm``, ``torch.gru``, …, of the same arguments; packed sequences are left to torch."""
    if not isinstance(has_biases, bool):  # packed: input, batch_sizes, hx, params, …
        with torch.backends.cudnn.flags(enabled=False):  # cuDNN's has no second derivative
            return own(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)
    states = hx if isinstance(hx, (tuple, list)) else (hx,)
    directions = 2 if bidirectional else 1
    count = len(params) // (num_layers * directions)
    x = input.transpose(0, 1) if batch_first else input
    last = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            number = layer * directions + direction
            weights, state = params[number * count :][:count], tuple(s[number] for s in states)
            output, state = _direction(kind, x, state, weights, has_biases, bool(direction))
            outputs.append(output)
            last.append(state)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if dropout and layer < num_layers - 1:
            x = F.dropout(x, dropout, train)
    return x.transpose(0, 1) if batch_first else x, *(torch.stack(parts) for parts in zip(*last, strict=True))


def _cell(
    step: Cell, x: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Any:
    """``torch.lstm_cell``, ``torch.gru_cell``, …, of the same arguments."""
    several = isinstance(hx, (tuple, list))
    state = step(F.linear(x, w_ih, b_ih), tuple(hx) if several else (hx,), w_hh, b_hh)
    return state if several else state[0]


# On GPUs recurrent layers put weights that are new to them into one piece of memory, in place, for cuDNN alone. A graph
# cannot record that, and autograd knows nothing of it.
without_flattening = swapping([(nn.RNNBase, "flatten_parameters", lambda layer: None)])

_STEPS: dict[str, Cell] = {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "rnn_tanh": partial(_rnn_step, activation=torch.tanh),
    "rnn_relu": partial(_rnn_step, activation=torch.relu),
}


def recurrences() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What replaces torch's recurrent layers and cells."""
    layers = {getattr(torch, name): partial(_layers, name, getattr(torch, name)) for name in _STEPS}
    return {**layers, **{getattr(torch, f"{name}_cell"): partial(_cell, step) for name, step in _STEPS.items()}}
