"""PyTorch's own attention: the fallback, and the baseline that every other backend is measured against."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bigmodel_kernels.ops.attention import reference

WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def supports(*args) -> str | None:
    return None


def nan_in_cudnn(q: Tensor, k: Tensor, attn_mask: Tensor | None) -> bool:
    """Whether cuDNN's backward may give NaNs: with a mask, 64 positions past a multiple of 128, for rows whose lse is below
    -88.7 (PyTorch issue 196678). What the lse will be is not known beforehand."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    return half and attn_mask is not None and torch.is_grad_enabled() and 64 in (q.shape[2] % 128, k.shape[2] % 128)


def _plain(softcap: float, return_lse: bool) -> bool:
    """Whether F.scaled_dot_product_attention can say it, given a mask."""
    return softcap == 0 and not return_lse


def _sdpa_arguments(q, k, attn_mask, alibi_slopes, scale, dropout_p, window_left, window_right, lower_right) -> dict:
    """The call a user would write: is_causal alone where that is all, everything else folded into attn_mask."""
    causal = window_left < 0 and window_right == 0 and (not lower_right or q.shape[2] == k.shape[2])
    limited = window_left >= 0 or window_right >= 0
    causal = causal and attn_mask is None and alibi_slopes is None
    mask = attn_mask
    if mask is not None and mask.dtype not in (torch.bool, q.dtype):
        mask = mask.to(q.dtype)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(reference.arithmetic_dtype(q))
        bias = reference.alibi(q, k, slopes, lower_right).to(q.dtype)
        if mask is None:
            mask = bias
        else:
            mask = bias.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else bias + mask
    if limited and not causal:
        inside = reference.allowed(q, k, window_left, window_right, lower_right)
        if mask is None:
            mask = inside
        else:
            mask = mask & inside if mask.dtype == torch.bool else mask.masked_fill(~inside, -math.inf)
    gqa = bool(q.shape[1] != k.shape[1])  # a tensor under torch.jit.trace
    return {"attn_mask": mask, "is_causal": causal, "scale": scale, "dropout_p": dropout_p, "enable_gqa": gqa}


def call(
    q, k, v, attn_mask, alibi_slopes, seed, scale, dropout_p, softcap, window_left, window_right, lower_right,
    return_lse, deterministic, save,
):  # fmt: skip
    """(out, lse or None), differentiable by PyTorch's own autograd."""
    if _plain(softcap, return_lse):
        limits = (window_left, window_right, lower_right)
        options = _sdpa_arguments(q, k, attn_mask, alibi_slopes, scale, dropout_p, *limits)
        if q.is_cuda and nan_in_cudnn(q, k, options["attn_mask"]):
            with sdpa_kernel(WITHOUT_CUDNN):
                return F.scaled_dot_product_attention(q, k, v, **options), None
        return F.scaled_dot_product_attention(q, k, v, **options), None
    if dropout_p > 0 and seed is None:
        seed = torch.randint(0, 2**62, (1,), dtype=torch.int64, device=q.device)
    return reference.fwd(
        q, k, v, attn_mask, alibi_slopes, seed, scale, dropout_p, softcap, window_left, window_right, lower_right
    )


def plan(q, k, v, attn_mask, alibi_slopes, seed, *options):
    """`call` without masks for arguments of these shapes and options as a function of q, k and v."""
    scale, dropout_p, softcap, window_left, window_right, lower_right, return_lse, *_ = options
    limited = window_left >= 0 or window_right >= 0
    if limited or not _plain(softcap, return_lse):
        return lambda q, k, v: call(q, k, v, None, None, None, *options)[0]
    known = _sdpa_arguments(q, k, None, None, scale, dropout_p, window_left, window_right, lower_right)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **known)


def _heads_inside(t: Tensor) -> Tensor:
    """The same [B, H, S, D], stored as [B, S, H, D]: the layout of all results."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def _rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.numel() == 0 else t.contiguous()


def _flash(q, k, v, softcap, return_lse, dropout_p, mask_grad) -> bool:
    """Whether PyTorch's own forward/backward pair on the CPU has it. Its lse is 0, not -inf, where nothing is attended."""
    same = q.shape[3] == v.shape[3] and min(q.numel(), k.numel()) > 0
    return q.is_cpu and same and _plain(softcap, return_lse) and dropout_p == 0 and not mask_grad


def _flash_arguments(q, k, attn_mask, alibi_slopes, scale, window_left, window_right, lower_right):
    options = _sdpa_arguments(q, k, attn_mask, alibi_slopes, scale, 0.0, window_left, window_right, lower_right)
    mask, causal = options["attn_mask"], options["is_causal"]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf)
    return causal, {"attn_mask": mask, "scale": scale}


def fwd(
    q, k, v, attn_mask, alibi_slopes, seed, scale, dropout_p, softcap, window_left, window_right, lower_right,
    return_lse, deterministic, save,
):  # fmt: skip
    if _flash(q, k, v, softcap, return_lse, dropout_p, False):
        limits = (window_left, window_right, lower_right)
        causal, options = _flash_arguments(q, k, attn_mask, alibi_slopes, scale, *limits)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(_rows(q), _rows(k), _rows(v), 0.0, causal, **options)
    else:
        out, lse = reference.fwd(
            q, k, v, attn_mask, alibi_slopes, seed, scale, dropout_p, softcap, window_left, window_right, lower_right
        )
    return _heads_inside(out), lse.contiguous()


def bwd(
    grad_out, grad_lse, out, lse, kept, mask_grad,
    q, k, v, attn_mask, alibi_slopes, seed, scale, dropout_p, softcap, window_left, window_right, lower_right,
    return_lse, deterministic, save,
):  # fmt: skip
    if _flash(q, k, v, softcap, return_lse, dropout_p, mask_grad):
        limits = (window_left, window_right, lower_right)
        causal, options = _flash_arguments(q, k, attn_mask, alibi_slopes, scale, *limits)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = flash(_rows(grad_out), _rows(q), _rows(k), _rows(v), out, lse, 0.0, causal, **options)
        dmask = q.new_empty(0)
    else:
        if not return_lse:  # the forward of the pair may have been the flash op, with its own meaning of lse
            out, lse = reference.fwd(
                q,
                k,
                v,
                attn_mask,
                alibi_slopes,
                seed,
                scale,
                dropout_p,
                softcap,
                window_left,
                window_right,
                lower_right,
            )
        dq, dk, dv, dmask = reference.bwd(
            grad_out, grad_lse, out, lse, mask_grad,
            q, k, v, attn_mask, alibi_slopes, seed, scale, dropout_p, softcap, window_left, window_right, lower_right,
        )  # fmt: skip
    return _heads_inside(dq), _heads_inside(dk), _heads_inside(dv), dmask.contiguous()
