"""The Triton attention kernels, interpreted on the CPU, against float64: forward and every gradient.

float32 and float16 only: Triton's interpreter multiplies the bits of bfloat16 numbers, and `supports` refuses them there.
"""

import contextlib
import math
import tempfile
import unittest.mock

import numpy as np
import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

import bigmodel_kernels as bmk
from bigmodel_kernels import _triton, _tuned
from bigmodel_kernels.ops.attention import reference, triton_configs
from bigmodel_kernels.testing import LAYOUTS, assert_matches, make
from tests.ops.attention_problem import FLAGS, NAMES, Problem
from tests.triton_interpreter import interpreted

# B, Hq, Hkv, Sq, Sk, D, Dv: nothing, single elements, one below, at and above the interpreter's tiles of 32, several of them.
SIZES = [
    (1, 2, 2, 0, 4, 5, 5),
    (1, 2, 2, 3, 0, 5, 5),
    (1, 1, 1, 1, 1, 1, 1),
    (1, 2, 1, 1, 65, 16, 17),
    (1, 2, 2, 3, 31, 32, 32),
    (1, 1, 1, 31, 32, 64, 8),
    (1, 2, 1, 32, 33, 33, 64),
    (2, 2, 2, 33, 34, 8, 16),
    (1, 1, 1, 64, 96, 80, 80),
    (1, 4, 2, 35, 33, 16, 16),
    (1, 1, 1, 97, 40, 7, 5),
    (1, 1, 1, 30, 130, 128, 96),
    (1, 1, 1, 40, 37, 256, 256),
]
EMPTY_SIZES = [(0, 2, 2, 3, 4, 5, 5), (2, 0, 0, 3, 4, 5, 5), (1, 2, 2, 3, 4, 0, 5), (1, 2, 2, 3, 4, 5, 0)]


def size_id(sizes):
    return "x".join(map(str, sizes))


def check(*args, **kwargs):
    baseline = kwargs.pop("baseline", False)
    Problem(*args, **kwargs).check("triton", baseline=baseline)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("sizes", SIZES, ids=size_id)
def test_matches_float64(sizes, flags):
    interpreted(check, sizes, flags)


@pytest.mark.parametrize("sizes", [*EMPTY_SIZES, (1, 1, 1, 160, 160, 16, 16)], ids=size_id)
def test_matches_float64_when_empty_and_when_long(sizes):
    interpreted(check, sizes, "causal")


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("sizes", [(1, 2, 1, 33, 40, 20, 12), (1, 1, 1, 20, 70, 64, 64)], ids=size_id)
def test_float16_matches_float64(sizes, flags):
    interpreted(check, sizes, flags, torch.float16, baseline=True)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("flags", ["plain", "causal", "everything"])
