"""Kinds of tokens beside those that there are: a small text modality trains beside images, packed or padded."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from cfpretrain.base import runtime
from cfpretrain.core import ar as order
from cfpretrain.core import seeds
from cfpretrain.core.design import make_design
from cfpretrain.core.modalities import MODALITIES, Images, LossTerms, Modality, Vectors, class_segment, join, loss_of
from cfpretrain.core.model import KeyValueCache, Network
from cfpretrain.core.segments import Segment, build_layout, may_attend, pack
from cfpretrain.core.work import count_work
from cfpretrain.training.engine import build_engine
from tests.closeness import disagreement
from tests.processes import run_in_processes
from tests.test_engine import CPU, LEARNING_RATE, toy_config, toy_values, write_toy_values
from tests.test_model import small_model
from tests.test_objective import IDS, LABELS, LOSS, draw, sum_of

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


def predict(model, segments: list[Segment], layout) -> dict[str, Tensor]:
    entering = [one.keep_clean(num) for one, num in zip(segments, layout.num_clean, strict=True)]
    return model(entering, layout.intervals_BMI)


def assert_packed_as_alone(model: Network, samples: list[list[Segment]]) -> None:
    """Losses are those that the samples have alone, and gradients and work add up to theirs."""
    layouts = [build_layout(segments) for segments in samples]
    assert len({layout.step_BM.shape[1] for layout in layouts}) > 1
    model.zero_grad()
    alone = [loss_of(predict(model, *pair), pair[0]) for pair in zip(samples, layouts, strict=True)]
    sum(one.total for one in alone).backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    together, layout = [one for segments in samples for one in segments], pack(layouts)
    packed = loss_of(predict(model, together, layout), together)
    packed.total.backward()
    assert packed.count == sum(one.count for one in alone)
    assert disagreement(packed.total, sum(one.total for one in alone)) < 1e-6  # added up in fp32
    assert disagreement(packed.squared_error_BLP, torch.cat([one.squared_error_BLP for one in alone], 1)) < 1e-12
    for name, parameter in model.named_parameters():
        if not name.endswith("k_norm.bias"):  # softmax ignores it: its gradient is rounding
            assert disagreement(parameter.grad, want[name]) < 1e-10, name
    works = [count_work(*pair, len(layout.step_BM)) for pair in zip(samples, layouts, strict=True)]
    assert count_work(together, layout, len(layout.step_BM)) == sum_of(works)


def test_samples_packed_in_one_row_have_the_losses_that_they_have_alone() -> None:
    """Of different lengths, which no padding evens out."""
    assert_packed_as_alone(small_model().double(), segments_alone([[4, 5], [1, 2, 6], [9], [3, 3, 3]]))


# ---------------------------------------------------------------------------
# A further modality

NUM_WORDS, END, MOST_WORDS, MOST_TEXTS = 11, 0, 16, 2


class WordEmbedder(nn.Module):
    """A word has a place in its text, and the text one among the texts of its sample."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(NUM_WORDS, width)
        self.place_table = nn.Embedding(MOST_WORDS, width)
        self.ordinal_table = nn.Embedding(MOST_TEXTS, width)

    def forward(self, segments: Sequence[Segment]) -> Vectors:
        words = torch.cat([one.clean for one in segments], 1)
        positions = torch.cat([one.positions_BL for one in segments], 1)
        vectors = self.embedding_table(words) + self.place_table(positions % MOST_WORDS)
        vectors = vectors + self.ordinal_table(positions // MOST_WORDS)
        return vectors, None


class Words(Modality):
    """Text, of which each token predicts the next."""

    kind, head_name = "text", "text_head"
    projections = (1, 0)

    def __init__(self, width: int) -> None:
        super().__init__(WordEmbedder(width), nn.Linear(width, NUM_WORDS))

    def empty_segment(self, given: Sequence[Segment], device: torch.device) -> Segment | None:
        nothing_BL = torch.zeros(1, 0, dtype=torch.int64, device=device)
        return None if given else Segment("text", clean=nothing_BL, positions_BL=nothing_BL)

    @staticmethod
    def read(clean_BLD: Tensor, noised_BND: Tensor) -> Tensor:
        return clean_BLD

    @staticmethod
    def loss(prediction: Tensor, segments: Sequence[Segment]) -> LossTerms:
        targets_BL, weights_BL = join([one.targets for one in segments]), join([one.weights_BL for one in segments])
        error_BL = F.cross_entropy(prediction.transpose(1, 2), targets_BL, reduction="none")
        nothing = torch.empty(0, device=prediction.device)
        return LossTerms((error_BL * weights_BL).sum(), int(weights_BL.count_nonzero()), nothing)


@pytest.fixture(autouse=True, scope="module")
def text_is_known() -> Iterator[None]:
    MODALITIES["text"] = Words
    yield
    del MODALITIES["text"]


def words(ids_BL: Tensor, length_B: Tensor, first: bool, ordinal: int = 0) -> Segment:
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
        positions_BL=(torch.arange(L) - begin_B1).clamp(min=0) + MOST_WORDS * ordinal,
        targets=targets,
        weights_BL=(~missing_BL).float(),
    )


