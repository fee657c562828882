"""The benchmark suite itself: that it interleaves, checks before it times, and tells losses and wrong results."""

import csv
import gc
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from torch._inductor.exc import InductorError

import bigmodel_kernels as bmk
from benchmarks import __main__ as command
from benchmarks import cases, machine, plot, report, timer
from benchmarks.check import WrongBaseline, check
from benchmarks.contestant import FWD, PASSES, TRAIN, Contestant
from benchmarks.machine import Peaks

PEAKS = Peaks({"fp32": 1e11, "bf16": 2e11}, {1 << 20: 1e11, 256 << 20: 1e10})
MACHINE = {
    "device": "a CPU", "cpus": 4, "threads": 2, "isa": "avx2", "torch_isa": "AVX2",
    "torch": "2", "python": "3", "version": "0", "commit": "abc",
}  # fmt: skip
HEADER = {"date": "today", "command": "python -m benchmarks", "machine": MACHINE}
HEADER["peaks"] = {"flops": PEAKS.flops, "bandwidth": PEAKS.bandwidth}


class FakeClock:
    """Contestants that take an exact time, and a log of who ran when."""

    def __init__(self):
        self.now, self.log = 0, []

    def contestant(self, name, times):
        times = itertools.cycle(times if isinstance(times, list) else [times])

        def run():
            self.log.append(name)
            self.now += int(next(times))

        return run

    def __call__(self):
        return self.now


def test_rounds_are_interleaved_and_shuffled():
    clock = FakeClock()
    rivals = {"a": clock.contestant("a", 4e6), "b": clock.contestant("b", 3e6)}
    timing = timer.measure(("ours", clock.contestant("ours", 2e6)), rivals, rounds=40, clock=clock)
    played = clock.log[-120:]
    rounds = [tuple(played[i : i + 3]) for i in range(0, 120, 3)]
    assert all(sorted(r) == ["a", "b", "ours"] for r in rounds)
    assert len(set(rounds)) == 6  # every order occurs
    assert timing.best(["a", "b"]) == "b"
    assert timing.ratio("b", "ours") == timer.Ratio(1.5, 1.5, 1.5)


def test_short_calls_are_looped_and_slow_rivals_leave():
    clock = FakeClock()
    rivals = {"slow": clock.contestant("slow", 1e5), "fast": clock.contestant("fast", 1e4)}
    timing = timer.measure(("ours", clock.contestant("ours", 2e4)), rivals, rounds=30, clock=clock)
    assert timing.samples.keys() == {"ours", "fast"}
    assert timing.median("slow") == 1e5
    assert timing.median("fast") == 1e4
    assert clock.log[-3000:].count("ours") * 2e4 >= 10 * timer.MIN_SAMPLE_NS
    assert timing.ratio("fast", "ours").median == 0.5


def test_band_is_that_of_the_rounds():
    ratio = timer.Ratio.of([float(i) for i in range(1, 102)])
    assert ratio == timer.Ratio(51.0, 11.0, 91.0)


def test_collector_is_off_only_while_timing():
    seen = []
    timer.measure(("ours", lambda: seen.append(gc.isenabled())), {"stock": lambda: None}, rounds=1)
    assert not any(seen)
    assert gc.isenabled()


def test_ours_may_not_share_a_name_with_a_rival():
    with pytest.raises(ValueError, match="'eager'"):
        timer.measure(("eager", int), {"eager": int}, rounds=1)


def test_peaks_are_the_best_of_two_measurements():
    slow = Peaks({"fp32": 5e10, "bf16": 3e11}, {1 << 20: 2e11, 256 << 20: 1.0})
    assert (PEAKS | slow) == Peaks({"fp32": 1e11, "bf16": 3e11}, {1 << 20: 2e11, 256 << 20: 1e10})


def test_floor_is_the_larger_of_compute_and_memory():
    assert PEAKS.floor(1e9, 1e6, "fp32") == (pytest.approx(1e-2), "compute")
    assert PEAKS.floor(1e6, 1e9, "fp32") == (pytest.approx(1e-1), "memory")
    assert PEAKS.floor(0, 1 << 20, "fp32")[0] == pytest.approx((1 << 20) / 1e11)  # from the cache


def pair(scale=1.0, grad_scale=1.0):
    """A linear layer and a twin with a planted mistake in its output or in its weight's gradient."""
    torch.manual_seed(0)
    layer, twin = nn.Linear(16, 8), nn.Linear(16, 8)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(4, 16, requires_grad=True)
    if grad_scale != 1.0:
        twin.weight.register_hook(lambda g: g * grad_scale)
    planted = nn.Sequential(twin)
    planted.forward = lambda x: twin(x) * scale
    planted.named_parameters = twin.named_parameters
    return Contestant("ours", planted, (x,)), [Contestant("eager", layer, (x,))]


def case(name="layer", **mistake):
    def build(dtype, pass_):
        ours, stock = pair(**mistake)
        return cases.Problem(ours, stock, flops=1e3)

    return cases.Case("conv", name, build, quick=True)


