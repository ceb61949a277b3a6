"""Which images there are, which are rejected and why, and the crop against a plain oracle."""

import io
import json
import os
import random
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from cfpretrain.base.console import UserError
from cfpretrain.data import images
from cfpretrain.data.image_shards import write_image_shards
from cfpretrain.data.images import (
    ImageFormat,
    RejectedImageError,
    centre_crop,
    describe_changes,
    parse_background,
    read_file,
    read_image,
    stored_image,
)
from cfpretrain.data.listing import list_images
from cfpretrain.data.shards import Shards
from examples.digits.pixels import read_all_images

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
            options["transparency"] = b"\xff" * 256
        if image.mode in ("RGBA", "LA"):
            image.putalpha(255)  # nothing of it can be seen through
        data = encoded(image, kind, **options)
        is_grey = seed % 4 == 0
        stored = Image.open(io.BytesIO(stored_image(data, ImageFormat("lossless", target, is_grey))))
        assert stored.mode == ("L" if is_grey else "RGB")
        wanted = oracle(data, target, is_grey)
        np.testing.assert_array_equal(np.array(stored), wanted, err_msg=f"{mode} {size} {target} {kind} {options}")
        modes.add((mode, kind))
    assert len(modes) > 15


def test_exif_rotation_is_ignored_but_where_it_is_asked_for() -> None:
    """Upright, all eight are the one picture that their rotations say."""
    image, seen = picture("RGB", (40, 24)), Image.Transpose
    for orientation, undone in (
        *((1, None), (2, seen.FLIP_LEFT_RIGHT), (3, seen.ROTATE_180), (4, seen.FLIP_TOP_BOTTOM), (5, seen.TRANSPOSE)),
        *((6, seen.ROTATE_90), (7, seen.TRANSVERSE), (8, seen.ROTATE_270)),
    ):
        exif = Image.Exif()
        exif[_ORIENTATION] = orientation
        data = encoded(image if undone is None else image.transpose(undone), "PNG", exif=exif)
        for store in ("lossless", "original"):
            counts: Counter[str] = Counter()
            stored = stored_image(data, ImageFormat(store, 24, is_upright=True), counts)
            pixels = centre_crop(read_image(stored), 24)
            np.testing.assert_array_equal(np.array(pixels), oracle(encoded(image, "PNG"), 24, False))
            assert counts == Counter([] if undone is None else ["turned"])
        counts = Counter()
        lying = stored_image(data, ImageFormat("lossless", 24), counts)
        np.testing.assert_array_equal(np.array(read_image(lying)), oracle(data, 24, False))
        assert counts == Counter([] if undone is None else ["not turned"])


def composited(rgba_YXC: np.ndarray, background: images.Colour) -> np.ndarray:
    share = rgba_YXC[..., 3:] / 255
    return np.asarray(rgba_YXC[..., :3] * share + np.array(background) * (1 - share))


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (37, 99, 168)])
@pytest.mark.parametrize("store", ["lossless", "original"])
def test_what_is_transparent_is_composited_on_the_background(background: images.Colour, store: str) -> None:
    """Every way in which files say so; hidden colours never show. DALI would drop alpha, so no such file is kept."""
    rgba = np.array(picture("RGBA", (24, 24)))
    rgba[:8, :, 3], rgba[16:, :, 3] = 0, 255
    grey = np.array(Image.fromarray(rgba[..., :3]).convert("L"))
    of_grey = np.dstack([grey] * 3 + [rgba[..., 3]])
    flat = Image.fromarray(rgba[..., :3]).quantize(16)
    of_palette = np.dstack([np.array(flat.convert("RGB")), np.where(np.array(flat) == 3, 0, 255)])
    keyed = np.full((24, 24, 3), (1, 2, 3), np.uint8)
    keyed[12:] = 200
    of_key = np.dstack([keyed, np.where((keyed == (1, 2, 3)).all(-1), 0, 255)])
    files = {
        **{kind: (encoded(Image.fromarray(rgba, "RGBA"), kind, **options), rgba)
           for kind, options in {"PNG": {}, "WEBP": {"lossless": True, "exact": True}, "TIFF": {}}.items()},
        "LA": (encoded(Image.merge("LA", [Image.fromarray(grey), Image.fromarray(rgba[..., 3])]), "PNG"), of_grey),
        "palette": (encoded(flat, "PNG", transparency=3), of_palette),
        "GIF": (encoded(flat, "GIF", transparency=3), of_palette),
        "a colour": (encoded(Image.fromarray(keyed), "PNG", transparency=(1, 2, 3)), of_key),
        "16 bits": (deep_png(rgba.astype(">u2") * 257), rgba),
    }  # fmt: skip
    for name, (data, wanted) in files.items():
        counts: Counter[str] = Counter()
        stored = stored_image(data, ImageFormat(store, 24, background=background), counts)
        found = Image.open(io.BytesIO(stored))
        assert (found.mode, found.format) == ("RGB", "PNG"), name
        assert np.abs(np.array(found) - composited(wanted, background)).max() <= 1, name
        assert counts["composited"] == 1, name
        in_grey = np.array(read_image(data, True, background)).astype(int)
        assert np.abs(in_grey - np.array(found.convert("L"))).max() <= 1, name


