"""tools/make_shards.py as a command: same images, same shards, whatever happens on the way."""

import io
import json
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cfpretrain.base.console import EXIT_REQUEUE
from cfpretrain.data.image_shards import deal_images
from cfpretrain.data.images import read_file, read_image
from cfpretrain.data.listing import list_images
from cfpretrain.data.shards import ImagesInfo, Shards, read_info
from examples.digits.pixels import read_all_images
from tests.disks import mounted_disk
from tests.folders import content
from tests.processes import Ended, Rank, run_alone, wait_until
from tests.test_images import encoded, oracle, picture, write_tree
from tests.test_stopping import SMALL_MEMORY
from tests.test_tables import table
from tools.measuring.data import plain_shards
from tools.measuring.photos import write_photos

_WAIT_SECONDS = 120


def start(*arguments: object) -> Rank:
    return Rank("tools/make_shards.py", [str(argument) for argument in arguments], {})


def end(process: Rank) -> Ended:
    out, err = process.communicate(timeout=_WAIT_SECONDS)
    assert process.returncode is not None
    return Ended(process.returncode, out, err)


def make(*arguments: object) -> Ended:
    return end(start(*arguments))


def made(*arguments: object) -> str:
    """What a run that succeeds says."""
    ended = make(*arguments)
    assert (ended.code, ended.err) == (0, ""), ended
    return ended.out


def refused(*arguments: object) -> str:
    """The one line of a run that refuses."""
    ended = make(*arguments)
    assert ended.code == 2, ended
    assert ended.err.count("\n") == 1, ended.err
    assert ended.err.startswith("[cfpretrain] error: ")
    return ended.err


def children(process: Rank) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def is_gone(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def num_written(out: Path) -> int:
    return len(list((out.parent / f".{out.name}.unfinished" / "records").glob("[0-9]*.json")))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images, of which two are damaged."""
    root = write_tree(tmp_path_factory.mktemp("images") / "tree", ant=20, bee=25, cat=15)
    (root / "ant" / "007.png").write_bytes(b"")
    (root / "cat" / "004.png").write_bytes(b"not an image")
    return root


@pytest.fixture(scope="module")
def big_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 photos' worth of work, one of them damaged: about a second for one process."""
    root = tmp_path_factory.mktemp("images") / "big"
    photos = [encoded(picture("RGB", (300 + i, 400 - i), i), "JPEG") for i in range(7)]
    for i in range(100):
        path = root / f"class{i % 3}" / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photos[i % 7])
    (root / "class2" / "050.jpg").write_bytes(b"damaged")
    return root


