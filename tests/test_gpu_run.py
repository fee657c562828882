"""make gpu, as far as a machine without a GPU can run it: steps that need one say so, others are bounded and logged."""

import importlib.util
import json
import sys

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Step, main, run_all

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def step(name, code, seconds=20):
    return Step(name, seconds, (sys.executable, "-c", code))


@pytest.fixture
def with_gpu(monkeypatch):
    monkeypatch.setattr(gpu, "why_not", lambda step: None)


@WITHOUT_GPU
def test_without_a_gpu_nothing_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.delenv("STEP", raising=False)
    assert main([]) == 0
    written = json.loads((tmp_path / "gpu.json").read_text())["outcomes"]
    assert [o["step"] for o in written] == [s.name for s in gpu.STEPS]
    assert {o["result"] for o in written} == {"not measured"}
    assert "no GPU was found" in capsys.readouterr().out


def test_figures_failures_and_timeouts(tmp_path, with_gpu):
    steps = (
        step("good", "print('hello'); print('{\"ns\": 12.5}')"),
        step("bad", "raise SystemExit('it is broken')"),
        step("slow", "import time; print('begun', flush=True); time.sleep(60)", seconds=2),
    )
    outcomes = {o.step: o for o in run_all(steps, tmp_path)}
    assert (outcomes["good"].result, outcomes["good"].figures) == ("ok", [{"ns": 12.5}])
    assert outcomes["bad"].result == "failed"
    assert "it is broken" in outcomes["bad"].note
    assert outcomes["slow"].result == "timeout"
    assert outcomes["slow"].seconds < 20
    assert (tmp_path / "slow.log").read_text() == "begun\n"


def test_a_tool_that_is_not_let_at_the_gpu_has_measured_nothing(tmp_path, with_gpu):
    refused = step("memcheck", "print('========= Error: Device not supported. Please refer to'); raise SystemExit(1)")
    outcome = run_all((refused,), tmp_path)[0]
    assert outcome.result == "not measured"
    assert "Device not supported" in outcome.note


def test_a_call_ends_in_time(tmp_path, with_gpu):
    outcomes = run_all((step("first", "pass"), step("second", "pass")), tmp_path, seconds=0)
    assert [o.result for o in outcomes] == ["not measured"] * 2
    assert "STEP=second make gpu" in outcomes[1].note


def test_only_the_steps_asked_for(tmp_path, with_gpu, monkeypatch):
    steps = (step("one", "pass"), step("two", "pass"))
    monkeypatch.setenv("STEP", "two")
    assert main(["--out", str(tmp_path)], steps) == 0
    assert [o["step"] for o in json.loads((tmp_path / "gpu.json").read_text())["outcomes"]] == ["two"]
    with pytest.raises(SystemExit):
        main(["--step", "three", "--out", str(tmp_path)], steps)


def test_bounds():
    assert gpu.SECONDS < 9 * 60
    assert all(s.seconds < gpu.SECONDS for s in gpu.STEPS)


def test_a_measured_case_is_one_line_and_losses_are_listed(tmp_path, with_gpu, capsys):
    figure = {
        "case": "conv", "ours": "triton", "ratio": 1.31, "low": 1.2, "high": 1.4, "best": "compile", "auto_ratio": 0.9,
        "wall_ratio": 1.1, "teraflops": 412.0, "gigabytes_per_second": 900.0, "of_ceiling": 0.53, "us": {"triton": 3.0},
    }  # fmt: skip
    assert main(["--out", str(tmp_path)], (step("conv", f"print({json.dumps(figure)!r})"),)) == 0
    shown = capsys.readouterr().out
    assert "1.31 (1.20-1.40) of compile, by triton; auto 0.90; wall 1.10; 900 GB/s 412 TFLOP/s; 53% of the" in shown
    assert "slower than the best stock option in 1 cases" in shown


def test_a_step_without_its_file_or_program_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu.why_not(Step("a", 1, (), file="no/such/file")) == "there is no no/such/file"
    assert gpu.why_not(Step("b", 1, (), tool="no-such-program")) == "no-such-program is not installed"
    assert gpu.why_not(Step("c", 1, (), file="setup.py")) is None


def test_every_step_names_something_that_is_there():
    from benchmarks.gpu_measure import MEASURES

    for s in gpu.STEPS:
        if "benchmarks.gpu_measure" in s.command:
            assert s.command[-1] in MEASURES
        if "-m" in s.command:
            module = s.command[s.command.index("-m") + 1]
            assert importlib.util.find_spec(module) is not None, module
        for word in s.command:
            assert not word.startswith("tests/") or (gpu.ROOT / word).exists(), word