def text_network() -> Network:
    return Network([Images(3, 4, 16, True), Words(16)], make_design("causalfusion", 16, 2), depth=2)


def text_model() -> Network:
    torch.manual_seed(0)
    model = text_network()
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
    predicted = model(segments, layout.intervals_BMI)
    of_image, of_text = predicted["image"], predicted["text"]
    assert (of_image.shape, of_text.shape) == ((1, 9, 4), (1, 4, NUM_WORDS))
    loss_of(predicted, segments).total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "k_norm" not in n)
    other = dataclasses.replace(text, clean=torch.tensor([[3, 5, 9, 2]]))
    again = model([segments[0], other], layout.intervals_BMI)
    text_again = again["text"]
    assert torch.equal(again["image"], of_image)
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
        predicted = predict(model, segments, layout)
        of_text, of_image = predicted["text"], predicted["image"]
        alone_work = []
        for i, n in enumerate(lengths.tolist()):
            own_text = words(ids_BL[i : i + 1, :n], torch.tensor([n]), first)
            own_image = Segment(**{
                name: value[i : i + 1] if isinstance(value, Tensor) and name != "steps_BL" else value
                for name, value in vars(learned).items()
            })  # fmt: skip
            own = [own_text, own_image] if first else [own_image, own_text]
            own_layout = build_layout(own)
            alone = predict(model, own, own_layout)
            want_text, want_image = alone["text"], alone["image"]
            got_text = of_text[i : i + 1, 4 - n :] if first else of_text[i : i + 1, :n]
            assert disagreement(got_text, want_text) < 1e-12
            assert disagreement(of_image[i : i + 1], want_image) < 1e-12
            alone_work.append(count_work(own, own_layout))
        work = count_work(segments, layout, 3)
        assert work == sum_of(alone_work)
        assert work.projections["text"] == lengths.sum()


def test_padding_between_a_samples_tokens_is_refused() -> None:
    text = words(torch.ones(2, 4, dtype=torch.int64), torch.tensor([4, 2]), first=False)
    with pytest.raises(ValueError, match="padding of a sample must stand before or after all of its clean tokens"):
        build_layout([text, image(0, 2), text])


def test_intervals_hold_beside_a_cache() -> None:
    """Keys are those of the cache and those of the call: a text in two calls is what it is in one."""
    model = text_model()
    whole = words(torch.tensor([[3, 5, 7, 2]]), torch.tensor([4]), first=False)
    want = model([whole], build_layout([whole]).intervals_BMI)["text"]
    cache, got = KeyValueCache(model.depth, 4), []
    for begin in (0, 2):
        part = Segment(
            "text", clean=whole.clean[:, begin : begin + 2], positions_BL=whole.positions_BL[:, begin : begin + 2]
        )
        rows = torch.arange(begin, begin + 2)
        intervals_BMI = torch.stack([rows * 0, rows + 1, rows * 0, rows * 0], -1)[None].int()
        with torch.no_grad():
            got.append(model([part], intervals_BMI, cache)["text"])
    assert disagreement(torch.cat(got, 1), want) < 1e-12
    assert class_segment(3).steps_BL.shape == (1, 3)


def test_texts_and_images_are_packed() -> None:
    """Samples with other kinds and numbers of segments, and rows whose texts are padded."""
    model, lengths = text_model(), torch.tensor([4, 1, 3])
    ids_BL = seeds.integers(seeds.fold(seeds.key(0, "words"), torch.arange(3)), NUM_WORDS, (4,))
    one, four = torch.tensor([[3, 5, 7, 2]]), torch.tensor([4])
    captioned = [image(0, 1), words(one, four, first=False)]
    interleaved = [words(one, four, True), image(2, 1), words(one + 1, four, False, ordinal=1), image(3, 1)]
    assert_packed_as_alone(model, [captioned, interleaved, [image(1, 1)]])
    padded = [words(ids_BL, lengths, first=True), image(4, 3)]
    assert_packed_as_alone(model, [padded, [image(5, 3)], [image(6, 3), words(ids_BL, lengths.flip(0), first=False)]])


