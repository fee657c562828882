"""python -m benchmarks.launch: what Python does in one call of a Triton kernel, before the kernel is handed to Triton.

Checks of the arguments, choice of the backend, allocation of the results, grid and constants of the kernel: everything but
Triton's own launch, which is replaced by nothing, so that no GPU is needed. A small call on a GPU takes at least this long.
An LSTM's products are PyTorch's: they run here, on the CPU, with so few numbers that what is timed is their dispatch.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

import bigmodel_kernels as bmk

BAR = 25.0  # microseconds
ROUNDS, CALLS = 15, 200
GPU = "sm_90"
TRAINING = ", training"


def _gpu(device: int | None) -> str:
    return GPU


def _no_reason(*args: object) -> None:
    """In place of what says why a backend cannot run; a Mock would take longer than all the rest of a call."""


@contextlib.contextmanager
def stubbed() -> Iterator[list]:
    """In the block, calls with backend="triton" go as far as the launch, on CPU tensors; gives the list of what they launch."""
    from bigmodel_kernels import _registry, _triton

    launched: list = []
    with (
        mock.patch.object(_triton, "launch", lambda kernel, programs, *args, **constants: launched.append(kernel)),
        mock.patch.object(_triton, "gpu", _gpu),
        mock.patch.object(_triton, "reason", _no_reason),
        mock.patch.object(_registry, "availability", _no_reason),
    ):
        yield launched


def cases() -> dict[str, Callable[[], object]]:
    """One inference call of every op with a kernel of its own; "training" ones record what their backward needs."""

    def tensor(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.bfloat16)

    q, x, row, image = tensor(2, 8, 256, 64), tensor(64, 768), tensor(768), tensor(2, 64, 16, 16)
    # Channels innermost, as the kernels want x and the weight; others are laid out anew first.
    signal, innermost = tensor(2, 256, 64).transpose(1, 2), tensor(128, 2, 64).transpose(1, 2)
    column, one, taps, row_64 = tensor(2, 64), tensor(64, 64, 1), tensor(128, 64, 2), tensor(64)
    state = bmk.ConvState.start(2, 64, 2, 4, column)
    weight = tensor(64, 64, 3, 3).contiguous(memory_format=torch.channels_last)
    cache, pages, lengths = tensor(64, 2, 16, 64), torch.zeros(2, 32, dtype=torch.int32), torch.ones(2).int()
    tokens, ends = tensor(512, 8, 64), torch.tensor([0, 212, 512], dtype=torch.int32)
    step, sequence, parameters = _lstm(16, 4)
    trained = [torch.nn.Parameter(w) for w in parameters]
    normed = _norm_lstm(1)
    image, target = image.contiguous(memory_format=torch.channels_last), torch.zeros(64, dtype=torch.int64)
    return {
        "attention": lambda: bmk.attention(q, q, q, is_causal=True, backend="triton"),
        "attention_varlen": lambda: bmk.attention_varlen(
            tokens, tokens, tokens, ends, ends, 300, 300, is_causal=True, backend="triton"
        ),
        "attention_decode": lambda: bmk.attention_decode(
            q[:, :, :1], cache, cache, lengths, block_table=pages, backend="triton"
        ),
        "conv": lambda: bmk.conv(image, weight, padding=1, activation="relu", backend="triton"),
        "gated_conv": lambda: bmk.gated_conv(
            signal, innermost, None, one, row_64, one, row_64, skip=signal, dilation=4, backend="triton"
        ),
        "conv_step": lambda: bmk.conv_step(
            column,
            state,
            taps,
            None,
            one,
            row_64,
            one,
            row_64,
            skip=column,
            dilation=4,
            activation="tanh_sigmoid",
            backend="triton",
        ),
        "lstm": lambda: bmk.lstm(*sequence, parameters, backend="triton"),
        "lstm_cell": lambda: bmk.lstm_cell(*step, *parameters, backend="triton"),
        f"lstm_cell{TRAINING}": lambda: bmk.lstm_cell(*step, *trained, backend="triton"),
        "norm_lstm": lambda: bmk.norm_lstm(*normed, backend="triton"),
        "linear": lambda: bmk.linear(step[0], parameters[0], parameters[2], activation="gelu", backend="triton"),
        "layer_norm": lambda: bmk.layer_norm(x, row, row, backend="triton"),
        "bias_act": lambda: bmk.bias_act(x, row, activation="gelu", backend="triton"),
        "cross_entropy": lambda: bmk.cross_entropy(x, target, reduction="none", backend="triton"),
    }


def _lstm(hidden: int, steps: int) -> tuple[tuple, tuple, list[torch.Tensor]]:
    """x and states of a step and of a sequence, and the weights. In float32 a product is one call of PyTorch's, as on a GPU."""
    x, state = torch.ones(steps, 2, 16), torch.zeros(1, 2, hidden)
    weights = [torch.ones(4 * hidden, 16), torch.ones(4 * hidden, hidden), *torch.ones(2, 4 * hidden)]
    return (x[0], (state[0], state[0].clone())), (x, (state, state.clone())), weights


