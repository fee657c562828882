"""The step in PyTorch's ops. `fwd` writes into the ring as the kernels do; `call` is for gradients and writes a new one."""

from __future__ import annotations

from bigmodel_kernels.ops.conv_step import reference


def supports(*args) -> str | None:
    return None


def _outputs(
    x_t, ring, position, weight, bias, out_weight, out_bias, skip_weight, skip_bias, skip, dilation, groups, activation,
    slope,
):  # fmt: skip
    taps = reference.window(x_t, ring, position, weight.shape[2], dilation)
    return reference.output(
        taps, weight, bias, out_weight, out_bias, skip_weight, skip_bias, skip, groups, activation, slope
    )


def fwd(x_t, ring, position, *rest):
    results = _outputs(x_t, ring, position, *rest)
    if ring.shape[1]:
        ring.index_copy_(1, position % ring.shape[1], x_t.unsqueeze(1))
    position += 1
    return results


def call(x_t, ring, position, *rest):
    """(y, skip_out, ring, position), the last two new tensors; everything is differentiable but the position."""
    results = _outputs(x_t, ring, position, *rest)
    if ring.shape[1]:
        ring = ring.index_copy(1, position % ring.shape[1], x_t.unsqueeze(1))
    return *results, ring, position + 1
