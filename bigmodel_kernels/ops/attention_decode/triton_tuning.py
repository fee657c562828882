"""The calls and the candidates by which `python -m bigmodel_kernels tune` measures the Triton kernel of attention_decode."""

from collections.abc import Iterator
from functools import partial

import torch

from bigmodel_kernels.ops.attention_decode.op import attention_decode
from bigmodel_kernels.ops.attention_decode.triton_configs import TABLE
from bigmodel_kernels.testing import make
from bigmodel_kernels.tune import Problem, grid

SEQUENCES, KV_HEADS, GROUP, KEYS = 8, 2, 8, 4096


def _decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, backend: str) -> torch.Tensor:
    return attention_decode(q, k, v, torch.full((len(q),), KEYS, device=q.device), backend=backend)


def _decode_8_bits(
    q: torch.Tensor, *, k: torch.Tensor, v: torch.Tensor, k_scale: torch.Tensor, v_scale: torch.Tensor, backend: str
) -> torch.Tensor:
    lengths = torch.full((len(q),), KEYS, device=q.device)
    return attention_decode(q, k, v, lengths, k_scale=k_scale, v_scale=v_scale, backend=backend)


def problems(dtype: torch.dtype, device: str, quick: bool) -> Iterator[Problem]:
    changes = grid(BLOCK_N=(16, 32, 64, 128), num_warps=(4,) if quick else (2, 4, 8), num_stages=(2, 3))
    for head_dim in TABLE[dtype.itemsize]:
        shapes = (SEQUENCES, GROUP * KV_HEADS, 1, head_dim), *[(SEQUENCES, KV_HEADS, KEYS, head_dim)] * 2
        q, k, v = [make(*shape, dtype=dtype, seed=i).to(device) for i, shape in enumerate(shapes)]
        yield Problem.of("attention_decode", "split", "decode_kernel", _decode, [q, k, v], changes)
        codes = {name: (t.float() * 40).round().clamp(-128, 127).to(torch.int8) for name, t in (("k", k), ("v", v))}
        scales = {name: torch.full(shapes[1][:3], 0.025, device=device) for name in ("k_scale", "v_scale")}
        run = partial(_decode_8_bits, **codes, **scales)
        yield Problem.of("attention_decode", "split", "decode_kernel", run, [q], changes)
