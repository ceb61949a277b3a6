"""The loss beyond the golden numbers: its draws, and what they may depend on."""

import dataclasses
import pickle
from collections.abc import Sequence

import pytest
import torch
from safetensors.torch import load_file

from cfpretrain.core import ar as order
from cfpretrain.core import seeds
from cfpretrain.core.modalities import IMAGE, LossTerms
from cfpretrain.core.objective import Batch, DenoisingLoss, Draws
from cfpretrain.core.process import make_process
from cfpretrain.core.work import Work
from tests.closeness import disagreement
from tests.golden_cases import FOLDER
from tests.test_model import small_model

LOSS = DenoisingLoss(
    process=make_process(),
    ar=order.ARSettings(),
    patch_size=2,
    num_cond_tokens=2,
    null_class=5,
    label_drop_prob=0.25,
    seed=0,
)
IDS = torch.tensor([3, 141, 59, 26])
LABELS = torch.tensor([0, 1, 2, 3])


def draw(loss: DenoisingLoss = LOSS, step: int = 7, epoch: int = 1, ids=IDS, labels=LABELS) -> Draws:
    return loss.draw(step, epoch, ids, labels, num_tokens=9, patch_values=4)


def with_ar(**knobs) -> DenoisingLoss:
    """The loss with other settings of the AR axis."""
    return dataclasses.replace(LOSS, ar=dataclasses.replace(LOSS.ar, **knobs))


def sum_of(works: Sequence[Work]) -> Work:
    projections = {kind: sum(one.projections[kind] for one in works) for kind in works[0].projections}
    names = ("tokens", "visible", "text_tokens")
    tokens, visible, text_tokens = (sum(getattr(one, name) for one in works) for name in names)
    return Work(tokens, visible, projections, text_tokens)


def loss_of(loss: DenoisingLoss, model, latents_BCYX: torch.Tensor, draws: Draws) -> LossTerms:
    return loss(model, loss.prepare(latents_BCYX, draws))[IMAGE]


def fields(draws: Draws) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(draws).items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize(
    "knobs",
    [
        {"ar_split": "sample"},
        {"ar_split": "batch"},
        {"num_ar_steps": 4, "token_order": "raster"},
        {"num_ar_steps": 4, "ar_step_sizes": "equal", "token_order": "dilated", "block_size": 3},
    ],
)
def test_a_sample_draws_the_same_numbers_in_any_micro_batch(knobs) -> None:
    loss = with_ar(**knobs)
    whole = fields(draw(loss))
    parts = [fields(draw(loss, ids=IDS[i], labels=LABELS[i])) for i in ([2], [0, 3])]
    for name, value in whole.items():
        assert torch.equal(parts[0][name], value[[2]]), name
        assert torch.equal(parts[1][name], value[[0, 3]]), name


def test_epoch_and_seed_renew_every_draw() -> None:
    base = fields(draw())
    for other in (draw(epoch=2), draw(dataclasses.replace(LOSS, seed=1))):
        for name in ("order_BL", "timesteps_B", "noise_BLP"):
            assert not torch.equal(fields(other)[name], base[name]), name
    # The shared size of the last AR step belongs to the optimizer step.
    last = {int(order.step_begin(draw(step=s).steps_BL)[0, -1]) for s in range(20)}
    assert len(last) > 3


def test_draws_have_their_laws() -> None:
    ids = torch.arange(20_000)
    draws = LOSS.draw(0, 0, ids, torch.zeros_like(ids), num_tokens=4, patch_values=1)
    dropped = (draws.labels_B == LOSS.null_class).double().mean()
    assert float(dropped) == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 2e4) ** 0.5)
    t = draws.timesteps_B.double()
    assert float(t.mean()) == pytest.approx(499.5, abs=5 * 288.7 / 2e4**0.5)
    assert (int(t.min()), int(t.max())) == (0, 999)
    # Noise levels and places are independent of each other.
    correlation = torch.corrcoef(torch.stack([t, draws.order_BL[:, 0].double(), draws.noise_BLP[:, 0, 0].double()]))
    assert float((correlation - torch.eye(3)).abs().max()) < 5 / 2e4**0.5


def test_loss_is_the_weighted_mean_over_tokens() -> None:
    """Terms of micro-batches add up to the terms of the whole batch, and weights enter as the AR axis says."""
    model = small_model()
    latents = seeds.normal(seeds.fold(seeds.key(0, "latents"), IDS), (1, 6, 6))
    whole = loss_of(LOSS, model, latents, draw())
    parts = [
        loss_of(LOSS, model, latents[i : i + 2], draw(ids=IDS[i : i + 2], labels=LABELS[i : i + 2])) for i in (0, 2)
    ]
    assert whole.count == sum(p.count for p in parts) == 4 * 9 * 4
    torch.testing.assert_close(whole.total, parts[0].total + parts[1].total, rtol=1e-5, atol=1e-5)
    weights = order.ar_weights(draw().steps_BL, 2.0, 1.0, "linear")
    torch.testing.assert_close(
        whole.total, (whole.squared_error_BLP * weights.unsqueeze(-1)).sum(), rtol=1e-5, atol=1e-5
    )


