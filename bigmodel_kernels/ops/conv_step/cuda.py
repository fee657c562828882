"""The CUDA C++ kernel of csrc/cuda/conv_step.cuh: a whole step in one launch, which reads and writes the state on the device.

"auto" does not choose it: it has not been measured on a GPU.
"""

from __future__ import annotations

import torch

from bigmodel_kernels import _gpu

NATIVE_OP = "conv_step_launch"
ONE_BLOCK_BYTES = 128 << 10  # of weights: one multiprocessor reads them in less than the wait of blocks for each other
SHARE, LARGE_SHARE, LARGE_VALUES = 16, 32, 512  # values of a block; more where there are more values than that
SEQUENCES = 4  # of a block, where there are several
STATIC_BYTES = 128  # of shared memory, besides what is asked for at the launch
MOST_PARTS = 65535  # groups of sequences
native = torch.ops.bigmodel_native


def share_of(values: int, weight_bytes: int) -> int:
    """How many of the values between convolution and residual a block makes: all of them where the weights are few."""
    if weight_bytes <= ONE_BLOCK_BYTES:
        return max(SHARE, values)
    return SHARE if values <= LARGE_VALUES else LARGE_SHARE


def shared_bytes(
    rows: int, channels: int, kernel: int, groups: int, gated: bool, share: int, sequences: int, size: int
) -> int:
    """As ConvStep::shared_bytes of csrc/cuda/conv_step.cuh."""
    reached = min(groups, (share - 1) // max(rows // groups, 1) + 2)
    windows = 2 if gated and groups > 1 else 1
    return -(-4 * share * sequences // 16) * 16 + windows * sequences * (channels // groups * reached) * kernel * size


def block_of(
    batch: int, channels: int, rows: int, kernel: int, groups: int, gated: bool, outputs: int, size: int, available: int
) -> tuple[int, int] | None:
    """(values, sequences) of a block, with `outputs` rows in out_weight and skip_weight together and numbers of `size` bytes;
    None where the inputs of one sequence are more than the shared memory of a block holds."""
    values = rows // 2 if gated else rows
    share = share_of(values, (rows * channels // groups * kernel + outputs * values) * size)
    for sequences in (SEQUENCES, 1) if batch > 1 else (1,):
        if STATIC_BYTES + shared_bytes(rows, channels, kernel, groups, gated, share, sequences, size) <= available:
            return share, sequences
    return None


def _plan(x_t, weight, out_weight, skip_weight, groups: int, activation: str) -> tuple[int, int] | None:
    outputs = sum(w.shape[0] for w in (out_weight, skip_weight) if w is not None)
    gated, available = activation == "tanh_sigmoid", _gpu.properties(x_t.device.index).shared_bytes
    return block_of(*x_t.shape, *weight.shape[::2], groups, gated, outputs, x_t.element_size(), available)


def supports(
    x_t, ring, position, weight, bias, out_weight, out_bias, skip_weight, skip_bias, skip, dilation, groups, activation,
    slope,
) -> str | None:  # fmt: skip
    if (why := _gpu.reason(x_t)) is not None:
        return why
    if not ring.is_contiguous():
        return "the ring of the state is not contiguous"
    if x_t.shape[0] > SEQUENCES * MOST_PARTS:
        return f"there are {x_t.shape[0]} sequences, the kernel takes up to {SEQUENCES * MOST_PARTS}"
    if _plan(x_t, weight, out_weight, skip_weight, groups, activation) is None:
        return f"the inputs of a step, {x_t.shape[1]} channels at {weight.shape[2]} times, do not fit in shared memory"
    return None


def fwd(
    x_t, ring, position, weight, bias, out_weight, out_bias, skip_weight, skip_bias, skip, dilation, groups, activation,
    slope,
):  # fmt: skip
    share, sequences = _plan(x_t, weight, out_weight, skip_weight, groups, activation)
    batch, channels = x_t.shape
    values = weight.shape[0] // 2 if activation == "tanh_sigmoid" else weight.shape[0]
    skips = 0 if skip_weight is None else skip_weight.shape[0]
    blocks, parts = max(1, -(-values // share)), max(1, -(-batch // sequences))
    y = x_t.new_empty(batch, values if out_weight is None else channels)
    total = x_t.new_empty(0) if skip_weight is None else x_t.new_empty(batch, skips)
    sums = (channels if out_weight is not None else 0) + skips
    partial = torch.empty(parts, blocks if blocks > 1 else 0, sequences, sums, dtype=torch.float32, device=x_t.device)
    tensors = [
        t if t is None else t.contiguous() for t in (weight, bias, out_weight, out_bias, skip_weight, skip_bias, skip)
    ]
    native.conv_step_launch(
        x_t, ring, position, *tensors, dilation, groups, activation, slope, share, sequences, y, total, partial,
        _gpu.tickets(x_t, parts + 1 if blocks * parts > 1 else 0),
    )  # fmt: skip
    return y, total
