"""Runs that learn captions beside images: alike on any ranks, resumed to the bit, refused where they make no sense."""

import dataclasses
import itertools
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cfpretrain.base import config as configs
from cfpretrain.base import config_checks
from cfpretrain.base.console import EXIT_USER_ERROR, UserError
from cfpretrain.core.work import Work
from cfpretrain.data.loader import Loader
from cfpretrain.data.online import open_training_data
from cfpretrain.data.tokenizer import TextTokenizer
from cfpretrain.evaluation.captioning import HeldOut, read_captioned
from cfpretrain.evaluation.source import load_source
from cfpretrain.export.diffusers_layout import ExportSettings, export
from cfpretrain.export.official import write_official
from cfpretrain.run import build
from cfpretrain.run.metrics import read_metrics, training_flops
from cfpretrain.training.events import choose_rows
from tests import folders
from tests.digits import digits, digits_info, small_config, small_run, write_latents
from tests.image_files import digits as real_digits
from tests.image_files import write_folder
from tests.processes import run_alone, run_script

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUM_STEPS = 8


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of digits with captions of several lengths, of which every tenth is empty; and their tokenizer."""
    folder, samples = tmp_path_factory.mktemp("captioned"), digits(100)
    captions = {i: f"a {NAMES[label]}" + ", written by hand" * (i % 3) for i, label, _ in samples if i % 10}
    write_latents(folder / "shards", digits_info(100), samples, captions=captions)
    ended = run_alone(
        "tools/train_tokenizer.py", [str(folder / "shards"), f"--out={folder / 'tokenizer.json'}", "--size=280"]
    )
    assert ended.code == 0, ended.err
    longest = max(len(TextTokenizer.load(folder / "tokenizer.json", "").encode(text)) for text in captions.values())
    assert f" tokens in the mean, {longest} at most, 10 more are empty\n" in ended.out
    (folder / "printed.yaml").write_text(ended.out[ended.out.index("data:") :])
    return folder


def knobs(captioned: Path, *overrides: str) -> list[str]:
    return [
        "--config",  # what the tool has printed, over the preset
        str(captioned / "printed.yaml"),
        f"train.num_steps={NUM_STEPS}",
        "data.tasks.class_to_image=1",
        "data.tasks.text_to_image=2",
        "data.tasks.image_to_text=2",
        "train.text_loss_weight=0.5",
        *overrides,
    ]


def config_of(captioned: Path, folder: Path, *overrides: str) -> configs.Config:
    arguments = small_run(captioned / "shards", folder, *knobs(captioned, *overrides))
    files = [value for name, value in itertools.pairwise(arguments) if name == "--config"]
    return configs.load(files, [one for one in arguments if one != "--config" and one not in files])


def train(captioned: Path, folder: Path, num_ranks: int, *overrides: str) -> list[dict[str, Any]]:
    arguments = small_run(captioned / "shards", folder, *knobs(captioned, *overrides))
    for ended in run_script("cfpretrain/train.py", arguments, num_ranks):
        assert ended.code == 0, ended.err
    return folders.rows(folder)


@pytest.fixture(scope="module")
def run(captioned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On two ranks at ZeRO-3, of micro-batches so small that some lack a kind of token."""
    folder = tmp_path_factory.mktemp("runs") / "two_ranks"
    train(captioned, folder, 2, "engine.zero_stage=3", "train.micro_batch_size=2", "checkpoint.keep_last=2")
    return folder


def test_ranks_and_micro_batches_change_no_loss(captioned: Path, run: Path, tmp_path: Path) -> None:
    """Each kind's loss is divided by its values in the global batch, wherever they are."""
    config = config_of(captioned, tmp_path, "train.micro_batch_size=2")
    loader = Loader(config, build.make_prepare(config), 0, 2)
    counts = [[batch.counts()["text"] for batch in next(loader)] for _ in range(NUM_STEPS)]
    loader.close()
    assert any(0 in of_step for of_step in counts)
    assert len({sum(of_step) for of_step in counts}) > 1

    alone = train(captioned, tmp_path / "alone", 1, "engine.zero_stage=0", "train.micro_batch_size=16")
    rows = folders.rows(run)
    assert len(rows) == len(alone) == NUM_STEPS
    for row, other in zip(rows, alone, strict=True):
        assert row["num_image_values"] == other["num_image_values"]
        assert row["num_text_values"] == other["num_text_values"] > 0
        for name in ("loss", "loss_image", "loss_text", "grad_norm"):
            assert row[name] == pytest.approx(other[name], rel=1e-4), name
        assert row["loss"] == pytest.approx(row["loss_image"] + 0.5 * row["loss_text"], rel=1e-9)
    assert rows[0]["loss_text"] == pytest.approx(math.log(config.model.vocabulary), rel=0.2)
    assert rows[-1]["loss_text"] < rows[0]["loss_text"]


