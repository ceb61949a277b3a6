"""The sequences that training draws, from the config alone: of which segments, how often, how long, how much work.

Captions differ in length. Memory is asked for where all are the longest (`model.max_text_tokens`); work is that of
captions of one length, the mean of those in the shards where these can be read. So it is of the texts of interleaved
samples, of which the shards also say how many texts and images each has.
"""

import functools
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cfpretrain.base.config import Config, ModelConfig, OrderConfig
from cfpretrain.base.console import UserError, excerpt
from cfpretrain.core.ar import ARSettings
from cfpretrain.core.modalities import CLASS, IMAGE, class_segment, image_segment
from cfpretrain.core.segments import Segment
from cfpretrain.core.tasks import deal
from cfpretrain.core.texts import FRAME, TEXT, text_segment
from cfpretrain.core.work import Work, expected_work, sequence_lengths
from cfpretrain.data.interleaved import parse_column
from cfpretrain.data.shards import Shards
from cfpretrain.run.build import make_tokenizer

_MOST_READ = 1000  # captions
_MOST_SEARCHED = 200  # of these, for parts without a token, at half a millisecond each


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
    if weights["interleaved"]:
        ways["interleaved"] = [
            Drawn(share, [learned if kind == TEXT else image for kind in kinds])
            for kinds, share in _interleaved_kinds(config.data.shards, model.max_segments).items()
        ]
    total = sum(weights.values())
    return [
        Drawn(weights[task] / total * way.share, way.segments)
        for task, of_task in ways.items()
        for way in of_task
        if weights[task] * way.share
    ]


@functools.cache
def _interleaved_kinds(shards: tuple[str, ...], max_segments: int) -> dict[tuple[str, ...], float]:
    """The kinds of the segments of interleaved samples, and the share of those that have them.

    Of samples from all over the shards; where these cannot be read, of as many segments as there may be, in turn.
    """
    counts = Counter(
        tuple(IMAGE if one is None else TEXT for one in parse_column(sample["segments"]))
        for sample in _samples_at_hand(shards)
        if "segments" in sample
    )
    if not counts:
        return {tuple([IMAGE, TEXT] * max_segments)[:max_segments]: 1.0}
    return {kinds: count / counts.total() for kinds, count in counts.items()}


