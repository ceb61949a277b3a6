"""The curves of a run. The door to matplotlib; draws on Figure objects, so there is no global state."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cfpretrain.base.console import UserError

# matplotlib would read it before any other settings, and the current folder may be one that was given.
if os.path.lexists("matplotlibrc"):
    raise UserError(
        f"{os.path.abspath('matplotlibrc')}: expected no settings of matplotlib in the current folder; move them to "
        "~/.config/matplotlib/matplotlibrc, or start elsewhere"
    )
# No window is opened, and a backend that was chosen for one may not be there: then the import would fail.
os.environ["MPLBACKEND"] = "agg"

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from cfpretrain.base import files
from cfpretrain.evaluation.pictures import INK, PAPER, QUIET

Floats = npt.NDArray[np.float64]

_BLUE, _RED = "#2563a8", "#d1495b"
_DOTS_PER_INCH = 130
_LOSS_OF = "loss_"  # in the key of a kind's loss
_UNITS = {"image": "mean weighted squared error", "text": "-log p of a token, mean"}
# So few values are drawn as dots: there is nothing to smooth.
_FEW = 12


def curves(
    path: Path,
    metrics: Sequence[Mapping[str, Any]],
    title: str = "",
    score: tuple[str, float | None] | None = None,
) -> None:
    """Writes loss, gradient norm, learning rate and speed over the steps, and a score below them, as one PNG.

    Where several kinds of tokens are learned, the loss of each is there too, before its weight in the whole. Loss and
    gradient norm leave a gap and a mark where they are not finite; skipped steps are marked.

    Args:
        path: the PNG; its folder must exist.
        metrics: rows of metrics.jsonl in any order; each curve is drawn over the rows that have its key.
        title: above everything.
        score: the key of a score, and its floor where it is known; None draws no score.
    """
    rows = sorted((row for row in metrics if row.get("step") is not None), key=lambda row: row["step"])
    steps = np.array([row["step"] for row in rows], dtype=np.float64)
    by_kind = sorted({key for row in rows for key in row if key.startswith(_LOSS_OF)})
    names = [["loss", "norm"], *([by_kind] if by_kind else []), ["rate", "speed"], *([["score"]] if score else [])]
    width = math.lcm(*map(len, names))
    mosaic: list[Any] = [[name for name in row for _ in range(width // len(row))] for row in names]
    figure = make_figure(11, 3.4 * len(names), title)
    panels = figure.subplot_mosaic(mosaic, sharex=True)
    loss, norm, rate, speed = (panels[name] for name in ("loss", "norm", "rate", "speed"))
    unit = "weighted sum of those below" if by_kind else _UNITS["image"]
    _curve(loss, steps, _column(rows, "loss"), "loss", unit)
    for key in by_kind:
        kind = key.removeprefix(_LOSS_OF)
        _curve(panels[key], steps, _column(rows, key), f"loss of the {kind}s", _UNITS.get(kind, ""))
    _curve(norm, steps, _column(rows, "grad_norm"), "gradient norm", "L2 norm before clipping")
    _plain_curve(rate, steps, _column(rows, "learning_rate"), "learning rate", "learning rate")
    _plain_curve(speed, steps, _column(rows, "images_per_second"), "speed", "images / s, all ranks together")
    totals = _column(rows, "num_skipped_steps")
    has = np.isfinite(totals)
    skipped = steps[has][np.diff(totals[has], prepend=0.0) > 0]
    for axes in (loss, norm):
        _mark(axes, skipped, "skipped step", "|", 0.03)
    if score is not None:
        key, floor = score
        _curve(panels["score"], steps, _column(rows, key), f"{key} of EMA samples", "smaller is better", floor)
    for axes in (rate, speed) if score is None else (panels["score"],):
        axes.set_xlabel("optimizer step")
    for axes in panels.values():
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    save(figure, path)


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> Floats:
    """One value a row: NaN where it is missing or None, infinity where it is there but not finite."""
    values = [math.nan if row.get(key) is None else float(row[key]) for row in rows]
    broken = [row.get(key) is not None and not math.isfinite(float(row[key])) for row in rows]
    return np.where(broken, math.inf, np.array(values, dtype=np.float64))


def _curve(axes: Axes, steps: Floats, values: Floats, title: str, unit: str, floor: float | None = None) -> None:
    """Raw values faint and smoothed ones on top, on a logarithmic axis where they span much; broken ones are marked."""
    _head(axes, title, unit)
    steps, values = steps[~np.isnan(values)], values[~np.isnan(values)]
    shown = np.where(np.isfinite(values), values, np.nan)
    finite = shown[np.isfinite(shown)]
    _mark(axes, steps[np.isinf(values)], "not finite", "x", 0.08)
    if len(finite) == 0:
        _say_empty(axes, "no finite value" if len(values) else "not measured")
        return
    if len(finite) < _FEW:
        axes.plot(steps, shown, color=_BLUE, linewidth=1.6, marker="o", markersize=4)
    else:
        axes.plot(steps, shown, color=_BLUE, alpha=0.3, linewidth=1.2)
        axes.plot(steps, _smooth(shown), color=_BLUE, linewidth=2.0)
    least = finite.min()
    if floor is not None:
        least = min(least, floor)
        axes.axhline(floor, color=QUIET, linestyle="--")
        axes.text(0.01, floor, f"floor {floor:.3g}", transform=axes.get_yaxis_transform(), va="bottom", fontsize=9)
    if least > 0 and finite.max() > 5 * least:
        axes.set_yscale("log")
        label_log(axes.yaxis)


def _plain_curve(axes: Axes, steps: Floats, values: Floats, title: str, unit: str) -> None:
    """Raw values alone, on a linear axis from 0."""
    _head(axes, title, unit)
    finite = np.isfinite(values)
    if not finite.any():
        _say_empty(axes, "not measured")
        return
    few = finite.sum() < _FEW
    axes.plot(steps[finite], values[finite], color=_BLUE, linewidth=1.6, marker="o" if few else "", markersize=4)
    axes.set_ylim(0, 1.1 * max(values[finite].max(), 1e-12))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(_short))


def _head(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold", pad=8)
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c3c9d2")
    axes.grid(color="#e5e8ec", linewidth=0.7)
    axes.set_axisbelow(True)
    quiet_ticks(axes)


def _say_empty(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=QUIET)
    axes.set_yticks([])


def _mark(axes: Axes, steps: Floats, what: str, marker: str, height: float) -> None:
    """Marks steps along the lower edge, at a share of the axis height, and counts them in the legend."""
    if len(steps) == 0:
        return
    axes.plot(
        steps,
        np.full(len(steps), height),
        transform=axes.get_xaxis_transform(),
        linestyle="",
        marker=marker,
        markersize=9 if marker == "|" else 6,
        markeredgewidth=1.6,
        color=_RED,
        label=f"{what} ({len(steps)})",
    )
    axes.legend(frameon=False, loc="upper right", fontsize=9)


def _smooth(values: Floats) -> Floats:
    """A centred moving average over a thirtieth of the rows that passes over gaps."""
    half = max(1, len(values) // 60)
    has = np.isfinite(values)
    sums = np.convolve(np.where(has, values, 0.0), np.ones(2 * half + 1), mode="full")[half : half + len(values)]
    counts = np.convolve(has.astype(np.float64), np.ones(2 * half + 1), mode="full")[half : half + len(values)]
    return np.where(has, sums / np.maximum(counts, 1.0), np.nan)


# ---------------------------------------------------------------------------------------------------------------------
# What all figures share


def make_figure(width_inches: float, height_inches: float, title: str) -> Figure:
    figure = Figure(figsize=(width_inches, height_inches), dpi=_DOTS_PER_INCH, layout="constrained", facecolor=PAPER)
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=13, fontweight="bold", parse_math=False)
    return figure


def quiet_ticks(axes: Axes) -> None:
    axes.tick_params(which="both", colors=QUIET, labelcolor=INK, length=3)
    axes.yaxis.label.set_color(QUIET)
    axes.xaxis.label.set_color(QUIET)


def label_log(axis: Axis) -> None:
    """Plain numbers at 1, 2 and 5 of each decade, where matplotlib would write powers, or nothing within a decade."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(_short))
    axis.set_minor_formatter(NullFormatter())


def _short(value: float, _position: int | None = None) -> str:
    return f"{value:g}"


def save(figure: Figure, path: Path) -> None:
    files.replace(path, lambda opened: figure.savefig(opened, format="png"))
