"""python -m bigmodel_kernels tune: which candidate wins, what is kept, when it is believed. No GPU: times are invented."""

import dataclasses
import json
import multiprocessing
import stat
import types
import unittest.mock
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bigmodel_kernels import __main__, _triton, _tuned, tune
from bigmodel_kernels.ops.attention import triton_configs
from tests.triton_interpreter import interpreted

KEY = {"format": 1, "gpu": "Some GPU (80 GB)", "capability": "9.0", "driver": "580.1"}
ROW = _tuned.Row("toy", "forward", "32-bit", 64)
CHECKED_IN = {"BLOCK_M": 64, "num_warps": 4}
CHANGES = [{"BLOCK_M": 128}, {"BLOCK_M": 32}, {"num_warps": 8}, {"BLOCK_M": 16}]


def toy_kernel():
    """Stands for one."""


def call():
    constants = _tuned.choose(ROW, None, CHECKED_IN)
    if constants["BLOCK_M"] == 16:
        raise RuntimeError("it does not compile")
    _triton.launch(toy_kernel, 1, constants["BLOCK_M"], constants["num_warps"])
    return [torch.full((4,), 2.0 if constants["BLOCK_M"] == 32 else 1.0)]


PROBLEM = tune.Problem(
    "toy", "forward", "toy_kernel", call, lambda: [torch.ones(4, dtype=torch.float64)], torch.float32, CHANGES
)


class Stopwatch:
    """Runs each function once and gives invented times, by what it launched."""

    def __init__(self, monkeypatch, times):
        self.times, self.launched, self.rounds = times, [], []
        monkeypatch.setattr(_triton, "launch", lambda kernel, programs, *args: self.launched.append(args))

    def __call__(self, functions, rounds):
        self.rounds.append((rounds, len(functions)))
        found = {}
        for name, function in functions.items():
            self.launched.clear()
            function()
            found[name] = [self.times[self.launched[0]]] * rounds
        return found


def test_the_fastest_candidate_that_is_right_wins(monkeypatch):
    """32 would be the fastest, but is wrong; 16 does not run."""
    watch = Stopwatch(monkeypatch, {(64, 4): 10.0, (128, 4): 9.0, (32, 4): 1.0, (64, 8): 8.0})
    outcome = tune.tune(PROBLEM, watch)
    assert outcome.row == "toy forward 32-bit 64"
    assert outcome.before == CHECKED_IN
    assert outcome.constants == {"BLOCK_M": 64, "num_warps": 8}
    assert (outcome.microseconds_before, outcome.microseconds, outcome.gain) == (10.0, 8.0, 1.25)
    assert outcome.tried == 5
    assert {name.split()[0] for name in outcome.refused} == {"BLOCK_M=32", "BLOCK_M=16"}
    assert "relative L2 error" in outcome.refused["BLOCK_M=32 num_warps=4"]
    assert watch.rounds == [(tune.TRIAL_ROUNDS, 3), (tune.ROUNDS, 3)]
    assert _tuned.choose(ROW, None, CHECKED_IN) == CHECKED_IN  # nothing that was tried is left behind


def test_a_gain_within_the_scatter_changes_nothing(monkeypatch):
    watch = Stopwatch(monkeypatch, {(64, 4): 10.0, (128, 4): 9.9, (64, 8): 30.0})
    outcome = tune.tune(PROBLEM, watch)
    assert outcome.constants == CHECKED_IN
    assert watch.rounds[1] == (tune.ROUNDS, 2)  # the slow one has left


def test_checked_in_constants_that_are_wrong_are_an_error(monkeypatch):
    watch = Stopwatch(monkeypatch, {})
    wrong = dataclasses.replace(PROBLEM, exact=lambda: [torch.zeros(4, dtype=torch.float64)])
    with pytest.raises(RuntimeError, match=r"checked-in constants .* do not pass"):
        tune.tune(wrong, watch)


def check_problems(op, sizes):
    """The op's own problems, made small: each comes to its row, and a candidate launches and is right."""
    module = __import__(f"bigmodel_kernels.ops.{op}.triton_tuning", fromlist=["problems"])
    rows = set()
    with unittest.mock.patch.multiple(module, **sizes):
        for problem in module.problems(torch.float32, "cpu", True):
            outcome = tune.tune(
                dataclasses.replace(problem, changes=problem.changes[-1:]),
                lambda functions, rounds: {name: [1.0] * rounds for name in functions},
            )
            if outcome is not None:
                assert not outcome.refused, outcome
                assert outcome.row not in rows
                rows.add(outcome.row)
    return rows


