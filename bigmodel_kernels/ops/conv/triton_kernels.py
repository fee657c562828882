"""The launchers of the Triton kernels of convolution: triton_product.py, triton_weights.py and triton_image.py.

Inputs are read through their strides, in whatever memory format they come. Only the weight is laid out anew,
[narrow, taps, wide / groups], unless it is channels_last or 1x1 already.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigmodel_kernels import _triton, _tuned
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
    sizes = (tuple(stride), tuple(padding), tuple(dilation), transposed, tuple(output_padding))
    return _size_reason(x.shape, weight.shape, *sizes)


@functools.lru_cache(maxsize=4096)
def _size_reason(x_shape: tuple, weight_shape: tuple, *geometry) -> str | None:
    if 0 in x_shape[1:] or 0 in weight_shape:
        return f"x has shape {list(x_shape)} and weight {list(weight_shape)}: there is nothing to sum over"
    full = op.output_size(x_shape[2:], weight_shape[2:], *geometry)
    if (pixels := x_shape[0] * max(math.prod(full), math.prod(x_shape[2:]))) > MOST_PIXELS:
        return f"x or the result has {pixels} pixels; the kernels take up to {MOST_PIXELS}"
    return None


def _image(t: Tensor | None) -> Tensor | None:
    """[N, C, L] as [N, C, 1, L]."""
    return t if t is None or t.dim() == 4 else t.unsqueeze(2)


def _strides(shape: Sequence[int], channels_last: bool) -> tuple[int, ...]:
    """Of a dense tensor [N, C, ..]."""
    channels, pixels = shape[1], math.prod(shape[2:])
    inner = [math.prod(shape[i + 1 :]) for i in range(2, len(shape))]
    if channels_last:
        return (channels * pixels, 1, *(channels * s for s in inner))
    return (channels * pixels, pixels, *inner)


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


class _Launch(NamedTuple):
    """All of a launch of the product that does not depend on the tensors' addresses and strides."""

    kernel: Any
    programs: int
    weight_strides: tuple[int, int, int, int]
    sizes: tuple[int, ...]
    constants: dict[str, Any]


