"""Generation behind contexts of different lengths: as each alone, and as without a cache."""

import dataclasses

import pytest
import torch
from torch import Tensor

from cfpretrain.core import seeds
from cfpretrain.core.ar import equal_sizes
from cfpretrain.core.context import Context
from cfpretrain.core.modalities import IMAGE
from cfpretrain.core.model import Network
from cfpretrain.core.process import make_process
from cfpretrain.core.sampler import Guidance, generate_image, noise_by_image, sampling_orders
from cfpretrain.core.segments import Segment, build_layout, with_rotary_positions
from cfpretrain.core.solvers import Solver
from cfpretrain.core.texts import TEXT, Marks, pad_texts, text_segment
from cfpretrain.core.token_choice import TokenChoice
from cfpretrain.core.writing import write_texts, writing_keys
from tests.closeness import disagreement
from tests.test_modalities import MOST_WORDS, NUM_WORDS, image, lacks_of, predict, text_model, words

GRID, VALUES = 3, 4
MARKS = Marks(begin=1, end=2, image=3, pad=0)
PROMPTS = [[1, 5, 7, 9, 3], [1, 3], [], [1, 4, 4, 3]]


GROUPED = {"num_kv_heads": 1, "head_width": 6}


@pytest.fixture(
    scope="module",
    params=[
        ("causalfusion", {}),
        ("llama", {}),
        ("gpt2", GROUPED),
        ("qwen3", GROUPED),
        ("qwen3", GROUPED | {"separate_image_weights": True}),
    ],
    ids=["causalfusion", "llama", "gpt2", "qwen3", "separate"],
)
def model(request: pytest.FixtureRequest) -> Network:
    """Some learn where tokens are, some are told rotary positions; with few heads of keys; with separate weights."""
    trunk, changes = request.param
    return text_model(trunk, **changes).eval()


def test_what_is_read_in_parts_is_what_it_is_at_once(model: Network) -> None:
    """Texts padded before or behind their words, images in AR steps; samples that lack a text, or an image."""
    ids_BL = seeds.integers(seeds.fold(seeds.key(1, "words"), torch.arange(6)), NUM_WORDS, (4,))
    lacks_B = torch.tensor([False, True, False])
    slots = [
        words(ids_BL[:3], torch.tensor([4, 2, 0]), first=True, ordinal=0),
        dataclasses.replace(image(1, 3), ordinal_B=torch.full((3,), 1)),
        words(ids_BL[3:], torch.tensor([1, 4, 3]), first=False, ordinal=2),
        dataclasses.replace(image(2, 3), ordinal_B=torch.full((3,), 3), is_padding_BL=lacks_B[:, None].expand(3, 9)),
    ]
    with torch.no_grad():
        wanted = predict(model, slots, build_layout(slots))
    contexts, got = Context(model, 4 + 9 + 4 + 9), {TEXT: [], IMAGE: []}
    for one in slots:
        if one.kind == TEXT:
            got[TEXT].append(contexts.read(one)[TEXT])
            continue
        for places in torch.arange(9).split([2, 3, 4]):
            own = {name: value[:, places] for name, value in one.tensors().items() if value.ndim > 1}
            part = dataclasses.replace(one, **own | {"steps_BL": torch.zeros(1, len(places), dtype=torch.int64)})
            got[IMAGE].append(contexts.predict(dataclasses.replace(part, clean=None, is_padding_BL=None)))
            contexts.read(dataclasses.replace(part, noised=None, is_noised=False), goes_on=int(places[-1]) < 8)
    for kind, parts in got.items():
        lacks_BL = torch.cat(
            [torch.stack([lacks_of(one, i) for i in range(3)]) for one in slots if one.kind == kind], 1
        )
        together = torch.cat(parts, 1)
        assert disagreement(together[~lacks_BL], wanted[kind][~lacks_BL]) < 1e-12, kind


def read_texts(context: Context, texts: list[list[int]], ordinal: int = 0) -> None:
    segment = text_segment(*pad_texts(texts, MARKS.pad))
    context.read(dataclasses.replace(segment, ordinal_B=torch.full((len(texts),), ordinal)))


