"""One step of a causal convolution that streams, in Triton; see reference.py for the formula.

A program has one sequence, and BLOCK_R values of it: a = activation(sum over channels c and taps k of
weight[r, c, k] x[t - (K - 1 - k) dilation, c] + bias). With MIXED these are all values, and they stay in registers for the 1x1
products behind them: y = x_t + W_out a + b_out and total = skip + W_skip a + b_skip. Sums are float32 and in no matrix unit: one
sequence is one column, and what takes the time is reading the weights, along their rows, as PyTorch lays them out.
Memory: the last program to come to the end writes x_t over the oldest input, which until then any other may read, and counts the
step on. How many have come is in the position itself, counted in TICKETs, so that a step is one launch without any
workspace or zeroing, which a CUDA graph can capture and repeat.
Refuses: more than MOST_PROGRAMS programs.
Floor: the weights once for every sequence, from L2 past the first; MIXED has one multiprocessor per sequence to read them.
"""

import triton
import triton.language as tl

from bigmodel_kernels._triton import sigmoid, tanh
from bigmodel_kernels.ops.conv.triton_tile import activate

TICKET = tl.constexpr(1 << 40)  # one program that has come; the position is below
MOST_PROGRAMS = 1 << 22
BLOCK_C = tl.constexpr(1024)


@triton.jit
def inputs_of(
    channel, tap, mask, x_pointer, x_stride, ring_pointer, oldest, memory, dilation, channels, KERNEL: tl.constexpr
):  # fmt: skip
    """What the step sees of these channels through these taps."""
    newest = tap == KERNEL - 1
    x = tl.load(x_pointer + channel.to(tl.int64) * x_stride, mask=mask & newest, other=0.0).to(tl.float32)
    if KERNEL > 1:
        slot = oldest + tap.to(tl.int64) * dilation
        slot = tl.where(slot >= memory, slot - memory, slot)
        x += tl.load(ring_pointer + slot * channels + channel, mask=mask & (newest == 0), other=0.0).to(tl.float32)
    return x


