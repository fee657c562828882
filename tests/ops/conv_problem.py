"""Convolution calls for the tests: geometries, what follows the convolution, and the comparison with float64."""

from __future__ import annotations

import math

import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.testing import assert_matches, make

NAMES = ("x", "weight", "bias", "scale", "shift", "residual")
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 2 else t,
}

# id: batch, Cin, Cout, spatial size, kernel, options. Sizes below, at and above what a vector, a tile of pixels (14), a
# Winograd tile of 2 (from 32 channels) or a band holds; every option alone and with others.
GEOMETRIES = {
    "one": (1, 1, 1, (1,), (1,), {}),
    "k1": (2, 3, 5, (7,), (1,), {}),
    "k3": (2, 5, 7, (13,), (3,), {"padding": 1}),
    "k4s2": (1, 4, 6, (15,), (4,), {"stride": 2, "padding": 2}),
    "k2d9": (1, 6, 8, (31,), (2,), {"dilation": 9}),
    "causal": (2, 7, 10, (29,), (3,), {"padding": "causal", "dilation": 4}),
    "same_even": (1, 3, 4, (17,), (4,), {"padding": "same"}),
    "wide1d": (1, 17, 18, (300,), (3,), {"padding": 1}),
    "long1d": (1, 2, 34, (1000,), (5,), {"stride": 3}),
    "group1d": (2, 6, 4, (20,), (3,), {"groups": 2}),
    "depthwise1d": (2, 19, 19, (24,), (4,), {"groups": 19, "padding": "causal"}),
    "reach": (1, 2, 4, (3,), (5,), {"padding": 4, "dilation": 2}),
    "t1d": (2, 5, 6, (9,), (3,), {"transposed": True}),
    "t1d_s3": (1, 4, 18, (8,), (5,), {"transposed": True, "stride": 3, "padding": 1, "output_padding": 2}),
    "t1d_gap": (1, 3, 2, (6,), (2,), {"transposed": True, "stride": 4}),
    "pixel": (3, 2, 4, (1, 1), (1, 1), {}),
    "p3x3": (2, 1, 32, (28, 28), (3, 3), {"padding": 1}),
    "textbook": (2, 32, 64, (14, 14), (3, 3), {"padding": 1}),
    "winograd32": (1, 32, 32, (6, 6), (3, 3), {}),
    "winograd_odd": (2, 33, 35, (7, 9), (3, 3), {"padding": 1}),
    "winograd_row": (1, 40, 48, (1, 37), (3, 3), {"padding": 1}),
    "winograd_pad": (1, 32, 47, (5, 4), (3, 3), {"padding": 2}),
    "winograd_flat": (1, 64, 50, (3, 100), (3, 3), {"padding": (1, 0)}),
    "stem": (1, 3, 20, (23, 21), (7, 7), {"stride": 2, "padding": 3}),
    "k5": (1, 2, 6, (12, 11), (5, 5), {"padding": 2}),
    "k1x1": (2, 18, 34, (5, 6), (1, 1), {}),
    "k1x1s2": (1, 16, 17, (9, 9), (1, 1), {"stride": 2}),
    "k3x1": (1, 4, 9, (8, 15), (3, 1), {"padding": (1, 0)}),
    "k2x5": (1, 3, 16, (9, 16), (2, 5), {"stride": (1, 2), "padding": (0, 2)}),
    "strides": (2, 5, 8, (11, 13), (3, 2), {"stride": (3, 1), "dilation": (1, 2)}),
    "dilated": (1, 16, 16, (12, 12), (3, 3), {"dilation": 2, "padding": 2}),
    "same2d": (1, 4, 5, (6, 9), (4, 2), {"padding": "same", "dilation": (1, 3)}),
    "far_pad": (1, 2, 3, (4, 4), (2, 2), {"padding": 5, "stride": 3}),
    "groups": (2, 6, 9, (7, 8), (3, 3), {"groups": 3, "padding": 1}),
    "groups16": (1, 32, 34, (6, 6), (3, 3), {"groups": 2, "padding": 1}),
    "depthwise": (1, 18, 18, (9, 7), (3, 3), {"groups": 18, "padding": 1}),
    "multiplier": (1, 3, 12, (8, 8), (5, 5), {"groups": 3, "padding": 2, "stride": 2}),
    "tall": (1, 2, 2, (70, 3), (3, 3), {"padding": 1}),
    "broad": (1, 1, 3, (4, 150), (3, 3), {"padding": 1}),
    "t2d": (1, 5, 4, (6, 5), (3, 3), {"transposed": True, "padding": 1}),
    "t2d_k4s2": (2, 8, 16, (7, 7), (4, 4), {"transposed": True, "stride": 2, "padding": 1}),
    "t2d_uneven": (1, 3, 17, (4, 6), (3, 2), {"transposed": True, "stride": (2, 3), "output_padding": (1, 2)}),
    "t2d_dilated": (1, 4, 6, (5, 5), (3, 3), {"transposed": True, "dilation": 2, "stride": 2, "padding": 2}),
    "t2d_groups": (1, 6, 8, (5, 4), (3, 3), {"transposed": True, "groups": 2, "stride": 2}),
    "t2d_winograd": (1, 48, 33, (8, 8), (3, 3), {"transposed": True, "padding": 1}),
    "linear": (70, 100, 45, (1, 1), (1, 1), {}),
}

