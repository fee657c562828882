"""Tests run once more in a process of their own, on another instruction set."""

import os
import subprocess
import sys
from pathlib import Path


def rerun(file: str, selected: str, isa: str) -> None:
    """Fails where a test of `file` that the expression `selected` (pytest's -k) names fails with BIGMODEL_ISA=`isa`."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"BIGMODEL_ISA": isa}
    # Without the plugins, which no rerun needs and which take a second to import, and hence without the options that are theirs.
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    options = ["-q", "-o", "addopts=", "--import-mode=importlib", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, file, "-k", selected]
    run = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout[-4000:]
