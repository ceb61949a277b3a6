"""Generated images as files: all or nothing, the same bytes whatever happened on the way."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from cfpretrain.base import files
from cfpretrain.base.console import UserError
from cfpretrain.evaluation.given_images import open_images
from cfpretrain.evaluation.image_set import ImageSet
from tests.checkpoints import failing
from tests.folders import content
from tests.image_files import pixels

LABELS, NAMES = [0, 1, 0, 1, 0], ["a cat", "dog, wild"]
IMAGES = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
OUTS = ["out", "out.npz"]


def images_of(folder: Path, out: str, **plan) -> ImageSet:
    return ImageSet(folder / out, LABELS, NAMES, 2, {"seed": 0, "sizes": (1, 2), **plan})


def write(images: ImageSet, *numbers: int) -> None:
    for number in numbers:
        ids = torch.arange(5)[2 * number : 2 * number + 2]
        images.write(ids, IMAGES[ids])


def write_all(folder: Path, out: str) -> ImageSet:
    images = images_of(folder, out)
    images.begin()
    write(images, 0, 1, 2)
    images.finish()
    return images


def kill(images: ImageSet) -> None:
    """Frees the lock, as the end of its process does."""
    images._work.release()


def expected_pixels() -> np.ndarray:
    return (IMAGES.permute(0, 2, 3, 1) * 255).round().numpy().astype(np.uint8)


def test_a_folder_of_png_is_a_table_of_images(tmp_path: Path) -> None:
    out = write_all(tmp_path, "out").out
    assert sorted(content(out)) == [*(f"{i:06d}.png" for i in range(5)), "labels.csv", "settings.json"]
    for i, expected in enumerate(expected_pixels()):
        assert (pixels(out / f"{i:06d}.png") == expected).all()
    from cfpretrain.data.listing import list_images

    listing = list_images(out / "labels.csv")
    assert [listing.class_names[row.label] for row in listing.rows] == [NAMES[label] for label in LABELS]
    assert list(tmp_path.iterdir()) == [out]


def test_the_table_tells_classes_of_one_name_apart(tmp_path: Path) -> None:
    images = ImageSet(tmp_path / "out", [0, 2, 1], ("crane", "2", "crane"), 2, {})
    assert images._table().decode().splitlines() == [
        "path,label,index",
        "000000.png,crane,0",
        "000001.png,crane,2",
        "000002.png,2,1",
    ]


@pytest.mark.parametrize("out", OUTS)
def test_what_is_not_complete_gets_no_name(out, tmp_path: Path) -> None:
    """A mistake of ours; under `python -O`, too, where half of the images would be taken for all."""
    images = images_of(tmp_path, out)
    images.begin()
    write(images, 0)
    with pytest.raises(RuntimeError, match=r"of \d+ that are missing: it is not finished"):
        images.finish()
    assert not (tmp_path / out).exists()


def test_an_archive_is_what_adm_reads(tmp_path: Path) -> None:
    out = write_all(tmp_path, "out.npz").out
    with np.load(out) as archive:
        assert archive.files == ["arr_0", "arr_1"]
        assert (archive["arr_0"].dtype, archive["arr_1"].tolist()) == (np.uint8, LABELS)
        assert (archive["arr_0"] == expected_pixels()).all()
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("out", ["out", "out.npz", "OUT.NPZ"])
def test_what_is_written_is_read_for_scoring(out: str, tmp_path: Path) -> None:
    images = open_images(write_all(tmp_path, out).out, "KEY")
    assert (len(images), images.size) == (5, (4, 4))
    np.testing.assert_array_equal(images.read(range(5)).permute(0, 2, 3, 1).numpy(), expected_pixels())


@pytest.mark.parametrize("out", OUTS)
def test_bytes_depend_neither_on_order_nor_on_kills(tmp_path: Path, out) -> None:
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole = write_all(tmp_path / "whole", out)
    images = images_of(tmp_path / "broken", out)
    images.begin()
    write(images, 2)
    files.hidden_beside(images.unfinished / "3").write_bytes(b"half")
    if out == "out":
        (images.unfinished / "000004.png").write_bytes(b"")
    kill(images)
    images = images_of(tmp_path / "broken", out)
    assert not images.is_complete()
    images.begin()
    assert images.missing() == ([0, 1, 2] if out == "out" else [0, 1])
    assert images.count([0, 1]) == 4
    write(images, *images.missing())
    images.finish()
    assert content(images.out) == content(whole.out)
    assert list((tmp_path / "broken").iterdir()) == [images.out]
    assert images.is_complete()


@pytest.mark.parametrize("call", ["rename", "replace"])
def test_a_kill_while_it_gets_its_name(tmp_path: Path, call, monkeypatch: pytest.MonkeyPatch) -> None:
    out = {"rename": "out", "replace": "out.npz"}[call]
    images = images_of(tmp_path, out)
    images.begin()
    write(images, 0, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(UserError, match="cannot be written"):
            images.finish()
    assert not images.out.exists()
    kill(images)
    images = images_of(tmp_path, out)
    images.begin()
    assert images.missing() == []
    images.finish()
    assert list(tmp_path.iterdir()) == [images.out]


def test_what_a_kill_left_beside_a_complete_archive_goes(tmp_path: Path) -> None:
    images = write_all(tmp_path, "out.npz")
    images.unfinished.mkdir()
    assert images.is_complete()
    assert list(tmp_path.iterdir()) == [images.out]


@pytest.mark.parametrize("out", OUTS)
def test_other_settings_are_refused(tmp_path: Path, out) -> None:
    images = images_of(tmp_path, out)
    images.begin()
    kill(images)
    other = images_of(tmp_path, out, seed=1)
    with pytest.raises(UserError, match=r"unfinished work of other settings \(seed: 0 there, 1 now\)"):
        other.begin()
    kill(other)
    images.begin()
    with pytest.raises(UserError, match=r"--out: .* is being written by another process; wait for its end"):
        images_of(tmp_path, out).begin()
    write(images, 0, 1, 2)
    images.finish()
    with pytest.raises(UserError, match=r"holds images of other settings already \(seed: 0 there, 1 now\)"):
        images_of(tmp_path, out, seed=1).is_complete()


@pytest.mark.parametrize("out", OUTS)
def test_what_lies_there_is_not_overwritten(tmp_path: Path, out) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out.npz").write_bytes(b"mine")
    with pytest.raises(UserError, match="is there already and is none of these images; delete it, or choose another"):
        images_of(tmp_path, out).is_complete()


def cut_short(folder: Path) -> None:
    file = folder / "000003.png"
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES = {
    "an image is gone": lambda folder: (folder / "000000.png").unlink(),
    "an image is empty": lambda folder: (folder / "000004.png").write_bytes(b""),
    "an image is cut short": cut_short,
    "the table is gone": lambda folder: (folder / "labels.csv").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_made_whole(tmp_path: Path, damage) -> None:
    images = write_all(tmp_path, "out")
    whole = content(images.out)
    DAMAGES[damage](images.out)
    again = images_of(tmp_path, "out")
    assert not again.is_complete()
    again.begin()
    assert len(again.missing()) == (0 if damage == "the table is gone" else 1)
    write(again, *again.missing())
    again.finish()
    assert again.is_complete()
    assert content(again.out) == whole
    assert list(tmp_path.iterdir()) == [again.out]


@pytest.mark.parametrize("text", ["", "{", "[]", "\0", "[" * 100_000], ids=["empty", "cut", "list", "binary", "deep"])
def test_damaged_settings_are_said(tmp_path: Path, text) -> None:
    images = write_all(tmp_path, "out")
    (images.out / "settings.json").write_text(text)
    with pytest.raises(UserError, match="is none of these images; delete it, or choose another"):
        images_of(tmp_path, "out").is_complete()
    images.out.rename(images.unfinished)
    with pytest.raises(
        UserError, match=r"settings\.json is damaged \(.*\); delete \S*\.out\.unfinished to begin again$"
    ):
        images_of(tmp_path, "out").begin()


def test_what_is_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / ".out.unfinished").write_text("mine")
    with pytest.raises(UserError, match=r"--out: \S*\.out\.unfinished is in the way of .*; remove it"):
        images_of(tmp_path, "out").begin()


@pytest.mark.parametrize("out", OUTS)
def test_a_full_disk_is_said(tmp_path: Path, out, monkeypatch: pytest.MonkeyPatch) -> None:
    images = images_of(tmp_path, out)
    images.begin()
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(UserError, match=r"--out: .* cannot be written \(No space left on device\); fix that, and"):
        write(images, 0)
    assert images.missing() == [0, 1, 2]
