"""Images behind prompts, captions of images, and samples of texts and images in any order that are continued.

A sample is a list of parts, which the model reads in order and continues. Behind an image comes a text; the token
that ends a text says whether an image follows. What guidance leads away from has read nothing: an image without what
comes before it, a text without its image. Samples of a batch may be of different parts and lengths, and each is
continued as it is alone.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cfpretrain.core import seeds
from cfpretrain.core.context import Context, Predictor
from cfpretrain.core.modalities import IMAGE, clean_image_segment
from cfpretrain.core.sampler import (
    Guidance,
    NoiseDraw,
    Watch,
    generate_image,
    noise_by_image,
    sampling_orders,
)
from cfpretrain.core.solvers import Solver
from cfpretrain.core.texts import TEXT, Marks
from cfpretrain.core.token_choice import TokenChoice
from cfpretrain.core.writing import read_texts, write_texts, writing_keys

# The tokens of a text, without those that frame it; or those of an image in raster order, float32 [L, P].
Part = Sequence[int] | Tensor


@dataclass(frozen=True)
class Writing:
    """How texts are written."""

    marks: Marks
    max_tokens: int  # of a text, those that frame it among them
    seed: int = 0
    choice: TokenChoice = field(default_factory=TokenChoice)
    guidance: float = 1.0  # see `write_texts`, as of
    go_on: Callable[[bool], bool] = bool


@dataclass(frozen=True)
class Drawing:
    """How images are made."""

    num_tokens: int  # L
    patch_values: int  # P
    ar_step_sizes: Sequence[int]
    solver: Solver
    seed: int = 0
    guidance: Guidance = field(default_factory=Guidance)
    token_order: str = "random"
    block_size: int = 1
    watch: Watch = lambda *_: None


# ---------------------------------------------------------------------------
# Prompts and captions


@torch.no_grad()
def generate_behind_texts(
    model: Predictor,
    texts: Sequence[Sequence[int] | None],
    marks: Marks,
    order_BL: Tensor,
    ar_step_sizes: Sequence[int],
    solver: Solver,
    guidance: Guidance,
    draw_noise: NoiseDraw,
    given_BKP: Tensor | None = None,
    watch: Watch = lambda *_: None,
) -> Tensor:
    """Images that texts describe: `generate_image` behind them, with its other arguments.

    Args:
        model: with texts.
        texts: the tokens of each without those that frame them; None: nothing is before the image.
        marks: these.
        order_BL, ar_step_sizes, solver, guidance, draw_noise, given_BKP, watch: see `generate_image`.

    Returns:
        float32 [B, L, P], tokens in raster order.
    """
    samples = [[] if text is None else [text] for text in texts]
    context = _read_samples(model, samples, True, marks, order_BL.device)
    context, ordinal_B = _branch(context, list(map(len, samples)), guidance.scale, order_BL.shape[1], order_BL.device)
    makes = context, order_BL, ar_step_sizes, solver, guidance, draw_noise
    return generate_image(*makes, given_BKP, watch, ordinal_B=ordinal_B)


@torch.no_grad()
def caption_images(
    model: Predictor, images_BLP: Tensor, ids_B: Tensor, writing: Writing, prefixes: Sequence[Sequence[int]] = ()
) -> list[list[int]]:
    """What the model writes of images: the tokens of each one's caption, its beginning among them, without the marks.

    Args:
        model: with texts.
        images_BLP: float32, tokens in raster order, on the model's device.
        ids_B: int64, numbers of the images: what is drawn of one is a function of (seed, number).
        writing: how; guidance is away from a text without its image.
        prefixes: how each caption begins; empty: as the model says.
    """
    starts = prefixes or [()] * len(images_BLP)
    samples: list[list[Part]] = [[image, start] for image, start in zip(images_BLP, starts, strict=True)]
    continued = continue_samples(model, samples, ids_B.to(images_BLP.device), writing, None, 1)
    return [list(text) for (text,) in continued]


# ---------------------------------------------------------------------------
# Samples of texts and images


@torch.no_grad()
def continue_samples(
    model: Predictor,
    samples: Sequence[Sequence[Part]],
    ids_B: Tensor,
    writing: Writing,
    drawing: Drawing | None,
    max_new_parts: int,
    first: Sequence[str | None] = (),
) -> list[list[Part]]:
    """The parts that the model adds to samples: texts, and images where a text says that one follows.

    Args:
        model: with texts.
        samples: what is given of each; images on the model's device.
        ids_B: int64, numbers of the samples, on the model's device: randomness is a function of (seed, number, part).
        writing: how texts are written.
        drawing: how images are made; None: none is, and a sample ends where one would follow.
        max_new_parts: at most so many are added; of a model that is told their places, a sample may have no more parts
            in all than it knows places.
        first: whether a text or an image (`TEXT`, `IMAGE`) comes first, of each sample. None, or empty: a text, which
            continues the sample's last part where that is a text.

    Returns:
        Of each sample the new parts. A text that is continued is one of them, with its beginning. A sample ends with
        the text whose last token says so, or with the last part that it may have.
    """
    wanted = first or [None] * len(samples)
    added: list[list[Part]] = [[] for _ in samples]
    for kind in (TEXT, IMAGE):
        group = [i for i, one in enumerate(wanted) if (one or TEXT) == kind]
        if group:
            of_group = [samples[i] for i in group], [wanted[i] is None for i in group]
            parts = _continue_group(model, *of_group, ids_B[group], writing, drawing, max_new_parts, kind)
            for i, own in zip(group, parts, strict=True):
                added[i] = own
    return added


def _continue_group(
    model: Predictor,
    samples: Sequence[Sequence[Part]],
    goes_on_B: Sequence[bool],
    ids_B: Tensor,
    writing: Writing,
    drawing: Drawing | None,
    max_new_parts: int,
    kind: str,
) -> list[list[Part]]:
    """`continue_samples` of samples that begin alike: they stay in step until they end."""
    device, marks = ids_B.device, writing.marks
    given = [list(sample) for sample in samples]
    prefixes: list[Sequence[int]] = []
    for sample, goes_on in zip(given, goes_on_B, strict=True):
        last = sample[-1] if goes_on and sample else ()
        prefixes.append(() if isinstance(last, Tensor) else last)
        if goes_on and sample and not isinstance(last, Tensor):
            sample.pop()
    context = _read_samples(model, given, kind == IMAGE, marks, device)
    added: list[list[Part]] = [[] for _ in samples]
    rows = list(range(len(samples)))  # of the samples that go on
    for number in range(max_new_parts):
        places = [len(given[row]) + number for row in rows]
        part_ids_B = ids_B[rows] if number == 0 else seeds.fold(ids_B[rows], number)
        is_last = number == max_new_parts - 1
        if kind == TEXT:
            context, ordinal_B = _branch(context, places, writing.guidance, writing.max_tokens + 1, device)
            starts = [prefixes[row] if number == 0 else () for row in rows]
            keys_B = writing_keys(writing.seed, part_ids_B)
            how = writing.max_tokens, writing.choice, keys_B, writing.guidance, ordinal_B, writing.go_on
            texts = write_texts(context, starts, marks, *how)
            new: list[Part] = [text[1:-1] for text in texts]
            going_on = [i for i, text in enumerate(texts) if text[-1] == marks.image and drawing is not None]
            kind = IMAGE
        else:
            assert drawing is not None
            context, ordinal_B = _branch(context, places, drawing.guidance.scale, drawing.num_tokens, device)
            new = list(_make_images(context, part_ids_B, drawing, ordinal_B, not is_last))
            going_on, kind = list(range(len(rows))), TEXT
        for row, part in zip(rows, new, strict=True):
            added[row].append(part)
        if is_last or not going_on:
            break
        rows, context = [rows[i] for i in going_on], context.take(going_on, 0)
    return added


def _make_images(context: Context, ids_B: Tensor, drawing: Drawing, ordinal_B: Tensor, is_read: bool) -> Tensor:
    """An image behind each context: [B, L, P]."""
    order_BL = sampling_orders(drawing.seed, ids_B, drawing.num_tokens, drawing.token_order, drawing.block_size)
    draw_noise = noise_by_image(drawing.seed, ids_B, drawing.patch_values)
    makes = context, order_BL, drawing.ar_step_sizes, drawing.solver, drawing.guidance, draw_noise
    return generate_image(*makes, watch=drawing.watch, is_read=is_read, ordinal_B=ordinal_B)


# ---------------------------------------------------------------------------
# Contexts of samples


def _branch(
    context: Context, places: Sequence[int], scale: float, room: int, device: torch.device
) -> tuple[Context, Tensor]:
    """The contexts of parts at these places, and behind them, for guidance, as many that have read nothing.

    With room for so many tokens of each, and their places as the model is told them.
    """
    rows, without = list(range(len(places))), [] if scale == 1 else [None] * len(places)
    return context.take([*rows, *without], room), torch.tensor([*places, *[0] * len(without)], device=device)


def _read_samples(
    model: Predictor, samples: Sequence[Sequence[Part]], precedes_image: bool, marks: Marks, device: torch.device
) -> Context:
    """The contexts of samples, of which some may be empty; `precedes_image`: an image follows their last parts."""
    framed = [_frame(sample, precedes_image, marks) for sample in samples]
    slots = []
    for place in range(max(map(len, framed))):
        own = [parts[place] if place < len(parts) else [] for parts in framed]
        texts = [[] if isinstance(part, Tensor) else part for part in own]
        slots.append((texts, [part if isinstance(part, Tensor) else None for part in own]))
    capacity = sum(
        max(map(len, texts)) + max((len(one) for one in images if one is not None), default=0)
        for texts, images in slots
    )
    context = Context(model, capacity)
    for place, (texts, images) in enumerate(slots):
        ordinal_B = torch.full((len(samples),), place, device=device)
        if any(texts):
            read_texts(context, texts, marks.pad, device, ordinal_B)
        if any(image is not None for image in images):
            _read_images(context, images, ordinal_B)
    return context


def _frame(sample: Sequence[Part], precedes_image: bool, marks: Marks) -> list[list[int] | Tensor]:
    """The parts of a sample, texts with the tokens that frame them."""
    framed: list[list[int] | Tensor] = []
    follows = [*(isinstance(part, Tensor) for part in sample[1:]), precedes_image]
    for part, is_image_next in zip(sample, follows, strict=False):
        end = marks.image if is_image_next else marks.end
        framed.append(part if isinstance(part, Tensor) else [marks.begin, *part, end])
    return framed


def _read_images(context: Context, images: Sequence[Tensor | None], ordinal_B: Tensor) -> None:
    """Reads images, which some sequences may lack."""
    like = next(image for image in images if image is not None)
    tokens_BLP = torch.stack([torch.zeros_like(like) if image is None else image for image in images])
    segment, lacks_B1 = clean_image_segment(tokens_BLP, ordinal_B), torch.tensor([[image is None] for image in images])
    if lacks_B1.any():
        segment = dataclasses.replace(segment, is_padding_BL=lacks_B1.expand(-1, segment.num_tokens))
    context.read(segment)
