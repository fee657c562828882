"""attention_decode on the GPU: against float64, contiguous and paged, with the splits that the GPU gets; under a CUDA graph."""

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.ops.attention_decode.cuda import DTYPES
from bigmodel_kernels.testing import assert_matches, make
from tests.emulator.test_attention_decode import paged, quantised, scales_like

CASES = {  # batch, heads, key heads, queries, head dim, capacity, lengths
    "tiny": (2, 4, 2, 1, 64, 40, [40, 17]),
    "one sequence": (1, 32, 8, 1, 128, 5000, [4999]),
    "ragged": (5, 8, 1, 2, 72, 1000, [1000, 0, 1, 513, 999]),
    "no groups": (3, 6, 6, 1, 128, 300, [300, 129, 16]),
}


def inputs(case, dtype):
    batch, heads, kv_heads, q_len, head_dim, capacity, lengths = CASES[case]
    q = make(batch, heads, q_len, head_dim, dtype=dtype, seed=1)
    k, v = (make(batch, kv_heads, capacity, head_dim, dtype=dtype, seed=seed) for seed in (2, 3))
    return q, k, v, torch.tensor(lengths, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page_size", [None, 16, 48])
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(case, page_size, dtype):
    q, k, v, lengths = inputs(case, dtype)
    exact = bmk.attention_decode(q.double(), k.double(), v.double(), lengths, return_lse=True, backend="torch")
    for b, length in enumerate(lengths.tolist()):
        k[b, :, length:] = v[b, :, length:] = torch.nan
    table = None
    if page_size:
        (k, v), table = paged((k, v), page_size, lengths)
        table = table.cuda()
    for _ in range(3):  # tickets are ready for the next launch
        found = bmk.attention_decode(
            q.cuda(), k.cuda(), v.cuda(), lengths.cuda(), block_table=table, return_lse=True, backend="cuda"
        )
        for i, (actual, truth) in enumerate(zip(found, exact)):
            assert_matches(actual.cpu(), truth, None, dtype=torch.float32 if i else dtype, magnitude=0.1)


@pytest.mark.parametrize("cache", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("kind", ["number", "head", "key"])
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("case", ["tiny", "one sequence", "no groups"])
def test_caches_of_8_bits(case, page_size, kind, cache):
    q, k, v, lengths = inputs(case, torch.bfloat16)
    scales = scales_like(kind, k.shape[1], k.shape[:3])
    k, v = (quantised(t, s, cache) for t, s in zip((k, v), scales))
    exact = bmk.attention_decode(q.double(), k, v, lengths, k_scale=scales[0], v_scale=scales[1], backend="torch")
    table = None
    if page_size:
        per_key = scales if kind == "key" else ()
        (k, v, *per_key), table = paged((k, v, *per_key), page_size, lengths)
        scales, table = tuple(per_key) or scales, table.cuda()
    k_scale, v_scale = (s.cuda() if isinstance(s, torch.Tensor) else s for s in scales)
    found = bmk.attention_decode(
        q.cuda(),
        k.cuda(),
        v.cuda(),
        lengths.cuda(),
        block_table=table,
        k_scale=k_scale,
        v_scale=v_scale,
        backend="cuda",
    )
    assert_matches(found.cpu(), exact, None, dtype=torch.bfloat16, magnitude=0.1)


def test_in_a_cuda_graph_with_lengths_that_change():
    q, k, v, lengths = (t.cuda() for t in inputs("one sequence", torch.bfloat16))
    bmk.attention_decode(q, k, v, lengths, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = bmk.attention_decode(q, k, v, lengths, backend="cuda")
    for length in (4999, 77, 0):
        lengths.fill_(length)
        graph.replay()
        assert torch.equal(found, bmk.attention_decode(q, k, v, lengths, backend="cuda"))
