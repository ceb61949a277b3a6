"""Which images a tree or a table lists, in which order and classes; what is left out and said; what is held out."""

import json
import os
import random
from collections import Counter
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cfpretrain.base.console import UserError
from cfpretrain.data.images import read_file, read_image
from cfpretrain.data.listing import Listing, Row, hold_out, list_images
from tests.test_images import png, write_tree


def test_a_tree(tmp_path: Path) -> None:
    names = ["b/2.JPEG", "b/10.jpg", "b/sub/deep/1.png", "b/sub.png", "a/x.webp", "C/y.gif"]
    ignored = ["b/.hidden.jpg", "b/.cache/z.jpg", ".git/z.jpg", "README.md", "b/notes.txt", "a/Thumbs.db"]
    for name in names + ignored:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    listing = list_images(tmp_path)
    assert listing.class_names == ("C", "a", "b")
    assert [row.path for row in listing.rows] == sorted(names)
    assert [row.label for row in listing.rows] == [0, 1, 2, 2, 2, 2]
    assert {row.caption for row in listing.rows} == {""}
    assert (
        listing.ignored
        == "2 files without an image's suffix (MD: 1, TXT: 1), 3 hidden ones, what systems put there (Thumbs.db: 1)"
    )
    assert (listing.warnings, listing.root) == ((), tmp_path)


def write_files(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"1")
    return root


def test_what_systems_put_beside_images_is_no_class(tmp_path: Path) -> None:
    """NAS thumbnails, archives made on a Mac, disks' own folders."""
    write_files(tmp_path, "cat/1.png", "dog/1.png", "cat/@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg", "dog/@EADIR/2.jpg")
    write_files(tmp_path, "__MACOSX/cat/._1.png", "lost+found/1.png", "@eaDir/x.jpg", "#recycle/1.png", "Thumbs.db")
    listing = list_images(tmp_path)
    assert listing.class_names == ("cat", "dog")
    assert [row.path for row in listing.rows] == ["cat/1.png", "dog/1.png"]
    assert listing.ignored.startswith("what systems put there (@eaDir: 2, #recycle: 1, @EADIR: 1, Thumbs.db: 1, ")


def test_images_of_kinds_that_are_not_read_are_warned_of(tmp_path: Path) -> None:
    write_files(tmp_path, "cat/1.png", "dog/1.png", "cat/2.HEIC", "cat/3.heic", "dog/4.jxl", "dog/5.NEF", "dog/6.txt")
    listing = list_images(tmp_path)
    assert listing.warnings == (
        "4 images of a kind that is not read here (HEIC: 2, JXL: 1, NEF: 1) are left out: convert them, e.g. to PNG",
    )
    assert listing.ignored == "1 files without an image's suffix (TXT: 1)"
    write_files(tmp_path, "elk/1.heic", "elk/2.md")
    with pytest.raises(
        UserError, match=r"elk holds no images .*\(HEIC: 1\) are left out: convert .*\(MD: 1\)\); fill or"
    ):
        list_images(tmp_path)
    with pytest.raises(UserError, match=r"class folders, got .*7\.heic in no class folder"):
        list_images(write_files(tmp_path / "others", "7.heic"))
    with pytest.raises(UserError, match=r"expected class folders in .*, got none \(2 .* suffix \(TAR: 2\)\)"):
        list_images(write_files(tmp_path / "archives", "n01440764.tar", "n01443537.tar"))


def test_class_folders_that_are_numbers_have_the_order_of_numbers(tmp_path: Path) -> None:
    for number in range(12):
        write_files(tmp_path / "numbers", f"{number}/{number}.png")
    listing = list_images(tmp_path / "numbers")
    assert listing.class_names == tuple(map(str, range(12)))
    assert [row.label for row in listing.rows] == list(range(12))
    assert [row.path for row in listing.rows] == [f"{number}/{number}.png" for number in range(12)]
    assert list_images(write_files(tmp_path / "from 9", "9/a.png", "010/b.png")).class_names == ("9", "010")
    assert list_images(write_files(tmp_path / "mixed", "9/a.png", "10/b.png", "x/c.png")).class_names == (
        "10",
        "9",
        "x",
    )
    with pytest.raises(UserError, match=r"a number for one class folder only, got .*/01 and 1; rename one"):
        list_images(write_files(tmp_path / "twice", "1/a.png", "01/b.png"))