# Depthwise: fewer channels than a vector, one vector and a tail, two chunks of 256 with a long and with a short second one; rows
# shorter than a tile of 4, between 4 and 8, and of several tiles; every kernel of its own and the one for any taps.
DEPTHWISE = {
    "few_channels": (1, 5, 5, (6, 9), (3, 3), {"groups": 5, "padding": 1}),
    "k3": (2, 37, 37, (9, 11), (3, 3), {"groups": 37, "padding": 1}),
    "k3_even": (1, 32, 32, (8, 24), (3, 3), {"groups": 32, "padding": 1}),
    "k3_short_rows": (1, 16, 16, (7, 3), (3, 3), {"groups": 16, "padding": 1}),
    "k3_pixel": (2, 48, 48, (1, 1), (3, 3), {"groups": 48, "padding": 1}),
    "k3_no_padding": (1, 24, 24, (8, 10), (3, 3), {"groups": 24}),
    "k3_two_chunks": (1, 290, 290, (5, 6), (3, 3), {"groups": 290, "padding": 1}),
    "k3_short_chunk": (1, 262, 262, (4, 5), (3, 3), {"groups": 262, "padding": 1}),
    "k3s2": (2, 34, 34, (12, 17), (3, 3), {"groups": 34, "padding": 1, "stride": 2}),
    "k3s3": (1, 19, 19, (10, 29), (3, 3), {"groups": 19, "stride": 3}),
    "k3_dilated": (1, 17, 17, (12, 14), (3, 3), {"groups": 17, "padding": (2, 3), "dilation": (2, 3)}),
    "k3s2_dilated": (1, 17, 17, (12, 14), (3, 3), {"groups": 17, "padding": 2, "dilation": 2, "stride": 2}),
    "k5": (1, 20, 20, (7, 13), (5, 5), {"groups": 20, "padding": 2}),
    "k5s2": (1, 33, 33, (11, 20), (5, 5), {"groups": 33, "padding": 2, "stride": 2}),
    "k7": (1, 40, 40, (9, 15), (7, 7), {"groups": 40, "padding": 3}),
    "k9": (1, 18, 18, (10, 11), (9, 9), {"groups": 18, "padding": 4}),
    "k2x6": (1, 21, 21, (6, 18), (2, 6), {"groups": 21, "padding": (1, 3)}),
    "k4_causal": (2, 35, 35, (27,), (4,), {"groups": 35, "padding": "causal"}),
    "k3_causal_dilated": (1, 35, 35, (33,), (3,), {"groups": 35, "padding": "causal", "dilation": 5}),
    "transposed": (1, 22, 22, (6, 7), (4, 4), {"groups": 22, "transposed": True, "stride": 2, "padding": 1}),
    "transposed_gap": (1, 22, 22, (4, 6), (2, 2), {"groups": 22, "transposed": True, "stride": 3}),
}