def run(pass_, **mistake):
    return command.run(cases.Row(case(**mistake), pass_, "fp32"), rounds=3, compile=False)


@pytest.mark.parametrize("pass_", PASSES)
def test_right_result_is_timed(pass_):
    result = run(pass_)
    assert not result.wrong
    assert result.ratio > 0
    assert result.ratio_low <= result.ratio <= result.ratio_high
    assert result.best_stock == "eager"
    assert set(result.median) == {"ours", "eager"}
    names = {"output"} if pass_ == FWD else {"output", "grad input[0]", "grad weight", "grad bias"}
    assert {c["tensor"] for c in result.checks} == names


@pytest.mark.parametrize(("pass_", "mistake"), [(FWD, {"scale": 1 + 1e-5}), (TRAIN, {"grad_scale": 1 + 1e-4})])
def test_planted_mistake_gets_no_time(pass_, mistake):
    result = run(pass_, **mistake)
    assert [c["tensor"] for c in result.wrong] == ["output" if pass_ == FWD else "grad weight"]
    assert result.verdict == report.WRONG
    assert result.ratio is None
    assert result.median == {}
    row = report.cells(result)
    assert row["vs best"] == "WRONG"
    assert row["ours ms"] == ""


def test_kept_results_name_no_path_of_the_machine():
    typed = ["--op", "conv", "--json", "/tmp/r.json", "--out=/tmp/out", "--quick", "--compare", "old.json"]
    assert command.command_line(typed) == "python -m benchmarks --op conv --quick"


def test_command_fails_on_a_planted_mistake(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cases, "all_cases", lambda: [case("right"), case("planted", scale=1.001)])
    monkeypatch.setattr(command.machine, "measure_peaks", lambda dtypes: PEAKS)
    arguments = ["--quick", "--rounds", "2", "--pass", "fwd", "--out", str(tmp_path)]
    assert command.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "WRONG: conv | planted | fwd | fp32" in printed
    rows = {row["case"]: row for row in json.loads((tmp_path / "report.json").read_text())["rows"]}
    assert rows["right"]["ratio"] > 0
    assert rows["planted"]["verdict"] == "WRONG"
    assert rows["planted"]["ratio"] is None
    assert rows["planted"]["median"] == {}
    monkeypatch.setattr(cases, "all_cases", lambda: [case("right")])
    assert command.main(arguments) == 0


def test_command_fails_when_an_op_is_wrong(monkeypatch, tmp_path):
    right = bmk.attention
    monkeypatch.setattr(command.machine, "measure_peaks", lambda dtypes: PEAKS)
    monkeypatch.setattr(bmk, "attention", lambda *args, **kwargs: right(*args, **kwargs) + 1e-4)
    arguments = ["--op", "attention", "--quick", "--rounds", "2", "--pass", "fwd", "--dtype", "fp32"]
    assert command.main([*arguments, "--out", str(tmp_path)]) == 1


def test_stock_that_computes_something_else_is_refused():
    ours, stock = pair()
    with pytest.raises(WrongBaseline, match="other: output"):
        check(ours, [*stock, Contestant("other", lambda x: F.relu(stock[0].forward(x)), stock[0].inputs)], FWD, "fp32")


def test_training_counts_as_a_new_version_of_the_weights():
    contestant = pair()[1][0]
    contestant.prepare_training()
    before, version = contestant.forward.weight.clone(), contestant.forward.weight._version
    contestant.train()
    assert contestant.forward.weight._version > version
    assert torch.equal(contestant.forward.weight, before)


def test_converted_contestant_is_independent():
    stock = pair()[1][0]
    double = stock.converted("double", dtype=torch.float64)
    assert double.infer().dtype == torch.float64
    assert double.inputs[0].requires_grad
    assert stock.infer().dtype == torch.float32


def result(ratio, name="c", group="lstm", width=0.05, ok=True):
    checks = [{"tensor": "output", "rel_l2": 1e-7, "max_err": 1e-6, "baseline_max_err": 1e-6, "ok": ok, "message": "m"}]
    if not ok:
        return report.Result(group, name, FWD, "fp32", "cpu", checks)
    return report.Result(
        group, name, FWD, "fp32", "cpu", checks, ratio=ratio, ratio_low=ratio * (1 - width),
        ratio_high=ratio * (1 + width), best_stock="eager", median={"ours": 2e-3, "eager": 2e-3 * ratio},
        rounds=30, flops=1e8, traffic=1e6, floor=1e-3, floor_by="compute",
    )  # fmt: skip


RESULTS = [result(2.0, "a"), result(1.0, "b"), result(0.5, "c"), result(0, "d", ok=False)]


def test_summary_names_losses_and_wrong_rows():
    text = report.summary_text(RESULTS)
    assert "4 cases: faster on 1, equal (0.97-1.03) on 1, slower on 1, wrong on 1" in text
    assert "slower: lstm | c | fwd | fp32 (0.50x)" in text
    assert "WRONG: lstm | d | fwd | fp32" in text


