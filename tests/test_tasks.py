"""What samples are trained as: drawn by sample, in segments that each would have alone."""

import dataclasses
import pickle
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from cfpretrain.core import seeds
from cfpretrain.core.model import CausalFusion
from cfpretrain.core.objective import Batch, DenoisingLoss
from cfpretrain.core.tasks import TASKS, Tasks
from cfpretrain.core.texts import Marks
from tests.closeness import disagreement
from tests.test_objective import LOSS, fields, sum_of

MARKS = Marks(begin=1, end=2, image=3, pad=0)
MIXED = Tasks({"class_to_image": 1.0, "text_to_image": 3.0, "image_to_text": 2.0}, 0.25, 0.5, MARKS)
IDS = torch.arange(24)
TEXTS = [[4 + (i + j) % 7 for j in range(i % 5)] for i in IDS.tolist()]  # some say nothing
# Places in TASKS, and whether the condition is lacking.
CLASS_IMAGE, TEXT_IMAGE, IMAGE_TEXT, IMAGE, TEXT, SEGMENTS = (
    (0, False),
    (1, False),
    (2, False),
    (1, True),
    (2, True),
    (3, False),
)


def with_tasks(tasks: Tasks = MIXED) -> DenoisingLoss:
    return dataclasses.replace(LOSS, tasks=tasks, weights={"text": 0.1})


def make_batch(
    loss: DenoisingLoss, places: list[int], slots: list[tuple[int, bool]] | None = None, skipped=()
) -> Batch:
    ids_B = IDS[places]
    draws = loss.draw(7, 1, ids_B, ids_B % 5, 9, 4)
    if slots is not None:
        task_B, lacks_B = (torch.tensor(values) for values in zip(*slots, strict=True))
        draws = dataclasses.replace(draws, task_B=task_B, lacks_condition_B=lacks_B)
    latents_BCYX = seeds.normal(seeds.fold(seeds.key(0, "latents"), ids_B), (1, 6, 6))
    return loss.prepare(latents_BCYX, draws, skipped, [TEXTS[i] for i in places])


def text_model(num_classes: int = 5, trunk: str = "causalfusion", max_segments: int = 2) -> CausalFusion:
    torch.manual_seed(0)
    sizes = {"grid": 3, "patch_values": 4, "width": 16, "depth": 2, "num_heads": 2}
    texts = {"vocabulary": 11, "max_text_tokens": 8, "max_segments": max_segments, "trunk_kind": trunk}
    model = CausalFusion(**sizes, num_cond_tokens=2, num_classes=num_classes, **texts).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def check_alone(loss: DenoisingLoss, model: CausalFusion, together: Batch, batches: list[Batch]) -> None:
    """Samples have the losses and gradients that they have alone."""
    want = loss(model, together)
    loss.total(want).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    alone = [loss(model, one) for one in batches]
    for kind, terms in want.items():
        assert terms.count == together.counts()[kind] == sum(one[kind].count for one in alone) > 0
        assert disagreement(sum(one[kind].total for one in alone), terms.total) < 1e-6  # added up in fp32
    sum(loss.total(one, together.counts()) for one in alone).backward()
    for name, parameter in model.named_parameters():
        if not name.endswith("k_norm.bias"):  # softmax ignores it: its gradient is rounding
            assert disagreement(parameter.grad, gradients[name]) < 1e-6, name
    assert together.work == sum_of([one.work for one in batches])


def test_tasks_and_drops_have_their_laws() -> None:
    ids_B = torch.arange(30_000)

    def keys(purpose: str) -> Tensor:
        return seeds.fold(seeds.key(0, purpose), ids_B)

    drawn_B2 = torch.stack(MIXED.draw(keys("task"), keys("condition drop")), 1)
    expected = {
        CLASS_IMAGE: 1 / 6,
        TEXT_IMAGE: 1 / 2 * 0.75,
        IMAGE_TEXT: 1 / 3 * 0.5,
        IMAGE: 1 / 2 * 0.25,
        TEXT: 1 / 3 * 0.5,
    }
    found, counts = drawn_B2.unique(dim=0, return_counts=True)
    assert {tuple(row) for row in found.tolist()} == expected.keys()
    for row, count in zip(found.tolist(), counts.tolist(), strict=True):
        share = expected[tuple(row)]
        assert count / len(ids_B) == pytest.approx(share, abs=5 * (share / len(ids_B)) ** 0.5)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_alone_is_always_drawn(task: str) -> None:
    always = Tasks({task: 0.5}, 0.0, 0.0, MARKS)
    draws = with_tasks(always).draw(0, 0, IDS, IDS % 5, 9, 4)
    assert draws.task_B.tolist() == [TASKS.index(task)] * len(IDS)
    assert not draws.lacks_condition_B.any()


