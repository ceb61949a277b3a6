"""DALI's pixels against PIL's, on real photos; batches; what is refused."""

import io
import itertools
import math
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from cfpretrain.base.config import Config, RunConfig
from cfpretrain.base.console import UserError
from cfpretrain.data import pixels
from cfpretrain.data.images import centre_crop, declared_size
from cfpretrain.data.pixels import Decoder, PixelBatch, decode_shards
from cfpretrain.data.samples import VisitDraws
from cfpretrain.data.shards import ImagesInfo, Shards
from tests.image_files import encoded, write_images

CPU = torch.device("cpu")
SIZE = 24


def photos(*suffixes: str) -> list[Path]:
    """Real pictures that scikit-learn and scikit-image ship."""
    import skimage
    import sklearn.datasets

    folders = [Path(sklearn.datasets.__file__).parent / "images", Path(skimage.__file__).parent / "data"]
    return [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix in suffixes]


def crops(num: int, size: int = SIZE, seed: int = 0) -> list[Image.Image]:
    """Square cuts of real photos."""
    rng = np.random.default_rng(seed)
    sources = [Image.open(path).convert("RGB") for path in photos(".jpg")]
    cuts = []
    for i in range(num):
        photo = sources[i % len(sources)]
        photo.info.clear()  # else its colour profile is written too
        left, top = rng.integers(photo.width - size), rng.integers(photo.height - size)
        cuts.append(photo.crop((left, top, left + size, top + size)))
    return cuts


def decode_all(folder: Path, batch_size: int = 4, numbers: Sequence[int] | None = None) -> list[PixelBatch]:
    shards = Shards(folder)
    chosen = range(len(shards.shard_sizes)) if numbers is None else numbers
    return list(decode_shards(shards, chosen, batch_size, CPU, num_threads=2))


# ---------------------------------------------------------------------------------------------------------------------
# Equal to PIL


def decode_one(file: bytes, channels: int = 3) -> NDArray[np.uint8]:
    """As shards of lossless images are decoded, but of any size."""
    info = ImagesInfo(("a",), 1, 0, "lossless", 1, channels, "test")
    pipeline = pixels._make_pipeline(info, 1, CPU, 1)
    pipeline.feed_input("files", [np.frombuffer(file, np.uint8)])
    return pipeline.run()[0].as_array()[0]


@pytest.mark.parametrize("path", photos(".jpg", ".jpeg"), ids=lambda path: path.name)
def test_photos_decode_as_pil_decodes_them(path: Path) -> None:
    expected = np.asarray(Image.open(path).convert("RGB"))
    assert min(expected.shape[:2]) > 100
    assert expected.std() > 10
    np.testing.assert_array_equal(decode_one(path.read_bytes()), expected)


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("quality", [30, 75, 95])
def test_jpeg_of_every_kind_decodes_as_pil_decodes_it(subsampling: str, quality: int) -> None:
    photo = Image.open(photos(".jpg")[0]).convert("RGB")
    for progressive in (False, True):
        for width, height in ((64, 64), (65, 33), (31, 127), (8, 7), (1, 1)):
            cut = photo.crop((100, 50, 100 + width, 50 + height))
            file = encoded(cut, "JPEG", subsampling=subsampling, quality=quality, progressive=progressive)
            np.testing.assert_array_equal(decode_one(file), np.asarray(Image.open(io.BytesIO(file)).convert("RGB")))


def test_grey_jpeg_and_png_decode_as_pil_decodes_them() -> None:
    grey = Image.open(photos(".jpg")[0]).convert("L").crop((10, 20, 131, 97))
    for file in (encoded(grey, "JPEG", quality=80), encoded(grey)):
        expected = np.asarray(Image.open(io.BytesIO(file)))
        np.testing.assert_array_equal(decode_one(file, channels=1)[..., 0], expected)
        np.testing.assert_array_equal(decode_one(file), np.stack([expected] * 3, axis=-1))


