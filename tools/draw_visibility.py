"""Draws who sees whom in a sequence, for classes, images and texts: the picture of docs/multimodal.md.

    python tools/draw_visibility.py docs/images/visibility.png

Each panel is a layout as training makes it (`core/segments.py`), of small segments: a row is a token that looks, a
column one that is seen. Clean tokens come first, then the noised ones of images.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cfpretrain.base import outputs
from cfpretrain.base.command_line import Parser
from cfpretrain.base.console import ending_in_one_line, path_argument

if TYPE_CHECKING:
    from torch import Tensor

    from cfpretrain.core.segments import Segment

_COLOURS = {"class": "#6b7280", "text": "#d1495b", "image": "#2563a8", "noised image": "#e8a33d", "padding": "#c3c9d2"}
_COLUMNS = 3


class Case(NamedTuple):
    """A sequence and its mask."""

    title: str
    kinds: list[str]  # of each token: a key of `_COLOURS`
    may_attend_MK: "Tensor"  # bool, [query, key]


def cases() -> list[Case]:
    """Those of docs/multimodal.md; the image has nine tokens in AR steps of 2, 3 and 4."""
    import torch

    from cfpretrain.core.ar import steps_from_sizes
    from cfpretrain.core.modalities import class_segment, image_segment
    from cfpretrain.core.texts import text_segment

    def text(num_tokens: int, *lengths: int) -> "Segment":
        lengths_B = torch.tensor(lengths) if lengths else None
        return text_segment(torch.zeros(max(1, len(lengths)), num_tokens, dtype=torch.int64), lengths_B)

    image, small = (image_segment(steps_from_sizes(sizes)[None]) for sizes in ([2, 3, 4], [1, 3]))
    return [
        _case("class, image", [class_segment(2), image]),
        _case("text, image", [text(5), image]),
        _case("image, text", [image, text(5)]),
        _case("text, image, text, image", [text(3), small, text(3), small]),
        _case("two samples in a row: text, image and image, text", [text(3), small, small, text(3)], packed=(2, 2)),
        # Beside another sample, which has all of both texts.
        _case("image, text: padded", [text(4, 0, 4), small, text(5, 2, 5)]),
    ]


def _case(title: str, segments: Sequence["Segment"], packed: Sequence[int] = ()) -> Case:
    """The first row of a batch."""
    from cfpretrain.core.segments import build_layout, may_attend

    layout = build_layout(segments, packed=packed)
    given = [one.kind for one, num in zip(segments, layout.num_clean, strict=True) for _ in range(num)]
    given += [f"noised {one.kind}" for one in segments if one.is_noised for _ in range(one.num_tokens)]
    place_M = range(len(given)) if layout.place_BM is None else layout.place_BM[0].tolist()
    is_padding_M = layout.is_padding_BM[0].tolist()
    kinds = ["padding" if pads else given[place] for place, pads in zip(place_M, is_padding_M, strict=True)]
    return Case(title, kinds, may_attend(layout.intervals_BMI[:1], len(kinds))[0])


def draw(path: Path, shown: Sequence[Case]) -> None:
    """Writes them as one PNG; a cell that is seen has the colour of the token that is seen."""
    import numpy as np

    from cfpretrain.evaluation.figures import make_figure, quiet_ticks, save
    from cfpretrain.evaluation.pictures import INK, PAPER

    from matplotlib.colors import to_rgb  # isort: skip  # after `figures`, which says how it is imported
    from matplotlib.patches import Patch  # isort: skip

    num_rows = -(-len(shown) // _COLUMNS)
    figure = make_figure(4.2 * _COLUMNS, 4.9 * num_rows, "")
    figure.get_layout_engine().set(hspace=0.08)
    for axes, case in zip(figure.subplots(num_rows, _COLUMNS).flat, shown, strict=True):
        M = len(case.kinds)
        colours_M3 = np.array([to_rgb(_COLOURS[kind]) for kind in case.kinds])
        cells_MK3 = np.where(case.may_attend_MK.numpy()[..., None], colours_M3[None], np.array(to_rgb("#f4f6f8")))
        # A strip along both edges says what each row and column is.
        framed = np.ones((M + 2, M + 2, 3)) * np.array(to_rgb(PAPER))
        framed[2:, 2:], framed[0, 2:], framed[2:, 0] = cells_MK3, colours_M3, colours_M3
        axes.imshow(framed, interpolation="nearest")
        axes.set_xticks(np.arange(1.5, M + 2), minor=True)
        axes.set_yticks(np.arange(1.5, M + 2), minor=True)
        axes.grid(which="minor", color=PAPER, linewidth=0.8)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_ylabel("who looks")
        axes.set_title(case.title, loc="left", color=INK, fontsize=10, fontweight="bold")
        axes.set_xlabel("who is seen")
        axes.spines[:].set_visible(False)
        quiet_ticks(axes)
        axes.tick_params(which="both", length=0)
    patches = [Patch(color=colour, label=kind) for kind, colour in _COLOURS.items()]
    figure.legend(handles=patches, loc="outside lower left", ncols=len(patches), frameon=False)
    save(figure, path)


def run(arguments: argparse.Namespace) -> None:
    """Draws the cases."""
    outputs.refuse_existing(arguments.out, "OUT")
    draw(arguments.out, cases())
    print(f"{arguments.out} shows who sees whom")


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    parser.add_argument("out", type=path_argument, help="the PNG to write")
    with ending_in_one_line():
        run(parser.parse_args())


if __name__ == "__main__":
    main()
