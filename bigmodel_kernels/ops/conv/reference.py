"""Convolution as its formula reads, tap by tap, and its gradient written out.

    u = convolution + bias        z = scale * u + shift + residual        out = pool(activation(z))

With d the gradient of z:
    dresidual = d      dshift = sum d      dbias = scale * dshift      dscale = sum d u = <weight, dw> + bias * dshift
    dx = the transposed convolution of scale * d      dweight = scale * dw,  dw[tap] = sum over pixels of d and x at that tap

`wide` is the side with more pixels: the input, or the output of a transposed convolution. Its pixel
narrow * stride + tap * dilation, counted with the padding, meets the narrow side's pixel through `tap`.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

NO_GRADIENT = 255  # in the index of a max-pool: the ReLU of this window is off
LEAKY_SLOPE = 0.01  # torch's default


def per_output_channel(values: Tensor, weight: Tensor, transposed: bool, groups: int) -> Tensor:
    """[Cout] in a shape that multiplies the weight."""
    if not transposed:
        return values.view(-1, *[1] * (weight.dim() - 1))
    per_group = values.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1)
    return per_group.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))


def _taps(weight: Tensor, narrow: list[int], stride, dilation):
    """Every tap with the slice of the padded wide side that it meets."""
    for tap in itertools.product(*(range(k) for k in weight.shape[2:])):
        starts = [t * d for t, d in zip(tap, dilation)]
        window = (..., *(slice(b, b + (n - 1) * s + 1, s) for b, n, s in zip(starts, narrow, stride)))
        yield tap, window


def _grouped(t: Tensor, groups: int) -> Tensor:  # [N, C, ..] -> [N, groups, C / groups, ..]
    return t.unflatten(1, (groups, -1))


def _pad(x: Tensor, padding) -> Tensor:
    return F.pad(x, [p for i in reversed(range(len(padding) // 2)) for p in padding[2 * i : 2 * i + 2]])


def _gather(wide: Tensor, weight: Tensor, narrow: list[int], stride, padding, dilation, groups) -> Tensor:
    """Narrow side from the wide one; weight [narrow channels, wide channels / groups, ..]."""
    wide = _pad(wide, padding)
    w = weight.unflatten(0, (groups, -1))  # [groups, narrow, wide, ..]
    out = 0
    for tap, window in _taps(weight, narrow, stride, dilation):
        out = out + torch.einsum("gow,ngw...->ngo...", w[(..., *tap)], _grouped(wide[window], groups))
    return out.flatten(1, 2)


def _scatter(narrow: Tensor, weight: Tensor, wide: list[int], stride, padding, dilation, groups) -> Tensor:
    """Wide side from the narrow one."""
    w = weight.unflatten(0, (groups, -1))
    channels = weight.shape[1] * groups
    sizes = [n + padding[2 * i] + padding[2 * i + 1] for i, n in enumerate(wide)]
    reach = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(narrow.shape[2:], stride, dilation, weight.shape[2:])]
    out = narrow.new_zeros(narrow.shape[0], channels, *(max(n, r) for n, r in zip(sizes, reach)))
    for tap, window in _taps(weight, list(narrow.shape[2:]), stride, dilation):
        part = torch.einsum("gow,ngo...->ngw...", w[(..., *tap)], _grouped(narrow, groups)).flatten(1, 2)
        out[window] = out[window] + part
    return out[(..., *(slice(padding[2 * i], padding[2 * i] + n) for i, n in enumerate(wide)))]


def activate(z: Tensor, activation: str, slope: float) -> Tensor:
    if activation == "relu":
        return z.relu()
    if activation == "leaky_relu":
        return F.leaky_relu(z, slope)
    if activation == "gelu":
        return F.gelu(z)
    if activation == "silu":
        return F.silu(z)
    if activation == "tanh":
        return z.tanh()
    if activation == "sigmoid":
        return z.sigmoid()
    if activation == "tanh_sigmoid":
        first, second = z.chunk(2, 1)
        return first.tanh() * second.sigmoid()
    return z


def activation_gradient(g: Tensor, out: Tensor, z: Tensor, activation: str, slope: float) -> Tensor:
    """g times the derivative; from `out` where that tells it, else from z, the value before the activation."""
    if activation == "relu":
        return torch.where(out <= 0, 0, g)
    if activation == "leaky_relu":
        return torch.where(out > 0, g, slope * g)
    if activation == "tanh":
        return g * (1 - out * out)
    if activation == "sigmoid":
        return g * out * (1 - out)
    if activation == "gelu":
        cdf = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
        return g * (cdf + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi))
    if activation == "silu":
        s = z.sigmoid()
        return g * s * (1 + z * (1 - s))
    if activation == "tanh_sigmoid":
        first, second = z.chunk(2, 1)
        t, s = first.tanh(), second.sigmoid()
        return torch.cat([g * s * (1 - t * t), g * t * s * (1 - s)], 1)
    return g


def _corners(windows: Tensor, stride, padding) -> tuple[Tensor, Tensor]:
    """Row and column of the first element of every window [.., PH, PW]."""
    rows, columns = (torch.arange(windows.shape[i], device=windows.device) * stride[i] - padding[i] for i in (-2, -1))
    return rows.view(-1, 1), columns


def _flat_index(position: Tensor, width: int, size, stride, padding) -> Tensor:
    """Positions in the windows [N, C, PH, PW] -> positions in the rows of the pool's input, as torch counts them."""
    rows, columns = _corners(position, stride, padding)
    p = position.long()
    return (rows + torch.div(p, size[1], rounding_mode="floor")) * width + columns + p % size[1]


