"""From what a GPU run leaves to a kept result, a table and a picture; and what is profiled of it."""

import contextlib
import io
import json
import os
import subprocess
import sys

import pytest

from benchmarks import gpu_measure, gpu_profile, gpu_report, readme

MACHINE = {"gpu": "NVIDIA H200, 580.1, 1980 MHz, 143771 MiB", "torch": "2.11.0", "commit": "abc123"}


def case(name, ratio, auto_ratio, **us):
    return {
        "case": name, "ours": min(us, key=us.get), "ratio": ratio, "low": 0.9 * ratio, "high": 1.1 * ratio, "best": "compile",
        "auto_ratio": auto_ratio, "wall_ratio": ratio, "teraflops": 12.0, "gigabytes_per_second": 800.0, "of_ceiling": 0.4,
        "us": {"compile": 10.0, **us},
    }  # fmt: skip


def outcome(step, *figures, result="ok", note=""):
    return {"step": step, "result": result, "seconds": 3.0, "note": note, "figures": list(figures)}


def known(*outcomes, date="2026-11-22T10:00:00+00:00"):
    return {"schema": 1, "date": date, "command": "python -m benchmarks.gpu --step conv", "outcomes": list(outcomes)}


SLOW = case("conv bfloat16 1x1 [32, 256] fwd", 0.5, 1.0, auto=10.0, triton=20.0)
FAST = case("lstm float16 T256 B16 fwd+bwd", 2.0, 0.9, auto=11.1, cuda=5.0)
WORSE = case("decode bfloat16, cache int8, B1 KV1024 32/8 heads", 0.25, 1.0, cuda=40.0, auto=41.0)


@pytest.fixture
def files(tmp_path):
    parts = [
        known(
            outcome("machine", MACHINE), outcome("conv", SLOW), outcome("lstm", result="not measured", note="no time")
        ),
        known(
            outcome("machine", MACHINE),
            outcome("lstm", FAST),
            outcome("decode", WORSE),
            date="2026-11-22T11:00:00+00:00",
        ),
        known(outcome("random-conv", {"family": "conv", "seed": 7, "asked": 5000, "triton": 4999, "failures": 0})),
    ]
    paths = [tmp_path / f"{i}.json" for i in range(len(parts))]
    for path, part in zip(paths, parts):
        path.write_text(json.dumps(part))
    return paths


def test_files_make_one_result_a_table_and_a_picture(files, tmp_path, monkeypatch, capsys):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- gpu table: begin -->\nnothing\n<!-- gpu table: end -->\nafter\n")
    monkeypatch.setattr(readme, "README", page)
    monkeypatch.setattr(gpu_report, "RESULTS", tmp_path / "results")
    assert gpu_report.main([*map(str, files), "--readme"]) == 0
    stem = tmp_path / "results" / "nvidia-h200" / "2026-11-22-abc123"
    assert stem.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    kept = json.loads(stem.with_suffix(".json").read_text())
    assert [o["step"] for o in kept["outcomes"]] == ["machine", "conv", "lstm", "decode", "random-conv"]
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "nothing" not in text
    assert "| lstm T256 B16 | fwd+bwd | fp16 | 2.00x | 1.80-2.20 | compile | cuda | 0.90x |" in text
    assert "`auto` is below 0.97 of the best stock option on 1" in text
    assert "slower: lstm float16 T256 B16 fwd+bwd (0.90x, compile)" in text
    assert "seed 7, asked 5000, triton 4999, failures 0" in text
    assert "3 cases: faster on 1, slower on 2" in capsys.readouterr().out


def test_files_that_do_not_belong_together():
    with pytest.raises(ValueError, match="schema 1; got None"):
        gpu_report.merged([{"outcomes": []}])
    with pytest.raises(ValueError, match="the step `machine`"):
        gpu_report.merged([known(outcome("conv", SLOW))])
    other = known(outcome("machine", MACHINE | {"commit": "def456"}))
    with pytest.raises(ValueError, match="different commits: abc123, def456"):
        gpu_report.merged([known(outcome("machine", MACHINE)), other])


def test_the_worst_of_our_own_kernels_are_profiled():
    found = gpu_profile.worst([outcome("conv", SLOW), outcome("lstm", FAST), outcome("decode", WORSE)], 2)
    assert [(f["step"], f["ours"], f["ratio"]) for f in found] == [("decode", "cuda", 0.25), ("conv", "triton", 0.5)]
    assert gpu_profile.worst([outcome("conv", {"case": "x", "not_measured": "ours"})], 2) == []


def test_figures_of_ncu():
    text = (
        "==PROF== Connected\n"
        '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","conv_kernel","GPU Speed Of Light","Duration","nsecond","12,345"\n'
        '"0","conv_kernel","GPU Speed Of Light","DRAM Throughput","%","61.5"\n'
        '"0","conv_kernel","Other","Something else","","7"\n'
        '"1","reduce","Occupancy","Achieved Occupancy","%","50"\n'
    )
    assert gpu_profile.counted(text) == [
        {"kernel": "conv_kernel", "duration": "12,345 nsecond", "memory": "61.5 %"},
        {"kernel": "reduce", "warps": "50 %"},
    ]
    assert gpu_profile.counted("==ERROR== no permission\n") == []


def test_from_a_dry_measurement_to_its_profile(tmp_path, monkeypatch, capsys):
    """The whole way on the CPU: measured by a step, profiled by the name of its case, reported."""

    def run(command):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            code = gpu_measure.main(command[3:])
        return subprocess.CompletedProcess(command, code, out.getvalue(), "")

    def step(name):
        return outcome(name, *map(json.loads, run([*measure, name]).stdout.splitlines()))

    measure = [sys.executable, "-m", "benchmarks.gpu_measure", "--dry"]
    (tmp_path / "gpu.json").write_text(json.dumps(known(step("machine"), decode := step("decode"))))
    figure = next(f for f in decode["figures"] if "us" in f)
    found = {"step": "decode", "case": figure["case"], "ours": "auto", "best": "SDPA", "ratio": 1.0}
    monkeypatch.setattr(gpu_profile, "worst", lambda outcomes, count: [found])
    monkeypatch.setattr(gpu_profile, "run", run)
    monkeypatch.setattr(gpu_profile.shutil, "which", lambda name: None)
    assert gpu_profile.main(["--results", str(tmp_path / "gpu.json"), "--dry"]) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [s.get("contestant") for s in shown] == [None, "auto", "SDPA", None]
    assert shown[1]["profiled"] == figure["case"]
    assert shown[1]["kernels"]
    assert shown[3]["not_measured"] == "ncu is not installed"
    assert gpu_report.main([str(tmp_path / "gpu.json"), "--out", str(tmp_path / "kept")]) == 0
    assert len(os.listdir(tmp_path / "kept")) == 3


def test_nothing_to_profile(tmp_path, capsys):
    assert gpu_profile.main(["--results", str(tmp_path / "none.json")]) == 0
    assert "no case of our own kernels" in capsys.readouterr().out
