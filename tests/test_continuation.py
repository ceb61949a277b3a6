"""Images behind prompts, captions and samples that go on: as of forwards without a cache, and each as alone."""

import dataclasses
import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cfpretrain.core import seeds
from cfpretrain.core.ar import steps_from_sizes
from cfpretrain.core.continuation import (
    Drawing,
    Part,
    Writing,
    caption_images,
    continue_samples,
    generate_behind_texts,
)
from cfpretrain.core.latents import take_tokens
from cfpretrain.core.modalities import IMAGE
from cfpretrain.core.model import Network
from cfpretrain.core.process import make_process
from cfpretrain.core.sampler import Guidance, noise_by_image, sampling_orders
from cfpretrain.core.segments import Segment, build_layout
from cfpretrain.core.solvers import Solver
from cfpretrain.core.texts import TEXT, Marks, text_segment
from cfpretrain.core.token_choice import TokenChoice
from cfpretrain.core.writing import writing_keys
from tests.closeness import disagreement
from tests.test_modalities import MOST_WORDS, predict, text_model

L, P, SIZES, SEED = 9, 4, [2, 3, 4], 5
MARKS = Marks(begin=1, end=2, image=3, pad=0)
PROMPTS = [[5, 7, 9], [], [4, 4], [8]]
SOLVER = Solver(make_process(), 3)
SURPRISED = TokenChoice(temperature=2.0, top_k=9, top_p=0.98)


@pytest.fixture(scope="module", params=["causalfusion", "llama"])
def model(request: pytest.FixtureRequest) -> Network:
    """One that learns where tokens are, and one that is told rotary positions."""
    return text_model(request.param).eval()


def photo(number: int) -> Tensor:
    return seeds.normal(seeds.fold(seeds.key(0, "photo"), number), (L, P)).double()


def drawing(guidance: float) -> Drawing:
    return Drawing(L, P, SIZES, SOLVER, SEED, Guidance(guidance))


def writing(choice: TokenChoice, guidance: float = 1.0) -> Writing:
    return Writing(MARKS, MOST_WORDS, SEED, choice, guidance)


# ---------------------------------------------------------------------------
# The same without a cache: one forward over all that is there, laid out as in training


def of_text(tokens: Sequence[int], ordinal: int) -> Segment:
    return dataclasses.replace(text_segment(torch.tensor([list(tokens)])), ordinal_B=torch.tensor([ordinal]))


def of_image(tokens_LP: Tensor, order_L: Tensor, sizes: Sequence[int], ordinal: int) -> Segment:
    clean_1LP = take_tokens(tokens_LP[None].double(), order_L[None])
    return Segment(
        IMAGE,
        steps_from_sizes(sizes)[None],
        is_noised=True,
        clean=clean_1LP,
        noised=torch.zeros_like(clean_1LP),
        positions_BL=order_L[None],
        times_B=torch.zeros(1),
        ordinal_B=torch.tensor([ordinal]),
    )


def forward(model: Network, segments: list[Segment]) -> dict[str, Tensor]:
    with torch.no_grad():
        return predict(model, segments, build_layout(segments))


def plain_text(model: Network, before: list[Segment], prefix: Sequence[int], number: int, how: Writing) -> list[int]:
    ids, keys = [MARKS.begin, *prefix], writing_keys(how.seed, torch.tensor([number]))
    while ids[-1] not in (MARKS.end, MARKS.image):
        with_all = forward(model, [*before, of_text(ids, len(before))])[TEXT][:, -1].float().log_softmax(-1)
        without = forward(model, [of_text(ids, 0)])[TEXT][:, -1].float().log_softmax(-1)
        chosen = how.choice(without + how.guidance * (with_all - without), seeds.fold(keys, len(ids)))
        ids.append(int(chosen) if len(ids) < MOST_WORDS - 1 or chosen == MARKS.image else MARKS.end)
    return ids


def plain_image(model: Network, before: list[Segment], number: int, guidance: float) -> tuple[Tensor, Segment]:
    """The tokens of an image, and the image as those that follow see it."""
    id_1 = torch.tensor([number])
    order_L, draw_noise = sampling_orders(SEED, id_1, L)[0], noise_by_image(SEED, id_1, P)
    tokens_LP, ends = torch.zeros(L, P), list(itertools.accumulate(SIZES))
    for begin, end in zip([0, *ends], ends, strict=False):

        def predicted(noised_1NP: Tensor, time: float, begin: int = begin, end: int = end) -> Tensor:
            found = []
            for seen in (before, []):
                image = of_image(tokens_LP, order_L, SIZES, len(seen))
                noised_1LP = image.noised.clone()
                noised_1LP[:, begin:end] = noised_1NP
                image = dataclasses.replace(image, noised=noised_1LP, times_B=torch.tensor([time]))
                found.append(forward(model, [*seen, image])[IMAGE][:, -L:][:, begin:end].float())
            return found[1] + guidance * (found[0] - found[1])

        places_N = order_L[begin:end]
        tokens_LP[places_N] = SOLVER.denoise(predicted, lambda k, n=places_N: draw_noise(k, n[None]), lambda *_: None)[
            0
        ]
    return tokens_LP, of_image(tokens_LP, order_L, SIZES, len(before))


