"""Which images there are, which are rejected and why, and the crop against a plain oracle."""

import csv
import io
import json
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cfpretrain.console import UserError
from cfpretrain.data import images
from cfpretrain.data.images import (
    RejectedImageError,
    Storing,
    centre_crop,
    list_images,
    read_all_images,
    read_file,
    read_image,
    read_samples,
    stored_image,
)
from cfpretrain.data.shard_writer import ShardWriter
from cfpretrain.data.shards import ImagesInfo, Shards, image_columns

_ORIENTATION = 0x0112  # of EXIF


def picture(mode: str, size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Blurred noise in any mode; (width, height)."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1] // 6 + 2, size[0] // 6 + 2, 4), np.uint8)
    array = np.array(Image.fromarray(noise, "RGBA").resize(size, Image.Resampling.BICUBIC))
    if mode == "I;16":
        return Image.fromarray(array[:, :, 0].astype(np.uint16) * 257)
    if mode == "LA":
        return Image.merge("LA", [Image.fromarray(array[:, :, i]) for i in (0, 3)])
    if mode in ("RGBA", "CMYK"):
        return Image.merge(mode, [Image.fromarray(array[:, :, i]) for i in range(4)])
    return Image.fromarray(array[:, :, :3]).convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """The bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(size: tuple[int, int] = (12, 9), seed: int = 0) -> bytes:
    return encoded(picture("RGB", size, seed), "PNG")


def write_tree(root: Path, **classes: int) -> Path:
    """A tree of small real images: name of a class -> number of its images."""
    for number, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i:03d}.png").write_bytes(png(seed=100 * number + i))
    return root


# ---------------------------------------------------------------------------------------------------------------------
# The crop


def oracle(data: bytes, size: int, is_grey: bool) -> np.ndarray:
    """ADM's centre crop as its description reads, on arrays."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data))
        image.load()
        image = image.convert("RGB")
    if is_grey:
        image = image.convert("L")
    width, height = image.size
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        image = image.resize((width, height), resample=Image.BOX)
    scale = size / min(width, height)
    pixels = image.resize((round(width * scale), round(height * scale)), resample=Image.BICUBIC)
    array = np.array(pixels)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


_SAVED_AS = {
    "RGB": ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM"),
    "L": ("JPEG", "PNG", "PPM"),
    "CMYK": ("JPEG", "TIFF"),
    "P": ("PNG", "GIF"),
    "RGBA": ("PNG", "WEBP", "TIFF"),
    "LA": ("PNG",),
    "1": ("PNG",),
}


def test_the_crop_is_the_oracles_bit_for_bit() -> None:
    rng = random.Random(5)
    modes = set()
    for seed in range(200):
        mode = rng.choice(list(_SAVED_AS))
        size = (rng.randint(1, 400), rng.randint(1, 400))
        target = rng.choice((1, 8, 17, 32, 64, 100))
        kind = rng.choice(_SAVED_AS[mode])
        image = picture(mode, size, seed)
        options: dict[str, object] = {}
        if kind in ("JPEG", "PNG", "WEBP", "TIFF") and rng.random() < 0.5:
            exif = Image.Exif()
            exif[_ORIENTATION] = rng.randint(2, 8)
            options["exif"] = exif
        if mode == "P" and kind == "PNG" and rng.random() < 0.5:
            options["transparency"] = bytes(range(256))
        data = encoded(image, kind, **options)
        is_grey = seed % 4 == 0
        stored = Image.open(io.BytesIO(stored_image(data, Storing("lossless", target, is_grey))))
        assert stored.mode == ("L" if is_grey else "RGB")
        wanted = oracle(data, target, is_grey)
        np.testing.assert_array_equal(np.array(stored), wanted, err_msg=f"{mode} {size} {target} {kind} {options}")
        modes.add((mode, kind))
    assert len(modes) > 15


def test_exif_rotation_is_ignored() -> None:
    image, exif = picture("RGB", (40, 24)), Image.Exif()
    exif[_ORIENTATION] = 6
    turned = stored_image(encoded(image, "JPEG", exif=exif), Storing("lossless", 24))
    assert turned == stored_image(encoded(image, "JPEG"), Storing("lossless", 24))


def test_only_pixels_are_stored() -> None:
    """A profile, a rotation or a transparent colour in the PNG could change what a decoder makes of it."""
    exif = Image.Exif()
    exif[_ORIENTATION] = 3
    data = encoded(
        picture("RGB", (30, 30)), "PNG", exif=exif, icc_profile=b"a profile", transparency=(1, 2, 3), dpi=(72, 72)
    )
    stored = stored_image(data, Storing("lossless", 16))
    chunks, at = [], 8
    while at < len(stored):
        length = int.from_bytes(stored[at : at + 4], "big")
        chunks.append(stored[at + 4 : at + 8])
        at += 12 + length
    assert set(chunks) == {b"IHDR", b"IDAT", b"IEND"}


def test_of_an_animation_the_first_frame_is_stored() -> None:
    frames = [picture("RGB", (20, 20), seed) for seed in range(3)]
    for kind in ("WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(np.array(read_image(data)), np.array(frames[0]))


def test_of_a_file_of_several_pictures_the_first_is_stored() -> None:
    first, second = picture("RGB", (20, 20), 1), picture("RGB", (20, 20), 2)
    data = encoded(first, "MPO", save_all=True, append_images=[second])
    np.testing.assert_array_equal(np.array(read_image(data)), np.array(read_image(encoded(first, "JPEG"))))
    assert stored_image(data, Storing("original", 16)) == data


def test_original_files_keep_their_bytes() -> None:
    data = encoded(picture("RGB", (50, 40)), "JPEG")
    assert stored_image(data, Storing("original", 16)) == data
    assert stored_image(data, Storing("original", 16, is_grey=True)) == data


# ---------------------------------------------------------------------------------------------------------------------
# What is rejected


def huge_png() -> bytes:
    """A PNG of a few bytes that claims 20000 x 20000 pixels."""
    data = bytearray(png())
    data[16:24] = (20000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def no_pixels() -> bytes:
    return b"P6 0 5 255\n"


JPEG = encoded(picture("RGB", (64, 48)), "JPEG", quality=90)
REJECTED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "the file is empty"),
    "text": (lambda: b"<html>404 not found</html>", "no image of a known kind"),
    "truncated JPEG": (lambda: JPEG[: len(JPEG) // 2], "truncated"),
    "header alone": (lambda: JPEG[:30], "cannot be decoded|no image"),
    "truncated PNG": (lambda: png((60, 60))[:2000], "cannot be decoded"),
    "corrupt PNG": (lambda: png((60, 60)).replace(b"IDAT", b"IDAX"), "or a damaged one"),
    "bomb": (huge_png, "decompression bomb"),
    "no pixels": (no_pixels, "cannot be decoded|no pixels|no image"),
    "16 bits": (lambda: encoded(picture("I;16", (9, 9)), "PNG"), r"its values \(mode I;16\) do not fit 8 bits"),
    "floats": (lambda: encoded(picture("F", (9, 9)), "TIFF"), r"its values \(mode F\) do not fit 8 bits"),
    "a kind that runs programs": (lambda: encoded(picture("RGB", (9, 9)), "EPS"), "no image of a known kind"),
}


@pytest.mark.parametrize("store", ["lossless", "original"])
@pytest.mark.parametrize("name", REJECTED)
def test_what_does_not_decode_is_rejected_with_a_reason(name: str, store: str) -> None:
    make, reason = REJECTED[name]
    data = make()
    with pytest.raises(RejectedImageError, match=reason) as raised:
        stored_image(data, Storing(store, 8))
    assert "\n" not in str(raised.value)
    assert " at 0x" not in str(raised.value)


def test_a_thin_image_does_not_fill_the_memory() -> None:
    thin = encoded(Image.new("L", (1, 60000)), "PNG")
    for store in ("lossless", "original"):
        with pytest.raises(RejectedImageError, match=r"too thin: 1 x 60000 would become 256 x 15360000"):
            stored_image(thin, Storing(store, 256))


@pytest.mark.parametrize(
    ("kind", "mode"), [("GIF", "P"), ("AVIF", "RGB"), ("TIFF", "LA"), ("TIFF", "1"), ("JPEG2000", "LA")]
)
def test_what_dali_cannot_decode_is_not_stored_as_it_is(kind: str, mode: str) -> None:
    data = encoded(picture(mode, (20, 20)), kind)
    with pytest.raises(RejectedImageError, match=f"DALI does not decode {kind} of mode {mode} as PIL does"):
        stored_image(data, Storing("original", 8))
    assert stored_image(data, Storing("lossless", 8))


def test_what_is_stored_as_it_is_dali_decodes_as_pil_does(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    from cfpretrain.data.pixels import decode_shards

    kinds = {**_SAVED_AS, "RGB": (*_SAVED_AS["RGB"], "JPEG2000", "MPO"), "L": (*_SAVED_AS["L"], "TIFF", "JPEG2000")}
    (tmp_path / "images" / "x").mkdir(parents=True)
    for mode, of_mode in kinds.items():
        for kind in of_mode:
            data = encoded(picture(mode, (32, 32)), kind)
            if (kind, mode) not in {("GIF", "P"), ("TIFF", "CMYK")}:
                (tmp_path / "images" / "x" / f"{mode}_{kind}.jpg").write_bytes(data)
    write_shards(tmp_path / "shards", tmp_path / "images", Storing("original", 32))
    paths = sorted((tmp_path / "images" / "x").iterdir())
    (batch,) = decode_shards(Shards(tmp_path / "shards"), [0], len(paths), torch.device("cpu"), 1)
    assert len(batch.samples) == len(paths) > 15
    for pixels_YXC, path in zip(batch.pixels_BYXC, paths, strict=True):
        wanted = np.array(read_image(path.read_bytes())).astype(int)
        assert np.abs(pixels_YXC.numpy() - wanted).max() <= 2, path.name


def test_an_image_above_half_of_pils_limit_is_no_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    data = png((20, 20))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    assert read_image(data).size == (20, 20)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 199)
    with pytest.raises(RejectedImageError, match="decompression bomb"):
        read_image(data)


def test_unreadable_files_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for name, target in (("endless.png", "/dev/zero"), ("loop.png", "loop.png")):
        (tmp_path / name).symlink_to(target)
    for path, reason in (
        (tmp_path / "gone.png", "No such file or directory"),
        (tmp_path / "loop.png", "Too many levels of symbolic links"),
        (tmp_path / "folder.png", "it is no regular file"),
        (tmp_path / "pipe.png", "it is no regular file"),
        (tmp_path / "endless.png", "it is no regular file"),
    ):
        with pytest.raises(RejectedImageError, match=f"^the file cannot be read: {reason}$"):
            read_file(path)

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    (tmp_path / "closed.png").touch()
    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read everything
    with pytest.raises(RejectedImageError, match=r"^the file cannot be read: Permission denied$"):
        read_file(tmp_path / "closed.png")


def test_a_disk_that_fails_rejects_no_image(tmp_path: Path) -> None:
    """A rejection is for good; a network disk that is away for a moment is not the image's fault."""
    for path in (Path("/proc/self/mem"), tmp_path / "unmounted" / "one.png"):
        with pytest.raises(UserError, match=f"{path} cannot be read .* the same command goes on"):
            read_file(path)


SMALL = [JPEG, png((16, 16)), encoded(picture("P", (16, 16)), "GIF"), encoded(picture("L", (16, 16)), "TIFF")]


@given(data=st.sampled_from(SMALL), seed=st.integers(0, 1 << 30), cut=st.booleans())
def test_damage_is_rejected_for_the_same_reason_every_time(data: bytes, seed: int, cut: bool) -> None:
    rng, damaged = random.Random(seed), bytearray(data)
    if cut:
        del damaged[rng.randrange(len(damaged)) :]
    for _ in range(rng.randint(0 if cut else 1, 8) if damaged else 0):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)

    def outcome() -> tuple[str, bytes]:
        try:
            return "", stored_image(bytes(damaged), Storing("lossless", 8))
        except RejectedImageError as error:
            return str(error), b""

    assert outcome() == outcome()
    assert "\n" not in outcome()[0]


def test_samples_leave_gaps_where_images_were_rejected(tmp_path: Path) -> None:
    root = write_tree(tmp_path, cat=2, dog=3)
    (root / "cat" / "001.png").write_bytes(b"")
    listing, begun, rejected = list_images(root), [], []
    (root / "dog" / "001.png").unlink()
    samples = list(read_samples(listing, range(1, 5), Storing("lossless", 8), begun.append, rejected))
    assert [(sample["id"], sample["label"], sample["caption"]) for sample in samples] == [(2, 1, ""), (4, 1, "")]
    assert begun == [1, 2, 3, 4]
    assert rejected == [
        {"id": 1, "path": "cat/001.png", "reason": "the file is empty"},
        {"id": 3, "path": "dog/001.png", "reason": "the file cannot be read: No such file or directory"},
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Listing a tree


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
    assert listing.ignored == "2 files without an image's suffix"
    assert listing.root == tmp_path


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


def test_the_digest_is_of_everything_that_decides_the_shards(tmp_path: Path) -> None:
    def listed(name: str, change: Callable[[Path], object] = lambda root: None) -> str:
        root = write_tree(tmp_path / name, cat=2, dog=1)
        change(root)
        return list_images(root).digest

    same = listed("one")
    assert listed("two", lambda root: os.utime(root / "cat" / "000.png", (1, 1))) == same
    changes: list[Callable[[Path], object]] = [
        lambda root: (root / "cat" / "000.png").rename(root / "cat" / "0000.png"),
        lambda root: (root / "cat" / "000.png").rename(root / "dog" / "001.png"),
        lambda root: (root / "cat").rename(root / "kitten"),
        lambda root: (root / "cat" / "000.png").write_bytes(b""),
        lambda root: (root / "cat" / "001.png").unlink(),
    ]
    digests = {listed(f"changed{i}", change) for i, change in enumerate(changes)}
    assert len(digests | {same}) == len(changes) + 1


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


# ---------------------------------------------------------------------------------------------------------------------
# Listing a table

_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)


@given(
    rows=st.lists(st.tuples(_TEXT, st.from_regex("[a-z][a-z0-9]{0,3}", fullmatch=True), _TEXT), min_size=1, max_size=8)
)
def test_both_kinds_of_table_list_the_same(
    rows: list[tuple[str, str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tables")
    with (folder / "t.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("path", "label", "caption"), *rows])
    with (folder / "t.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"caption": c, "label": l, "path": p}) + "\n" for p, l, c in rows)
    from_csv, from_jsonl = list_images(folder / "t.csv"), list_images(folder / "t.jsonl")
    assert from_csv == from_jsonl
    assert from_csv.class_names == tuple(sorted({label for _, label, _ in rows}))
    found = [(row.path, from_csv.class_names[row.label], row.caption) for row in from_csv.rows]
    assert found == rows


def table(folder: Path, text: str, name: str = "t.csv") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_labels_that_are_numbers_are_kept(tmp_path: Path) -> None:
    rows = "".join(f"{label},{label}.png\n" for label in range(10))
    listing = list_images(table(tmp_path, f"label,path\n10,a.png\n{rows}010,c.png\n"))
    assert listing.class_names == tuple(map(str, range(11)))
    assert [row.label for row in listing.rows] == [10, *range(10), 10]
    lines = '{"path": "a.png", "label": 1}\n\n{"path": "b.png", "label": "0"}\n'
    assert [row.label for row in list_images(table(tmp_path, lines, "t.jsonl")).rows] == [1, 0]
    names = list_images(table(tmp_path, "path,label\na.png,10\nb.png,9\nc.png,cat\n"))
    assert names.class_names == ("10", "9", "cat")


def test_a_table_without_labels_has_one_class(tmp_path: Path) -> None:
    for text in ("path\na.png\nb.png\n", "path,label,caption\na.png,,\nb.png,,\n"):
        listing = list_images(table(tmp_path, text))
        assert listing.class_names == ("unlabelled",)
        assert [row.label for row in listing.rows] == [0, 0]
    lines = '{"path": "a.png", "label": null, "caption": null}\n{"path": "b.png"}\n'
    assert list_images(table(tmp_path, lines, "t.jsonl")).rows == listing.rows


def test_where_a_tables_paths_begin(tmp_path: Path) -> None:
    write_tree(tmp_path / "pictures", cat=1)
    (tmp_path / "lists").mkdir()
    absolute = tmp_path / "pictures" / "cat" / "000.png"
    for text, root in (
        ("path\n../pictures/cat/000.png\n", None),
        ("path\ncat/000.png\n", tmp_path / "pictures"),
        (f"path\n{absolute}\n", None),
    ):
        listing = list_images(table(tmp_path / "lists", text), root)
        assert read_file(listing.root / listing.rows[0].path) == absolute.read_bytes()


def test_columns_that_nobody_reads_are_named(tmp_path: Path) -> None:
    listing = list_images(table(tmp_path, "\ufeffpath,width,Label\na.png,3,cat\n"))
    assert listing.ignored == "columns Label, width"
    assert listing.class_names == ("unlabelled",)


def test_the_digest_of_a_table(tmp_path: Path) -> None:
    texts = ["path,label,caption\na.png,a,x\n", "path,label,caption\na.png,b,x\n", "path,label,caption\na.png,a,y\n"]
    digests = [list_images(table(tmp_path, text)).digest for text in texts]
    (tmp_path / "a.png").write_bytes(b"1")
    digests.append(list_images(table(tmp_path, texts[0])).digest)
    assert len(set(digests)) == 4


TABLE_MISTAKES = [
    ("t.csv", "", "expected a first line that names the column path, got nothing"),
    ("t.csv", "file,label\na.png,1\n", "names the column path, got file, label"),
    ("t.csv", "path,label\n", "expected a row for each image in .*, got none"),
    ("t.csv", "path,caption\na.png,one, two\n", "line 2: expected 2 values, .* got more; .*quote"),
    ("t.csv", "path,caption\na.png,one\nb.png\n", "line 3: expected 2 values, .* got fewer"),
    ("t.csv", 'path\n"a.png\n', "line .*: expected CSV"),
    ("t.csv", "path,label\na.png,cat\n,cat\n", "line 3: expected a path, got none"),
    ("t.csv", "path,label\na.png,cat\nb.png,\n", "line 3: expected a label, as in other rows, got none"),
    ("t.csv", "path,label\na.png,-1\n", "line 2: expected a name or a number from 0 on as label, got '-1'"),
    (
        "t.csv",
        "path,label\na.png,0\nb.png,2\n",
        "class from 0 to 2, since all labels are numbers, got none of 1; ",
    ),
    ("t.csv", "path,label\na.png,7\nb.png,3\n", "class from 0 to 7, .* got none of 0 and 5 more; .* such as class7"),
    ("t.csv", f"path,label\na.png,0\nb.png,{10**15}\n", "got none of 1 and 999999999999998 more"),
    ("t.jsonl", "", "expected a row for each image in .*, got none"),
    ("t.jsonl", '{"path": "a.png"}\n{"path"\n', "line 2: expected one JSON object"),
    ("t.jsonl", '["a.png"]\n', "line 1: expected one JSON object, got"),
    ("t.jsonl", '{"file": "a.png"}\n', "line 1: expected a path, got none"),
    ("t.jsonl", '{"path": 7}\n', "line 1: expected a text as path, got 7"),
    ("t.jsonl", '{"path": "a.png", "caption": ["x"]}\n', r"line 1: expected a text as caption, got \['x'\]"),
    ("t.jsonl", '{"path": "a.png", "label": 1.5}\n', "from 0 on as label, got 1.5"),
    ("t.jsonl", '{"path": "a.png", "label": true}\n', "from 0 on as label, got True"),
    ("t.csv", "path\na\0.png\n", "line 2: expected a text as path, got 'a.x00.png'"),
    ("t.csv", f"path,label\na.png,{'9' * 5000}\n", "line 2: expected a name or a number from 0 on as label, got '999"),
    ("t.jsonl", '{"path": "a.png", "caption": "\\ud800"}\n', "line 1: expected a text as caption, got '.ud800'"),
    ("t.jsonl", '{"path": "a.png", "label": "\\ud800"}\n', "from 0 on as label, got '.ud800'"),
    ("t.jsonl", "[" * 100_000 + "\n", "line 1: expected one JSON object .maximum recursion depth"),
]


@pytest.mark.parametrize(("name", "text", "message"), TABLE_MISTAKES)
def test_mistakes_in_a_table(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as raised:
        list_images(table(tmp_path, text, name))
    assert "\n" not in str(raised.value)
    assert str(tmp_path / name) in str(raised.value)


def test_a_table_of_another_encoding_and_another_root(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"path\ncaf\xe9.png\n")
    with pytest.raises(UserError, match=r"t\.csv: expected UTF-8 text"):
        list_images(tmp_path / "t.csv")
    with pytest.raises(UserError, match=r"--root: expected the folder that paths in .*t\.csv begin at, got"):
        list_images(tmp_path / "t.csv", tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------------------------------
# Reading back


def write_shards(folder: Path, root: Path, how: Storing) -> None:
    listing = list_images(root)
    writer = ShardWriter(folder, image_columns(), {})
    writer.begin()
    writer.write(0, read_samples(listing, range(len(listing.rows)), how, lambda id: None, []))
    info = ImagesInfo(
        listing.class_names, len(listing.rows), 0, how.store, how.image_size, how.channels, "test", images.versions()
    )
    writer.finish(info, 1)


@pytest.mark.parametrize("is_grey", [False, True])
def test_all_images_come_back(is_grey: bool, tmp_path: Path) -> None:
    root = write_tree(tmp_path / "images", cat=3, dog=2)
    write_shards(tmp_path / "shards", root, Storing("lossless", 8, is_grey))
    images_BCYX, labels_B = read_all_images(tmp_path / "shards", "--held-out")
    assert labels_B.tolist() == [0, 0, 0, 1, 1]
    for image_CYX, path in zip(images_BCYX, sorted(root.glob("*/*")), strict=True):
        wanted = np.array(centre_crop(read_image(path.read_bytes(), is_grey), 8))
        np.testing.assert_array_equal(image_CYX.permute(1, 2, 0).squeeze(2).numpy(), wanted)


def test_only_lossless_images_are_read_back(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", write_tree(tmp_path / "images", cat=2), Storing("original", 8))
    with pytest.raises(UserError, match=r"--held-out: expected .* --store lossless, got images stored as original"):
        read_all_images(tmp_path / "shards", "--held-out")
