"""The C++ kernels of csrc/cpu/attention_*.h."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from bigmodel_kernels import _cpu, _extension
from bigmodel_kernels._library import function_apply, gradients, is_plainly_grad, unwrapped
from bigmodel_kernels.ops.attention import op


def supports(q, k, v, attn_mask, *rest) -> str | None:
    return _cpu.reason(q, "q")


@functools.cache
def _native() -> tuple[Callable, Callable]:
    """The operators; to look one up by its name takes as long as to hand it its arguments."""
    return torch.ops.bigmodel_native.attention_fwd.default, torch.ops.bigmodel_native.attention_bwd.default


def _run(native: Callable, *args):
    try:
        return native(*args)
    except RuntimeError as error:
        if (lack := _extension.lack_of_memory(error, "attention", args)) is None:
            raise
        raise lack from error


class _Recorded(torch.autograd.Function):
    """A call without masks whose one result is out, as `_EagerPair` would run it, by fewer steps of Python: they take up to eight
    times as long where a kernel has just filled the caches."""

    @staticmethod
    def forward(ctx, known, q, k, v):
        out, lse, kept = _run(_native()[0], q, k, v, *known[1])  # kept may be None
        ctx.known = known
        ctx.save_for_backward(q, k, v, out, lse, kept)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse, kept = ctx.saved_tensors
        options, given = ctx.known
        if is_plainly_grad(grad):
            return None, *_run(_native()[1], grad, None, out, lse, kept, False, q, k, v, *given)[:3]
        args, needs = (q, k, v, None, None, None, *options), (*ctx.needs_input_grad[1:], *[False] * (3 + len(options)))
        return None, *gradients(op.OP, "cpu", args, (), needs, (out, lse, kept), (grad, None))[:3]


_apply = function_apply(_Recorded)


def plan(*args):
    """`fwd` without masks for such arguments as a function of q, k and v."""
    options, save = args[6:], bool(args[-1])
    given = (None, None, None, *options[:6], save)  # what both operators are given last
    if save:
        known = options, given
        return lambda q, k, v: _apply(known, unwrapped(q), unwrapped(k), unwrapped(v))
    native = _native()[0]
    return lambda q, k, v: _run(native, q, k, v, *given)[0]


def fwd(*args):  # lse comes always, and every result is deterministic
    outputs = _native()[0](*args[:12], args[-1] > op.NOTHING)
    return outputs[:2] if outputs[2] is None else outputs


def bwd(*args):
    return _native()[1](*args[:18], False)


def bwd_freely(*args):
    """As bwd, with gradients that lie as their tensors do."""
    return _native()[1](*args[:18], True)