def plain_continuation(
    model: Network, sample: Sequence[Part], number: int, how: Writing, guidance: float, most: int, first: str | None
) -> list[Part]:
    given, prefix = list(sample), []
    if first is None and given and not isinstance(given[-1], Tensor):
        prefix = given.pop()
    before: list[Segment] = []
    for part, behind in itertools.zip_longest(given, [isinstance(part, Tensor) for part in given[1:]]):
        ends_in_image = first == IMAGE if behind is None else behind
        if isinstance(part, Tensor):
            before.append(of_image(part, torch.arange(L), [L], len(before)))
        else:
            before.append(of_text([MARKS.begin, *part, MARKS.image if ends_in_image else MARKS.end], len(before)))
    added: list[Part] = []
    kind = first or TEXT
    while len(added) < most:
        own_number = int(seeds.fold(torch.tensor(number), len(added))) if added else number
        if kind == TEXT:
            text = plain_text(model, before, [] if added else prefix, own_number, how)
            before.append(of_text(text, len(before)))
            added.append(text[1:-1])
            if text[-1] == MARKS.end:
                return added
        else:
            image, segment = plain_image(model, before, own_number, guidance)
            before.append(segment)
            added.append(image)
        kind = IMAGE if kind == TEXT else TEXT
    return added


# ---------------------------------------------------------------------------


def behind_texts(model: Network, texts: list[list[int]], ids: list[int], guidance: float) -> Tensor:
    number_B = torch.tensor(ids)
    order_BL = sampling_orders(SEED, number_B, L)
    makes = order_BL, SIZES, SOLVER, Guidance(guidance), noise_by_image(SEED, number_B, P)
    return generate_behind_texts(model, texts, MARKS, *makes)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_images_behind_prompts_are_those_of_full_forwards(model: Network, guidance: float) -> None:
    together = behind_texts(model, PROMPTS, [0, 1, 2, 3], guidance)
    for i, prompt in enumerate(PROMPTS):
        alone, _ = plain_image(model, [of_text([MARKS.begin, *prompt, MARKS.image], 0)], i, guidance)
        assert disagreement(together[i], alone) < 1e-5
        assert disagreement(behind_texts(model, [prompt], [i], guidance)[0], alone) < 1e-5
    assert disagreement(together[1], behind_texts(model, [[6, 6]], [1], guidance)[0]) > 1e-4


@pytest.mark.parametrize(("choice", "guidance"), [(TokenChoice(), 1.0), (TokenChoice(), 2.0), (SURPRISED, 1.5)])
def test_captions_are_those_of_full_forwards(model: Network, choice: TokenChoice, guidance: float) -> None:
    images_BLP = torch.stack([photo(i) for i in range(4)])
    prefixes, how = [[], [6], [], [7, 7, 4]], writing(choice, guidance)
    together = caption_images(model, images_BLP, torch.arange(4), how, prefixes)
    for i, prefix in enumerate(prefixes):
        image = of_image(images_BLP[i], torch.arange(L), [L], 0)
        assert together[i] == plain_text(model, [image], prefix, i, how)[1:-1]
        assert together[i][: len(prefix)] == prefix
    assert caption_images(model, images_BLP[2:3], torch.tensor([2]), how) == together[2:3]


SAMPLES: list[list[Part]] = [
    [photo(0), [5], [6, 7]],  # goes on from words
    [photo(2)],
    [],
    [[4, 9], photo(3)],
    [[4, 9, 8]],  # wants an image
    [photo(4), photo(5)],  # wants an image behind images, as in pixels A : A' :: B : ?
    [[8], [5]],  # wants a text of its own
    *([photo(i)] for i in range(6, 12)),
]
FIRST = [None, None, None, None, IMAGE, IMAGE, TEXT, *[None] * 6]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_samples_go_on_as_by_full_forwards(model: Network, guidance: float) -> None:
    """Whatever they begin with, together as alone; the model itself says whether an image follows."""
    how, most = writing(SURPRISED), 2
    ids_B = torch.arange(len(SAMPLES)) + 20
    together = continue_samples(model, SAMPLES, ids_B, how, drawing(guidance), most, FIRST)
    kinds = []
    for i, (sample, first) in enumerate(zip(SAMPLES, FIRST, strict=True)):
        expected = plain_continuation(model, sample, 20 + i, how, guidance, most, first)
        alone = continue_samples(model, [sample], ids_B[i : i + 1], how, drawing(guidance), most, [first])[0]
        for found in (together[i], alone):
            assert len(found) == len(expected)
            for part, other in zip(found, expected, strict=True):
                if isinstance(other, Tensor):
                    assert disagreement(part, other) < 1e-5
                else:
                    assert part == other
        kinds.append([IMAGE if isinstance(part, Tensor) else TEXT for part in expected])
    assert kinds[4] == kinds[5] == [IMAGE, TEXT]
    assert {tuple(one) for one in kinds} == {(TEXT,), (TEXT, IMAGE), (IMAGE, TEXT)}
    assert together[0][0][:2] == [6, 7]
