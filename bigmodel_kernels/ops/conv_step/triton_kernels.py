"""The launcher of the Triton kernel of triton_step.py: one launch for a step, or, where a sequence's values do not fit in one
program and 1x1 products follow, one for the convolution and one for each of them."""

from __future__ import annotations

import torch

from bigmodel_kernels import _triton, _tuned
from bigmodel_kernels.ops.conv_step.triton_configs import MOST_VALUES, config
from bigmodel_kernels.ops.conv_step.triton_step import MOST_PROGRAMS, step_kernel


def supports(x_t, ring, position, weight, *rest) -> str | None:
    if (why := _triton.reason(x_t)) is not None:
        return why
    if not ring.is_contiguous():
        return "the ring of the state is not contiguous"
    if 0 in x_t.shape or 0 in weight.shape:
        return f"x_t has shape {list(x_t.shape)} and weight {list(weight.shape)}: there is nothing to sum over"
    if x_t.shape[0] * max(weight.shape[0], x_t.shape[1]) > MOST_PROGRAMS:
        return f"{x_t.shape[0]} sequences of {weight.shape[0]} rows; the kernel counts up to {MOST_PROGRAMS} in all"
    return None


@_tuned.cached
def _plan(
    device: int | None, element_size: int, batch: int, values: int, of_group: int, kernel: int, groups: int, rows: int,
    activation: str, mixed: bool,
) -> tuple[int, int, dict]:  # fmt: skip
    """(programs, parts of a sequence, constants) of a launch."""
    sizes = config(device, *(("mixed", element_size, values) if mixed else ("rows", element_size, of_group * kernel)))
    parts = -(-values // sizes["BLOCK_R"])
    constants = {"KERNEL": kernel, "ACTIVATION": activation, "GROUPED": groups > 1, "MIXED": mixed}
    return batch * parts, parts, constants | sizes


def _launch(
    x, ring, position, weight, bias, added, y, mixes, skip, total, dilation, groups, activation, slope
):  # fmt: skip
    """`mixes` are the weights and biases of the products that follow in the same program; none where they are all None."""
    batch, channels = x.shape
    rows, of_group, kernel = weight.shape
    values = rows // 2 if activation == "tanh_sigmoid" else rows
    out_weight, _, skip_weight, _ = mixes
    mixed = out_weight is not None or skip_weight is not None
    programs, parts, constants = _plan(
        x.device.index, weight.element_size(), batch, values, of_group, kernel, groups, rows, activation, mixed
    )
    strides = x.stride()
    _triton.launch(
        step_kernel, programs, x, ring, position, weight, bias, added, y, *mixes, skip, total,
        strides, strides if added is None else added.stride(), strides if skip is None else skip.stride(),
        batch, parts, channels, of_group, values, rows // groups, 0 if skip_weight is None else skip_weight.shape[0],
        dilation, slope, **constants,
    )  # fmt: skip


NONE = (None,) * 4


def fwd(
    x_t, ring, position, weight, bias, out_weight, out_bias, skip_weight, skip_bias, skip, dilation, groups, activation,
    slope,
):  # fmt: skip
    batch, channels = x_t.shape
    values = weight.shape[0] // 2 if activation == "tanh_sigmoid" else weight.shape[0]
    weight, bias, *mixes = (
        t if t is None or t.is_contiguous() else t.contiguous()
        for t in (weight, bias, out_weight, out_bias, skip_weight, skip_bias)
    )
    y = x_t.new_empty(batch, values if out_weight is None else channels)
    total = x_t.new_empty(0) if skip_weight is None else x_t.new_empty(batch, skip_weight.shape[0])
    options = dilation, groups, activation, slope
    if values <= MOST_VALUES or (out_weight is None and skip_weight is None):
        _launch(x_t, ring, position, weight, bias, None, y, mixes, skip, total, *options)
        return y, total
    a = y if out_weight is None else torch.empty(batch, values, dtype=torch.float32, device=x_t.device)
    _launch(x_t, ring, position, weight, bias, None, a, NONE, None, None, *options)
    for w, b, added, result in ((mixes[0], mixes[1], x_t, y), (mixes[2], mixes[3], skip, total)):
        if w is not None:
            _launch(a, ring, None, w, b, added, result, NONE, None, None, 1, 1, "none", 0.0)
    return y, total