@pytest.mark.parametrize(
    ("op", "sizes", "rows"),
    [
        ("attention", {"BATCH": 1, "HEADS": 1, "LENGTH": 20}, 2 * 3),
        ("attention_decode", {"SEQUENCES": 1, "KEYS": 20}, 2 * 3),
        ("attention_varlen", {"HEADS": 1, "LENGTHS": (20, 0, 3)}, 2 * 3),
        ("bias_act", {"ROWS": 3, "COLUMNS": (128, 300)}, 2),
        ("conv", {"IMAGES": 1, "CHANNELS": 16, "SIZE": 5}, 3 + 3 + 3 + 1 + 1 + 1),
        ("conv_step", {"SEQUENCES": 1}, 3 + 3),
        ("cross_entropy", {"ROWS": 3}, 2),
        ("gated_conv", {"BATCH": 1, "LENGTH": 9}, 2 + 1),
        ("lstm", {"STEPS": 2, "BATCH": 2}, 3 * 2),
        ("norm", {"ROWS": 3}, 2 * 2),
        ("norm_lstm", {"STEPS": 2, "BATCH": 2, "SIZES": (16, 64, 100)}, 2 * 2),
    ],
)
def test_problems_come_to_their_rows(op, sizes, rows):
    assert len(interpreted(check_problems, op, sizes)) == rows


def test_every_op_with_a_table_can_be_tuned():
    assert set(tune.tunable_ops()) == {
        "attention", "attention_decode", "attention_varlen", "bias_act", "conv", "conv_step", "cross_entropy", "gated_conv",
        "lstm", "norm", "norm_lstm",
    }  # fmt: skip


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own, and a GPU with KEY."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_tuned, "key", lambda device: KEY)
    _tuned.forget()
    yield tmp_path / "bigmodel_kernels"
    _tuned.forget()


def entry(**constants):
    return {"constants": constants, "microseconds": 1.0}


def test_what_is_kept_is_used_on_that_gpu_alone(cache):
    assert _tuned.choose(ROW, 0, CHECKED_IN) == CHECKED_IN
    assert not cache.exists()
    path = _tuned.save(KEY, {str(ROW): entry(BLOCK_M=128, num_warps=8)})
    assert _tuned.choose(ROW, 0, CHECKED_IN) == CHECKED_IN  # a process reads the file once
    _tuned.forget()
    assert _tuned.choose(ROW, 0, CHECKED_IN) == {"BLOCK_M": 128, "num_warps": 8}
    assert _tuned.choose(ROW, None, CHECKED_IN) == CHECKED_IN
    assert _tuned.choose(ROW, 0, {"BLOCK_M": 64}) == {"BLOCK_M": 64}  # other names than the kernel has now
    assert path.parent == cache
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_launchers_ask_for_it(cache):
    constants = {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1, "DESCRIPTORS": 0}
    _tuned.save(KEY, {"attention forward 16-bit 128": entry(**constants)})
    assert triton_configs.config("sm_90", 0, "forward", 2, 80, False) == constants
    assert triton_configs.config("sm_90", 0, "forward", 2, 64, False) != constants
    assert triton_configs.config("sm_90", None, "forward", 2, 80, False) != constants


def ignored(path):
    """The warning about a file that is ignored; there is one, once."""
    _tuned.forget()
    with pytest.warns(RuntimeWarning) as caught:
        assert _tuned.rows_of(0) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _tuned.rows_of(0) == {}
    (warning,) = caught
    assert str(path) in str(warning.message)
    return str(warning.message)


