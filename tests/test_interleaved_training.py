"""Runs on interleaved samples beside other tasks: alike on any ranks and from images, resumed to the bit, refused."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cfpretrain.base import config as configs
from cfpretrain.base import config_checks
from cfpretrain.base.console import EXIT_USER_ERROR, UserError
from cfpretrain.data.compatibility import check_infos
from cfpretrain.data.loader import Loader
from cfpretrain.data.online import open_training_data
from cfpretrain.data.tokenizer import TextTokenizer
from cfpretrain.run import build
from examples.digits.loss_map import measure_loss_map, read_means
from tests import folders
from tests.digits import small_run, write_digits
from tests.interleaved import MOST_SEGMENTS, PATTERNS, write_shards
from tests.processes import run_script

TRAIN, NUM_STEPS = "cfpretrain/train.py", 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of images, latents of their pixels, and a tokenizer; tests read them only."""
    folder = tmp_path_factory.mktemp("interleaved")
    write_shards(folder, 60)
    texts = [part for pattern in PATTERNS for part in pattern if isinstance(part, str)]
    tokenizer = TextTokenizer.train(texts + [f"row {i}" for i in range(60)], 280)
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    return folder


def knobs(data: Path, *overrides: str) -> list[str]:
    size = TextTokenizer.load(data / "tokenizer.json", "").size
    return [
        f"train.num_steps={NUM_STEPS}",
        f"data.tokenizer={data / 'tokenizer.json'}",
        "data.latent_shift=[0.5]",
        "data.latent_scale=[2.0]",
        f"model.vocabulary={size}",
        "model.max_text_tokens=24",
        f"model.max_segments={MOST_SEGMENTS}",
        "model.num_classes=0",
        "data.tasks.class_to_image=0",
        "data.tasks.text_to_image=1",
        "data.tasks.image_to_text=1",
        "data.tasks.interleaved=3",
        "train.text_loss_weight=0.5",
        *overrides,
    ]


def config_of(data: Path, folder: Path, *overrides: str) -> configs.Config:
    _, path, *rest = small_run(data / "latents", folder, *knobs(data, *overrides))
    return configs.load(path, rest)


def train(shards: Path, folder: Path, num_ranks: int, *overrides: str) -> list[dict[str, Any]]:
    for ended in run_script(TRAIN, small_run(shards, folder, *knobs(shards.parent, *overrides)), num_ranks):
        assert ended.code == 0, ended.err
    return folders.rows(folder)


