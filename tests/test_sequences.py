"""What training draws, from the config alone, beside batches that it draws."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models

from cfpretrain.base import config as configs
from cfpretrain.base.config import Config
from cfpretrain.base.console import UserError
from cfpretrain.core.objective import Batch
from cfpretrain.core.texts import FRAME
from cfpretrain.data.image_shards import write_image_shards
from cfpretrain.data.images import ImageFormat
from cfpretrain.data.listing import list_images
from cfpretrain.data.shards import Shards
from cfpretrain.data.tokenizer import TextTokenizer
from cfpretrain.run import build, sequences
from cfpretrain.run.metrics import training_flops
from tests.digits import digits, digits_info, small_config, write_latents
from tests.interleaved import PATTERNS, write_shards, write_table
from tests.processes import REPOSITORY
from tests.test_objective import sum_of
from tools.measuring.common import with_words

NUM_WORDS = 5  # of each caption: FRAME more tokens
NUM_DRAWN = 2400
TASKS = ("data.tasks.class_to_image=1", "data.tasks.text_to_image=3", "data.tasks.image_to_text=2")
DROPS = ("train.text_drop_prob=0.3", "train.image_drop_prob=0.2")


def text_config(folder: Path, *overrides: str) -> Config:
    texts = ("model.vocabulary=50", "model.max_text_tokens=7", "data.tokenizer=any.json")
    return with_words(small_config(folder / "shards", folder, *texts, *TASKS, *DROPS, *overrides), folder)


def batches(config: Config, size: int, num_words: int = NUM_WORDS) -> list[Batch]:
    loss, model = build.make_loss(config), config.model
    latents_BCYX = torch.zeros(size, model.latent_channels, model.latent_size, model.latent_size)
    found = []
    for step, ids_B in enumerate(torch.arange(NUM_DRAWN).split(size)):
        draws = loss.draw(step, 0, ids_B, ids_B % 10, model.num_tokens, model.patch_values)
        found.append(loss.prepare(latents_BCYX, draws, (), [[0] * num_words] * size))
    return found


def test_work_is_the_mean_of_what_is_drawn(tmp_path: Path) -> None:
    """Over tasks, what they lack for guidance, and splits."""
    config = text_config(tmp_path)
    drawn, want = sum_of([one.work for one in batches(config, 8)]), sequences.mean_work(config, 7)
    assert drawn.tokens / NUM_DRAWN == pytest.approx(want.tokens, rel=0.03)
    assert drawn.visible / NUM_DRAWN == pytest.approx(want.visible, rel=0.05)
    for kind in ("image", "text"):
        assert drawn.projections[kind] / NUM_DRAWN == pytest.approx(want.projections[kind], rel=0.1)
    # Logits are made of the captions that are learned, dropped images or not.
    assert want.projections["text"] == pytest.approx(7 * 2 / 6)
    assert drawn.text_tokens / NUM_DRAWN == pytest.approx(want.text_tokens, rel=0.1)
    mean_flops = sum(training_flops(config.model, one.work) for one in batches(config, 8)) / NUM_DRAWN
    assert mean_flops == pytest.approx(training_flops(config.model, want), rel=0.03)


def test_shares_of_what_samples_are_trained_as(tmp_path: Path) -> None:
    drawn = sequences.drawn_samples(text_config(tmp_path), 7)
    shares = {tuple(one.kind + "*" * (one.targets is not None) for one in segments): share for share, segments in drawn}
    assert shares == pytest.approx(
        {
            ("class", "image"): 1 / 6,
            ("text", "image"): 3 / 6 * 0.7,
            ("image",): 3 / 6 * 0.3,
            ("image", "text*"): 2 / 6 * 0.8,
            ("text*",): 2 / 6 * 0.2,
        }
    )
    assert [share for share, _ in sequences.drawn_samples(small_config(tmp_path, tmp_path), 7)] == [1.0]


@pytest.mark.parametrize("clean_multiple", [1, 8])
@pytest.mark.parametrize("tasks", [(1, 1, 1), (0, 1, 0), (0, 0, 1), (1, 1, 0)], ids=str)
def test_the_longest_is_drawn_and_nothing_longer(tmp_path: Path, clean_multiple: int, tasks) -> None:
    """Of micro-batches with every kind of sample, whose captions are of the most tokens."""
    names = ("class_to_image", "text_to_image", "image_to_text")
    weights = [f"data.tasks.{name}={weight}" for name, weight in zip(names, tasks, strict=True)]
    config = text_config(tmp_path, f"engine.clean_token_multiple={clean_multiple}", *weights)
    made, want = batches(config, 40), sequences.longest(config)
    assert max(one.intervals_BMI.shape[1] for one in made) == want.computed
    given = [sum(one.num_tokens * (1 + one.is_noised) for one in batch.segments) for batch in made]
    assert max(given) == want.given
    noised = [sum(one.num_tokens for one in batch.segments if one.is_noised) for batch in made]
    assert max(noised) == want.noised == config.model.num_tokens
    learned = [sum(one.num_tokens for one in batch.segments if one.targets is not None) for batch in made]
    assert max(learned) - want.noised == want.learned_text == 7 * (tasks[2] > 0)
    assert sequences.has_texts(config)


def write_captions(folder: Path, words: int) -> None:
    captions = {i: " ".join(["w1"] * (i % (words + 1))) for i in range(100)}
    write_latents(folder / "shards", digits_info(100), digits(100), captions=captions)


def test_captions_at_hand_say_how_long_they_are(tmp_path: Path) -> None:
    write_captions(tmp_path, 5)
    config = text_config(tmp_path)
    lengths = [FRAME + i % 6 for i in range(100)]
    found = sequences.captions_at_hand(config)
    assert found == (round(sum(lengths) / 100), 100, lengths.count(2), 7, 0, "")
    assert "of 100 in data.shards, 7 at most, 17 are empty" in str(found)
    for data in ({"tokenizer": "nowhere.json"}, {"shards": (str(tmp_path / "nowhere"),)}):
        unknown = sequences.captions_at_hand(dataclasses.replace(config, data=dataclasses.replace(config.data, **data)))
        assert unknown == (7, 0, 0, 0, 0, "")
        assert "model.max_text_tokens = 7 tokens" in str(unknown)


# ---------------------------------------------------------------------------
# Interleaved samples


@pytest.fixture(scope="module")
def interleaved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interleaved")
    return write_shards(folder, 60)[1].rename(folder / "as_latents")


def interleaved_config(interleaved: Path, tmp_path: Path, *overrides: str) -> Config:
    both = ("data.tasks.interleaved=4", "model.max_segments=7", "model.num_classes=10", f"data.shards={interleaved}")
    return text_config(tmp_path, *both, "data.latent_shift=[0.5]", "data.latent_scale=[2.0]", *overrides)


def interleaved_batches(config: Config, size: int, num_steps: int) -> list[Batch]:
    """Of the samples in their order, their texts all of `NUM_WORDS`."""
    loss, model = build.make_loss(config), config.model
    rows = [PATTERNS[int(one["id"]) % 6] for one in Shards(config.data.shards[0]).samples(range(60))]
    found = []
    for step in range(num_steps):
        ids_B = torch.arange(step * size, (step + 1) * size)
        segments = [
            [[0] * NUM_WORDS if isinstance(one, str) else None for one in rows[place]]
            for place in (ids_B % 60).tolist()
        ]
        num_images = [one.count(None) for one in segments]
        draws = loss.draw(step, 0, ids_B, ids_B % 10, model.num_tokens, model.patch_values, num_images)
        latents_BCYX = torch.zeros(sum(num_images), model.latent_channels, model.latent_size, model.latent_size)
        found.append(loss.prepare(latents_BCYX, draws, (), [[0] * NUM_WORDS] * size, segments))
    return found


def test_work_of_interleaved_samples_is_that_of_those_at_hand(interleaved: Path, tmp_path: Path) -> None:
    config = interleaved_config(interleaved, tmp_path)
    drawn = sum_of([one.work for one in interleaved_batches(config, 60, 40)])
    want = sequences.mean_work(config, 7)
    assert drawn.tokens / NUM_DRAWN == pytest.approx(want.tokens, rel=0.03)
    assert drawn.visible / NUM_DRAWN == pytest.approx(want.visible, rel=0.05)
    for kind in ("image", "text"):
        assert drawn.projections[kind] / NUM_DRAWN == pytest.approx(want.projections[kind], rel=0.1)


@pytest.mark.parametrize("clean_multiple", [1, 8])
def test_the_longest_of_interleaved_samples_is_drawn(interleaved: Path, tmp_path: Path, clean_multiple: int) -> None:
    config = interleaved_config(interleaved, tmp_path, f"engine.clean_token_multiple={clean_multiple}")
    made, want = interleaved_batches(config, 60, 40), sequences.longest(config)
    assert max(one.intervals_BMI.shape[1] for one in made) == want.computed
    assert max(sum(one.num_tokens * (1 + one.is_noised) for one in of.segments) for of in made) == want.given
    assert max(sum(one.num_tokens for one in of.segments if one.is_noised) for of in made) == want.noised
    learned = [[one for one in of.segments if one.kind == "text" and one.targets is not None] for of in made]
    assert max(sum(one.num_tokens for one in of) for of in learned) == want.learned_text
    assert sequences.has_texts(config)
    unknown = interleaved_config(tmp_path / "nowhere", tmp_path)
    assert sequences.longest(unknown).given > want.given  # four images and three texts


def test_texts_at_hand_are_those_of_the_segments(interleaved: Path, tmp_path: Path) -> None:
    weights = [f"data.tasks.{name}=0" for name in ("class_to_image", "text_to_image", "image_to_text")]
    found = sequences.captions_at_hand(interleaved_config(interleaved, tmp_path, *weights))
    assert found.num_read == 10 * (2 + 1 + 0 + 2 + 2 + 4)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (0, "data.tasks.text_to_image: expected captions in {shards}, got none in 100 samples; give make_shards.py a"),
        (6, "model.max_text_tokens: expected at least 8, the tokens of the longest of 100 captions that were looked at "
         "and the two that frame it, got 7, which refuses 14 of them"),
    ],
)  # fmt: skip
def test_captions_that_are_none_or_too_long_are_refused(tmp_path: Path, words: int, problem: str) -> None:
    write_captions(tmp_path, words)
    with pytest.raises(UserError) as error:
        sequences.captions_at_hand(text_config(tmp_path))
    assert problem.format(shards=tmp_path / "shards") in str(error.value)
    assert "\n" not in str(error.value)
    by_class = text_config(tmp_path, "data.tasks.text_to_image=0", "data.tasks.image_to_text=0")
    assert sequences.captions_at_hand(by_class).num_read == 0


def test_interleaved_samples_without_captions_are_no_pairs(interleaved: Path, tmp_path: Path) -> None:
    """Their own texts are no captions: images would be learned behind empty texts."""
    assert sequences.captions_at_hand(interleaved_config(interleaved, tmp_path)).num_read > 0
    table = write_table(tmp_path / "files", 12)
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    table.write_text("".join(json.dumps({"segments": row["segments"]}) + "\n" for row in rows))
    write_image_shards([(list_images(table), tmp_path / "shards")], ImageFormat("lossless", 8, is_grey=True), "a test")
    with pytest.raises(UserError, match=r"data\.tasks\.text_to_image: expected captions in .*, got none in 12 samples"):
        sequences.captions_at_hand(interleaved_config(tmp_path / "shards", tmp_path))


def test_words_that_the_tokenizer_lacks_are_named(tmp_path: Path) -> None:
    """Which training leaves out of a caption, or takes for others."""
    captions = {i: "w1 w2" if i % 7 else "w1 nine" for i in range(100)}
    write_latents(tmp_path / "shards", digits_info(100), digits(100), captions=captions)
    letters = Tokenizer(models.BPE({one: i for i, one in enumerate("w12 ")}, []))
    (tmp_path / "tokenizer.json").write_text(TextTokenizer(letters).to_json())
    size = TextTokenizer(letters).size
    texts = (f"data.tokenizer={tmp_path / 'tokenizer.json'}", f"model.vocabulary={size}", "model.max_text_tokens=9")
    found = sequences.captions_at_hand(small_config(tmp_path / "shards", tmp_path, *texts, *TASKS))
    assert found.unknown == "n"
    assert str(found).endswith(", and data.tokenizer has no token for 'n' in them")


def test_lengths_of_a_preset() -> None:
    config = configs.load(REPOSITORY / "configs" / "L-text.yaml")
    assert sequences.longest(config) == (640, 768, 256, 128)