@pytest.mark.parametrize(
    ("names", "listed", "first"),
    [
        (("train/cat/1.png", "val/cat/2.png"), "train, val", "train"),
        (("Training/cat/1.png", "Test/cat/2.png", "extra/1.png"), "Test, Training", "Training"),
        (("validation/cat/1.png", "test/1.png"), "test, validation", "test"),
        (("train/cat/1.png",), "train", "train"),
        (("train/cat/1.png", "train/readme.txt", "meta.json"), "train", "train"),
    ],
)
def test_the_parent_of_train_and_val_is_refused(
    names: tuple[str, ...], listed: str, first: str, tmp_path: Path
) -> None:
    write_files(tmp_path, *names)
    with pytest.raises(UserError, match=rf"parts of a data set \({listed}\); give one, such as {tmp_path / first},"):
        list_images(tmp_path)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    assert list_images(write_files(tmp_path / "three", "bus/1.png", "train/1.png")).class_names == ("bus", "train")
    assert list_images(write_files(tmp_path / "one", "train/1.png")).class_names == ("train",)


def test_the_parent_of_a_tree_is_warned_of(tmp_path: Path) -> None:
    root = write_files(tmp_path, *(f"pictures/{name}/{i}.png" for name in ("cat", "dog", "elk") for i in (1, 2)))
    (warning,) = list_images(root).warnings
    assert warning == (
        f"the classes are the folders of {root}, pictures, and not the 3 folders inside of them, such as pictures/cat; "
        "where those are meant, give the folder that holds them"
    )
    assert list_images(root / "pictures").warnings == ()
    # One folder in each class, as Tiny ImageNet has it, is usual.
    tiny = write_files(tmp_path / "tiny", "n01/images/1.png", "n02/images/2.png")
    assert list_images(tiny).warnings == ()
    write_files(tmp_path / "loose", "cat/1.png", "cat/young/2.png")
    assert list_images(tmp_path / "loose").warnings == (
        f"all 2 images are of one class, cat, the only folder in {tmp_path / 'loose'}",
    )


def test_names_of_classes_that_are_nearly_the_same_are_warned_of(tmp_path: Path) -> None:
    for first, second in (("Cat", "cat"), ("caf\u00e9", "cafe\u0301"), ("cat", "cat ")):
        root = tmp_path / repr(second)
        (warning,) = list_images(write_files(root, f"{first}/1.png", f"{second}/1.png")).warnings
        assert "are two classes, whose names differ in case, spaces or accents alone" in warning


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    with open(folder + b"/\xff.png", "wb") as file:
        file.write(png())
    listing = list_images(tmp_path)
    assert read_image(read_file(listing.root / listing.rows[0].path)).size == (12, 9)
    assert json.loads(json.dumps(listing.rows[0].path)) == listing.rows[0].path


def test_links_are_followed_but_not_in_a_circle(tmp_path: Path) -> None:
    elsewhere = write_tree(tmp_path / "elsewhere", cat=2)
    root = tmp_path / "root"
    root.mkdir()
    (root / "cat").symlink_to(elsewhere / "cat")
    (elsewhere / "cat" / "broken.png").symlink_to(tmp_path / "nowhere")
    (elsewhere / "cat" / "loop.png").symlink_to("loop.png")
    names = ["cat/000.png", "cat/001.png", "cat/broken.png", "cat/loop.png"]
    assert [row.path for row in list_images(root).rows] == names
    (elsewhere / "cat" / "again").symlink_to(elsewhere)
    with pytest.raises(UserError, match="links to a folder above itself"):
        list_images(root)


def test_the_identity_is_of_everything_that_decides_the_shards(tmp_path: Path) -> None:
    def listed(name: str, change: Callable[[Path], object] = lambda root: None) -> str:
        root = write_tree(tmp_path / name, cat=2, dog=1)
        change(root)
        return str(list_images(root).identity())

    same = listed("one")
    assert listed("two", lambda root: os.utime(root / "cat" / "000.png", (1, 1))) == same
    changes: list[Callable[[Path], object]] = [
        lambda root: (root / "cat" / "000.png").rename(root / "cat" / "0000.png"),
        lambda root: (root / "cat" / "000.png").rename(root / "dog" / "001.png"),
        lambda root: (root / "cat").rename(root / "kitten"),
        lambda root: (root / "cat" / "000.png").write_bytes(b""),
        lambda root: (root / "cat" / "001.png").unlink(),
    ]
    identities = {listed(f"changed{i}", change) for i, change in enumerate(changes)}
    assert len(identities | {same}) == len(changes) + 1


