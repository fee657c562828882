"""``python -m bigmodel_models train <model>`` and ``python -m bigmodel_models list``."""

from __future__ import annotations

import argparse
import sys

from .errors import TrainingError, require
from .figures import format_metric
from .tasks import TASKS
from .train import TrainResult, train


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "list":
            _list()
        else:
            _train(arguments)
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bigmodel_models", description="The textbook's models.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="name every model, its variants and its settings")
    command = commands.add_parser("train", help="train a model, draw its loss curve, keep a checkpoint")
    command.add_argument("model", choices=tuple(TASKS))
    command.add_argument("--variant", help="a form of the model; 'list' names them")
    kinds = dict.fromkeys(name for task in TASKS.values() for name in task.data_names)
    command.add_argument("--data", choices=tuple(kinds), help="'list' names those of each model")
    command.add_argument("--data-dir", default="data", help="folder of the MNIST files (default: data)")
    command.add_argument("--epochs", type=int, help="epochs in all, those before a resume included")
    command.add_argument("--batch-size", type=int)
    command.add_argument("--lr", type=float)
    command.add_argument("--seed", type=int, help="default: 0")
    command.add_argument("--backend", help="auto, torch, cpu, cuda or triton (default: BIGMODEL_BACKEND, or auto)")
    command.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    command.add_argument("--threads", type=int, help="CPU threads")
    command.add_argument("--out", help="folder for results (default: runs/<model>)")
    command.add_argument("--resume", metavar="CHECKPOINT", help="go on from a checkpoint.safetensors")
    return parser


def _train(arguments: argparse.Namespace) -> None:
    options = {key: value for key, value in vars(arguments).items() if key not in ("command", "model")}
    options["out"] = arguments.out or f"runs/{arguments.model}"
    with _progress() as progress:

        def on_step(done: int, total: int, losses: dict[str, float], metrics: list[float]) -> None:
            shown = {
                "completed": done,
                "total": total,
                "loss": next(iter(losses.values())),
                "test": f"test {metrics[-1]:.4f}" if metrics else "",
            }
            if done == 1:
                progress.add_task(arguments.model, **shown)
            else:
                progress.update(progress.task_ids[0], **shown)

        result = train(arguments.model, on_step=on_step, **options)
    _show(result)


def _progress():
    rich = require("rich.progress", "the progress bar")
    return rich.Progress(
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn("loss {task.fields[loss]:.4f}  {task.fields[test]}"),
        rich.TimeRemainingColumn(),
    )


def _show(result: TrainResult) -> None:
    """Plain lines, no table: a path can then be copied whole."""
    backends = ", ".join(f"{op}: {name}" for op, name in result.kernels.items())
    lines = {
        result.metric_label: format_metric(result.metric, result.metric_label),
        "epochs": result.epochs,
        "seconds": f"{result.seconds:.1f}",
        "backends": backends or "none: this model calls no op of the library",
        **result.files,
    }
    width = max(map(len, lines))
    for label, value in lines.items():
        print(f"{label:{width}}  {value}")


def _list() -> None:
    for task in TASKS.values():
        print(f"{task.name:12}{task.summary}")
        print(f"{'':12}data: {', '.join(task.data_names)}; {task.epochs} epochs; judged by {task.metric_label}")
        for variant, build in task.builders.items():
            parameters = sum(parameter.numel() for parameter in build().parameters())
            print(f"{'':12}--variant {variant:14}{parameters:>10,} parameters")


if __name__ == "__main__":
    sys.exit(main())
