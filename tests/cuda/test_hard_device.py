"""What goes wrong on GPUs and nowhere else: graphs whose inputs change, side streams, races, lack of memory, 2^31 elements."""

import os

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels.testing import relative_l2, tf32
from tests.cuda.calls import CALLS, NAMED, TINY, check_rows_of_small_lse, gradients, repeat

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic with it, as torch demands
DTYPE = torch.bfloat16


def call_and_inputs(name, seed=0):
    return CALLS[name], CALLS[name].inputs("cuda", DTYPE, seed)


def needs(gigabytes):
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes << 30:
        pytest.skip(f"{gigabytes} GiB of GPU memory are needed, {free >> 30} are free")


@pytest.mark.parametrize(("name", "backend"), NAMED)
def test_tiny(name, backend):
    """For the sanitizer."""
    call = TINY[name]
    for t in gradients(call, call.inputs("cuda", DTYPE), backend):
        assert bool(t.isfinite().all())


@pytest.mark.parametrize(("name", "backend"), NAMED)
def test_the_same_bits_from_every_run(name, backend):
    call, inputs = call_and_inputs(name)
    repeat(call, inputs, backend, forwards=250, backwards=50)


@pytest.mark.parametrize(("name", "backend"), NAMED)
def test_in_a_graph_whose_inputs_change(name, backend):
    call, held = call_and_inputs(name)
    with torch.no_grad():
        side = torch.cuda.Stream()  # torch's rule: warm up on a side stream, then capture
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call.function(*held, backend=backend)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call.function(*held, backend=backend)
        for seed in (0, 50, 100):
            for t, fresh in zip(held, call.inputs("cuda", DTYPE, seed)):
                t.copy_(fresh)
            found.fill_(float("nan"))
            graph.replay()
            assert torch.equal(found, call.function(*held, backend=backend)), f"seed {seed}"


@pytest.mark.parametrize(("name", "backend"), NAMED)
def test_on_side_streams_behind_a_slow_producer(name, backend):
    call, inputs = call_and_inputs(name)
    expected = gradients(call, inputs, backend)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for stream in streams:
        with torch.cuda.stream(stream):
            late = [torch.full_like(t, float("nan")) for t in inputs]
            torch.cuda._sleep(20_000_000)  # some 10 ms: a kernel on another stream would read NaNs
            for t, value in zip(late, inputs):
                t.copy_(value)
            results.append(gradients(call, late, backend))
    for stream, found in zip(streams, results):
        stream.synchronize()
        for i, (a, b) in enumerate(zip(found, expected)):
            assert relative_l2(a, b) < 1e-2, f"result {i}"  # without determinism sums may be in another order


@pytest.mark.parametrize(("name", "backend"), NAMED)
def test_after_running_out_of_memory(name, backend):
    call, inputs = call_and_inputs(name)
    expected = gradients(call, inputs, backend)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()

    def fill():
        held = []
        while True:
            held.append(gradients(call, inputs, backend))

    # A process may have its share and not a byte more, so that nobody else on the GPU is starved.
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 1) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            fill()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    for i, (a, b) in enumerate(zip(gradients(call, inputs, backend), expected)):
        assert relative_l2(a, b) < 1e-2, f"result {i}"
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.parametrize("backend", ["triton"])
def test_attention_beyond_2_31_elements(backend):
    needs(40)
    shape = (33, 16, 32768, 128)  # 2.2e9 elements of q
    q, k, v = (torch.empty(shape, dtype=DTYPE, device="cuda").normal_() for _ in range(3))

    def run(*tensors):
        return bmk.attention(*tensors, is_causal=True, window=(127, None), backend=backend)

    with torch.no_grad():
        out = run(q, k, v)
        for b, h in ((0, 0), (16, 7), (32, 15)):
            alone = run(*(t[b : b + 1, h : h + 1] for t in (q, k, v)))
            assert torch.equal(out[b, h], alone[0, 0])


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_depthwise_beyond_2_31_elements(backend):
    needs(20)
    x = torch.empty(1, 514, 2048, 2048, dtype=DTYPE, device="cuda").normal_()
    weight = torch.randn(514, 1, 3, 3, device="cuda").to(DTYPE)
    with torch.no_grad():
        out = bmk.conv(x, weight, padding=1, groups=514, backend=backend)
        for c in (0, 300, 513):
            alone = torch.conv2d(x[:, c : c + 1].double(), weight[c : c + 1].double(), padding=1)
            assert relative_l2(out[:, c : c + 1], alone) < 4e-3


