"""Grids of images, and images as PNG. The door to PIL."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cfpretrain.base import files
from cfpretrain.base.console import UserError

INK, QUIET, PAPER = "#1f2430", "#6b7280", "#ffffff"
# No image has this colour by nature: it marks pixels that are not finite.
_BROKEN_RGB = (255, 0, 255)
_CAPTION_SIZE = 11
_MOST_CHARACTERS = 500  # of a name or caption


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
    path: Path,
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

    Args:
        path: the PNG, whose folder must exist; it is there whole or not at all.
        images_BCYX: as for `to_rgb`, the rows of the grid one after the other.
        class_names: one for each row; B is a multiple of their number.
        title: lines above the grid.
        value_range: as for `to_rgb`.
        cell_size: about how many picture pixels a side an image should have, at least its own.
        captions: what stands below each image, cut to its width; none for no line at all.
        column_names: what stands above each column, likewise.
    """
    images_BYXC = to_rgb(images_BCYX, value_range)
    num_images, height, width, _ = images_BYXC.shape
    assert len(captions) in (0, num_images), (len(captions), num_images)
    layout = grid_layout(
        num_images, height, width, class_names, cell_size, title, bool(captions), has_column_names=bool(column_names)
    )
    assert len(column_names) in (0, layout.num_columns), (len(column_names), layout.num_columns)
    bottom, right = layout.corner(len(class_names) - 1, layout.num_columns - 1)
    title_width = max((math.ceil(_font(15, is_bold=True).getlength(line)) for line in title.splitlines()), default=0)
    size = (
        max(right + layout.cell_width, 14 + title_width) + 14,
        bottom + layout.cell_height + layout.caption_height + 14,
    )
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    for number, line in enumerate(title.splitlines()):
        colour, font = (INK, _font(15, is_bold=True)) if number == 0 else (QUIET, _font(13))
        draw.text((14, 10 + 22 * number), line, fill=colour, font=font)
    for row, name in enumerate(class_names):
        middle = layout.corner(row, 0)[0] + layout.cell_height // 2
        draw.text((layout.left - 12, middle), _drawable(name), fill=INK, font=_font(13), anchor="rm")
    for column, name in enumerate(column_names):
        place = (layout.corner(0, column)[1] + layout.cell_width // 2, layout.top - 5)
        draw.text(place, _cut_to(name, layout.cell_width), fill=QUIET, font=_font(_CAPTION_SIZE), anchor="ms")
    for index, image_YXC in enumerate(images_BYXC):
        y, x = layout.corner(*divmod(index, layout.num_columns))
        crisp = image_YXC.repeat(layout.zoom, axis=0).repeat(layout.zoom, axis=1)
        picture.paste(Image.fromarray(crisp), (x, y))
        if captions:
            text = _cut_to(captions[index], layout.cell_width)
            place = (x + layout.cell_width // 2, y + layout.cell_height + 2)
            draw.text(place, text, fill=QUIET, font=_font(_CAPTION_SIZE), anchor="ma")
    files.replace(path, lambda opened: picture.save(opened, format="PNG"))


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
    """Images [B, 1 or 3, Y, X] in [0, 1] with some of their tokens covered by a colour: float32 [B, 3, Y, X].

    Args:
        images_BCYX: the images.
        tokens_BL: bool [B or 1, L], those covered, of a square grid.
        colour: as "#rrggbb".
        share: of the colour in the mix; 1 hides the image.
    """
    grid, (Y, X) = math.isqrt(tokens_BL.shape[1]), images_BCYX.shape[2:]
    covered_BCYX = tokens_BL.unflatten(1, (1, grid, grid))
    covered_BCYX = covered_BCYX.repeat_interleave(Y // grid, 2).repeat_interleave(X // grid, 3)
    paint_C11 = images_BCYX.new_tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])[:, None, None]
    images_BCYX = images_BCYX.expand(-1, 3, -1, -1)
    return images_BCYX.where(~covered_BCYX, images_BCYX.clamp(0, 1).lerp(paint_C11, share))


def write_png(file: Path, image_YXC: npt.NDArray[np.uint8]) -> None:
    """Writes one image, of `to_rgb`, as it is: whole or not at all."""
    picture = Image.fromarray(image_YXC)
    files.replace(file, lambda opened: picture.save(opened, format="PNG"))


def false_colours(latents_BCYX: Tensor) -> Tensor:
    """The first channels of latents as colours, to look at where no autoencoder decodes them; never to be scored.

    Latents as the transformer sees them, of about unit variance -> float32 [B, 1 or 3, Y, X], not clamped.
    """
    num_shown = 3 if latents_BCYX.shape[1] >= 3 else 1
    return 0.5 + latents_BCYX[:, :num_shown].float() / 6  # three deviations are black and white


def to_rgb(images_BCYX: Tensor, value_range: tuple[float, float]) -> npt.NDArray[np.uint8]:
    """Images, float [B, 1 (grey) or 3 (RGB), Y, X] -> uint8 [B, Y, X, 3].

    `value_range` says what is black and what is white; what lies outside is clamped, what is not finite is magenta.
    """
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


def _font(size: int, is_bold: bool = False) -> ImageFont.FreeTypeFont:
    # matplotlib brings this font along, so that text looks the same everywhere; it is not imported, which takes long
    # and fails where its settings are wrong.
    [matplotlib] = find_spec("matplotlib").submodule_search_locations  # type: ignore[union-attr,misc]
    name = "DejaVuSans-Bold.ttf" if is_bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib, "mpl-data", "fonts", "ttf", name), size)