def drift(rows: list[dict[str, Any]], others: list[dict[str, Any]], name: str) -> float:
    """The largest relative difference of a number of two runs."""
    assert [row["num_text_values"] for row in rows] == [row["num_text_values"] for row in others]
    return max(abs(row[name] / other[name] - 1) for row, other in zip(rows, others, strict=True))


@pytest.mark.parametrize(
    ("num_ranks", "stage"),
    [
        (4, 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 3), (2, 0), (2, 1), (2, 2), (4, 0), (4, 3))),
    ],
)
def test_ranks_differ_by_the_order_of_summation(captioned: Path, tmp_path: Path, num_ranks: int, stage: int) -> None:
    """By no more than micro-batches of other sizes do on one rank, whose sums are of the same numbers too."""
    longer = ("train.num_steps=24", "train.micro_batch_size=2", "checkpoint.every_steps=24")
    made = train(captioned, tmp_path / "ranks", num_ranks, f"engine.zero_stage={stage}", *longer)
    sizes = {}
    for size in (2, 4, 16):
        others = (*longer, f"train.micro_batch_size={size}", "engine.zero_stage=0")
        sizes[size] = train(captioned, tmp_path / f"size_{size}", 1, *others)
    for name in ("loss", "loss_image", "loss_text"):
        of_rounding = max(drift(sizes[size], sizes[16], name) for size in (2, 4))
        found = drift(made, sizes[16], name)
        print(f"{name}: {found:.1e}, of rounding {of_rounding:.1e}")
        assert 0 < of_rounding < 1e-4
        assert found <= 3 * of_rounding, name


@pytest.mark.slow
def test_killed_runs_with_captions_end_as_one_left_alone(captioned: Path, tmp_path: Path) -> None:
    """Killed three times at random under the launcher, it is bit-identical and no sample is lost or doubled."""
    longer = ("train.num_steps=200", "checkpoint.every_steps=20", "guard.rank_timeout_seconds=60")
    given = small_run(captioned / "shards", tmp_path / "unused", *knobs(captioned, *longer))
    options = ["--kills=3", "--seed=2", f"--out={tmp_path / 'out'}", *given]
    ended = run_alone("tools/crash_test.py", options, timeout_s=600)
    assert ended.code == 0, ended.out + ended.err
    found = json.loads(ended.out.splitlines()[-1])
    assert (found["kills"], found["lost"], found["doubled"]) == (3, 0, 0)
    assert found["loss_equal"]
    assert found["weights_equal"]
    assert found["ema_equal"]


