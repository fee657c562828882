"""The launchers of the Triton kernels of triton_layer.py, and of those of convolution for what is left: the products of the
backward whose results are gradients, and a forward with more values than one program holds, which is three convolutions, the gate
in the epilogue of the first one, residual and sum in those of the other two."""

from __future__ import annotations

import torch

from bigmodel_kernels import _triton
from bigmodel_kernels.ops.conv import triton_kernels as conv
from bigmodel_kernels.ops.conv.reference import LEAKY_SLOPE
from bigmodel_kernels.ops.gated_conv import layout
from bigmodel_kernels.ops.gated_conv.triton_configs import config
from bigmodel_kernels.ops.gated_conv.triton_layer import forward_kernel, gradient_kernel


def _options(weight, dilation: int, activation: str, save: bool) -> tuple:
    """The convolution's arguments after its tensors."""
    padding = [dilation * (weight.shape[2] - 1), 0]
    return [1], padding, [dilation], 1, False, [0], activation, "none", [], [], [], LEAKY_SLOPE, save


def supports(x, weight, bias, out_weight, out_bias, skip_weight, skip_bias, skip, dilation, save) -> str | None:
    if skip_weight is not None and skip_weight.shape[0] == 0:
        return f"skip_weight has shape {list(skip_weight.shape)}: there is nothing to sum over"
    return conv.supports(x, weight, bias, None, None, None, *_options(weight, dilation, "tanh_sigmoid", False))


def _config(x, weight, kernel: str) -> dict[str, int] | None:
    device = x.device.index
    return config(_triton.gpu(device), device, kernel, x.element_size(), weight.shape[0] // 2)


def _packed(weight):
    """[2 D, K, C], contiguous."""
    return weight.transpose(1, 2).contiguous()


def _contiguous(*tensors):
    return (t if t is None or t.is_contiguous() else t.contiguous() for t in tensors)


def _constants(x, weight, sizes: dict[str, int]) -> dict:
    """The time steps lie on axis PIXELS of a tile: the last one is that to read x along."""
    precision = _triton.precision(x.dtype, torch.backends.cudnn.conv)
    return {"KERNEL": weight.shape[2], "PIXELS": int(x.stride(1) != 1), "PRECISION": precision, **sizes}


def _composed(x, weight, bias, out_weight, out_bias, skip_weight, skip_bias, skip, dilation):
    def causal(x, weight, bias, dilation, activation="none", added=None):
        return conv.fwd(x, weight, bias, None, None, added, *_options(weight, dilation, activation, False))[0]

    a = causal(x, weight, bias, dilation, "tanh_sigmoid")
    return tuple(
        x.new_empty(0) if w is None else layout.like(causal(a, w, b, 1, added=added), x)
        for w, b, added in ((out_weight, out_bias, x), (skip_weight, skip_bias, skip))
    )


def fwd(x, weight, bias, out_weight, out_bias, skip_weight, skip_bias, skip, dilation, save):
    sizes, gates = _config(x, weight, "forward"), layout.no_gates(x, weight, save)
    if sizes is None:
        return *_composed(x, weight, bias, out_weight, out_bias, skip_weight, skip_bias, skip, dilation), gates
    batch, channels, length = x.shape
    skips = 0 if skip_weight is None else skip_weight.shape[0]
    out = x.new_empty(0) if out_weight is None else layout.empty(x, channels)
    total = x.new_empty(0) if skip_weight is None else layout.empty(x, skips)
    bias, out_weight, out_bias, skip_weight, skip_bias = _contiguous(bias, out_weight, out_bias, skip_weight, skip_bias)
    strides = x.stride()
    _triton.launch(
        forward_kernel, -(-batch * length // sizes["BLOCK_M"]),
        x, _packed(weight), bias, out_weight, out_bias, out, skip_weight, skip_bias, skip, total,
        strides, strides if out_weight is None else out.stride(), strides if skip is None else skip.stride(),
        strides if skip_weight is None else total.stride(),
        batch, length, channels, weight.shape[0] // 2, skips, dilation, **_constants(x, weight, sizes),
    )  # fmt: skip
    return out, total, gates


def bwd(
    d_out, d_skip, gates, need_x, need_weights,
    x, weight, bias, out_weight, out_bias, skip_weight, skip_bias, skip, dilation, save,
):  # fmt: skip
    batch, channels, length = x.shape
    values = weight.shape[0] // 2
    sizes = _config(x, weight, "gradient")
    tiles = -(-batch * length // sizes["BLOCK_M"])
    a = layout.empty(x, values) if need_weights else None
    d_z = layout.empty(x, 2 * values)
    d_bias = x.new_empty(tiles, 2 * values, dtype=torch.float32) if need_weights and bias is not None else None
    _triton.launch(
        gradient_kernel, tiles * -(-values // sizes["BLOCK_D"]),
        x, _packed(weight), *_contiguous(bias), d_out, *_contiguous(out_weight), d_skip, *_contiguous(skip_weight),
        a, d_z, d_bias,
        x.stride(), *((x if t is None else t).stride() for t in (d_out, d_skip, a)), d_z.stride(),
        batch, length, channels, values, 0 if skip_weight is None else skip_weight.shape[0], dilation,
        **_constants(x, weight, sizes),
    )  # fmt: skip
    call = conv.call_of(x, weight, *_options(weight, dilation, "none", True))
    d_x = layout.empty(x, channels) if need_x else x.new_empty(0)
    if need_x:
        call.correlate(True, d_z, call.packed(weight), d_x, residual=d_out, forward=False)
    if not need_weights:
        return d_x, *(x.new_empty(0) for _ in range(6))
    d_weight = call.weights(x, d_z).reshape(weight.shape).to(x.dtype).contiguous()
    gradients = [d_x, d_weight, x.new_empty(0) if bias is None else d_bias.sum(0).to(x.dtype)]
    for d, w, b in ((d_out, out_weight, out_bias), (d_skip, skip_weight, skip_bias)):
        if d is None:
            gradients += [x.new_empty(0) if p is None else torch.zeros_like(p) for p in (w, b)]
            continue
        needs = [False, True, b is not None, False, False, False]
        # Without activation and pool nothing that a forward saves is read.
        gradients += conv.bwd(d, d, d, d, needs, a, w, b, None, None, None, *_options(w, 1, "none", True))[1:3]
    return tuple(gradients)
