"""Tests run once more in a process of their own, on another instruction set."""

import os
import subprocess
import sys
from pathlib import Path


def rerun(file: str, selected: str, isa: str) -> None:
    """Fails where a test of `file` that the expression `selected` (pytest's -k) names fails with BIGMODEL_ISA=`isa`."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"BIGMODEL_ISA": isa}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", selected]
    run = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout[-4000:]
