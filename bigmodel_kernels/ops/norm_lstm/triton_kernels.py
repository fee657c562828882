"""The steps on the Triton kernels of triton_step.py; the products are PyTorch's."""

from __future__ import annotations

import torch

from bigmodel_kernels import _triton
from bigmodel_kernels._gpu import product
from bigmodel_kernels.ops.lstm.by_layer import float_state, gradient_of_state
from bigmodel_kernels.ops.norm_lstm.op import empty_saved
from bigmodel_kernels.ops.norm_lstm.triton_step import LARGEST_HIDDEN, backward_kernel, constants, forward_kernel


def supports(a, h0, *rest) -> str | None:
    if (why := _triton.reason(a)) is not None:
        return why
    if not 0 < h0.shape[1] <= LARGEST_HIDDEN:
        return f"the kernels take 1 to {LARGEST_HIDDEN} units, got {h0.shape[1]}"
    return None


def _steps(
    a, h, c0, w, gain, gain_c, bias_c, eps, eps_c, z, gates, cells
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The results; z, gates and cells are written where they are not None."""
    steps, batch, rows = a.shape
    hidden, sizes = rows // 4, constants(a.device.index, "forward", rows // 4)
    a, gain, gain_c, bias_c = a.contiguous(), gain.contiguous(), gain_c.contiguous(), bias_c.contiguous()
    output, c, w_t = a.new_empty(steps, batch, hidden), float_state(c0), w.t()
    z_t = torch.empty(batch, rows, dtype=torch.float32, device=a.device) if z is None else None
    for t in range(steps):
        z_t = product(h, w_t, z_t if z is None else z[t])
        _triton.launch(
            forward_kernel, batch,
            z_t, a, gain, gain_c, bias_c, c, output, gates, cells, t * batch, hidden, eps, eps_c, **sizes,
        )  # fmt: skip
        h = output[t]
    return output, h.clone(), c.to(a.dtype)


def infer(*args):
    return _steps(*args[:9], None, None, None)


def fwd(*args):
    saved = empty_saved(args[0], args[-1])
    return *_steps(*args[:9], *(saved if args[-1] else (None, None, None))), *saved


def bwd(d_output, d_h_n, d_c_n, output, z, gates, cells, a, h0, c0, w, gain, gain_c, bias_c, eps, eps_c, save):
    steps, batch, rows = a.shape
    hidden, sizes = rows // 4, constants(a.device.index, "backward", rows // 4)
    d_h, d_c = gradient_of_state(d_h_n, h0), gradient_of_state(d_c_n, c0)
    d_output = None if d_output is None else d_output.contiguous()
    read = [t.contiguous() for t in (z, gates, cells, c0, gain, gain_c, bias_c)]
    d_a, d_z = (torch.empty(a.shape, dtype=a.dtype, device=a.device) for _ in range(2))
    sums = torch.zeros(batch, 6 * hidden, dtype=torch.float32, device=a.device)
    for t in reversed(range(steps)):
        _triton.launch(
            backward_kernel, batch,
            d_h, d_output, d_c, *read, d_a, d_z, sums, t * batch, batch, hidden, eps, eps_c, **sizes,
        )  # fmt: skip
        product(d_z[t], w, d_h)
    before = torch.cat([h0[None], output[:-1]]).flatten(0, 1)
    d_w = d_z.flatten(0, 1).t() @ before
    d_gain, d_gain_c, d_bias_c = sums.sum(0).to(a.dtype).split([rows, hidden, hidden])
    of_parameters = (d.clone() for d in (d_gain, d_gain_c, d_bias_c))
    return d_a, d_h.to(h0.dtype), d_c.to(c0.dtype), d_w, *of_parameters