def _norm_lstm(steps: int) -> tuple:
    """The arguments of an LSTM with layer norm."""
    state, gain = torch.zeros(2, 16), torch.ones(16)
    return torch.ones(steps, 2, 64), (state, state.clone()), torch.ones(64, 16), torch.ones(64), gain, gain.clone()


def steps() -> tuple[int, dict[str, tuple[Callable[[], object], Callable[[], object]]]]:
    """The number of steps that a long sequence has more than a short one; a call of both by every op that goes step by step."""
    short, long = 1, 17
    sequences = [_lstm(72, count)[1:] for count in (short, long)]
    normed = [_norm_lstm(count) for count in (short, long)]
    return long - short, {
        "lstm": tuple(partial(bmk.lstm, *sequence, weights, backend="triton") for sequence, weights in sequences),
        "norm_lstm": tuple(partial(bmk.norm_lstm, *args, backend="triton") for args in normed),
    }


def measure(rounds: int = ROUNDS, calls: int | None = None) -> dict[str, float]:
    """{op: microseconds of a call}, the median of the rounds, which go through all ops in turn."""
    calls = calls or CALLS
    samples: dict[str, list[float]] = {}
    more_steps, by_step = steps()
    with stubbed():
        some = cases() | {f"{op}, {i}": call for op, calls in by_step.items() for i, call in enumerate(calls)}
        for name, call in some.items():  # the first calls fill caches
            _microseconds(name, call, 1)
        for _ in range(rounds):
            for name, call in some.items():
                samples.setdefault(name, []).append(_microseconds(name, call, calls))
    for op in by_step:
        short, long = (samples.pop(f"{op}, {i}") for i in range(2))
        samples[f"{op}, a step"] = [(b - a) / more_steps for a, b in zip(short, long)]
    return {name: statistics.median(found) for name, found in samples.items()}


def _microseconds(name: str, call: Callable[[], object], calls: int) -> float:
    with torch.set_grad_enabled(name.endswith(TRAINING)):
        started = time.perf_counter_ns()
        for _ in range(calls):
            call()
        return (time.perf_counter_ns() - started) / calls / 1e3


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launch", description=__doc__)
    torch.set_num_threads(1)  # what runs here is small
    parser.add_argument("--json", type=Path, metavar="FILE", help="write {op: microseconds} here as well")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of {CALLS} calls each (default {ROUNDS})")
    options = parser.parse_args(argv)
    found = measure(options.rounds)
    table = Table("op", "us per call", f"bar {BAR:.0f} us", title="Python side of a Triton call, launch stubbed")
    for name, microseconds in found.items():
        table.add_row(name, f"{microseconds:.1f}", "ok" if microseconds <= BAR else "above")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