# Stride 2 with 3 or 4 taps from 32 channels on, where each phase is a Winograd convolution of its own: sizes with and without
# whole tiles, whole and broken vectors of channels, more channels than are transformed at a time (144), several bands of an
# image and several images in a task, kernels whose axes differ.
PHASES = {
    "t4": (2, 32, 48, (8, 6), (4, 4), {"transposed": True, "stride": 2, "padding": 1}),
    "t4_odd": (1, 33, 47, (5, 7), (4, 4), {"transposed": True, "stride": 2, "padding": 1}),
    "t4_no_padding": (1, 40, 32, (3, 3), (4, 4), {"transposed": True, "stride": 2, "output_padding": 1}),
    "t4_deep": (1, 300, 64, (4, 4), (4, 4), {"transposed": True, "stride": 2, "padding": 1}),
    "t4_images": (19, 32, 32, (2, 4), (4, 4), {"transposed": True, "stride": 2, "padding": 1}),
    "t4_bands": (1, 32, 32, (40, 70), (4, 4), {"transposed": True, "stride": 2, "padding": 1}),
    "t3": (1, 48, 32, (6, 9), (3, 3), {"transposed": True, "stride": 2, "padding": 1, "output_padding": 1}),
    "t3x4": (1, 32, 64, (4, 5), (3, 4), {"transposed": True, "stride": 2, "padding": (0, 2)}),
    "c4": (2, 32, 48, (12, 16), (4, 4), {"stride": 2, "padding": 1}),
    "c4_odd": (1, 35, 33, (11, 15), (4, 4), {"stride": 2, "padding": 1}),
    "c4_deep": (2, 300, 32, (20, 36), (4, 4), {"stride": 2, "padding": 1}),
    "c4_images": (65, 32, 32, (4, 8), (4, 4), {"stride": 2, "padding": 1}),
    "c4_bands": (1, 32, 32, (50, 66), (4, 4), {"stride": 2, "padding": 1}),
    "c3": (2, 32, 64, (34, 36), (3, 3), {"stride": 2, "padding": 1}),
    "c4x3": (4, 32, 33, (17, 24), (4, 3), {"stride": 2, "padding": (1, 2)}),
}
# 3x3 of stride 1 with so many outputs that they are computed in tiles of 4 x 4: whole and broken tiles, broken vectors of
# channels, several bands of an image and several images in a task, sums in parts. And, in tiles of 2, weights from memory.
TILED = {
    "whole": (1, 32, 64, (40, 48), (3, 3), {"padding": 1}),
    "odd": (1, 33, 47, (43, 39), (3, 3), {"padding": 1}),
    "no_padding": (2, 40, 32, (30, 34), (3, 3), {}),
    "images": (33, 32, 32, (8, 7), (3, 3), {"padding": 1}),
    "few_images": (19, 35, 33, (7, 8), (3, 3), {"padding": 1}),
    "bands": (1, 64, 50, (57, 64), (3, 3), {"padding": 1}),
    "deep": (2, 190, 192, (28, 28), (3, 3), {"padding": 1}),
    "broad": (1, 32, 32, (13, 300), (3, 3), {"padding": (1, 2)}),
    "transposed": (1, 48, 33, (44, 44), (3, 3), {"transposed": True, "padding": 1}),
    "in_memory": (5, 512, 500, (8, 8), (3, 3), {"padding": 1}),
}
# Where the gradient of the weights is filtered, from 16 channels on: one batch of tiles (96) and several, which end between
# bands and inside of them; channels that fill no vector, several parts (64) and a short last one; sizes with and without whole
# tiles.
FILTERED = {
    "k3": (2, 16, 16, (9, 7), (3, 3), {"padding": 1}),
    "k3_tails": (1, 17, 21, (5, 8), (3, 3), {"padding": 2}),
    "k3_parts": (3, 70, 145, (14, 14), (3, 3), {"padding": 1}),
    "k3_chunks": (40, 32, 17, (7, 7), (3, 3), {"padding": 1}),
    "k3_wide": (2, 18, 33, (5, 301), (3, 3), {"padding": (0, 1)}),
    "k3_row": (3, 16, 16, (1, 300), (3, 3), {"padding": 1}),
    "k3_groups": (2, 40, 68, (11, 10), (3, 3), {"padding": 1, "groups": 2}),
    "k3_transposed": (2, 66, 19, (12, 13), (3, 3), {"transposed": True, "padding": 1}),
    "k4s2": (3, 70, 16, (22, 26), (4, 4), {"stride": 2, "padding": 1}),
    "k4s2_groups": (1, 34, 64, (13, 16), (4, 4), {"stride": 2, "groups": 2}),
    "k4s2_transposed": (5, 150, 40, (8, 9), (4, 4), {"transposed": True, "stride": 2, "padding": 1}),
    "k3s2": (9, 19, 80, (15, 17), (3, 3), {"stride": 2, "padding": 1}),
    "k4x3s2": (2, 16, 24, (30, 29), (4, 3), {"stride": 2, "padding": (2, 0)}),
}
# Few channels and more than 3 taps an axis: runs of 3, 2 and 1 taps, stride 1 and 2, one product of a row and several, channels
# that fill no vector and one, bands that end inside a tile or lie side by side.
TAPS = {
    "k7s2": (2, 3, 64, (37, 75), (7, 7), {"stride": 2, "padding": 3}),
    "k7": (1, 4, 36, (15, 33), (7, 7), {"padding": 3}),
    "k5": (2, 5, 48, (14, 19), (5, 5), {"padding": 2}),
    "k5s2": (1, 3, 65, (40, 29), (5, 5), {"stride": 2, "padding": (2, 1)}),
    "k4s2": (1, 16, 65, (18, 30), (4, 4), {"stride": 2}),
    "k4x6": (1, 3, 40, (12, 25), (4, 6), {"stride": (1, 2), "padding": 2}),
    "k11s2": (1, 1, 32, (30, 41), (11, 8), {"stride": 2, "padding": 5}),
    "k8s2": (2, 3, 33, (29, 40), (8, 8), {"stride": 2, "padding": 3}),
    "k10x5": (1, 4, 34, (16, 21), (10, 5), {"padding": (5, 2)}),
    "bands": (1, 3, 32, (90, 270), (5, 5), {"padding": 2}),
    "k7bands": (1, 3, 32, (100, 270), (7, 7), {"padding": 3}),
    "transposed": (1, 32, 6, (9, 13), (5, 5), {"transposed": True, "stride": 2, "padding": 2, "output_padding": 1}),
}
TAPS_BY_NAME = {f"taps_{name}": geometry for name, geometry in TAPS.items()}
# Where pairs of rows are multiplied by dot products, from 8 wide channels on: odd and even heights, taps that fall into more than
# two remainders modulo twice the stride, sequences, several parts (128) of the narrow side, tiles of 12 channels and less.
PAIRED = {
    "row": (2, 12, 40, (77,), (4,), {"stride": 3, "dilation": 2, "padding": 4}),
    "causal": (1, 25, 32, (600,), (2,), {"padding": "causal", "dilation": 5}),
    "pixel": (3, 9, 17, (1, 1), (1, 1), {}),
    "strip": (2, 8, 16, (1, 9), (3, 3), {"padding": 1}),
    "parts": (2, 16, 300, (9, 5), (3, 3), {"padding": 1}),
    "tall": (1, 13, 33, (301, 5), (5, 3), {"stride": (2, 1), "dilation": (3, 1), "padding": (4, 1)}),
    "k2": (4, 10, 18, (35, 34), (2, 2), {}),
    "transposed": (2, 18, 30, (7, 6), (5, 4), {"transposed": True, "stride": (3, 2), "padding": 1}),
    "groups": (2, 24, 40, (9, 8), (1, 3), {"groups": 2, "padding": (0, 1)}),
}
# 3x3 under a 2x2 max-pool, whose gradients are sums over windows. Of few channels, whose lanes are windows: rows that fill a
# vector or nearly, odd sizes, several bands and vectors, several input channels. Of more: one vector of channels and several, a
# last one that is not full, runs of 32 output channels, images with and without bands, pixels that no window covers.
CHOSEN = {
    "first": (3, 1, 32, (28, 28), (3, 3), {"padding": 1}),
    "first_odd": (2, 1, 7, (29, 31), (3, 3), {"padding": 1}),
    "first_colours": (2, 3, 20, (13, 30), (3, 3), {"padding": 1}),
    "first_wide": (1, 2, 18, (71, 150), (3, 3), {"padding": (0, 1)}),
    "first_padded": (2, 1, 17, (30, 29), (3, 3), {"padding": 2}),
    "textbook": (5, 32, 64, (14, 14), (3, 3), {"padding": 1}),
    "tails": (4, 45, 35, (9, 15), (3, 3), {"padding": 1}),
    "few": (4, 16, 5, (4, 5), (3, 3), {"padding": (0, 2)}),
    "bands": (4, 13, 33, (50, 70), (3, 3), {"padding": 1}),
    "many": (4, 48, 130, (7, 6), (3, 3), {"padding": 1}),
}
CHOSEN_BY_NAME = {f"chosen_{name}": geometry for name, geometry in CHOSEN.items()}
PAIRED_BY_NAME = {f"paired_{name}": geometry for name, geometry in PAIRED.items()}
FILTERED_BY_NAME = {f"filtered_{name}": geometry for name, geometry in FILTERED.items()}
PHASES_BY_NAME = {f"phases_{name}": geometry for name, geometry in PHASES.items()}
TILED_BY_NAME = {f"tiled_{name}": geometry for name, geometry in TILED.items()}

