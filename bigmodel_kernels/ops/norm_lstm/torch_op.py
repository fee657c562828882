"""The steps in PyTorch's ops. `fwd` and `bwd` are for compiled graphs, whose backend is chosen only when they run; PyTorch has
no such pair, so `bwd` runs the forward again."""

from __future__ import annotations

import torch

from bigmodel_kernels.ops.norm_lstm import reference


def supports(*args) -> str | None:
    return None


def call(*args):
    return *reference.forward(*args[:-1])[:3], None, None, None


def fwd(*args):
    from bigmodel_kernels.ops.norm_lstm.op import empty_saved

    # Nothing of what it saved can be seen: the outputs for the backward have their sizes only.
    saved = [t.zero_() for t in empty_saved(args[0], args[-1])]
    return *(t.clone(memory_format=torch.contiguous_format) for t in call(*args)[:3]), *saved


def bwd(d_output, d_h_n, d_c_n, output, z, gates, cells, *args):
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in args[:7]]
        results = zip(call(*leaves, *args[7:]), (d_output, d_h_n, d_c_n))
        used = [(y, g) for y, g in results if g is not None]
        found = torch.autograd.grad([y for y, _ in used], leaves, [g for _, g in used], materialize_grads=True)
    return tuple(g.contiguous() for g in found)