def test_tasks_are_functions_of_the_sample_and_change_no_other_draw() -> None:
    loss = with_tasks()
    whole, part = (fields(loss.draw(7, 1, ids_B, ids_B % 5, 9, 4)) for ids_B in (IDS, IDS[[5, 2]]))
    without = fields(LOSS.draw(7, 1, IDS, IDS % 5, 9, 4))
    assert whole.keys() - without.keys() == {"task_B", "lacks_condition_B"}
    assert all(torch.equal(whole[name], value) for name, value in without.items())
    assert all(torch.equal(part[name], value[[5, 2]]) for name, value in whole.items())
    assert not torch.equal(loss.draw(7, 2, IDS, IDS % 5, 9, 4).task_B, whole["task_B"])


def test_classes_among_tasks_are_the_batches_without_tasks() -> None:
    """Bit by bit, so that a step of them costs what it did."""
    batch = make_batch(with_tasks(), [0, 1, 2], [CLASS_IMAGE] * 3)
    plain = make_batch(LOSS, [0, 1, 2])
    got, want = batch.tensors(), plain.tensors()
    assert got.keys() - want.keys() == {"1.ordinal_B"}
    assert all(torch.equal(got[name], value) for name, value in want.items())
    assert (batch.num_clean, batch.work, batch.counts()) == (plain.num_clean, plain.work, plain.counts())


def test_segments_are_those_of_the_tasks() -> None:
    """Texts in their frames, places among a sample's texts and images, and what is learned."""
    batch = make_batch(with_tasks(), [3, 4, 1, 2], [CLASS_IMAGE, TEXT_IMAGE, IMAGE_TEXT, TEXT], skipped=[2])
    assert [one.kind for one in batch.segments] == ["class", "text", "image", "text"]
    of_class, before, image, behind = batch.segments
    words = [[1, *TEXTS[4], 3], [1, *TEXTS[1], 2], [1, *TEXTS[2], 2]]
    assert before.clean[1].tolist() == words[0]
    assert behind.clean[2:].tolist() == [[*words[1], 0], words[2]]
    assert before.targets is None
    lacks = [(~one.is_padding_BL).sum(1).tolist() for one in batch.segments]
    assert lacks == [[2, 0, 0, 0], [0, len(words[0]), 0, 0], [9, 9, 9, 0], [0, 0, len(words[1]), len(words[2])]]
    assert image.ordinal_B[:3].tolist() == [0, 1, 0]
    assert before.ordinal_B[1] == 0
    assert behind.ordinal_B[2:].tolist() == [1, 0]
    assert (image.weights_BL > 0).all(1).tolist() == [True, True, False, False]
    assert behind.weights_BL.sum(1).tolist() == [0, 0, 0, len(words[2]) - 1]
    assert of_class.clean.shape == (4,)
    # What cannot be read counts, with an error of 0, as without texts.
    assert batch.counts() == {"class": 0, "image": 3 * 9 * 4, "text": len(words[2]) - 1}


def test_a_batch_travels_from_workers() -> None:
    batch = make_batch(with_tasks(), IDS.tolist())
    arrived = pickle.loads(pickle.dumps(batch))
    got, want = arrived.tensors(), batch.tensors()
    assert {"place_BM", "1.ordinal_B", "3.is_padding_BL"} <= got.keys() == want.keys()
    assert all(torch.equal(got[name], value) for name, value in want.items())
    assert (arrived.counts(), arrived.work) == (batch.counts(), batch.work)


@pytest.mark.parametrize("clean_multiple", [1, 8])
def test_samples_have_the_losses_and_gradients_that_they_have_alone(clean_multiple: int) -> None:
    model, loss = text_model(), dataclasses.replace(with_tasks(), clean_multiple=clean_multiple)
    together = make_batch(loss, IDS.tolist())
    assert [one.kind for one in together.segments] == ["class", "text", "image", "text"]
    batches = [make_batch(loss, [i]) for i in IDS.tolist()]
    assert len({one.intervals_BMI.shape[1] for one in batches}) > 3
    check_alone(loss, model, together, batches)


