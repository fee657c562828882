"""The LSTM as its formula reads, one step after the other, and its gradient written out (Hochreiter & Schmidhuber 1997,
with the forget gate of Gers et al. 2000; projection after Sak et al. 2014).

    i, f, o = sigmoid(W x_t + U h_(t-1) + b),  g = tanh(likewise)         gates in the order i, f, g, o
    c_t = f c_(t-1) + i g        h_t = o tanh(c_t), or W_hr (o tanh(c_t)) with a projection

`forward` is made of differentiable torch ops, so gradients of gradients go through it. Sequences are dense, [T, B, ..],
or packed: [tokens, ..] with batch_sizes, as in torch.nn.utils.rnn.PackedSequence.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split_weights(
    weights: list[Tensor], cells: int
) -> list[tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]]:
    """Per layer and direction: w_ih, w_hh, b_ih, b_hh, w_hr, with None for what there is not."""
    n = len(weights) // cells
    groups = [weights[cell * n : (cell + 1) * n] for cell in range(cells)]
    return [(w[0], w[1], w[2] if n >= 4 else None, w[3] if n >= 4 else None, w[-1] if n % 2 else None) for w in groups]


def steps_of(x: Tensor, batch_sizes: Tensor | None) -> list[tuple[int, int]]:
    """(first token, number of sequences) of every step."""
    sizes = [x.shape[1]] * x.shape[0] if batch_sizes is None else batch_sizes.tolist()
    firsts = (
        [sum(sizes[:t]) for t in range(len(sizes))]
        if batch_sizes is not None
        else [t * x.shape[1] for t in range(len(sizes))]
    )
    return list(zip(firsts, sizes))


def _direction(tokens, h, c, weights, steps):
    """One direction of one layer over `steps` in the order given: its h [tokens, P], final states, gates and cells by token."""
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    hs, gates, cells = {}, {}, {}
    for first, n in steps:
        pre = tokens[first : first + n] @ w_ih.T + h[:n] @ w_hh.T
        if b_ih is not None:
            pre = pre + b_ih + b_hh
        i, f, g, o = pre.chunk(4, 1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c_t = f * c[:n] + i * g
        h_t = o * c_t.tanh()
        if w_hr is not None:
            h_t = h_t @ w_hr.T
        h, c = torch.cat([h_t, h[n:]]), torch.cat([c_t, c[n:]])
        hs[first], gates[first], cells[first] = h_t, torch.cat([i, f, g, o], 1), c_t

    def by_token(of_step: dict[int, Tensor], like: Tensor, width: int) -> Tensor:
        found = [of_step[first] for first in sorted(of_step)]
        return torch.cat(found) if found else like.new_empty(0, width)

    return by_token(hs, h, h.shape[1]), h, c, by_token(gates, c, 4 * c.shape[1]), by_token(cells, c, c.shape[1])


def forward(
    x: Tensor,  # [T, B, I] or [tokens, I]
    h0: Tensor,  # [L D, B, P]
    c0: Tensor,  # [L D, B, H]
    weights: list[Tensor],
    batch_sizes: Tensor | None,  # [T]
    dropout_mask: Tensor | None,  # [L - 1, tokens, D P], 0 or 1 / (1 - p)
    num_layers: int,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """output, h_n, c_n; and for the backward gates [L D, tokens, 4 H], cells [L D, tokens, H], hidden [L - 1, tokens, D P]."""
    directions = 2 if bidirectional else 1
    steps = steps_of(x, batch_sizes)
    tokens = x.reshape(-1, x.shape[-1])
    h_n, c_n, gates, cells, hidden = [], [], [], [], []
    for cell, parameters in enumerate(split_weights(weights, num_layers * directions)):
        layer, reverse = divmod(cell, directions)
        if not reverse:
            source, outputs = tokens if layer == 0 else hidden[-1], []
            if layer > 0 and dropout_mask is not None:
                source = source * dropout_mask[layer - 1]
        y, h, c, *saved = _direction(source, h0[cell], c0[cell], parameters, steps[::-1] if reverse else steps)
        for values, value in zip((outputs, h_n, c_n, gates, cells), (y, h, c, *saved)):
            values.append(value)
        if reverse or not bidirectional:
            hidden.append(torch.cat(outputs, 1))
    output = hidden.pop()
    kept = torch.stack(hidden) if hidden else output.new_empty(0, *output.shape)
    output = output if batch_sizes is not None else output.reshape(*x.shape[:2], output.shape[-1])
    return output, torch.stack(h_n), torch.stack(c_n), torch.stack(gates), torch.stack(cells), kept


def _direction_backward(d_y, d_h, d_c, tokens, y, h0, c0, gates, cells, weights, steps):
    """Gradients of one direction: of its input, of h0 and c0, and of its weights."""
    w_ih, w_hh, b_ih, _, w_hr = weights
    d_gates, h_prev, d_h_all = torch.zeros_like(gates), torch.zeros_like(y), torch.zeros_like(y)
    d_h, d_c = d_h.clone(), d_c.clone()
    for s in reversed(range(len(steps))):
        first, n = steps[s]
        token = slice(first, first + n)
        # What the step started from: initial states, but for the sequences that had a step before.
        h_before, c_before = h0[:n].clone(), c0[:n].clone()
        if s > 0:
            before, m = steps[s - 1][0], min(n, steps[s - 1][1])
            h_before[:m], c_before[:m] = y[before : before + m], cells[before : before + m]
        i, f, g, o = gates[token].chunk(4, 1)
        tanh_c = cells[token].tanh()
        d_ht = d_h[:n] + d_y[token]
        d_u = d_ht if w_hr is None else d_ht @ w_hr
        d_ct = d_c[:n] + d_u * o * (1 - tanh_c**2)
        d_gates[token] = torch.cat(
            [d_ct * g * i * (1 - i), d_ct * c_before * f * (1 - f), d_ct * i * (1 - g**2), d_u * tanh_c * o * (1 - o)],
            1,
        )
        d_h[:n], d_c[:n] = d_gates[token] @ w_hh, d_ct * f
        h_prev[token], d_h_all[token] = h_before, d_ht
    d_weights = [d_gates.T @ tokens, d_gates.T @ h_prev]
    if b_ih is not None:
        d_weights += [d_gates.sum(0), d_gates.sum(0)]
    if w_hr is not None:
        d_weights.append(d_h_all.T @ (gates.chunk(4, 1)[3] * cells.tanh()))
    return d_gates @ w_ih, d_h, d_c, d_weights


def backward(
    d_output: Tensor,
    d_h_n: Tensor,
    d_c_n: Tensor,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    hidden: Tensor,
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    dropout_mask: Tensor | None,
    num_layers: int,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of x, h0, c0 and of every tensor of `weights`, from what `forward` returned."""
    directions = 2 if bidirectional else 1
    steps = steps_of(x, batch_sizes)
    parameters = split_weights(weights, num_layers * directions)
    outputs = [*hidden, output.reshape(-1, output.shape[-1])]
    d_above = d_output.reshape(-1, output.shape[-1])
    d_h0, d_c0, d_weights = [None] * len(parameters), [None] * len(parameters), [None] * len(parameters)
    for layer in reversed(range(num_layers)):
        source = outputs[layer - 1] if layer else x.reshape(-1, x.shape[-1])
        mask = dropout_mask[layer - 1] if layer and dropout_mask is not None else None
        source = source if mask is None else source * mask
        d_source = torch.zeros_like(source)
        for d in range(directions):
            cell = layer * directions + d
            part, d_h0[cell], d_c0[cell], d_weights[cell] = _direction_backward(
                d_above.chunk(directions, 1)[d],
                d_h_n[cell],
                d_c_n[cell],
                source,
                outputs[layer].chunk(directions, 1)[d],
                h0[cell],
                c0[cell],
                gates[cell],
                cells[cell],
                parameters[cell],
                steps[::-1] if d else steps,
            )
            d_source += part
        d_above = d_source if mask is None else d_source * mask
    return d_above.reshape(x.shape), torch.stack(d_h0), torch.stack(d_c0), [w for group in d_weights for w in group]