def deep_png(pixels_YXC: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, big-endian, which PIL does not write in colours."""
    height, width, channels = pixels_YXC.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels_YXC)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*one) for one in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    )


def test_an_opaque_alpha_changes_nothing() -> None:
    for mode in ("RGBA", "LA"):
        image = picture(mode, (20, 20))
        image.putalpha(255)
        data, counts = encoded(image, "PNG"), Counter[str]()
        assert stored_image(data, ImageFormat("original", 16, background=(9, 9, 9)), counts) == data
        assert counts == Counter()


def frames(kind: str) -> bytes:
    options = {"lossless": True} if kind == "WEBP" else {}
    pictures = [picture("RGB", (20, 20), seed) for seed in range(3)]
    return encoded(pictures[0], kind, save_all=True, append_images=pictures[1:], **options)


def deep(kind: str) -> bytes:
    if kind == "PPM":
        return b"P6 20 20 65535\n" + bytes(20 * 20 * 6)
    if kind == "JPEG2000":  # the depth of three components, in the marker SIZ of a codestream
        data = bytearray(encoded(picture("RGB", (20, 20)), kind, no_jp2=True))
        data[42:51:3] = bytes([15] * 3)
        return bytes(data)
    if kind == "TIFF":  # one strip of 16-bit RGB, little-endian
        tags = {256: 20, 257: 20, 258: (16, 16, 16), 259: 1, 262: 2, 277: 3, 273: 200, 278: 20, 279: 2400}
        entries, extra = b"", struct.pack("<HHH", 16, 16, 16)
        for tag, value in sorted(tags.items()):
            kind_and_count = (3, 3) if tag == 258 else (4, 1)
            entries += struct.pack("<HHII", tag, *kind_and_count, 150 if tag == 258 else value)
        body = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(4)
        return body.ljust(150, b"\0") + extra.ljust(50, b"\0") + bytes(2400)
    return deep_png(np.zeros((20, 20, 3), ">u2"))


LOSSES: dict[str, list[tuple[str, Callable[[], bytes]]]] = {
    "of several frames": [
        *[(kind, lambda kind=kind: frames(kind)) for kind in ("GIF", "WEBP", "PNG", "TIFF", "MPO", "AVIF")],
    ],
    "of other colours": [
        *[(kind, lambda kind=kind: encoded(picture("CMYK", (20, 20)), kind)) for kind in ("JPEG", "TIFF")],
    ],
    "cut to 8 bits": [(kind, lambda kind=kind: deep(kind)) for kind in ("PNG", "TIFF", "PPM", "JPEG2000")],
    "of another profile": [
        ("JPEG", lambda: encoded(picture("RGB", (20, 20)), "JPEG", icc_profile=b"Display P3")),
    ],
    "enlarged": [("PNG", lambda: png((15, 30)))],
}


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_is_counted_and_said(loss: str) -> None:
    for kind, make in LOSSES[loss]:
        counts: Counter[str] = Counter()
        assert stored_image(make(), ImageFormat("lossless", 16), counts), kind
        assert counts == Counter([loss]), kind
    (line,) = describe_changes({loss: 3}, (0, 0, 0), 16)
    assert line.startswith("3 images ")


def test_what_loses_nothing_is_not_counted() -> None:
    counts: Counter[str] = Counter()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "AVIF", "JPEG2000"):
        stored_image(encoded(picture("RGB", (20, 20)), kind, icc_profile=profile), ImageFormat("lossless", 16), counts)
        stored_image(encoded(picture("L", (20, 20)), kind), ImageFormat("lossless", 16), counts)
    assert counts == Counter()


def test_a_rejected_image_loses_nothing() -> None:
    counts: Counter[str] = Counter()
    with pytest.raises(RejectedImageError):
        stored_image(frames("GIF"), ImageFormat("original", 16), counts)
    assert counts == Counter()


def test_backgrounds() -> None:
    for text, colour in (
        ("white", (255, 255, 255)),
        (" Black ", (0, 0, 0)),
        ("#2563a8", (37, 99, 168)),
        ("#fff", (255,) * 3),
    ):
        assert parse_background(text) == colour
    for text, words in (
        ("wite", "perhaps white"),
        ("", "got ''"),
        ("#2563a880", "got '#2563a880'"),
        ("12", "or '#2563a8'"),
    ):
        with pytest.raises(UserError, match=f"--background: expected a colour such as .*{words}"):
            parse_background(text)
    lines = describe_changes({"composited": 2, "enlarged": 1}, (37, 99, 168), 64)
    assert lines[0] == "2 images with transparency are composited on #2563a8 (--background)"
    assert lines[1] == "1 image has a side of fewer than 64 pixels and is enlarged"


def test_only_pixels_are_stored() -> None:
    """A profile, a rotation or a transparent colour in the PNG could change what a decoder makes of it."""
    exif = Image.Exif()
    exif[_ORIENTATION] = 3
    data = encoded(
        picture("RGB", (30, 30)), "PNG", exif=exif, icc_profile=b"a profile", transparency=(1, 2, 3), dpi=(72, 72)
    )
    stored = stored_image(data, ImageFormat("lossless", 16))
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
    assert stored_image(data, ImageFormat("original", 16)) == data


def test_original_files_keep_their_bytes() -> None:
    data = encoded(picture("RGB", (50, 40)), "JPEG")
    assert stored_image(data, ImageFormat("original", 16)) == data
    assert stored_image(data, ImageFormat("original", 16, is_grey=True)) == data


# ---------------------------------------------------------------------------------------------------------------------
# What is rejected


def huge_png() -> bytes:
    """A PNG of a few bytes that claims 20000 x 20000 pixels."""
    data = bytearray(png())
    data[16:24] = (20000).to_bytes(4, "big") * 2
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
        stored_image(data, ImageFormat(store, 8))
    assert "\n" not in str(raised.value)
    assert " at 0x" not in str(raised.value)


def test_a_thin_image_does_not_fill_the_memory() -> None:
    thin = encoded(Image.new("L", (1, 60000)), "PNG")
    for store in ("lossless", "original"):
        with pytest.raises(RejectedImageError, match=r"too thin: 1 x 60000 would become 256 x 15360000"):
            stored_image(thin, ImageFormat(store, 256))


@pytest.mark.parametrize(
    ("kind", "mode"), [("GIF", "P"), ("AVIF", "RGB"), ("TIFF", "LA"), ("TIFF", "1"), ("JPEG2000", "LA")]
)
def test_what_dali_cannot_decode_is_not_stored_as_it_is(kind: str, mode: str) -> None:
    image = picture(mode, (20, 20))
    if mode == "LA":
        image.putalpha(255)
    data = encoded(image, kind)
    with pytest.raises(RejectedImageError, match=f"DALI does not decode {kind} of mode {mode} as PIL does"):
        stored_image(data, ImageFormat("original", 8))
    assert stored_image(data, ImageFormat("lossless", 8))


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
    write_shards(tmp_path / "shards", tmp_path / "images", ImageFormat("original", 32))
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
        (tmp_path / "folder.png", "Is a directory"),
        (tmp_path / "pipe.png", "not a regular file"),
        (tmp_path / "endless.png", "not a regular file"),
    ):
        with pytest.raises(RejectedImageError, match=f"^the file cannot be read: {reason}$"):
            read_file(path)

    def refuse(path: Path, *_: object) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "closed.png").touch()
    monkeypatch.setattr("cfpretrain.data.images.read_bytes", refuse)  # root may read everything
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
            return "", stored_image(bytes(damaged), ImageFormat("lossless", 8))
        except RejectedImageError as error:
            return str(error), b""

    assert outcome() == outcome()
    assert "\n" not in outcome()[0]


def test_samples_leave_gaps_where_images_were_rejected(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "images", cat=2, dog=3)
    (root / "cat" / "001.png").write_bytes(b"")
    listing = list_images(root)
    (root / "dog" / "001.png").unlink()
    folder = tmp_path / "shards"
    write_image_shards([(listing, folder)], ImageFormat("lossless", 8), "test", max_rejected_share=1)
    samples = list(Shards(folder).shard(0))
    assert [(s["id"], s["label"], s["caption"]) for s in samples] == [(0, 0, ""), (2, 1, ""), (4, 1, "")]
    assert [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()] == [
        {"id": 1, "path": "cat/001.png", "reason": "the file is empty"},
        {"id": 3, "path": "dog/001.png", "reason": "the file cannot be read: No such file or directory"},
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Reading back


def write_shards(folder: Path, root: Path, image_format: ImageFormat) -> None:
    write_image_shards([(list_images(root), folder)], image_format, "test")


@pytest.mark.parametrize("is_grey", [False, True])
def test_all_images_come_back(is_grey: bool, tmp_path: Path) -> None:
    root = write_tree(tmp_path / "images", cat=3, dog=2)
    write_shards(tmp_path / "shards", root, ImageFormat("lossless", 8, is_grey))
    images_BCYX, labels_B = read_all_images(tmp_path / "shards", "--held-out")
    assert labels_B.tolist() == [0, 0, 0, 1, 1]
    for image_CYX, path in zip(images_BCYX, sorted(root.glob("*/*")), strict=True):
        wanted = np.array(centre_crop(read_image(path.read_bytes(), is_grey), 8))
        np.testing.assert_array_equal(image_CYX.permute(1, 2, 0).squeeze(2).numpy(), wanted)


def test_only_lossless_images_are_read_back(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", write_tree(tmp_path / "images", cat=2), ImageFormat("original", 8))
    with pytest.raises(UserError, match=r"--held-out: expected .* --store lossless, got images stored as original"):
        read_all_images(tmp_path / "shards", "--held-out")
