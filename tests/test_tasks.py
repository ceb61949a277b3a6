"""What samples are trained as: drawn by sample, in segments that each would have alone."""

import dataclasses
import pickle

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
CLASS_IMAGE, TEXT_IMAGE, IMAGE_TEXT, IMAGE, TEXT = (
    [True, False, True, False],
    [False, True, True, False],
    [False, False, True, True],
    [False, False, True, False],
    [False, False, False, True],
)


def with_tasks(tasks: Tasks = MIXED) -> DenoisingLoss:
    return dataclasses.replace(LOSS, tasks=tasks, weights={"text": 0.1})


def make_batch(loss: DenoisingLoss, places: list[int], slots: list[list[bool]] | None = None, skipped=()) -> Batch:
    ids_B = IDS[places]
    draws = loss.draw(7, 1, ids_B, ids_B % 5, 9, 4)
    if slots is not None:
        draws = dataclasses.replace(draws, slots_B4=torch.tensor(slots))
    latents_BCYX = seeds.normal(seeds.fold(seeds.key(0, "latents"), ids_B), (1, 6, 6))
    return loss.prepare(latents_BCYX, draws, skipped, [TEXTS[i] for i in places])


def text_model() -> CausalFusion:
    torch.manual_seed(0)
    sizes = {"grid": 3, "patch_values": 4, "width": 16, "depth": 2, "num_heads": 2}
    model = CausalFusion(
        **sizes, num_cond_tokens=2, num_classes=5, vocabulary=11, max_text_tokens=8, max_segments=2
    ).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_tasks_and_drops_have_their_laws() -> None:
    ids_B = torch.arange(30_000)

    def keys(purpose: str) -> Tensor:
        return seeds.fold(seeds.key(0, purpose), ids_B)

    slots_B4 = MIXED.draw(keys("task"), keys("condition drop"))
    expected = {
        tuple(CLASS_IMAGE): 1 / 6,
        tuple(TEXT_IMAGE): 1 / 2 * 0.75,
        tuple(IMAGE_TEXT): 1 / 3 * 0.5,
        tuple(IMAGE): 1 / 2 * 0.25,
        tuple(TEXT): 1 / 3 * 0.5,
    }
    found, counts = slots_B4.unique(dim=0, return_counts=True)
    assert {tuple(row) for row in found.tolist()} == expected.keys()
    for row, count in zip(found.tolist(), counts.tolist(), strict=True):
        share = expected[tuple(row)]
        assert count / len(ids_B) == pytest.approx(share, abs=5 * (share / len(ids_B)) ** 0.5)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_alone_is_always_drawn(task: str) -> None:
    always = Tasks({task: 0.5}, 0.0, 0.0, MARKS)
    slots_B4 = with_tasks(always).draw(0, 0, IDS, IDS % 5, 9, 4).slots_B4
    wanted = {"class_to_image": CLASS_IMAGE, "text_to_image": TEXT_IMAGE, "image_to_text": IMAGE_TEXT}[task]
    assert slots_B4.tolist() == [wanted] * len(IDS)


def test_tasks_are_functions_of_the_sample_and_change_no_other_draw() -> None:
    loss = with_tasks()
    whole, part = (fields(loss.draw(7, 1, ids_B, ids_B % 5, 9, 4)) for ids_B in (IDS, IDS[[5, 2]]))
    without = fields(LOSS.draw(7, 1, IDS, IDS % 5, 9, 4))
    assert whole.keys() - without.keys() == {"slots_B4"}
    assert all(torch.equal(whole[name], value) for name, value in without.items())
    assert all(torch.equal(part[name], value[[5, 2]]) for name, value in whole.items())
    assert not torch.equal(loss.draw(7, 2, IDS, IDS % 5, 9, 4).slots_B4, whole["slots_B4"])


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


def test_the_loss_of_a_kind_is_its_mean_times_its_weight() -> None:
    model, loss = text_model(), with_tasks()
    with torch.no_grad():
        terms = loss(model, make_batch(loss, IDS.tolist()))
        of_images = loss(model, make_batch(loss, [0, 1], [IMAGE, TEXT_IMAGE]))
    image, text = (float(terms[kind].total) / terms[kind].count for kind in ("image", "text"))
    assert float(loss.total(terms)) == pytest.approx(image + 0.1 * text, rel=1e-6)
    assert "text" not in of_images  # without gradients; with them, it is there as a sum of nothing
    assert float(loss.total(of_images)) == pytest.approx(float(of_images["image"].total) / (2 * 9 * 4), rel=1e-6)
