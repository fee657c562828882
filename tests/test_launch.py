"""python -m benchmarks.launch: what it counts as a call. (How long one takes is a measurement, not a test.)"""

import json

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import launch


def test_every_case_launches_one_kernel_and_runs_nothing():
    with launch.stubbed() as launched:
        for name, call in launch.cases().items():
            launched.clear()
            call()
            assert len(launched) == 1, name


def test_a_longer_sequence_launches_one_kernel_for_each_step_more():
    more, calls = launch.steps()
    with launch.stubbed() as launched, torch.no_grad():
        for op, of_op in calls.items():
            counts = []
            for call in of_op:
                launched.clear()
                call()
                counts.append(len(launched))
            assert counts[1] - counts[0] == more, op


def test_report(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launch, "CALLS", 2)
    assert launch.main(["--rounds", "2", "--json", str(tmp_path / "launch.json")]) == 0
    found = json.loads((tmp_path / "launch.json").read_text())
    differences = {"lstm, a step", "norm_lstm, a step"}
    assert found.keys() == {*launch.cases(), *differences}
    assert all(microseconds > 0 for name, microseconds in found.items() if name not in differences)
    assert "us per call" in capsys.readouterr().out