def test_a_resumed_run_has_the_same_losses_bit_by_bit(captioned: Path, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "checkpoints" / f"step_{NUM_STEPS:08d}")
    (folder / "summary.json").unlink()
    (folder / "metrics.jsonl").unlink()
    again = train(captioned, folder, 2, "engine.zero_stage=3", "train.micro_batch_size=2", "checkpoint.keep_last=2")
    wanted = folders.rows(run)[NUM_STEPS // 2 :]
    assert [row["step"] for row in again] == [row["step"] for row in wanted]
    for row, other in zip(again, wanted, strict=True):
        names = ("loss", "loss_image", "loss_text", "grad_norm", "num_text_values")
        assert [row[name] for name in names] == [other[name] for name in names]


def test_a_step_is_made_again(run: Path) -> None:
    """Of its samples, those with an image are listed."""
    ended = run_script("tools/replay.py", [str(run), "--step", "6"], 2)
    assert [one.code for one in ended] == [0, 0], ended[0].err
    result = json.loads((run / "replay" / "step_00000006" / "samples.json").read_text())
    assert result["equal"]
    assert 0 < len(result["samples"]) <= 16
    assert {sample["label"] for sample in result["samples"]} & set(range(10))
    assert 10 in {sample["label"] for sample in result["samples"]}  # the null class, or none at all


def test_a_run_keeps_its_tokenizer(captioned: Path, run: Path, tmp_path: Path) -> None:
    ours = TextTokenizer.load(captioned / "tokenizer.json", "here")
    kept = TextTokenizer.load(run / "tokenizer.json", "there")
    assert ours.fingerprint == kept.fingerprint == build.find_checkpoint(run).state.tokenizer
    other = TextTokenizer.train([" ".join(NAMES[::-1]), *(f"{name}, as it were" for name in NAMES)] * 2, ours.size)
    assert (other.size, other.fingerprint == ours.fingerprint) == (ours.size, False)
    (tmp_path / "other.json").write_text(other.to_json())
    overrides = [f"data.tokenizer={tmp_path / 'other.json'}", "train.num_steps=9"]
    (ended,) = run_script("cfpretrain/train.py", small_run(captioned / "shards", run, *knobs(captioned, *overrides)), 1)
    assert ended.code == EXIT_USER_ERROR
    assert ended.err.strip().count("\n") == 0
    assert "data.tokenizer: expected the one that checkpoint" in ended.err


def test_a_tokenizer_needs_captions_and_a_free_place(captioned: Path, shards: Path, tmp_path: Path) -> None:
    for folder, out, words in (
        (shards, tmp_path / "none.json", "SHARDS: expected captions, got none"),
        (captioned / "shards", captioned / "tokenizer.json", "--out: "),
    ):
        ended = run_alone("tools/train_tokenizer.py", [str(folder), f"--out={out}"])
        assert ended.code == EXIT_USER_ERROR
        assert words in ended.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["259", "1000001", "100000000000"])
def test_a_tokenizer_has_no_more_tokens_than_a_model_may(captioned: Path, tmp_path: Path, size: str) -> None:
    """The package takes memory for all of them at once, and where there is none it ends the process."""
    ended = run_alone(
        "tools/train_tokenizer.py", [str(captioned / "shards"), f"--out={tmp_path / 'a'}", "--size", size]
    )
    assert ended.code == EXIT_USER_ERROR
    assert ended.err == f"[cfpretrain] error: --size: expected 260 to 1000000, got {size}\n"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"model\.vocabulary: expected between 0 and 1e.06"):
        config_of(captioned, tmp_path, "model.vocabulary=1000001")


def test_it_is_exported_with_its_tokenizer_or_not_at_all(run: Path, tmp_path: Path) -> None:
    """As `test_export_texts.py` says of random weights; the official code knows no texts."""
    export(run, tmp_path / "export", ExportSettings())
    tokenizer = load_source(tmp_path / "export", torch.device("cpu")).tokenizer
    assert tokenizer is not None
    assert tokenizer.fingerprint == build.find_checkpoint(run).state.tokenizer
    with pytest.raises(UserError, match=r"ordinal_table.* leave --format official out"):
        write_official(run, tmp_path / "official.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.vocabulary=0"], ["data.tasks.text_to_image", "model.vocabulary"]),
        (["data.tokenizer=''"], ["data.tokenizer", "expected a tokenizer.json"]),
        ([f"data.tasks.{name}=0" for name in ("class_to_image", "text_to_image", "image_to_text")], ["data.tasks"]),
    ],
)
def test_what_does_not_go_together_is_refused(captioned: Path, tmp_path: Path, overrides, words) -> None:
    with pytest.raises(UserError) as error:
        config_checks.check(config_of(captioned, tmp_path, *overrides), 1)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.vocabulary=281"], ["model.vocabulary: expected", "got 281"]),
        (["data.tokenizer=/nowhere.json"], ["data.tokenizer", "/nowhere.json does not exist"]),
        (["model.max_text_tokens=8"], ["model.max_text_tokens: expected at least", "caption of sample", "got 8"]),
    ],
)
def test_texts_that_do_not_fit_are_refused(captioned: Path, tmp_path: Path, overrides, words) -> None:
    def read(config: configs.Config) -> None:
        next(Loader(config, build.make_prepare(config), 0, 1))

    with pytest.raises(UserError) as error:
        read(config_of(captioned, tmp_path, *overrides))
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dry", [True, False])
def test_the_command_refuses_on_one_line(captioned: Path, shards: Path, tmp_path: Path, dry: bool) -> None:
    """With every exit code of a user's mistake, and nothing left behind."""
    for overrides, words in (
        (["model.vocabulary=281"], "model.vocabulary: expected"),
        (["data.tokenizer=/nowhere.json"], "/nowhere.json"),
        (["model.max_text_tokens=8"], "model.max_text_tokens: expected at least"),
        ([f"data.shards={shards}"], "data.tasks.text_to_image: expected captions in"),
        (["data.tasks.text_to_image=-1"], "data.tasks.text_to_image"),
        ([f"data.tasks.{name}=0" for name in ("class_to_image", "text_to_image", "image_to_text")], "data.tasks: "),
        (["model.vocabulary=0"], "data.tasks.text_to_image: expected 0 for a model without texts"),
    ):
        if dry and "nowhere" in words:
            continue  # said, and refused where it is to be trained
        given = small_run(captioned / "shards", tmp_path / "run", *knobs(captioned, *overrides))
        ended = run_alone("cfpretrain/train.py", [*given, *(["--dry-run"] if dry else [])])
        assert ended.code == EXIT_USER_ERROR, (overrides, ended.err)
        assert words in ended.err
        assert ended.err.strip().count("\n") == 0, ended.err
    assert not (tmp_path / "run").exists()


