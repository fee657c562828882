"""The launcher of attention's Triton kernels for sequences laid end to end: one launch, without waiting for their lengths. An
interpreted kernel need not wait for them, and those that do not fit are refused, as on the CPU.

The grid follows from the numbers of tokens and of sequences alone, see triton_tile.tile_of_sequence; max_seqlen only says how
many heads should run at the same time. Tiles come by pointers: the copy engine would not stop at the end of a sequence, and
an infinity or NaN of the next one would count. "auto" does not choose it: it has not been measured on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigmodel_kernels import _triton, _tuned
from bigmodel_kernels.ops.attention.triton_backward import key_kernel, query_kernel
from bigmodel_kernels.ops.attention.triton_configs import config
from bigmodel_kernels.ops.attention.triton_forward import forward_kernel
from bigmodel_kernels.ops.attention.triton_kernels import (
    LARGEST_HEAD_DIM,
    constants_of,
    heads_together,
    kept_scale,
    sign,
)
from bigmodel_kernels.ops.attention.triton_tile import NO_MASK, PROBES
from bigmodel_kernels.ops.attention_varlen.torch_op import check_lengths


def supports(q, k, v, *rest) -> str | None:
    if (why := _triton.reason(q)) is not None:
        return why
    if max(q.shape[2], v.shape[2]) > LARGEST_HEAD_DIM:
        return f"the kernels take head dimensions up to {LARGEST_HEAD_DIM}, got {q.shape[2]} and {v.shape[2]}"
    return None


@_tuned.cached
def _constants(
    kernel: str, gpu: str, device: int | None, element_size: int, head_dim: int, value_dim: int, alibi: bool, softcap: bool,
    dropout: bool, left: bool, right: bool, precision: str, steps: int,
) -> dict[str, Any]:  # fmt: skip
    sizes = config(gpu, device, kernel, element_size, max(head_dim, value_dim), dropout, True, "attention_varlen")
    of_call = constants_of(head_dim, value_dim, NO_MASK, alibi, softcap, dropout, left, right, precision)
    return of_call | sizes | {"STEPS": steps}


def _steps(sequences: int) -> int:
    """In which a program finds its sequence, each of one part of PROBES."""
    return -(-max(1, (sequences - 1).bit_length()) // (PROBES.value.bit_length() - 1))


def _strides(t: Tensor) -> tuple[int, int, int, int]:
    """Of [tokens, H, D], in the order in which the kernels have those of [B, H, S, D]."""
    token, head, feature = t.stride()
    return 0, head, token, feature


class _Call:
    """What the kernels of a call have in common. Totals change from one batch to the next: nothing is kept under them."""

    def __init__(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, seed, max_seqlen_q, max_seqlen_k, scale, dropout_p,
        softcap, window_left, window_right, lower_right, return_lse, deterministic, save,
    ):  # fmt: skip
        if not scale > 0:
            q, scale = q * sign(scale), -scale or 1.0
        (total_q, heads, head_dim), (total_k, kv_heads, value_dim) = q.shape, v.shape
        device, size = q.device.index, q.element_size()
        self.sequences = len(cu_seqlens_q) - 1
        self.group = heads // kv_heads if kv_heads else 1
        self.of_q, self.of_k = (total_q, heads, max_seqlen_q), (total_k, kv_heads, max_seqlen_k)
        self.row_bytes = max(head_dim, value_dim) * size
        self.kind = (
            _triton.gpu(device), device, size, head_dim, value_dim, alibi_slopes is not None, softcap > 0, dropout_p > 0,
            window_left >= 0, window_right >= 0, _triton.precision(q.dtype), _steps(self.sequences),
        )  # fmt: skip
        self.tensors = q, k, v, q, q if alibi_slopes is None else alibi_slopes, q if seed is None else seed
        self.ends = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
        slopes_stride = 0 if alibi_slopes is None or alibi_slopes.shape[0] == 1 else heads
        self.strides = (_strides(q), _strides(k), _strides(v), (0, 0, 0, 0), slopes_stride)
        reach = total_q + total_k
        self.numbers = (
            total_q, total_k, int(lower_right), min(window_left, reach), min(window_right, reach), scale, softcap,
            _triton.dropout_threshold(dropout_p), kept_scale(dropout_p),
        )  # fmt: skip

    def launch(self, name: str, kernel, tensors: tuple, strides: tuple, **more) -> None:
        """A kernel whose own tensors follow those of all, and its strides theirs."""
        constants = _constants(name, *self.kind)
        if name == "key":
            (total, heads, _), rows, block = self.of_k, self.of_q[2] * self.group, constants["BLOCK_N"]
        else:
            (total, heads, _), rows, block = self.of_q, self.of_k[2], constants["BLOCK_M"]
        if total:
            _triton.launch(
                kernel, heads * (total // block + self.sequences),
                *self.tensors, *tensors, *self.ends, *self.strides, *strides,
                self.of_q[1], self.group, self.sequences * self.of_q[1], heads_together(rows, self.row_bytes, heads),
                *self.numbers, **more, **constants,
            )  # fmt: skip


def fwd(*args):
    if _triton.INTERPRETED:
        check_lengths(*args)
    call = _Call(*args)
    q, _, v = args[:3]
    total, heads, _ = q.shape
    out = q.new_empty(total, heads, v.shape[2])
    lse = q.new_empty(heads, total, dtype=torch.float32)
    call.launch("forward", forward_kernel, (out, lse), (_strides(out),))
    return out, lse


def bwd(grad_out, grad_lse, out, lse, kept, *args):
    call = _Call(*args)
    q, k, v = args[:3]
    scale = args[9]
    lse = lse.contiguous()
    delta, dq, dk, dv = torch.empty_like(lse), *(t.new_empty(t.shape) for t in (q, k, v))
    of_lse = lse if grad_lse is None else grad_lse.contiguous()
    strides = (_strides(out), _strides(grad_out), _strides(dq))
    call.launch("query", query_kernel, (out, grad_out, lse, of_lse, delta, dq), strides, GRAD_LSE=grad_lse is not None)
    if not scale > 0:
        dq.mul_(sign(scale))
    strides = (_strides(grad_out), _strides(dk), _strides(dv))
    call.launch("key", key_kernel, (grad_out, lse, delta, dk, dv), strides)
    return dq, dk, dv
