"""Shard folders: what is written is read, every flipped byte is found, and every mistake has its message."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cfpretrain.base.console import UserError
from cfpretrain.data.shards import (
    ImagesInfo,
    LatentsInfo,
    Shards,
    checksum,
    columns_of,
    read_images_info,
    read_info,
)
from tests.digits import write_latents

INFO = LatentsInfo(
    autoencoder="0123456789abcdef",
    latent_shape=(2, 4, 4),
    latent_shift=(0.5, 0.25),
    latent_scale=(2.0, 4.0),
    class_names=("cat", "dog", "owl"),
    num_samples=50,
    source="test",
    image_size=32,
    crop="adm",
    has_posterior=True,
    has_mirror=True,
    statistics={"mean": [0.0, 0.1], "std": [1.0, 1.1]},
    versions={"cfpretrain": "0"},
)
ARRAYS = ("mean", "log_variance", "mirror_log_variance", "mirror_mean")


def array_of(sample_id: int, name: str) -> np.ndarray:
    numbers = np.random.default_rng([sample_id, ARRAYS.index(name)])
    return numbers.standard_normal((2, 4, 4)).astype(np.float16)


def samples(count: int = 50) -> Iterator[tuple]:
    # Ids with gaps, in no order: they are names, not places.
    ids = [7 * ((i * 13) % count) + 3 for i in range(count)]
    for i, sample_id in enumerate(ids):
        named = {name: array_of(sample_id, name) for name in ARRAYS}
        yield sample_id, i % 3, named["mean"], *(named[name] for name in sorted(named.keys() - {"mean"}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_latents(tmp_path / "shards", INFO, samples(), samples_per_shard=8)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def test_what_is_written_is_read_in_any_order(folder: Path) -> None:
    assert read_info(folder) == INFO
    shards = Shards(folder)
    assert shards.shard_sizes.tolist() == [8] * 6 + [2]
    assert len(shards) == 50
    places = np.random.default_rng(0).permutation(50)
    wanted = list(samples())
    for place, sample in zip(places, shards.samples(places.tolist()), strict=True):
        assert (sample["id"], sample["label"]) == wanted[place][:2]
        for name in ARRAYS:
            assert sample[name].dtype == np.float16
            np.testing.assert_array_equal(sample[name], array_of(int(sample["id"]), name))
    assert [sample["id"] for sample in shards.samples([7, 7])] == [wanted[7][0]] * 2
    assert [sample["id"] for sample in shards.shard(6)] == [wanted[48][0], wanted[49][0]]


def test_pixels_have_a_mean_alone(tmp_path: Path) -> None:
    info = dataclasses.replace(INFO, autoencoder="identity", has_posterior=False, has_mirror=False, num_samples=3)
    folder = write_latents(tmp_path / "pixels", info, [(i, 0, array_of(i, "mean")) for i in range(3)])
    assert Shards(folder).sample(2).keys() == {"id", "label", "caption", "checksum", "mean"}


def test_the_schema_on_disk_is_the_documented_one(folder: Path) -> None:
    entry = json.loads((folder / "index.json").read_text())["shards"][0]
    assert dict(zip(entry["column_names"], entry["column_encodings"], strict=True)) == {
        "id": "int64",
        "label": "int32",
        "caption": "str",
        "checksum": "uint32",
        **dict.fromkeys(ARRAYS, "ndarray:float16:2,4,4"),
    }
    assert entry["hashes"] == ["blake2b"]
    described = json.loads((folder / "cfpretrain.json").read_text())
    assert described["schema_version"] == 2
    assert described["kind"] == "latents"
    assert described["latent_shift"] == [0.5, 0.25]
    assert sorted(path.name for path in folder.iterdir()) == [
        "cfpretrain.json",
        "index.json",
        *(f"shard.{number:05d}.mds" for number in range(7)),
    ]


def test_fingerprint_is_of_the_content(folder: Path, tmp_path: Path) -> None:
    found = Shards(folder).fingerprint
    assert Shards(shutil.copytree(folder, tmp_path / "copy")).fingerprint == found
    changed = ((i, label, mean + np.float16(i == 3), *rest) for i, label, mean, *rest in samples())
    assert Shards(write_latents(tmp_path / "other", INFO, changed, 8)).fingerprint != found
    renamed = dataclasses.replace(INFO, class_names=("a", "b", "c"))
    assert Shards(write_latents(tmp_path / "renamed", renamed, samples(), 8)).fingerprint != found


def test_the_checksum_covers_every_column() -> None:
    sample = {"id": 1, "label": 2, "caption": "a cat", "mean": np.zeros((2, 2), np.float16), "image": b"bytes"}
    before = checksum(sample)
    assert checksum({**sample, "checksum": 7}) == before
    assert checksum({**sample, "id": np.int64(1), "label": np.int32(2)}) == before
    one_bit = np.zeros((2, 2), np.float16)
    one_bit[1, 1] = 6e-8
    for name, value in (("id", 2), ("label", 3), ("caption", "a cats"), ("mean", one_bit), ("image", b"bytez")):
        assert checksum({**sample, name: value}) != before


# ---------------------------------------------------------------------------------------------------------------------
# Reading that goes wrong


def read_error(folder: Path | str, key: str = "data.shards") -> str:
    with pytest.raises(UserError) as raised:
        Shards(folder, key).samples(range(50))
    message = str(raised.value)
    assert message.startswith(f"{key}: ")
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_a_folder_that_is_not_there_or_not_ours(folder: Path, tmp_path: Path) -> None:
    message = read_error(tmp_path / "nowhere", "--held-out")
    assert "does not exist" in message
    assert "tools/make_shards.py" in message
    (tmp_path / "empty").mkdir()
    assert "has no cfpretrain.json" in read_error(tmp_path / "empty")
    (folder / "index.json").unlink()
    assert "has no index.json" in read_error(folder)


@pytest.mark.parametrize(
    ("name", "old", "new", "word"),
    [
        ("cfpretrain.json", "{", "", "cannot be read"),
        ("cfpretrain.json", '"schema_version": 2', '"schema_version": 3', "expected schema_version 2, got 3"),
        ("cfpretrain.json", '"kind": "latents"', '"kind": "sounds"', "sounds"),
        ("cfpretrain.json", "latent_shift", "latent_offset", "latent_offset"),
        ("cfpretrain.json", '"num_samples": 50', '"num_samples": 51', "expected the hash that index.json records"),
        ("index.json", '"cfpretrain.json.blake2b": "', '"cfpretrain.json.blake2b": "0', "expected the hash"),
        ("index.json", "{", "", "cannot be read"),
        ("index.json", '"version": 2, "zip_data"', '"version": 3, "zip_data"', "cannot be read"),
        ("index.json", '"hashes": {', '"mashes": {', "cannot be read"),
        ("index.json", "shard.00000.mds", "../shard.00000.mds", "plain name"),
        ("index.json", '"blake2b": "', '"blake2b": "/etc/', "128 hexadecimal digits"),
        ("index.json", "ndarray:float16:2,4,4", "pkl", "expected columns"),
        ("index.json", "float16:2,4,4", "float16:2,4,5", "expected columns"),
    ],
)
def test_a_damaged_description(folder: Path, name: str, old: str, new: str, word: str) -> None:
    path = folder / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    message = read_error(folder)
    assert word in message
    assert "write the folder again" in message


def test_a_file_that_is_missing_or_cut_short_is_seen_at_once(folder: Path) -> None:
    path = folder / "shard.00003.mds"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{path}: expected a file of {size} bytes, got {size - 1}"):
        Shards(folder)
    path.unlink()
    with pytest.raises(UserError, match=f"{path}: expected a file of {size} bytes, it is missing"):
        Shards(folder)


def test_no_flipped_bit_goes_unseen(folder: Path) -> None:
    """Whatever byte of a shard file flips, offsets and head included: the samples are right, or the read fails."""
    path = folder / "shard.00000.mds"
    whole = path.read_bytes()
    shards = Shards(folder)
    wanted = [checksum(sample) for sample in shards.shard(0)]
    draw = np.random.default_rng(0)
    found = []
    for place in {*range(40), *draw.integers(0, len(whole), 160).tolist()}:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(draw.integers(8))
        path.write_bytes(flipped)
        try:
            assert [checksum(sample) for sample in shards.shard(0)] == wanted
        except UserError as error:
            found.append(str(error))
    assert len(found) > 100
    assert all(f"{path}: sample" in message and "copy the file from" in message for message in found)


def test_images_and_latents_are_told_apart(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--images: expected shards of images, got latents"):
        read_images_info(folder, "--images")
    info = ImagesInfo(("cat",), 1, 0, "lossless", 8, 1, "test")
    from cfpretrain.data.shard_writer import ShardWriter

    writer = ShardWriter(tmp_path / "images", columns_of(info), {})
    writer.begin()
    writer.write(0, [{"id": 5, "label": 0, "caption": "", "image": b"png"}])
    writer.finish(info, 1)
    assert read_images_info(tmp_path / "images", "--images") == info
    assert Shards(tmp_path / "images").sample(0)["image"] == b"png"
