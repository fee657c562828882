"""The CUDA kernel of attention_decode, emulated: against float64, contiguous and paged caches, any number of splits."""

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels import _registry
from bigmodel_kernels.ops.attention_decode import cuda
from bigmodel_kernels.testing import assert_matches, make
from tests.emulator.backend import SUFFIX, emulated
from tests.emulator.emulator import EmulatorError, Program, needs_compiler
from tests.emulator.shared_sizes import decode_shared_bytes

pytestmark = needs_compiler
KERNEL, WARPS = "attention_decode.cuh", 4
CACHES = {torch.float16: "as_query", torch.bfloat16: "as_query", torch.int8: "int8", torch.float8_e4m3fn: "e4m3"}


def kernel_name(dtype: torch.dtype, cache: torch.dtype, head_dim: int) -> str:
    return f"bmk::attention_decode<{SUFFIX[dtype]}, bmk::Cache::{CACHES[cache]}, {head_dim}>"


DECODE = Program(KERNEL, *(kernel_name(dtype, dtype, head) for dtype in cuda.DTYPES for head in (64, 128)))
QUANTISED = Program(
    KERNEL,
    *(kernel_name(d, c, head) for d in cuda.DTYPES for c in list(CACHES)[2:] for head in (64, 128)),
)


class Native:
    """The native op of csrc/cuda/attention_decode.cu, with its launch run by the emulator."""

    def __init__(self, seed=0, detect="memory", edit=None):
        self.seed, self.detect, self.edit = seed, detect, edit

    def attention_decode(
        self, q, k, v, k_scale, v_scale, lengths, table, scale, softcap, splits, out, lse, partial, tickets
    ):
        program = DECODE if k_scale is None else QUANTISED
        batch, heads, q_len, head_dim = q.shape
        pages, kv_heads, page_size, _ = k.shape
        width = 1 if table is None else table.shape[1]
        tiles = kv_heads * -(-(heads // kv_heads) * q_len // cuda.ROWS)
        padded = 64 if head_dim <= 64 else 128
        partial.fill_(torch.nan)
        out.fill_(torch.nan)
        numbers = (heads, kv_heads, q_len, head_dim, width * page_size, pages, page_size, width)
        strides = [(0, 0, 0) if t is None else t.stride()[:3] for t in (q, k, v, k_scale, v_scale)]
        arguments = (
            q, k, v, k_scale, v_scale, *strides, lengths, table, out, lse, partial, tickets, *numbers,
            float(scale), float(softcap),
        )  # fmt: skip
        name = kernel_name(q.dtype, k.dtype, padded)
        if self.edit or self.detect == "races":  # this kernel alone, which compiles sooner
            program = Program(KERNEL, name, edit=self.edit)
        program.run(
            name, (splits, tiles, batch), 32 * WARPS, arguments,
            shared_bytes=decode_shared_bytes(k.element_size(), padded), seed=self.seed, detect=self.detect,
        )  # fmt: skip
        assert not tickets.any()


def check_decode(
    monkeypatch, batch, heads, kv_heads, q_len, head_dim, capacity, lengths, page_size=None, splits=None,
    dtype=torch.bfloat16, softcap=0.0, scale=None, cache=None, scales=(None, None), **native,
):  # fmt: skip
    q = make(batch, heads, q_len, head_dim, dtype=dtype, seed=1)
    k, v = (make(batch, kv_heads, capacity, head_dim, dtype=dtype, seed=seed) for seed in (2, 3))
    lengths = torch.tensor(lengths, dtype=torch.int32)
    options = {"softcap": softcap, "scale": scale, "return_lse": True}
    if cache:
        k, v = (quantised(t, s, cache) for t, s in zip((k, v), scales))
        options |= {"k_scale": scales[0], "v_scale": scales[1]}
    runs = [
        bmk.attention_decode(q.to(d), *(t if cache else t.to(d) for t in (k, v)), lengths, **options, backend="torch")
        for d in (torch.float64, dtype)
    ]
    per_key = [s for s in scales if isinstance(s, torch.Tensor) and s.dim() == 3]
    # Nothing past the length may be read into a result; int8 has no NaN, its scales have.
    poisoned = [s.clone() for s in per_key] + [t for t in (k, v) if t.dtype != torch.int8]
    for b, length in enumerate(lengths.tolist()):
        for t in poisoned:
            t[b, :, length:] = torch.nan
    per_key = poisoned[: len(per_key)]
    table = None
    if page_size:
        (k, v, *per_key), table = paged((k, v, *per_key), page_size, lengths)
    if per_key:
        options |= dict(zip(("k_scale", "v_scale"), per_key))
    if splits:
        monkeypatch.setattr(cuda, "splits_for", lambda *sizes: splits)
    with emulated(monkeypatch, "attention_decode", attention_decode=Native(**native).attention_decode):
        found = bmk.attention_decode(q, k, v, lengths, block_table=table, **options, backend="cuda")
    for i, (actual, exact, baseline) in enumerate(zip(found, *runs)):
        baseline = None if i else baseline  # torch's own lse of 16-bit scores is no yardstick
        assert_matches(
            actual, exact, baseline, dtype=torch.float32 if i else dtype, magnitude=0.1, name=("out", "lse")[i]
        )


def quantised(t, scale, cache):
    """What a cache of 8 bits holds of t; a per-head scale is for dimension 1."""
    scale = 1.0 if scale is None else scale
    if isinstance(scale, torch.Tensor):
        scale = scale[:, None] if scale.dim() == 1 else scale
        scale = scale[..., None] if scale.dim() else scale
    t = t.float() / scale
    return t.round().clamp(-128, 127).to(torch.int8) if cache == torch.int8 else t.clamp(-448, 448).to(cache)


def scales_like(kind, kv_heads, shape):
    """A scale for keys and one for values, so that int8 holds numbers of several sizes."""
    if kind == "none":
        return None, None
    if kind == "number":
        return 0.02, torch.tensor(0.03)
    sizes = {"head": (kv_heads,), "key": shape}[kind]
    return tuple(make(*sizes, seed=seed).abs() * 0.01 + 0.01 for seed in (4, 5))


def paged(caches, page_size, lengths):
    """The caches cut into pages in a random order, with one page that nobody uses; entries past a length are nonsense."""
    batch, _, capacity, _ = caches[0].shape
    per_sequence = -(-capacity // page_size)
    order = torch.randperm(batch * per_sequence + 1, generator=torch.Generator().manual_seed(0))
    table = order[:-1].view(batch, per_sequence).to(torch.int32)
    out = []
    for t in caches:
        empty = 77 if t.dtype == torch.int8 else torch.nan
        whole = torch.full((batch, t.shape[1], per_sequence * page_size, *t.shape[3:]), empty).to(t.dtype)
        whole[:, :, :capacity] = t
        pages = torch.full((len(order), t.shape[1], page_size, *t.shape[3:]), empty).to(t.dtype)
        pages[table.flatten().long()] = whole.unflatten(2, (per_sequence, page_size)).transpose(1, 2).flatten(0, 1)
        out.append(pages)
    for b, length in enumerate(lengths.tolist()):
        table[b, -(-length // page_size) :] = 2**31 - 1
    return out, table


CASES = {  # batch, heads, key heads, queries, head dim, capacity, lengths
    "one key": (1, 1, 1, 1, 64, 1, [1]),
    "nothing": (2, 2, 1, 1, 64, 16, [0, 3]),
    "a run": (2, 4, 2, 1, 64, 16, [16, 15]),
    "groups": (1, 12, 2, 1, 128, 40, [37]),
    "two tiles of rows": (1, 20, 1, 1, 64, 80, [65]),
    "several queries": (2, 4, 2, 3, 72, 33, [33, 17]),
    "every warp twice": (1, 2, 1, 1, 128, 260, [259]),
    "small head": (2, 3, 3, 2, 8, 70, [70, 2]),
}


@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize("page_size", [None, 1, 8, 48])
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(case, page_size, splits, dtype, monkeypatch):
    check_decode(monkeypatch, *CASES[case], page_size=page_size, splits=splits, dtype=dtype)


@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
@pytest.mark.parametrize("cache", list(CACHES)[2:], ids=str)
@pytest.mark.parametrize("kind", ["none", "number", "head", "key"])
@pytest.mark.parametrize(("case", "page_size"), [("groups", None), ("several queries", 8), ("every warp twice", 48)])
def test_caches_of_8_bits(case, page_size, kind, cache, dtype, monkeypatch):
    sizes = CASES[case]
    if case == "several queries":  # rows of 16 bytes
        sizes = (*sizes[:4], 80, *sizes[5:])
    if kind == "none" and cache == torch.int8:
        kind = "number"
    scales = scales_like(kind, sizes[2], (sizes[0], sizes[2], sizes[5]))
    check_decode(monkeypatch, *sizes, page_size=page_size, splits=2, dtype=dtype, cache=cache, scales=scales)


def test_every_number_of_8_bits(monkeypatch):
    """All 256 bytes as values of one key: out is that key's value."""
    numbers = torch.arange(256).to(torch.uint8).view(1, 2, 1, 128)
    for cache in (torch.int8, torch.float8_e4m3fn):
        values, keys = numbers.view(cache), torch.zeros(1, 2, 1, 128).to(cache)
        q = torch.zeros(1, 2, 1, 128, dtype=torch.float16)
        with emulated(monkeypatch, "attention_decode", attention_decode=Native().attention_decode):
            out = bmk.attention_decode(q, keys, values, torch.tensor([1]), k_scale=1.0, v_scale=2.0, backend="cuda")
        assert torch.equal(out.nan_to_num(nan=7.0), (values.to(torch.float16) * 2).nan_to_num(nan=7.0))


@pytest.mark.parametrize("seed", range(3))
def test_caches_of_8_bits_are_free_of_races(seed, monkeypatch):
    scales = scales_like("key", 1, (1, 1, 260))
    check_decode(
        monkeypatch, *CASES["every warp twice"], splits=2, cache=torch.int8, scales=scales, seed=seed, detect="races"
    )


@pytest.mark.parametrize("barrier", ["what was copied", "what other lanes copied", "a stage in use"])
def test_no_barrier_of_a_stage_can_be_left_out(barrier, monkeypatch):
    scales = scales_like("key", 1, (1, 1, 700))
    sizes = (1, 2, 1, 1, 128, 700, [699])  # so many keys that stages are used again
    with pytest.raises((EmulatorError, AssertionError)):
        check_decode(
            monkeypatch, *sizes, splits=2, detect="races", edit=(KERNEL, *BARRIERS[barrier]),
            cache=torch.int8, scales=scales,
        )  # fmt: skip


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"scale": 0.5}, {"softcap": 30.0, "scale": -1.0}], ids=str)
def test_options(options, monkeypatch):
    check_decode(monkeypatch, *CASES["groups"], splits=2, dtype=torch.float16, **options)


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_threads_is_free_of_races(seed, monkeypatch):
    check_decode(monkeypatch, *CASES["several queries"], splits=3, page_size=8, seed=seed, detect="races")


BARRIERS = {
    "what was copied": ("    ptx::cp_async_wait<Stage::kStages - 1>();\n", ""),
    "what other lanes copied": ("    __syncwarp();  // what the other lanes have copied\n", ""),
    "a stage in use": ("    __syncwarp();  // before the next fetch overwrites this stage\n", ""),
    "the block's warps": ("  __syncthreads();\n  const int place", "  const int place"),
    "before the ticket": ("  __syncthreads();\n  if (threadIdx.x == 0) is_last", "  if (threadIdx.x == 0) is_last"),
    "after the ticket": ("  __syncthreads();\n  if (!is_last", "  if (!is_last"),
}


@pytest.mark.parametrize("barrier", BARRIERS)
def test_no_barrier_can_be_left_out(barrier, monkeypatch):
    edit = (KERNEL, *BARRIERS[barrier])
    with pytest.raises((EmulatorError, AssertionError)):
        check_decode(monkeypatch, *CASES["every warp twice"], splits=2, detect="races", edit=edit)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 3}, "no window"),
        ({"alibi_slopes": torch.ones(2)}, "slopes"),
        ({"is_causal": True, "q_len": 2}, "several queries"),
        ({"head_dim": 12}, "head dimensions"),
        ({"requires_grad": True}, "no backward"),
        ({"dtype": torch.float32}, "float16 and bfloat16"),
        ({"cache": torch.float32}, "k_cache is torch.float32, q is torch.float16"),
        ({"cache": torch.float8_e4m3fn, "head_dim": 24}, "aligned to 16 bytes"),
    ],
    ids=str,
)
def test_refuses(change, message, monkeypatch):
    change = dict(change)
    dtype, shape = change.pop("dtype", torch.float16), (1, 2, change.pop("q_len", 1), change.pop("head_dim", 64))
    q = torch.zeros(shape, dtype=dtype, requires_grad=change.pop("requires_grad", False))
    cache = torch.zeros(1, 2, 8, shape[3]).to(change.pop("cache", dtype))
    with emulated(monkeypatch, "attention_decode"), pytest.raises(RuntimeError, match=message):
        bmk.attention_decode(q, cache, cache, torch.tensor([3]), **change, backend="cuda")


def test_without_the_kernel_the_remedy_is_named():
    if _registry.availability("attention_decode", "cuda") is None:
        pytest.skip("this machine has the kernel")
    q, cache = torch.zeros(1, 2, 1, 64, dtype=torch.float16), torch.zeros(1, 2, 8, 64, dtype=torch.float16)
    with pytest.raises(NotImplementedError, match=r"make cuda|no GPU was found"):
        bmk.attention_decode(q, cache, cache, torch.tensor([3]), backend="cuda")
