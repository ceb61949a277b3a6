"""Images -> latent shards: what is stored of an image, and on what it does not depend."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cfpretrain.autoencoder import IdentityAutoencoder, KLAutoencoder, make_network, write_folder
from cfpretrain.base.console import UserError
from cfpretrain.core.latents import LatentScaling
from cfpretrain.data.latent_shards import Encoding, encode
from cfpretrain.data.shard_writer import ShardWriter
from cfpretrain.data.shards import Shards, columns_of, read_info, read_plan
from tests.closeness import disagreement
from tests.folders import content
from tests.image_files import encoded, write_images
from tests.latent_shards import columns_in
from tests.test_pixels import crops

CPU = torch.device("cpu")
SIZE, BATCH = 16, 4
SHARD_SIZES = (6, 4, 1, 7)
CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "latents_mean": [0.1, 0.2, 0.3, 0.4],
    "latents_std": [1.0, 2.0, 4.0, 8.0],
    "scaling_factor": 0.5,
}


def write_autoencoder(folder: Path, **config: Any) -> Path:
    """A small KL autoencoder with random weights, whose log-variances vary."""
    torch.manual_seed(0)
    write_folder(folder, make_network(CONFIG | config, "test"))
    return folder


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> KLAutoencoder:
    return KLAutoencoder.load(write_autoencoder(tmp_path_factory.mktemp("autoencoder") / "small"), "cpu")


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    return crops(sum(SHARD_SIZES), SIZE)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, photos: list[Image.Image]) -> Path:
    """Shards of cuts of real photos, RGB; tests read them only."""
    files = iter(map(encoded, photos))
    shards = [[next(files) for _ in range(size)] for size in SHARD_SIZES]
    return write_images(tmp_path_factory.mktemp("images") / "shards", shards, SIZE, source="some photos")


def encoding_of(images: Path, autoencoder: KLAutoencoder | IdentityAutoencoder, **settings: Any) -> Encoding:
    given = {"device": CPU, "precision": "fp32", "batch_size": BATCH, "with_mirror": True} | settings
    return Encoding(Shards(images), autoencoder, **given)


def write(
    encoding: Encoding, out: Path, parts: Sequence[Sequence[int]] = ((0, 1, 2, 3),), num_threads: int = 2
) -> Path:
    """Encodes shards in such parts, as ranks and resumed runs do."""
    writer = ShardWriter(out, encoding.columns, encoding.plan())
    writer.begin()
    counts: list[int] = []
    for numbers in parts:
        encode(encoding, writer, numbers, num_threads, counts.append)
    num_shards = len(encoding.images.shard_sizes)
    writer.finish(encoding.describe(writer.records(num_shards)), num_shards)
    assert sum(counts) == len(encoding.images)
    return out


def batches(images: Sequence[Image.Image]) -> list[torch.Tensor]:
    """What the autoencoder is given: by shard, padded with the last image; [B, C, Y, X] in [0, 1]."""
    left, made = list(images), []
    for size in SHARD_SIZES:
        of_shard, left = left[:size], left[size:]
        for begin in range(0, size, BATCH):
            batch = of_shard[begin : begin + BATCH]
            batch += batch[-1:] * (BATCH - len(batch))
            made.append(torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2) / 255)
    return made


def real(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """The batches' samples without what filled them."""
    counts = [min(BATCH, size - begin) for size in SHARD_SIZES for begin in range(0, size, BATCH)]
    return torch.cat([one[:count] for one, count in zip(values, counts, strict=True)])


# ---------------------------------------------------------------------------------------------------------------------
# What is stored


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory, images: Path, autoencoder: KLAutoencoder) -> Path:
    return write(encoding_of(images, autoencoder), tmp_path_factory.mktemp("latents") / "shards")


def test_moments_of_images_and_mirrored_images(latents: Path, photos: list[Image.Image], autoencoder) -> None:
    shards = Shards(latents)
    assert shards.shard_sizes.tolist() == list(SHARD_SIZES)
    found = columns_in(latents)
    assert found["id"].tolist() == [3 * i for i in range(len(photos))]
    assert found["label"].tolist() == [3 * i % 2 for i in range(len(photos))]
    assert shards.sample(5)["caption"] == "image 15"
    for mirrored, mean_BCYX, log_variance_BCYX in (
        (False, found["mean"], found["log_variance"]),
        (True, found["mirror_mean"], found["mirror_log_variance"]),
    ):
        given = [Image.Image.transpose(photo, Image.Transpose.FLIP_LEFT_RIGHT) for photo in photos]
        moments = [autoencoder.encode(batch.contiguous()) for batch in batches(given if mirrored else photos)]
        for stored, expected in ((mean_BCYX, 0), (log_variance_BCYX, 1)):
            wanted = real([both[expected] for both in moments]).to(torch.float16).float()
            torch.testing.assert_close(stored, wanted, rtol=2e-3, atol=2e-4)
            assert wanted.std() > 0.01
    assert (found["mean"] - found["mirror_mean"]).abs().max() > 0.01