DEPTHWISE_BY_NAME = {f"depthwise_{name}": geometry for name, geometry in DEPTHWISE.items()}

# id: which of the optional tensors, activation, pool.
TAILS = {
    "bias": (("bias",), None, None),
    "relu_max": (("bias",), "relu", ("max", 2)),
    "norm_residual_relu": (("scale", "shift", "residual"), "relu", None),
    "all_gelu_max": (("bias", "scale", "shift", "residual"), "gelu", ("max", 3, 2)),
    "silu_avg": (("bias", "scale"), "silu", ("avg", 2)),
    "tanh_max": (("shift",), "tanh", ("max", 2, 1)),
    "leaky_avg": ((), "leaky_relu", ("avg", 3, 2)),
    "sigmoid": (("bias", "residual"), "sigmoid", None),
    "gate_max": (("bias", "scale"), "tanh_sigmoid", ("max", 2)),
    "gate": (("residual",), "tanh_sigmoid", None),
}

# Those that not every backend has: a max-pool with padding, a slope of the leaky ReLU.
MORE_TAILS = {
    "norm_relu": (("bias", "scale", "shift"), "relu", None),
    "norm_relu_padded": (("scale", "shift"), "relu", ("max", 3, 2, 1)),
    "gelu_padded": (("bias", "residual"), "gelu", ("max", 3, 1, 1)),
    "leaky": (("bias",), ("leaky_relu", 0.2), None),
    "leaky_padded": (("bias", "scale"), ("leaky_relu", 0.3), ("max", 4, 3, 2)),
    "gate_padded": ((), "tanh_sigmoid", ("max", 3, 2, 1)),
    "max": ((), None, ("max", 2)),
    "norm_relu_max": (("bias", "scale", "shift"), "relu", ("max", 2)),
    "leaky_max": (("bias", "residual"), ("leaky_relu", 0.25), ("max", 2)),
    "tanh_halves": (("scale", "shift"), "tanh", ("max", 2)),
    "silu_max": (("bias",), "silu", ("max", 2)),
}