@triton.jit
def mix(
    a, value, values, rows, w_pointer, bias_pointer, added_pointer, added_stride, out_pointer,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = added + w a + bias of one sequence; w is [rows, values]."""
    for start in range(0, rows, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        wanted = row < rows
        w_pointers = w_pointer + (row.to(tl.int64)[:, None] * values + value[None, :])
        w = tl.load(w_pointers, mask=wanted[:, None] & (value < values)[None, :], other=0.0)
        y = tl.sum(w.to(tl.float32) * a[None, :], 1)
        if bias_pointer is not None:
            y += tl.load(bias_pointer + row, mask=wanted, other=0.0).to(tl.float32)
        if added_pointer is not None:
            y += tl.load(added_pointer + row.to(tl.int64) * added_stride, mask=wanted, other=0.0).to(tl.float32)
        tl.store(out_pointer + row, y.to(out_pointer.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["batch", "parts", "dilation", "slope"])
def step_kernel(
    x_pointer,  # [N, C]
    ring_pointer, position_pointer,  # [N, dilation * (KERNEL - 1), C], [1]; position None: nothing is remembered
    w_pointer, bias_pointer,  # [rows, C / groups, KERNEL], [rows]
    added_pointer, y_pointer,  # [N, values] or None; [N, values], MIXED: [N, C]
    out_w_pointer, out_bias_pointer,  # [C, values], [C]
    skip_w_pointer, skip_bias_pointer, skip_pointer, total_pointer,  # [S, values], [S], [N, S], [N, S]
    x_strides, added_strides, skip_strides,
    batch, parts, channels, of_group, values, group_rows, skips, dilation, slope,
    KERNEL: tl.constexpr, ACTIVATION: tl.constexpr, GROUPED: tl.constexpr, MIXED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    GATED: tl.constexpr = ACTIVATION == "tanh_sigmoid"
    n = (tl.program_id(0) // parts).to(tl.int64)
    value = tl.program_id(0) % parts * BLOCK_R + tl.arange(0, BLOCK_R)
    wanted = value < values
    x_row = x_pointer + n * x_strides[0]
    memory = tl.cast(dilation, tl.int64) * (KERNEL - 1)
    position = tl.cast(0, tl.int64)
    if position_pointer is not None:
        position = tl.load(position_pointer) % TICKET
    oldest = position % tl.maximum(memory, 1)
    ring_row = ring_pointer
    if KERNEL > 1:
        ring_row = ring_pointer + n * memory * channels

    acc = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    acc_gate = acc
    depth = of_group * KERNEL
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        w_pointers = w_pointer + (value.to(tl.int64)[:, None] * depth + k[None, :])
        w_mask = wanted[:, None] & (k < depth)[None, :]
        w = tl.load(w_pointers, mask=w_mask, other=0.0).to(tl.float32)
        if GROUPED:
            tap = tl.broadcast_to((k % KERNEL)[None, :], [BLOCK_R, BLOCK_K])
            channel = (value // group_rows * of_group)[:, None] + (k // KERNEL)[None, :]
            x = inputs_of(
                channel, tap, w_mask, x_row, x_strides[1], ring_row, oldest, memory, dilation, channels, KERNEL
            )
        else:
            x = inputs_of(
                k // KERNEL, k % KERNEL, k < depth, x_row, x_strides[1], ring_row, oldest, memory, dilation, channels,
                KERNEL,
            )[None, :]  # fmt: skip
        acc += w * x
        if GATED:
            w = tl.load(w_pointers + tl.cast(values, tl.int64) * depth, mask=w_mask, other=0.0).to(tl.float32)
            if GROUPED:
                channel = ((value + values) // group_rows * of_group)[:, None] + (k // KERNEL)[None, :]
                x = inputs_of(
                    channel, tap, w_mask, x_row, x_strides[1], ring_row, oldest, memory, dilation, channels, KERNEL
                )
            acc_gate += w * x

    z = tl.sum(acc, 1)
    if bias_pointer is not None:
        z += tl.load(bias_pointer + value, mask=wanted, other=0.0).to(tl.float32)
    if GATED:
        gate = tl.sum(acc_gate, 1)
        if bias_pointer is not None:
            gate += tl.load(bias_pointer + values + value, mask=wanted, other=0.0).to(tl.float32)
        a = tanh(z) * sigmoid(gate)
    elif ACTIVATION == "leaky_relu":
        a = tl.where(z > 0, z, slope * z)
    else:
        a = activate(z, ACTIVATION)

    if MIXED:
        if out_w_pointer is not None:
            mix(
                a, value, values, channels, out_w_pointer, out_bias_pointer, x_row, x_strides[1], y_pointer + n * channels,
                BLOCK_R, BLOCK_K,
            )  # fmt: skip
        if skip_w_pointer is not None:
            skip_row = skip_pointer
            if skip_pointer is not None:
                skip_row = skip_pointer + n * skip_strides[0]
            mix(
                a, value, values, skips, skip_w_pointer, skip_bias_pointer, skip_row, skip_strides[1],
                total_pointer + n * skips, BLOCK_R, BLOCK_K,
            )  # fmt: skip
    if MIXED == 0 or out_w_pointer is None:
        if added_pointer is not None:
            pointers = added_pointer + n * added_strides[0] + value.to(tl.int64) * added_strides[1]
            a += tl.load(pointers, mask=wanted, other=0.0).to(tl.float32)
        tl.store(y_pointer + n * values + value, a.to(y_pointer.dtype.element_ty), mask=wanted)

    if position_pointer is not None:
        tl.debug_barrier()  # all threads have read the ring and the position
        arrived = tl.atomic_add(position_pointer, TICKET) // TICKET
        if arrived == tl.num_programs(0) - 1:
            if KERNEL > 1:
                for start in range(0, batch * channels, BLOCK_C):
                    i = start + tl.arange(0, BLOCK_C)
                    sequence, c = (i // channels).to(tl.int64), i % channels
                    mask = sequence < batch
                    newest = tl.load(
                        x_pointer + sequence * x_strides[0] + c.to(tl.int64) * x_strides[1], mask=mask, other=0.0
                    )
                    tl.store(ring_pointer + (sequence * memory + oldest) * channels + c, newest, mask=mask)
            tl.store(position_pointer, position + 1)
