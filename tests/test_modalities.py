"""Kinds of tokens beside those that there are: a small text modality trains beside images, packed or padded."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfpretrain.core import ar as order
from cfpretrain.core import seeds
from cfpretrain.core.modalities import Images, LossTerms, Modality, Vectors, class_segment
from cfpretrain.core.model import KeyValueCache, Network
from cfpretrain.core.segments import Segment, build_layout, count_work, may_attend, pack
from tests.closeness import disagreement
from tests.test_model import small_model
from tests.test_objective import IDS, LABELS, LOSS, draw

LATENTS = seeds.normal(seeds.fold(seeds.key(0, "latents"), IDS), (1, 6, 6))


# ---------------------------------------------------------------------------
# Packing


def segments_alone(splits: Sequence[Sequence[int]]) -> list[list[Segment]]:
    """For each sample [class | image] with its values, targets and weights, of one row."""
    found = []
    for i, sizes in enumerate(splits):
        drawn = draw(ids=IDS[[i]], labels=LABELS[[i]])
        drawn = dataclasses.replace(drawn, steps_BL=order.steps_from_sizes(sizes)[None])
        found.append(list(LOSS.prepare(LATENTS[[i]], drawn).segments))
    return found


def loss_of(model: Network, segments: list[Segment], layout) -> list[LossTerms]:
    entering = [one.keep_clean(num) for one, num in zip(segments, layout.num_clean, strict=True)]
    learned = [one for one in entering if one.targets is not None]
    predictions = model(entering, layout.intervals_BMI)
    return [Images.loss(prediction, one) for prediction, one in zip(predictions, learned, strict=True)]


def test_samples_packed_in_one_row_have_the_losses_that_they_have_alone() -> None:
    """Of different lengths, which no padding evens out; gradients add up to those of the samples alone."""
    model = small_model().double()
    samples = segments_alone([[4, 5], [1, 2, 6], [9], [3, 3, 3]])
    layouts = [build_layout(segments) for segments in samples]
    assert len({layout.step_BM.shape[1] for layout in layouts}) > 2
    alone = [loss_of(model, *pair)[0] for pair in zip(samples, layouts, strict=True)]
    sum(one.total for one in alone).backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    together, layout = [one for segments in samples for one in segments], pack(layouts)
    packed = loss_of(model, together, layout)
    sum(one.total for one in packed).backward()
    for got, expected in zip(packed, alone, strict=True):
        assert disagreement(got.total, expected.total) < 1e-12
        assert disagreement(got.squared_error_BLP, expected.squared_error_BLP) < 1e-12
    for name, parameter in model.named_parameters():
        if not name.endswith("k_norm.bias"):  # softmax ignores it: its gradient is rounding
            assert disagreement(parameter.grad, want[name]) < 1e-10, name
    works = [count_work(*pair) for pair in zip(samples, layouts, strict=True)]
    assert count_work(together, layout) == tuple(map(sum, zip(*works, strict=True)))


# ---------------------------------------------------------------------------
# A further modality

NUM_WORDS, END = 11, 0


class WordEmbedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(NUM_WORDS, width)
        self.place_table = nn.Embedding(16, width)

    def forward(self, segments: Sequence[Segment]) -> list[Vectors]:
        words = torch.cat([one.clean for one in segments], 1)
        places = torch.cat([one.positions_BL for one in segments], 1)
        vectors = self.embedding_table(words) + self.place_table(places)
        return [(piece, None) for piece in vectors.split([one.clean.shape[1] for one in segments], 1)]


class Words(Modality):
    """Text, of which each token predicts the next."""

    kind, head_name = "text", "text_head"

    def __init__(self, width: int) -> None:
        super().__init__(WordEmbedder(width), nn.Linear(width, NUM_WORDS))

    @staticmethod
    def read(clean_BLD: Tensor, noised_BND: Tensor) -> Tensor:
        return clean_BLD

    @staticmethod
    def loss(prediction: Tensor, segment: Segment) -> LossTerms:
        error_BL = F.cross_entropy(prediction.transpose(1, 2), segment.targets, reduction="none")
        return LossTerms((error_BL * segment.weights_BL).sum(), int(segment.weights_BL.count_nonzero()), error_BL)


def words(ids_BL: Tensor, length_B: Tensor, first: bool) -> Segment:
    """Texts of different lengths: padded before their words where they come first, else behind them."""
    L = ids_BL.shape[1]
    missing_BL = torch.arange(L) >= length_B[:, None]
    if first:
        ids_BL = torch.stack([row.roll(L - int(n)) for row, n in zip(ids_BL, length_B, strict=True)])
        missing_BL = missing_BL.flip(1)
    targets = torch.cat([ids_BL[:, 1:], torch.full_like(ids_BL[:, :1], END)], 1)
    begin_B1 = missing_BL.int().argmin(1, keepdim=True)
    return Segment(
        "text",
        torch.arange(L)[None],
        is_padding_BL=missing_BL,
        clean=ids_BL,
        positions_BL=(torch.arange(L) - begin_B1).clamp(min=0),
        targets=targets,
        weights_BL=(~missing_BL).float(),
    )


def text_model() -> Network:
    torch.manual_seed(0)
    model = Network([Images(3, 4, 16, True), Words(16)], width=16, depth=2, num_heads=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.double()


def image(number: int, batch_size: int) -> Segment:
    values = seeds.normal(seeds.fold(seeds.key(number, "image"), torch.arange(3 * batch_size)), (9, 4)).double()
    clean, noised, targets = values.chunk(3)
    return Segment(
        "image",
        order.steps_from_sizes([2, 3, 4])[None],
        is_noised=True,
        clean=clean,
        noised=noised,
        positions_BL=torch.arange(9).expand(batch_size, -1),
        times_B=torch.full((batch_size,), 500),
        targets=targets,
        weights_BL=torch.ones(batch_size, 9),
    )


def test_a_text_is_trained_beside_an_image() -> None:
    """Its parameters have names of their own, the trunk's and the image's stay; words see what comes before alone."""
    model = text_model()
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {
        "image_embedder", "text_embedder", "trunk", "noise_head", "text_head"
    }  # fmt: skip
    text = words(torch.tensor([[3, 5, 7, 2]]), torch.tensor([4]), first=False)
    segments = [image(0, 1), text]
    layout = build_layout(segments)
    of_image, of_text = model(segments, layout.intervals_BMI)
    assert (of_image.shape, of_text.shape) == ((1, 9, 4), (1, 4, NUM_WORDS))
    (Words.loss(of_text, text).total + Images.loss(of_image, segments[0]).total).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "k_norm" not in n)
    other = dataclasses.replace(text, clean=torch.tensor([[3, 5, 9, 2]]))
    image_again, text_again = model([segments[0], other], layout.intervals_BMI)
    assert torch.equal(image_again, of_image)
    assert torch.equal(text_again[:, :2], of_text[:, :2])
    assert (text_again[:, 2:] != of_text[:, 2:]).any(-1).all()


def test_texts_of_different_lengths_are_padded_without_effect() -> None:
    """Before the image as behind it, each sample has what it has alone; only padding sees padding, and itself alone."""
    model, lengths = text_model(), torch.tensor([4, 1, 3])
    ids_BL = seeds.integers(seeds.fold(seeds.key(0, "words"), torch.arange(3)), NUM_WORDS, (4,))
    for first in (True, False):
        text, learned = words(ids_BL, lengths, first), image(1, 3)
        segments = [text, learned] if first else [learned, text]
        layout = build_layout(segments)
        mask = may_attend(layout.intervals_BMI, layout.step_BM.shape[1])
        assert mask.diagonal(dim1=1, dim2=2).all()
        padding = layout.is_padding_BM
        assert not (mask & padding[:, None] & ~torch.eye(mask.shape[1], dtype=torch.bool)).any()
        predicted = model([one.keep_clean(n) for one, n in zip(segments, layout.num_clean, strict=True)],
                          layout.intervals_BMI)  # fmt: skip
        of_text, of_image = predicted if first else predicted[::-1]
        alone_work = []
        for i, n in enumerate(lengths.tolist()):
            own_text = words(ids_BL[i : i + 1, :n], torch.tensor([n]), first)
            own_image = Segment(**{
                name: value[i : i + 1] if isinstance(value, Tensor) and name != "steps_BL" else value
                for name, value in vars(learned).items()
            })  # fmt: skip
            own = [own_text, own_image] if first else [own_image, own_text]
            own_layout = build_layout(own)
            alone = model([one.keep_clean(k) for one, k in zip(own, own_layout.num_clean, strict=True)],
                          own_layout.intervals_BMI)  # fmt: skip
            want_text, want_image = alone if first else alone[::-1]
            got_text = of_text[i : i + 1, 4 - n :] if first else of_text[i : i + 1, :n]
            assert disagreement(got_text, want_text) < 1e-12
            assert disagreement(of_image[i : i + 1], want_image) < 1e-12
            alone_work.append(count_work(own, own_layout))
        assert count_work(segments, layout, 3) == tuple(map(sum, zip(*alone_work, strict=True)))


def test_padding_between_a_samples_tokens_is_refused() -> None:
    text = words(torch.ones(2, 4, dtype=torch.int64), torch.tensor([4, 2]), first=False)
    with pytest.raises(ValueError, match="padding of a sample must stand before or after all of its clean tokens"):
        build_layout([text, image(0, 2), text])


def test_intervals_hold_beside_a_cache() -> None:
    """Keys are those of the cache and those of the call: a text in two calls is what it is in one."""
    model = text_model()
    whole = words(torch.tensor([[3, 5, 7, 2]]), torch.tensor([4]), first=False)
    (want,) = model([whole], build_layout([whole]).intervals_BMI)
    cache, got = KeyValueCache(model.depth, 4), []
    for begin in (0, 2):
        part = Segment(
            "text", clean=whole.clean[:, begin : begin + 2], positions_BL=whole.positions_BL[:, begin : begin + 2]
        )
        rows = torch.arange(begin, begin + 2)
        intervals_BMI = torch.stack([rows * 0, rows + 1, rows * 0, rows * 0], -1)[None].int()
        with torch.no_grad():
            got += model([part], intervals_BMI, cache)
    assert disagreement(torch.cat(got, 1), want) < 1e-12
    assert class_segment(3).steps_BL.shape == (1, 3)