def _two_axes(t: Tensor, size, stride, padding):
    return (t.unsqueeze(2), [1, *size], [1, *stride], [0, *padding]) if t.dim() == 3 else (t, size, stride, padding)


def max_pool(a: Tensor, size, stride, padding) -> tuple[Tensor, Tensor]:
    """The pooled values, and the position of each in its window (the first of equals; a NaN beats every number)."""
    image, size, stride, padding = _two_axes(a, size, stride, padding)
    out, flat = F.max_pool2d(image, size, stride, padding, return_indices=True)
    width = image.shape[-1]
    rows, columns = _corners(out, stride, padding)
    position = (torch.div(flat, width, rounding_mode="floor") - rows) * size[1] + flat % width - columns
    return (out.squeeze(2), position.squeeze(2)) if a.dim() == 3 else (out, position)


def tail(
    y: Tensor, residual, activation, pool, pool_size, pool_stride, pool_padding, slope
) -> tuple[Tensor, Tensor, Tensor]:
    """What follows the normalised convolution y: the result, the index of a max-pool, and z (at the chosen elements)."""
    z = y if residual is None else y + residual
    a = activate(z, activation, slope)
    empty = y.new_empty(0, dtype=torch.uint8)
    if pool == "avg":
        return (F.avg_pool1d if y.dim() == 3 else F.avg_pool2d)(a, pool_size, pool_stride), empty, z
    if pool == "none":
        return a, empty, z
    out, position = max_pool(a, pool_size, pool_stride, pool_padding)
    image, *window = _two_axes(z, pool_size, pool_stride, pool_padding)
    both = position if out.shape[1] == z.shape[1] else torch.cat([position, position], 1)
    flat = _flat_index(both if y.dim() == 4 else both.unsqueeze(2), image.shape[-1], *window)
    chosen = image.flatten(2).gather(2, flat.flatten(2)).view(both.shape)
    if activation == "relu":
        position = torch.where(out <= 0, NO_GRADIENT, position)
    return out, position.to(torch.uint8), chosen


def tail_gradient(
    g: Tensor, out, index, pre, full, activation, pool, pool_size, pool_stride, pool_padding, slope
) -> Tensor:
    """The gradient of z, of shape `full`, from what `tail` gave."""
    if pool == "avg":
        spread = g.new_zeros(full[0], g.shape[1], *full[2:])
        count = math.prod(pool_size)
        for offsets in itertools.product(*(range(k) for k in pool_size)):
            window = (..., *(slice(o, o + (n - 1) * s + 1, s) for o, n, s in zip(offsets, g.shape[2:], pool_stride)))
            spread[window] += g / count
        a = activate(pre, activation, slope) if activation != "none" else None
        return activation_gradient(spread, a, pre, activation, slope)
    if pool == "none":
        return activation_gradient(g, out, pre, activation, slope)
    if activation == "relu":
        d = torch.where(index == NO_GRADIENT, 0, g)
        position = torch.where(index == NO_GRADIENT, 0, index)
    else:
        d, position = activation_gradient(g, out, pre, activation, slope), index
    if activation == "tanh_sigmoid":
        position = torch.cat([position, position], 1)
    image, *window = _two_axes(position, pool_size, pool_stride, pool_padding)
    rows, width = (1, full[-1]) if g.dim() == 3 else full[-2:]
    # Position 0, which stands for no gradient, may lie in the padding.
    flat = _flat_index(image, width, *window).flatten(2).clamp_(min=0)
    spread = d.new_zeros(full[0], full[1], rows * width)
    return spread.scatter_add(2, flat, d.reshape(flat.shape)).view(full)


