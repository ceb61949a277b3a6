"""DALI's pixels against PIL's, on real photos; batches; what is refused."""

import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from cfpretrain.base.console import UserError
from cfpretrain.data import pixels
from cfpretrain.data.images import centre_crop
from cfpretrain.data.pixels import PixelBatch, decode_shards
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
    cut_short = encoded(crops(1)[0], "JPEG")[:200]
    folder = write_images(tmp_path / "images", [good[:3], [*good[3:], cut_short, good[0]]], SIZE)
    with pytest.raises(
        UserError, match=r"shard\.00001\.mds: image of id 21: DALI cannot decode it \(nvImageCodec failure: .*\); make"
    ):
        decode_all(folder)


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", [[encoded(crops(1)[0]), b"hello"]], SIZE)
    with pytest.raises(UserError, match=r"shard\.00000\.mds: image of id 3: DALI cannot decode it"):
        decode_all(folder)


def test_an_image_of_another_size_is_named(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", [[encoded(crops(1)[0]), encoded(crops(1, SIZE + 1)[0])]], SIZE)
    with pytest.raises(UserError, match=r"image of id 3: expected 24 x 24 x 3 pixels, got 25 x 25 x 3; make"):
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
