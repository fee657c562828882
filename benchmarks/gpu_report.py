"""python -m benchmarks.gpu_report gpu.json [gpu.json ..]: a kept result, a table and a picture of what was measured on a GPU.

Several files of one commit and GPU, of calls that ran different steps, make one result; of a step that ran twice the later file's
counts. Writes <date>-<commit>.{json,md,png} to benchmarks/results/<GPU>/ or --out; --readme puts the table into README.md.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from benchmarks import plot, readme
from benchmarks.gpu import EQUAL, SCHEMA
from benchmarks.report import LOSS, Result, summary

RESULTS = Path(__file__).parent / "results"
NAME = re.compile(r"(?P<case>.*?)(?: (?P<pass>fwd(?:\+bwd)?))?$")
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
HEAD = (
    "case",
    "pass",
    "dtype",
    "vs best",
    "10-90 %",
    "best stock",
    "ours",
    "auto",
    "wall",
    "TFLOP/s",
    "GB/s",
    "of ceiling",
)


def merged(files: list[dict]) -> dict:
    """One result of several; a step that did not run never takes the place of one that did."""
    if wrong := [known.get("schema") for known in files if known.get("schema") != SCHEMA]:
        raise ValueError(f"gpu.json must have schema {SCHEMA}; got {wrong[0]}")
    steps: dict[str, dict] = {}
    for known in files:
        for outcome in known["outcomes"]:
            if outcome["step"] not in steps or outcome["result"] != "not measured":
                steps[outcome["step"]] = outcome
    machine = next((f for f in steps.get("machine", {"figures": []})["figures"] if "gpu" in f), None)
    if machine is None:
        raise ValueError("none of the files has the step `machine`, which names the GPU")
    commits = {f["commit"] for k in files for o in k["outcomes"] for f in o["figures"] if "gpu" in f}
    if len(commits) > 1:
        raise ValueError(f"the files are of different commits: {', '.join(sorted(commits))}")
    commands = [known["command"] for known in files]
    return {
        "schema": SCHEMA, "date": max(known["date"] for known in files), "commands": commands, "machine": machine,
        "outcomes": list(steps.values()),
    }  # fmt: skip


def cases(known: dict) -> list[tuple[str, dict]]:
    """The timed cases, each with its step."""
    return [(o["step"], f) for o in known["outcomes"] for f in o["figures"] if "ratio" in f]


def split(name: str) -> tuple[str, str, str]:
    """case, pass and dtype of a case's full name."""
    parts = NAME.match(name)
    words = parts["case"].split(" ")
    dtype = next((word for word in words if word.rstrip(",") in DTYPES), None)
    short = "" if dtype is None else DTYPES[dtype.rstrip(",")]
    return " ".join(word for word in words if word is not dtype), parts["pass"] or "fwd", short


def row(figure: dict) -> list[str]:
    rate = figure["teraflops"]
    return [
        *split(figure["case"]), f"{figure['ratio']:.2f}x", f"{figure['low']:.2f}-{figure['high']:.2f}", figure["best"],
        figure["ours"], f"{figure['auto_ratio']:.2f}x" if "auto_ratio" in figure else "", f"{figure['wall_ratio']:.2f}x",
        f"{rate:.3g}", f"{figure['gigabytes_per_second']:.0f}", f"{figure['of_ceiling']:.0%}",
    ]  # fmt: skip


def table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n" for cells in lines)


def markdown(known: dict) -> str:
    """What was measured on, the table with all losses, what ran, and what was seen wrong or could not be measured."""
    machine = ", ".join(f"{key} {value}" for key, value in known["machine"].items())
    timed = [figure for _, figure in cases(known)]
    behind = [f for f in timed if f.get("auto_ratio", 1.0) < EQUAL]
    text = f"{known['date']}: {machine}. " + "; ".join(f"`{command}`" for command in known["commands"]) + "\n\n"
    text += table(HEAD, [row(figure) for figure in timed])
    text += f"\n{len(timed)} cases; `auto` is below {EQUAL} of the best stock option on {len(behind)}\n"
    text += "".join(f"  slower: {f['case']} ({f['auto_ratio']:.2f}x, {f['best']})\n" for f in behind)
    steps = [[o["step"], o["result"], f"{o['seconds']:.0f}", notes(o)] for o in known["outcomes"]]
    return text + "\n" + table(("step", "result", "seconds", "notes"), steps)


def notes(outcome: dict) -> str:
    """What a step says beside its timed cases."""
    said = [outcome["note"].partition("; /")[0]] if outcome["note"] else []
    for figure in outcome["figures"]:
        for name, why in figure.get("wrong", {}).items():
            said.append(f"WRONG {figure['case']}: {name}: {why}")
        if "not_measured" in figure:
            said.append(f"{figure.get('case', '')} not measured: {figure['not_measured']}".strip())
        if "family" in figure or ("teraflops" in figure and "what" in figure) or "terabytes_per_second" in figure:
            said.append(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figure.items()))
    return "; ".join(said)


def results(known: dict) -> list[Result]:
    """The cases as the picture takes them."""
    found = []
    for step, figure in cases(known):
        case, pass_, dtype = split(figure["case"])
        found.append(
            Result(
                step, case, pass_, dtype, figure["ours"], [], ratio=figure["ratio"], ratio_low=figure["low"],
                ratio_high=figure["high"], best_stock=figure["best"],
            )
        )  # fmt: skip
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="gpu.json")
    parser.add_argument("--out", type=Path, help="folder; by default that of the GPU in benchmarks/results")
    parser.add_argument("--readme", action="store_true", help="put the table into README.md")
    options = parser.parse_args(argv)
    known = merged([json.loads(path.read_text()) for path in options.files])
    machine = known["machine"]
    gpu = machine["gpu"].split(",")[0]
    folder = options.out or RESULTS / re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{known['date'][:10]}-{machine['commit']}"
    for suffix, text in ((".json", json.dumps(known, indent=1) + "\n"), (".md", markdown(known))):
        Path(f"{stem}{suffix}").write_text(text)
    if drawn := results(known):
        title = f"Time of the best stock option / ours on {gpu}"
        subtitle = f"{known['date'][:10]}, torch {machine['torch']}, commit {machine['commit']}"
        plot.draw(drawn, Path(f"{stem}.png"), title=title, subtitle=subtitle)
        counts = summary(drawn)
        print(f"{len(drawn)} cases: faster on {counts['faster']}, {LOSS} on {counts[LOSS]}")
    if options.readme:
        readme.README.write_text(readme.put(readme.README.read_text(), readme.GPU, markdown(known)))
    print(f"{stem}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
