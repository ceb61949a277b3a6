"""The sequences that training draws, from the config alone: of which segments, how often, how long, how much work.

Captions differ in length. Memory is asked for where all are the longest (`model.max_text_tokens`); work is that of
captions of one length, the mean of those in the shards where these can be read.
"""

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cfpretrain.base.config import Config, ModelConfig, OrderConfig
from cfpretrain.base.console import UserError
from cfpretrain.core.ar import ARSettings
from cfpretrain.core.modalities import class_segment, image_segment
from cfpretrain.core.segments import Segment
from cfpretrain.core.texts import TEXT, text_segment
from cfpretrain.core.work import Work, expected_work, sequence_lengths
from cfpretrain.data.shards import Shards
from cfpretrain.run.build import make_tokenizer

FRAME = 2  # the tokens around a text
_MOST_READ = 1000  # captions


class Drawn(NamedTuple):
    """One way in which samples are trained."""

    share: float  # of the samples
    segments: list[Segment]  # noised ones uncut, as one AR step each


def drawn_samples(config: Config, num_text_tokens: int) -> list[Drawn]:
    """The ways that there are; all texts are of so many tokens, those that frame them among them."""
    model, train, weights = config.model, config.train, vars(config.data.tasks)
    of_class, image = class_segment(model.num_cond_tokens), image_segment(_one_step(model.num_tokens))
    ids_BT = torch.zeros(1, num_text_tokens, dtype=torch.int64)
    given, learned = text_segment(ids_BT), text_segment(ids_BT, is_learned_B=torch.tensor([True]))
    without_text, without_image = train.text_drop_prob, train.image_drop_prob
    ways = {
        "class_to_image": [Drawn(1.0, [of_class, image])],
        "text_to_image": [Drawn(1 - without_text, [given, image]), Drawn(without_text, [image])],
        "image_to_text": [Drawn(1 - without_image, [image, learned]), Drawn(without_image, [learned])],
    }
    total = sum(weights.values())
    found = [Drawn(weights[task] / total * way.share, way.segments) for task in weights for way in ways[task]]
    return [one for one in found if one.share]


def _one_step(num_tokens: int) -> torch.Tensor:
    return torch.zeros(1, num_tokens, dtype=torch.int64)


def mean_work(config: Config, num_text_tokens: int) -> Work:
    """That of a sample, exact in the mean over what it is trained as and over splits; arguments as `drawn_samples`."""
    ar = ARSettings(**vars(config.order))
    drawn = drawn_samples(config, num_text_tokens)
    works = [expected_work(one.segments, ar) for one in drawn]
    pairs = list(zip(drawn, works, strict=True))
    return Work(
        sum(one.share * work.tokens for one, work in pairs),
        sum(one.share * work.visible for one, work in pairs),
        {kind: sum(one.share * work.projections[kind] for one, work in pairs) for kind in works[0].projections},
        sum(one.share * work.text_tokens for one, work in pairs),
    )


class Lengths(NamedTuple):
    """Tokens of a sequence of the longest micro-batch that training can draw."""

    computed: int  # by the trunk, padding included
    given: int  # of all slots that its samples share, some of which each leaves empty
    learned_text: int  # of them, of which logits are made


def longest(config: Config) -> Lengths:
    """Where all captions are the longest, and a micro-batch has samples of every kind."""
    weights = config.data.tasks
    tasks = (weights.text_to_image > 0, weights.image_to_text > 0, weights.class_to_image > 0)
    return _longest(config.model, config.order, config.clean_token_multiple(), tasks)


@functools.cache
def _longest(model: ModelConfig, order: OrderConfig, clean_multiple: int, tasks: tuple[bool, bool, bool]) -> Lengths:
    ar, L, T = ARSettings(**vars(order)), model.num_tokens, model.max_text_tokens
    has_before, has_behind, has_class = tasks
    of_class, image = class_segment(model.num_cond_tokens), image_segment(_one_step(L))
    if not (has_before or has_behind):
        length = max(sequence_lengths([of_class, image], ar, clean_multiple))
        return Lengths(length, length, 0)
    text = text_segment(_one_step(T))
    samples = [[of_class, image]] * has_class + [[text, image]] * has_before + [[image, text]] * has_behind
    # Rows close up (`segments.build_layout`): as many clean columns as the sample with the most needs.
    num_clean = max(max(sequence_lengths(segments, ar, 1)) - L for segments in samples)
    slots = (model.num_cond_tokens * has_class, T * has_before, L, T * has_behind)
    num_columns = min(-(-num_clean // clean_multiple) * clean_multiple, sum(slots))
    return Lengths(num_columns + L, sum(slots) + L, slots[-1])


def has_texts(config: Config) -> bool:
    """Whether a sample may be trained with its caption."""
    return any(one.kind == TEXT for drawn in drawn_samples(config, FRAME) for one in drawn.segments)


# ---------------------------------------------------------------------------
# Captions


class Captions(NamedTuple):
    """How long captions are, with the tokens that frame them."""

    num_tokens: int  # of one, in the mean
    num_read: int = 0  # so many were looked at; 0: none, and the mean is taken to be `model.max_text_tokens`
    num_empty: int = 0  # of these
    longest: int = 0  # of these
    num_too_long: int = 0  # of these

    def __str__(self) -> str:
        if not self.num_read:
            return f"captions: taken to have model.max_text_tokens = {self.num_tokens} tokens, since none is at hand"
        return (
            f"captions: {self.num_tokens} tokens in the mean of {self.num_read:,} in data.shards, {self.longest} at "
            f"most, {self.num_empty:,} are empty"
        )


def captions_at_hand(config: Config) -> Captions:
    """Those from all over the shards, where these and the tokenizer lie on this machine.

    UserError where all are empty, or one is too long for the model.
    """
    data, most = config.data, config.model.max_text_tokens
    is_here = Path(data.tokenizer).is_file() and all(Path(address).is_dir() for address in data.shards)
    tokenizer = make_tokenizer(config) if is_here and has_texts(config) else None
    if tokenizer is None:
        return Captions(most)
    lengths: list[int] = []
    for folder in map(Shards, data.shards):
        places = np.linspace(0, len(folder) - 1, min(len(folder), _MOST_READ // len(data.shards) + 1)).astype(int)
        texts = [sample["caption"] for sample in folder.samples(places.tolist())]
        lengths += [FRAME + len(ids) for ids in tokenizer.encode_batch(texts)]
    found = Captions(
        round(sum(lengths) / len(lengths)),
        len(lengths),
        sum(length == FRAME for length in lengths),
        max(lengths),
        sum(length > most for length in lengths),
    )
    _check(found, config)
    return found


def _check(found: Captions, config: Config) -> None:
    task = next(name for name, weight in vars(config.data.tasks).items() if weight and "text" in name)
    if found.num_empty == found.num_read:
        raise UserError(
            f"data.tasks.{task}: expected captions in {', '.join(config.data.shards)}, got none in {found.num_read:,} "
            "samples; give make_shards.py a table with a column `caption`, or set another task"
        )
    if found.num_too_long:
        raise UserError(
            f"model.max_text_tokens: expected at least {found.longest}, the tokens of the longest of "
            f"{found.num_read:,} captions that were looked at and the two that frame it, got "
            f"{config.model.max_text_tokens}, which refuses {found.num_too_long:,} of them; raise it, or shorten the "
            "captions"
        )