def test_a_skipped_sample_has_no_weight_and_is_counted() -> None:
    """As one whose weights alone are 0; the others' losses and gradients are those of the batch without it."""
    latents = seeds.normal(seeds.fold(seeds.key(0, "latents"), IDS), (1, 6, 6))

    def gradients_of(batch: Batch) -> tuple[LossTerms, list[torch.Tensor]]:
        model = small_model()
        terms = LOSS(model, batch)[IMAGE]
        terms.total.backward()
        return terms, [value.grad for value in model.parameters() if value.grad is not None]

    skipped, its_gradients = gradients_of(LOSS.prepare(latents, draw(), [1, 3]))
    kept = [0, 2]
    rest, gradients = gradients_of(LOSS.prepare(latents[kept], draw(ids=IDS[kept], labels=LABELS[kept])))
    assert disagreement(skipped.total, rest.total) < 1e-5
    assert skipped.count == 2 * rest.count
    assert all(disagreement(ours, theirs) < 1e-4 for ours, theirs in zip(its_gradients, gradients, strict=True))
    every, none = gradients_of(LOSS.prepare(latents, draw(), range(4)))
    assert (every.total.item(), every.count) == (0.0, skipped.count)
    assert not any(value.any() for value in none)


def test_a_zero_head_predicts_nothing() -> None:
    """At the start the prediction is 0, so a token's error is its noise's square: the loss knows the order it used."""
    model = small_model(random_head=False)
    draws = draw()
    terms = loss_of(LOSS, model, torch.zeros(4, 1, 6, 6), draws)
    noise_in_order = torch.gather(draws.noise_BLP.square().mean(-1), 1, draws.order_BL)
    torch.testing.assert_close(terms.squared_error_BLP.mean(-1), noise_in_order)


