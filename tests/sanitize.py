"""The CPU kernels under AddressSanitizer and UBSan, in a build of their own beside the real one.

`python tests/sanitize.py` (make sanitize) builds every instruction set and runs all tests of the CPU kernels on the best one of
this machine, those of odd sizes on the others; tests/test_sanitizers.py has one set and a selection.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "sanitize"
COMPILER = os.environ.get("CXX", "g++")
ALL = [
    "tests/test_simd.py",
    *(str(path.relative_to(ROOT)) for folder in ("ops", "nn") for path in sorted((ROOT / "tests" / folder).glob("test_*.py"))
      if "triton" not in path.name),
]  # fmt: skip
ODD_SIZES = ["tests/test_simd.py", "tests/ops/test_attention.py", "tests/ops/test_conv.py", "tests/ops/test_lstm.py"]


def runtime() -> str | None:
    """What must be loaded before Python: AddressSanitizer, and the library whose exceptions it watches; None without it."""
    if shutil.which(COMPILER) is None:
        return None
    names = ("libasan.so", "libstdc++.so")
    ask = [[COMPILER, f"-print-file-name={name}"] for name in names]
    found = [subprocess.run(command, capture_output=True, text=True).stdout.strip() for command in ask]
    return " ".join(found) if all(Path(path).is_absolute() for path in found) else None


def build(one_isa: str = "") -> subprocess.CompletedProcess:
    """Builds the package into FOLDER/lib, with one instruction set ("generic", "avx512") or all of them."""
    settings = {"SANITIZE": "address,undefined", "ONE_ISA": one_isa, "CPU_ONLY": "1"}
    command = ["setup.py", "-q", "build", "--build-base", str(FOLDER), "--build-lib", str(FOLDER / "lib")]
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=os.environ | settings, capture_output=True, text=True
    )


def environment(isa: str = "") -> dict[str, str]:
    """In which Python loads the sanitized build; `isa` is BIGMODEL_ISA."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return kept | {
        "LD_PRELOAD": runtime(),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",  # Python leaks by design
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join(map(str, (FOLDER / "lib", ROOT))),
        "BIGMODEL_ISA": isa,
    }


def pytest(*arguments: str, isa: str = "", **options) -> subprocess.CompletedProcess:
    """Runs tests on the sanitized build."""
    path = f"pythonpath={FOLDER / 'lib'} {ROOT}"
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-o", path, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(isa), **options)


def main() -> int:
    if runtime() is None:
        print(f"{COMPILER} has no AddressSanitizer here (Debian: apt-get install g++)", file=sys.stderr)
        return 1
    built = build()
    if built.returncode:
        print(built.stdout[-4000:], built.stderr[-4000:], file=sys.stderr)
        return 1
    runs = [("", ALL), *((isa, ODD_SIZES) for isa in ("avx512", "avx2", "generic"))]
    return max(pytest(*tests, isa=isa).returncode for isa, tests in runs)


if __name__ == "__main__":
    sys.exit(main())