def test_other_programs_are_noticed(monkeypatch):
    busy, own = iter([10.0, 10.9]), iter([3.0, 3.5])
    clock = iter([0.0, 1.0])
    monkeypatch.setattr(machine, "busy_seconds", lambda: next(busy))
    monkeypatch.setattr(machine.time, "process_time", lambda: next(own))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 4)
    with machine.Others() as others:
        pass
    assert others.share == pytest.approx(0.1)
    disturbed = result(2.0)
    disturbed.others = others.share
    assert "other programs" in report.summary_text([disturbed])
    assert "other programs" not in report.summary_text(RESULTS)


def test_files_hold_every_row(tmp_path):
    report.write(tmp_path, RESULTS, HEADER)
    assert report.read_json(tmp_path / "report.json") == RESULTS
    rows = list(csv.DictReader((tmp_path / "report.csv").open()))
    assert [row["verdict"] for row in rows] == ["faster", "equal", "slower", "WRONG"]
    text = (tmp_path / "report.md").read_text()
    assert "**0.50x**" in text
    assert "a CPU" in text
    (tmp_path / "other.json").write_text('{"schema": 0}')
    with pytest.raises(ValueError, match="schema 1, got 0"):
        report.read_json(tmp_path / "other.json")


def test_table_colours_losses(capsys):
    console = Console(width=150, force_terminal=True, color_system="standard")
    report.print_table(console, RESULTS)
    lines = {line.split("│")[2].strip(): line for line in capsys.readouterr().out.splitlines() if "│" in line}
    loss = next(line for name, line in lines.items() if "c" in name and "0.50x" in line)
    assert "\x1b[1;31m" in loss


@pytest.mark.parametrize(
    ("now", "fell"),
    [(result(1.0), True), (result(1.85), False), (result(1.7, width=0.2), False), (result(0, ok=False), True)],
)
def test_compare_tells_what_fell(now, fell):
    lines, apart = report.compare([now, result(1.0, "new")], [result(2.0), result(1.0, "gone")])
    assert [line[3] for line in lines] == [fell]
    assert apart == ["lstm | gone | fwd | fp32", "lstm | new | fwd | fp32"]
    assert report.print_comparison(Console(quiet=True), [now], [result(2.0)]) is fell


def test_picture_has_every_verdict(tmp_path):
    plot.draw(RESULTS, tmp_path / "report.png", title="title", subtitle=report.machine_text(MACHINE, HEADER["peaks"]))
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    headings, places = plot.layout([*RESULTS, result(1.0, group="conv")])
    assert [name for _, name in headings] == ["lstm", "conv"]
    everything = sorted([*(y for y, _ in headings), *places])
    assert min(b - a for a, b in itertools.pairwise(everything)) >= 1.0  # no two labels on one line


@pytest.mark.parametrize(
    "arguments",
    [
        ["--op", "attentoin"],
        ["--model", "vgg"],
        ["--pass", "bwd"],
        ["--dtype", "fp8"],
        ["--rounds", "0"],
        ["--threads", "-1"],
        ["--compare", "missing.json"],
    ],
)
def test_unknown_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        command.parse(arguments)
    assert arguments[1] in capsys.readouterr().err


def test_selection_of_rows():
    assert command.parse(["--op", "lstm"]).groups == ("lstm",)
    assert command.parse(["--op", "lstm,conv", "--model", "cnn"]).groups == ("lstm", "conv", "cnn")
    assert command.parse([]).groups == cases.OPS + cases.MODELS
    ids = [row.id for row in cases.rows()]
    assert len(set(ids)) == len(ids)
    packed = "packed T200 B16 H256 (200..40)"
    assert {row.case.name for row in cases.rows(name="packed")} == {packed, f"{packed}, torch's padding"}
    quick = cases.rows(quick=True)
    assert {row.case.group for row in quick} >= set(cases.OPS)
    assert all(row.pass_ == FWD and row.dtype == "bf16" for row in cases.rows(passes=(FWD,), dtypes=("bf16",)))


@pytest.mark.parametrize("row", cases.rows(quick=True), ids=lambda row: row.id)
def test_quick_cases_are_right_on_stock_and_ours(row):
    problem = row.build(compile=False)
    assert all(
        c.ok for c in check(problem.ours, problem.stock, row.pass_, row.dtype, steps=problem.steps, whole=problem.whole)
    )
    assert problem.backend(row.pass_) in {"cpu", "torch", "cpu+torch", "torch+cpu"}
    assert row.flops(problem) > 0
    assert row.traffic(problem) > 0


def test_what_torch_cannot_compile_is_left_out_and_said(monkeypatch, capsys):
    def fail(contestant, pass_):
        raise InductorError(RuntimeError("no such instruction"), None)

    monkeypatch.setattr(cases, "compiled", fail)
    row = next(r for r in cases.rows(("linear",), name="64 x 3136") if r.pass_ == "fwd")
    assert [c.name for c in row.build(compile=True).stock] == ["eager"]
    assert "torch.compile fails on 'eager'" in capsys.readouterr().err