@pytest.mark.parametrize("name", ["driver", "capability", "gpu"])
def test_a_file_of_another_machine_is_ignored(cache, monkeypatch, name):
    path = _tuned.save(KEY, {str(ROW): entry(**CHECKED_IN)})
    content = json.loads(path.read_text())
    content["key"][name] = "another"
    path.write_text(json.dumps(content))
    assert f"{name} 'another', now" in ignored(path)
    _tuned.save(KEY, {"new": entry(**CHECKED_IN)})  # replaces it
    _tuned.forget()
    assert _tuned.rows_of(0) == {"new": CHECKED_IN}


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", '{"key": {}}', '{"key": 1, "rows": {}}', '{"key": {}, "rows": {"a": 1}}', "\xff", "[" * 100000,
        json.dumps({"key": KEY, "rows": {"a": {"constants": {"BLOCK_M": -1}}}}),
        json.dumps({"key": KEY, "rows": {"a": {"constants": {"BLOCK_M": "64"}}}}),
        json.dumps({"key": KEY, "rows": {"a": {"constants": {"BLOCK_M": 1 << 40}}}}),
    ],
)  # fmt: skip
def test_a_corrupt_file_is_ignored(cache, text):
    path = _tuned.save(KEY, {})
    path.write_bytes(text.encode("latin-1"))
    assert "corrupt" in ignored(path) or text == "\xff"


def test_a_file_that_others_can_write_is_ignored(cache, monkeypatch):
    path = _tuned.save(KEY, {str(ROW): entry(**CHECKED_IN)})
    path.chmod(0o622)
    assert "others may write to it" in ignored(path)
    path.chmod(0o600)
    cache.chmod(0o770)
    assert "others may write to its directory" in ignored(path)
    cache.chmod(0o700)
    monkeypatch.setattr(_tuned.os, "getuid", lambda: path.stat().st_uid + 1)
    assert "belongs to user" in ignored(path)


def test_a_link_and_a_pipe_are_ignored(cache):
    path = _tuned.save(KEY, {})
    path.rename(path.with_suffix(".elsewhere"))
    path.symlink_to(path.with_suffix(".elsewhere"))
    ignored(path)
    path.unlink()
    _tuned.os.mkfifo(path, 0o600)
    assert "no regular file" in ignored(path)


def save_rows(start):
    for i in range(start, start + 20):
        _tuned.save(KEY, {f"row {i}": entry(BLOCK_M=i)})


def test_two_processes_that_save_at_once_lose_nothing(cache):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=save_rows, args=(start,)) for start in (0, 20)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert _tuned.rows_of(0) == {f"row {i}": {"BLOCK_M": i} for i in range(40)}
    assert {path.name for path in cache.iterdir()} == {"lock", _tuned.path_of(KEY).name}  # no temporary file is left


def test_the_key_says_what_was_measured(tmp_path, monkeypatch):
    properties = types.SimpleNamespace(name="H100", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(_tuned, "DRIVER_VERSION", tmp_path / "version")
    _tuned.DRIVER_VERSION.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27\n")
    found = _tuned.key(0)
    assert (found["gpu"], found["capability"], found["driver"]) == ("H100", "9.0", "580.65.06")
    assert found["kernels"] == _tuned.source_hash()


def test_a_changed_kernel_changes_the_hash(tmp_path, monkeypatch):
    for name in ("_triton.py", "ops/toy/triton_kernels.py", "ops/toy/triton_tuning.py", "ops/toy/cpu.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a = 1\n")
    monkeypatch.setattr(_tuned, "__file__", str(tmp_path / "_tuned.py"))
    before = _tuned.source_hash()
    for name, matters in (
        ("ops/toy/cpu.py", False),
        ("ops/toy/triton_tuning.py", False),
        ("ops/toy/triton_kernels.py", True),
        ("_triton.py", True),
    ):
        Path(tmp_path, name).write_text("a = 2\n")
        after = _tuned.source_hash()
        assert (after != before) == matters, name
        before = after


def test_report_shows_old_and_new(capsys):
    from rich.console import Console

    new = {"BLOCK_M": 128, "num_warps": 4}
    tune.report([tune.Outcome(str(ROW), CHECKED_IN, new, 10.0, 8.0, 5, {"x": "wrong"})], Console(width=150))
    shown = capsys.readouterr().out
    for word in (str(ROW), "BLOCK_M=64 num_warps=4", "BLOCK_M=128", "10.0", "8.0", "1.25"):
        assert word in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert __main__.main(["tune", "--quick"]) == 2
    assert "tune needs a GPU" in capsys.readouterr().err
