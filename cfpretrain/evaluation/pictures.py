"""The pictures of a run. The door to matplotlib and PIL; draws on Figure objects, so there is no global state."""

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cfpretrain import files
from cfpretrain.console import UserError

Floats = npt.NDArray[np.float64]

_INK, _QUIET, _PAPER = "#1f2430", "#6b7280", "#ffffff"
_BLUE, _RED = "#2563a8", "#d1495b"
# No image has this colour by nature: it marks pixels that are not finite.
_BROKEN_RGB = (255, 0, 255)
_DOTS_PER_INCH = 130
_CAPTION_SIZE = 11
_MOST_CHARACTERS = 500  # of a name or caption
# So few values are drawn as dots: there is nothing to smooth.
_FEW = 12

# ---------------------------------------------------------------------------------------------------------------------
# Grids of samples


@dataclass(frozen=True)
class GridLayout:
    """Where things lie in a sample grid, in pixels of the picture."""

    zoom: int  # picture pixels a side of one image pixel
    cell_height: int
    cell_width: int
    gap: int
    left: int  # of the first column
    top: int  # of the first row
    num_columns: int
    caption_height: int = 0  # below each image

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """(y, x) of the upper left picture pixel of the image in this cell."""
        row_height = self.cell_height + self.caption_height + self.gap
        return self.top + row * row_height, self.left + column * (self.cell_width + self.gap)


def grid_layout(
    num_images: int,
    height: int,
    width: int,
    class_names: Sequence[str],
    cell_size: int = 56,
    title: str = "",
    has_captions: bool = False,
    has_column_names: bool = False,
) -> GridLayout:
    """Lays out a sample grid; arguments as for `sample_grid`, height and width in image pixels."""
    num_rows = len(class_names)
    if num_rows == 0 or num_images == 0 or num_images % num_rows:
        raise UserError(
            f"sample grid: expected the same number of images, at least one, for each of {num_rows} classes; "
            f"got {num_images} images"
        )
    zoom = max(1, round(cell_size / max(height, width)))
    name_width = max(math.ceil(_font(13).getlength(_drawable(name))) for name in class_names)
    title_height = 14 + 22 * len(title.splitlines()) if title else 14
    return GridLayout(
        zoom=zoom,
        cell_height=height * zoom,
        cell_width=width * zoom,
        gap=4,
        left=14 + name_width + 12,
        top=title_height + (6 if title else 0) + 20 * has_column_names,
        num_columns=num_images // num_rows,
        caption_height=17 * has_captions,
    )


