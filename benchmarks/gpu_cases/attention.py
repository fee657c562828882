"""Attention: against each of SDPA's kernels, compiled FlexAttention, and FlashAttention's packages where they are installed."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import bigmodel_kernels as bmk
from benchmarks.gpu_bench import Bench, Contestants, gradients
from benchmarks.gpu_cases import peers

BACKENDS = ("auto", "cuda", "triton")
KERNELS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# batch, heads, key heads, length, head dim, kind: causal | full | padded (a mask of each sequence's length) | window (of 1024)
FORWARD = [
    (8, 16, 16, 2048, 128, "causal"),
    (16, 16, 16, 1024, 128, "causal"),
    (4, 16, 16, 4096, 128, "causal"),
    (2, 16, 16, 8192, 128, "causal"),
    (1, 16, 16, 16384, 128, "causal"),
    (4, 16, 16, 4096, 128, "full"),
    (4, 32, 8, 4096, 128, "causal"),
    (4, 16, 16, 4096, 64, "causal"),
    (1, 16, 16, 16384, 64, "full"),
    (32, 12, 12, 512, 64, "full"),
    (32, 12, 12, 512, 64, "padded"),
    (2, 16, 16, 8192, 128, "window"),
]
TRAINING = [
    (4, 16, 16, 4096, 128, "causal"),
    (2, 16, 16, 8192, 128, "causal"),
    (4, 16, 16, 4096, 64, "causal"),
    (32, 12, 12, 512, 64, "padded"),
    (4, 32, 8, 4096, 128, "causal"),
]
DRY = [(2, 4, 2, 24, 16, kind) for kind in ("causal", "full", "padded", "window")]
CACHE_SCALE = 0.03  # of a cache of 8 bits
DECODE = [(batch, length) for batch in (1, 8) for length in (1024, 4096, 8192, 65536) if batch * length <= 1 << 18]


def measure(bench: Bench) -> None:
    for dtype in bench.dtypes[:1]:
        for sizes in bench.pick(FORWARD, DRY):
            _case(bench, *sizes, dtype, training=False)
        for sizes in bench.pick(TRAINING, DRY[::2]):
            _case(bench, *sizes, dtype, training=True)


def _case(bench, batch, heads, kv_heads, length, depth, kind, dtype, *, training) -> None:
    torch.manual_seed(0)
    window = bench.pick(1024, 8)
    shapes = ((batch, heads), (batch, kv_heads), (batch, kv_heads))
    q, k, v = (bench.draw(*shape, length, depth, dtype=dtype).requires_grad_(training) for shape in shapes)
    upstream = bench.draw(batch, heads, length, depth, dtype=dtype)
    lengths = torch.linspace(length // 2, length, batch, device=bench.device).long()
    mask = None
    if kind == "padded":
        mask = (torch.arange(length, device=bench.device) < lengths[:, None])[:, None, None]
    band = _band(length, window, bench.device) if kind == "window" else None
    gqa = heads != kv_heads
    options = {"attn_mask": mask, "is_causal": kind in ("causal", "window"), "enable_gqa": gqa}

    def run(backend: str) -> Callable[[], Tensor]:
        sides = (window - 1, None) if kind == "window" else None
        return lambda: bmk.attention(q, k, v, **options, window=sides, backend=backend)

    def sdpa() -> Tensor:
        known = {**options, "is_causal": kind == "causal", "attn_mask": band if kind == "window" else mask}
        return F.scaled_dot_product_attention(q, k, v, **known)

    def by(kernel: SDPBackend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(kernel):
                return sdpa()

        return call

    stock: Contestants = {"SDPA": sdpa} | {name: by(kernel) for name, kernel in KERNELS.items()}
    stock["flex"] = _flex(bench, q, k, v, kind, lengths, window, gqa)
    if mask is None:
        stock |= _packages(q, k, v, kind, window)
    ours: Contestants = {backend: run(backend) for backend in BACKENDS}
    # One sequence and the query heads of one key head tell a right kernel from a wrong one, and fit in float64.
    group = heads // kv_heads
    seen = {"causal": 0.5, "full": 1.0, "padded": 0.75, "window": min(1.0, window / length)}[kind]
    flops = 4.0 * batch * heads * length * length * depth * seen
    exact = [t.detach()[:1, :n].double().requires_grad_(training) for t, n in ((q, group), (k, 1), (v, 1))]
    allowed = band if kind == "window" else None if mask is None else mask[:1]
    truth = F.scaled_dot_product_attention(*exact, attn_mask=allowed, is_causal=kind == "causal", enable_gqa=group > 1)
    name = f"attention {str(dtype)[6:]} {kind} B{batch} H{heads}/{kv_heads} S{length} D{depth}"
    traffic = q.element_size() * 2.0 * (q.numel() + k.numel())
    if not training:
        with torch.no_grad():
            bench.compare(
                f"{name} fwd", ours, stock, truth, dtype=dtype, flops=flops, traffic=traffic,
                part=lambda out: out[:1, :group],
            )  # fmt: skip
        return
    wanted = torch.autograd.grad(truth, exact, upstream[:1, :group].double())
    bench.compare(
        f"{name} fwd+bwd",
        {n: gradients(f, (q, k, v), upstream) for n, f in ours.items()},
        {n: gradients(f, (q, k, v), upstream) for n, f in stock.items()},
        wanted,
        dtype=dtype, flops=3.5 * flops, traffic=3.5 * traffic, gradient=True,
        part=lambda grads: (grads[0][:1, :group], grads[1][:1, :1], grads[2][:1, :1]),
    )  # fmt: skip


def _band(length: int, window: int, device: str) -> Tensor:
    position = torch.arange(length, device=device)
    return (position <= position[:, None]) & (position > position[:, None] - window)


def _flex(bench, q, k, v, kind, lengths, window, gqa) -> Callable[[], Tensor]:
    def allowed(b, h, i, j):
        if kind == "padded":
            return j < lengths[b]
        return i >= j if kind == "causal" else (i >= j) & (i - j < window)

    ready: list[Callable] = []

    def call() -> Tensor:
        if not ready:  # compiled at the first call, where a refusal is noted
            size = q.shape[2]
            batches = q.shape[0] if kind == "padded" else None
            blocks = (
                None if kind == "full" else create_block_mask(allowed, batches, None, size, size, device=bench.device)
            )
            function = flex_attention if bench.dry else bench.compiled(flex_attention)
            ready.append(lambda: function(q, k, v, block_mask=blocks, enable_gqa=gqa))
        return ready[0]()

    return call


def _packages(q, k, v, kind, window) -> Contestants:
    """FlashAttention's own kernels take [B, S, H, D]."""
    sides = (window - 1, 0) if kind == "window" else (-1, -1)

    def call(function: peers.Attention) -> Tensor:
        return function(*(t.transpose(1, 2) for t in (q, k, v)), kind != "full", sides).transpose(1, 2)

    return {name: lambda f=function: call(f) for name, function in peers.installed().items()}


