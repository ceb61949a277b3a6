"""Texts train beside images: packed or padded, before them and behind them, and on ranks that lack either."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from cfpretrain.base import runtime
from cfpretrain.core import ar as order
from cfpretrain.core import seeds
from cfpretrain.core.block import BlockSettings
from cfpretrain.core.design import make_design
from cfpretrain.core.modalities import IMAGE, Images, count_values, loss_of
from cfpretrain.core.model import Network
from cfpretrain.core.segments import Segment, build_layout, may_attend, with_rotary_positions
from cfpretrain.core.texts import Texts, text_segment
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
    placed = with_rotary_positions(segments)
    entering = [one.keep_clean(num) for one, num in zip(placed, layout.num_clean, strict=True)]
    return model(entering, layout.intervals_BMI, place_BM=layout.place_BM)


def assert_packed_as_alone(model: Network, samples: list[list[Segment]]) -> None:
    """Losses are those that the samples have alone, and gradients and work add up to theirs."""
    layouts = [build_layout(segments) for segments in samples]
    assert len({layout.step_BM.shape[1] for layout in layouts}) > 1
    model.zero_grad()
    alone = [loss_of(predict(model, *pair), pair[0]) for pair in zip(samples, layouts, strict=True)]
    sum(one.total for terms in alone for one in terms.values()).backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    together = [one for segments in samples for one in segments]
    layout = build_layout(together, packed=[len(segments) for segments in samples])
    packed = loss_of(predict(model, together, layout), together)
    sum(one.total for one in packed.values()).backward()
    for kind, one in packed.items():
        assert one.count == sum(terms[kind].count for terms in alone)
        assert disagreement(one.total, sum(terms[kind].total for terms in alone)) < 1e-6  # added up in fp32
    errors_BLP = torch.cat([terms[IMAGE].squared_error_BLP for terms in alone], 1)
    assert disagreement(packed[IMAGE].squared_error_BLP, errors_BLP) < 1e-12
    for name, parameter in model.named_parameters():
        if not name.endswith("k_norm.bias"):  # softmax ignores it: its gradient is rounding
            assert disagreement(parameter.grad, want[name]) < 1e-10, name
    works = [count_work(*pair, len(layout.step_BM)) for pair in zip(samples, layouts, strict=True)]
    assert count_work(together, layout, len(layout.step_BM)) == sum_of(works)


def test_samples_packed_in_one_row_have_the_losses_that_they_have_alone() -> None:
    """Of different lengths, which no padding evens out."""
    assert_packed_as_alone(small_model().double(), segments_alone([[4, 5], [1, 2, 6], [9], [3, 3, 3]]))


# ---------------------------------------------------------------------------
# Texts

NUM_WORDS, MOST_WORDS, MOST_SEGMENTS = 11, 8, 4


def words(ids_BL: Tensor, length_B: Tensor, first: bool, ordinal: int = 0) -> Segment:
    """Texts to be learned, of different lengths: padded before their words where they come first, else behind them."""
    B, L = ids_BL.shape
    text = text_segment(ids_BL, length_B, is_learned_B=torch.ones(B, dtype=torch.bool))
    if first:
        place_BL = (torch.arange(L) + length_B[:, None]) % L
        rows = {name: value.expand(B, L).gather(1, place_BL) for name, value in text.tensors().items()}
        text = dataclasses.replace(text, **rows | {"steps_BL": text.steps_BL})
    return dataclasses.replace(text, ordinal_B=torch.full((B,), ordinal))


def text_network(trunk: str = "causalfusion", **changes: Any) -> Network:
    design = make_design(trunk, 16, 2, changes)
    modalities = [Images(3, 4, 16, True), Texts(NUM_WORDS, MOST_WORDS, design)]
    return Network(modalities, design, depth=2, max_segments=MOST_SEGMENTS)


def text_model(trunk: str = "causalfusion", **changes: Any) -> Network:
    torch.manual_seed(0)
    model = text_network(trunk, **changes)
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
        "image_embedder", "text_embedder", "ordinal_table", "trunk", "noise_head", "text_head"
    }  # fmt: skip
    text = words(torch.tensor([[3, 5, 7, 2]]), torch.tensor([4]), first=False)
    segments = [image(0, 1), text]
    layout = build_layout(segments)
    predicted = model(segments, layout.intervals_BMI)
    of_image, of_text = predicted["image"], predicted["text"]
    assert (of_image.shape, of_text.shape) == ((1, 9, 4), (1, 4, NUM_WORDS))
    sum(one.total for one in loss_of(predicted, segments).values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "k_norm" not in n)
    other = dataclasses.replace(text, clean=torch.tensor([[3, 5, 9, 2]]))
    again = model([segments[0], other], layout.intervals_BMI)
    text_again = again["text"]
    assert torch.equal(again["image"], of_image)
    assert torch.equal(text_again[:, :2], of_text[:, :2])
    assert (text_again[:, 2:] != of_text[:, 2:]).any(-1).all()


@pytest.mark.parametrize("separate", [False, True])
def test_texts_of_different_lengths_are_padded_without_effect(separate: bool) -> None:
    """Before the image as behind it, each sample has what it has alone; only padding sees padding, and itself alone."""
    model, lengths = text_model(separate_image_weights=separate), torch.tensor([4, 1, 3])
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
        assert work.text_tokens == lengths.sum()
        assert work.projections["text"] == lengths[lengths > 1].sum()  # of a text of one token none is learned


@pytest.mark.parametrize("separate", [False, True])
def test_samples_that_lack_tokens_anywhere_have_what_they_have_alone(separate: bool) -> None:
    """Texts of other lengths before and between images, samples without a text or an image, several in a row."""
    model = text_model(separate_image_weights=separate)
    ids_BL = seeds.integers(seeds.fold(seeds.key(1, "words"), torch.arange(6)), NUM_WORDS, (4,))
    has_image_B = torch.tensor([True, False, True])
    slots = [
        words(ids_BL[:3], torch.tensor([4, 2, 0]), first=False),
        image(1, 3),
        words(ids_BL[3:], torch.tensor([1, 4, 3]), first=False),
        dataclasses.replace(image(2, 3), is_padding_BL=~has_image_B[:, None].expand(3, 9)),
    ]
    for packed in ((), (2, 2)):
        layout = build_layout(slots, clean_multiple=4, packed=packed)
        assert layout.num_clean_columns % 4 == 0
        assert (layout.is_padding_BM[:, : layout.num_clean_columns].int().diff() >= 0).all()
        predicted = predict(model, slots, layout)
        works = []
        for i in range(3):
            samples = [slots[:2], slots[2:]] if packed else [slots]
            for sample in samples:
                own = [alone for one in sample if (alone := of_sample(one, i)) is not None]
                own_layout = build_layout(own)
                with torch.no_grad():
                    want = predict(model, own, own_layout)
                works.append(count_work(own, own_layout))
                for kind in want:
                    got = torch.cat([
                        part[i : i + 1][:, ~lacks_of(one, i)]
                        for one, part in zip(
                            [one for one in slots if one.kind == kind],
                            predicted[kind].split([one.num_tokens for one in slots if one.kind == kind], 1),
                            strict=True,
                        )
                        if any(one is other for other in sample)
                    ], 1)  # fmt: skip
                    assert disagreement(got, want[kind]) < 1e-12, (packed, i, kind)
        assert count_work(slots, layout, 3) == sum_of(works)


def lacks_of(segment: Segment, sample: int) -> Tensor:
    none = torch.zeros(segment.num_tokens, dtype=torch.bool)
    return none if segment.is_padding_BL is None else segment.is_padding_BL[sample]


def of_sample(segment: Segment, sample: int) -> Segment | None:
    """The tokens that a sample has of a segment; None where it has none."""
    has = ~lacks_of(segment, sample)
    if not has.any():
        return None
    fields = {}
    for name, value in segment.tensors().items():
        own = value[sample % len(value) :][:1]
        fields[name] = own[:, has] if own.ndim > 1 else own
    return dataclasses.replace(segment, **fields | {"is_padding_BL": None})


@pytest.mark.parametrize("separate", [False, True])
def test_texts_and_images_are_packed(separate: bool) -> None:
    """Samples with other kinds and numbers of segments, and rows whose texts are padded."""
    model, lengths = text_model(separate_image_weights=separate), torch.tensor([4, 1, 3])
    ids_BL = seeds.integers(seeds.fold(seeds.key(0, "words"), torch.arange(3)), NUM_WORDS, (4,))
    one, four = torch.tensor([[3, 5, 7, 2]]), torch.tensor([4])
    captioned = [image(0, 1), words(one, four, first=False)]
    interleaved = [words(one, four, True), image(2, 1), words(one + 1, four, False, ordinal=1), image(3, 1)]
    assert_packed_as_alone(model, [captioned, interleaved, [image(1, 1)]])
    padded = [words(ids_BL, lengths, first=True), image(4, 3)]
    assert_packed_as_alone(model, [padded, [image(5, 3)], [image(6, 3), words(ids_BL, lengths.flip(0), first=False)]])


@pytest.mark.parametrize("packed", [(), (3, 1)])
def test_separate_weights_of_images_that_are_those_of_texts_change_nothing(packed: tuple[int, ...]) -> None:
    """Nor do they change a text without an image; and gradients of both add up to those of the shared weights."""
    shared, separate = text_model(), text_model(separate_image_weights=True)
    weights = dict(shared.named_parameters())
    separate.load_state_dict({name: weights[name.replace(".image.", ".")] for name, _ in separate.named_parameters()})
    ids_BL = seeds.integers(seeds.fold(seeds.key(1, "words"), torch.arange(6)), NUM_WORDS, (4,))
    given = words(ids_BL[:3], torch.tensor([4, 2, 0]), first=True)
    segments = [given, image(1, 3), words(ids_BL[3:], torch.tensor([1, 4, 3]), first=False), image(2, 3)]
    layout = build_layout(segments, packed=packed)
    terms = [loss_of(predict(model, segments, layout), segments) for model in (shared, separate)]
    for of_model in terms:
        sum(one.total for one in of_model.values()).backward()
    for kind in terms[0]:
        assert disagreement(terms[1][kind].total, terms[0][kind].total) < 1e-6  # added up in fp32
    sums: dict[str, Tensor] = {}
    for name, parameter in separate.named_parameters():
        assert ".blocks." not in name or "k_norm" in name or parameter.grad.abs().sum() > 0
        ours = name.replace(".image.", ".")
        sums[ours] = sums.get(ours, 0) + parameter.grad
    for name, gradient in sums.items():
        if not name.endswith("k_norm.bias"):  # softmax ignores it: its gradient is rounding
            assert disagreement(gradient, weights[name].grad) < 1e-10, name

    with torch.no_grad():
        for name, parameter in separate.named_parameters():
            if ".image." in name:
                parameter.normal_()
        alone = [predict(model, [segments[2]], build_layout([segments[2]]))["text"] for model in (shared, separate)]
        beside = [predict(model, segments, layout)["text"] for model in (shared, separate)]
    assert disagreement(alone[1], alone[0]) < 1e-12
    assert disagreement(beside[1], beside[0]) > 1e-3


# ---------------------------------------------------------------------------
# Packed, padded and alone, in every backend


def four_samples() -> list[Segment]:
    """In slots, padded: [text that is given | image], [image | text], [image] and [text]."""
    ids_BL = seeds.integers(seeds.fold(seeds.key(2, "words"), torch.arange(8)), NUM_WORDS, (4,))
    has_image_B = torch.tensor([True, True, True, False])
    learned = Segment(**{
        name: value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in vars(image(7, 4)).items()
    })  # fmt: skip
    drawn = dataclasses.replace(
        learned,
        is_padding_BL=~has_image_B[:, None].expand(4, 9),
        weights_BL=has_image_B[:, None].expand(4, 9).float(),
        ordinal_B=torch.tensor([1, 0, 0, 0]),
    )
    before = dataclasses.replace(text_segment(ids_BL[:4], torch.tensor([4, 0, 0, 0])), ordinal_B=torch.zeros(4).long())
    return [before, drawn, words(ids_BL[4:], torch.tensor([0, 3, 0, 2]), first=False, ordinal=1)]


def errors_of_ways(backend: str, ways: Sequence[str], with_gradients: bool) -> dict[str, float]:
    """How far losses, predictions and gradients in a backend are from those that samples have alone, under sdpa."""

    def make(attention: str, way: str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        design = make_design("causalfusion", 32, 1)
        modalities = [Images(3, 4, 32, True), Texts(NUM_WORDS, MOST_WORDS, design)]
        model = Network(modalities, design, 2, BlockSettings(attention=attention), MOST_SEGMENTS)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        slots = four_samples()
        alone = [[one for slot in slots if (one := of_sample(slot, i)) is not None] for i in range(4)]
        rows: list[tuple[list[Segment], list[int]]] = [(slots, [])]
        if way == "packed":
            rows = [([one for own in alone for one in own], [len(own) for own in alone])]
        elif way == "alone":
            rows = [(own, []) for own in alone]
        totals, predicted = Counter(), {"image": [], "text": []}
        with torch.set_grad_enabled(with_gradients):
            for segments, packed in rows:
                found = predict(model, segments, build_layout(segments, packed=packed))
                for kind, terms in loss_of(found, segments).items():
                    totals[kind] = totals[kind] + terms.total
                for kind, prediction in found.items():
                    there = [one for one in segments if one.kind == kind and one.targets is not None]
                    none = [torch.zeros(1, one.num_tokens, dtype=torch.bool) for one in there]
                    pairs = zip(there, none, strict=True)
                    lacks = [no if one.is_padding_BL is None else one.is_padding_BL for one, no in pairs]
                    predicted[kind] += [prediction[~torch.cat(lacks, 1)]] if there else []
            made = {f"loss of {kind}": total.detach() for kind, total in totals.items()}
            made |= {f"predictions of {kind}": torch.cat(parts).detach() for kind, parts in predicted.items()}
            if with_gradients:
                sum(totals.values()).backward()
                made |= {name: p.grad for name, p in model.named_parameters() if not name.endswith("k_norm.bias")}
        return made

    want = make("sdpa", "alone")
    return {
        f"{way}: {name}": disagreement(value, want[name]) for way in ways for name, value in make(backend, way).items()
    }


@pytest.mark.parametrize(
    ("backend", "with_gradients"),
    [("sdpa", True), ("flex", False)],  # the backward of flex needs a GPU; of triton, see test_block_causal
)
def test_packed_and_padded_samples_are_those_alone(backend: str, with_gradients: bool) -> None:
    errors = errors_of_ways(backend, ("packed", "padded"), with_gradients)
    assert len(errors) > (50 if with_gradients else 7)
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


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


def total_loss(model, segments: list[Segment], counts: Mapping[str, float] | None = None) -> Tensor:
    loss = dataclasses.replace(LOSS, weights={"text": 0.5})
    return loss.total(loss_of(predict(model, segments, build_layout(segments)), segments), counts)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("number", range(4))
def test_every_parameter_has_a_gradient_whatever_a_micro_batch_lacks(number: int, separate: bool) -> None:
    """Zero where it is not needed; what is predicted and without gradients does not know of it."""
    model, segments = text_model(separate_image_weights=separate).float(), micro_batch(number)
    total_loss(model, segments).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    is_idle = {name: bool((p.grad == 0).all()) for name, p in model.named_parameters()}
    lacks_text, lacks_noised = number == 2, number in (1, 3)
    assert is_idle["text_embedder.position_table.weight"] is is_idle["text_head.linear.weight"] is lacks_text
    assert is_idle["image_embedder.t_embedder.mlp.0.weight"] is is_idle["noise_head.linear.weight"] is lacks_noised
    assert is_idle["image_embedder.x_proj.weight"] is (number == 1)
    if separate:
        assert is_idle["trunk.blocks.0.image.attn.qkv.weight"] is (number == 1)
        assert is_idle["trunk.blocks.0.attn.qkv.weight"] is lacks_text
    layout = build_layout(segments)
    predicted = predict(model, segments, layout)
    with torch.no_grad():
        without = predict(model, segments, layout)
    assert predicted.keys() == {"image", "text"}
    assert without.keys() == {kind for kind, values in predicted.items() if values.numel()}
    assert all(torch.equal(predicted[kind], values) for kind, values in without.items())


def kinds_at(step: int) -> tuple[int, int]:
    """Which micro-batches two ranks have: of other kinds, and from the fifth step on of the same."""
    return (step, step + 1) if step < 4 else (step, step)


def train_with_other_kinds(
    stages: Sequence[int], num_steps: int, separate: bool
) -> list[dict[str, NDArray[np.float32]]]:
    """The weights after steps in which ranks have micro-batches of other kinds, at each stage."""
    runtime.start(CPU)
    make, found = partial(text_network, separate_image_weights=separate), []
    for stage in stages:
        engine = build_engine(make, toy_config(stage, "fp32", micro_batch_size=4, clip_grad_norm=0.0), CPU)
        engine.initialise(write_toy_values)
        for step in range(num_steps):
            segments = micro_batch(kinds_at(step)[dist.get_rank()])
            counts = {kind: runtime.sum_over_ranks(torch.tensor(n)) / 2 for kind, n in count_values(segments).items()}
            engine.backward(total_loss(engine, segments, counts))
            assert engine.step(LEARNING_RATE)
        whole = {name: torch.zeros(p.numel()) for name, p in make().named_parameters()}
        for fragment in engine.fragments():
            if not fragment.replicated or dist.get_rank() == 0:
                whole[fragment.name][fragment.offset :][: fragment.values.numel()] = fragment.values
        for values in whole.values():
            dist.all_reduce(values)
        found.append({name: values.numpy() for name, values in whole.items()})  # which outlive their process
    return found


@pytest.mark.parametrize("separate", [False, True])
def test_ranks_stay_in_step_where_their_micro_batches_lack_other_kinds(separate: bool) -> None:
    """At every ZeRO stage, two ranks arrive where plain torch does with both micro-batches at once."""
    num_steps, stages = (4, (0, 3)) if separate else (8, (0, 1, 2, 3))
    train = toy_config(0, "fp32").train
    model = text_network(separate_image_weights=separate)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(toy_values(name, parameter))
    decays = [p for name, p in model.named_parameters() if p.ndim == 2 and "table" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "table" in name]
    groups = [{"params": decays, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, LEARNING_RATE, (train.adam_beta1, train.adam_beta2), train.adam_eps)
    for step in range(num_steps):
        optimizer.zero_grad()
        batches = [micro_batch(number) for number in kinds_at(step)]
        counts = Counter()
        for segments in batches:
            counts.update(count_values(segments))
        assert step >= 4 or min(counts["image"], counts["text"]) > 0
        sum(total_loss(model, segments, counts) for segments in batches).backward()
        optimizer.step()
    for ranks in zip(
        *run_in_processes(train_with_other_kinds, 2, stages, num_steps, separate, timeout_s=180), strict=True
    ):
        for got in ranks:
            for name, parameter in model.named_parameters():
                if not name.endswith("k_norm.bias"):  # softmax ignores it: Adam makes steps of its gradient's rounding
                    assert disagreement(torch.from_numpy(got[name]), parameter.detach().flatten()) < 1e-5, name