def test_matches_float64_for_other_seeds(flags, seed):
    interpreted(check, (1, 2, 1, 20, 40, 20, 12), flags, seed=seed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_matches_float64_for_any_layout(layout, dtype):
    interpreted(check, (2, 2, 1, 34, 33, 20, 12), "everything", dtype, layout=layout)


MASKS = {  # shape of an additive mask of B, H, Sq, Sk; bool ones are in FLAGS
    "full": lambda B, H, Sq, Sk: make(B, H, Sq, Sk, seed=3),
    "heads_first": lambda B, H, Sq, Sk: make(Sq, Sk, H, B, seed=3).permute(3, 2, 0, 1),
    "keys": lambda B, H, Sq, Sk: make(B, 1, 1, Sk, seed=3),
    "rows": lambda B, H, Sq, Sk: make(H, Sq, 1, seed=3),
    "one": lambda B, H, Sq, Sk: make(1, seed=3),
    "expanded": lambda B, H, Sq, Sk: make(Sq, Sk, seed=3).expand(B, H, Sq, Sk),
    "infinite": lambda B, H, Sq, Sk: make(Sq, Sk, seed=3).masked_fill(make(Sq, Sk, seed=4) > 0, -math.inf),
}


def run(q, k, v, grad_out, grad_lse, mask, seed=None, dropout_p=0.0, **options):
    """(triton's results, exact ones) of the op's two halves, as lists in the order of NAMES; dmask empty for none."""
    args = list(bmk.attention.prepare(q, k, v, attn_mask=mask, dropout_p=dropout_p, enable_gqa=True, **options))
    args[5] = seed
    mask_grad = mask is not None and mask.dtype != torch.bool

    def wide(t):
        return t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t

    exact_args = [wide(a) for a in args]
    exact_out, exact_lse = reference.fwd(*exact_args)
    exact = reference.bwd(wide(grad_out), wide(grad_lse), exact_out, exact_lse, mask_grad, *exact_args)
    op = bmk.attention.op
    out, lse = op.fwd(*args, "triton")
    actual = op.bwd(grad_out, grad_lse, out, lse, None, mask_grad, *args, "triton")
    return [out, lse, *actual], [exact_out, exact_lse, *exact]


def inputs(B=2, Hq=4, Hkv=2, Sq=34, Sk=70, D=16, Dv=16, dtype=torch.float32):
    shapes = [(B, Hq, Sq, D), (B, Hkv, Sk, D), (B, Hkv, Sk, Dv), (B, Hq, Sq, Dv)]
    return [*(make(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)), make(B, Hq, Sq, seed=9)]


def compare(actual, exact, dtype=torch.float32):
    for i, (name, a, e) in enumerate(zip(NAMES, actual, exact)):
        assert_matches(a, e, None, dtype=torch.float32 if i == 1 else dtype, gradient=i > 1, magnitude=0.1, name=name)


def check_mask(kind, **options):
    tensors = inputs(Hq=2, Sq=33, Sk=40)
    compare(*run(*tensors, MASKS[kind](2, 2, 33, 40), **options))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("causal", [False, True])
def test_gradient_of_a_mask_is_summed_over_what_it_is_broadcast_along(kind, causal):
    interpreted(check_mask, kind, is_causal=causal, softcap=2.0 * causal)


def check_dropout(dropout_p, dtype, options):
    tensors = inputs(B=1, Sk=200, Sq=35, dtype=dtype)
    mask = make(1, 1, 35, 200, seed=5) if options else None
    seed = torch.tensor([2**61 + 987654321], dtype=torch.int64)
    compare(*run(*tensors, mask, seed, dropout_p, **options), dtype)


@pytest.mark.parametrize("dropout_p", [0.1, 0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": (70, 3)}], ids=["plain", "mask_and_window"])
def test_dropout_drops_what_the_reference_drops(dropout_p, dtype, options):
    interpreted(check_dropout, dropout_p, dtype, options)


def check_poison(value, options):
    q, k, v, grad_out, grad_lse = inputs(B=1)
    mask = torch.ones(34, 70, dtype=torch.bool)
    mask[:, 40:] = False
    mask[5] = False
    clean, _ = run(q, k, v, grad_out, grad_lse, mask, **options)
    k[:, :, 40:], v[:, :, 40:], q[:, :, 5], grad_out[:, :, 5] = value, value, value, value
    poisoned, _ = run(q, k, v, grad_out, grad_lse, mask, **options)
    for name, a, b in zip(NAMES, poisoned, clean):
        assert torch.equal(a, b), name
    assert (poisoned[0][:, :, 5] == 0).all()
    assert (poisoned[1][:, :, 5] == -math.inf).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (9, 3), "alignment": "lower_right"}], ids=str)
def test_nothing_masked_leaks(value, options):
    interpreted(check_poison, value, options)


def check_spread(value):
    """Key 20 has one such value, key 50 is such: with causality the rows before each are as without."""
    q, k, v, grad_out, grad_lse = inputs(B=1, Sq=70)
    clean, _ = run(q, k, v, grad_out, grad_lse, None, is_causal=True)
    v[:, :, 20, 3] = value
    out = run(q, k, v, grad_out, grad_lse, None, is_causal=True)[0][0]
    out[:, :, 20:, 3] -= value  # infinity less itself
    assert out[:, :, 20:, 3].isnan().all()
    out[:, :, 20:, 3] = clean[0][:, :, 20:, 3]
    assert torch.equal(out, clean[0])
    k[:, :, 50], v[:, :, 60] = value, value
    out, _, dq, *_ = run(q, k, v, grad_out, grad_lse, None, is_causal=True)[0]
    for result, exact in ((out, clean[0]), (dq, clean[2])):
        assert torch.equal(result[:, :, :20], exact[:, :, :20])
        assert not torch.isfinite(result[:, :, 50:]).any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_attended_to_spreads_to_the_rows_that_attend_to_it(value):
    interpreted(check_spread, value)


def check_scale(scale):
    compare(*run(*inputs(B=1, Hq=2), None, scale=scale, is_causal=True))


@pytest.mark.parametrize("scale", [-0.4, 0.0, 2.0])
def test_any_scale(scale):
    interpreted(check_scale, scale)


