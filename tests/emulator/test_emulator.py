"""The emulator against itself: each small kernel of planted.cuh runs right, and each of its planted mistakes is found."""

import re

import pytest
import torch

from tests.emulator.emulator import HERE, EmulatorError, Program, needs_compiler

pytestmark = needs_compiler
SEEDS = range(5)

# What must be said of each mistake: looking for races, and looking at memory (None: that way it may go unseen).
OUTSIDE = "out of bounds|AddressSanitizer"
MISTAKES = {
    "reverse_twice": {
        "no_barrier": ("race in|never written", None),
        "no_second_barrier": ("race in", None),
        "out_of_bounds": (OUTSIDE, OUTSIDE),
        "divergent": ("deadlock|never written|race in", "deadlock"),
    },
    "copy_vectors": {
        "misaligned": ("misaligned", "misaligned"),
        "before_begin": (OUTSIDE, OUTSIDE),
        "out_of_bounds": (OUTSIDE, OUTSIDE),
    },
    "rotate": {
        "no_barrier": ("race in", None),
        "divergent": ("divergent warp", "divergent warp"),
        "exited": ("exited|never written|race in", "exited"),
    },
    "produce_consume": {
        "no_barrier": ("race in|never written", None),
        "wrong_count": ("threads are expected", "threads are expected"),
        "wrong_barrier": ("deadlock", "deadlock"),
    },
    "hand_over": {"no_fence": ("race in", None), "no_second_fence": ("race in", None)},
    "histogram": {"not_atomic": ("race in", None)},
    "pipeline": {
        "weak_wait": ("race in.*cp.async", None),
        "no_wait": ("race in.*cp.async", None),
        "no_barrier": ("race in", None),
        "no_second_barrier": ("race in", None),
    },
    "copy_with_zeros": {
        "misaligned": ("not a multiple of 16", "not a multiple of 16"),
        "out_of_bounds": (OUTSIDE, OUTSIDE),
    },
    "bulk_pipeline": {
        "no_barrier": ("race in|never written", None),
        "not_initialised": ("never written", "not initialised"),
        "wrong_bytes": ("deadlock", "deadlock"),
        "too_many_arrivals": ("race in|more than the 1 arrivals|deadlock", None),
        "wrong_parity": ("race in|deadlock", None),
        "no_wait": ("race in", None),
        "weak_wait": ("race in", None),
        "no_proxy_fence": ("without fence_proxy_async", None),
        "leaves_early": ("a block ended while a copy", "a block ended while a copy"),
    },
    "read_neighbour": {
        "no_barrier": ("race in|never written|has exited|out of bounds", None),
        "no_wait": ("race in|never written|has exited|out of bounds", None),
        "leaves_early": ("has exited|out of bounds", "has exited|AddressSanitizer"),
    },
    "send_async": {"wrong_bytes": ("race in|deadlock", None)},
    "send_and_arrive": {"narrow_scope": ("race in", None)},
    "sum_in_last_block": {
        "relaxed": ("race in", None),
        "narrow_scope": ("race in", None),
        "no_fence": ("race in", None),
    },
    "relay": {"relaxed": ("race in", None)},
}
ALL = [(kernel, mistake) for kernel, mistakes in MISTAKES.items() for mistake in mistakes]
PLANTED = Program(
    HERE / "planted.cuh",
    *(f"planted::{kernel}<planted::{mistake}>" for kernel, mistake in ALL + [(kernel, "none") for kernel in MISTAKES]),
)


