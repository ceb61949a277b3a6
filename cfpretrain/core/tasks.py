"""What a sample is trained as: which of the slots it fills that the samples of a micro-batch share.

    slots             class   text before   image   text behind
    class_to_image      #                     #
    text_to_image                  #          #
    image_to_text                             #          #

For guidance, some lack what their task is conditioned on, the text before or the image; a class is replaced by the null
class instead (`objective.py`). All images are learned, those that a text describes too, for which an image without any
condition is what guidance leads away from; of texts, those behind an image are.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cfpretrain.core import seeds
from cfpretrain.core.segments import Segment
from cfpretrain.core.texts import Marks, pad_texts, text_segment

TASKS = ("class_to_image", "text_to_image", "image_to_text")

# Of each task: which slots a sample fills, and which of them may be dropped.
_FILLED = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1]], dtype=torch.bool)
_DROPPED = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], dtype=torch.bool)


@dataclass(frozen=True)
class Tasks:
    """How often a sample is trained as what."""

    weights: Mapping[str, float]  # of each task, relative to the others'; without: 0
    text_drop_prob: float  # of an image, that it lacks the text before it
    image_drop_prob: float  # of a text, that it lacks the image that it describes
    marks: Marks

    def draw(self, task_keys_B: Tensor, drop_keys_B: Tensor) -> Tensor:
        """Which slots samples fill: bool [B, 4]."""
        ends_T = torch.tensor([self.weights.get(task, 0.0) for task in TASKS], dtype=torch.float64).cumsum(0)
        drawn_B = seeds.uniform(task_keys_B).double() * ends_T[-1]
        task_B = torch.searchsorted(ends_T, drawn_B, right=True).clamp(max=len(TASKS) - 1)
        drop_prob_T = torch.tensor([0.0, self.text_drop_prob, self.image_drop_prob])
        is_dropped_B = seeds.uniform(drop_keys_B) < drop_prob_T[task_B]
        return _FILLED[task_B] & ~(_DROPPED[task_B] & is_dropped_B[:, None])

    def fill(
        self,
        slots_B4: Tensor,
        of_class: Segment,
        image: Segment,
        texts: Sequence[Sequence[int]],
        skipped: Collection[int] = (),
    ) -> tuple[Segment, ...]:
        """The segments of samples that fill these slots, without the slots that none of them fills.

        Args:
            slots_B4: bool, see `draw`.
            of_class: of all samples.
            image: of all samples, to be learned.
            texts: of each sample the tokens, without the marks around them.
            skipped: places of samples of which no text is learned.
        """
        has_class_B, has_before_B, has_image_B, has_behind_B = slots_B4.unbind(1)
        is_learned_B = has_behind_B.index_fill(0, torch.tensor(list(skipped), dtype=torch.int64), False)
        before, behind = (
            text_segment(*pad_texts(_framed(texts, has_B, self.marks.begin, end), self.marks.pad), learned_B)
            for has_B, end, learned_B in (
                (has_before_B, self.marks.image, None),
                (has_behind_B, self.marks.end, is_learned_B),
            )
        )
        slots = (
            _lacking(of_class, has_class_B),
            dataclasses.replace(before, ordinal_B=torch.zeros_like(has_before_B, dtype=torch.int64)),
            dataclasses.replace(_lacking(image, has_image_B), ordinal_B=has_before_B.long()),
            dataclasses.replace(behind, ordinal_B=has_image_B.long()),
        )
        return tuple(one for one, is_filled in zip(slots, slots_B4.any(0).tolist(), strict=True) if is_filled)


def _framed(texts: Sequence[Sequence[int]], has_B: Tensor, begin: int, end: int) -> list[list[int]]:
    return [[begin, *text, end] if has else [] for text, has in zip(texts, has_B.tolist(), strict=True)]


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
