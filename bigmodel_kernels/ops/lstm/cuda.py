"""The CUDA C++ kernels of csrc/cuda/lstm*.cuh: all steps of a layer in one launch; the products around them are PyTorch's."""

from __future__ import annotations

import torch

from bigmodel_kernels import _gpu
from bigmodel_kernels.ops.lstm import by_layer
from bigmodel_kernels.ops.lstm.cuda_plan import BACKWARD, FORWARD, Kernel, plan

NATIVE_OP = "lstm_sequence_fwd"
native = torch.ops.bigmodel_native


def supports(
    x, h0, c0, weights, batch_sizes, dropout_mask, num_layers, bidirectional, dropout, save
) -> str | None:  # fmt: skip
    if (why := _gpu.reason(x)) is not None:
        return why
    if h0.shape[2] != c0.shape[2]:
        return "h is projected"
    directions, gpu = 2 if bidirectional else 1, _gpu.properties(x.device.index)
    for kernels in (FORWARD, BACKWARD) if save else (FORWARD,):
        if plan(kernels[x.element_size()], c0.shape[2], directions, gpu) is None:
            return f"the states of {c0.shape[2]} units do not fit in the GPU's shared memory"
    if batch_sizes is not None and x.is_cuda and torch.cuda.is_current_stream_capturing():
        return "packed sequences need a table from the CPU, which a CUDA graph cannot capture"
    return None


def _plan(kernels: dict[int, Kernel], w_hh: torch.Tensor) -> tuple:
    """The plan, and whether the recurrent product may be TF32: by the switches of RNNs and of products, since the other products
    of a layer are PyTorch's."""
    directions, _, hidden = w_hh.shape
    found = plan(kernels[w_hh.element_size()], hidden, directions, _gpu.properties(w_hh.device.index))
    tf32 = _gpu.allows_tf32(w_hh.dtype, torch.backends.cuda.matmul, torch.backends.cudnn.rnn)
    return found.scope, found.registers, found.warps, tf32


def _tables(tokens: by_layer.Tokens, device: torch.device) -> tuple:
    return tokens.tables(device) if tokens.packed else (None, None)


def _bias_of(w_hh, b_ih, b_hh) -> torch.Tensor:
    """The sum of both biases [4 H], float32; 0 where there are none."""
    if b_ih is None:
        return torch.zeros(w_hh.shape[0], dtype=torch.float32, device=w_hh.device)
    return torch.add(b_ih.float(), b_hh.float())


def _layer_forward(tokens, own, parameters, from_input, h0, c0, h_n, c_n, y, gates, cells) -> None:
    w_hh = torch.stack([w[1] for w in parameters])
    bias = torch.stack([_bias_of(*w[1:4]) for w in parameters])
    c = by_layer.float_state(c0[own])
    from_input = from_input.view(len(parameters), *from_input.shape[-2:])
    native.lstm_sequence_fwd(
        from_input, w_hh, bias, h0[own].contiguous(), *_tables(tokens, h0.device), len(tokens.sizes),
        y.flatten(0, -2), h_n[own], c, gates, cells, *_plan(FORWARD, w_hh),
    )  # fmt: skip
    c_n[own] = c


def fwd(*args):
    return by_layer.forward(_layer_forward, *args)


def _layer_backward(tokens, parameters, d_y, d_h, d_c, gates, cells, c0, d_gates, d_projected) -> None:
    w_hh = torch.stack([w[1] for w in parameters])
    native.lstm_sequence_bwd(
        d_y, gates, cells, c0, w_hh, *_tables(tokens, d_y.device), len(tokens.sizes), d_h, d_c, d_gates,
        *_plan(BACKWARD, w_hh),
    )  # fmt: skip


def bwd(*args):
    return by_layer.backward(_layer_backward, *args)