def test_mirrored_images_with_captions_are_doubted(captioned: Path, tmp_path: Path) -> None:
    def doubts(*overrides: str) -> list[str]:
        config = config_of(captioned, tmp_path, "data.mirror_prob=0.5", *overrides)
        return [one for one in config_checks.doubts(config, {}) if "left or right" in one]

    assert len(doubts()) == 1
    assert doubts("data.tasks.text_to_image=0", "data.tasks.image_to_text=0") == []


def test_texts_count_in_flops_and_parameters(captioned: Path, tmp_path: Path) -> None:
    config = config_of(captioned, tmp_path)
    model, work = config.model, Work(10, 0, {"image": 0, "text": 3}, 3)
    without = training_flops(model, Work(10, 0, {"image": 0, "text": 0}, 3))
    assert training_flops(model, work) - without == 3 * 2 * 3 * model.vocabulary * model.width
    shapes, D = build.parameter_shapes(config), model.width
    added = shapes.keys() - build.parameter_shapes(small_config(captioned / "shards", tmp_path)).keys()
    assert {name: shapes[name] for name in added} == {
        "text_embedder.embedding_table.weight": (model.vocabulary, D),
        "text_embedder.position_table.weight": (model.max_text_tokens, D),
        "ordinal_table.weight": (2, D),
        "text_head.norm.weight": (D,),
        "text_head.norm.bias": (D,),
        "text_head.linear.weight": (model.vocabulary, D),
    }
    values = torch.empty(model.vocabulary * D)
    build.initial_weights(config)("text_embedder.embedding_table.weight", (model.vocabulary, D), 0, values)
    assert float(values.std()) == pytest.approx(0.02, rel=0.05)


def test_grids_show_prompts_or_the_first_captions(captioned: Path, run: Path, tmp_path: Path) -> None:
    assert len(list((run / "samples").glob("step_*.png"))) == 2, "of 1 and of 2 AR steps, by ranks of ZeRO-3"
    data = open_training_data(config_of(captioned, tmp_path))
    tokenizer = TextTokenizer.load(captioned / "tokenizer.json", "here")
    first = [one["caption"] for one in data.folders[0].samples(range(12))]
    for prompts, expected in (
        ([], [text for text in dict.fromkeys(first) if text][:3]),
        (["sample.prompts=['a two','']"], ["a two", ""]),
    ):
        rows = choose_rows(config_of(captioned, tmp_path, "sample.max_classes=3", *prompts), data)
        assert list(rows.names) == expected
        assert [tokenizer.decode(tokens) for tokens in rows.conditions] == expected
    by_class = choose_rows(config_of(captioned, tmp_path, "sample.max_classes=3", "data.tasks.text_to_image=0"), data)
    assert by_class == (("0", "1", "2"), (0, 1, 2), None)
    learned = ["data.tasks.class_to_image=0", "data.tasks.text_to_image=0"]
    rows = choose_rows(config_of(captioned, tmp_path, *learned), data)
    assert rows[:2] == (("no condition",), (None,))
    with pytest.raises(UserError, match=r"sample\.prompts: expected at most \d+ tokens .*; shorten it"):
        choose_rows(config_of(captioned, tmp_path, f"sample.prompts=[{'a two ' * 40}]"), data)
    config = config_of(captioned, tmp_path, "sample.prompts=[a two]", "data.tasks.text_to_image=0")
    with pytest.raises(UserError, match=r"sample\.prompts: expected none without data\.tasks\.text_to_image"):
        config_checks.check(config, 1)