def _samples_at_hand(shards: tuple[str, ...]) -> list[dict[str, Any]]:
    """Samples from all over the shards; none where one of them is not on this machine."""
    if not all(Path(address).is_dir() for address in shards):
        return []
    found: list[dict[str, Any]] = []
    for folder in map(Shards, shards):
        places = np.linspace(0, len(folder) - 1, min(len(folder), _MOST_READ // len(shards) + 1)).astype(int)
        found += folder.samples(places.tolist())
    return found


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
    noised: int  # of them, the noised ones of images
    learned_text: int  # of them, of which logits are made


def longest(config: Config) -> Lengths:
    """Where all texts are the longest, and a micro-batch has samples of every kind."""
    drawn = drawn_samples(config, config.model.max_text_tokens)
    kinds = tuple(tuple((one.kind, one.targets is not None) for one in way.segments) for way in drawn)
    return _longest(config.model, config.order, config.clean_token_multiple(), kinds)


@functools.cache
def _longest(
    model: ModelConfig, order: OrderConfig, clean_multiple: int, samples: tuple[tuple[tuple[str, bool], ...], ...]
) -> Lengths:
    """`samples`: the kinds of segments of each kind of sample, and whether their texts are learned."""
    ar, L, T = ARSettings(**vars(order)), model.num_tokens, model.max_text_tokens
    segments = {
        CLASS: class_segment(model.num_cond_tokens),
        IMAGE: image_segment(_one_step(L)),
        TEXT: text_segment(torch.zeros(1, T, dtype=torch.int64)),
    }
    kinds_of = [[kind for kind, _ in sample] for sample in samples]
    if TEXT not in kinds_of[0] and all(kinds == kinds_of[0] for kinds in kinds_of):
        length = max(sequence_lengths([segments[kind] for kind in kinds_of[0]], ar, clean_multiple))
        return Lengths(length, length, L * kinds_of[0].count(IMAGE), 0)
    # Rows close up (`segments.build_layout`) to as many columns, clean and noised, as the sample with the most needs.
    longest_of = [max(sequence_lengths([segments[kind] for kind in kinds], ar, 1)) for kinds in kinds_of]
    num_clean = max(length - L * kinds.count(IMAGE) for length, kinds in zip(longest_of, kinds_of, strict=True))
    num_noised = L * max(kinds.count(IMAGE) for kinds in kinds_of)
    slots = {slot: kind for kinds in kinds_of for slot, kind in zip(deal(kinds), kinds, strict=True)}
    learned = {
        slot
        for sample, kinds in zip(samples, kinds_of, strict=True)
        for slot, (kind, is_learned) in zip(deal(kinds), sample, strict=True)
        if kind == TEXT and is_learned
    }
    num_slot_tokens = sum(segments[kind].num_tokens for kind in slots.values())
    num_columns = min(-(-num_clean // clean_multiple) * clean_multiple, num_slot_tokens)
    num_noised_given = L * list(slots.values()).count(IMAGE)
    num_given = num_slot_tokens + num_noised_given
    return Lengths(num_columns + num_noised, num_given, num_noised_given, T * len(learned))


def has_texts(config: Config) -> bool:
    """Whether a sample may be trained with texts, or with whatever interleaved samples have."""
    drawn = drawn_samples(config, FRAME)
    return config.data.tasks.interleaved > 0 or any(one.kind == TEXT for way in drawn for one in way.segments)


# ---------------------------------------------------------------------------
# Captions


class Captions(NamedTuple):
    """How long captions are, with the tokens that frame them."""

    num_tokens: int  # of one, in the mean
    num_read: int = 0  # so many were looked at; 0: none, and the mean is taken to be `model.max_text_tokens`
    num_empty: int = 0  # of these
    longest: int = 0  # of these
    num_too_long: int = 0  # of these
    unknown: str = ""  # a part of one of them that the tokenizer has no token for

    def __str__(self) -> str:
        if not self.num_read:
            return f"captions: taken to have model.max_text_tokens = {self.num_tokens} tokens, since none is at hand"
        lacks = f", and data.tokenizer has no token for {excerpt(repr(self.unknown), 40)} in them" * bool(self.unknown)
        return (
            f"captions: {self.num_tokens} tokens in the mean of {self.num_read:,} in data.shards, {self.longest} at "
            f"most, {self.num_empty:,} are empty{lacks}"
        )


def captions_at_hand(config: Config) -> Captions:
    """Those from all over the shards, where these and the tokenizer lie on this machine.

    UserError where all are empty, or one is too long for the model.
    """
    data, most = config.data, config.model.max_text_tokens
    samples = _samples_at_hand(data.shards) if has_texts(config) and Path(data.tokenizer).is_file() else []
    tokenizer = make_tokenizer(config) if samples else None
    texts: list[str] = []
    if data.tasks.text_to_image + data.tasks.image_to_text:
        texts += [sample["caption"] for sample in samples]
        if texts and not any(texts):
            raise UserError(_no_captions(config, len(texts)))
    if data.tasks.interleaved:
        of_samples = [parse_column(sample["segments"]) for sample in samples if "segments" in sample]
        texts += [one for segments in of_samples for one in segments if one is not None]
    if tokenizer is None or not texts:
        return Captions(most)
    lengths = [FRAME + len(ids) for ids in tokenizer.encode_batch(texts)]
    found = Captions(
        round(sum(lengths) / len(lengths)),
        len(lengths),
        sum(length == FRAME for length in lengths),
        max(lengths),
        sum(length > most for length in lengths),
        next(filter(None, map(tokenizer.unknown_part, list(dict.fromkeys(texts))[:_MOST_SEARCHED])), ""),
    )
    _check(found, config)
    return found


def _no_captions(config: Config, num_read: int) -> str:
    task = next(name for name, weight in vars(config.data.tasks).items() if weight and "text" in name)
    return (
        f"data.tasks.{task}: expected captions in {', '.join(config.data.shards)}, got none in {num_read:,} samples; "
        "give make_shards.py a table with a column `caption`, or set another task"
    )


def _check(found: Captions, config: Config) -> None:
    if found.num_too_long:
        raise UserError(
            f"model.max_text_tokens: expected at least {found.longest}, the tokens of the longest of "
            f"{found.num_read:,} captions that were looked at and the two that frame it, got "
            f"{config.model.max_text_tokens}, which refuses {found.num_too_long:,} of them; raise it, or shorten the "
            "captions"
        )
