"""The launchers of the Triton kernels of convolution: triton_product.py, triton_weights.py and triton_image.py.

Inputs are read through their strides, in whatever memory format they come. Only the weight is laid out anew,
[narrow, taps, wide / groups], unless it is channels_last or 1x1 already.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from bigmodel_kernels import _triton
from bigmodel_kernels.ops.conv import op, reference, triton_configs
from bigmodel_kernels.ops.conv.triton_image import pool_kernel, spread_kernel
from bigmodel_kernels.ops.conv.triton_product import direct_kernel, product_kernel
from bigmodel_kernels.ops.conv.triton_weights import direct_weights_kernel, weights_kernel

Pair = tuple[int, int]

LARGEST_WINDOW = 254  # elements of a max-pool window that the saved byte can tell apart
LARGEST_FUSED_WINDOW = 16
LARGEST_DIRECT_GROUP = 4  # output channels of a group of one input channel; more are a product
MOST_PIXELS = 2**31 - 2**10  # pixels are counted in 32 bits, offsets in 64
SHORTEST_SUM = 4  # blocks of pixels that a program of the gradient of the weight adds up at least


def supports(
    x, weight, bias, scale, shift, residual, stride, padding, dilation, groups, transposed, output_padding, activation,
    pool, pool_size, pool_stride, pool_padding, slope, *rest,
) -> str | None:  # fmt: skip
    if (why := _triton.reason(x)) is not None:
        return why
    if pool == "max" and (elements := math.prod(pool_size)) > LARGEST_WINDOW:
        return f"pool has a window of {elements} elements; the kernels take up to {LARGEST_WINDOW}"
    if any(pool_padding):
        return f"pool has a padding of {pool_padding}"
    if activation == "leaky_relu" and slope != reference.LEAKY_SLOPE:
        return f"activation 'leaky_relu' has the slope {slope}; the kernels have {reference.LEAKY_SLOPE}"
    if 0 in x.shape[1:] or 0 in weight.shape:
        return f"x has shape {list(x.shape)} and weight {list(weight.shape)}: there is nothing to sum over"
    full = op.output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation, transposed, output_padding)
    if (pixels := x.shape[0] * max(math.prod(full), math.prod(x.shape[2:]))) > MOST_PIXELS:
        return f"x or the result has {pixels} pixels; the kernels take up to {MOST_PIXELS}"
    return None


def _image(t: Tensor | None) -> Tensor | None:
    """[N, C, L] as [N, C, 1, L]."""
    return t if t is None or t.dim() == 4 else t.unsqueeze(2)


def _by_axis(**pairs) -> dict[str, int]:
    return {f"{name}_{axis}": value for name, pair in pairs.items() for axis, value in zip("YX", pair)}


def _pixel_axis(t: Tensor) -> int:
    """The axis of the pixels in tiles of t."""
    return 0 if t.stride(1) == 1 else 1


@functools.cache
def _axes(kernel: Pair, stride: Pair, dilation: Pair, window: Pair, scatter: bool) -> dict[str, int]:
    """The constants of triton_tile's rule, and the window of a fused pool."""
    pairs = list(zip(stride, dilation))
    common = [math.gcd(s, d) for s, d in pairs]
    tap_step = [s // c if scatter else 1 for (s, _), c in zip(pairs, common)]
    return _by_axis(
        KERNEL=kernel,
        DILATION=dilation,
        STEP=(1, 1) if scatter else stride,
        JUMP=[-d // c for (_, d), c in zip(pairs, common)] if scatter else dilation,
        PHASES=stride if scatter else (1, 1),
        TAP_STEP=tap_step,
        INVERSE=[pow(d // c, -1, t) if t > 1 else 0 for (_, d), c, t in zip(pairs, common, tap_step)],
        WINDOW=window,
    )


class _Call:
    """What the kernels of one call have in common; spatial arguments for two axes."""

    def __init__(
        self, x, weight, bias, scale, shift, residual, stride, padding, dilation, groups, transposed, output_padding,
        activation, pool, pool_size, pool_stride, pool_padding, slope, save,
    ):  # fmt: skip
        self.full, self.result, self.pre = op.shapes(
            x,
            weight,
            stride,
            padding,
            dilation,
            groups,
            transposed,
            output_padding,
            activation,
            pool,
            pool_size,
            pool_stride,
            pool_padding,
        )
        image = x.dim() == 4
        first = [] if image else [1]
        self.kernel, self.stride = (*first, *weight.shape[2:]), (*first, *stride)
        self.dilation, self.pads = (*first, *dilation), tuple(padding[::2]) if image else (0, padding[0])
        self.window, self.window_step = (1, 1), (1, 1)
        if pool != "none":
            self.window, self.window_step = (*first, *pool_size), (*first, *pool_stride)
        self.height, self.width = self.full[2:] if image else (1, self.full[2])
        self.groups, self.transposed, self.activation, self.pool = groups, transposed, activation, pool
        self.taps, self.wide, self.narrow = math.prod(self.kernel), weight.shape[1], weight.shape[0] // groups
        self.direct = groups > 1 and self.wide == 1 and self.narrow <= LARGEST_DIRECT_GROUP
        self.gpu = _triton.gpu(x.device.index)
        self.precision = _triton.precision(x.dtype, torch.backends.cudnn.conv)

    def fuses(self, saves_pre: bool) -> bool:
        """Whether the product's own epilogue does the activation and the pool."""
        if self.activation == "tanh_sigmoid" and self.groups > 1:
            return False
        if self.pool == "none":
            return True
        elements = math.prod(self.window)
        whole = self.height % self.window[0] == 0 and self.width % self.window[1] == 0
        return (
            self.window == self.window_step
            and elements <= LARGEST_FUSED_WINDOW
            and elements & (elements - 1) == 0
            and not (self.transposed and self.stride != (1, 1))
            and (self.pool == "max" or whole or not saves_pre)
        )

    def packed(self, weight: Tensor) -> Tensor:
        """[narrow, taps, wide / groups], contiguous."""
        return weight.flatten(2).transpose(1, 2).contiguous()

    def correlate(
        self, scatter: bool, source: Tensor, weight: Tensor, out: Tensor, size, *, bias=None, scale=None, shift=None,
        residual=None, index=None, pre=None, activation="none", pool="none",
    ) -> None:  # fmt: skip
        """The convolution (gather) or its transpose of `source`, of spatial `size`, and what follows it, into `out`."""
        source, residual, out, index, pre = (_image(t) for t in (source, residual, out, index, pre))
        channels, columns = (self.narrow, self.wide) if scatter else (self.wide, self.narrow)
        row = self.taps * self.wide
        of_channel, of_column = (row, 1) if scatter else (1, row)
        window = self.window if pool != "none" else (1, 1)
        constants = _axes(self.kernel, self.stride, self.dilation, window, scatter)
        phases = self.stride if scatter else (1, 1)
        pixels = source.shape[0] * math.prod(
            -(-s // p) // w * w for s, p, w in zip(size, phases, window)
        )  # of the first phase, which has the most
        gated = activation == "tanh_sigmoid"
        if self.direct:
            kernel, outputs = direct_kernel, columns * self.groups
            sizes = triton_configs.config(self.gpu, "direct", source.element_size(), outputs)
        else:
            kernel, outputs = product_kernel, columns // 2 if gated else columns
            adjacent = _pixel_axis(source) == _pixel_axis(out) == 0
            sizes = triton_configs.product_config(
                self.gpu, source.element_size(), columns, channels, self.taps, adjacent, gated
            )
            sizes = sizes | {"PRECISION": self.precision}
        programs = -(-pixels // sizes["BLOCK_M"]) * math.prod(phases) * -(-outputs // sizes["BLOCK_N"])
        sign = 1 if scatter else -1
        _triton.launch(
            kernel, programs * (1 if self.direct else self.groups),
            source, weight, *(t if t is None else t.contiguous() for t in (bias, scale, shift)), residual, out, index, pre,
            source.stride(), (self.narrow * row, of_channel, self.wide, of_column),
            *(out.stride() if t is None else t.stride() for t in (residual, out, index, pre)),
            source.shape[0], source.shape[2], source.shape[3], *size, *(sign * p for p in self.pads), self.groups,
            channels, columns // (1 + gated), columns // 2,
            ACTIVATION=activation, POOL=pool, PIXELS=_pixel_axis(source), **constants, **sizes,
        )  # fmt: skip

    def image_constants(self, element_size: int, channels: int, pixels: int) -> tuple[int, int, dict]:
        """(programs along the pixels, in all, constants) of the kernels in triton_image.py."""
        sizes = triton_configs.config(self.gpu, "image", element_size, channels)
        tiles = -(-pixels // sizes["BLOCK_M"])
        constants = sizes | _by_axis(SIZE=self.window, STEP=self.window_step)
        constants |= {"ACTIVATION": self.activation, "POOL": self.pool}
        return tiles, tiles * -(-channels // sizes["BLOCK_N"]), constants

    def pool_of(self, z: Tensor, out: Tensor, index: Tensor | None, pre: Tensor | None) -> None:
        z, out, index, pre = (_image(t) for t in (z, out, index, pre))
        batch, channels, height, width = out.shape
        _, programs, constants = self.image_constants(z.element_size(), channels, batch * height * width)
        _triton.launch(
            pool_kernel, programs, z, out, index, pre,
            z.stride(), *(out.stride() if t is None else t.stride() for t in (out, index, pre)),
            batch, channels, height, width, PIXELS=_pixel_axis(z), **constants,
        )  # fmt: skip

    def spread(
        self, grad: Tensor, out: Tensor, index: Tensor, pre: Tensor, store: bool, add_up: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """(d, its sums [Cout] in float32), each if asked for."""
        pre = pre if pre.numel() else grad  # not read
        index = index if index.numel() else grad
        d = op.channels_innermost(grad, self.full) if store else None
        images = [_image(t) for t in (grad, out, index, pre, d)]
        batch, channels, height, width = images[0].shape
        tiles, programs, constants = self.image_constants(
            grad.element_size(), channels, batch * self.height * self.width
        )
        sums = grad.new_empty(tiles, self.full[1], dtype=torch.float32) if add_up else None
        _triton.launch(
            spread_kernel, programs, *images, sums, *((images[0] if t is None else t).stride() for t in images),
            batch, channels, self.height, self.width, height, width, PIXELS=_pixel_axis(images[0]), **constants,
        )  # fmt: skip
        return d, sums.sum(0) if add_up else None

    def weights(self, wide: Tensor, narrow: Tensor) -> Tensor:
        """The gradient of the weight, as the weight's shape says, in float32: partial sums, added up in their order."""
        wide, narrow = _image(wide), _image(narrow)
        batch, _, height, width = narrow.shape
        pixels, columns = batch * height * width, self.taps * self.wide
        kernel = direct_weights_kernel if self.direct else weights_kernel
        rows = self.narrow * self.groups if self.direct else self.narrow
        sizes = triton_configs.config(
            self.gpu, "direct_weights" if self.direct else "weights", narrow.element_size(), rows
        )
        constants = _by_axis(KERNEL=self.kernel, STEP=self.stride, DILATION=self.dilation)
        if self.direct:
            block, tiles = sizes["BLOCK_M"], -(-rows // sizes["BLOCK_N"]) * -(-self.taps // sizes["BLOCK_K"])
        else:
            block = sizes["BLOCK_K"]
            tiles = -(-rows // sizes["BLOCK_N"]) * -(-columns // sizes["BLOCK_M"]) * self.groups
            constants |= {
                "PRECISION": self.precision,
                "NARROW_PIXELS": _pixel_axis(narrow),
                "FLAT": self.wide % sizes["BLOCK_M"] != 0,
            }
        splits = min(-(-pixels // (block * SHORTEST_SUM)), max(1, _triton.PROGRAMS[self.gpu] // tiles))
        chunk = -(-pixels // (max(1, splits) * block)) * block
        splits = -(-pixels // chunk) if chunk else 0
        partial = narrow.new_empty(splits, self.narrow * self.groups, columns, dtype=torch.float32)
        _triton.launch(
            kernel, splits * tiles, wide, narrow, partial, wide.stride(), narrow.stride(),
            batch, wide.shape[2], wide.shape[3], height, width, *self.pads, self.groups, self.wide, self.narrow, chunk,
            WIDE_PIXELS=_pixel_axis(wide), **constants, **sizes,
        )  # fmt: skip
        dw = partial[0] if splits == 1 else partial.sum(0)
        return dw.view(-1, self.taps, self.wide).transpose(1, 2)


def fwd(x, weight, bias, scale, shift, residual, *options):
    call = _Call(x, weight, bias, scale, shift, residual, *options)
    save = options[-1]
    last = op.gives_channels_last(x, weight)
    out = op.channels_innermost(x, call.result) if last else x.new_empty(call.result)
    index = pre = None
    if save and call.pool == "max":
        index = op.channels_innermost(x, call.result, torch.uint8)
    if save and op.saves_pre(call.activation, call.pool):
        pre = op.channels_innermost(x, call.pre)
    parts = {"bias": bias, "scale": scale, "shift": shift, "residual": residual}
    size, packed = (call.height, call.width), call.packed(weight)
    if call.fuses(pre is not None):
        call.correlate(
            call.transposed, x, packed, out, size,
            **parts, index=index, pre=pre, activation=call.activation, pool=call.pool,
        )  # fmt: skip
    else:
        # Rounding z would make ties, and send gradients to other elements than the largest.
        exact = torch.float32 if save and call.pool == "max" else x.dtype
        z = pre if pre is not None and call.pool != "max" else op.channels_innermost(x, call.full, exact)
        call.correlate(call.transposed, x, packed, z, size, **parts)
        call.pool_of(z, out, index, None if z is pre else pre)
    index = x.new_empty(0, dtype=torch.uint8) if index is None else index
    return out, index, x.new_empty(0) if pre is None else pre


def bwd(grad, out, index, pre, needs, x, weight, bias, scale, shift, residual, *options):
    call = _Call(x, weight, bias, scale, shift, residual, *options)
    dx, dw, d, sums = None, None, grad, None
    plain = call.activation == "none" and call.pool == "none"
    store, add_up = bool(needs[5]) or not plain, any(needs[2:5])
    if store or add_up:
        stored, sums = call.spread(grad, out, index, pre, store, add_up)
        d = stored if store else grad
    if needs[0]:
        dx = op.channels_innermost(x, x.shape) if op.is_channels_last(x) else x.new_empty(x.shape)
        folded = weight
        if scale is not None:
            folded = weight * reference.per_output_channel(scale, weight, call.transposed, call.groups)
        size = (1, *x.shape[2:])[-2:]
        call.correlate(not call.transposed, d, call.packed(folded), dx, size)
    if needs[1] or needs[3]:
        dw = call.weights(*((d, x) if call.transposed else (x, d))).reshape(weight.shape)
    return reference.promised(d, sums, dx, dw, x, weight, bias, scale, call.transposed, call.groups, needs)


__all__ = ["bwd", "fwd", "supports"]
