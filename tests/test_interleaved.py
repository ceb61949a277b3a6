"""Interleaved samples from a table to latents: what is read, what is refused, and what comes out of shards."""

import csv
import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cfpretrain.autoencoder import KLAutoencoder
from cfpretrain.base.console import EXIT_USER_ERROR, UserError
from cfpretrain.data import interleaved
from cfpretrain.data.interleaved import MOST_IMAGES, column_of, parse_column
from cfpretrain.data.listing import list_images
from cfpretrain.data.online import OnlineEncoder, open_training_data
from cfpretrain.data.samples import ImageFiles, LatentReading, Samples, VisitDraws, Visits
from cfpretrain.data.shard_writer import ShardWriter
from cfpretrain.data.shards import LatentsInfo, Shards, columns_of
from cfpretrain.evaluation.given_images import open_images
from tests.interleaved import MOST_SEGMENTS, PATTERNS, SIZE, rows, write_shards, write_table
from tests.latent_shards import as_read, config_for
from tests.processes import run_alone
from tests.test_latent_shards import encoding_of, write, write_autoencoder

NUM_ROWS = 40


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Image shards and latent shards; tests read them only."""
    return write_shards(tmp_path_factory.mktemp("interleaved"), NUM_ROWS)


def pixels_of(folder: Path, row: int) -> np.ndarray:
    """The images of a row, [n, Y, X] from 0 to 1."""
    places = [row + part for part in PATTERNS[row % 6] if isinstance(part, int)]
    images = [np.asarray(Image.open(folder / "images" / f"{place}.png")) for place in places]
    return np.stack(images).astype(np.float32) / 255


# ---------------------------------------------------------------------------------------------------------------------
# The column


def test_segments_come_back_from_their_column() -> None:
    for segments in ((None,), ('a "b" é', None, ""), (None, None, "x", None)):
        assert parse_column(column_of(segments)) == segments
    assert column_of(("a", None, "b", None)) == '["a", {"image": 0}, "b", {"image": 1}]'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not JSON", "Expecting value"),
        ('{"image": 0}', "expected a list of texts and images"),
        ('["a", {"image": 7}]', '{"image": 0} as the next image, got 7'),
        ('[{"image": 0}, {"image": 0}]', '{"image": 1} as the next image, got 0'),
        ('[{"image": true}]', "got True"),
        ('[{"image": 0, "of": 1}]', "expected texts and"),
        ('[{"path": 0}]', "expected texts and"),
        ("[3]", "expected texts and"),
        ("[[[[]]]]", "expected texts and"),
        ('["a", "b", {"image": 0}]', "an image between two texts"),
        ('["a"]', "expected 1 to 64 images, got 0"),
        ("[]", "expected 1 to 64 images, got 0"),
        ('["\\ud800", {"image": 0}]', "UTF-8"),
        (json.dumps([{"image": i} for i in range(MOST_IMAGES + 1)]), "got 65"),
        (json.dumps(["x" * 2**20, {"image": 0}]), "at most 1048576 characters"),
        ("[" * 100_000, "nests too deep"),
    ],
)
def test_a_column_that_holds_no_segments_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        parse_column(text)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 3) | st.text(max_size=3) | st.builds(dict, image=st.integers(0, 3)),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.sampled_from(["image", "x"]), inner, max_size=2),
)


@given(st.text(max_size=20) | _JSON.map(json.dumps))
def test_any_column_is_segments_or_refused(text: str) -> None:
    with suppress(ValueError):
        assert parse_column(column_of(parse_column(text))) == parse_column(text)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def test_both_kinds_of_table_name_several_images_a_row(tmp_path: Path) -> None:
    table = write_table(tmp_path, 6)
    with (tmp_path / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["segments", "caption"])
        writer.writerows([json.dumps(row["segments"]), row["caption"]] for row in rows(6))
    listing = list_images(table)
    assert list_images(tmp_path / "table.csv").rows == listing.rows
    assert listing.is_interleaved
    assert [len(row.paths) for row in listing.rows] == [2, 1, 3, 1, 2, 3]
    assert listing.rows[2].paths == ["images/2.png", "images/3.png", "images/4.png"]
    assert listing.rows[0].segments == '["a digit", {"image": 0}, ", then", {"image": 1}]'
    # Plans of tables of single images are those of before.
    (tmp_path / "plain.csv").write_text("path\nimages/0.png\n")
    plain = list_images(tmp_path / "plain.csv").identity()
    assert listing.identity().keys() - plain.keys() == {"segments"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"segments": "not JSON"}, "line 2: segments: Expecting value"),
        ({"segments": ["a"]}, "line 2: segments: expected 1 to 64 images, got 0"),
        ({"segments": ["a", "b", {"image": "images/0.png"}]}, "an image between two texts"),
        ({"segments": [{"image": 3}]}, "expected a text as path, got 3"),
        ({"segments": [{"image": ""}]}, "expected a path, got none"),
        ({"segments": 7}, "expected a list of texts and images"),
        ({"segments": {"image": "images/0.png"}}, "expected a list of texts and images, got {'image': 'images/0.png'}"),
        ({"segments": []}, "segments: expected 1 to 64 images, got 0"),
        ({"segments": ["a"], "path": "images/0.png"}, "expected no path beside them"),
        ({"path": "images/0.png"}, "line 2: expected segments, as in other rows"),
        ({"caption": "nothing"}, "expected a path, got none"),
    ],
)
def test_rows_that_are_no_samples_are_refused(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    table = write_table(tmp_path, 3, {1: row})
    with pytest.raises(UserError) as error:
        list_images(table)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_sample_that_lacks_an_image_is_rejected_by_name(tmp_path: Path) -> None:
    table = write_table(tmp_path, 12)
    (tmp_path / "images" / "13.png").unlink()  # the last of row 11, and no one else's
    arguments = [str(table), f"--out={tmp_path / 'shards'}", "--size=8", "--grey", "--workers=1"]
    ended = run_alone("tools/make_shards.py", [*arguments, "--max-rejected-share=0"])
    assert ended.code == EXIT_USER_ERROR
    assert "images/13.png: the file cannot be read" in ended.err
    ended = run_alone("tools/make_shards.py", [*arguments, "--max-rejected-share=0.1"])
    assert ended.code == 0, ended.err
    assert "12 interleaved samples of 1 class in" in ended.out
    assert "11 interleaved samples of 1 class, 1 x 8 x 8, lossless; 1 rejected" in ended.out
    (rejected,) = map(json.loads, (tmp_path / "shards" / "rejected.jsonl").read_text().splitlines())
    assert (rejected["id"], rejected["path"]) == (11, "images/13.png")


# ---------------------------------------------------------------------------------------------------------------------
# Shards


def test_images_and_their_order_go_into_shards(made: tuple[Path, Path]) -> None:
    images, latents = map(Shards, made)
    assert images.info.most_segments == latents.info.most_segments == MOST_SEGMENTS
    for shards in (images, latents):
        samples = {sample["id"]: sample for sample in shards.samples(range(NUM_ROWS))}
        assert len(samples) == NUM_ROWS
        for row, sample in samples.items():
            expected = tuple(part if isinstance(part, str) else None for part in PATTERNS[row % 6])
            assert parse_column(sample["segments"]) == expected
            assert sample["caption"] == f"row {row}"
            pixels_NYX = pixels_of(made[0].parent, row)
            if shards is images:
                files = interleaved.files_of(sample)
                assert len(files) == len(pixels_NYX)
            else:
                assert np.array_equal(sample["mean"], pixels_NYX[:, None].astype(np.float16))


def test_any_batch_and_parts_give_the_same_latents(made: tuple[Path, Path], tmp_path: Path) -> None:
    """Batches end within samples, and are padded; moments of mirror images are beside those of images."""
    autoencoder = KLAutoencoder.load(write_autoencoder(tmp_path / "autoencoder", in_channels=1, out_channels=1), "cpu")
    encoding = encoding_of(made[0], autoencoder, batch_size=5)
    whole = Shards(write(encoding, tmp_path / "whole", [[0, 1, 2]], num_threads=1))
    assert {name for name in columns_of(whole.info) if "mean" in name or "variance" in name} == {
        *("mean", "log_variance", "mirror_mean", "mirror_log_variance")
    }
    parts = write(encoding, tmp_path / "parts", [[2], [1, 0]], num_threads=2)
    for name in ("shard.00000.mds", "shard.00002.mds"):
        assert (parts / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    alone = encoding_of(made[0], autoencoder, batch_size=1)
    other = Shards(write(alone, tmp_path / "alone", [[0, 1, 2]], num_threads=1))
    for ours, theirs in zip(whole.samples(range(9)), other.samples(range(9)), strict=True):
        assert ours["mean"].shape == theirs["mean"].shape
        assert np.abs(ours["mirror_mean"] - theirs["mirror_mean"]).max() < 1e-2 * np.abs(ours["mirror_mean"]).max()


def read(folder: Path, places: list[int], **settings: Any) -> Samples:
    shards = Shards(folder)
    columns = shards.samples(places)
    ids_B, labels_B = (torch.tensor([int(one[name]) for one in columns]) for name in ("id", "label"))
    config = config_for(folder, shape=(1, SIZE, SIZE), **settings)
    return LatentReading(shards.info, VisitDraws(config), as_read)(Visits(0, 1, ids_B, labels_B, columns))


def test_samples_are_read_image_by_image(made: tuple[Path, Path]) -> None:
    samples = read(made[1], list(range(7)))
    rows_there = samples.ids_B.tolist()
    expected = np.concatenate([pixels_of(made[0].parent, row) for row in rows_there])
    assert np.abs(samples.latents_BCYX[:, 0].numpy() - expected).max() < 1e-3
    assert [len(one) for one in samples.segments] == [len(PATTERNS[row % 6]) for row in rows_there]


def test_a_sample_is_mirrored_whole_and_each_image_has_noise_of_its_own(tmp_path: Path) -> None:
    shape = (1, SIZE, SIZE)
    info = LatentsInfo("0" * 16, shape, (0.0,), (1.0,), ("a",), 1, "test", has_posterior=True, has_mirror=True)
    info = LatentsInfo(**{**vars(info), "most_segments": 3})
    moments = {name: np.full((3, *shape), i, np.float16) for i, name in enumerate(("mean", "mirror_mean"))}
    moments |= {name: np.zeros((3, *shape), np.float16) for name in ("log_variance", "mirror_log_variance")}
    writer = ShardWriter(tmp_path / "one", columns_of(info), {"made": "by a test"})
    writer.begin()
    writer.write(0, [{"id": 4, "label": 0, "caption": "", "segments": column_of((None,) * 3), **moments}])
    writer.finish(info, 1)
    plain, mirrored = (read(tmp_path / "one", [0], mirror_prob=prob).latents_BCYX for prob in (0.0, 1.0))
    assert torch.allclose(mirrored, plain + 1, atol=1e-6)  # the same noise
    assert len({float(image.std()) for image in plain}) == 3
    draws, ids_B, zero = (
        VisitDraws(config_for(tmp_path / "one", shape=shape)),
        torch.tensor([4]),
        torch.zeros(1, *shape),
    )
    assert torch.equal(draws.latents(1, ids_B, zero, zero), plain[:1])  # the first as of a sample of one image


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"segments": "[3]"}, "expected texts and"),
        (
            {"segments": '["a", {"image": 0}]'},
            "expected mean of shape (1, 1, 8, 8), as its segments say, got (2, 1, 8, 8)",
        ),
        ({"segments": '["a", {"image": 0}, {"image": 2}]'}, '{"image": 1} as the next image, got 2'),
        ({"segments": '["a", {"image": 0}, {"image": 1}, "b"]'}, "expected at most 3 segments, got 4"),
        ({"mean": np.zeros((2, 8, 8), np.float16)}, "expected mean of shape"),
        ({"mean": np.zeros((2, 1, 8, 9), np.float16)}, "expected mean of shape"),
    ],
)
def test_shards_that_contradict_themselves_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    info = LatentsInfo("identity", (1, 8, 8), (0.0,), (1.0,), ("a",), 1, "test", most_segments=3)
    sample = {"id": 4, "label": 0, "caption": "", "segments": column_of(("a", None, None))}
    sample |= {"mean": np.zeros((2, 1, 8, 8), np.float16)}
    writer = ShardWriter(tmp_path / "one", columns_of(info), {"made": "by a test"})
    writer.begin()
    writer.write(0, [sample | change])
    writer.finish(info, 1)
    with pytest.raises(UserError) as error:
        Shards(tmp_path / "one").sample(0)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ends", [[3, 2], [2], [2, 4, 6], [0, 6], [2, 5], [2, 7], [-1, 6]])
def test_files_that_end_elsewhere_are_refused(ends: list[int]) -> None:
    sample = {"segments": column_of(("a", None, None)), "images": b"123456", "image_ends": np.array(ends)}
    with pytest.raises(ValueError, match="expected im"):
        interleaved.check_images(sample, 3, ())
    interleaved.check_images(sample | {"image_ends": np.array([2, 6])}, 3, ())
    assert interleaved.files_of(sample | {"image_ends": np.array([2, 6])}) == [b"12", b"3456"]


def test_a_bad_image_costs_its_sample(made: tuple[Path, Path]) -> None:
    """All of its images, and no others', when they are encoded during training."""
    settings = {"latent_shift": (0.5,), "latent_scale": (2.0,), "encode_batch_size": 2}
    config = config_for(made[0], shape=(1, SIZE, SIZE), on_bad_image="skip", **settings)
    data = open_training_data(config)
    columns = [dict(one) for one in data.folders[0].samples(range(5))]
    bad = next(i for i, one in enumerate(columns) if len(interleaved.files_of(one)) == 3)
    files = interleaved.files_of(columns[bad])
    columns[bad] |= interleaved.columns_of_files([*files[:2], b"no image"])
    ids_B = torch.tensor([one["id"] for one in columns])
    visits = Visits(0, 0, ids_B, torch.zeros(5, dtype=torch.int64), columns)
    samples = OnlineEncoder(data.encodings, config)(ImageFiles.of(visits))
    assert list(samples.skipped) == [bad]
    assert "it is no image" in samples.skipped[bad]
    whose = [i for i, one in enumerate(columns) for _ in interleaved.files_of(one)]
    assert [whose[i] for i, image in enumerate(samples.latents_BCYX) if not image.any()] == [bad] * 3
    stopping = OnlineEncoder(data.encodings, replace(config, data=replace(config.data, on_bad_image="stop")))
    with pytest.raises(UserError, match=f"image of id {ids_B[bad]}: it is no image"):
        stopping(ImageFiles.of(visits))


def test_what_takes_images_one_by_one_refuses_them(made: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="expected shards of single images, got interleaved samples"):
        open_images(made[0], "--reference")


def test_the_tools_show_and_verify_them(made: tuple[Path, Path], tmp_path: Path) -> None:
    for folder in made:
        ended = run_alone("tools/inspect_shards.py", [str(folder), "--verify", f"--grid={tmp_path / folder.name}.png"])
        assert ended.code == 0, ended.err
        assert "segments: up to 7 texts and images a sample" in ended.out
        assert '"max_segments": 7' in ended.out
        assert "verified: 3 files, 40 samples" in ended.out
    ended = run_alone("tools/train_tokenizer.py", [str(made[1]), f"--out={tmp_path / 't.json'}", "--size=280"])
    assert ended.code == 0, ended.err
    assert "  tasks: {class_to_image: 0, interleaved: 1}\n" in ended.out
    assert "  max_segments: 7\n" in ended.out
