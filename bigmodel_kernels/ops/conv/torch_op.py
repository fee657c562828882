"""PyTorch's own convolution and what a user writes after it: `call` with its own autograd; `fwd` and `bwd` are its forward
and backward operators, for compiled graphs, whose backend is chosen only when they run."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from bigmodel_kernels.ops.conv import reference


def supports(*args) -> str | None:
    return None


def _folded(x, weight, bias, scale, shift, padding, transposed, groups):
    """The convolution's arguments with the normalisation folded into the weights, and padding as PyTorch takes it."""
    if padding[::2] != padding[1::2]:
        pads = [p for i in reversed(range(len(padding) // 2)) for p in padding[2 * i : 2 * i + 2]]
        x, padding = F.pad(x, pads), [0] * len(padding)
    if scale is not None:
        weight = weight * reference.per_output_channel(scale, weight, transposed, groups)
        bias = None if bias is None else bias * scale
    if shift is not None:
        bias = shift if bias is None else bias + shift
    return x, weight, bias, list(padding[::2])


def _convolution(x, weight, bias, scale, shift, stride, padding, dilation, groups, transposed, output_padding):
    # Fresh memory for folded weights costs more than a pass over a smaller y.
    if scale is not None and weight.numel() > x.numel():
        y = _convolution(x, weight, bias, None, None, stride, padding, dilation, groups, transposed, output_padding)
        return _scaled(y, scale, shift)
    x, weight, bias, padding = _folded(x, weight, bias, scale, shift, padding, transposed, groups)
    if (
        groups == 1
        and not transposed
        and not any(padding)
        and math.prod(x.shape[2:]) == math.prod(weight.shape[2:]) == 1
    ):
        y = F.linear(x.flatten(1), weight.flatten(1), bias)  # one pixel: PyTorch's product is its faster kernel
        return y.view(*y.shape, *x.shape[2:])
    return torch.convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups)


def _scaled(y, scale, shift):
    """scale * y + shift"""
    scale, shift = (t if t is None else t.view(-1, *[1] * (y.dim() - 2)) for t in (scale, shift))
    return y * scale if shift is None else torch.addcmul(shift, y, scale)


def call(
    x, weight, bias, scale, shift, residual, stride, padding, dilation, groups, transposed, output_padding, activation,
    pool, pool_size, pool_stride, pool_padding, slope, save,
):  # fmt: skip
    y = _convolution(x, weight, bias, scale, shift, stride, padding, dilation, groups, transposed, output_padding)
    if residual is not None:
        y = y.add_(residual)
    y = y.relu_() if activation == "relu" else reference.activate(y, activation, slope)
    if pool == "max":
        y = (F.max_pool1d if x.dim() == 3 else F.max_pool2d)(y, pool_size, pool_stride, pool_padding)
    elif pool == "avg":
        y = (F.avg_pool1d if x.dim() == 3 else F.avg_pool2d)(y, pool_size, pool_stride)
    return y, None, None


def plan(x, weight, bias, scale, shift, residual, *options):
    """`call` for arguments of these shapes and options as a function of the six tensors."""
    stride, padding, dilation, groups, transposed, output_padding, activation, pool, *_ = options
    one_pixel = math.prod(x.shape[2:]) == math.prod(weight.shape[2:]) == 1
    extra = scale is not None or shift is not None or residual is not None or pool != "none"
    if extra or one_pixel or activation not in ("none", "relu") or padding[::2] != padding[1::2]:
        return lambda *tensors: call(*tensors, *options)[0]
    options = (stride, padding[::2], dilation, transposed, output_padding, groups)
    if activation == "none":
        return lambda x, weight, bias, *rest: torch.convolution(x, weight, bias, *options)
    return lambda x, weight, bias, *rest: torch.convolution(x, weight, bias, *options).relu_()


def fwd(
    x, weight, bias, scale, shift, residual, stride, padding, dilation, groups, transposed, output_padding, activation,
    pool, pool_size, pool_stride, pool_padding, slope, save,
):  # fmt: skip
    from bigmodel_kernels.ops.conv import op

    if not save:
        out = call(
            x, weight, bias, scale, shift, residual, stride, padding, dilation, groups, transposed, output_padding,
            activation, pool, pool_size, pool_stride, pool_padding, slope, save,
        )[0]  # fmt: skip
        index, pre = x.new_empty(0, dtype=torch.uint8), x.new_empty(0)
    else:
        y = _convolution(x, weight, bias, scale, shift, stride, padding, dilation, groups, transposed, output_padding)
        out, index, pre = reference.tail(y, residual, activation, pool, pool_size, pool_stride, pool_padding, slope)
        index = reference.channels_innermost(index) if pool == "max" else index
        pre = reference.channels_innermost(pre) if op.saves_pre(activation, pool) else x.new_empty(0)
    out = reference.channels_innermost(out) if op.gives_channels_last(x, weight) else out.contiguous()
    return out, index, pre


def bwd(
    grad, out, index, pre, needs, x, weight, bias, scale, shift, residual, stride, padding, dilation, groups, transposed,
    output_padding, activation, pool, pool_size, pool_stride, pool_padding, slope, save,
):  # fmt: skip
    from bigmodel_kernels.ops.conv import op

    geometry = (stride, padding, dilation, groups, transposed, output_padding)
    pooling = (pool, pool_size, pool_stride, pool_padding)
    full, _, _ = op.shapes(x, weight, *geometry, activation, *pooling)
    d = reference.tail_gradient(grad, out, index, pre, full, activation, *pooling, slope)
    padded, folded, _, pads = _folded(x, weight, None, scale, None, padding, transposed, groups)
    # dw does not depend on the weights, so it is that of the unscaled convolution.
    want_dw = bool(needs[1] or needs[3])
    dx, dw, _ = torch.ops.aten.convolution_backward(
        d,
        padded,
        folded,
        None,
        stride,
        pads,
        dilation,
        transposed,
        output_padding,
        groups,
        [bool(needs[0]), want_dw, False],
    )
    if dx is not None and padded is not x:
        for axis, size in enumerate(x.shape[2:]):
            dx = dx.narrow(axis + 2, padding[2 * axis], size)
    found = reference.finish(d, dx, dw, weight, bias, scale, transposed, groups, needs)
    return _as_promised(found, x, needs)


def _as_promised(found, x, needs):
    """The gradients in the memory formats of the operator; those that are not wanted empty."""
    from bigmodel_kernels.ops.conv import op

    dx, *parameters, dresidual = (g if need else x.new_empty(0) for g, need in zip(found, needs))
    if needs[0]:
        dx = reference.channels_innermost(dx) if op.is_channels_last(x) else dx.contiguous()
    if needs[5]:
        dresidual = reference.channels_innermost(dresidual)
    if parameters[1] is parameters[3]:  # without a scale dbias is dshift, but no two results may share memory
        parameters[3] = parameters[3].clone()
    return dx, *(g.to(x.dtype).contiguous() for g in parameters), dresidual