class Problem:
    """The arguments of one call; `to(dtype)` gives them in another dtype, with gradients asked for."""

    def __init__(self, geometry: str, tail: str = "bias", dtype=torch.float32, seed: int = 0, integer: bool = False):
        named = (
            GEOMETRIES
            | DEPTHWISE_BY_NAME
            | PHASES_BY_NAME
            | TILED_BY_NAME
            | FILTERED_BY_NAME
            | TAPS_BY_NAME
            | PAIRED_BY_NAME
            | CHOSEN_BY_NAME
        )
        n, cin, cout, size, kernel, options = named[geometry]
        wanted, activation, pool = (TAILS | MORE_TAILS)[tail]
        self.dtype, self.names, self.seed = dtype, (geometry, tail), seed
        self.options = dict(options)
        groups, transposed = options.get("groups", 1), options.get("transposed", False)
        if activation == "tanh_sigmoid":
            cout += cout % (2 * groups)  # an even number of channels
            activation = "silu" if groups > 1 else activation
        seeds = iter(range(100 * seed, 100 * seed + 100))

        def draw(*shape, scale=1.0):
            t = make(*shape, dtype=torch.float64, seed=next(seeds), integer=integer)
            return (t if integer else t * scale).to(dtype)

        fan_in = cin // groups * math.prod(kernel)
        if transposed:
            fan_in = max(1, fan_in // math.prod([options.get("stride", 1)] if len(kernel) == 1 else [1]))
        shape = (cin, cout // groups, *kernel) if transposed else (cout, cin // groups, *kernel)
        self.tensors = {"x": draw(n, cin, *size), "weight": draw(*shape, scale=fan_in**-0.5)}
        for name in ("bias", "scale", "shift"):
            self.tensors[name] = draw(cout) if name in wanted else None
        with torch.no_grad():
            own = bmk.conv(self.tensors["x"].double(), self.tensors["weight"].double(), backend="torch", **options)
        self.tensors["residual"] = draw(*own.shape) if "residual" in wanted else None
        if pool is not None:  # a window no larger than the output
            side = [min(pool[1], s) for s in own.shape[2:]]
            rim = [[min(pool[3], s // 2) for s in side]] if len(pool) == 4 else []
            pool = (pool[0], side, *([[pool[2]] * len(side)] if len(pool) >= 3 else []), *rim)
        self.options |= {"activation": activation, "pool": pool}
        with torch.no_grad():
            self.grad = draw(*self.run(torch.float64, "torch", grads=False)[0].shape)

    def run(self, dtype, backend, grads=True, layout=lambda t: t):
        """The result, then the gradients of every tensor in the order of NAMES (None where there is none)."""
        tensors = {
            name: None if t is None else layout(t.detach().to(dtype)).requires_grad_(grads)
            for name, t in self.tensors.items()
        }
        optional = {k: v for k, v in tensors.items() if k in ("scale", "shift", "residual")}
        out = bmk.conv(
            tensors["x"], tensors["weight"], tensors["bias"], **optional, **self.options, backend=backend
        )  # fmt: skip
        if not grads:
            return [out]
        leaves = [t for t in tensors.values() if t is not None]
        found = iter(torch.autograd.grad(out, leaves, self.grad.to(dtype)))
        return [out.detach(), *(None if t is None else next(found) for t in tensors.values())]

    def results(self, layout=lambda t: t):
        """Of the cpu kernel, in float64, and of torch in the same dtype."""
        return (
            self.run(self.dtype, "cpu", layout=layout),
            self.run(torch.float64, "torch"),
            self.run(self.dtype, "torch"),
        )

    def check(self, layout=lambda t: t):
        """Result and gradients of the cpu kernel by the error rule. The largest error of a few numbers is a matter of luck, for
        torch's as for ours, so small problems are drawn several times and judged together."""
        few, some = self.grad.numel() < 300, self.grad.numel() < 3000
        draws = 1 if self.dtype == torch.float64 else 8 if few else 3 if some else 1
        problems = [self, *(Problem(*self.names, self.dtype, self.seed + 7 * i) for i in range(1, draws))]
        found = [p.results(layout) for p in problems]
        for i, name in enumerate(("out", *NAMES)):
            if found[0][0][i] is None:
                continue
            actual, exact, baseline = (torch.stack([results[kind][i] for results in found]) for kind in range(3))
            assert_matches(
                actual,
                exact,
                baseline,
                dtype=self.dtype,
                gradient=name != "out",
                magnitude=self._magnitude(name),
                name=name,
            )

    def check_exact(self):
        """Result and gradients of the cpu kernel in float32 to the bit, of a problem of integers, in every layout."""
        exact = self.run(torch.float64, "torch")
        for layout in LAYOUTS.values():
            for name, ours, other in zip(("out", *NAMES), self.run(torch.float32, "cpu", layout=layout), exact):
                if ours is not None:
                    assert torch.equal(ours, other.float()), name

    def _magnitude(self, name):
        """Sums over pixels may cancel: they are measured against the size of what is summed up."""
        return math.sqrt(self.grad.numel() / self.grad.shape[1]) if name in ("bias", "shift", "scale") else 0.0