@pytest.fixture(scope="module")
def big_content(big_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The shards of `big_tree`, made without disturbance."""
    out = tmp_path_factory.mktemp("shards") / "out"
    said = made(big_tree, "--out", out, *_BIG)
    assert any("/100  " in line and "images/s" in line and " left" in line for line in said.splitlines()), said
    return content(out)


_BIG = ("--size", 128, "--images-per-shard", 4)
_TREE = ("--size", 8, "--images-per-shard", 7, "--max-rejected-share", 0.1)


# ---------------------------------------------------------------------------------------------------------------------
# What is made


def test_a_tree_becomes_shards(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    said = made(tree, "--out", out, *_TREE)
    assert f"60 images of 3 classes in {tree}" in said
    assert "58 images of 3 classes, 3 x 8 x 8, lossless; 2 rejected" in said
    assert "images/s" in said.splitlines()[-1]
    info = read_info(out, "--out")
    assert isinstance(info, ImagesInfo)
    assert (info.class_names, info.num_samples, info.num_rejected) == (("ant", "bee", "cat"), 58, 2)
    assert (info.store, info.image_size, info.channels, info.source) == ("lossless", 8, 3, str(tree))
    assert info.versions.keys() == {"cfpretrain", "pillow"}
    shards, listing = Shards(out, "--out"), list_images(tree)
    assert len(shards.shard_sizes) == 9
    assert set(shards.shard_sizes[:-1]) <= {5, 6, 7}
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["cfpretrain.json", "index.json", "rejected.jsonl", *(f"shard.{i:05d}.mds" for i in range(9))]
    )
    ids = []
    for sample in map(shards.sample, range(len(shards))):
        row = listing.rows[sample["id"]]
        assert (sample["label"], sample["caption"]) == (row.label, "")
        pixels = np.array(read_image(sample["image"]))
        np.testing.assert_array_equal(pixels, oracle((tree / row.path).read_bytes(), 8, False))
        ids.append(sample["id"])
    assert sorted(ids) == [i for i in range(60) if i not in (7, 49)]
    # Cut as listed, most shards would hold one class.
    assert all(len({sample["label"] for sample in shards.shard(i)}) > 1 for i in range(8))
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [(one["id"], one["path"]) for one in rejected] == [(7, "ant/007.png"), (49, "cat/004.png")]
    assert rejected[0]["reason"] == "the file is empty"
    assert rejected[1]["reason"].startswith("no image of a known kind")

    before = content(out)
    said = made(tree, "--out", out, *_TREE)
    assert "already there: 58 images" in said
    assert content(out) == before
    assert "image_size: 8 there, 9 now" in refused(tree, "--out", out, *_TREE, "--size", 9)
    assert content(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_any_number_of_workers_makes_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    for workers in (1, 2, 3):
        made(tree, "--out", tmp_path / str(workers), *_TREE, "--workers", workers)
    assert content(tmp_path / "1") == content(tmp_path / "2") == content(tmp_path / "3")


def test_the_files_themselves(tree: Path, tmp_path: Path) -> None:
    said = made(tree, "--out", tmp_path / "out", *_TREE, "--store", "original", "--grey")
    assert "58 images of 3 classes, 1 x 8 x 8, original" in said
    shards, listing = Shards(tmp_path / "out", "--out"), list_images(tree)
    for sample in map(shards.sample, range(len(shards))):
        assert sample["image"] == read_file(tree / listing.rows[sample["id"]].path)


def test_a_table_becomes_shards(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "pictures", x=3)
    lines = [{"path": f"x/00{i}.png", "label": 2 - i, "caption": f"picture, {i}\n"} for i in (2, 0, 1)]
    (tmp_path / "lists").mkdir()
    file = table(tmp_path / "lists", "".join(json.dumps(line) + "\n" for line in lines), "t.jsonl")
    made(file, "--root", root, "--out", tmp_path / "out", "--size", 6, "--grey")
    shards = Shards(tmp_path / "out", "--out")
    samples = list(map(shards.sample, range(3)))
    assert [(s["id"], s["label"], s["caption"]) for s in samples] == [
        (0, 0, "picture, 2\n"),
        (1, 2, "picture, 0\n"),
        (2, 1, "picture, 1\n"),
    ]
    assert shards.info.class_names == ("0", "1", "2")
    images_BCYX, labels_B = read_all_images(tmp_path / "out", "--out")
    assert labels_B.tolist() == [0, 2, 1]
    assert images_BCYX.shape == (3, 1, 6, 6)
    np.testing.assert_array_equal(images_BCYX[1, 0].numpy(), oracle((root / "x" / "000.png").read_bytes(), 6, True))
    assert not (tmp_path / "out" / "rejected.jsonl").exists()


def test_columns_that_nobody_reads_are_said(tmp_path: Path) -> None:
    write_tree(tmp_path, x=1)
    arguments = (table(tmp_path, "path,width\nx/000.png,3\n"), "--out", tmp_path / "out", "--size", 6)
    assert "--ignore-columns width" in refused(*arguments)
    said = made(*arguments, "--ignore-columns", "width")
    assert "ignored: columns width" in said
    assert "WARNING: no row has a label: all 1 images are of one class, unlabelled" in said


def test_a_shard_of_rejected_images_alone(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree", x=6)
    slices = deal_images(6, 2)
    for i in slices[1]:
        (root / "x" / f"00{i}.png").write_bytes(b"")
    made(root, "--out", tmp_path / "out", "--size", 6, "--images-per-shard", 2, "--max-rejected-share", 0.5)
    shards = Shards(tmp_path / "out", "--out")
    assert shards.shard_sizes.tolist() == [2, 2]
    assert [shards.sample(i)["id"] for i in range(4)] == [*slices[0], *slices[2]]


@given(num_images=st.integers(1, 300), each=st.integers(1, 50))
def test_every_image_is_dealt_once(num_images: int, each: int) -> None:
    slices = deal_images(num_images, each)
    assert sorted(i for ids in slices for i in ids) == list(range(num_images))
    assert all(len(ids) == each for ids in slices[:-1])


def test_the_plain_loop_that_it_is_measured_against_makes_the_same(tmp_path: Path) -> None:
    from streaming.base.format.mds import MDSReader

    photos = write_photos(tmp_path / "photos", 6)
    made(photos, "--out", tmp_path / "ours", "--size", 100)
    ours = Shards(tmp_path / "ours", "--out")
    plain_shards(photos, tmp_path / "plain", 100, "lossless")
    (entry,) = json.loads((tmp_path / "plain" / "index.json").read_text())["shards"]
    plain = MDSReader.from_json(str(tmp_path / "plain"), "", entry)
    for i in range(6):
        sample = ours.sample(i)
        del sample["checksum"]
        assert plain[i] == sample


# ---------------------------------------------------------------------------------------------------------------------
# What images lose


@pytest.fixture(scope="module")
def odd_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 images: 12 half transparent, in three ways, 4 of CMYK, 2 animations, 3 small ones."""
    root = write_tree(tmp_path_factory.mktemp("images") / "odd", ant=9, bee=0)
    for i in range(12):
        shape = Image.new("RGBA", (20, 20), (0, 200, 0, 0))
        shape.paste((200, 0, 0, 255), (0, 0, 20, 10))
        kind = ("PNG", "WEBP", "TIFF")[i % 3]
        (root / "bee" / f"{i:02d}.{kind.lower()}").write_bytes(encoded(shape, kind))
    for i in range(4):
        (root / "bee" / f"c{i}.jpg").write_bytes(encoded(picture("CMYK", (20, 20), i), "JPEG"))
    frames = [picture("RGB", (20, 20), i) for i in range(2)]
    for i in range(2):
        (root / "bee" / f"g{i}.gif").write_bytes(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    for i in range(3):
        (root / "ant" / f"small{i}.png").write_bytes(encoded(picture("RGB", (7, 30), i), "PNG"))
    return root


_ODD = ("--size", 8, "--images-per-shard", 4)
_LOST = [
    "12 images with transparency are composited on white (--background)",
    "4 images in CMYK or CIELAB are converted to RGB without their colour profile",
    "2 images of several frames or pictures give their first",
    "3 images have a side of fewer than 8 pixels and are enlarged",
]


def test_what_images_lose_is_counted_over_workers_and_runs(odd_tree: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        said = made(odd_tree, "--out", tmp_path / str(workers), *_ODD, "--workers", workers)
        assert [line for line in said.splitlines() if line.endswith(tuple(_LOST))] == [
            f"[cfpretrain] {tmp_path / str(workers)}: {line}" for line in _LOST
        ]
    assert content(tmp_path / "1") == content(tmp_path / "3")
    shards, listing = Shards(tmp_path / "1", "--out"), list_images(odd_tree)
    for sample in map(shards.sample, range(len(shards))):
        if listing.rows[sample["id"]].path[:5] in {"bee/0", "bee/1"}:
            pixels = np.array(read_image(sample["image"]))
            assert (pixels[-1] == 255).all(), "what is transparent is white"
            assert (pixels[0] == (200, 0, 0)).all()
    # Stopped at a damaged image, and gone on: the counts are of both runs.
    out, root = tmp_path / "out", shutil.copytree(odd_tree, tmp_path / "tree")
    last = list_images(root).rows[deal_images(30, 4)[-1][-1]].path
    num_bytes = (root / last).stat().st_size
    before = (root / last).read_bytes()
    (root / last).write_bytes(bytes(num_bytes))
    refused(root, "--out", out, *_ODD, "--workers", 1)
    assert num_written(out) == 8
    (tmp_path / ".out.unfinished" / "records" / "00007.json").unlink()
    (root / last).write_bytes(before)
    said = made(root, "--out", out, *_ODD)
    assert all(f"{out}: {line}\n" in said for line in _LOST)
    assert all(f"{out}: {line}\n" in made(root, "--out", out, *_ODD) for line in _LOST), "said of what is there, too"


def test_the_background_is_a_part_of_what_shards_are(odd_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = made(odd_tree, "--out", out, *_ODD, "--background", "black")
    assert "12 images with transparency are composited on black (--background)" in said
    info = read_info(out, "--out")
    assert isinstance(info, ImagesInfo)
    assert (info.background, info.changes["composited"]) == ((0, 0, 0), 12)
    message = refused(odd_tree, "--out", out, *_ODD)
    assert "holds other shards already (background: black there, white now)" in message
    message = refused(odd_tree, "--out", out, *_ODD, "--background", "#000000", "--upright")
    assert "holds other shards already (upright: False there, True now)" in message
    assert "perhaps white" in refused(odd_tree, "--out", tmp_path / "other", *_ODD, "--background", "whit")


def test_originals_keep_no_transparency_for_dali_to_drop(odd_tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = (odd_tree, "--out", out, *_ODD, "--store", "original", "--max-rejected-share", 0.3)
    assert "12 images with transparency are composited on white" in made(*arguments)
    shards, listing = Shards(out, "--out"), list_images(odd_tree)
    composited = 0
    for sample in map(shards.sample, range(len(shards))):
        path = odd_tree / listing.rows[sample["id"]].path
        stored = Image.open(io.BytesIO(sample["image"]))
        assert not stored.has_transparency_data
        if sample["image"] != path.read_bytes():
            assert (stored.format, stored.mode, stored.size) == ("PNG", "RGB", (20, 20))
            composited += 1
    assert composited == 12


# ---------------------------------------------------------------------------------------------------------------------
# A part is held out

_HELD = ("--size", 8, "--images-per-shard", 4, "--max-rejected-share", 0.04, "--hold-out", 0.2)  # 0.04: of both parts


def test_a_share_of_each_class_goes_into_a_folder_of_its_own(tree: Path, tmp_path: Path) -> None:
    out, held_out = tmp_path / "out", tmp_path / "held"
    said = made(tree, "--out", out, "--held-out", held_out, *_HELD)
    assert f"48 images for {out}, 12 held out for {held_out}" in said
    infos = [read_info(folder, "--out") for folder in (out, held_out)]
    assert [info.class_names for info in infos] == [("ant", "bee", "cat")] * 2
    assert [info.source for info in infos] == [f"{tree}, all but 0.2 of each class", f"{tree}, 0.2 of each class"]
    assert sum(info.num_samples for info in infos) == 58
    found = Counter[bytes]()
    for folder in (out, held_out):
        shards = Shards(folder, "--out")
        found.update(sample["image"] for sample in map(shards.sample, range(len(shards))))
    made(tree, "--out", tmp_path / "all", *_TREE)
    shards = Shards(tmp_path / "all", "--out")
    assert found == Counter(sample["image"] for sample in map(shards.sample, range(len(shards))))

    before = content(tmp_path)
    said = made(tree, "--out", out, "--held-out", held_out, *_HELD)
    assert said.count("already there: ") == 2
    message = refused(tree, "--out", out, "--held-out", held_out, *_HELD, "--hold-out", 0.3)
    assert (
        "(images: 48 there, 41 now, part: all but 0.2 of each class there, all but 0.3 of each class now, " in message
    )
    message = refused(tree, "--out", held_out, *_HELD[:-2])
    assert "part: 0.2 of each class there, all now" in message
    assert content(tmp_path) == before


def test_both_folders_are_checked_before_the_first_is_written(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "todo.txt").write_text("milk")
    message = refused(tree, "--out", tmp_path / "out", "--held-out", tmp_path / "held", *_HELD)
    assert "held is not empty and holds no complete shards" in message
    assert num_written(tmp_path / "out") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--hold-out", 0.1), "--hold-out and --held-out: expected a share and a folder for it, got one of them"),
        (("--held-out", "held"), "--hold-out and --held-out: expected a share and a folder for it, got one of them"),
        (("--hold-out", 0, "--held-out", "held"), "--hold-out: expected a share between 0 and 1, got 0"),
        (("--hold-out", 1, "--held-out", "held"), "--hold-out: expected a share between 0 and 1, got 1"),
        (("--hold-out", 0.1, "--held-out", "out"), "--held-out: expected a folder outside of the images and of --out"),
        (("--hold-out", 0.1, "--held-out", "out/held"), "--held-out: expected a folder outside of the images and of"),
    ],
)
def test_mistakes_in_holding_out(options: tuple[object, ...], message: str, tree: Path, tmp_path: Path) -> None:
    places = [tmp_path / str(option) if str(option).startswith(("held", "out")) else option for option in options]
    assert message in refused(tree, "--out", tmp_path / "out", "--size", 8, *places)
    assert not list(tmp_path.iterdir())


def test_kills_change_neither_folder(big_tree: Path, tmp_path: Path) -> None:
    wanted, folder = tmp_path / "wanted", tmp_path / "made"

    def command(where: Path) -> tuple[object, ...]:
        return (big_tree, "--out", where / "out", "--held-out", where / "held", *_BIG, "--hold-out", 0.4)

    made(*command(wanted))
    rng, kills = random.Random(3), 0
    while kills < 4:
        kills += kill_at_a_random_moment(start(*command(folder)), folder / rng.choice(("out", "held")), rng)
        if (folder / "held").exists():
            made(*command(folder))
            assert content(folder) == content(wanted)
            shutil.rmtree(folder)
    made(*command(folder))
    assert content(folder) == content(wanted)


# ---------------------------------------------------------------------------------------------------------------------
# Too many rejected, and other mistakes


def test_too_many_rejected_images_stop_it(tree: Path, tmp_path: Path) -> None:
    out, arguments = tmp_path / "out", (tree, "--out", tmp_path / "out", "--size", 8, "--images-per-shard", 7)
    message = refused(*arguments, "--max-rejected-share", 0.02)
    assert "--max-rejected-share: expected at most 0.02 of 60 images to be rejected, got 2 already: " in message
    assert "ant/007.png: the file is empty; cat/004.png: no image" in message
    assert "Raise the share to 0.034 or more" in message
    # What earlier runs rejected counts.
    before = num_written(out)
    assert "got 2 already" in refused(*arguments, "--max-rejected-share", 0.02)
    assert num_written(out) == before
    assert not out.exists()
    made(*arguments, "--max-rejected-share", 0.04)
    # Nor is a finished folder taken under a share that it breaks.
    assert re.search(r"got 2 already: 2 in \S+rejected\.jsonl\.", refused(*arguments, "--max-rejected-share", 0.02))
    made(tree, "--out", tmp_path / "at once", *_TREE)
    assert content(out) == content(tmp_path / "at once")


def test_no_image_at_all_is_left(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree", x=2)
    for path in root.glob("*/*"):
        path.write_bytes(b"")
    message = refused(root, "--out", tmp_path / "out", "--size", 8, "--max-rejected-share", 1)
    assert "expected some samples, got none" in message


def test_mistakes(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "does not exist; give a folder" in refused(tmp_path / "nowhere", "--out", out, "--size", 8)
    assert "outside of the images" in refused(tree, "--out", tree / "shards", "--size", 8)
    (tmp_path / "loop").symlink_to("loop")
    assert f"{tmp_path / 'loop'} is a link" in refused(tree, "--out", tmp_path / "loop", "--size", 8)
    for option, value, problem in (
        ("--size", "0", "expected 1 to 8192, got 0"),
        ("--size", "1000000", "expected 1 to 8192, got 1000000"),
        ("--workers", "0", "expected 1 to 1024, got 0"),
        ("--workers", "x", "invalid int value: 'x'"),
        ("--max-rejected-share", "2", "expected 0 to 1, got 2"),
        ("--max-rejected-share", "nan", "expected 0 to 1, got nan"),
    ):
        assert f"{option}: {problem}" in refused(tree, "--out", out, "--size", 8, option, value)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("milk")
    assert "holds no complete shards" in refused(tree, "--out", tmp_path / "notes", "--size", 8)
    assert content(tmp_path / "notes") == {"todo.txt": b"milk"}


def test_changed_images_do_not_go_on_with_old_shards(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree", x=6)
    (root / "x" / "005.png").write_bytes(b"")
    arguments = (root, "--out", tmp_path / "out", "--size", 8, "--images-per-shard", 2)
    refused(*arguments)
    (root / "x" / "005.png").unlink()
    message = refused(*arguments)
    assert "is the unfinished work of other settings (images: 6 there, 5 now, other file_sizes, " in message
    shutil.rmtree(tmp_path / ".out.unfinished")
    made(*arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Killed, stopped, out of space


def kill_at_a_random_moment(process: Rank, out: Path, rng: random.Random) -> bool:
    """Kills a command while or after it writes `out`; whether it was in time. Its workers end with it."""
    wait_until(lambda: num_written(out) > 0 or "listing" in process.said(), _WAIT_SECONDS, [process])
    time.sleep(rng.uniform(0, 0.6))
    workers = children(process) if process.poll() is None else []
    process.kill()
    process.communicate(timeout=_WAIT_SECONDS)
    wait_until(lambda: all(map(is_gone, workers)), _WAIT_SECONDS)  # none outlives the command
    return process.returncode == -signal.SIGKILL


def make_under_kills(tree: Path, wanted: dict[str, bytes], tmp_path: Path, num_kills: int, seed: int) -> None:
    """Kills the command until it was killed so often, and compares every folder that it finished meanwhile."""
    out, rng, kills = tmp_path / "out", random.Random(seed), 0
    while kills < num_kills:
        kills += kill_at_a_random_moment(start(tree, "--out", out, *_BIG), out, rng)
        if out.exists():
            # Killed between its last two acts, it leaves the second to the next run.
            made(tree, "--out", out, *_BIG)
            assert content(out) == wanted
            shutil.rmtree(out)
    made(tree, "--out", out, *_BIG)
    assert content(out) == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_kills_at_random_moments_change_nothing(big_tree: Path, big_content: dict[str, bytes], tmp_path: Path) -> None:
    make_under_kills(big_tree, big_content, tmp_path, num_kills=3, seed=1)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(
    big_tree: Path, big_content: dict[str, bytes], tmp_path: Path
) -> None:
    make_under_kills(big_tree, big_content, tmp_path, num_kills=20, seed=2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_asked_to_stop(number: signal.Signals, big_tree: Path, big_content: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(big_tree, "--out", out, *_BIG)
    wait_until(lambda: num_written(out) > 2, _WAIT_SECONDS, [process])
    workers = children(process)
    assert workers
    process.send_signal(number)
    ended = end(process)
    assert (ended.code, ended.err) == (EXIT_REQUEUE, "")
    assert ended.out.splitlines()[-1] == f"[cfpretrain] stopped ({number.name}); the same command goes on"
    wait_until(lambda: all(map(is_gone, workers)), _WAIT_SECONDS)
    kept = num_written(out)
    assert kept > 2
    made(big_tree, "--out", out, *_BIG)
    assert content(out) == big_content


@pytest.mark.parametrize(
    ("number", "how"),
    [
        (signal.SIGKILL, "by SIGKILL, as the system does where memory is short: give fewer --workers"),
        (signal.SIGSEGV, "by SIGSEGV: if it happens again, remove that image"),
    ],
)
def test_a_worker_that_is_killed_is_an_error(
    number: signal.Signals, how: str, big_tree: Path, big_content: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(big_tree, "--out", out, *_BIG, "--workers", 2)
    wait_until(lambda: num_written(out) > 2, _WAIT_SECONDS, [process])
    os.kill(children(process)[1], number)
    ended = end(process)
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert "error: a worker that was reading class" in ended.err
    assert f" ended {how}; the same command goes on" in ended.err
    made(big_tree, "--out", out, *_BIG)
    assert content(out) == big_content


def test_a_full_disk_is_one_line(big_tree: Path, big_content: dict[str, bytes], tmp_path: Path) -> None:
    num_bytes = sum(map(len, big_content.values()))
    with mounted_disk(tmp_path / "disk", f"{2 * num_bytes}") as disk:
        (disk / "ballast").write_bytes(bytes(int(1.4 * num_bytes)))
        arguments = (big_tree, "--out", disk / "out", *_BIG)
        message = refused(*arguments)
        assert f"{disk / 'out'} cannot be written (No space left on device)" in message
        assert "the same command goes on" in message
        assert num_written(disk / "out") > 2
        (disk / "ballast").unlink()
        made(*arguments)
        assert content(disk / "out") == big_content


FULL_MEMORY = SMALL_MEMORY.replace(
    "sys.argv = sys",
    'subprocess.run(["dd", "if=/dev/zero", "of=/dev/shm/full"], stderr=subprocess.DEVNULL)\nsys.argv = sys',
)


def test_shared_memory_that_is_full_is_one_line(tree: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("a full /dev/shm needs root")
    ended = run_alone(FULL_MEMORY, ["tools/make_shards.py", str(tree), "--out", str(tmp_path / "out"), "--size", "8"])
    if ended.code == 99:
        pytest.skip(f"mounting a small /dev/shm was refused: {ended.err}")
    assert ended.code == 2, ended.err
    [line] = ended.err.strip().splitlines()
    assert "error: no locks can be made for workers (No space left on device); free room in /dev/shm" in line