def test_the_loss_of_a_kind_is_its_mean_times_its_weight() -> None:
    model, loss = text_model(), with_tasks()
    with torch.no_grad():
        terms = loss(model, make_batch(loss, IDS.tolist()))
        of_images = loss(model, make_batch(loss, [0, 1], [IMAGE, TEXT_IMAGE]))
    image, text = (float(terms[kind].total) / terms[kind].count for kind in ("image", "text"))
    assert float(loss.total(terms)) == pytest.approx(image + 0.1 * text, rel=1e-6)
    assert "text" not in of_images  # without gradients; with them, it is there as a sum of nothing
    assert float(loss.total(of_images)) == pytest.approx(float(of_images["image"].total) / (2 * 9 * 4), rel=1e-6)


# ---------------------------------------------------------------------------
# Interleaved samples

# Texts and images in all orders, empty texts and none at all; one more image than any task of a pair has, and fewer.
SEGMENTS_OF = [
    [[4, 5], None, [6], None, [7, 8, 9]],
    [None, [5, 6, 7]],
    [None, None, None],
    [[], None],
    [[4], None, None, []],
    [None],
]
BOTH = Tasks({"class_to_image": 1.0, "text_to_image": 1.0, "image_to_text": 1.0, "interleaved": 4.0}, 0.5, 0.5, MARKS)


def segments_of(place: int) -> list[list[int] | None]:
    return SEGMENTS_OF[place % len(SEGMENTS_OF)]


def interleaved_batch(
    loss: DenoisingLoss, places: list[int], weights: dict[str, float] | None = None, skipped: Iterable[int] = ()
) -> Batch:
    """Samples with all of their images, whatever they are trained as."""
    if weights is not None:
        loss = dataclasses.replace(loss, tasks=dataclasses.replace(BOTH, weights=weights))
    ids_B = IDS[places]
    segments = [segments_of(place) for place in places]
    num_images = [one.count(None) for one in segments]
    draws = loss.draw(7, 1, ids_B, ids_B % 5, 9, 4, num_images)
    keys = [seeds.fold(seeds.key(0, f"image {n}"), ids_B[i]) for i, of in enumerate(num_images) for n in range(of)]
    latents_BCYX = seeds.normal(torch.stack(keys), (1, 6, 6))
    return loss.prepare(latents_BCYX, draws, tuple(skipped), [TEXTS[i] for i in places], segments)


def test_interleaved_samples_are_their_segments_in_order() -> None:
    batch = interleaved_batch(with_tasks(BOTH), list(range(6)), {"interleaved": 1.0}, skipped=[1])
    assert [one.kind for one in batch.segments] == ["text", "image"] * 3
    found: list[list[tuple[str, int, list[int]]]] = [[] for _ in range(6)]
    learned: list[list[list[float]]] = [[] for _ in range(6)]
    for one in batch.segments:
        for i in range(6):
            if not one.lacks(i):
                kept = slice(None) if one.is_padding_BL is None else ~one.is_padding_BL[i]
                found[i].append(
                    (one.kind, int(one.ordinal_B[i]), one.clean[i][kept].tolist() if one.kind == "text" else [])
                )
                learned[i].append(one.weights_BL[i][kept].tolist())
    image = [("image", n, []) for n in range(5)]
    assert found == [
        [("text", 0, [1, 4, 5, 3]), image[1], ("text", 2, [1, 6, 3]), image[3], ("text", 4, [1, 7, 8, 9, 2])],
        [image[0], ("text", 1, [1, 5, 6, 7, 2])],
        [image[0], image[1], image[2]],
        [("text", 0, [1, 3]), image[1]],
        [("text", 0, [1, 4, 3]), image[1], image[2], ("text", 3, [1, 2])],
        [image[0]],
    ]
    assert [learned[0][i] for i in (0, 2, 4)] == [[1, 1, 1, 0], [1, 1, 0], [1, 1, 1, 1, 0]]
    assert all(min(weights) > 0 for weights in (learned[0][1], learned[0][3], *learned[2]))
    assert {weight for weights in learned[1] for weight in weights} == {0.0}  # it is skipped
    assert batch.counts() == {"class": 0, "image": 10 * 9 * 4, "text": 3 + 2 + 4 + 1 + 2 + 1}


