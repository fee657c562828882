"""python -m bigmodel_kernels info | check, with the binary and without."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import bigmodel_kernels
from bigmodel_kernels import _extension
from bigmodel_kernels.__main__ import main
from bigmodel_kernels.ops import names


def run(*arguments, path=None, **environment):
    environment = os.environ | environment | ({"PYTHONPATH": str(path)} if path else {})
    return subprocess.run(
        [sys.executable, "-m", "bigmodel_kernels", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        cwd=path,
    )


def test_info_names_every_op_and_backend():
    done = run("info")
    assert done.returncode == 0, done.stderr
    for word in (*names(), "cpu", "cuda", "triton", "torch", "next"):
        assert word in done.stdout


def test_info_as_json():
    info = json.loads(run("info", "--json").stdout)
    assert info["status"] == "ok"
    assert info["build"]["isa"] in ("amx", "amx_emulated", "avx512_bf16", "avx512", "avx2", "generic")
    for op in names():
        assert info["ops"][op]["torch"] == "ok"
        assert info["ops"][op]["cuda"] != ""


def test_a_failed_self_check_of_amx_is_named_and_logged_once(monkeypatch, capsys, caplog):
    why = "the self-check of the processor's AMX failed: its products are wrong"
    bindings = SimpleNamespace(build_info=dict, isa=lambda: "avx512_bf16", why_no_amx=lambda: why)
    monkeypatch.setattr(_extension, "bindings", bindings)
    _extension._why_no_amx.cache_clear()
    try:
        for _ in range(2):
            assert main(["info"]) == 0
        assert f"build amx: {why}" in capsys.readouterr().out
        assert [record.levelname for record in caplog.records if why in record.message] == ["WARNING"]
    finally:
        _extension._why_no_amx.cache_clear()


@pytest.fixture
def without_binaries(tmp_path):
    source = Path(bigmodel_kernels.__file__).parent
    shutil.copytree(source, tmp_path / "bigmodel_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def test_without_binaries_everything_runs_on_torch_and_says_why(without_binaries):
    done = run("info", path=without_binaries)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "_native.so is not built; build it with: pip install --no-build-isolation ." in done.stdout
    code = (
        "import torch, bigmodel_kernels as bmk\n"
        "q = torch.randn(1, 2, 16, 8)\n"
        "print(bmk.explain(bmk.attention, q, q, q).backend)"
    )
    environment = os.environ | {"PYTHONPATH": str(without_binaries)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=without_binaries, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "torch", done.stderr


def test_a_binary_that_does_not_load_is_named(without_binaries):
    (without_binaries / "bigmodel_kernels" / "_native.so").write_bytes(b"not a library")
    done = run("info", path=without_binaries)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "_native.so does not load" in done.stdout


def test_check_verifies_every_op():
    done = run("check")
    assert done.returncode == 0, done.stdout + done.stderr
    for op in names():
        assert op in done.stdout


def test_check_fails_on_a_wrong_kernel():
    code = (
        "import sys, torch\n"
        "from bigmodel_kernels import __main__, _registry\n"
        "from bigmodel_kernels.ops.conv import cpu\n"
        "right = cpu.fwd\n"
        "def wrong(*args):\n"
        "    out, *rest = right(*args)\n"
        "    return (out * (1 + 1e-4), *rest)\n"
        "cpu.fwd = wrong\n"
        "sys.exit(__main__.main(['check']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "relative L2 error" in done.stdout
