"""The CUDA kernel of attention_decode, emulated: against float64, contiguous and paged caches, any number of splits."""

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.ops.attention import cuda_decode
from bigmodel_kernels.testing import assert_matches, make
from tests.emulator.backend import SUFFIX, emulated
from tests.emulator.emulator import EmulatorError, Program, needs_compiler

pytestmark = needs_compiler
KERNEL, WARPS = "attention_decode.cuh", 4
NAMES = {
    (dtype, head_dim): f"bmk::attention_decode<{SUFFIX[dtype]}, {head_dim}>"
    for dtype in cuda_decode.DTYPES
    for head_dim in (64, 128)
}
DECODE = Program(KERNEL, *NAMES.values())


class Native:
    """The native op of csrc/cuda/attention_decode.cu, with its launch run by the emulator."""

    def __init__(self, seed=0, detect="memory", edit=None):
        self.seed, self.detect, self.program = seed, detect, DECODE.with_edit(*edit) if edit else DECODE

    def attention_decode(self, q, k, v, lengths, table, scale, softcap, splits, out, lse, partial, tickets):
        batch, heads, q_len, head_dim = q.shape
        pages, kv_heads, page_size, _ = k.shape
        width = 1 if table is None else table.shape[1]
        tiles = kv_heads * -(-(heads // kv_heads) * q_len // cuda_decode.ROWS)
        padded = 64 if head_dim <= 64 else 128
        partial.fill_(torch.nan)
        out.fill_(torch.nan)
        numbers = (heads, kv_heads, q_len, head_dim, width * page_size, pages, page_size, width)
        strides = [t.stride()[:3] for t in (q, k, v)]
        arguments = (
            q,
            k,
            v,
            *strides,
            lengths,
            table,
            out,
            lse,
            partial,
            tickets,
            *numbers,
            float(scale),
            float(softcap),
        )
        self.program.run(
            NAMES[q.dtype, padded], (splits, tiles, batch), 32 * WARPS, arguments,
            shared_bytes=WARPS * 2 * 2 * 16 * padded * 2, seed=self.seed, detect=self.detect,
        )  # fmt: skip
        assert not tickets.any()


def check_decode(
    monkeypatch, batch, heads, kv_heads, q_len, head_dim, capacity, lengths, page_size=None, splits=None,
    dtype=torch.bfloat16, softcap=0.0, scale=None, **native,
):  # fmt: skip
    q = make(batch, heads, q_len, head_dim, dtype=dtype, seed=1)
    k, v = (make(batch, kv_heads, capacity, head_dim, dtype=dtype, seed=seed) for seed in (2, 3))
    lengths = torch.tensor(lengths, dtype=torch.int32)
    options = {"softcap": softcap, "scale": scale, "return_lse": True}
    runs = [
        bmk.attention_decode(*(t.to(d) for t in (q, k, v)), lengths, **options, backend="torch")
        for d in (torch.float64, dtype)
    ]
    for b, length in enumerate(lengths.tolist()):  # nothing past the length may be read into a result
        k[b, :, length:] = v[b, :, length:] = torch.nan
    table = None
    if page_size:
        (k, v), table = paged((k, v), page_size, lengths)
    if splits:
        monkeypatch.setattr(cuda_decode, "splits_for", lambda *sizes: splits)
    monkeypatch.setattr(cuda_decode, "unavailable", lambda: None)
    monkeypatch.setattr(cuda_decode, "native", Native(**native))
    with emulated(monkeypatch):
        found = bmk.attention_decode(q, k, v, lengths, block_table=table, **options, backend="cuda")
    for i, (actual, exact, baseline) in enumerate(zip(found, *runs)):
        baseline = None if i else baseline  # torch's own lse of 16-bit scores is no yardstick
        assert_matches(
            actual, exact, baseline, dtype=torch.float32 if i else dtype, magnitude=0.1, name=("out", "lse")[i]
        )


def paged(caches, page_size, lengths):
    """The caches cut into pages in a random order, with one page that nobody uses; entries past a length are nonsense."""
    batch, _, capacity, _ = caches[0].shape
    per_sequence = -(-capacity // page_size)
    order = torch.randperm(batch * per_sequence + 1, generator=torch.Generator().manual_seed(0))
    table = order[:-1].view(batch, per_sequence).to(torch.int32)
    out = []
    for t in caches:
        t = torch.nn.functional.pad(t, (0, 0, 0, per_sequence * page_size - capacity), value=torch.nan)
        pages = t.new_full((len(order), t.shape[1], page_size, t.shape[3]), torch.nan)
        pages[table.flatten().long()] = t.unflatten(2, (per_sequence, page_size)).transpose(1, 2).flatten(0, 1)
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


@pytest.mark.parametrize("dtype", cuda_decode.DTYPES, ids=str)
@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize("page_size", [None, 1, 8, 48])
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(case, page_size, splits, dtype, monkeypatch):
    check_decode(monkeypatch, *CASES[case], page_size=page_size, splits=splits, dtype=dtype)


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"scale": 0.5}, {"softcap": 30.0, "scale": -1.0}], ids=str)
def test_options(options, monkeypatch):
    check_decode(monkeypatch, *CASES["groups"], splits=2, dtype=torch.float16, **options)


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_threads_is_free_of_races(seed, monkeypatch):
    check_decode(monkeypatch, *CASES["several queries"], splits=3, page_size=8, seed=seed, detect="races")


BARRIERS = {
    "what was copied": ("    ptx::cp_async_wait<1>();\n", ""),
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
    ],
    ids=str,
)
def test_refuses(change, message, monkeypatch):
    change = dict(change)
    dtype, shape = change.pop("dtype", torch.float16), (1, 2, change.pop("q_len", 1), change.pop("head_dim", 64))
    q = torch.zeros(shape, dtype=dtype, requires_grad=change.pop("requires_grad", False))
    cache = torch.zeros(1, 2, 8, shape[3], dtype=dtype)
    monkeypatch.setattr(cuda_decode, "unavailable", lambda: None)
    with emulated(monkeypatch), pytest.raises(RuntimeError, match=message):
        bmk.attention_decode(q, cache, cache, torch.tensor([3]), **change, backend="cuda")


def test_without_the_kernel_the_remedy_is_named():
    if cuda_decode.unavailable() is None:
        pytest.skip("this machine has the kernel")
    q, cache = torch.zeros(1, 2, 1, 64, dtype=torch.float16), torch.zeros(1, 2, 8, 64, dtype=torch.float16)
    with pytest.raises(NotImplementedError, match=r"make cuda|no GPU was found"):
        bmk.attention_decode(q, cache, cache, torch.tensor([3]), backend="cuda")
