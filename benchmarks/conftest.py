"""The same cases under pytest-benchmark: `pytest benchmarks/ --benchmark-enable [-k "lstm and packed"]`.

Here each contestant is timed on its own, without interleaving: for a look at one case, for a profiler, for
pytest-benchmark's own tools. The ratios that count, and torch.compile, are in `python -m benchmarks`.
"""

from pathlib import Path

import pytest
import torch

from benchmarks import cases
from benchmarks.check import check

THREADS = 2


def pytest_collect_file(file_path: Path, parent: pytest.Collector):
    if file_path.suffix == ".py" and file_path.name.startswith("bench_"):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc):
    """Every row of the file's groups, with every contestant of the row."""
    parameters = [
        pytest.param(row, contestant.name, id=f"{row.id} | {contestant.name}")
        for row in cases.rows(metafunc.module.GROUPS)
        for contestant in row.build(compile=False).contestants()
    ]
    metafunc.parametrize(("row", "name"), parameters)


@pytest.fixture
def contestant(row: cases.Row, name: str):
    """The contestant, after its row's results have been checked against float64."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    problem = row.build(compile=False)
    wrong = [
        c.message
        for c in check(problem.ours, problem.stock, row.pass_, row.dtype, steps=problem.steps, whole=problem.whole)
        if not c.ok
    ]
    assert not wrong, wrong
    yield next(c for c in problem.contestants() if c.name == name)
    torch.set_num_threads(before)


@pytest.fixture
def step(row, name, contestant, benchmark):
    """What is timed: one call of the contestant. The report groups the contestants of a row."""
    benchmark.group = row.id
    benchmark.extra_info.update(contestant=name, **{"pass": row.pass_, "dtype": row.dtype})
    return contestant.step(row.pass_)
