"""bmk.conv_step: step by step it gives the columns of the whole sequence; the ring, gradients, contract."""

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.ops.conv_step import triton_configs, triton_kernels
from bigmodel_kernels.ops.conv_step.triton_configs import TABLE
from bigmodel_kernels.testing import assert_matches, make
from tests.triton_aot import SHARED_LIMIT, compiling
from tests.triton_interpreter import interpreted

STEPS = 23
# batch, channels, rows, kernel, dilation, groups, activation
CASES = {
    "wavenet": (1, 64, 128, 2, 4, 1, "tanh_sigmoid"),
    "odd gate": (3, 5, 14, 3, 2, 1, "tanh_sigmoid"),
    "relu": (2, 6, 9, 5, 3, 3, "relu"),
    "depthwise": (2, 19, 19, 4, 1, 19, "silu"),
    "slope": (1, 7, 3, 2, 30, 1, ("leaky_relu", 0.3)),
    "no memory": (2, 20, 40, 1, 7, 1, None),
}


def problem(name, dtype, seed=0):
    batch, channels, rows, kernel, dilation, groups, activation = CASES[name]
    x = make(batch, channels, STEPS, dtype=torch.float64, seed=seed + 1).to(dtype)
    weight = make(rows, channels // groups, kernel, dtype=torch.float64, seed=seed + 2) / (channels / groups) ** 0.5
    bias = make(rows, dtype=torch.float64, seed=seed + 3)
    return x, weight.to(dtype), bias.to(dtype), {"dilation": dilation, "groups": groups, "activation": activation}


def start(x, weight, dilation):
    return bmk.ConvState.start(x.shape[0], x.shape[1], weight.shape[2], dilation, x)


def stream(x, weight, bias, options, mix=(None,) * 4, skip=None, **more):
    """All columns, [N, D or C, T] and [N, S, T] or None."""
    state, ys, sums = start(x, weight, options["dilation"]), [], []
    for t in range(x.shape[2]):
        column = None if skip is None else skip[..., t]
        y, total, state = bmk.conv_step(x[..., t], state, weight, bias, *mix, skip=column, **options, **more)
        ys.append(y)
        sums.append(total)
    return torch.stack(ys, -1), None if sums[0] is None else torch.stack(sums, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("name", CASES)
def test_gives_the_columns_of_the_whole_sequence(name, backend, dtype):
    check_columns(name, backend, dtype, seeds=(0, 10, 20))


def check_columns(name, backend, dtype, seeds):
    for seed in seeds:
        x, weight, bias, options = problem(name, dtype, seed)
        exact, theirs = (
            bmk.conv(*(t.to(kind) for t in (x, weight, bias)), padding="causal", **options, backend="torch")
            for kind in (torch.float64, dtype)
        )
        y, total = stream(x, weight, bias, options, backend=backend)
        assert total is None
        assert_matches(y, exact, theirs, dtype=dtype, magnitude=0.1)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("name", ["wavenet", "odd gate"])
def test_gives_the_columns_of_the_gated_layer(name, backend):
    x, weight, bias, options = problem(name, torch.float64)
    channels, gates = x.shape[1], weight.shape[0] // 2
    mix = [make(*s, dtype=torch.float64, seed=30 + i) for i, s in enumerate([(channels, gates, 1), (channels,)])]
    mix += [make(*s, dtype=torch.float64, seed=40 + i) for i, s in enumerate([(9, gates, 1), (9,)])]
    skip = make(x.shape[0], 9, STEPS, dtype=torch.float64, seed=50)
    whole = bmk.gated_conv(x, weight, bias, *mix, skip=skip, dilation=options["dilation"])
    for kind, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        cast = [t.to(kind) for t in (x, weight, bias)]
        streamed = stream(*cast, options, [t.to(kind) for t in mix], skip.to(kind), backend=backend)
        for a, e in zip(streamed, whole):
            torch.testing.assert_close(a.double(), e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_the_state_is_written_into(backend):
    x, weight, bias, options = problem("relu", torch.float32)
    state = start(x, weight, options["dilation"])
    for t in range(5):
        before = state.clone()
        y, _, after = bmk.conv_step(x[..., t], state, weight, bias, **options, backend=backend)
        assert after.ring is state.ring
        assert after.position is state.position
        assert int(after.position) == t + 1
        assert torch.equal(state.ring[:, t], x[..., t])
        again, _, _ = bmk.conv_step(x[..., t], before, weight, bias, **options, backend=backend)
        assert torch.equal(again, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_triton_gives_the_columns_of_the_whole_sequence(name, dtype):
    interpreted(check_columns, name, "triton", dtype, seeds=(0,))


# batch, channels, gates, skips (0: no such output), whether out is wanted, groups, activation
MIXES = {
    "wavenet": (1, 64, 64, 64, True, 1, "tanh_sigmoid"),
    "odd": (3, 5, 7, 9, True, 1, "tanh_sigmoid"),
    "many skips": (2, 20, 33, 150, True, 1, "tanh_sigmoid"),
    "groups": (2, 12, 18, 4, True, 3, "tanh_sigmoid"),
    "residual only": (2, 9, 70, 0, True, 1, "silu"),
    "skip only": (2, 9, 132, 5, False, 3, None),
    "past one program": (2, 10, 300, 7, True, 1, "tanh_sigmoid"),
    "skip past one program": (1, 10, 258, 7, False, 2, "relu"),
}


def check_mix(name, dtype, backend):
    """Steps against the formula in float64, past the end of the ring; `theirs` are PyTorch's ops in `dtype`."""
    batch, channels, values, skips, out, groups, activation = MIXES[name]
    rows = 2 * values if activation == "tanh_sigmoid" else values
    shapes = [(rows, channels // groups, 3), (rows,), (channels, values, 1), (channels,), (skips, values, 1), (skips,)]
    tensors = [make(*s, seed=i).to(dtype) / (s[1] if len(s) == 3 else 1) ** 0.5 for i, s in enumerate(shapes)]
    tensors[2:4] = tensors[2:4] if out else (None, None)
    tensors[4:] = tensors[4:] if skips else (None, None)
    x = make(batch, channels, 7, dtype=torch.float64, seed=8).to(dtype)
    skip = make(batch, skips, 7, dtype=torch.float64, seed=9).to(dtype) if skips else None
    found = []
    for kind, how in ((torch.float64, "torch"), (dtype, backend), (dtype, "torch")):
        columns, weight, bias, *mix, added = (None if t is None else t.to(kind) for t in (x, *tensors, skip))
        options = {"dilation": 2, "groups": groups, "activation": activation, "backend": how}
        found.append(stream(columns, weight, bias, options, mix, added))
    for exact, ours, theirs in zip(*found):
        if exact is not None:
            assert_matches(ours, exact, theirs, dtype=dtype, magnitude=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", MIXES)
def test_triton_matches_float64(name, dtype):
    interpreted(check_mix, name, dtype, "triton")


def test_gradients_flow_through_steps():
    x, weight, bias, options = problem("odd gate", torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    whole = bmk.conv(*leaves, padding="causal", **options, backend="torch")
    streamed, _ = stream(*leaves, options)
    with pytest.raises(RuntimeError, match="backend 'cpu' has no gradient"):
        stream(*leaves, options, backend="cpu")
    upstream = make(*whole.shape, dtype=torch.float64, seed=7)
    for a, e in zip(torch.autograd.grad(streamed, leaves, upstream), torch.autograd.grad(whole, leaves, upstream)):
        torch.testing.assert_close(a, e)


def test_triton_writes_into_the_state():
    interpreted(test_the_state_is_written_into, "triton")


def check_far_ring():
    """A ring past 2^31 numbers, of which only the slots that are written are ever backed by memory."""
    channels, dilation = 4, 2**29 + 9
    ring = torch.empty(2, dilation, channels, dtype=torch.float16)
    weight = make(3, channels, 2).half()
    for t in (0, dilation - 1):
        ring[:, t] = make(2, channels, seed=t % 7).half()
        near = bmk.ConvState(ring[:, t : t + 1].clone(), torch.tensor([0]))
        far = bmk.ConvState(ring, torch.tensor([t]))
        x_t = make(2, channels, seed=3).half()
        y, _, _ = bmk.conv_step(x_t, far, weight, dilation=dilation, backend="triton")
        expected, _, _ = bmk.conv_step(x_t, near, weight, backend="triton")
        assert torch.equal(y, expected)
        assert torch.equal(ring[:, t], x_t)
        assert int(far.position) == t + 1


def test_offsets_beyond_32_bits():
    interpreted(check_far_ring)


# Registers that a row of the table may take: for sm_80 and sm_90, Triton 3.6 and 3.7.
BUDGET = {"mixed": 224, "rows": 144}


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("kernel", "size"), [(kernel, size) for kernel, by in TABLE.items() for size in by])
def test_rows_compile_within_budget(kernel, size, gpu, monkeypatch):
    mixed = kernel == "mixed"
    dtype = torch.float32 if gpu == "sm_80" else torch.bfloat16
    channels = size if mixed else size // 2
    x, weight = torch.empty(2, channels, dtype=dtype), torch.empty(2 * channels, channels, 2, dtype=dtype)
    mix = [torch.empty(channels, channels, 1, dtype=dtype), weight[:channels, 0, 0]] * 2 if mixed else [None] * 4
    args = bmk.conv_step.prepare(
        x, bmk.ConvState.start(2, channels, 2, 4, x), weight, weight[:, 0, 0], *mix, skip=x if mixed else None,
        dilation=4, activation="tanh_sigmoid" if mixed else "gelu",
    )  # fmt: skip
    with compiling(gpu, monkeypatch) as found:
        triton_kernels.fwd(*args)
    (binary,) = found
    assert {k: binary.constants[k] for k in ("BLOCK_R", "BLOCK_K", "num_warps")} == triton_configs.config(
        None, kernel, x.element_size(), size
    )
    assert binary.spills == 0, binary
    assert binary.registers <= BUDGET[kernel], binary
    assert binary.shared <= SHARED_LIMIT["sm_86"], binary
    # The weights' loads were seen to be whole vectors; those of the smallest row hold four numbers or fewer.
    assert ("LDG.E.128" in binary.sass) == (size > 8), binary


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_opcheck(backend):
    x, weight, bias, options = problem("odd gate", torch.float32)
    mix = [make(5, 7, 1), make(5), make(4, 7, 1), None, make(3, 4)]
    args = bmk.conv_step.prepare(
        x[..., 0], start(x, weight, 2), weight, bias, *mix[:4], skip=mix[4], **options
    )  # fmt: skip
    for call in (args, (*args[:5], None, None, None, None, None, *args[10:])):
        torch.library.opcheck(
            torch.ops.bigmodel_kernels.conv_step.default,
            (*call, backend),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_compile():
    x, weight, bias, options = problem("relu", torch.float32)
    expected, _ = stream(x, weight, bias, options)
    torch.compiler.reset()

    @torch.compile(fullgraph=True)
    def step(x_t, state):
        y, _, state = bmk.conv_step(x_t, state, weight, bias, **options)
        return 2 * y, state

    state = start(x, weight, options["dilation"])
    for t in range(STEPS):
        y, state = step(x[..., t], state)
        torch.testing.assert_close(y, 2 * expected[..., t])


X, W = torch.zeros(2, 4), torch.zeros(6, 4, 3)
STATE = bmk.ConvState.start(2, 4, 3, 2, X)
MIX = torch.zeros(4, 3, 1)
ERRORS = [
    (TypeError, "x_t and weight must be tensors", dict(x_t=[1.0])),
    (TypeError, "state must be a ConvState", dict(state=torch.zeros(2, 4, 4))),
    (RuntimeError, r"x_t must have shape \[N, 4\], got \[2, 5\]", dict(x_t=torch.zeros(2, 5))),
    (RuntimeError, r"x_t must have shape \[N, 4\], got \[2, 4, 1\]", dict(x_t=X.unsqueeze(-1))),
    (RuntimeError, r"state must have a ring of shape \[2, 6, 4\], got \[2, 4, 4\]", dict(dilation=3)),
    (RuntimeError, "weight must have a multiple of 2 rows, got 5", dict(weight=torch.zeros(5, 4, 3))),
    (RuntimeError, r"weight must have shape \[rows, C / groups, K\], got \[6, 4\]", dict(weight=W[..., 0])),
    (TypeError, "bias must be a tensor, got int", dict(bias=1)),
    (TypeError, "skip must be a tensor, got list", dict(skip=[1])),
    (RuntimeError, r"skip_weight must have shape \[0, 3, 1\], got \[\]", dict(skip_weight=torch.zeros(()))),
    (TypeError, "dilation must be an int, got str", dict(dilation="2")),
    (ValueError, "groups must be positive, got 0", dict(groups=0)),
    (RuntimeError, r"out_weight must have shape \[4, 3, 1\], got \[4, 6, 1\]", dict(out_weight=torch.zeros(4, 6, 1))),
    (RuntimeError, r"skip must have shape \[2, 0\]", dict(skip=X)),
    (
        RuntimeError,
        "bias must be torch.float32 on cpu as x_t is, got torch.float64",
        dict(bias=torch.zeros(6).double()),
    ),
    (ValueError, "activation must be", dict(activation="swish")),
    (ValueError, "backend must be one of", dict(backend="fast")),
    (RuntimeError, "backend 'triton' cannot run this call: .*GPU", dict(backend="triton")),
]


@pytest.mark.parametrize(("kind", "message", "arguments"), ERRORS)
def test_errors(kind, message, arguments):
    call = {"x_t": X, "state": STATE, "weight": W, "dilation": 2, "activation": "tanh_sigmoid"} | arguments
    with pytest.raises(kind, match=message):
        bmk.conv_step(**call)