def test_the_folder_says_what_it_is(latents: Path, images: Path, autoencoder: KLAutoencoder) -> None:
    info = read_info(latents)
    assert dataclasses.asdict(info) | {"statistics": {}, "versions": {}} == {
        "autoencoder": autoencoder.fingerprint,
        "latent_shape": (4, 8, 8),
        "latent_shift": (0.1, 0.2, 0.3, 0.4),
        "latent_scale": (0.5, 0.25, 0.125, 0.0625),
        "class_names": ("a", "b"),
        "num_samples": sum(SHARD_SIZES),
        "source": "some photos",
        "image_size": SIZE,
        "crop": "adm",
        "has_posterior": True,
        "has_mirror": True,
        "statistics": {},
        "versions": {},
        "most_segments": 0,
    }
    assert info.versions.keys() == {"cfpretrain", "torch", "dali", "diffusers"}
    assert info.versions["torch"] == torch.__version__


def test_statistics_are_those_of_drawn_latents(latents: Path) -> None:
    """Held against the definition, and against many draws."""
    info = read_info(latents)
    found = columns_in(latents)
    mean = torch.cat([found["mean"], found["mirror_mean"]]).double()
    variance = torch.cat([found["log_variance"], found["mirror_log_variance"]]).double().exp()
    expected_mean = mean.mean(dim=(0, 2, 3))
    expected_std = (variance + mean.square()).mean(dim=(0, 2, 3)).sub(expected_mean.square()).sqrt()
    assert info.statistics["mean"] == pytest.approx(expected_mean.tolist(), rel=1e-9)
    assert info.statistics["std"] == pytest.approx(expected_std.tolist(), rel=1e-9)
    draws = mean + variance.sqrt() * torch.randn(200, *mean.shape, dtype=torch.float64)
    assert draws.mean(dim=(0, 1, 3, 4)).tolist() == pytest.approx(info.statistics["mean"], abs=0.02)
    assert draws.std(dim=(0, 1, 3, 4)).tolist() == pytest.approx(info.statistics["std"], rel=0.02)


def test_without_mirrors(tmp_path: Path, images: Path, latents: Path, autoencoder: KLAutoencoder) -> None:
    out = write(encoding_of(images, autoencoder, with_mirror=False), tmp_path / "out")
    info = read_info(out)
    assert (info.has_posterior, info.has_mirror) == (True, False)
    found, both = (columns_in(folder) for folder in (out, latents))
    assert torch.equal(found["mean"], both["mean"])
    assert "mirror_mean" not in found
    mean = found["mean"].double()
    assert info.statistics["mean"] == pytest.approx(mean.mean(dim=(0, 2, 3)).tolist(), rel=1e-9)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_as_latents(tmp_path: Path, photos: list[Image.Image], channels: int) -> None:
    given = [photo.convert("L") if channels == 1 else photo for photo in photos]
    folder = write_images(tmp_path / "images", [list(map(encoded, given))], SIZE, channels=channels)
    identity = IdentityAutoencoder(LatentScaling([0.5] * channels, [2.0] * channels))
    out = write(encoding_of(folder, identity), tmp_path / "out", parts=((0,),))
    info = read_info(out)
    assert (info.autoencoder, info.latent_shape) == ("identity", (channels, SIZE, SIZE))
    assert (info.latent_shift, info.latent_scale) == ((0.5,) * channels, (2.0,) * channels)
    assert (info.has_posterior, info.has_mirror) == (False, False)
    assert columns_of(info).keys() == {"id", "label", "caption", "checksum", "mean"}
    assert info.versions.keys() == {"cfpretrain", "torch", "dali"}
    pixels = np.stack([np.asarray(photo).reshape(SIZE, SIZE, channels).transpose(2, 0, 1) for photo in given])
    stored = columns_in(out)["mean"].numpy()
    np.testing.assert_array_equal(stored, (pixels.astype(np.float32) / 255).astype(np.float16))
    np.testing.assert_array_equal(np.rint(stored * 255), pixels)
    assert info.statistics["std"] == pytest.approx(stored.astype(np.float64).std(axis=(0, 2, 3)).tolist(), rel=1e-9)


