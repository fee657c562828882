"""One call of each op and kind of kernel, as functions of tensors: for graphs, streams, repetitions and lack of memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import bigmodel_kernels as bmk
from bigmodel_kernels.testing import CAPS, make, relative_l2


@dataclass(frozen=True)
class Call:
    """`function(*inputs, backend=..)` on tensors of these shapes; the first `leaves` of them have gradients."""

    function: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    backends: tuple[str, ...]
    leaves: int = 1

    def inputs(self, device: str, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
        """Random numbers, of the size that keeps sums of products near 1."""
        scales = [1.0] + [shape[-1] ** -0.5 for shape in self.shapes[1:]]
        drawn = (make(*shape, seed=seed + i) * scale for i, (shape, scale) in enumerate(zip(self.shapes, scales)))
        return [t.to(dtype).to(device) for t in drawn]


def _lstm(x: Tensor, *weights: Tensor, backend: str) -> Tensor:
    return bmk.lstm(x, None, list(weights), backend=backend)[0]


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, backend: str) -> Tensor:
    return bmk.layer_norm(x, weight, bias, backend=backend)


def _cross_entropy(logits: Tensor, *, backend: str) -> Tensor:
    target = torch.arange(logits.shape[0], device=logits.device) % logits.shape[1]
    return bmk.cross_entropy(logits, target, backend=backend)


def _stem(x: Tensor, weight: Tensor, *, backend: str) -> Tensor:
    return bmk.conv(x, weight, stride=2, padding=3, activation="silu", pool=("max", 2), backend=backend)


def _depthwise(x: Tensor, weight: Tensor, *, backend: str) -> Tensor:
    return bmk.conv(x, weight, padding=1, groups=x.shape[1], backend=backend)


def _conv(x: Tensor, weight: Tensor, *, backend: str) -> Tensor:
    return bmk.conv(x, weight, padding=1, activation="silu", backend=backend)


def _attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str) -> Tensor:
    return bmk.attention(q, k * k.shape[-1] ** 0.5, v, is_causal=True, backend=backend)


CALLS = {
    "attention": Call(_attention, ((2, 4, 200, 64),) * 3, ("triton",), leaves=3),
    "conv": Call(_conv, ((2, 32, 28, 28), (48, 32, 3, 3)), ("triton",), leaves=2),
    "depthwise": Call(_depthwise, ((2, 64, 56, 56), (64, 1, 3, 3)), ("cuda", "triton")),
    "stem": Call(_stem, ((4, 3, 64, 64), (32, 3, 7, 7)), ("cuda", "triton")),
    "lstm": Call(_lstm, ((30, 16, 64), (512, 64), (512, 128), (512,), (512,)), ("cuda", "triton"), leaves=5),
    "layer_norm": Call(_layer_norm, ((300, 768), (768,), (768,)), ("triton",), leaves=3),
    "cross_entropy": Call(_cross_entropy, ((300, 1000),), ("triton",)),
}
_TINY_SHAPES = {
    "attention": ((1, 2, 20, 16),) * 3,
    "conv": ((1, 4, 7, 7), (6, 4, 3, 3)),
    "depthwise": ((1, 8, 7, 7), (8, 1, 3, 3)),
    "stem": ((1, 3, 15, 15), (4, 3, 7, 7)),
    "lstm": ((3, 4, 8), (64, 8), (64, 16), (64,), (64,)),
    "layer_norm": ((5, 40), (40,), (40,)),
    "cross_entropy": ((5, 30),),
}
TINY = {name: replace(call, shapes=_TINY_SHAPES[name]) for name, call in CALLS.items()}
NAMED = [(name, backend) for name, call in CALLS.items() for backend in call.backends]


def gradients(call: Call, inputs: list[Tensor], backend: str) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_(i < call.leaves) for i, t in enumerate(inputs)]
    out = call.function(*leaves, backend=backend)
    return out.detach(), *torch.autograd.grad(out, leaves[: call.leaves], torch.ones_like(out))


def repeat(call: Call, inputs: list[Tensor], backend: str, forwards: int, backwards: int) -> None:
    """The same bits from every run: of the forward, and of the backward where torch asks for determinism."""
    with torch.no_grad():
        first = call.function(*inputs, backend=backend)
        for i in range(forwards):
            assert torch.equal(call.function(*inputs, backend=backend), first), f"forward {i} differs"
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        expected = gradients(call, inputs, backend)
        for i in range(backwards):
            found = gradients(call, inputs, backend)
            assert all(torch.equal(a, b) for a, b in zip(found, expected)), f"backward {i} differs"
    finally:
        torch.use_deterministic_algorithms(before)


def check_rows_of_small_lse(device: str, dtype: torch.dtype, backend: str) -> None:
    """A mask, 64 keys past a multiple of 128, and rows with an lse below -88.7, where e^lse is 0 in float32: gradients are right
    and finite. A vendor's kernel has been seen to give NaN there (PyTorch issue 196678)."""
    q, k, v, grad = (make(2, 4, 192, 64, dtype=dtype, seed=seed).to(device) for seed in range(4))
    mask = torch.full((2, 1, 192, 192), -100.0, device=device, dtype=dtype)
    mask[:, :, ::2] = 0.0

    def run(backend: str, to: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.detach().to(to).requires_grad_() for t in (q, k, v)]
        out = bmk.attention(*leaves, attn_mask=mask.to(to), backend=backend)
        return out.detach(), *torch.autograd.grad(out, leaves, grad.to(to))

    _, lse = bmk.attention(
        q.double(), k.double(), v.double(), attn_mask=mask.double(), return_lse=True, backend="torch"
    )
    assert bool((lse[:, :, 1::2] < -88.7).all())
    for name, found, exact in zip(("out", "dq", "dk", "dv"), run(backend, dtype), run("torch", torch.float64)):
        assert bool(found.isfinite().all()), name
        # lse is known to half a step of float32 at 100, which is 4e-6 of every probability
        assert relative_l2(found, exact) < CAPS[dtype][name != "out"] + 8e-6, name