@pytest.fixture(scope="module")
def evaluated(captioned: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """Rows of runs with scores on one rank and, at ZeRO-3, on two."""
    folder, found = tmp_path_factory.mktemp("evaluated"), []
    real = write_folder(folder / "real", real_digits(0, 60))
    for num_ranks, stage in ((1, 0), (2, 3)):
        overrides = [f"evaluation.captions={captioned / 'shards'}", "evaluation.num_captions=9"]
        overrides += ["evaluation.every_steps=4", f"evaluation.reference={real}", "evaluation.num_images=30"]
        overrides += ["evaluation.features=tests.small_features:make", "evaluation.num_denoising_steps=2"]
        ranked = [f"engine.zero_stage={stage}", "train.micro_batch_size=4", "train.learning_rate=1e-6"]
        train(captioned, folder / f"{num_ranks}", num_ranks, *overrides, *ranked)
        found.append(read_metrics(folder / f"{num_ranks}" / "metrics.jsonl"))
    return found


def test_captions_and_what_is_drawn_of_them_are_scored_while_training(evaluated: list[list[dict[str, Any]]]) -> None:
    """The same on two ranks at ZeRO-3, whose captions end at different places."""
    names = ("fd_small", "cider", "bleu_4", "exact_match", "perplexity")
    for alone, together in zip(*evaluated, strict=True):
        assert (alone["step"] % 4 == 0) == ("cider" in alone) == ("cider" in together)
        if "cider" in alone:
            assert [alone[name] for name in names] == pytest.approx([together[name] for name in names], rel=1e-3)
            assert alone["perplexity"] == pytest.approx(280, rel=0.5), "hardly trained: of all the vocabulary"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.tasks.class_to_image=0"], "evaluation.captions: expected latent shards with captions, since without"),
        (
            ["evaluation.captions=x", "data.tasks.text_to_image=0", "data.tasks.image_to_text=0"],
            "evaluation.captions: expected none for a model without texts, got x",
        ),
    ],
)
def test_captions_to_score_by(captioned: Path, tmp_path: Path, overrides: list[str], words: str) -> None:
    scored = ["evaluation.every_steps=4", "evaluation.reference=real"]
    config = config_of(captioned, tmp_path, *scored, *overrides)
    with pytest.raises(UserError, match=words):
        config_checks.check(config, 1)


def test_captions_of_other_latents_or_none_are_refused(captioned: Path, tmp_path: Path) -> None:
    """Of another autoencoder or scale they would give scores, but meaningless ones."""
    config, info = config_of(captioned, tmp_path), digits_info(20)
    for change, words in (
        ({"latent_scale": (3.0,)}, "expected latents of latent_scale (2.0,), as in data.shards, got (3.0,) in"),
        ({"autoencoder": "blake2b:0"}, "expected latents of autoencoder identity, as in data.shards, got blake2b:0"),
    ):
        folder = write_latents(tmp_path / next(iter(change)), dataclasses.replace(info, **change), digits(20))
        with pytest.raises(UserError, match="^evaluation.captions: " + re.escape(words)):
            read_captioned(folder, config, 20, "evaluation.captions", info)
    empty = write_latents(tmp_path / "empty", info, digits(20))
    with pytest.raises(UserError, match=r"^evaluation\.captions: expected captions, got none in 20 samples of"):
        HeldOut(config_of(captioned, tmp_path, f"evaluation.captions={empty}"), info)
    _, captions = read_captioned(captioned / "shards", config, 20, "evaluation.captions", info)
    assert len(captions) == 20