@pytest.mark.parametrize("path", photos(".png")[:12], ids=lambda path: path.name)
def test_png_decodes_as_pil_decodes_it(path: Path) -> None:
    """Written again as make_shards.py does: 8 bits, without alpha and palette."""
    image = Image.open(path).convert("RGB")
    image.info.clear()
    np.testing.assert_array_equal(decode_one(encoded(image)), np.asarray(image))


def test_rotation_noted_by_a_camera_is_ignored() -> None:
    cut = crops(1, 40)[0].crop((0, 0, 40, 30))
    rotated = cut.getexif()
    rotated[0x0112] = 6
    file = encoded(cut, "JPEG", exif=rotated, quality=95)
    found = decode_one(file)
    assert found.shape == (30, 40, 3)
    np.testing.assert_array_equal(found, np.asarray(Image.open(io.BytesIO(file)).convert("RGB")))


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def test_batches_are_cut_by_shard(tmp_path: Path) -> None:
    sizes, batch_size = (5, 1, 8, 3), 4
    images = crops(sum(sizes))
    files = iter(map(encoded, images))
    folder = write_images(tmp_path / "images", [[next(files) for _ in range(size)] for size in sizes], SIZE)
    batches = decode_all(folder, batch_size)
    assert [(batch.shard, len(batch.samples)) for batch in batches] == [
        *((0, 4), (0, 1)),
        (1, 1),
        *((2, 4), (2, 4)),
        (3, 3),
    ]
    expected = iter(images)
    found_ids = []
    for batch in batches:
        assert batch.pixels_BYXC.shape == (len(batch.samples), SIZE, SIZE, 3)
        assert batch.pixels_BYXC.dtype == torch.uint8
        for place, sample in enumerate(batch.samples):
            np.testing.assert_array_equal(batch.pixels_BYXC[place], np.asarray(next(expected)))
            found_ids.append(int(sample["id"]))
            assert sample["caption"] == f"image {sample['id']}"
    assert found_ids == list(range(0, 3 * sum(sizes), 3))


def test_a_shard_gives_the_same_batches_in_any_order_of_work(tmp_path: Path) -> None:
    files = list(map(encoded, crops(9)))
    folder = write_images(tmp_path / "images", [files[:2], files[2:7], files[7:]], SIZE)
    by_shard: dict[int, list[torch.Tensor]] = {}
    for batch in decode_all(folder):
        by_shard.setdefault(batch.shard, []).append(batch.pixels_BYXC)
    for numbers in ([2, 0], [1], []):
        again = decode_all(folder, numbers=numbers)
        assert [batch.shard for batch in again] == [number for number in numbers for _ in by_shard[number]]
        expected = [one for number in numbers for one in by_shard[number]]
        assert all(torch.equal(batch.pixels_BYXC, one) for batch, one in zip(again, expected, strict=True))