def finish(d, dx, dw, weight, bias, scale, transposed, groups, needs):
    """The six gradients from d, dx and the unscaled dw; None where not wanted."""
    dshift = d.sum([0, *range(2, d.dim())]) if any(needs[2:5]) else None
    dbias = None if dshift is None else dshift if scale is None else scale * dshift
    dscale = None
    if needs[3]:
        products = (weight * dw).sum([*range(2, weight.dim())])
        dscale = products.unflatten(0, (groups, -1)).sum(1).flatten() if transposed else products.sum(1)
        dscale = dscale if bias is None else dscale + bias * dshift
    if needs[1] and scale is not None:
        dw = dw * per_output_channel(scale, weight, transposed, groups)
    return dx, dw, dbias, dscale, dshift, d


def promised(d, sums, dx, dw, x, weight, bias, scale, transposed, groups, needs) -> tuple:
    """The six gradients as the operator promises them, from d, its sums [Cout], dx and the unscaled dw, the last two in float32:
    each in memory of its own, those that are not wanted empty."""
    if sums is None:
        sums = x.new_zeros(weight.shape[1] * groups if transposed else weight.shape[0], dtype=torch.float32)
    parameters = finish(sums[None], dx, dw, weight, bias, scale, transposed, groups, needs)[1:5]
    found = [dx, *parameters, d]
    for i, g in enumerate(parameters, 1):
        if needs[i]:  # dbias may be dshift
            found[i] = g.to(x.dtype, memory_format=torch.contiguous_format, copy=True)
    return tuple(g if need else x.new_empty(0) for g, need in zip(found, needs))


def channels_innermost(t: Tensor) -> Tensor:
    """The same tensor [N, C, ..] with its channels adjacent in memory."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def forward(
    x: Tensor,  # [N, Cin, ..]
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    stride, padding, dilation, groups, transposed, output_padding, activation, pool, pool_size, pool_stride,
    pool_padding, slope, save,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The result, the index of the max-pool and z, by the formula."""
    from bigmodel_kernels.ops.conv.op import output_size

    sizes = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation, transposed, output_padding)
    y = (_scatter if transposed else _gather)(x, weight, sizes, stride, padding, dilation, groups)
    ones = [1] * (x.dim() - 2)
    if bias is not None:
        y = y + bias.view(-1, *ones)
    if scale is not None:
        y = y * scale.view(-1, *ones)
    if shift is not None:
        y = y + shift.view(-1, *ones)
    return tail(y, residual, activation, pool, pool_size, pool_stride, pool_padding, slope)


def backward(
    grad, out, index, pre, needs,
    x, weight, bias, scale, shift, residual, stride, padding, dilation, groups, transposed, output_padding, activation,
    pool, pool_size, pool_stride, pool_padding, slope, save,
):  # fmt: skip
    """Gradients of x, weight, bias, scale, shift and residual; None where `needs` is false."""
    from bigmodel_kernels.ops.conv.op import shapes

    geometry = (stride, padding, dilation, groups, transposed, output_padding)
    pooling = (pool, pool_size, pool_stride, pool_padding)
    full, _, _ = shapes(x, weight, *geometry, activation, *pooling)
    d = tail_gradient(grad, out, index, pre, full, activation, *pooling, slope)
    scaled = d if scale is None else d * scale.view(-1, *[1] * (x.dim() - 2))
    back = _gather if transposed else _scatter
    dx = back(scaled, weight, list(x.shape[2:]), stride, padding, dilation, groups)
    wide, narrow = (d, x) if transposed else (x, d)
    wide = _pad(wide, padding)
    dw = torch.empty_like(weight)
    for tap, window in _taps(weight, list(narrow.shape[2:]), stride, dilation):
        products = torch.einsum("ngo...,ngw...->gow", _grouped(narrow, groups), _grouped(wide[window], groups))
        dw[(..., *tap)] = products.flatten(0, 1)
    return finish(d, dx, dw, weight, bias, scale, transposed, groups, needs)
