"""What runs on a GPU, run on the CPU at tiny sizes: the measurements, the random cases, the calls of the hard tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_bench import Bench
from benchmarks.gpu_measure import MEASURES, main
from bigmodel_kernels.ops.attention.torch_op import nan_in_cudnn
from tests.cuda import random_cases
from tests.cuda.calls import CALLS, TINY, check_rows_of_small_lse, gradients, repeat

ROOT = Path(__file__).parents[1]


def lines(text):
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("name", MEASURES)
def test_each_measurement_runs_dry(name, capsys):
    assert main(["--dry", name]) == 0
    shown = lines(capsys.readouterr().out)
    assert shown
    for figure in shown:
        if "case" in figure:
            assert figure["ratio"] > 0, figure
            assert figure["us"][figure["ours"]] > 0
            assert "wrong" not in figure


def test_triton_kernels_are_measured_too():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_measure", "--dry", "pointwise"], cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert all("triton" in figure["us"] for figure in lines(done.stdout))


class TestCompare:
    def run(self, capsys, ours, stock=None, **options):
        bench, exact = Bench(dry=True), torch.arange(6.0, dtype=torch.float64)
        stock = stock or {"eager": lambda: exact.float()}
        bench.compare("case", ours, stock, exact, dtype=torch.float32, flops=12, traffic=48, **options)
        return bench, lines(capsys.readouterr().out)[0]

    def test_a_wrong_result_of_ours_has_no_time(self, capsys):
        good, bad = torch.arange(6.0), torch.arange(6.0) + 1e-3
        bench, figure = self.run(capsys, {"auto": lambda: good, "cuda": lambda: bad})
        assert "cuda" not in figure["us"]
        assert "relative L2 error" in figure["wrong"]["cuda"]
        assert len(bench.failures) == 1
        bench, figure = self.run(capsys, {"cuda": lambda: bad})
        assert figure["not_measured"] == "ours"
        assert bench.failures

    def test_a_wrong_stock_result_is_no_rival(self, capsys):
        exact = torch.arange(6.0)
        stock = {"eager": lambda: exact, "other": lambda: exact + 1}
        bench, figure = self.run(capsys, {"auto": lambda: exact}, stock)
        assert figure["best"] == "eager"
        assert "other" in figure["wrong"]
        assert not bench.failures

    def test_who_cannot_run_is_listed_and_who_breaks_is_wrong(self, capsys):
        def refuses():
            raise RuntimeError("conv: backend 'cuda' cannot run this call: no GPU")

        def breaks():
            raise IndexError("out of range")

        exact = torch.arange(6.0)
        bench, figure = self.run(
            capsys, {"auto": lambda: exact, "cuda": refuses, "triton": breaks}, {"eager": lambda: exact, "peer": breaks}
        )
        assert set(figure["missing"]) == {"cuda", "peer"}
        assert figure["wrong"] == {"triton": "IndexError: out of range"}
        assert len(bench.failures) == 1


@pytest.mark.parametrize("family", random_cases.FAMILIES)
def test_random_cases_on_the_cpu(family):
    dtypes = (torch.float32, torch.bfloat16)
    run = random_cases.run(family, range(12), seed=3, device="cpu", backends=("cpu",), dtypes=dtypes)
    assert not run.failures, str(run)
    assert run.ran["cpu"] >= 6


def test_random_cases_in_processes(capsys):
    arguments = ["lstm", "--device", "cpu", "--cases", "9", "--processes", "2", "--seed", "4"]
    assert random_cases.main(arguments) == 0
    shown = lines(capsys.readouterr().out)[0]
    assert shown == {"family": "lstm", "seed": 4, "asked": 9, "cpu": shown["cpu"], "failures": 0}
    alone = random_cases.run("lstm", range(9), seed=4, device="cpu", backends=("cpu",))
    assert shown["cpu"] == alone.ran["cpu"]


def test_random_cases_find_what_is_wrong(monkeypatch):
    real = random_cases.conv_problem.Problem.run

    def planted(self, dtype, backend, **options):
        found = real(self, dtype, backend, **options)
        return [found[0] * 1.01, *found[1:]] if backend == "cpu" else found

    monkeypatch.setattr(random_cases.conv_problem.Problem, "run", planted)
    run = random_cases.run("conv", range(6), seed=3, device="cpu", backends=("cpu",), dtypes=(torch.float32,))
    assert run.failures
    assert "seed 3" in str(run)


@pytest.mark.parametrize("name", CALLS)
def test_calls_of_the_hard_tests(name):
    call = CALLS[name]
    inputs = call.inputs("cpu", torch.float32)
    assert len(gradients(call, inputs, "auto")) == 1 + call.leaves
    repeat(call, inputs, "auto", forwards=2, backwards=2)
    assert all(bool(t.isfinite().all()) for t in gradients(TINY[name], TINY[name].inputs("cpu", torch.float32), "auto"))


@pytest.mark.parametrize("backend", ["auto", "cpu", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_small_lse(dtype, backend):
    check_rows_of_small_lse("cpu", dtype, backend)


def test_cudnn_is_left_out_where_it_gives_nan():
    q, mask = torch.zeros(1, 2, 192, 64, dtype=torch.bfloat16), torch.zeros(192, 192)
    assert nan_in_cudnn(q, q, mask)
    assert not nan_in_cudnn(q, q, None)
    assert not nan_in_cudnn(q.float(), q.float(), mask)
    assert not nan_in_cudnn(q[:, :, :128], q[:, :, :128], mask)
    assert nan_in_cudnn(q[:, :, :128], q, mask)
    with torch.no_grad():
        assert not nan_in_cudnn(q, q, mask)
