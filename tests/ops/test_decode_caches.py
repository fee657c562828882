"""bmk.attention_decode with caches of 8 bits: as with the numbers they stand for, contiguous and paged, and what it refuses."""

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.testing import make

SHAPE = (2, 2, 12, 16)  # batch, key heads, keys, head dimension
LENGTHS = torch.tensor([12, 7])


def caches(dtype):
    return [(make(*SHAPE, seed=seed) * 40).round().clamp(-128, 127).to(dtype) for seed in (1, 2)]


SCALES = {
    "number": (0.02, torch.tensor(0.5, dtype=torch.float64)),
    "head": (torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.01]).bfloat16()),
    "key": tuple(make(*SHAPE[:3], seed=seed).abs() for seed in (3, 4)),
}


def spread(scale) -> torch.Tensor:
    scale = torch.as_tensor(scale).float()
    return (scale.view(1, -1, 1) if scale.dim() == 1 else scale).expand(SHAPE[:3])[..., None]


@pytest.mark.parametrize("backend", ["cpu", "torch", "auto"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("page_size", [None, 4])
def test_means_the_numbers_times_their_scale(kind, dtype, backend, page_size):
    q, (k, v), (k_scale, v_scale) = make(2, 4, 1, 16, seed=5), caches(dtype), SCALES[kind]
    expected = bmk.attention_decode(
        q, k.float() * spread(k_scale), v.float() * spread(v_scale), LENGTHS, backend=backend
    )
    table = None
    if page_size:
        table = torch.arange(6).view(2, 3).flip(0)
        per_key = [k_scale, v_scale] if kind == "key" else []
        pages = [t.unflatten(2, (3, 4)).transpose(1, 2).flip(0).flatten(0, 1) for t in (k, v, *per_key)]
        k, v, *per_key = pages
        k_scale, v_scale = per_key or (k_scale, v_scale)
    found = bmk.attention_decode(q, k, v, LENGTHS, block_table=table, k_scale=k_scale, v_scale=v_scale, backend=backend)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", ["cpu", "torch", "auto"])
def test_nothing_past_the_lengths_reaches_a_result(backend):
    q, (k, v), lengths = (
        make(3, 4, 1, 16, seed=5),
        [make(3, 2, 12, 16, seed=i) for i in (6, 7)],
        torch.tensor([12, 7, 0]),
    )
    expected = bmk.attention_decode(q, k, v, lengths, return_lse=True, backend=backend)
    for b, length in enumerate(lengths.tolist()):
        k[b, :, length:], v[b, :, length:] = torch.nan, torch.inf
    found = bmk.attention_decode(q, k, v, lengths, return_lse=True, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert not found[0][2].any()


def test_fp8_has_a_scale_of_one_by_default():
    q, (k, v) = make(2, 4, 1, 16, seed=5), caches(torch.float8_e4m3fn)
    assert torch.equal(bmk.attention_decode(q, k, v, LENGTHS), bmk.attention_decode(q, k.float(), v.float(), LENGTHS))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k_scale": None}, RuntimeError, "k_scale must be given for k_cache of int8"),
        ({"v_scale": "small"}, TypeError, "v_scale must be a tensor or a number, got str"),
        ({"k_scale": torch.ones(3)}, RuntimeError, r"one number or have shape \[2\] or \[2, 2, 12\], got \[3\]"),
        ({"k_scale": torch.ones(2, dtype=torch.int32)}, RuntimeError, "k_scale must hold real numbers"),
        ({"v_cache": torch.zeros(SHAPE)}, RuntimeError, "v_scale is for caches of int8"),
        ({"v_cache": torch.zeros(SHAPE), "v_scale": None}, RuntimeError, "v_cache must be torch.int8"),
    ],
    ids=str,
)
def test_refuses(change, error, message):
    k, v = caches(torch.int8)
    call = {"k_cache": k, "v_cache": v, "k_scale": 0.1, "v_scale": 0.1} | change
    with pytest.raises(error, match=message):
        bmk.attention_decode(make(2, 4, 1, 16), cache_seqlens=LENGTHS, **call)
