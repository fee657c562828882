"""The launchers of the Triton kernels in triton_forward.py and triton_backward.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from bigmodel_kernels import _triton, _tuned
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


class _Plan(NamedTuple):
    """All of a kernel's launch that does not depend on the tensors' addresses."""

    sizes: dict[str, int]  # of tiles, warps, ..
    constants: dict[str, Any]
    numbers: tuple
    described: tuple[tuple, ...] | None  # q, k, v: shape, strides, tile, for the copy engine


class _Call:
    """What the kernels of calls with the same sizes, strides and options have in common."""

    def __init__(
        self, gpu, device, element_size, precision, q, k, v, mask, slopes, scale, dropout_p, softcap, window_left,
        window_right, lower_right,
    ):  # fmt: skip
        self.q, self.k, self.v = q, k, v  # (shape, strides)
        (batch, self.heads, self.q_len, head_dim), (_, self.kv_heads, self.k_len, _) = q[0], k[0]
        value_dim = v[0][3]
        self.batch_heads = batch * self.heads
        self.group = self.heads // self.kv_heads if self.kv_heads else 1
        self.gpu, self.device, self.element_size, self.head_dim = gpu, device, element_size, max(head_dim, value_dim)
        self.dropout = dropout_p > 0
        if not scale > 0:
            scale = -scale or 1.0
        mask_strides = (0,) * 4
        if mask is not None:
            mask_strides = tuple(s if n > 1 else 0 for n, s in zip(*mask[1:]))
        slopes_stride = self.heads if slopes is not None and slopes > 1 else 0
        self.strides = (q[1], k[1], v[1], mask_strides, slopes_stride)
        reach = self.q_len + self.k_len
        offset = self.k_len - self.q_len if lower_right else 0
        self.numbers = (
            self.q_len, self.k_len, offset, min(window_left, reach), min(window_right, reach),
            scale, softcap, _triton.dropout_threshold(dropout_p), kept_scale(dropout_p),
        )  # fmt: skip
        kind = NO_MASK if mask is None else BOOL_MASK if mask[0] == torch.bool else ADDED_MASK
        self.constants = constants_of(
            head_dim, value_dim, kind, slopes is not None, softcap > 0, self.dropout, window_left >= 0, window_right >= 0,
            precision,
        )  # fmt: skip
        self.plans: dict[tuple[str, bool], _Plan] = {}

    def plan(self, kernel: str, pointers: bool = False) -> _Plan:
        """For `forward`, `query` or `key`; `mask` has numbers of its own."""
        found = self.plans.get((kernel, pointers))
        if found is None:
            found = self.plans[kernel, pointers] = self._make_plan(kernel, pointers)
        return found

    def _make_plan(self, kernel: str, pointers: bool) -> _Plan:
        sizes = config(self.gpu, self.device, kernel, self.element_size, self.head_dim, self.dropout, pointers)
        rows = self.q_len * self.group if kernel == "key" else self.k_len  # that programs of a head have in common
        together = heads_together(rows, self.head_dim * self.element_size, self.batch_heads)
        described = None
        if sizes.get("DESCRIPTORS"):
            widths = [self.constants[name] for name in ("BLOCK_D", "BLOCK_D", "BLOCK_DV")]
            tall = [sizes[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_N")]
            legal = [_triton.described(*t, self.element_size) for t in (self.q, self.k, self.v)]
            if None not in legal:
                described = tuple((*fields, [1, 1, m, n]) for fields, m, n in zip(legal, tall, widths))
        numbers = (self.heads, self.group, self.batch_heads, together, *self.numbers)
        return _Plan(sizes, self.constants | sizes, numbers, described)


def constants_of(
    head_dim: int, value_dim: int, mask: tl.constexpr, alibi: bool, softcap: bool, dropout: bool, left: bool, right: bool,
    precision: str,
) -> dict[str, Any]:  # fmt: skip
    """The launch constants of all kernels that do not come from a table."""
    return {
        "D": head_dim, "DV": value_dim, "BLOCK_D": block_of(head_dim), "BLOCK_DV": block_of(value_dim), "MASK": mask.value,
        "ALIBI": alibi, "SOFTCAP": softcap, "DROPOUT": dropout, "LEFT": left, "RIGHT": right, "PRECISION": precision,
    }  # fmt: skip


def heads_together(rows: int, row_bytes: int, heads: int) -> int:
    """How many heads' programs run at the same time (see tile_of_program) if those of a head read `rows` rows twice."""
    return max(1, min(L2_BYTES // max(1, rows * 2 * row_bytes), heads))


def kept_scale(dropout_p: float) -> float:
    """What the weights that dropout keeps are multiplied by."""
    return 1 / (1 - dropout_p) if dropout_p < 1 else 0.0


def sign(scale: float) -> float:
    """The kernels want scores that grow with the product: the sign of a scale (and 0) goes into q."""
    return -1.0 if scale < 0 else 0.0


def block_of(size: int) -> int:
    return max(SMALLEST_BLOCK, 1 << (size - 1).bit_length())


# A model calls with the same few sizes again and again.
_known_call = _tuned.cached(_Call)


def _call(
    q, k, v, attn_mask, alibi_slopes, seed, scale, dropout_p, softcap, window_left, window_right, lower_right, *rest
) -> tuple[_Call, tuple[Tensor, ...]]:  # fmt: skip
    """With the first tensors of its kernels."""
    if not scale > 0:
        q = q * sign(scale)
    device = q.device.index
    call = _known_call(
        _triton.gpu(device), device, q.element_size(), _triton.precision(q.dtype),
        (q.shape, q.stride()), (k.shape, k.stride()), (v.shape, v.stride()),
        None if attn_mask is None else (attn_mask.dtype, attn_mask.shape, attn_mask.stride()),
        None if alibi_slopes is None else alibi_slopes.shape[0],
        scale, dropout_p, softcap, window_left, window_right, lower_right,
    )  # fmt: skip
    mask, slopes, seed = (q if t is None else t for t in (attn_mask, alibi_slopes, seed))
    return call, (q, k, v, mask, slopes, seed)


def _operands(call: _Call, kernel: str, tensors: tuple, *more: Tensor) -> tuple[_Plan, tuple, tuple]:
    """The plan of a launch, its first tensors and `more` of the shape of the result: as descriptors if all can be."""
    plan = call.plan(kernel)
    constants = plan.constants
    if not constants["DESCRIPTORS"]:
        return plan, tensors, more
    q, k, v, mask, slopes, seed = tensors
    if plan.described is not None and not (q.data_ptr() | k.data_ptr() | v.data_ptr()) % _triton.DESCRIPTOR_BYTES:
        tile = [1, 1, constants["BLOCK_M"], constants["BLOCK_DV"]]
        upstream = tuple([_triton.descriptor(t, tile) for t in more])
        if None not in upstream:
            of_q, of_k, of_v = plan.described
            described = (
                _triton.Descriptor(q, *of_q),
                _triton.Descriptor(k, *of_k),
                _triton.Descriptor(v, *of_v),
            )
            return plan, (*described, mask, slopes, seed), upstream
    return call.plan(kernel, pointers=True), tensors, more


def fwd(
    q, k, v, attn_mask, alibi_slopes, seed, scale, dropout_p, softcap, window_left, window_right, lower_right,
    return_lse, deterministic, save,
):  # fmt: skip
    call, tensors = _call(
        q, k, v, attn_mask, alibi_slopes, seed, scale, dropout_p, softcap, window_left, window_right, lower_right
    )
    out = heads_inside(q, q.shape[0], call.heads, call.q_len, v.shape[3])
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    plan, tensors, _ = _operands(call, "forward", tensors)
    _triton.launch(
        forward_kernel, call.batch_heads * -(-call.q_len // plan.sizes["BLOCK_M"]),
        *tensors, out, lse, None, None, *call.strides, out.stride(), *plan.numbers, **plan.constants,
    )  # fmt: skip
    return out, lse


def bwd(
    grad_out, grad_lse, out, lse, kept, mask_grad,
    q, k, v, attn_mask, alibi_slopes, seed, scale, dropout_p, softcap, window_left, window_right, lower_right,
    return_lse, deterministic, save,
):  # fmt: skip
    call, first = _call(
        q, k, v, attn_mask, alibi_slopes, seed, scale, dropout_p, softcap, window_left, window_right, lower_right
    )
    lse = lse.contiguous()
    delta = torch.empty_like(lse)

    dq = heads_inside(q, q.shape[0], call.heads, call.q_len, q.shape[3])
    plan, tensors, upstream = _operands(call, "query", first, grad_out)
    _triton.launch(
        query_kernel, call.batch_heads * -(-call.q_len // plan.sizes["BLOCK_M"]),
        *tensors, out, *upstream, lse, lse if grad_lse is None else grad_lse.contiguous(), delta, dq, None, None,
        *call.strides, out.stride(), grad_out.stride(), dq.stride(), *plan.numbers, GRAD_LSE=grad_lse is not None,
        **plan.constants,
    )  # fmt: skip
    if not scale > 0:
        dq.mul_(sign(scale))

    dk = heads_inside(k, k.shape[0], call.kv_heads, call.k_len, k.shape[3])
    dv = heads_inside(v, k.shape[0], call.kv_heads, call.k_len, v.shape[3])
    plan, tensors, upstream = _operands(call, "key", first, grad_out)
    _triton.launch(
        key_kernel, k.shape[0] * call.kv_heads * -(-call.k_len // plan.sizes["BLOCK_N"]),
        *tensors, *upstream, lse, delta, dk, dv, None, None,
        *call.strides, grad_out.stride(), dk.stride(), dv.stride(), *plan.numbers, **plan.constants,
    )  # fmt: skip

    if not mask_grad:
        return dq, dk, dv, q.new_empty(0)
    dmask = torch.empty(attn_mask.shape, dtype=attn_mask.dtype, device=q.device)
    batches, heads, rows, columns = dmask.shape
    plan = call.plan("mask")
    _triton.launch(
        mask_kernel, batches * heads * -(-rows // plan.sizes["BLOCK_M"]) * -(-columns // plan.sizes["BLOCK_N"]),
        *first, grad_out, lse, delta, dmask, *call.strides, grad_out.stride(), call.heads, call.group, *call.numbers,
        heads, rows, columns, q.shape[0] // max(batches, 1), call.heads // max(heads, 1),
        ONE_ROW=rows == 1, ONE_COLUMN=columns == 1, **plan.constants,
    )  # fmt: skip
    return dq, dk, dv, dmask
