"""The curves and maps of a run. The door to matplotlib; draws on Figure objects, so there is no global state."""

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
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from cfpretrain.base import files

Floats = npt.NDArray[np.float64]

_INK, _QUIET, _PAPER = "#1f2430", "#6b7280", "#ffffff"
_BLUE, _RED = "#2563a8", "#d1495b"
_DOTS_PER_INCH = 130
# So few values are drawn as dots: there is nothing to smooth.
_FEW = 12

# ---------------------------------------------------------------------------------------------------------------------
# Training curves


def curves(
    path: Path,
    metrics: Sequence[Mapping[str, Any]],
    title: str = "",
    score: tuple[str, float | None] | None = None,
) -> None:
    """Writes loss, gradient norm, learning rate and speed over the steps, and a score below them, as one PNG.

    Args:
        path: the PNG; its folder must exist.
        metrics: rows of metrics.jsonl in any order. Keys read: `step`; `loss`, `grad_norm`, `learning_rate`,
            `images_per_second`, each drawn over the rows that have it (None counts as not having it);
            `num_skipped_steps`, the run's total so far. Loss and gradient norm leave a gap and a mark where they are
            not finite; rows in which the total of skipped steps grew are marked.
        title: above everything.
        score: the key of a score, and its floor where it is known; None draws no score.
    """
    rows = sorted((row for row in metrics if row.get("step") is not None), key=lambda row: row["step"])
    steps = np.array([row["step"] for row in rows], dtype=np.float64)
    names: list[Any] = [["loss", "norm"], ["rate", "speed"]] + [["score", "score"]] * (score is not None)
    figure = _figure(11, 3.4 * len(names), title)
    panels = figure.subplot_mosaic(names, sharex=True)
    loss, norm, rate, speed = (panels[name] for name in ("loss", "norm", "rate", "speed"))
    _curve(loss, steps, _column(rows, "loss"), "loss", "mean weighted squared error")
    _curve(norm, steps, _column(rows, "grad_norm"), "gradient norm", "L2 norm before clipping")
    _plain_curve(rate, steps, _column(rows, "learning_rate"), "learning rate", "learning rate")
    _plain_curve(speed, steps, _column(rows, "images_per_second"), "speed", "images / s, all ranks together")
    skipped = _skipped_steps(steps, _column(rows, "num_skipped_steps"))
    for axes in (loss, norm):
        _mark(axes, skipped, "skipped step", "|", 0.03)
    if score is not None:
        key, floor = score
        _curve(panels["score"], steps, _column(rows, key), f"{key} of EMA samples", "smaller is better", floor)
    for axes in (rate, speed) if score is None else (panels["score"],):
        axes.set_xlabel("optimizer step")
    for axes in panels.values():
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _save(figure, path)


def _column(rows: Sequence[Mapping[str, Any]], key: str) -> Floats:
    """One value a row: NaN where it is missing or None, infinity where it is there but not finite."""
    values = [math.nan if row.get(key) is None else float(row[key]) for row in rows]
    broken = [row.get(key) is not None and not math.isfinite(float(row[key])) for row in rows]
    return np.where(broken, math.inf, np.array(values, dtype=np.float64))


def _skipped_steps(steps: Floats, totals: Floats) -> Floats:
    """The steps of the rows in which the total of skipped steps grew."""
    has = np.isfinite(totals)
    grew = np.diff(totals[has], prepend=0.0) > 0
    return np.asarray(steps[has][grew])


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
        axes.axhline(floor, color=_QUIET, linestyle="--")
        axes.text(0.01, floor, f"floor {floor:.3g}", transform=axes.get_yaxis_transform(), va="bottom", fontsize=9)
    if least > 0 and finite.max() > 5 * least:
        axes.set_yscale("log")
        _label_log(axes.yaxis)


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
    axes.set_title(title, loc="left", color=_INK, fontsize=11, fontweight="bold", pad=8)
    axes.set_ylabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c3c9d2")
    axes.grid(color="#e5e8ec", linewidth=0.7)
    axes.set_axisbelow(True)
    _quiet_ticks(axes)


def _say_empty(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_QUIET)
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
# The loss over both axes