class _Call:
    """What the kernels of calls with the same sizes and options have in common; spatial arguments for two axes."""

    def __init__(
        self, gpu, device, element_size, precision, x_shape, x_strides, weight_shape, weight_strides, stride, padding,
        dilation, groups, transposed, output_padding, activation, pool, pool_size, pool_stride,
    ):  # fmt: skip
        self.full, self.result, self.pre = op.shapes_from(
            x_shape, weight_shape, stride, padding, dilation, groups, transposed, output_padding, activation, pool,
            pool_size, pool_stride, (0,) * len(pool_size),
        )  # fmt: skip
        image = len(x_shape) == 4
        first = () if image else (1,)
        self.batch = x_shape[0]
        self.kernel, self.stride = (*first, *weight_shape[2:]), (*first, *stride)
        self.dilation, self.pads = (*first, *dilation), tuple(padding[::2]) if image else (0, padding[0])
        self.window, self.window_step = (1, 1), (1, 1)
        if pool != "none":
            self.window, self.window_step = (*first, *pool_size), (*first, *pool_stride)
        self.source, self.size = (*first, *x_shape[2:]), (*first, *self.full[2:])
        self.height, self.width = self.size
        self.groups, self.transposed, self.activation, self.pool = groups, transposed, activation, pool
        self.taps, self.wide, self.narrow = math.prod(self.kernel), weight_shape[1], weight_shape[0] // groups
        self.direct = groups > 1 and self.wide == 1 and self.narrow <= LARGEST_DIRECT_GROUP
        self.gpu, self.device, self.element_size, self.precision = gpu, device, element_size, precision
        self.launches: dict[tuple, _Launch] = {}
        self.channels_last = op.are_channels_last(x_shape, x_strides) or (
            op.are_channels_last(weight_shape, weight_strides) and 0 not in x_shape
        )
        self.result_strides = _strides(self.result, self.channels_last)
        self.packed_strides = [_strides(weight_shape, last) for last in (True, False) if last or self.taps == 1]

    def config(self, kernel: str, columns: int) -> dict[str, int]:
        return triton_configs.config(self.gpu, self.device, kernel, self.element_size, columns)

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
        if weight.stride() in self.packed_strides:
            return weight
        return weight.flatten(2).transpose(1, 2).contiguous()

    def launch_of(
        self, scatter: bool, source_pixels: int, out_pixels: int, forward: bool, activation: str, pool: str
    ) -> _Launch:
        """The launch of `correlate`, for tiles whose pixels lie on these axes."""
        channels, columns = (self.narrow, self.wide) if scatter else (self.wide, self.narrow)
        row = self.taps * self.wide
        window = self.window if pool != "none" else (1, 1)
        phases = self.stride if scatter else (1, 1)
        source, size = (self.source, self.size) if forward else (self.size, self.source)
        pixels = self.batch * math.prod(
            -(-s // p) // w * w for s, p, w in zip(size, phases, window)
        )  # of the first phase, which has the most
        gated = activation == "tanh_sigmoid"
        if self.direct:
            kernel, outputs, groups = direct_kernel, columns * self.groups, 1
            sizes = self.config("direct", outputs)
        else:
            kernel, outputs, groups = product_kernel, columns // 2 if gated else columns, self.groups
            sizes = triton_configs.product_config(
                self.gpu, self.device, self.element_size, columns, channels, self.taps,
                source_pixels == out_pixels == 0, gated,
            )  # fmt: skip
            sizes["PRECISION"] = self.precision
        tiles = -(-pixels // sizes["BLOCK_M"]) * math.prod(phases) * -(-outputs // sizes["BLOCK_N"])
        sign = 1 if scatter else -1
        return _Launch(
            kernel,
            tiles * groups,
            (self.narrow * row, row, self.wide, 1) if scatter else (self.narrow * row, 1, self.wide, row),
            (
                self.batch, *source, *size, *(sign * p for p in self.pads), self.groups,
                channels, columns // (1 + gated), columns // 2,
            ),
            _axes(self.kernel, self.stride, self.dilation, window, scatter)
            | {"ACTIVATION": activation, "POOL": pool, "PIXELS": source_pixels}
            | sizes,
        )  # fmt: skip

    def correlate(
        self, scatter: bool, source: Tensor, weight: Tensor, out: Tensor, *, bias=None, scale=None, shift=None,
        residual=None, index=None, pre=None, forward=True, activation="none", pool="none",
    ) -> None:  # fmt: skip
        """The convolution (gather) or its transpose of `source`, and what follows it, into `out`."""
        if source.dim() == 3:
            source, residual, out, index, pre = (_image(t) for t in (source, residual, out, index, pre))
        if bias is not None:
            bias = bias.contiguous()
        if scale is not None:
            scale = scale.contiguous()
        if shift is not None:
            shift = shift.contiguous()
        key = (scatter, _pixel_axis(source), _pixel_axis(out), forward, activation, pool)
        launch = self.launches.get(key)
        if launch is None:
            launch = self.launches[key] = self.launch_of(*key)
        strides = out.stride()
        _triton.launch(
            launch.kernel, launch.programs, source, weight, bias, scale, shift, residual, out, index, pre,
            source.stride(), launch.weight_strides, strides if residual is None else residual.stride(), strides,
            strides if index is None else index.stride(), strides if pre is None else pre.stride(),
            *launch.sizes, **launch.constants,
        )  # fmt: skip

    def image_constants(self, channels: int, pixels: int) -> tuple[int, int, dict]:
        """(programs along the pixels, in all, constants) of the kernels in triton_image.py."""
        sizes = self.config("image", channels)
        tiles = -(-pixels // sizes["BLOCK_M"])
        constants = sizes | _by_axis(SIZE=self.window, STEP=self.window_step)
        constants |= {"ACTIVATION": self.activation, "POOL": self.pool}
        return tiles, tiles * -(-channels // sizes["BLOCK_N"]), constants

    def pool_of(self, z: Tensor, out: Tensor, index: Tensor | None, pre: Tensor | None) -> None:
        z, out, index, pre = (_image(t) for t in (z, out, index, pre))
        batch, channels, height, width = out.shape
        _, programs, constants = self.image_constants(channels, batch * height * width)
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
        tiles, programs, constants = self.image_constants(channels, batch * self.height * self.width)
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
        sizes = self.config("direct_weights" if self.direct else "weights", rows)
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


# A model calls with the same few sizes again and again.
_known_call = _tuned.cached(_Call)


def call_of(
    x, weight, stride, padding, dilation, groups, transposed, output_padding, activation, pool, pool_size, pool_stride, *rest
) -> _Call:  # fmt: skip
    device = x.device.index
    return _known_call(
        _triton.gpu(device), device, x.element_size(), _triton.precision(x.dtype, torch.backends.cudnn.conv),
        x.shape, x.stride(), weight.shape, weight.stride(), tuple(stride), tuple(padding), tuple(dilation), groups, transposed,
        tuple(output_padding), activation, pool, tuple(pool_size), tuple(pool_stride),
    )  # fmt: skip


def fwd(x, weight, bias, scale, shift, residual, *options):
    call = call_of(x, weight, *options)
    save = options[-1]
    out = torch.empty_strided(call.result, call.result_strides, dtype=x.dtype, device=x.device)
    index = pre = None
    if save and call.pool == "max":
        index = op.channels_innermost(x, call.result, torch.uint8)
    if save and op.saves_pre(call.activation, call.pool):
        pre = op.channels_innermost(x, call.pre)
    packed = call.packed(weight)
    if call.fuses(pre is not None):
        call.correlate(
            call.transposed, x, packed, out, bias=bias, scale=scale, shift=shift, residual=residual, index=index, pre=pre,
            activation=call.activation, pool=call.pool,
        )  # fmt: skip
    else:
        # Rounding z would make ties, and send gradients to other elements than the largest.
        exact = torch.float32 if save and call.pool == "max" else x.dtype
        z = pre if pre is not None and call.pool != "max" else op.channels_innermost(x, call.full, exact)
        call.correlate(call.transposed, x, packed, z, bias=bias, scale=scale, shift=shift, residual=residual)
        call.pool_of(z, out, index, None if z is pre else pre)
    index = x.new_empty(0, dtype=torch.uint8) if index is None else index
    return out, index, x.new_empty(0) if pre is None else pre


def bwd(grad, out, index, pre, needs, x, weight, bias, scale, shift, residual, *options):
    call = call_of(x, weight, *options)
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
        call.correlate(not call.transposed, d, call.packed(folded), dx, forward=False)
    if needs[1] or needs[3]:
        dw = call.weights(*((d, x) if call.transposed else (x, d))).reshape(weight.shape)
    return reference.promised(d, sums, dx, dw, x, weight, bias, scale, call.transposed, call.groups, needs)


__all__ = ["bwd", "fwd", "supports"]