def sample_grid(
    path: Path | IO[bytes],
    images_BCYX: Tensor,
    class_names: Sequence[str],
    title: str = "",
    value_range: tuple[float, float] = (-1.0, 1.0),
    cell_size: int = 56,
    captions: Sequence[str] = (),
    column_names: Sequence[str] = (),
) -> None:
    """Writes a labelled grid of images as PNG: a row for each class, its name on the left.

    Each image pixel becomes a square of whole picture pixels (nearest neighbour), so small images stay crisp.
    Values outside the range are clamped, values that are not finite are magenta.

    Args:
        path: the PNG, whose folder must exist; or where its bytes go.
        images_BCYX: float [B, C, Y, X], the rows of the grid one after the other; C is 1 (grey) or 3 (RGB).
        class_names: one for each row; B is a multiple of their number.
        title: lines above the grid, e.g. step, guidance, AR steps and denoising steps.
        value_range: what is black and what is white.
        cell_size: about how many picture pixels a side an image should have, at least its own.
        captions: what stands below each image, cut to its width; none for no line at all.
        column_names: what stands above each column, likewise.

    Raises:
        UserError: another number of channels, or images that do not fill the rows.
    """
    images_BYXC = to_rgb(images_BCYX, value_range)
    num_images, height, width, _ = images_BYXC.shape
    assert len(captions) in (0, num_images), (len(captions), num_images)
    layout = grid_layout(
        num_images, height, width, class_names, cell_size, title, bool(captions), has_column_names=bool(column_names)
    )
    assert len(column_names) in (0, layout.num_columns), (len(column_names), layout.num_columns)
    bottom, right = layout.corner(len(class_names) - 1, layout.num_columns - 1)
    title_width = max((math.ceil(_font(15, "bold").getlength(line)) for line in title.splitlines()), default=0)
    size = (
        max(right + layout.cell_width, 14 + title_width) + 14,
        bottom + layout.cell_height + layout.caption_height + 14,
    )
    picture = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(picture)
    for number, line in enumerate(title.splitlines()):
        colour, font = (_INK, _font(15, "bold")) if number == 0 else (_QUIET, _font(13))
        draw.text((14, 10 + 22 * number), line, fill=colour, font=font)
    for row, name in enumerate(class_names):
        middle = layout.corner(row, 0)[0] + layout.cell_height // 2
        draw.text((layout.left - 12, middle), _drawable(name), fill=_INK, font=_font(13), anchor="rm")
    for column, name in enumerate(column_names):
        place = (layout.corner(0, column)[1] + layout.cell_width // 2, layout.top - 5)
        draw.text(place, _cut_to(name, layout.cell_width), fill=_QUIET, font=_font(_CAPTION_SIZE), anchor="ms")
    for index, image_YXC in enumerate(images_BYXC):
        y, x = layout.corner(*divmod(index, layout.num_columns))
        crisp = image_YXC.repeat(layout.zoom, axis=0).repeat(layout.zoom, axis=1)
        picture.paste(Image.fromarray(crisp), (x, y))
        if captions:
            text = _cut_to(captions[index], layout.cell_width)
            place = (x + layout.cell_width // 2, y + layout.cell_height + 2)
            draw.text(place, text, fill=_QUIET, font=_font(_CAPTION_SIZE), anchor="ma")
    _put(path, lambda opened: picture.save(opened, format="PNG"))


def _drawable(text: str) -> str:
    """One line of a text: at breaks the font's layout fails."""
    return " ".join(text[:_MOST_CHARACTERS].split())


def _cut_to(text: str, width: int) -> str:
    text, font = _drawable(text), _font(_CAPTION_SIZE)
    if font.getlength(text) <= width:
        return text
    kept = bisect.bisect_right(range(len(text)), width, key=lambda n: math.ceil(font.getlength(text[:n] + "…"))) - 1
    return text[: max(kept, 0)] + "…"


def tinted(images_BCYX: Tensor, tokens_BL: Tensor, colour: str, share: float) -> Tensor:
    """Images with some of their tokens covered by a colour.

    Args:
        images_BCYX: float [B, 1 or 3, Y, X], 0 black and 1 white.
        tokens_BL: bool [B or 1, L], those covered, of a square grid.
        colour: as "#rrggbb".
        share: of the colour in what is seen there; 1 hides the image.

    Returns:
        float32 [B, 3, Y, X].
    """
    grid, (Y, X) = math.isqrt(tokens_BL.shape[1]), images_BCYX.shape[2:]
    covered_BCYX = tokens_BL.unflatten(1, (1, grid, grid))
    covered_BCYX = covered_BCYX.repeat_interleave(Y // grid, 2).repeat_interleave(X // grid, 3)
    paint_C11 = images_BCYX.new_tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])[:, None, None]
    images_BCYX = images_BCYX.expand(-1, 3, -1, -1)
    return images_BCYX.where(~covered_BCYX, images_BCYX.clamp(0, 1).lerp(paint_C11, share))


def write_png(file: Path | IO[bytes], image_YXC: npt.NDArray[np.uint8]) -> None:
    """Writes one image, of `to_rgb`, as it is."""
    picture = Image.fromarray(image_YXC)
    _put(file, lambda opened: picture.save(opened, format="PNG"))


def false_colours(latents_BCYX: Tensor) -> Tensor:
    """The first channels of latents as colours, to look at where no autoencoder decodes them; never to be scored.

    Args:
        latents_BCYX: as the transformer sees them, of about unit variance: three deviations are black and white.

    Returns:
        float32 [B, 1 or 3, Y, X], 0 black and 1 white, not clamped.
    """
    num_shown = 3 if latents_BCYX.shape[1] >= 3 else 1
    return 0.5 + latents_BCYX[:, :num_shown].float() / 6


def to_rgb(images_BCYX: Tensor, value_range: tuple[float, float]) -> npt.NDArray[np.uint8]:
    """Grey or RGB images -> uint8 [B, Y, X, 3]; arguments, clamping and marks as for `sample_grid`."""
    if images_BCYX.ndim != 4 or images_BCYX.shape[1] not in (1, 3):
        raise UserError(
            f"sample grid: expected images [B, 1 or 3, Y, X], got {list(images_BCYX.shape)}; decode latents to pixels"
        )
    low, high = value_range
    images_BYXC = images_BCYX.detach().cpu().double().permute(0, 2, 3, 1).numpy()
    finite = np.isfinite(images_BYXC).all(axis=-1)
    levels = np.round((np.nan_to_num(images_BYXC).clip(low, high) - low) / (high - low) * 255).astype(np.uint8)
    rgb = np.broadcast_to(levels, (*levels.shape[:3], 3)).copy()
    rgb[~finite] = _BROKEN_RGB
    return rgb


def _font(size: int, weight: str = "normal") -> ImageFont.FreeTypeFont:
    # matplotlib brings this font along, so that text looks the same everywhere.
    wanted = font_manager.FontProperties(family="DejaVu Sans", weight=weight)
    return ImageFont.truetype(font_manager.findfont(wanted), size)


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
        figure.suptitle(title, x=0.01, ha="left", color=_INK, fontsize=13, fontweight="bold")
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
    _put(path, lambda opened: figure.savefig(opened, format="png"))


def _put(where: Path | IO[bytes], write: Callable[[IO[bytes]], object]) -> None:
    """A picture at a path is whole or not there."""
    if isinstance(where, Path):
        files.replace(where, write)
    else:
        write(where)
