"""python -m bigmodel_kernels info [--json] | check | tune: what is built here and why not the rest; whether the kernels are
right; which launch constants of the Triton kernels are fastest on this GPU."""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys

import torch

from bigmodel_kernels import __version__, _extension, _registry
from bigmodel_kernels.ops import names


def collect() -> dict:
    """Everything `info` shows, as plain data."""
    native_ok = _extension.native_error is None
    ops = {op: {b: _registry.availability(op, b) or "ok" for b in _registry.BACKENDS} for op in names()}
    return {
        "bigmodel_kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "build": _extension.build_info(),
        "ops": ops,
        "status": "ok" if native_ok else "degraded",
        "next": _next_step(native_ok),
    }


def _next_step(native_ok: bool) -> str:
    if not native_ok:
        return f"Only PyTorch's own ops run. {_extension.native_error}"
    if torch.version.cuda is None:
        return "CPU kernels are in use. For a GPU, install a CUDA build of torch."
    if not torch.cuda.is_available():
        return "CPU kernels are in use: torch is built for CUDA, but no GPU or driver was found (try nvidia-smi)."
    return "Check the kernels on this machine: python -m bigmodel_kernels check"


def show(info: dict) -> None:
    build = info["build"]
    print(
        f"bigmodel_kernels {info['bigmodel_kernels']}   torch {info['torch']}   python {info['python']}   {info['platform']}"
    )
    print(f"threads {info['threads']}   instruction set {build.get('isa', 'unknown')}   GPU {info['gpu'] or 'none'}\n")
    print(f"{'op':18s}" + "".join(f"{b:10s}" for b in _registry.BACKENDS))
    reasons: dict[str, str] = {}
    for op, by_backend in info["ops"].items():
        cells = []
        for backend, why in by_backend.items():
            cells.append("OK" if why == "ok" else "no")
            if why != "ok":
                reasons.setdefault(why, f"{op} {backend}")
        print(f"{op:18s}" + "".join(f"{c:10s}" for c in cells))
    print()
    for why, where in reasons.items():
        print(f"no    {where}: {why}")
    for name in ("native", "bindings", "compiler", "cuda", "torch", "amx"):
        if name in build:
            print(f"build {name}: {build[name]}")
    print(f"\nnext  {info['next']}")


def _tune(arguments: argparse.Namespace) -> int:
    if arguments.cpu:
        from bigmodel_kernels.cpu_tune import run as run_on_cpu

        return run_on_cpu(arguments.quick)
    if importlib.util.find_spec("triton") is None:
        print("tune needs triton: pip install triton", file=sys.stderr)
        return 2
    from bigmodel_kernels.tune import run

    return run(arguments.op, arguments.dtype, arguments.quick)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bigmodel_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="versions, what is built, each op x backend with OK or the reason why not")
    info.add_argument("--json", action="store_true", help="as JSON")
    commands.add_parser("check", help="verify every kernel on this machine against float64, in under a minute")
    tune = commands.add_parser(
        "tune", help="measure launch constants of the Triton kernels on this GPU and keep the fastest"
    )
    tune.add_argument("--op", action="append", choices=names(), help="only this op; may be repeated")
    tune.add_argument(
        "--dtype", action="append", choices=("bfloat16", "float16", "float32"), help="only this; may be repeated"
    )
    tune.add_argument("--quick", action="store_true", help="fewer sizes and candidates")
    tune.add_argument(
        "--cpu", action="store_true", help="instead: on a CPU with AMX, whether bfloat16 is faster here or in PyTorch"
    )
    arguments = parser.parse_args(argv)
    if arguments.command == "tune":
        return _tune(arguments)
    if arguments.command == "check":
        from bigmodel_kernels.selfcheck import run

        return run()
    collected = collect()
    if arguments.json:
        print(json.dumps(collected, indent=2))
    else:
        show(collected)
    return 0 if collected["status"] == "ok" else 1


if __name__ == "__main__":
    sys.exit(main())