def test_dense_convolution_beyond_2_31_elements():
    needs(20)
    x = torch.empty(1, 32, 8200, 8200, dtype=DTYPE, device="cuda").normal_()  # 2.15e9
    weight = (torch.randn(8, 32, 3, 3, device="cuda") / 17).to(DTYPE)
    with torch.no_grad():
        out = bmk.conv(x, weight, padding=1, backend="triton")
        for rows in (slice(0, 12), slice(8188, 8200)):  # the first and the last rows, without the ones next to the cut
            alone = torch.conv2d(x[:, :, rows].double(), weight.double(), padding=1)
            inner = slice(0, 11) if rows.start == 0 else slice(1, 12)
            assert relative_l2(out[:, :, rows][:, :, inner], alone[:, :, inner]) < 4e-3


def test_attention_gradients_beyond_2_31_elements():
    needs(60)
    shape = (33, 16, 32768, 128)
    q, k, v, grad = (torch.empty(shape, dtype=DTYPE, device="cuda").normal_() for _ in range(4))

    def run(*tensors):
        *inputs, upstream = tensors
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = bmk.attention(*leaves, is_causal=True, window=(127, None), backend="triton")
        return torch.autograd.grad(out, leaves, upstream)

    found = run(q, k, v, grad)
    for b, h in ((0, 0), (32, 15)):
        alone = run(*(t[b : b + 1, h : h + 1] for t in (q, k, v, grad)))
        assert all(torch.equal(whole[b, h], part[0, 0]) for whole, part in zip(found, alone))


@pytest.mark.parametrize("name", ["layer_norm", "cross_entropy"])
def test_rows_beyond_2_31_elements(name):
    needs(30)
    width = 4096
    x = torch.empty((1 << 19) + 40, width, dtype=DTYPE, device="cuda").normal_()  # 2^31 and 40 rows
    rows = [0, 1 << 18, (1 << 19) - 1, (1 << 19) + 39]

    def run(x, target, backend):
        if name == "layer_norm":
            return bmk.layer_norm(x, torch.ones(width, dtype=x.dtype, device="cuda"), backend=backend)
        return bmk.cross_entropy(x, target, reduction="none", backend=backend)

    target = torch.arange(len(x), device="cuda") % width
    with torch.no_grad():
        found = run(x, target, "triton")[rows]
        assert relative_l2(found, run(x[rows].double(), target[rows], "torch")) < 4e-3


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_lstm_beyond_2_31_gates(backend):
    needs(60)
    steps, batch, hidden = 2064, 512, 512  # 2.16e9 pre-activations
    x = torch.empty(steps, batch, 64, dtype=DTYPE, device="cuda").normal_()
    shapes = ((4 * hidden, 64), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,))
    weights = [torch.randn(shape, device="cuda").mul_(shape[-1] ** -0.5).to(DTYPE) for shape in shapes]
    with torch.no_grad():
        out = bmk.lstm(x, None, weights, backend=backend)[0]
        rows = [0, 255, 511]
        exact = bmk.lstm(x[:, rows].double(), None, [w.double() for w in weights], backend="torch")[0]
    assert relative_l2(out[:, rows], exact) < 4e-3 * (steps / 200) ** 0.5


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("name", ["conv", "attention", "lstm"])
def test_float32_is_float32_unless_asked(name, allowed):
    """With torch's switches off, the error is that of IEEE float32; with them on, at most that of TF32."""
    call = CALLS[name]
    inputs = call.inputs("cuda", torch.float32)
    exact = call.function(*(t.double() for t in inputs), backend="torch")
    with tf32(allowed):
        for backend in call.backends:
            error = relative_l2(call.function(*inputs, backend=backend), exact)
            assert error < (1e-3 if allowed else 2e-6), backend


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_masked_rows_of_small_lse_have_finite_gradients(backend):
    check_rows_of_small_lse("cuda", DTYPE, backend)