# ---------------------------------------------------------------------------
# Micro-batches that lack a kind of token


def micro_batch(number: int) -> list[Segment]:
    """Of one of four mixtures of kinds; the last one's image is only given."""
    text, learned = words(torch.tensor([[3, 5, 7, 2 + number]]), torch.tensor([4]), first=False), image(number, 1)
    learned = dataclasses.replace(
        learned, clean=learned.clean.float(), noised=learned.noised.float(), targets=learned.targets.float()
    )
    given = Segment(
        "image", torch.zeros(1, 9, dtype=torch.int64), clean=learned.clean, positions_BL=torch.arange(9)[None]
    )
    return [[learned, text], [text], [learned], [given, text]][number % 4]


def mean_loss(model, segments: list[Segment]) -> Tensor:
    terms = loss_of(predict(model, segments, build_layout(segments)), segments)
    return terms.total / terms.count


@pytest.mark.parametrize("number", range(4))
def test_every_parameter_has_a_gradient_whatever_a_micro_batch_lacks(number: int) -> None:
    """Zero where it is not needed; what is predicted and without gradients does not know of it."""
    model, segments = text_model().float(), micro_batch(number)
    mean_loss(model, segments).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    is_idle = {name: bool((p.grad == 0).all()) for name, p in model.named_parameters()}
    lacks_text, lacks_noised = number == 2, number in (1, 3)
    assert is_idle["text_embedder.place_table.weight"] is is_idle["text_head.weight"] is lacks_text
    assert is_idle["image_embedder.t_embedder.mlp.0.weight"] is is_idle["noise_head.linear.weight"] is lacks_noised
    assert is_idle["image_embedder.x_proj.weight"] is (number == 1)
    layout = build_layout(segments)
    predicted = predict(model, segments, layout)
    with torch.no_grad():
        without = predict(model, segments, layout)
    assert predicted.keys() == {"image", "text"}
    assert without.keys() == {kind for kind, values in predicted.items() if values.numel()}
    assert all(torch.equal(predicted[kind], values) for kind, values in without.items())


def train_with_other_kinds(stages: Sequence[int], num_steps: int) -> list[dict[str, NDArray[np.float32]]]:
    """The weights after steps in which ranks have micro-batches of other kinds, at each stage."""
    runtime.start(CPU)
    MODALITIES["text"] = Words
    found = []
    for stage in stages:
        engine = build_engine(text_network, toy_config(stage, "fp32", micro_batch_size=4, clip_grad_norm=0.0), CPU)
        engine.initialise(write_toy_values)
        for step in range(num_steps):
            engine.backward(mean_loss(engine, micro_batch(step + dist.get_rank())))
            assert engine.step(LEARNING_RATE)
        whole = {name: torch.zeros(p.numel()) for name, p in text_network().named_parameters()}
        for fragment in engine.fragments():
            if not fragment.replicated or dist.get_rank() == 0:
                whole[fragment.name][fragment.offset :][: fragment.values.numel()] = fragment.values
        for values in whole.values():
            dist.all_reduce(values)
        found.append({name: values.numpy() for name, values in whole.items()})  # which outlive their process
    return found


def test_ranks_stay_in_step_where_their_micro_batches_lack_other_kinds() -> None:
    """At ZeRO-0 and 3, two ranks arrive where plain torch does with both micro-batches at once."""
    num_steps, stages = 4, (0, 3)
    train = toy_config(0, "fp32").train
    model = text_network()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(toy_values(name, parameter))
    decays = [p for name, p in model.named_parameters() if p.ndim == 2 and "table" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "table" in name]
    groups = [{"params": decays, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, LEARNING_RATE, (train.adam_beta1, train.adam_beta2), train.adam_eps)
    for step in range(num_steps):
        optimizer.zero_grad()
        ((mean_loss(model, micro_batch(step)) + mean_loss(model, micro_batch(step + 1))) / 2).backward()
        optimizer.step()
    for ranks in zip(*run_in_processes(train_with_other_kinds, 2, stages, num_steps, timeout_s=90), strict=True):
        for got in ranks:
            for name, parameter in model.named_parameters():
                if not name.endswith("k_norm.bias"):  # softmax ignores it: Adam makes steps of its gradient's rounding
                    assert disagreement(torch.from_numpy(got[name]), parameter.detach().flatten()) < 1e-5, name