TREE_MISTAKES: list[tuple[Callable[[Path], object], str]] = [
    (lambda root: (root / "stray.jpg").write_bytes(b""), r"class folders, got .*stray\.jpg in no class folder"),
    (lambda root: (root / "empty").mkdir(), "class folder .*empty holds no images; fill or remove it"),
    (lambda root: [(root / "cat" / f"00{i}.png").unlink() for i in range(2)], "class folder .*cat holds no images"),
]


@pytest.mark.parametrize(("spoil", "message"), TREE_MISTAKES)
def test_mistakes_in_a_tree(spoil: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    spoil(write_tree(tmp_path, cat=2))
    with pytest.raises(UserError, match=message) as raised:
        list_images(tmp_path)
    assert "\n" not in str(raised.value)


def test_what_is_no_listing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected class folders in .*, got none"):
        list_images(tmp_path)
    with pytest.raises(UserError, match="does not exist; give a folder of class folders or a table"):
        list_images(tmp_path / "nowhere")
    (tmp_path / "list.txt").write_text("a.png\n")
    with pytest.raises(UserError, match=r"or a table \(\.csv, \.jsonl\), got the file"):
        list_images(tmp_path / "list.txt")
    with pytest.raises(UserError, match="--root: expected only with a table"):
        list_images(write_tree(tmp_path / "tree", cat=1), tmp_path)


def test_options_of_tables_are_refused_with_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--ignore-columns: expected only with a table, got width with the folder"):
        list_images(write_tree(tmp_path / "tree", cat=1), ignore_columns=["width"])


# ---------------------------------------------------------------------------------------------------------------------
# Holding out


@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=5), share=st.floats(0.01, 0.99))
def test_a_share_of_each_class_is_held_out(counts: list[int], share: float) -> None:
    rows = [Row(f"{label}/{i}.png", label, "", 7) for label, count in enumerate(counts) for i in range(count)]
    names = tuple(f"class{label}" for label in range(len(counts)))
    listing = Listing(Path(), rows, names)
    if max(counts) == 1:
        with pytest.raises(UserError, match="--hold-out: expected some class of two images or more"):
            hold_out(listing, share)
        return
    rest, held_out = hold_out(listing, share)
    assert sorted([*rest.rows, *held_out.rows]) == sorted(rows)
    assert rest.class_names == held_out.class_names == names
    assert [list(part.rows) for part in (rest, held_out)] == [
        [row for row in rows if row in set(part.rows)] for part in (rest, held_out)
    ]
    of_class = Counter(row.label for row in held_out.rows)
    for label, count in enumerate(counts):
        assert abs(of_class[label] - share * count) <= 0.5 or of_class[label] in (min(1, count - 1), count - 1)
    shuffled = random.Random(0).sample(rows, len(rows))
    assert set(hold_out(Listing(Path("elsewhere"), shuffled, names), share)[1].rows) == set(held_out.rows)
    assert rest.identity()["part"] != held_out.identity()["part"] != listing.identity()["part"]


def test_rows_of_one_image_are_held_out_together() -> None:
    """Where it has two captions, the model would know it from the other."""
    rows = [Row(f"{i}.png", 0, caption, 7) for i in range(30) for caption in ("one", "two")]
    rest, held_out = hold_out(Listing(Path(), rows, ("x",)), 0.2)
    assert len(held_out.rows) == 12
    assert not {row.path for row in rest.rows} & {row.path for row in held_out.rows}


def test_no_class_is_held_out_as_a_whole() -> None:
    """Of paths with two labels that may come of it: the one class holds out the first, the other the second."""
    outcomes = Counter()
    for first, second, third in permutations(("a.png", "b.png", "c.png")):
        pairs = ((first, 0), (second, 0), (second, 1), (third, 1))
        listing = Listing(Path(), [Row(path, label, "", 7) for path, label in pairs], ("one", "two"))
        try:
            labels = {row.label for row in hold_out(listing, 0.5)[0].rows}
        except UserError:
            labels = {-1}
        outcomes[tuple(sorted(labels))] += 1
    assert outcomes.keys() == {(0, 1), (-1,)}