def test_ablations_reach_the_draws() -> None:
    """A plain diffusion transformer, pure autoregression, and blocks in raster order."""
    dit = draw(with_ar(num_ar_steps=1))
    assert dit.steps_BL.unique().tolist() == [0]
    pure = draw(with_ar(num_ar_steps=9, ar_step_sizes="equal"))
    assert torch.equal(pure.steps_BL, torch.arange(9).expand(4, -1))
    blocks = with_ar(num_ar_steps=4, ar_step_sizes="equal", token_order="block_raster", block_size=2).draw(
        7, 1, IDS, LABELS, num_tokens=16, patch_values=4
    )
    assert torch.equal(blocks.order_BL, order.fixed_order(4, "block_raster", 2).expand(4, -1))
    assert torch.equal(blocks.steps_BL, (torch.arange(16) // 4).expand(4, -1))
    # Nothing else moves with them.
    for other in (dit, pure):
        for name in ("labels_B", "order_BL", "timesteps_B", "noise_BLP"):
            assert torch.equal(fields(other)[name], fields(draw())[name]), name


@pytest.mark.parametrize(
    ("knobs", "num_rows"),
    [
        ({}, 4),
        ({"num_ar_steps": 3}, 4),
        ({"ar_split": "batch"}, 1),
        ({"num_ar_steps": 4, "ar_step_sizes": "equal"}, 1),
        ({"num_ar_steps": 1}, 1),
    ],
    ids=str,
)
def test_a_shared_split_is_one_row_for_all_samples(knobs, num_rows) -> None:
    """And changes nothing: each sample alone has the same loss."""
    loss, model = with_ar(**knobs), small_model()
    latents = seeds.normal(seeds.fold(seeds.key(0, "latents"), IDS), (1, 6, 6))
    rows = []

    def watched(segments, intervals_BMI, place_BM=None):
        rows.append(len(intervals_BMI))
        return model(segments, intervals_BMI)

    batch = loss.prepare(latents, draw(loss))
    whole = loss(watched, batch)[IMAGE]
    assert rows == [num_rows]
    alone = [loss.prepare(latents[[i]], draw(loss, ids=IDS[[i]], labels=LABELS[[i]])) for i in range(4)]
    errors = [loss(model, one)[IMAGE].squared_error_BLP for one in alone]
    assert disagreement(whole.squared_error_BLP, torch.cat(errors)) < 1e-5
    assert batch.work == sum_of([one.work for one in alone])


@pytest.mark.parametrize("clean_multiple", [2, 4, 9])
@pytest.mark.parametrize("split", ["sample", "batch"])
def test_padding_changes_nothing_but_the_length(clean_multiple, split) -> None:
    # In fp64, where rounding of other summation orders cannot hide a difference.
    model, latents = small_model().double(), seeds.normal(seeds.fold(seeds.key(0, "latents"), IDS), (1, 6, 6))
    plain = with_ar(ar_split=split)
    padded = dataclasses.replace(plain, clean_multiple=clean_multiple)
    lengths = []
    for step in range(20):
        seen = []

        def watched(segments, intervals_BMI, seen=seen, place_BM=None):
            seen.append((model(segments, intervals_BMI), intervals_BMI.shape[1]))
            return seen[-1][0]

        draws = draw(plain, step=step)
        batch, padded_batch = plain.prepare(latents, draws), padded.prepare(latents, draws)
        want, got = plain(watched, batch)[IMAGE], padded(watched, padded_batch)[IMAGE]
        (predicted, length), (padded_predicted, padded_length) = seen
        torch.testing.assert_close(padded_predicted["image"], predicted["image"], rtol=0, atol=1e-12)
        torch.testing.assert_close(got.total, want.total, rtol=1e-6, atol=0)
        # FLOPs are of useful work: padding is none.
        counts = [(b.work, t.count) for b, t in ((batch, want), (padded_batch, got))]
        assert counts[0] == counts[1]
        assert batch.work.tokens == 4 * length
        lengths.append((length, padded_length))
    assert any(length < padded_length for length, padded_length in lengths)
    assert {n for _, n in lengths} <= {2 + 9 + min(i * clean_multiple, 9) for i in range(9)}


# ---------------------------------------------------------------------------
# Ready batches


# Settings of the AR axis, and others.
GOLDEN = {
    "sample": ({}, {}),
    "batch_padded": ({"ar_split": "batch"}, {"clean_multiple": 4}),
    "equal_dilated_cosine": (
        {
            "num_ar_steps": 4,
            "ar_step_sizes": "equal",
            "token_order": "dilated",
            "block_size": 3,
            "ar_weight_schedule": "cosine",
        },
        {},
    ),
    "raster_padded": ({"token_order": "raster"}, {"clean_multiple": 4, "seed": 7}),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_batches_are_those_that_runs_have_trained_on(name: str) -> None:
    """Of the version that drew and laid out in the training thread: a run that goes on sees the same numbers."""
    tensors = load_file(FOLDER / "batches.safetensors")
    want = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
    knobs, others = GOLDEN[name]
    loss = dataclasses.replace(with_ar(**knobs), **others)
    batch = loss.prepare(seeds.normal(seeds.fold(seeds.key(0, "latents"), IDS), (1, 6, 6)), draw(loss))
    image = batch.of_kind("image").keep_clean(batch.num_clean[1])
    names = {"clean_BLP": "clean", "noised_BLP": "noised", "target_BLP": "targets", "timesteps_B": "times_B"}
    names |= {"order_BL": "positions_BL", "positions_BL": "positions_BL"} | {key: key for key in image.tensors()}
    got = {key: getattr(image, name) for key, name in names.items()} | batch.tensors()
    got["labels_B"] = batch.of_kind("class").clean
    counts = want.pop("counts").tolist()
    assert counts == [image.targets.numel(), batch.work.tokens, batch.work.visible]
    for key, value in want.items():
        assert got[key].dtype == value.dtype, key
        if value.dtype.is_floating_point:
            # The logarithms and roots in a normal number are rounded as the processor's vector units do.
            assert float((got[key] - value).norm()) <= 1e-6 * float(value.norm()), key
        else:
            assert torch.equal(got[key], value), key


@pytest.mark.parametrize("last", [1, 9])
def test_a_batch_that_is_pickled_is_the_same(last: int) -> None:
    """It travels from the loader's workers packed into one tensor; parts of it may be empty, or shared by samples."""
    latents = seeds.normal(seeds.fold(seeds.key(0, "latents"), IDS), (1, 6, 6))
    draws = dataclasses.replace(draw(), steps_BL=(torch.arange(9) >= 9 - last).long().expand(4, 9))
    batch = LOSS.prepare(latents, draws)
    assert batch.num_clean == (2, 9 - last)
    again = pickle.loads(pickle.dumps(batch))
    for got, want in ((again, batch), *zip(again.segments, batch.segments, strict=True)):
        assert vars(got).keys() == vars(want).keys()
        for name, value in vars(want).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(vars(got)[name], value), name
            else:
                assert name == "segments" or vars(got)[name] == value, name
    assert len({value.untyped_storage().data_ptr() for value in again.tensors().values()}) == 1


@pytest.mark.gpu
def test_a_batch_is_pinned_where_samples_share_their_rows() -> None:
    loss = with_ar(ar_split="batch", token_order="raster")
    batch = loss.prepare(torch.zeros(4, 1, 6, 6), draw(loss))
    image = batch.of_kind("image")
    assert image.steps_BL.stride(0) == image.positions_BL.stride(0) == 0
    pinned = batch.pin_memory()
    assert all(tensor.is_pinned() for tensor in pinned.tensors().values())
    assert torch.equal(pinned.of_kind("image").positions_BL, image.positions_BL)


def test_a_batch_moves_with_all_its_tensors() -> None:
    batch = LOSS.prepare(torch.zeros(4, 1, 6, 6), draw())
    moved = batch.to("meta")
    assert isinstance(moved, Batch)
    assert len(moved.tensors()) == 11
    for name, value in batch.tensors().items():
        assert moved.tensors()[name].device.type == "meta"
        assert moved.tensors()[name].shape == value.shape
    assert (moved.step, moved.num_clean, moved.work) == (7, batch.num_clean, batch.work)
