"""Recurrent layers as matrix products over time, which vmap can map; torch's own are closed to it.

The inputs of all steps are projected in one product. Between layers `torch.dropout` is called, where `draws` sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fallline.errors import Unsupported

State = tuple[Tensor, ...]
# (projected input, projected hidden state, state) -> state
Cell = Callable[[Tensor, Tensor, State], State]


def _lstm(projected: Tensor, recurrent: Tensor, state: State) -> State:
    i, f, g, o = (projected + recurrent).chunk(4, dim=-1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(projected: Tensor, recurrent: Tensor, state: State) -> State:
    (r, z, n), (hr, hz, hn) = projected.chunk(3, dim=-1), recurrent.chunk(3, dim=-1)
    fresh = (n + (r + hr).sigmoid() * hn).tanh()
    return (fresh + (z + hz).sigmoid() * (state[0] - fresh),)


def _tanh(projected: Tensor, recurrent: Tensor, state: State) -> State:
    return ((projected + recurrent).tanh(),)


def _relu(projected: Tensor, recurrent: Tensor, state: State) -> State:
    return ((projected + recurrent).relu(),)


def lstm(x: Tensor, hx: Sequence[Tensor], params: Sequence[Tensor], *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.lstm`: (outputs, last hidden states, last cell states)."""
    outputs, (h, c) = _layers(_lstm, x, hx, params, *options)
    return outputs, h, c


def _of_one_state(cell: Cell) -> Callable[..., tuple[Tensor, Tensor]]:
    def layers(x: Tensor, hx: Tensor, params: Sequence[Tensor], *options: Any) -> tuple[Tensor, Tensor]:
        outputs, (h,) = _layers(cell, x, (hx,), params, *options)
        return outputs, h

    return layers


def _layers(
    cell: Cell,
    x: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    biased: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, State]:
    if not isinstance(biased, bool):  # (data, batch sizes, states, parameters, …)
        raise Unsupported("a recurrent layer on packed sequences has no batched form: pad them, and mask the loss.")
    directions = 1 + bidirectional
    # Of each layer and direction: two matrices, two biases where there are any, and LSTM's projection.
    own = len(params) // (layers * directions)
    per_state = [state.unbind(0) for state in hx]
    x = x.transpose(0, 1) if batch_first else x
    last: list[State] = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            position = layer * directions + direction
            weights = params[position * own : (position + 1) * own]
            state = tuple(each[position] for each in per_state)
            output, state = _over_time(cell, x, state, weights, biased, backwards=direction == 1)
            outputs.append(output)
            last.append(state)
        x = outputs[0] if directions == 1 else torch.cat(outputs, dim=-1)
        if layer < layers - 1:
            x = torch.dropout(x, dropout, train)
    outputs_in_order = x.transpose(0, 1) if batch_first else x
    return outputs_in_order, tuple(torch.stack(states) for states in zip(*last, strict=True))


def _over_time(
    cell: Cell, x: Tensor, state: State, weights: Sequence[Tensor], biased: bool, *, backwards: bool
) -> tuple[Tensor, State]:
    """One layer in one direction: outputs [time, sample, feature] and the last state."""
    into, again, *others = weights
    bias, bias_again = others[:2] if biased else (None, None)
    projection = others[2 * biased] if len(others) > 2 * biased else None
    # unbind and stack are one node each in the backward pass; x[t] would make a tensor of zeros at every step.
    steps = functional.linear(x, into, bias).unbind(0)
    outputs = []
    for projected in reversed(steps) if backwards else steps:
        h, *rest = cell(projected, functional.linear(state[0], again, bias_again), state)
        state = (h if projection is None else functional.linear(h, projection), *rest)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs), state


gru = _of_one_state(_gru)
rnn_tanh = _of_one_state(_tanh)
rnn_relu = _of_one_state(_relu)


def lstm_cell(
    x: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> State:
    """`torch.lstm_cell`: the next hidden state and the next cell state."""
    return _lstm(functional.linear(x, w_ih, b_ih), functional.linear(hx[0], w_hh, b_hh), tuple(hx))


def _cell_of_one_state(cell: Cell) -> Callable[..., Tensor]:
    def step(
        x: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
    ) -> Tensor:
        return cell(functional.linear(x, w_ih, b_ih), functional.linear(hx, w_hh, b_hh), (hx,))[0]

    return step


gru_cell = _cell_of_one_state(_gru)
rnn_tanh_cell = _cell_of_one_state(_tanh)
rnn_relu_cell = _cell_of_one_state(_relu)
