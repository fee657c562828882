"""What a wheel and a source archive hold, and that the wheel works away from the clone."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def setup(*arguments, **environment):
    command = [sys.executable, "setup.py", "-q", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def test_wheel_works_from_another_folder(tmp_path):
    done = setup("bdist_wheel", "--dist-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "bigmodel_kernels/_native.so" in names
    assert any(re.fullmatch(r"bigmodel_kernels/_C\..*\.so", name) for name in names)
    assert "bigmodel_models/__main__.py" in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "csrc/", "python/"))]
    assert wheel.stat().st_size < 20e6
    code = "import bigmodel_kernels as bmk, bigmodel_models; print(bmk.__file__, bmk.build_info()['native'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [str(tmp_path / "site" / "bigmodel_kernels" / "__init__.py"), "ok"], done.stderr


def test_source_archive_can_be_built_from(tmp_path):
    done = setup("sdist", "--dist-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    wanted = {
        str(p.relative_to(ROOT))
        for pattern in ("csrc/**/*.h", "csrc/**/*.cpp", "csrc/**/*.cu*", "bigmodel_kernels/**/*.py")
        for p in ROOT.glob(pattern)
    }
    assert wanted | {"setup.py", "LICENSE", "Makefile", "requirements.txt"} <= names


def test_force_cuda_says_what_is_missing():
    """Where the CUDA kernels cannot be built, FORCE_CUDA=1 stops with the reason; it never builds without them quietly."""
    done = setup("--version", FORCE_CUDA="1", CPU_ONLY="1")
    assert done.returncode != 0
    assert "FORCE_CUDA=1, but CUDA kernels cannot be built: " in done.stderr


def test_force_cuda_names_the_missing_toolkit(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()  # a compiler without its headers is no toolkit
    done = setup("--version", FORCE_CUDA="1", CUDA_HOME=str(tmp_path))
    assert done.returncode != 0
    assert "nvcc and cuda_runtime.h were not found under CUDA_HOME" in done.stderr
    assert "install the CUDA toolkit" in done.stderr


def test_a_missing_compiler_is_named():
    done = setup("--version", CXX="no-such-compiler")
    assert done.returncode != 0
    assert "no-such-compiler could not be run" in done.stderr
    assert "apt-get install g++" in done.stderr


@pytest.mark.parametrize("word", ["pickle.load", "eval(", "exec(", "shell=True", "weights_only=False"])
def test_no_code_from_data(word):
    """Nothing in the packages can run code that comes from a file or an argument."""
    call = re.compile(r"(?<![\w.])" + re.escape(word))
    for folder in ("bigmodel_kernels", "python", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not call.search(path.read_text()), path
