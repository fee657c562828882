"""The launchers of the Triton kernels in triton_forward.py and triton_backward.py."""

from __future__ import annotations

import torch

from bigmodel_kernels import _triton
from bigmodel_kernels.ops.attention.op import heads_inside
from bigmodel_kernels.ops.attention.triton_backward import key_kernel, mask_kernel, query_kernel
from bigmodel_kernels.ops.attention.triton_configs import config
from bigmodel_kernels.ops.attention.triton_forward import forward_kernel
from bigmodel_kernels.ops.attention.triton_tile import ADDED_MASK, BOOL_MASK, NO_MASK

LARGEST_HEAD_DIM = 256
SMALLEST_BLOCK = 16  # what the matrix units take
L2_BYTES = 32 << 20  # of keys and values that programs running at the same time should share


def supports(q, k, v, *rest) -> str | None:
    if (why := _triton.reason(q)) is not None:
        return why
    if max(q.shape[3], v.shape[3]) > LARGEST_HEAD_DIM:
        return f"the kernels take head dimensions up to {LARGEST_HEAD_DIM}, got {q.shape[3]} and {v.shape[3]}"
    return None


class _Call:
    """What the kernels of one call have in common."""

    def __init__(
        self, q, k, v, attn_mask, alibi_slopes, seed, scale, dropout_p, softcap, window_left, window_right, lower_right
    ):
        self.q_len, self.k_len = q.shape[2], k.shape[2]
        self.heads, self.kv_heads = q.shape[1], k.shape[1]
        self.batch_heads = q.shape[0] * self.heads
        self.group = self.heads // self.kv_heads if self.kv_heads else 1
        self.element_size, self.head_dim = q.element_size(), max(q.shape[3], v.shape[3])
        self.gpu = _triton.gpu(q.device.index)
        self.dropout = dropout_p > 0
        # The kernels want scores that grow with the product: the sign of a scale (and 0) goes into q.
        self.sign = 1.0
        if not scale > 0:
            self.sign = -1.0 if scale < 0 else 0.0
            q, scale = q * self.sign, -scale or 1.0
        self.tensors = (q, k, v, *(q if t is None else t for t in (attn_mask, alibi_slopes, seed)))
        strides = (0,) * 4
        if attn_mask is not None:
            strides = tuple(s if n > 1 else 0 for s, n in zip(attn_mask.stride(), attn_mask.shape))
        slopes_stride = self.heads if alibi_slopes is not None and alibi_slopes.shape[0] > 1 else 0
        self.strides = (q.stride(), k.stride(), v.stride(), strides, slopes_stride)
        reach = self.q_len + self.k_len
        offset = self.k_len - self.q_len if lower_right else 0
        self.limits = (self.q_len, self.k_len, offset, min(window_left, reach), min(window_right, reach))
        kept = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
        self.numbers = (scale, softcap, _triton.dropout_threshold(dropout_p), kept)
        self.constants = {
            "D": q.shape[3],
            "DV": v.shape[3],
            "BLOCK_D": _block(q.shape[3]),
            "BLOCK_DV": _block(v.shape[3]),
            "MASK": (
                NO_MASK if attn_mask is None else BOOL_MASK if attn_mask.dtype == torch.bool else ADDED_MASK
            ).value,
            "ALIBI": alibi_slopes is not None,
            "SOFTCAP": softcap > 0,
            "DROPOUT": self.dropout,
            "LEFT": window_left >= 0,
            "RIGHT": window_right >= 0,
            "PRECISION": _triton.precision(q.dtype),
        }

    def config(self, kernel: str) -> dict[str, int]:
        return config(self.gpu, kernel, self.element_size, self.head_dim, self.dropout)

    def counts(self, length: int, head_dim_bytes: int) -> tuple[int, int, int, int]:
        """heads, group, batch_heads, together: see tile_of_program."""
        together = L2_BYTES // max(1, length * head_dim_bytes)
        return self.heads, self.group, self.batch_heads, max(1, min(together, self.batch_heads))


def _block(size: int) -> int:
    return max(SMALLEST_BLOCK, 1 << (size - 1).bit_length())


def fwd(
    q, k, v, attn_mask, alibi_slopes, seed, scale, dropout_p, softcap, window_left, window_right, lower_right,
    return_lse, deterministic,
):  # fmt: skip
    call = _Call(
        q, k, v, attn_mask, alibi_slopes, seed, scale, dropout_p, softcap, window_left, window_right, lower_right
    )
    out = heads_inside(q, q.shape[0], call.heads, call.q_len, v.shape[3])
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    sizes = call.config("forward")
    _triton.launch(
        forward_kernel, call.batch_heads * -(-call.q_len // sizes["BLOCK_M"]),
        *call.tensors, out, lse, *call.strides, out.stride(),
        *call.counts(call.k_len, 2 * call.head_dim * call.element_size), *call.limits, *call.numbers, **call.constants, **sizes,
    )  # fmt: skip
    return out, lse


def bwd(
    grad_out, grad_lse, out, lse, mask_grad,
    q, k, v, attn_mask, alibi_slopes, seed, scale, dropout_p, softcap, window_left, window_right, lower_right,
    return_lse, deterministic,
):  # fmt: skip
    call = _Call(
        q, k, v, attn_mask, alibi_slopes, seed, scale, dropout_p, softcap, window_left, window_right, lower_right
    )
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    bytes_per_row = 2 * call.head_dim * call.element_size

    dq = heads_inside(q, q.shape[0], call.heads, call.q_len, q.shape[3])
    sizes = call.config("query")
    _triton.launch(
        query_kernel, call.batch_heads * -(-call.q_len // sizes["BLOCK_M"]),
        *call.tensors, out, grad_out, lse, lse if grad_lse is None else grad_lse.contiguous(), delta, dq,
        *call.strides, out.stride(), grad_out.stride(), dq.stride(),
        *call.counts(call.k_len, bytes_per_row), *call.limits, *call.numbers,
        GRAD_LSE=grad_lse is not None, **call.constants, **sizes,
    )  # fmt: skip
    if call.sign != 1:
        dq.mul_(call.sign)

    dk = heads_inside(k, k.shape[0], call.kv_heads, call.k_len, k.shape[3])
    dv = heads_inside(v, k.shape[0], call.kv_heads, call.k_len, v.shape[3])
    sizes = call.config("key")
    _triton.launch(
        key_kernel, k.shape[0] * call.kv_heads * -(-call.k_len // sizes["BLOCK_N"]),
        *call.tensors, grad_out, lse, delta, dk, dv,
        *call.strides, grad_out.stride(), dk.stride(), dv.stride(),
        *call.counts(call.q_len * call.group, bytes_per_row), *call.limits, *call.numbers, **call.constants, **sizes,
    )  # fmt: skip

    if not mask_grad:
        return dq, dk, dv, q.new_empty(0)
    dmask = torch.empty(attn_mask.shape, dtype=attn_mask.dtype, device=q.device)
    batches, heads, rows, columns = dmask.shape
    sizes = call.config("mask")
    _triton.launch(
        mask_kernel, batches * heads * -(-rows // sizes["BLOCK_M"]) * -(-columns // sizes["BLOCK_N"]),
        *call.tensors, grad_out, lse, delta, dmask, *call.strides, grad_out.stride(),
        call.heads, call.group, *call.limits, *call.numbers,
        heads, rows, columns, q.shape[0] // max(batches, 1), call.heads // max(heads, 1),
        ONE_ROW=rows == 1, ONE_COLUMN=columns == 1, **call.constants, **sizes,
    )  # fmt: skip
    return dq, dk, dv, dmask
