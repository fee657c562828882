"""Attention against PyTorch's scaled_dot_product_attention."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigmodel_kernels as bmk
from benchmarks.cases import Case, Problem
from benchmarks.contestant import FWD, PASSES, TRAIN, Contestant

BACKWARD = 2.5  # five products of the forward's size (S and dP again, dV, dQ, dK) for its two


def ours(
    q: Tensor,  # [B, Hq, Sq, D]
    k: Tensor,  # [B, Hkv, Sk, D]
    v: Tensor,  # [B, Hkv, Sk, D]
    mask: Tensor | None = None,  # broadcasts to [B, Hq, Sq, Sk]
    *,
    causal: bool,
) -> Tensor:
    return bmk.attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, causal: bool) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa)


def grouped_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The rewrite for one query per head: the heads that share a key head become rows of one query block."""
    b, heads, _, d = q.shape
    rows = q.reshape(b, k.shape[1], heads // k.shape[1], d)
    return F.scaled_dot_product_attention(rows, k, v).reshape(b, heads, 1, d)


def float_mask(b: int, sq: int, sk: int) -> Tensor:  # [1, 1, Sq, Sk]
    """A bias that falls with the distance, different for every pair."""
    distance = (torch.arange(sk) - torch.arange(sq)[:, None]).abs()
    return (-0.01 * distance).expand(1, 1, sq, sk).contiguous()


def padding_mask(b: int, sq: int, sk: int) -> Tensor:  # [B, 1, 1, Sk], True: attend
    lengths = torch.linspace(sk // 4, sk, b).long()
    return (torch.arange(sk) < lengths[:, None])[:, None, None, :]


def build(dtype, pass_, *, b, heads, sq, d, kv_heads=None, sk=None, causal=False, mask=None, compile=False) -> Problem:
    kv_heads, sk = kv_heads or heads, sk or sq
    train = pass_ == TRAIN

    def draw(h: int, s: int) -> Tensor:
        return torch.randn(b, h, s, d).to(dtype).requires_grad_(train)

    inputs = [draw(heads, sq), draw(kv_heads, sk), draw(kv_heads, sk)]
    if mask is not None:
        values = mask(b, sq, sk)
        inputs.append(values.to(dtype).requires_grad_(train) if values.is_floating_point() else values)
    stock = [Contestant("eager", partial(sdpa, causal=causal), tuple(inputs))]
    if sq == 1 and kv_heads != heads:
        stock.append(Contestant("grouped queries", grouped_queries, tuple(inputs)))
    return Problem(
        ours=Contestant("ours", partial(ours, causal=causal), tuple(inputs)),
        stock=stock,
        flops=4.0 * b * heads * sq * sk * d * (0.5 if causal else 1.0),
        backward=BACKWARD,
        compile=["eager"] if compile else [],
    )


def in_pages(q: Tensor, k_pages: Tensor, v_pages: Tensor, lengths: Tensor, table: Tensor) -> Tensor:
    return bmk.attention_decode(q, k_pages, v_pages, lengths, block_table=table)


def gathered(q: Tensor, k_pages: Tensor, v_pages: Tensor, lengths: Tensor, table: Tensor) -> Tensor:
    """What stock PyTorch has for pages: they are copied together, and a mask leaves out what is past the lengths."""
    k, v = (t[table].transpose(1, 2).flatten(2, 3) for t in (k_pages, v_pages))  # [B, Hkv, S, D]
    b, heads, _, d = q.shape
    rows = q.reshape(b, k.shape[1], heads // k.shape[1], d)
    mask = (torch.arange(k.shape[2]) < lengths[:, None])[:, None, None, :]
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask).reshape(b, heads, 1, d)


def one_by_one(q: Tensor, k_pages: Tensor, v_pages: Tensor, lengths: Tensor, table: Tensor) -> Tensor:
    """The rewrite with less to copy: each sequence by itself, its own pages alone, and no mask."""
    page_size, out = k_pages.shape[2], []
    for row, pages, n in zip(q, table, lengths.tolist()):
        used = pages[: -(-n // page_size)]
        k, v = (t[used].transpose(0, 1).flatten(1, 2)[None, :, :n] for t in (k_pages, v_pages))  # [1, Hkv, n, D]
        out.append(grouped_queries(row[None], k, v))
    return torch.cat(out)


def build_paged(dtype, pass_, *, b, heads, kv_heads, sk, d, page_size) -> Problem:
    """Decoding with caches in pages; the sequences have half of `sk` keys up to all."""
    pages = sk // page_size
    table = torch.randperm(b * pages).view(b, pages)
    lengths = torch.linspace(sk // 2, sk, b).long()
    q = torch.randn(b, heads, 1, d).to(dtype)
    caches = [torch.randn(b * pages, kv_heads, page_size, d).to(dtype) for _ in range(2)]
    inputs = (q, *caches, lengths, table)
    return Problem(
        ours=Contestant("ours", in_pages, inputs),
        stock=[Contestant("gathered pages", gathered, inputs), Contestant("one by one", one_by_one, inputs)],
        flops=4.0 * heads * int(lengths.sum()) * d,
    )


def end_to_end(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, *, longest: int) -> Tensor:  # [tokens, H, D]
    return bmk.attention_varlen(q, k, v, ends, ends, longest, longest)


def each_sequence(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Tensor:
    lengths = ends.diff().tolist()
    parts = zip(*[[one.transpose(0, 1) for one in t.split(lengths)] for t in (q, k, v)])
    outs = [F.scaled_dot_product_attention(*one) for one in parts]
    return torch.cat([out.transpose(0, 1) for out in outs])


def padded(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, *, longest: int) -> Tensor:
    """Copied to the longest and back, with a mask for what follows the sequences."""
    lengths = ends.diff()
    place = torch.arange(longest)
    inside = place < lengths[:, None]
    rows = (ends[:-1, None] + place).clamp(max=q.shape[0] - 1)
    out = F.scaled_dot_product_attention(*[t[rows].transpose(1, 2) for t in (q, k, v)], attn_mask=inside[:, None, None])
    return out.transpose(1, 2)[inside]


def nested(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Tensor:
    jagged = [torch.nested.nested_tensor_from_jagged(t, ends).transpose(1, 2) for t in (q, k, v)]
    return F.scaled_dot_product_attention(*jagged).transpose(1, 2).values()


def build_varlen(dtype, pass_, *, b, shortest, longest, heads, d) -> Problem:
    """Self-attention of sequences of evenly spread lengths, in no order."""
    lengths = torch.linspace(shortest, longest, b).long()[torch.randperm(b)]
    ends = F.pad(lengths.cumsum(0), (1, 0))
    q, k, v = (torch.randn(int(ends[-1]), heads, d).to(dtype).requires_grad_(pass_ == TRAIN) for _ in range(3))
    inputs = (q, k, v, ends)
    stock = {"one by one": each_sequence, "padded": partial(padded, longest=longest), "nested tensors": nested}
    return Problem(
        ours=Contestant("ours", partial(end_to_end, longest=longest), inputs),
        stock=[Contestant(name, function, inputs) for name, function in stock.items()],
        flops=4.0 * heads * int((lengths * lengths).sum()) * d,
        backward=BACKWARD,
    )


class SelfAttention(nn.Module):
    """A multi-head layer on one sequence."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:  # [B, S, E]
        return self.layer(x, x, x, need_weights=False)[0]


def build_layer(dtype, pass_, *, b, s, e, heads) -> Problem:
    stock = nn.MultiheadAttention(e, heads, batch_first=True).to(dtype)
    ours = bmk.nn.MultiheadAttention(e, heads, batch_first=True).to(dtype)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(b, s, e).to(dtype).requires_grad_(pass_ == TRAIN)
    return Problem(
        ours=Contestant("ours", SelfAttention(ours), (x,)),
        stock=[Contestant("eager", SelfAttention(stock), (x,))],
        flops=2.0 * b * s * 4 * e * e + 4.0 * b * s * s * e,
    )


def case(name: str, *, passes=PASSES, dtypes=("fp32",), quick=False, **sizes) -> Case:
    return Case("attention", name, partial(build, **sizes), passes, dtypes, quick)


# torch.compile hands attention to the same kernel as eager: the first case shows it, the others need not.
BOTH = ("fp32", "bf16")
CASES = [
    case("B1 H8 S1024 D64 causal", b=1, heads=8, sq=1024, d=64, causal=True, compile=True, dtypes=BOTH, quick=True),
    case("B1 H8 S1024 D64", b=1, heads=8, sq=1024, d=64),
    case("B8 H8 S128 D64", b=8, heads=8, sq=128, d=64, dtypes=BOTH),
    case("B1 H8 S1024 D64 float mask", b=1, heads=8, sq=1024, d=64, mask=float_mask),
    case("B4 H8 S512 D64 key padding", b=4, heads=8, sq=512, d=64, mask=padding_mask),
    case("decode B1 H8:1 KV4096 D64", b=1, heads=8, kv_heads=1, sq=1, sk=4096, d=64, passes=(FWD,)),
    case("decode B8 H32:4 KV4096 D128", b=8, heads=32, kv_heads=4, sq=1, sk=4096, d=128, passes=(FWD,), dtypes=BOTH),
    Case(
        "attention",
        "decode in pages of 16 B8 H32:4 KV2048-4096 D128",
        partial(build_paged, b=8, heads=32, kv_heads=4, sk=4096, d=128, page_size=16),
        (FWD,),
    ),
    Case(
        "attention",
        "varlen B32 H8 S16-256 D64",
        partial(build_varlen, b=32, shortest=16, longest=256, heads=8, d=64),
        dtypes=BOTH,
    ),
    Case("attention", "MultiheadAttention B8 S256 E512 H8", partial(build_layer, b=8, s=256, e=512, heads=8)),
]
