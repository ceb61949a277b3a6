"""The one place of shift and scale, and autoencoders in diffusers' layout."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cfpretrain.autoencoder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    IdentityAutoencoder,
    KLAutoencoder,
    fingerprint,
    make_network,
    write_folder,
)
from cfpretrain.base.console import UserError
from cfpretrain.core.latents import LatentScaling
from tests.closeness import disagreement
from tests.processes import REPOSITORY


def test_shift_and_scale_per_channel_and_back() -> None:
    scaling = LatentScaling([1.0, -2.0], [0.5, 4.0])
    raw = torch.tensor([[[[3.0]], [[-1.0]]]])
    assert scaling.to_model(raw).flatten().tolist() == [1.0, 4.0]
    assert torch.equal(scaling.from_model(scaling.to_model(raw)), raw)


def test_one_value_serves_all_channels() -> None:
    raw = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(LatentScaling([0.0], [0.2325]).to_model(raw), raw * 0.2325)


def test_identity_decodes_to_pixels() -> None:
    autoencoder = IdentityAutoencoder(LatentScaling([0.5], [2.0]))
    latents = torch.tensor([[[[-1.0, 0.0, 1.0, 2.0]]]])
    assert autoencoder.decode(latents).flatten().tolist() == [0.0, 0.5, 1.0, 1.5]


@pytest.mark.parametrize("num_channels", [2, 4, 16])
def test_latents_of_another_autoencoder_are_refused(num_channels) -> None:
    """Nothing else may be scored in silence."""
    autoencoder = IdentityAutoencoder(LatentScaling([0.0], [0.2325]))
    with pytest.raises(UserError, match=rf"model\.latent_channels: expected 1 or 3 .*got {num_channels}"):
        autoencoder.decode(torch.zeros(2, num_channels, 4, 4))


def test_identity_encodes_to_pixels() -> None:
    autoencoder = IdentityAutoencoder(LatentScaling([0.5], [2.0]))
    images = torch.rand(2, 1, 4, 4)
    raw, log_variance = autoencoder.encode(images)
    assert torch.equal(raw, images)
    assert log_variance is None
    assert autoencoder.latent_shape((1, 4, 4)) == (1, 4, 4)
    assert (autoencoder.fingerprint, autoencoder.shift, autoencoder.scale) == ("identity", (0.5,), (2.0,))


# ---------------------------------------------------------------------------------------------------------------------
# Folders in diffusers' layout

SMALL = {
    "_class_name": "AutoencoderKL",
    "in_channels": 1,
    "out_channels": 1,
    "latent_channels": 2,
    "block_out_channels": [8, 16, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "norm_num_groups": 4,
    "scaling_factor": 0.5,
}


def write(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **config: object) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = make_network(SMALL | config, "test")
    write_folder(folder, torch.nn.Module.to(network, dtype=dtype))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests read it only."""
    return write(tmp_path_factory.mktemp("autoencoder") / "small")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """Tests may damage it."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def pictures(num: int = 3) -> torch.Tensor:
    return torch.rand(num, 1, 16, 8, generator=torch.Generator().manual_seed(0))


def test_an_autoencoder_says_what_it_makes(folder) -> None:
    autoencoder = KLAutoencoder.load(folder, "cpu")
    assert (autoencoder.image_channels, autoencoder.latent_channels, autoencoder.stride) == (1, 2, 4)
    mean, log_variance = autoencoder.encode(pictures())
    assert tuple(mean.shape[1:]) == tuple(log_variance.shape[1:]) == autoencoder.latent_shape((1, 16, 8)) == (2, 4, 2)
    images = autoencoder.decode(mean * 0.5)
    assert images.shape == (3, 1, 16, 8)
    assert {value.dtype for value in (mean, log_variance, images)} == {torch.float32}
    assert not any(value.requires_grad for value in (mean, log_variance, images))


@pytest.mark.parametrize("with_quant_conv", [True, False])
def test_it_computes_what_diffusers_computes(tmp_path, with_quant_conv) -> None:
    """Pixels in [0, 1] here, in [-1, 1] there; latents scaled here, raw there. SD3's and FLUX's have no quant_conv."""
    from diffusers import AutoencoderKL

    folder = write(tmp_path / "folder", use_quant_conv=with_quant_conv, use_post_quant_conv=with_quant_conv)
    assert any("quant_conv" in name for name in load_file(folder / WEIGHTS_FILE)) == with_quant_conv
    network = AutoencoderKL.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
    autoencoder = KLAutoencoder.load(folder, "cpu")
    with torch.no_grad():
        posterior = network.encode(pictures() * 2 - 1).latent_dist
        decoded = network.decode(posterior.mean).sample
    mean, log_variance = autoencoder.encode(pictures())
    assert disagreement(mean, posterior.mean) < 1e-5
    assert disagreement(log_variance, posterior.logvar) < 1e-5
    assert disagreement(autoencoder.decode(mean * 0.5), (decoded + 1) / 2) < 1e-5


def test_the_log_variance_is_clamped(copy) -> None:
    tensors = load_file(copy / WEIGHTS_FILE)
    tensors["quant_conv.bias"] = torch.tensor([0.0, 0.0, 1e6, -1e6])
    save_file(tensors, copy / WEIGHTS_FILE)
    _, log_variance = KLAutoencoder.load(copy, "cpu").encode(pictures())
    assert log_variance[:, 0].unique().tolist() == [20.0]
    assert log_variance[:, 1].unique().tolist() == [-30.0]


@pytest.mark.parametrize(
    ("config", "shift", "scale"),
    [
        ({"scaling_factor": 0.25}, (0.0, 0.0), (0.25, 0.25)),
        ({"scaling_factor": 0.25, "shift_factor": 0.125}, (0.125, 0.125), (0.25, 0.25)),
        ({"scaling_factor": 1.0, "latents_mean": [1.0, -2.0], "latents_std": [0.5, 4.0]}, (1.0, -2.0), (2.0, 0.25)),
        ({"scaling_factor": 0.5, "latents_mean": [0.0, 1.0], "shift_factor": 3.0}, (0.0, 1.0), (0.5, 0.5)),
    ],
)
def test_shift_and_scale_come_from_the_config(tmp_path, config, shift, scale) -> None:
    autoencoder = KLAutoencoder.load(write(tmp_path / "a", **config), "cpu")
    assert (autoencoder.shift, autoencoder.scale) == (shift, scale)
    plain = KLAutoencoder.load(write(tmp_path / "b", scaling_factor=1.0), "cpu")
    latents = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    raw = latents / torch.tensor(scale).reshape(2, 1, 1) + torch.tensor(shift).reshape(2, 1, 1)
    assert disagreement(autoencoder.decode(latents), plain.decode(raw)) < 1e-5


def test_half_precision_weights_are_computed_in_single_precision(tmp_path) -> None:
    single, half = write(tmp_path / "single"), write(tmp_path / "half", dtype=torch.float16)
    assert {value.dtype for value in load_file(half / WEIGHTS_FILE).values()} == {torch.float16}
    rounded = {name: value.half().float() for name, value in load_file(single / WEIGHTS_FILE).items()}
    save_file(rounded, single / WEIGHTS_FILE)
    expected, got = (KLAutoencoder.load(folder, "cpu").encode(pictures()) for folder in (single, half))
    assert torch.equal(expected[0], got[0])
    assert torch.equal(expected[1], got[1])
    loaded = KLAutoencoder.load(half, "cpu", torch.bfloat16)
    mean, _ = loaded.encode(pictures())
    assert mean.dtype == torch.float32
    assert torch.equal(mean, mean.bfloat16().float())
    assert not torch.equal(mean, got[0])


def test_encoding_repeats_bit_for_bit(folder) -> None:
    """Also beside other images, as long as the batch has the same size."""
    first, second = (KLAutoencoder.load(folder, "cpu") for _ in range(2))
    images = pictures(8)
    expected = first.encode(images)
    others = torch.cat([images[:3], torch.rand(5, 1, 16, 8)])
    for got in (second.encode(images), first.encode(images)):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert all(torch.equal(a[:3], b[:3]) for a, b in zip(second.encode(others), expected, strict=True))


def test_loading_draws_no_random_numbers(folder) -> None:
    before = torch.random.get_rng_state()
    KLAutoencoder.load(folder, "cpu")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_fingerprint_is_that_of_the_weights(folder, copy, tmp_path) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    expected = KLAutoencoder.load(folder, "cpu").fingerprint
    assert expected == fingerprint(dict(reversed(tensors.items())))
    assert KLAutoencoder.load(folder, "cpu", torch.bfloat16).fingerprint == expected
    save_file(tensors, copy / WEIGHTS_FILE, {"written by": "somebody else"})
    assert (copy / WEIGHTS_FILE).read_bytes() != (folder / WEIGHTS_FILE).read_bytes()
    assert KLAutoencoder.load(copy, "cpu").fingerprint == expected
    assert KLAutoencoder.load(write(tmp_path / "other", seed=1), "cpu").fingerprint != expected


@pytest.mark.parametrize("change", ["bit", "name", "shape", "dtype"])
def test_the_fingerprint_notices(folder, change) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    name = "quant_conv.weight"
    changed = {
        "bit": {name: tensors[name].view(torch.int32).bitwise_xor(1).view(torch.float32)},
        "name": {"quant_conv.weights": tensors[name]},
        "shape": {name: tensors[name].flatten()},
        "dtype": {name: tensors[name].view(torch.int32)},
    }[change]
    others = {key: value for key, value in tensors.items() if key != name}
    assert fingerprint(others | changed) != fingerprint(tensors)


def test_names_of_older_releases_are_understood(folder, copy) -> None:
    tensors = {
        name.replace(".to_q.", ".query.").replace(".to_out.0.", ".proj_attn."): value
        for name, value in load_file(copy / WEIGHTS_FILE).items()
    }
    save_file(tensors, copy / WEIGHTS_FILE)
    assert KLAutoencoder.load(copy, "cpu").fingerprint == KLAutoencoder.load(folder, "cpu").fingerprint


@pytest.mark.parametrize("shape", [(2, 3, 16, 8), (2, 1, 16, 6)])
def test_images_that_do_not_fit_are_refused(folder, shape) -> None:
    message = r"--autoencoder: expected images of 1 channels with sides that are multiples of 4, got"
    autoencoder = KLAutoencoder.load(folder, "cpu", key="--autoencoder")
    with pytest.raises(UserError, match=message):
        autoencoder.encode(torch.rand(*shape))


def set_config(folder: Path, **entries: object) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text()) | entries
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def set_tensor(folder: Path, name: str, value: torch.Tensor | None) -> None:
    tensors = {key: value for key, value in load_file(folder / WEIGHTS_FILE).items() if key != name}
    save_file(tensors | ({} if value is None else {name: value}), folder / WEIGHTS_FILE)


DAMAGES = {
    "no folder": (shutil.rmtree, r"expected an autoencoder's folder.*No such file"),
    "no config": (lambda f: (f / CONFIG_FILE).unlink(), r"config\.json cannot be read.*subfolder vae"),
    "no JSON": (lambda f: (f / CONFIG_FILE).write_text("{"), r"config\.json is no config of diffusers"),
    "a list": (lambda f: (f / CONFIG_FILE).write_text("[]"), r"config\.json is no config of diffusers"),
    "other class": (
        lambda f: set_config(f, _class_name="AutoencoderTiny"),
        r"expected an AutoencoderKL, got 'AutoencoderTiny'",
    ),
    "unknown key": (lambda f: set_config(f, wings=2), r"config\.json: expected the config.*wings"),
    "unknown block": (lambda f: set_config(f, down_block_types=["Down"] * 3), r"config\.json: expected the config"),
    "odd groups": (lambda f: set_config(f, norm_num_groups=5), r"config\.json: expected the config.*divisible"),
    "odd mean": (lambda f: set_config(f, latents_mean=[1.0]), r"config\.json: expected the config.*latents_mean"),
    "no spread": (lambda f: set_config(f, latents_std=[1.0, 0.0]), r"config\.json: expected the config.*zero"),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), r"expected .*model\.safetensors, which is not there"),
    "only a pickle": (
        lambda f: (f / WEIGHTS_FILE).rename(f / "diffusion_pytorch_model.bin"),
        r"only diffusion_pytorch_model\.bin, a pickle.*python tools/import_autoencoder\.py",
    ),
    "cut short": (lambda f: os.truncate(f / WEIGHTS_FILE, 5000), r"model\.safetensors cannot be read"),
    "missing": (lambda f: set_tensor(f, "quant_conv.bias", None), r"\(missing: quant_conv\.bias\)"),
    "surplus": (lambda f: set_tensor(f, "extra", torch.zeros(2)), r"\(unknown: extra\)"),
    "shape": (
        lambda f: set_tensor(f, "quant_conv.bias", torch.zeros(3)),
        r"\(of another shape: quant_conv\.bias \(3,\) instead of",
    ),
    "kind": (
        lambda f: set_tensor(f, "quant_conv.bias", torch.zeros(4, dtype=torch.int8)),
        r"\(not of floating point: quant_conv\.bias\)",
    ),
    "other network": (lambda f: set_config(f, layers_per_block=2), r"missing: .*, .*, .* and \d+ more"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_mistake_is_one_line_that_names_key_and_folder(copy, damage) -> None:
    break_it, message = DAMAGES[damage]
    break_it(copy)
    with pytest.raises(UserError, match=rf"^data\.autoencoder: .*{message}") as error:
        KLAutoencoder.load(copy, "cpu")
    assert str(copy) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_is_written_once_and_others_may_read_it(folder, tmp_path) -> None:
    assert sorted(os.listdir(folder)) == [CONFIG_FILE, WEIGHTS_FILE]
    assert len({(folder / name).stat().st_mode for name in (CONFIG_FILE, WEIGHTS_FILE)}) == 1
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "new"):
        with pytest.raises(OSError, match=r"expected a folder|Not a directory"):
            write(path)


def test_diffusers_is_imported_only_to_load_one(folder) -> None:
    """It takes seconds; and loading is quiet, with warnings as errors and no network."""
    code = (
        "import sys, socket; socket.socket.connect = None; import cfpretrain.autoencoder as a; "
        "assert 'diffusers' not in sys.modules; "
        f"a.KLAutoencoder.load({str(folder)!r}, 'cpu'); assert 'diffusers' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