def test_images_of_a_sample_are_drawn_apart() -> None:
    """The first as in any task, and each as whoever else is in the micro-batch has it."""
    loss = with_tasks(BOTH)
    loss = dataclasses.replace(loss, tasks=dataclasses.replace(BOTH, weights={"interleaved": 1.0}))
    num_images = [segments_of(i).count(None) for i in range(6)]
    whole = loss.draw(7, 1, IDS[:6], IDS[:6] % 5, 9, 4, num_images)
    plain = fields(loss.draw(7, 1, IDS[:6], IDS[:6] % 5, 9, 4))
    names = ("order_BL", "steps_BL", "timesteps_B", "noise_BLP")
    sample_I, number_I, given_I = whole.places
    assert given_I.tolist() == list(range(10))
    assert [sample_I.tolist().count(i) for i in range(6)] == num_images
    for name in names:
        of_images = getattr(whole, name)
        assert torch.equal(of_images[number_I == 0], plain[name])
        alone = getattr(loss.draw(7, 1, IDS[[2]], IDS[[2]] % 5, 9, 4, [3]), name)
        assert torch.equal(alone, of_images[sample_I == 2])
        if name != "steps_BL":  # which are few
            assert len({str(one.tolist()) for one in of_images}) == 10
    # Those that are trained as something else have their first image alone.
    first = dataclasses.replace(loss, tasks=MIXED).draw(7, 1, IDS[:6], IDS[:6] % 5, 9, 4, num_images)
    assert first.places.given_I.tolist() == [0, 2, 3, 6, 7, 9]
    assert torch.equal(first.noise_BLP, plain["noise_BLP"])


@pytest.mark.parametrize(
    ("clean_multiple", "ar_split", "trunk"),
    [
        (1, "sample", "causalfusion"),
        (8, "sample", "causalfusion"),
        (8, "batch", "causalfusion"),
        (1, "sample", "llama"),
    ],
)
def test_interleaved_samples_have_the_losses_and_gradients_that_they_have_alone(
    clean_multiple: int, ar_split: str, trunk: str
) -> None:
    """Beside samples of all other tasks, some of which lack an image or a text."""
    ar = dataclasses.replace(LOSS.ar, ar_split=ar_split)
    model, places = text_model(trunk=trunk, max_segments=5), IDS.tolist()
    settings = {"clean_multiple": clean_multiple, "has_rotary": model.has_rotary}
    loss = dataclasses.replace(with_tasks(BOTH), ar=ar, **settings)
    together, batches = interleaved_batch(loss, places), [interleaved_batch(loss, [i]) for i in places]
    assert [one.kind for one in together.segments] == ["class", *["text", "image"] * 3][: len(together.segments)]
    assert len({tuple(part.kind for part in one.segments) for one in batches}) > 5
    check_alone(loss, model, together, batches)


def test_an_interleaved_pair_is_the_task_of_a_pair() -> None:
    """An image and the text behind it are learned alike, whatever the shards call them."""
    pair = make_batch(with_tasks(), [1], [IMAGE_TEXT])
    loss = dataclasses.replace(with_tasks(), tasks=dataclasses.replace(BOTH, weights={"interleaved": 1.0}))
    ids_B = IDS[[1]]
    draws = loss.draw(7, 1, ids_B, ids_B % 5, 9, 4, [1])
    latents_BCYX = seeds.normal(seeds.fold(seeds.key(0, "latents"), ids_B), (1, 6, 6))
    batch = loss.prepare(latents_BCYX, draws, interleaved=[[None, TEXTS[1]]])
    got, want = batch.tensors(), pair.tensors()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_a_batch_of_several_images_a_sample_travels_from_workers() -> None:
    batch = interleaved_batch(with_tasks(BOTH), list(range(8)))
    arrived = pickle.loads(pickle.dumps(batch))
    assert all(torch.equal(arrived.tensors()[name], value) for name, value in batch.tensors().items())
    assert (arrived.counts(), arrived.work) == (batch.counts(), batch.work)


def test_a_model_without_classes_has_no_parameters_of_them() -> None:
    model = text_model(num_classes=0, max_segments=5)
    names = {name for name, _ in model.named_parameters()}
    assert {name for name, _ in text_model(max_segments=5).named_parameters()} - names == {
        "class_embedder.embedding_table.weight",
        "class_embedder.cond_pos_embed",
    }
    loss = dataclasses.replace(with_tasks(BOTH), null_class=0)
    terms = loss(model, interleaved_batch(loss, list(range(6)), {"text_to_image": 1.0, "interleaved": 1.0}))
    loss.total(terms).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
