"""The picture: one bar per row from the line of equality, to the right where ours is faster."""

from itertools import groupby
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from benchmarks.report import EQUAL, LOSS, TIE, WIN, WRONG, Result, summary

COLOUR = {WIN: "#2a8f6d", TIE: "#b9a44c", LOSS: "#c8413b", WRONG: "#5b1a18"}
TITLE = {
    "lstm": "LSTM",
    "cross_entropy": "Cross-entropy",
    "cnn": "CNN, whole model",
    "rnn": "RNN, whole model",
    "transformer": "Transformer, whole model",
    "resnet": "ResNet, whole model",
    "bert": "BERT, one layer",
    "gpt": "GPT, one block",
    "deepspeech": "Deep Speech, whole model",
}
INK, FAINT = "#22272b", "#8a9199"
TICKS = (0.1, 0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20, 50, 100)
ROW_HEIGHT, HEADER_ROWS, MARGIN = 0.27, 1.5, 1.9  # inches, rows per group heading, inches for title and axis


def layout(results: list[Result]) -> tuple[list[tuple[float, str]], list[float]]:
    """Places from the top down: of the group headings, and of the rows."""
    headings, places, y = [], [], 0.0
    for group, members in groupby(results, key=lambda r: r.group):
        headings.append((y, group))
        y += HEADER_ROWS - 0.3
        for _ in members:
            places.append(y)
            y += 1.0
        y += 0.3
    return headings, places


def draw(results: list[Result], path: Path, *, title: str, subtitle: str) -> None:
    """Writes the PNG."""
    headings, places = layout(results)
    height = MARGIN + ROW_HEIGHT * (places[-1] + 1)
    figure, axes = plt.subplots(figsize=(11.5, height))
    figure.subplots_adjust(left=0.36, right=0.95, top=1 - 1.15 / height, bottom=0.75 / height)
    axes.set_xscale("log")
    timed = [r for r in results if r.ratio is not None]
    low = min([0.75, *(0.9 * r.ratio_low for r in timed)])
    high = max([1.6, *(r.ratio_high for r in timed)])
    axes.set_xlim(low, high * (high / low) ** 0.22)  # room for the figures to the right of the longest bar
    axes.axvspan(*EQUAL, color="#e9e4d0", zorder=0, linewidth=0)
    axes.axvline(1.0, color=INK, linewidth=1.1, zorder=3)
    for y, result in zip(places, results, strict=True):
        label = f"{result.case}   {result.pass_}" + ("" if result.dtype == "fp32" else f"  {result.dtype}")
        colour = COLOUR[result.verdict]
        axes.annotate(
            label, (0, y), xycoords=("axes fraction", "data"), xytext=(-8, 0), textcoords="offset points",
            ha="right", va="center", fontsize=8.6, color=colour if result.verdict in (LOSS, WRONG) else INK,
        )  # fmt: skip
        if result.ratio is None:
            axes.text(1.0, y, "  wrong result: no time", va="center", fontsize=8.6, weight="bold", color=colour)
            continue
        axes.barh(y, result.ratio - 1.0, left=1.0, height=0.68, color=colour, zorder=2)
        axes.plot([result.ratio_low, result.ratio_high], [y, y], color=INK, linewidth=1.0, alpha=0.75, zorder=4)
        for end in (result.ratio_low, result.ratio_high):
            axes.plot([end, end], [y - 0.17, y + 0.17], color=INK, linewidth=1.0, alpha=0.75, zorder=4)
        figures = axes.annotate(
            f"{result.ratio:.2f}x", (max(result.ratio_high, 1.0), y), xytext=(6, 0), textcoords="offset points",
            va="center", fontsize=8.6, weight="bold", color=colour,
        )  # fmt: skip
        axes.annotate(
            f"{result.best_stock}", (1, 0.5), xycoords=figures, xytext=(5, 0), textcoords="offset points",
            va="center", fontsize=7.4, color=FAINT,
        )  # fmt: skip
    for y, group in headings:
        axes.annotate(
            TITLE.get(group, group.capitalize()), (0, y), xycoords=("axes fraction", "data"),
            xytext=(-8, 0), textcoords="offset points", ha="right", va="center", fontsize=10.5, weight="bold",
        )  # fmt: skip
        axes.axhline(y, color="#d7dbde", linewidth=0.8, zorder=1)
    axes.set_ylim(places[-1] + 0.8, -0.8)
    axes.set_yticks([])
    ticks = [t for t in TICKS if low <= t <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.grid(axis="x", color="#eceef0", zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, colors=INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel(
        "time of the best stock PyTorch option (named in grey) / ours: median of interleaved rounds, whiskers 10-90 %",
        fontsize=9, color=INK, labelpad=8,
    )  # fmt: skip
    counts = summary(results)
    shown = [v for v in (WIN, TIE, LOSS, WRONG) if counts[v.lower()] or v != WRONG]
    axes.legend(
        handles=[Patch(color=COLOUR[v], label=f"{v} ({counts[v.lower()]})") for v in shown],
        loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(shown), frameon=False, fontsize=9, borderaxespad=0.2,
    )  # fmt: skip
    figure.text(0.02, 1 - 0.38 / height, title, fontsize=14, weight="bold", color=INK, va="center")
    figure.text(0.02, 1 - 0.68 / height, subtitle, fontsize=8.8, color=FAINT, va="center")
    figure.savefig(path, dpi=150)
    plt.close(figure)