def test_a_crop_by_dali_is_recorded(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", [[encoded(crops(1, 40)[0], "JPEG")]], SIZE, store="original")
    out = write(encoding_of(folder, IdentityAutoencoder(LatentScaling([0.5], [2.0]))), tmp_path / "out", ((0,),))
    assert read_info(out).crop == "dali"


# ---------------------------------------------------------------------------------------------------------------------
# On what the bytes do not depend


@pytest.mark.parametrize(
    ("parts", "num_threads"), [(((3,), (1,), (0, 2)), 1), (((3, 2, 1, 0),), 3), (((0, 2), (), (1, 3)), 2)]
)
def test_order_parts_and_threads_leave_no_trace(
    tmp_path: Path, images: Path, latents: Path, autoencoder: KLAutoencoder, parts: Any, num_threads: int
) -> None:
    out = write(encoding_of(images, autoencoder), tmp_path / "out", parts, num_threads)
    assert content(out) == content(latents)


def test_threads_are_given_back(images: Path, autoencoder: KLAutoencoder, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    write(encoding_of(images, autoencoder), tmp_path / "out")
    assert torch.get_num_threads() == before


def test_another_way_of_encoding_is_another_plan(images: Path, autoencoder: KLAutoencoder, latents: Path) -> None:
    encoding = encoding_of(images, autoencoder)
    assert ShardWriter(latents, encoding.columns, encoding.plan()).is_complete()
    assert read_plan(latents)["device"] == "cpu"
    for name, other in (
        ("batch_size", {"batch_size": 5}),
        ("mirror", {"with_mirror": False}),
        ("precision", {"precision": "bf16"}),
        ("device", {"device": torch.device("cuda", 0)}),
    ):
        changed = encoding_of(images, autoencoder, **other)
        with pytest.raises(UserError, match=rf"{latents} holds other shards already \({name}: "):
            ShardWriter(latents, changed.columns, changed.plan()).is_complete()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_gpu_repeats_itself_and_is_near_the_cpu(tmp_path: Path, images: Path, latents: Path, precision: str) -> None:
    device = torch.device("cuda", 0)
    folder = write_autoencoder(tmp_path / "autoencoder")
    on_gpu = encoding_of(images, KLAutoencoder.load(folder, device, getattr(torch, precision)), device=device)
    first, second = (
        write(on_gpu, tmp_path / name, parts) for name, parts in (("a", ((0, 1, 2, 3),)), ("b", ((2, 0), (3, 1))))
    )
    assert content(first) == content(second)
    found, expected = (columns_in(out) for out in (first, latents))
    tolerance = 1e-2 if precision == "float32" else 0.1
    assert disagreement(found["mean"], expected["mean"]) < tolerance
    assert disagreement(found["mirror_mean"], expected["mirror_mean"]) < tolerance


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"in_channels": 1, "out_channels": 1}, "expected images of 1 channels .*got 3 x 16 x 16"),
        (
            {
                "block_out_channels": [8] * 6,
                "down_block_types": ["DownEncoderBlock2D"] * 6,
                "up_block_types": ["UpDecoderBlock2D"] * 6,
            },
            "multiples of 32, got 3 x 16 x 16",
        ),
    ],
)
def test_images_that_the_autoencoder_does_not_take(tmp_path: Path, images: Path, config: Any, message: str) -> None:
    other = KLAutoencoder.load(write_autoencoder(tmp_path / "other", **config), "cpu")
    with pytest.raises(UserError, match=message):
        encoding_of(images, other)


@pytest.mark.parametrize("value", [1e6, math.nan])
def test_latents_that_float16_cannot_hold(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    identity = IdentityAutoencoder(LatentScaling([0.5] * 3, [2.0] * 3))

    def encode_badly(images_BCYX: torch.Tensor) -> tuple[torch.Tensor, None]:
        images_BCYX[1, 0, 3, 3] = value
        return images_BCYX, None

    monkeypatch.setattr(identity, "encode", encode_badly)
    encoding = encoding_of(images, identity)
    writer = ShardWriter(tmp_path / "out", encoding.columns, encoding.plan())
    writer.begin()
    with pytest.raises(UserError, match=r"image of id 3: expected latents that float16 can hold, got "):
        encode(encoding, writer, [0, 1], 1, lambda num: None)
    assert writer.missing(2) == [0, 1]


def test_too_little_memory(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = IdentityAutoencoder(LatentScaling([0.5] * 3, [2.0] * 3))

    def encode_at_once(images_BCYX: torch.Tensor) -> tuple[torch.Tensor, None]:
        if len(images_BCYX) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return images_BCYX, None

    monkeypatch.setattr(identity, "encode", encode_at_once)
    with pytest.raises(UserError, match=r"^--batch-size: cpu has too little memory to encode 4 images of 16 x 16"):
        write(encoding_of(images, identity), tmp_path / "out")
    assert not list(tmp_path.glob(".out.unfinished/.writing.*"))
