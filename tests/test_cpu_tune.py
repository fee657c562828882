"""python -m bigmodel_kernels tune --cpu: what it keeps, and what `auto` makes of it."""

import json
import os
import stat
import subprocess
import sys

import pytest
import torch

import bigmodel_kernels as bmk
from bigmodel_kernels import _cpu, _tuned
from bigmodel_kernels.ops.lstm import cpu as lstm_cpu
from bigmodel_kernels.testing import make


def tune(cache, isa):
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), "BIGMODEL_ISA": isa}
    command = [sys.executable, "-m", "bigmodel_kernels", "tune", "--cpu", "--quick"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_measures_and_keeps(tmp_path):
    if bmk.build_info().get("isa") not in ("avx512_bf16", *_cpu.TILED):
        pytest.skip("tiles, in software too, need dot products of bfloat16")
    done = tune(tmp_path, "amx_emulated")
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "bigmodel_kernels").glob("cpu-*.json")
    kept = json.loads(file.read_text())
    assert kept["key"]["isa"] == "amx_emulated"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    for family in ("attention", "lstm"):
        assert f"{family}: " in done.stdout
        row = kept["rows"][family]
        assert row["constants"]["ours"] == int("auto takes cpu" in done.stdout.split(f"{family}: ")[1].splitlines()[0])
        assert all(ratio > 0 for ratio in row["times_as_fast"])


def test_says_why_it_cannot(tmp_path):
    done = tune(tmp_path, "avx2")
    assert done.returncode == 2
    assert "needs a CPU with AMX" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ours", [None, 0, 1])
def test_auto_believes_what_was_kept(ours, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_cpu, "build_info", lambda: bmk.build_info() | {"isa": "amx"})
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    if ours is not None:
        rows = {family: {"constants": {"ours": ours}} for family in ("attention", "lstm")}
        _tuned.save(_cpu.tiles_key(), rows)
    _cpu.tiles_preferred.cache_clear(), lstm_cpu.dots.cache_clear()
    try:
        q = make(1, 2, 64, 16, dtype=torch.bfloat16)
        assert bmk.explain(bmk.attention, q, q, q).backend == ("cpu" if ours else "torch")
        assert lstm_cpu.dots() == bool(ours)
    finally:
        _cpu.tiles_preferred.cache_clear(), lstm_cpu.dots.cache_clear()


def test_what_was_kept_for_another_build_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    key = _cpu.tiles_key()
    _tuned.save(key, {"attention": {"constants": {"ours": 1}}})
    assert _tuned.load(key)
    path = _tuned.path_of(key)
    path.write_text(path.read_text().replace(torch.__version__, "another"))
    with pytest.warns(RuntimeWarning, match="torch 'another', now .*tune --cpu"):
        assert not _tuned.load(key)