def launch(kernel: str, mistake: str, **how) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs a planted kernel; returns what it made and what it should have."""
    name = f"planted::{kernel}<planted::{mistake}>"
    x, y = torch.randn(8 * 128), torch.full((8 * 128,), torch.nan)
    match kernel:
        case "reverse_twice":
            x, y = x[:64].clone(), y[:64].clone()
            PLANTED.run(name, 1, 64, x, y, **how)
            return y, x
        case "copy_vectors":
            x, y = x[:128].clone(), y[:128].clone()
            PLANTED.run(name, 1, 32, x, y, shared_bytes=128 * 4, **how)
            return y, x
        case "rotate":
            PLANTED.run(name, 1, 32, x, y, **how)
            return y[:32], x[:32].roll(-2)
        case "produce_consume":
            PLANTED.run(name, 1, 64, x, y, 4, **how)
            return y[:128], 2 * x[:128].view(4, 32).flip(1).flatten()
        case "hand_over":
            PLANTED.run(name, 1, 64, x, y, **how)
            return y[:1], x[:1]
        case "histogram":
            bins, counts = torch.randint(4, (2 * 64,), dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
            PLANTED.run(name, 2, 64, bins, counts, **how)
            return counts, 2 * torch.bincount(bins[:64], minlength=4).int()
        case "pipeline":
            PLANTED.run(name, 1, 32, x, y, 8, **how)
            return y, x.view(8, 128).flip(1).flatten()
        case "copy_with_zeros":
            x, y = x[:70].clone(), y[:128].clone()
            PLANTED.run(name, 1, 32, x, y, 70, shared_bytes=128 * 4, **how)
            return y, torch.cat([x, torch.zeros(58)])
        case "bulk_pipeline":
            PLANTED.run(name, 1, 64, x, y, 8, shared_bytes=3 * 128 * 4, **how)
            return y, 2 * x
        case "read_neighbour":
            PLANTED.run(name, 8, 32, x, y, cluster=4, **how)
            return y[:256], x[:256].view(2, 4, 32).roll(-1, 1).flatten()
        case "send_async" | "send_and_arrive":
            x, y = torch.randint(100, (128,), dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
            PLANTED.run(name, 4, 32, x, y, 5, cluster=4, **how)
            return y, x.view(4, 32).roll(5, 0).flatten() + 5
        case "sum_in_last_block":
            x, y, total = torch.randint(9, (256,)).float(), torch.zeros(8), torch.zeros(1)
            PLANTED.run(name, 8, 32, x, y, torch.zeros(1, dtype=torch.int32), total, **how)
            return total, x.sum()[None]
        case "relay":
            words, data = torch.zeros(6, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
            PLANTED.run(name, 5, 1, words, data, 3, cooperative=True, **how)
            return torch.stack([words[5], data[0]]), torch.tensor([15, 15])
    raise AssertionError(kernel)


@pytest.mark.parametrize("detect", ["memory", "races"])
@pytest.mark.parametrize("kernel", MISTAKES)
def test_right_kernels_pass(kernel, detect):
    for seed in SEEDS:
        got, expected = launch(kernel, "none", seed=seed, detect=detect)
        assert torch.equal(got, expected), f"seed {seed}"


@pytest.mark.parametrize(("kernel", "mistake"), ALL)
def test_mistakes_are_found(kernel, mistake):
    """Under one of three orders at the most: each is found in nearly all."""
    for detect, message in zip(("races", "memory"), MISTAKES[kernel][mistake]):
        if message is None:
            continue
        for seed in range(3):
            try:
                launch(kernel, mistake, seed=seed, detect=detect)
            except EmulatorError as error:
                found = str(error)
                break
        else:
            pytest.fail(f"{detect}: nothing was found")
        assert re.search(message, found), found


# ---- everything else a kernel may do ----

OTHERS = Program(
    HERE / "planted.cuh",
    "planted::take_tickets",
    "planted::give_up",
    "planted::scale_and_shift",
    "planted::spin",
    "planted::spin_by_atomics",
    "planted::convert<__half>",
    "planted::convert<__nv_bfloat16>",
    *(
        f"planted::multiply_k16<planted::{mistake}, {t}>"
        for mistake in ("none", "swapped")
        for t in ("__half", "__nv_bfloat16")
    ),
    *(f"planted::multiply_k8<{t}>" for t in ("float", "__half", "__nv_bfloat16")),
    *(f"planted::through_registers<{i}, {o}>" for i in ("false", "true") for o in ("false", "true")),
)
DTYPES = {"float": torch.float32, "__half": torch.float16, "__nv_bfloat16": torch.bfloat16}


def test_a_seed_is_an_order():
    def order(seed):
        tickets = torch.zeros(96, dtype=torch.int32)
        OTHERS.run("planted::take_tickets", 1, 96, torch.zeros(1, dtype=torch.int32), tickets, seed=seed)
        assert torch.equal(tickets.sort().values, torch.arange(96, dtype=torch.int32))
        return tuple(tickets.tolist())

    assert order(1) == order(1)
    assert len({order(seed) for seed in range(6)}) == 6


def test_struct_arguments():
    x, y = torch.randn(50), torch.zeros(50)
    OTHERS.run("planted::scale_and_shift", 1, 32, (x, y, 50, (2.0, 3, 4)), True)
    torch.testing.assert_close(y, -2 * x + 7)
    OTHERS.run("planted::scale_and_shift", 1, 32, (None, y, 50, (2.0, 3, 4)), False)
    assert torch.equal(y, torch.full((50,), 9.0))


def test_tensors_of_one_storage_share_a_buffer():
    x = torch.randn(50)
    expected = 2 * x[:25] + 7
    OTHERS.run("planted::scale_and_shift", 1, 32, (x[:25], x[25:], 25, (2.0, 3, 4)), False)
    torch.testing.assert_close(x[25:], expected)


@pytest.mark.parametrize(
    "arguments",
    [((None, None, 50, (2.0, 3)), True), ((None, None, 50, (2.0, 3, 2**31)), True), ((None, None, 50, (2.0, 3, 4)),)],
)
def test_arguments_that_do_not_fit(arguments):
    with pytest.raises(EmulatorError, match=r"does not fit|expected"):
        OTHERS.run("planted::scale_and_shift", 1, 32, *arguments)


def test_trap_says_why():
    with pytest.raises(EmulatorError, match=r"trap: reason 42\n  in block \(0, 0, 0\), thread \(5, 0, 0\)"):
        OTHERS.run("planted::give_up", 1, 32, 42)


def test_spinning_blocks_that_are_not_all_under_way():
    flags = torch.zeros(8, dtype=torch.int32)
    OTHERS.run("planted::spin", 8, 32, flags, cooperative=True)
    with pytest.raises(EmulatorError, match="no progress: threads spin"):
        OTHERS.run("planted::spin", 8, 32, torch.zeros(8, dtype=torch.int32), live_blocks=4)
    with pytest.raises(EmulatorError, match="no progress: threads spin"):
        OTHERS.run("planted::spin_by_atomics", 1, 32, torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize(
    ("launch", "message"),
    [((1, 2000), "a block of"), ((0, 32), "a grid of"), ((3, 32, 2), "no multiple of the cluster")],
)
def test_impossible_launches(launch, message):
    grid, block, *cluster = launch
    with pytest.raises(EmulatorError, match=message):
        OTHERS.run(
            "planted::spin", grid, block, torch.zeros(8, dtype=torch.int32), cluster=cluster[0] if cluster else 1
        )
    with pytest.raises(EmulatorError, match="bytes of shared memory"):
        OTHERS.run("planted::spin", 1, 32, torch.zeros(8, dtype=torch.int32), shared_bytes=228 * 1024)


@pytest.mark.parametrize("kind", ["__half", "__nv_bfloat16"])
def test_16_bit_numbers_are_those_of_torch(kind):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    exact = bits.view(DTYPES[kind]).float()  # every number of the format, infinities and NaNs too
    next_to = torch.nextafter(exact, torch.full_like(exact, torch.inf))
    halfway = (exact + exact.roll(-1)) / 2
    x = torch.cat(
        [exact, next_to, halfway, torch.nextafter(halfway, torch.zeros(1)), torch.randn(4096), 1e5 * torch.randn(4096)]
    )
    rounded, back = torch.zeros(len(x), dtype=DTYPES[kind]), torch.zeros(len(x))
    OTHERS.run(f"planted::convert<{kind}>", 1, 32, x, rounded, back, len(x))
    numbers = ~x.isnan()
    assert torch.equal(rounded[numbers].view(torch.int16), x[numbers].to(DTYPES[kind]).view(torch.int16))
    assert torch.equal(rounded.isnan(), x.isnan())
    assert torch.equal(back[numbers], rounded[numbers].float())


@pytest.mark.parametrize("kind", ["__half", "__nv_bfloat16"])
def test_multiply_k16(kind):
    a = torch.randint(-9, 10, (16, 16)).to(DTYPES[kind])
    b = torch.randint(-9, 10, (16, 8)).to(DTYPES[kind])
    right, wrong = torch.zeros(16, 8), torch.zeros(16, 8)
    OTHERS.run(f"planted::multiply_k16<planted::none, {kind}>", 1, 32, a, b.T.contiguous(), right, detect="races")
    OTHERS.run(f"planted::multiply_k16<planted::swapped, {kind}>", 1, 32, a, b.T.contiguous(), wrong)
    assert torch.equal(right, a.float() @ b.float())
    assert not torch.equal(wrong, right)


@pytest.mark.parametrize("kind", ["float", "__half", "__nv_bfloat16"])
def test_multiply_k8(kind):
    a, b, d = torch.randn(16, 8), torch.randn(8, 8), torch.zeros(16, 8)
    if kind == "float":  # tf32: 10 bits of fraction, ties away from zero
        operands = [((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for x in (a, b)]
    else:
        operands = [x.to(DTYPES[kind]) for x in (a, b)]
    OTHERS.run(f"planted::multiply_k8<{kind}>", 1, 32, a, b.T.contiguous(), d)
    torch.testing.assert_close(d.double(), operands[0].double() @ operands[1].double(), rtol=1e-6, atol=1e-5)
    assert not torch.allclose(d.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("transpose_in", [False, True])
@pytest.mark.parametrize("transpose_out", [False, True])
def test_matrices_through_registers(transpose_in, transpose_out):
    x, y = torch.randn(4, 8, 8).half(), torch.zeros(4, 8, 8).half()
    name = f"planted::through_registers<{str(transpose_in).lower()}, {str(transpose_out).lower()}>"
    OTHERS.run(name, 1, 32, x, y, detect="races")
    assert torch.equal(y, x if transpose_in == transpose_out else x.mT)
