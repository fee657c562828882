"""The native ops of csrc/cuda/conv_*.cu, with their launches run by the emulator."""

from __future__ import annotations

import torch

from bigmodel_kernels.ops.conv import cuda
from tests.emulator.backend import SUFFIX
from tests.emulator.emulator import Program

ACTIVATIONS = ["none", "relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu"]  # in the order of Activation
POOLS = ["none", "max", "avg"]  # in the order of Pool
STEM_THREADS, DEPTHWISE_THREADS, SPREAD_THREADS = 256, 128, 256
RUN, HEIGHTS = 4, (3, 5, 7)


def is_channels_last(t: torch.Tensor) -> bool:
    return t.stride(1) == 1 and t.shape[1] > 1


def has_vectors(t: torch.Tensor, elements: int) -> bool:
    steps = [t.shape[1], *(t.stride(i) for i in (0, 2, 3) if t.shape[i] != 1)]
    return t.stride(1) == 1 and t.data_ptr() % 16 == 0 and all(step % elements == 0 for step in steps)


def strides(t: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if t is None else t.stride()


def programs(header: str, kernels: dict[str, list[str]]) -> dict[str, Program]:
    """For every kernel the program that has it; the kernels of a list share one."""
    made = {group: Program(header, *names) for group, names in kernels.items()}
    return {name: made[group] for group, names in kernels.items() for name in names}


def stem_name(dtype: torch.dtype, channels: int, save: bool) -> str:
    return f"bmk::conv_stem<{SUFFIX[dtype]}, {channels}, {str(save).lower()}>"


def depthwise_name(dtype: torch.dtype, vector: int, channels_last: bool, height: int) -> str:
    return f"bmk::depthwise_forward<{SUFFIX[dtype]}, {vector}, {str(channels_last).lower()}, {height}>"


def depthwise_weights_name(dtype: torch.dtype, vector: int, channels_last: bool) -> str:
    return f"bmk::depthwise_weights<{SUFFIX[dtype]}, {vector}, {str(channels_last).lower()}>"


SHORT = [torch.float16, torch.bfloat16]
STEM = programs(
    "conv_stem.cuh",
    {
        "inference": [stem_name(dtype, channels, False) for dtype in SHORT for channels in (16, 32, 64)],
        "training": [stem_name(dtype, 16, True) for dtype in SHORT] + [stem_name(torch.float16, 64, True)],
        "float": [stem_name(torch.float32, channels, True) for channels in (16, 32, 64)],
    },
)
STEM_BACKWARD = programs(
    "conv_stem_backward.cuh",
    {
        "weights": [f"bmk::conv_stem_weights<{SUFFIX[dtype]}, 32>" for dtype in SUFFIX]
        + [f"bmk::conv_stem_weights<{SUFFIX[dtype]}, 64>" for dtype in (torch.float32, torch.float16)],
        "images": [f"bmk::conv_spread<{SUFFIX[dtype]}>" for dtype in SUFFIX]
        + [f"bmk::conv_stem_input<{SUFFIX[dtype]}, 1>" for dtype in SUFFIX]
        + [f"bmk::conv_stem_input<{SUFFIX[dtype]}, {16 // dtype.itemsize}>" for dtype in SUFFIX],
    },
)
DEPTHWISE = programs(
    "conv_depthwise.cuh",
    {
        "all": [
            depthwise_name(dtype, *variant)
            for dtype in SUFFIX
            for variant in [
                (16 // dtype.itemsize, True, 0),
                (16 // dtype.itemsize, True, 3),
                (1, True, 0),
                (1, False, 0),
                (1, False, 3),
            ]
        ]
        + [depthwise_name(torch.float16, 8, True, height) for height in (5, 7)]
        + [depthwise_name(torch.float32, 1, False, height) for height in (5, 7)]
    },
)
DEPTHWISE_WEIGHTS = programs(
    "conv_depthwise_weights.cuh",
    {
        "all": [
            depthwise_weights_name(dtype, *variant)
            for dtype in SUFFIX
            for variant in [(16 // dtype.itemsize, True), (1, True), (1, False)]
        ]
    },
)


class Native:
    """`how` goes to every launch; `edit` is planted in every program."""

    def __init__(self):
        self.how, self.edit, self.used = {}, None, []

    def run(self, programs: dict[str, Program], kernel: str, grid, block, arguments, **sizes) -> None:
        self.used.append(kernel)
        program = programs[kernel]
        if self.edit or self.how.get("detect") == "races":  # this kernel alone, which compiles sooner
            program = Program(program.header, kernel, edit=self.edit)
        program.run(kernel, grid, block, arguments, **sizes, **self.how)

    def conv_stem_fwd(
        self, x, weight, bias, scale, shift, stride, padding, dilation, activation, slope, pool, pool_sizes, full, tile,
        out, index, pre,
    ):  # fmt: skip
        batch, in_channels, in_h, in_w = x.shape
        out_channels, out_h, out_w = out.shape[1:]
        channels = cuda.stem_channels(out_channels)
        save = index is not None or pre is not None or x.dtype == torch.float32
        arguments = (
            (x, x.stride(), in_channels, in_h, in_w), (*weight.shape[2:], *stride, *padding, *dilation),
            (POOLS.index(pool), *pool_sizes), weight, out, index, pre,
            (bias, scale, shift, ACTIVATIONS.index(activation), slope), out.stride(), strides(index), strides(pre),
            out_channels, *full, out_h, out_w, *tile,
        )  # fmt: skip
        shared = cuda.stem_shared_bytes(weight.shape, stride, dilation, pool_sizes, x.element_size(), save, tile)
        grid = (-(-out_h // tile[0]) * -(-out_w // tile[1]) * batch, -(-out_channels // channels))
        self.run(STEM, stem_name(x.dtype, channels, save), grid, STEM_THREADS, arguments, shared_bytes=shared)

    @staticmethod
    def tail(grad, out, index, pre, activation, slope, pool, pool_sizes, full) -> tuple:
        return (
            grad, out, index, pre, *map(strides, (grad, out, index, pre)), ACTIVATIONS.index(activation), slope,
            (POOLS.index(pool), *pool_sizes), *grad.shape[:2], *full, *grad.shape[2:],
        )  # fmt: skip

    def conv_spread(self, grad, out, index, pre, activation, slope, pool, pool_sizes, d):
        d.fill_(torch.nan)
        tail = self.tail(grad, out, index, pre, activation, slope, pool, pool_sizes, d.shape[2:])
        blocks = min(3, -(-d.numel() // SPREAD_THREADS))  # fewer than there are elements for
        arguments = (tail, d, d.stride(), d.numel())
        self.run(STEM_BACKWARD, f"bmk::conv_spread<{SUFFIX[d.dtype]}>", blocks, SPREAD_THREADS, arguments)

    def conv_stem_weights(
        self, x, grad, out, index, pre, kernel, stride, padding, dilation, activation, slope, pool, pool_sizes, full,
        tile, partial,
    ):  # fmt: skip
        partial.fill_(torch.nan)
        channels = cuda.stem_gradient_channels(grad.shape[1])
        tail = self.tail(grad, out, index, pre, activation, slope, pool, pool_sizes, full)
        arguments = (
            (x, x.stride(), *x.shape[1:]),
            (*kernel, *stride, *padding, *dilation),
            tail,
            partial,
            *tile,
        )
        weight_shape = (grad.shape[1], x.shape[1], *kernel)
        shared = cuda.stem_gradient_shared_bytes(weight_shape, stride, dilation, x.element_size(), tile)
        grid = (partial.shape[0], -(-grad.shape[1] // channels) * -(-partial.shape[2] // cuda.STEM_COLUMNS))
        name = f"bmk::conv_stem_weights<{SUFFIX[x.dtype]}, {channels}>"
        self.run(STEM_BACKWARD, name, grid, STEM_THREADS, arguments, shared_bytes=shared)

    def conv_stem_input(self, d, weight, stride, padding, dilation, dx):
        dx.fill_(torch.nan)
        vector = 16 // d.element_size()
        vector = vector if d.shape[1] % vector == 0 and d.data_ptr() % 16 == weight.data_ptr() % 16 == 0 else 1
        pixels = dx.shape[0] * dx.shape[2] * dx.shape[3]
        arguments = (
            d, weight, dx, dx.stride(), (*weight.shape[:2], *stride, *padding, *dilation), pixels, *dx.shape[1:],
            *d.shape[1:],
        )  # fmt: skip
        grid = (-(-pixels // STEM_THREADS), -(-dx.shape[1] // 4))
        self.run(STEM_BACKWARD, f"bmk::conv_stem_input<{SUFFIX[d.dtype]}, {vector}>", grid, STEM_THREADS, arguments)

    def conv_depthwise_fwd(
        self, x, weight, bias, scale, shift, residual, stride, padding, dilation, spread, activation, slope, out, pre
    ):
        out.fill_(torch.nan)
        (batch, channels, *size), out_h, out_w = x.shape, *out.shape[2:]
        vector = 16 // x.element_size()
        images = [t for t in (x, residual, out, pre) if t is not None]
        vectors = is_channels_last(out) and all(has_vectors(t, vector) for t in images)
        slides = (vectors or not is_channels_last(out)) and stride[0] == dilation[0] == spread[0] == 1 and out_h > 1
        height = weight.shape[0] if slides and weight.shape[0] in HEIGHTS else 0
        runs = -(-out_h // (RUN if height else 1)) * out_w
        per_image = runs * (channels // vector if vectors else channels) if is_channels_last(out) else runs
        blocks = -(-per_image // DEPTHWISE_THREADS)
        arguments = (
            x, weight, (bias, scale, shift, ACTIVATIONS.index(activation), slope), residual, out, pre,
            *map(strides, (x, residual, out, pre)), channels, *size, out_h, out_w,
            (*weight.shape[:2], *stride, *padding, *dilation), *spread, per_image, blocks,
        )  # fmt: skip
        count = batch if is_channels_last(out) else batch * channels
        name = depthwise_name(x.dtype, vector if vectors else 1, is_channels_last(out), height)
        self.run(DEPTHWISE, name, count * blocks, DEPTHWISE_THREADS, arguments)

    def conv_depthwise_weights(self, x, d, kernel, stride, padding, dilation, partial):
        partial.fill_(torch.nan)
        vector, last = 16 // x.element_size(), is_channels_last(d)
        vector = vector if last and has_vectors(x, vector) and has_vectors(d, vector) else 1
        channels, pixels = d.shape[1], d.shape[0] * d.shape[2] * d.shape[3]
        arguments = (
            x, d, partial, x.stride(), d.stride(), *x.shape[1:], *d.shape[2:],
            (*kernel, *stride, *padding, *dilation), pixels,
        )  # fmt: skip
        grid = (-(-channels // ((16 if last else 1) * vector)) * -(-partial.shape[1] // cuda.TAPS), partial.shape[0])
        self.run(DEPTHWISE_WEIGHTS, depthwise_weights_name(x.dtype, vector, last), grid, DEPTHWISE_THREADS, arguments)

    def ops(self) -> dict:
        return {name: getattr(self, name) for name in dir(self) if name.startswith("conv_")}