def test_batches_stay_what_they_were_while_others_are_decoded(tmp_path: Path) -> None:
    images = crops(12)
    folder = write_images(tmp_path / "images", [list(map(encoded, images))], SIZE)
    batches = decode_all(folder, batch_size=2)  # all are kept
    for i, image in enumerate(images):
        np.testing.assert_array_equal(batches[i // 2].pixels_BYXC[i % 2], np.asarray(image))


def test_originals_are_cropped_near_to_adm(tmp_path: Path) -> None:
    sources = [Image.open(path).convert("RGB") for path in photos(".jpg")]
    sides = ((300, 200), (201, 333), (64, 64), (65, 300), (SIZE, SIZE))
    resized = [source.resize(side) for source, side in zip(sources * 3, sides, strict=False)]
    folder = write_images(
        tmp_path / "images",
        [[encoded(image, "JPEG", quality=95) for image in resized]],
        size=64,
        store="original",
    )
    (batch,) = decode_all(folder, batch_size=len(resized))
    for found, sample in zip(batch.pixels_BYXC, batch.samples, strict=True):
        expected = centre_crop(Image.open(io.BytesIO(sample["image"])).convert("RGB"), 64)
        error = float(np.square(found.numpy() - np.asarray(expected, np.float64)).mean())
        assert 10 * math.log10(255**2 / max(error, 1e-9)) > 25  # decibels


# ---------------------------------------------------------------------------------------------------------------------
# Random crops

LAST = 1 - 2**-24  # the last number below 1 in float32


def cropping(size: int, batch_size: int = 1) -> Callable[[Sequence[bytes], torch.Tensor], torch.Tensor]:
    info = ImagesInfo(("a",), 1, 0, "original", size, 3, "test")
    decoder = Decoder(info, batch_size, CPU, 2, has_random_crops=True)

    def crop(files: Sequence[bytes], draws_B4: torch.Tensor) -> torch.Tensor:
        pixels_BYXC, reasons = decoder(files, list(map(declared_size, files)), draws_B4)
        assert not reasons
        return pixels_BYXC

    return crop


def places(height: int, width: int) -> NDArray[np.uint8]:
    """An image whose pixels tell where they are: red their column, green their row."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return np.stack([columns, rows, np.zeros_like(rows)], axis=-1)


def crop_of(pixels_YXC: torch.Tensor, axis: int) -> tuple[float, float]:
    """Where a scaled crop of `places` begins along columns (0) or rows (1), and its length, in pixels of the image."""
    of_axis = pixels_YXC[..., axis].double().mean(dim=axis).numpy()  # the mean over the other axis
    size = len(of_axis)
    inner = np.arange(size // 4, size - size // 4)  # the ends are sharpened
    slope, at_0 = np.polyfit(inner + 0.5, of_axis[inner] + 0.5, 1)
    return float(at_0), float(slope * size)


def test_random_crops_are_where_and_as_large_as_their_numbers_say() -> None:
    side, num = 200, 300
    draws_B4 = VisitDraws(Config(run=RunConfig(seed=3))).crops(2, torch.arange(num))
    decode, file = cropping(64, 50), encoded(places(side, side))
    found = [crop for part in draws_B4.split(50) for crop in decode([file] * len(part), part)]
    (left, width), (top, height) = (np.array([crop_of(crop, axis) for crop in found]).T for axis in (0, 1))
    # Crops begin and end between pixels.
    assert min(left.min(), top.min()) > -1.5
    assert max((left + width).max(), (top + height).max()) < side + 1.5
    area, aspect = width * height / side**2, width / height
    assert 0.48 < area.min() < 0.53
    assert 0.97 < area.max() < 1.01
    assert 0.73 < aspect.min() < 0.78
    assert 1.28 < aspect.max() < 1.36
    assert 0.4 < np.mean(area < 0.75) < 0.65
    assert 0.4 < np.mean(aspect < 1) < 0.6
    for begin, length in ((left, width), (top, height)):
        share = (begin / (side - length))[side - length > 20]
        assert (share.min() < 0.1, share.max() > 0.9) == (True, True)
        assert 0.4 < np.mean(share < 0.5) < 0.6
    assert abs(np.corrcoef(area, aspect)[0, 1]) < 0.25


def test_the_largest_crop_is_the_image() -> None:
    image = crops(1, 40)[0]
    # The aspect 1 lies in the middle of a logarithmic range.
    whole = cropping(40)([encoded(image)], torch.tensor([[1.0, 0.5, 0.3, 0.7]]))
    np.testing.assert_array_equal(whole[0], np.asarray(image))


@pytest.mark.parametrize("shape", [(1, 1), (1, 250), (250, 1), (2, 3), (31, 127)])
def test_crops_are_within_images_of_any_shape(shape: tuple[int, int]) -> None:
    """At the ends of the ranges of their numbers; the pixels are the image's."""
    draws_B4 = torch.tensor(list(itertools.product((0.0, LAST, 1.0), repeat=4)))
    found = cropping(16, len(draws_B4))([encoded(places(*shape))] * len(draws_B4), draws_B4)
    assert found.shape == (len(draws_B4), 16, 16, 3)
    for axis, length in ((0, shape[1]), (1, shape[0])):
        assert found[..., axis].max() <= length - 1
        if length > 100:  # the first and the last crop, which are apart
            first, last = (crop_of(found[draws_B4.tolist().index([0.0, 0.0, at, at])], axis) for at in (0.0, LAST))
            assert abs(first[0]) < 0.05 * length
            assert abs(sum(last) - length) < 0.05 * length


def test_a_crop_of_a_photo_that_a_camera_noted_as_rotated() -> None:
    """Its shape is that of the pixels, whose rotation is ignored."""
    cut = crops(1, 60)[0].crop((0, 0, 60, 20))
    rotated = cut.getexif()
    rotated[0x0112] = 6
    draws_B4 = torch.tensor([[0.6, 0.9, 0.2, 0.8]])
    files = [encoded(cut, "JPEG", quality=95, **options) for options in ({}, {"exif": rotated})]
    plain, noted = (cropping(16)([file], draws_B4) for file in files)
    assert files[0] != files[1]
    assert torch.equal(plain, noted)


@pytest.mark.gpu
def test_a_gpu_gives_png_exactly_and_jpeg_nearly(tmp_path: Path) -> None:
    images = crops(7, 64)
    for kind, tolerance in (("PNG", 0), ("JPEG", 8)):
        files = [encoded(image, kind) for image in images]
        folder = write_images(tmp_path / kind, [files[:5], files[5:]], 64)
        device = torch.device("cuda", 0)
        batches = list(decode_shards(Shards(folder), [0, 1], 4, device, num_threads=2))
        found = torch.cat([batch.pixels_BYXC for batch in batches])
        assert found.device == device
        expected = np.stack([np.asarray(Image.open(io.BytesIO(file)), np.int64) for file in files])
        assert np.abs(found.cpu().numpy() - expected).max() <= tolerance


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    good = list(map(encoded, crops(7)))
    cut_short = encoded(crops(1)[0])[:-100]
    folder = write_images(tmp_path / "images", [good[:3], [*good[3:], cut_short, good[0]]], SIZE)
    with pytest.raises(
        UserError,
        match=r"shard\.00001\.mds: image of id 21: DALI cannot decode it \(nvImageCodec failure: .*\); make the image",
    ):
        decode_all(folder)


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", [[encoded(crops(1)[0]), b"hello"]], SIZE)
    with pytest.raises(UserError, match=r"shard\.00000\.mds: image of id 3: it is no image"):
        decode_all(folder)


def test_an_image_of_another_size_is_named(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", [[encoded(crops(1)[0]), encoded(crops(1, SIZE + 1)[0])]], SIZE)
    with pytest.raises(UserError, match=r"image of id 3: expected 24 x 24 pixels, got 25 x 25; make"):
        decode_all(folder)


def test_no_memory_is_taken_for_pixels_that_a_file_only_declares(tmp_path: Path) -> None:
    tiny = encoded(np.zeros((SIZE, SIZE), np.uint8))
    for side in (20_000, 100_000):  # 1.2 GB, which PIL would decode neither; and what DALI refuses too
        header = b"IHDR" + side.to_bytes(4, "big") * 2 + tiny[24:29]
        declares = tiny[:12] + header + zlib.crc32(header).to_bytes(4, "big") + tiny[33:]
        for store in ("lossless", "original"):
            folder = write_images(tmp_path / f"{store}{side}", [[tiny, declares]], SIZE, store=store)
            with pytest.raises(UserError, match=r"image of id 3: it is no image, or one of more than [0-9,]+ pixels"):
                decode_all(folder)


def test_a_damaged_sample_is_named(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", [list(map(encoded, crops(3)))], SIZE)
    path = folder / "shard.00000.mds"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"shard\.00000\.mds: sample 2 is damaged"):
        decode_all(folder)


def test_without_dali_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_images(tmp_path / "images", [[encoded(crops(1)[0])]], SIZE)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UserError, match=r'pip install "cfpretrain\[dali\]"'):
        decode_all(folder)
    with pytest.raises(UserError, match=r'pip install "cfpretrain\[dali\]"'):
        pixels.dali_version()