def measure_decode(bench: Bench) -> None:
    """Caches of the queries' own type, and of 8 bits: of those SDPA's time is that of the cache it would need."""
    heads, kv_heads, depth = bench.pick((32, 8, 128), (4, 2, 16))
    dtype = bench.dtypes[0]
    for batch, length in bench.pick(DECODE, [(2, 40)]):
        torch.manual_seed(0)
        q = bench.draw(batch, heads, 1, depth, dtype=dtype)
        k, v = (bench.draw(batch, kv_heads, length, depth, dtype=dtype) for _ in range(2))
        lengths = torch.full((batch,), length, dtype=torch.int32, device=bench.device)
        for cache in (dtype, torch.float8_e4m3fn, torch.int8):
            scales = {} if cache == dtype else {"k_scale": CACHE_SCALE, "v_scale": CACHE_SCALE}
            kept = [_quantised(t, cache) if scales else t for t in (k, v)]
            seen = [t.to(dtype) * CACHE_SCALE if scales else t for t in kept]  # what SDPA is given, made beforehand

            def ours(backend: str, q: Tensor = q, kept=kept, lengths=lengths, scales=scales) -> Tensor:
                return bmk.attention_decode(q, *kept, lengths, **scales, backend=backend)

            bench.compare(
                f"decode {str(dtype)[6:]}, cache {str(cache)[6:]}, B{batch} KV{length} {heads}/{kv_heads} heads",
                {backend: lambda b=backend, f=ours: f(b) for backend in BACKENDS},
                {"SDPA": lambda q=q, seen=seen: F.scaled_dot_product_attention(q, *seen, enable_gqa=True)},
                ours("torch", q.double(), kept if scales else [t.double() for t in kept]),
                dtype=dtype,
                flops=4.0 * batch * heads * length * depth,
                traffic=float(sum(t.nbytes for t in kept)),
            )


def _quantised(t: Tensor, cache: torch.dtype) -> Tensor:
    t = t.float() / CACHE_SCALE
    return t.round().clamp(-128, 127).to(cache) if cache == torch.int8 else t.clamp(-448, 448).to(cache)