def check_repeatable():
    first, second = (run(*inputs(), make(1, 1, 34, 70, seed=3), is_causal=True)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_every_run_gives_the_same_bits():
    interpreted(check_repeatable)


def check_configuration(name, dtype, head_dim, options):
    with unittest.mock.patch("bigmodel_kernels._triton.gpu", return_value=name):
        compare(*run(*inputs(1, 2, 1, 130, 150, head_dim, head_dim, dtype), None, **options), dtype)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
def test_tile_sizes_of_the_table(name, dtype, head_dim):
    interpreted(check_configuration, name, dtype, head_dim, {"is_causal": True})


@contextlib.contextmanager
def tiles(rows, keys, descriptors=0):
    """In the block interpreted kernels have tiles of this size."""
    with unittest.mock.patch.object(triton_configs, "INTERPRETER", (rows, keys, 4, 1, descriptors)):
        _tuned.forget()
        yield
    _tuned.forget()


def check_descriptors(sizes, flags, dtype, layout, expected):
    """`expected`: whether there are descriptors."""
    with tiles(32, 32, 1), unittest.mock.patch.object(_triton, "Descriptor", wraps=_triton.Descriptor) as made:
        Problem(sizes, flags, dtype, layout=layout).check("triton", baseline=dtype == torch.float16)
    assert made.called == expected


@pytest.mark.parametrize("flags", ["causal", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1, 1, 8, 8), (2, 4, 2, 33, 70, 40, 24), (1, 2, 2, 64, 64, 64, 64)], ids=size_id
)
def test_tiles_by_descriptors(sizes, dtype, flags):
    interpreted(check_descriptors, sizes, flags, dtype, "contiguous", True)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_tensors_without_descriptors_go_by_pointers(layout):
    """A stride of 0, columns that are not adjacent, an address that is not a multiple of 16 bytes."""
    interpreted(check_descriptors, (2, 2, 2, 34, 33, 24, 16), "causal", torch.float16, layout, False)


def test_what_a_descriptor_takes():
    heads_inside = make(2, 8, 3, 16, dtype=torch.float16).transpose(1, 2)
    found = _triton.descriptor(heads_inside, [1, 1, 4, 16])
    assert (found.shape, found.strides) == ([2, 3, 8, 16], [8 * 48, 16, 48, 1])
    checked = TensorDescriptor(heads_inside, found.shape, found.strides, [1, 1, 4, 16])  # Triton's own constructor
    assert vars(checked) == {"padding": found.padding, "round_f32_to_tf32": False} | vars(found)
    one = make(1, 1, 8, 16, dtype=torch.float16).as_strided((1, 1, 8, 16), (3, 5, 16, 1))
    assert _triton.descriptor(one, [1, 1, 4, 16]).strides == [8, 8, 16, 1]
    assert _triton.descriptor(make(2, 3, 8, 20, dtype=torch.float16), [1, 1, 4, 32]) is None
    assert _triton.descriptor(make(2, 3, 8, 20, dtype=torch.float32), [1, 1, 4, 32]) is not None
    assert _triton.descriptor(make(2, 3, 0, 16), [1, 1, 4, 16]) is None


def check_dropout_tiles(keys):
    """A tile of fewer keys than a block of 64 drops its part of what the block drops."""
    with tiles(16, keys):
        tensors, seed = inputs(B=1, Hq=2, Sq=20, Sk=150), torch.tensor([2**61 + 5], dtype=torch.int64)
        compare(*run(*tensors, make(20, 150, seed=5), seed, 0.4, is_causal=True, alignment="lower_right"))


@pytest.mark.parametrize("keys", [16, 32, 64, 128])
def test_dropout_does_not_depend_on_the_tile(keys):
    interpreted(check_dropout_tiles, keys)


def check_offsets(what):
    """A tensor of which `what` is laid out with 2^30 elements from row to row: 32-bit offsets would wrap around."""
    q, k, v, grad_out, grad_lse = inputs(1, 1, 1, 5, 5, 4, 4, torch.float16)
    mask = make(5, 5, dtype=torch.float16, seed=3)
    tensors = {"q": q, "k": k, "v": v, "grad_out": grad_out, "mask": mask}
    expected, _ = run(q, k, v, grad_out, grad_lse, mask)
    strides = (0, 0, 1 << 30, 1)[-tensors[what].dim() :]
    with tempfile.TemporaryFile() as file:  # with holes, of which only what is touched takes memory
        whole = torch.from_numpy(np.memmap(file, np.float16, "w+", shape=((1 << 32) + 16,)))
        tensors[what] = whole.as_strided(tensors[what].shape, strides).copy_(tensors[what])
        actual, _ = run(*(tensors[name] for name in ("q", "k", "v", "grad_out")), grad_lse, tensors["mask"])
    for name, a, b in zip(NAMES, actual, expected):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("what", ["q", "k", "v", "grad_out", "mask"])
def test_offsets_beyond_32_bits(what):
    interpreted(check_offsets, what)


def check_refusal():
    q = torch.zeros(1, 1, 4, 16, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="interpreter has no bfloat16"):
        bmk.attention(q, q, q, backend="triton")
    q = torch.zeros(1, 1, 4, 16, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="float32, float16 and bfloat16"):
        bmk.attention(q, q, q, backend="triton")
    q = torch.zeros(1, 1, 4, 257)
    with pytest.raises(RuntimeError, match="head dimensions up to 256"):
        bmk.attention(q, q, q, backend="triton")


def test_refusals_name_the_reason():
    interpreted(check_refusal)