def loss_map(
    path: Path,
    loss_TS: Floats,
    timestep_edges: Sequence[float],
    position_edges: Sequence[float],
    title: str = "Loss over noise level and AR position",
) -> None:
    """Writes the loss as a heat map over the two axes of the method: noise level and AR position.

    Args:
        path: the PNG; its folder must exist.
        loss_TS: mean loss of each cell, [timestep bins, position bins]; NaN where nothing fell, drawn hatched.
        timestep_edges: edges of the timestep bins, one more than bins, rising.
        position_edges: edges of the bins of the token position at which an AR step begins (that many tokens are
            clean already), one more than bins, rising.
        title: above the map.

    Raises:
        UserError: the numbers of edges do not fit the bins.
    """
    loss_TS = np.asarray(loss_TS, dtype=np.float64)
    if loss_TS.shape != (len(timestep_edges) - 1, len(position_edges) - 1):
        raise UserError(
            f"loss map: expected {len(timestep_edges) - 1} x {len(position_edges) - 1} values for its edges, "
            f"got {' x '.join(map(str, loss_TS.shape))}"
        )
    figure = _figure(8.2, 4.8, title)
    axes = figure.subplots()
    axes.set_facecolor("#eceff3")
    axes.set_xlabel("noise level: timestep t of the diffusion (0 = clean)")
    axes.set_ylabel("AR position: clean tokens\nbefore the AR step")
    axes.set_xlim(timestep_edges[0], timestep_edges[-1])
    axes.set_ylim(position_edges[0], position_edges[-1])
    for side in axes.spines.values():
        side.set_visible(False)
    _quiet_ticks(axes)
    known = loss_TS[np.isfinite(loss_TS)]
    if len(known) == 0:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color=_QUIET)
    else:
        _heat(figure, axes, loss_TS, timestep_edges, position_edges, known)
    _save(figure, path)


def _heat(
    figure: Figure, axes: Axes, loss_TS: Floats, x_edges: Sequence[float], y_edges: Sequence[float], known: Floats
) -> None:
    spread_is_large = known.min() > 0 and known.max() > 8 * known.min()
    limits = (float(known.min()), float(known.max()))
    scale = LogNorm(*limits) if spread_is_large else Normalize(*limits)
    axes.fill_between(
        [x_edges[0], x_edges[-1]], y_edges[0], y_edges[-1], hatch="///", facecolor="#eceff3", edgecolor="#c3c9d2", lw=0
    )
    mesh = axes.pcolormesh(x_edges, y_edges, loss_TS.T, norm=scale, cmap="viridis", edgecolor=_PAPER, linewidth=0.6)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=24)
    bar.set_label("mean squared error per value" + (" (log scale)" if spread_is_large else ""), color=_INK)
    bar.outline.set_visible(False)
    _quiet_ticks(bar.ax)
    if spread_is_large:
        _label_log(bar.ax.yaxis)
    if loss_TS.size <= 100:
        _write_values(axes, loss_TS, x_edges, y_edges, scale)


def _write_values(
    axes: Axes, loss_TS: Floats, x_edges: Sequence[float], y_edges: Sequence[float], scale: Normalize
) -> None:
    """The loss of each cell as a number in it."""
    for (t, s), loss in np.ndenumerate(loss_TS):
        if np.isfinite(loss):
            middle = ((x_edges[t] + x_edges[t + 1]) / 2, (y_edges[s] + y_edges[s + 1]) / 2)
            colour = _INK if float(scale(np.array([loss]))[0]) > 0.6 else _PAPER
            axes.text(*middle, f"{loss:#.2g}".rstrip("."), ha="center", va="center", color=colour, fontsize=8)


# ---------------------------------------------------------------------------------------------------------------------
# What all figures share


def _figure(width_inches: float, height_inches: float, title: str) -> Figure:
    figure = Figure(figsize=(width_inches, height_inches), dpi=_DOTS_PER_INCH, layout="constrained", facecolor=_PAPER)
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, x=0.01, ha="left", color=_INK, fontsize=13, fontweight="bold", parse_math=False)
    return figure


def _quiet_ticks(axes: Axes) -> None:
    axes.tick_params(which="both", colors=_QUIET, labelcolor=_INK, length=3)
    axes.yaxis.label.set_color(_QUIET)
    axes.xaxis.label.set_color(_QUIET)


def _label_log(axis: Axis) -> None:
    """Plain numbers at 1, 2 and 5 of each decade, where matplotlib would write powers, or nothing within a decade."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(_short))
    axis.set_minor_formatter(NullFormatter())


def _short(value: float, _position: int | None = None) -> str:
    return f"{value:g}"


def _save(figure: Figure, path: Path) -> None:
    files.replace(path, lambda opened: figure.savefig(opened, format="png"))
