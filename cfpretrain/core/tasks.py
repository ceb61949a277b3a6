"""What a sample is trained as: the parts that make its sequence, of a class, images and texts.

    class_to_image   class, image
    text_to_image    text, image
    image_to_text    image, text
    interleaved      texts and images as the sample has them

Samples of a micro-batch share slots, class, text, image, text, image, ..., of which each fills some in order. For
guidance, some lack what their task is conditioned on, the text before or the image; a class is replaced by the null
class instead (`objective.py`). All images are learned, those that a text describes too, for which an image without any
condition is what guidance leads away from. Of texts, those of interleaved samples are learned, the first one too, whose
last token says whether an image follows; of the other tasks, those behind an image.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cfpretrain.core import seeds
from cfpretrain.core.modalities import CLASS, IMAGE
from cfpretrain.core.segments import Segment
from cfpretrain.core.texts import TEXT, Marks, pad_texts, text_segment

CLASS_TO_IMAGE, TEXT_TO_IMAGE, IMAGE_TO_TEXT, INTERLEAVED = range(4)
TASKS = ("class_to_image", "text_to_image", "image_to_text", "interleaved")

# Of an interleaved sample in order: the tokens of texts, without the marks around them; of images, None.
Interleaved = Sequence[Sequence[int] | None]


class Part(NamedTuple):
    """Of a sample that is trained as a task."""

    kind: str
    tokens: Sequence[int] = ()  # of a text, without the marks around them
    is_learned: bool = True


_CLASS, _IMAGE = Part(CLASS), Part(IMAGE)


def deal(kinds: Sequence[str]) -> list[int]:
    """The slots that the parts of a sample fill, by their kinds: 0 for a class, odd ones for texts, even for images.

    A text that lacks its image fills that behind the first image, where texts of its task are learned.
    """
    slots = []
    slot = -1 if IMAGE in kinds else 2
    for kind in kinds:
        next_of = {CLASS: 0, TEXT: slot + 1 + slot % 2, IMAGE: max(slot, 0) // 2 * 2 + 2}
        slots.append(slot := next_of[kind])
    return slots


class _Filling(NamedTuple):
    """A part of a sample in a slot."""

    part: Part
    ordinal: int  # its place among the texts and images of the sample
    row: int  # of an image, among those of all samples
    end: int  # of a text, the mark


@dataclass(frozen=True)
class Tasks:
    """How often a sample is trained as what."""

    weights: Mapping[str, float]  # of each task, relative to the others'; without: 0
    text_drop_prob: float  # of an image, that it lacks the text before it
    image_drop_prob: float  # of a text, that it lacks the image that it describes
    marks: Marks

    def draw(self, task_keys_B: Tensor, drop_keys_B: Tensor) -> tuple[Tensor, Tensor]:
        """The place in `TASKS` of what each sample is trained as, and whether it lacks the condition: [B] each."""
        ends_T = torch.tensor([self.weights.get(task, 0.0) for task in TASKS], dtype=torch.float64).cumsum(0)
        drawn_B = seeds.uniform(task_keys_B).double() * ends_T[-1]
        last = max(i for i, task in enumerate(TASKS) if self.weights.get(task, 0.0))
        task_B = torch.searchsorted(ends_T, drawn_B, right=True).clamp(max=last)
        drop_prob_T = torch.tensor([0.0, self.text_drop_prob, self.image_drop_prob, 0.0])
        return task_B, seeds.uniform(drop_keys_B) < drop_prob_T[task_B]

    @staticmethod
    def parts(task: int, lacks_condition: bool, text: Sequence[int], interleaved: Interleaved) -> list[Part]:
        """What a sample is trained on as a task, in order; `text` describes its first image."""
        if task == CLASS_TO_IMAGE:
            return [_CLASS, _IMAGE]
        if task == INTERLEAVED:
            return [_IMAGE if tokens is None else Part(TEXT, tokens) for tokens in interleaved]
        pair = [Part(TEXT, text, is_learned=False), _IMAGE] if task == TEXT_TO_IMAGE else [_IMAGE, Part(TEXT, text)]
        return pair[1:] if lacks_condition else pair

    def fill(
        self,
        parts_of_samples: Sequence[Sequence[Part]],
        of_class: Segment,
        images: Segment,
        skipped: Collection[int] = (),
    ) -> tuple[Segment, ...]:
        """The segments of samples of these parts: the slots that they share, without those that none of them fills.

        Args:
            parts_of_samples: see `parts`.
            of_class: of all samples.
            images: of all samples, those of one after another's, to be learned. A sample that lacks its image has one.
            skipped: places of samples of which no text is learned.
        """
        slots: dict[int, list[_Filling | None]] = {}
        row = 0
        for sample, parts in enumerate(parts_of_samples):
            for slot, filling in self._place(parts, row):
                slots.setdefault(slot, [None] * len(parts_of_samples))[sample] = filling
            row += max(1, sum(part.kind == IMAGE for part in parts))
        segments = []
        for slot, fillings in sorted(slots.items()):
            if slot == 0:
                segments.append(_lacking(of_class, torch.tensor([filling is not None for filling in fillings])))
                continue
            one = self._texts(fillings, skipped) if slot % 2 else _take_images(images, fillings)
            ordinal_B = torch.tensor([filling.ordinal if filling else 0 for filling in fillings])
            segments.append(dataclasses.replace(one, ordinal_B=ordinal_B))
        return tuple(segments)

    def _place(self, parts: Sequence[Part], row: int) -> list[tuple[int, _Filling]]:
        """The parts of a sample and their slots; `row` of its first image among those of all samples."""
        placed: list[tuple[int, _Filling]] = []
        ordinal = 0
        kinds = [part.kind for part in parts]
        for part, slot, behind in zip(parts, deal(kinds), [*kinds[1:], ""], strict=True):
            end = self.marks.image if behind == IMAGE else self.marks.end
            placed.append((slot, _Filling(part, ordinal, row, end)))
            ordinal += part.kind != CLASS
            row += part.kind == IMAGE
        return placed

    def _texts(self, fillings: Sequence[_Filling | None], skipped: Collection[int]) -> Segment:
        framed = [[self.marks.begin, *one.part.tokens, one.end] if one else [] for one in fillings]
        is_learned_B = torch.tensor([one is not None and one.part.is_learned for one in fillings])
        if not is_learned_B.any():
            return text_segment(*pad_texts(framed, self.marks.pad))
        is_learned_B[list(skipped)] = False
        return text_segment(*pad_texts(framed, self.marks.pad), is_learned_B)


def _take_images(images: Segment, fillings: Sequence[_Filling | None]) -> Segment:
    """The images of one slot; a sample that lacks one has another's as padding."""
    there = next(filling.row for filling in fillings if filling)
    rows = [filling.row if filling else there for filling in fillings]
    assert images.targets is not None
    if rows != list(range(len(images.targets))):
        taken = {name: value[rows] for name, value in images.tensors().items()}
        images = dataclasses.replace(images, **taken)  # type: ignore[arg-type]
    return _lacking(images, torch.tensor([filling is not None for filling in fillings]))


def _lacking(segment: Segment, has_B: Tensor) -> Segment:
    """The segment of those samples that have it."""
    if has_B.all():
        return segment
    lacks_BL = ~has_B[:, None].expand(-1, segment.num_tokens)
    if segment.targets is None or segment.weights_BL is None:
        return dataclasses.replace(segment, is_padding_BL=lacks_BL)
    weights_BL = segment.weights_BL.masked_fill(lacks_BL, 0.0)
    num_learned = int(has_B.sum()) * segment.targets[0].numel()
    return dataclasses.replace(segment, is_padding_BL=lacks_BL, weights_BL=weights_BL, num_learned=num_learned)