TWO_RANKS = ("engine.zero_stage=3", "train.micro_batch_size=2", "checkpoint.keep_last=2", "data.num_workers=1")
NAMES = ("loss", "loss_image", "loss_text", "grad_norm", "num_image_values", "num_text_values")


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From latents, on two ranks at ZeRO-3, in micro-batches of other segments on each."""
    folder = tmp_path_factory.mktemp("runs") / "two_ranks"
    train(data / "latents", folder, 2, *TWO_RANKS)
    return folder


def test_ranks_micro_batches_and_workers_change_no_loss(data: Path, run: Path, tmp_path: Path) -> None:
    config = config_of(data, tmp_path, "train.micro_batch_size=2")
    loader = Loader(config, build.make_prepare(config), 0, 2)
    batches = [batch for _ in range(NUM_STEPS) for batch in next(loader)]
    loader.close()
    assert len({tuple(one.kind for one in batch.segments) for batch in batches}) > 4
    assert any(batch.counts()["text"] == 0 for batch in batches)

    alone = train(data / "latents", tmp_path / "alone", 1, "train.micro_batch_size=16", "data.num_workers=0")
    rows = folders.rows(run)
    assert len(rows) == len(alone) == NUM_STEPS
    for row, other in zip(rows, alone, strict=True):
        for name in NAMES:
            assert row[name] == pytest.approx(other[name], rel=1e-4), name
    assert rows[-1]["loss_text"] < rows[0]["loss_text"]
    assert max(row["num_image_values"] for row in rows) > 16 * config.model.num_tokens * config.model.patch_values


def test_images_that_are_encoded_meanwhile_give_the_same_losses(data: Path, run: Path, tmp_path: Path) -> None:
    rows = train(data / "shards", tmp_path / "images", 2, *TWO_RANKS, "data.encode_batch_size=3")
    assert [[row[name] for name in NAMES] for row in rows] == [
        [row[name] for name in NAMES] for row in folders.rows(run)
    ]


def test_a_resumed_run_has_the_same_losses_bit_by_bit(data: Path, run: Path, tmp_path: Path) -> None:
    """As after a kill behind the checkpoint of step 4."""
    folder = tmp_path / "again"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "checkpoints" / f"step_{NUM_STEPS:08d}")
    (folder / "summary.json").unlink()
    (folder / "metrics.jsonl").unlink()
    again, wanted = train(data / "latents", folder, 2, *TWO_RANKS), folders.rows(run)[NUM_STEPS // 2 :]
    assert [row["step"] for row in again] == [row["step"] for row in wanted]
    assert [[row[name] for name in NAMES] for row in again] == [[row[name] for name in NAMES] for row in wanted]


def test_grids_of_interleaved_samples_alone_have_no_condition_or_prompts(data: Path, tmp_path: Path) -> None:
    alone = ["data.tasks.text_to_image=0", "data.tasks.image_to_text=0", "sample.num_per_class=3"]
    for name, prompts in (("none", []), ("given", ["sample.prompts=[row 1,row 2]"])):
        folder = tmp_path / name
        ended = run_script(TRAIN, small_run(data / "latents", folder, *knobs(data, *alone, *prompts)), 1)[0]
        assert ended.code == 0, ended.err
        assert f"sampling {6 if prompts else 3} images at step {NUM_STEPS}" in ended.out
        assert "drawing samples failed" not in ended.out
        assert list((folder / "samples").glob("step_*.png"))


def test_a_step_is_made_again_with_each_of_its_images(run: Path) -> None:
    ended = run_script("tools/replay.py", [str(run), "--step", "6"], 2)
    assert [one.code for one in ended] == [0, 0], ended[0].err
    result = json.loads((run / "replay" / "step_00000006" / "samples.json").read_text())
    assert result["equal"]
    images = [(sample["id"], sample["image"]) for sample in result["samples"]]
    assert len(set(images)) == len(images) > 16
    assert max(image for _, image in images) == 2
    assert (run / "replay" / "step_00000006" / "samples.png").is_file()


def test_a_run_without_classes_has_its_pictures_and_loss_map(data: Path, run: Path) -> None:
    found = build.find_checkpoint(run)
    assert found.class_names() == ()
    assert len(list((run / "samples").glob("*.png"))) == 2
    for shards in ("latents", "shards"):
        config = config_of(data, run, f"data.shards={data / shards}")
        latents_NCYX, labels_N, _ = read_means(open_training_data(config), config, 7)
        assert latents_NCYX.shape == (7, 1, 8, 8)
        scaled = build.make_scaling(config).to_model(latents_NCYX)
        errors, *_ = measure_loss_map(found.load_model(), build.make_loss(config), scaled, labels_N, 4, passes=20)
        assert 0 < errors[errors == errors].mean() < 3  # of noise that is predicted as nothing: 1


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.vocabulary=0"], "data.tasks.interleaved: expected 0 for a model without texts"),
        (["data.tasks.class_to_image=1"], "data.tasks.class_to_image: expected 0 for model.num_classes = 0, got 1"),
    ],
)
def test_what_does_not_go_together_is_refused(data: Path, tmp_path: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(UserError) as error:
        config_checks.check(config_of(data, tmp_path, *overrides), 1)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_mirrored_images_with_texts_are_doubted(data: Path, tmp_path: Path) -> None:
    alone = ("data.tasks.text_to_image=0", "data.tasks.image_to_text=0")
    for mirror_prob, num_doubts in ((0.5, 1), (0.0, 0)):
        config = config_of(data, tmp_path, f"data.mirror_prob={mirror_prob}", *alone)
        assert len([one for one in config_checks.doubts(config, {}) if "left or right" in one]) == num_doubts


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.max_segments=6"], "model.max_segments: expected at least 7, the texts and images of a sample in"),
        (["model.max_text_tokens=4"], "model.max_text_tokens: expected at least "),
        (["model.num_classes=3"], "model.num_classes: expected 1, the classes in the shards, got 3"),
    ],
)
def test_samples_that_do_not_fit_are_refused(data: Path, tmp_path: Path, overrides: list[str], words: str) -> None:
    ended = run_script(TRAIN, small_run(data / "latents", tmp_path / "run", *knobs(data, *overrides)))
    assert [one.code for one in ended] == [EXIT_USER_ERROR]
    assert words in ended[0].err
    assert ended[0].err.count("\n") == 1


def test_a_sample_of_more_segments_than_the_shards_say_is_named(data: Path, tmp_path: Path) -> None:
    config = config_of(data, tmp_path)
    opened = open_training_data(config)
    loader = Loader(config, build.make_prepare(config_of(data, tmp_path, "model.max_segments=3")), 0, 1, data=opened)
    with pytest.raises(UserError, match=r"^model.max_segments: expected at least [47], .* of sample \d+, got 3; raise"):
        next(loader)


def test_shards_without_the_column_are_refused_for_the_task_alone(data: Path, tmp_path: Path) -> None:
    plain = write_digits(tmp_path / "plain")
    arguments = small_run(plain, tmp_path / "run", *knobs(data))
    (ended,) = run_script(TRAIN, arguments)
    assert ended.code == EXIT_USER_ERROR
    assert f"data.tasks.interleaved: expected 0 for shards without segments, got 3 for {plain}" in ended.err
    assert ended.err.count("\n") == 1
    (ended,) = run_script(TRAIN, [*arguments, f"data.shards=[{data / 'latents'},{plain}]"])
    assert ended.code == EXIT_USER_ERROR
    assert "expected interleaved samples in all folders or in none" in ended.err


def test_folders_of_other_classes_go_together_without_classes(data: Path, tmp_path: Path) -> None:
    info = open_training_data(config_of(data, tmp_path)).latents[0]
    infos = [info, dataclasses.replace(info, class_names=("a", "b"), most_segments=3)]
    config = config_of(data, tmp_path, f"data.shards=[{data / 'latents'},{tmp_path}]")
    check_infos(infos, config)
    with_classes = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=1))
    with pytest.raises(UserError, match="expected class_names as in the first folder"):
        check_infos(infos, with_classes)


def test_other_tasks_take_the_first_image(data: Path, tmp_path: Path) -> None:
    """With their captions, and in the batches that shards of single images would give."""
    config = config_of(data, tmp_path, "data.tasks.interleaved=0", "data.num_workers=0")
    loader = Loader(config, build.make_prepare(config), 0, 1)
    batches = next(loader)
    loader.close()
    for batch in batches:
        assert sum(one.kind == "image" for one in batch.segments) <= 1
        assert batch.counts()["image"] <= len(batch.ids_B) * config.model.num_tokens * config.model.patch_values