def draw_images(model: Network, prompts: list[list[int]], ids: list[int], guidance: float) -> Tensor:
    context = Context(model, MOST_WORDS + GRID**2)
    read_texts(context, prompts + ([[] for _ in prompts] if guidance != 1 else []))
    number_B = torch.tensor(ids)
    solver = Solver(make_process(), 3)
    copies = 1 if guidance == 1 else 2
    return generate_image(
        context,
        sampling_orders(0, number_B, GRID**2),
        equal_sizes(GRID**2, 3),
        solver,
        Guidance(guidance),
        noise_by_image(0, number_B, VALUES),
        ordinal_B=torch.ones(copies * len(ids), dtype=torch.int64),
    )


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_images_behind_texts_of_different_lengths_are_those_behind_each_alone(model: Network, guidance: float) -> None:
    together = draw_images(model, PROMPTS, [0, 1, 2, 3], guidance)
    for i, prompt in enumerate(PROMPTS):
        alone = draw_images(model, [prompt], [i], guidance)
        assert disagreement(together[i : i + 1], alone) < 1e-6  # the sampler adds up in fp32


def image_segment(numbers: list[int], has_image: list[bool]) -> Segment:
    values_BLP = seeds.normal(seeds.fold(seeds.key(0, "image"), torch.tensor(numbers)), (GRID**2, VALUES)).double()
    lacks_BL = ~torch.tensor(has_image)[:, None].expand(-1, GRID**2)
    return Segment(
        IMAGE,
        torch.zeros(1, GRID**2, dtype=torch.int64),
        is_padding_BL=None if all(has_image) else lacks_BL,
        clean=values_BLP,
        positions_BL=torch.arange(GRID**2).expand(len(numbers), -1),
        ordinal_B=torch.zeros(len(numbers), dtype=torch.int64),
    )


def write(
    model: Network, numbers: list[int], has_image: list[bool], prefixes: list[list[int]], **options
) -> list[list[int]]:
    context = Context(model, GRID**2 + 2 * MOST_WORDS)
    if any(has_image):
        context.read(image_segment(numbers, has_image))
    ordinal_B = torch.tensor([int(has) for has in has_image])
    keys_B = writing_keys(0, torch.tensor(numbers[: len(prefixes)]))
    return write_texts(context, prefixes, MARKS, MOST_WORDS, keys_B=keys_B, ordinal_B=ordinal_B, **options)


@pytest.mark.parametrize("choice", [TokenChoice(), TokenChoice(temperature=1.5, top_k=8, top_p=0.95)])
def test_texts_behind_other_contexts_are_those_written_alone(model: Network, choice: TokenChoice) -> None:
    numbers, has_image, prefixes = [0, 1, 2, 3, 4], [True, False, True, True, True], [[], [5], [6, 7, 8], [], [9]]
    together = write(model, numbers, has_image, prefixes, choice=choice)
    for i in range(len(numbers)):
        alone = write(model, numbers[i : i + 1], has_image[i : i + 1], prefixes[i : i + 1], choice=choice)
        assert together[i] == alone[0]
        assert together[i][: 1 + len(prefixes[i])] == [MARKS.begin, *prefixes[i]]
        assert together[i][-1] in (MARKS.end, MARKS.image)
        assert len(together[i]) <= MOST_WORDS
    assert len(set(map(len, together))) > 1 or not choice.temperature  # the likeliest tokens may end none


@pytest.mark.parametrize(("last", "end"), [(MARKS.image, MARKS.image), (MARKS.end, MARKS.end), (5, MARKS.end)])
def test_an_image_may_follow_a_text_as_long_as_may_be(model: Network, last: int, end: int) -> None:
    tokens = iter([5] * (MOST_WORDS - 2) + [last])
    (text,) = write(model, [0], [True], [[]], choice=lambda *_: torch.tensor([next(tokens)]))
    assert text == [MARKS.begin, *[5] * (MOST_WORDS - 2), end]


def test_texts_are_those_of_full_forwards(model: Network) -> None:
    for number in range(5):
        (text,) = write(model, [number], [True], [[]], choice=TokenChoice())
        for n in range(1, len(text) - 1):
            words = dataclasses.replace(text_segment(torch.tensor([text[:n]])), ordinal_B=torch.tensor([1]))
            segments = with_rotary_positions([image_segment([number], [True]), words])
            with torch.no_grad():
                logits = model(segments, build_layout(segments).intervals_BMI)[TEXT]
            assert int(logits[0, -1].argmax()) == text[n]


def test_guidance_is_away_from_the_text_without_the_image(model: Network) -> None:
    """At scale 0 only what is without the image counts."""
    numbers, has_image = [0, 1, 0, 1], [True, True, False, False]
    guided = write(model, numbers, has_image, [[], []], choice=TokenChoice(), guidance=1e-9)
    without = write(model, [0, 1], [False, False], [[], []], choice=TokenChoice())
    with_image = write(model, [0, 1], [True, True], [[], []], choice=TokenChoice())
    assert guided == without != with_image
