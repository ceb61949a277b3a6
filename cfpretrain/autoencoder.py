"""Pixels <-> latents, and the door to diffusers. The shift and scale of latents are applied here and nowhere else.

Raw latents are what an autoencoder makes and what shards hold; the transformer sees (raw - shift) * scale.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cfpretrain.base import files
from cfpretrain.base.console import UserError, one_line
from cfpretrain.base.differences import tensor_differences
from cfpretrain.base.files import check_safetensors, read_json
from cfpretrain.core.latents import LatentScaling

# What an autoencoder's folder holds, as diffusers writes it.
CONFIG_FILE, WEIGHTS_FILE = "config.json", "diffusion_pytorch_model.safetensors"

_CLASS = "AutoencoderKL"
PIXELS_AT_ONCE = 1 << 19  # through the network together, where little memory counts: 8 images of 256 px
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_MOST_LAYERS, _LARGEST_SIZE = 32, 16384  # of a block and of blocks; of channels and pixels
_SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")  # `shift_and_scale` checks them
# Folders that older diffusers wrote, as most of Stable Diffusion's are, name the attention's matrices otherwise.
_OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def are_pixels(num_channels: int) -> bool:
    """Whether latents of so many channels are taken for pixels; others are those of an autoencoder."""
    return num_channels in (1, 3)


def deterministic_convolutions() -> AbstractContextManager[None]:
    """Convolutions on a GPU give the same bits at every run, and float32 where float32 is asked for; in all threads."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


class IdentityAutoencoder:
    """Pixels as latents: raw latents are pixel values in [0, 1]."""

    fingerprint = "identity"
    stride = 1  # pixels a side of what becomes one latent

    def __init__(self, scaling: LatentScaling) -> None:
        self._scaling = scaling
        self.shift, self.scale = scaling.shift, scaling.scale

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """The shape [C, Y, X] of the latents of such images: the same."""
        return image_shape

    def encode(self, images_BCYX: Tensor) -> tuple[Tensor, None]:
        """Images in [0, 1] -> raw latents, float32; there is no posterior."""
        return images_BCYX.float(), None

    def decode(self, latents_BCYX: Tensor) -> Tensor:
        """Latents of the transformer -> images, 0 black and 1 white, not clamped: float32 [B, 1 or 3, Y, X]."""
        num_channels = latents_BCYX.shape[1]
        if not are_pixels(num_channels):
            raise UserError(
                f"model.latent_channels: expected 1 or 3 where latents are pixels, got {num_channels}, the latents of "
                "an autoencoder that is not at hand; decode them to images with that autoencoder"
            )
        return self._scaling.from_model(latents_BCYX)


class KLAutoencoder:
    """A convolutional autoencoder with a Gaussian posterior: diffusers' AutoencoderKL, frozen.

    On one machine the same images in a batch of the same size give the same bits; in a batch of another size they may
    not, since convolutions add up in another order.

    Args:
        network: an AutoencoderKL with its weights.
        fingerprint: of the weights (`fingerprint`).
        name: the config key or option that gave it, for messages.
    """

    def __init__(self, network: nn.Module, fingerprint: str, name: str) -> None:
        config: Any = network.config
        self.fingerprint = fingerprint
        self.image_channels: int = config.in_channels
        self.latent_channels: int = config.latent_channels
        self.stride: int = 2 ** (len(config.block_out_channels) - 1)  # pixels a side of what becomes one latent
        self.shift, self.scale = shift_and_scale(config)
        self._scaling = LatentScaling(self.shift, self.scale)
        self.network: Any = network.eval().requires_grad_(False)
        self._name = name

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        key: str = "data.autoencoder",
    ) -> "KLAutoencoder":
        """Reads a folder in diffusers' layout: `config.json` and one file of safetensors.

        Args:
            folder: of this machine; nothing is looked up elsewhere.
            dtype: in which it will compute, whatever its weights are stored in.
            key: config key or option that gave the folder, for messages.
        """
        folder = Path(folder)
        config = read_config(folder, key)
        tensors = _read_tensors(folder, key)
        network = fill_network(config, tensors, f"{key}: {folder}")
        # diffusers' own `to` warns of layers to be kept in float32 even where there are none.
        return cls(nn.Module.to(network, device=device, dtype=dtype), fingerprint(tensors), key)

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """The shape [C, Y, X] of the latents of such images; UserError where it does not take them."""
        channels, height, width = image_shape
        if channels != self.image_channels or height % self.stride or width % self.stride:
            raise UserError(
                f"{self._name}: expected images of {self.image_channels} channels with sides that are multiples of "
                f"{self.stride}, got {channels} x {height} x {width}; make such images or take another autoencoder"
            )
        return self.latent_channels, height // self.stride, width // self.stride

    def scaling_overrides(self) -> str:
        """Shift and scale as overrides of a config."""

        def values(of: Sequence[float]) -> str:
            return "[" + ",".join(f"{value:.9g}" for value in (of[:1] if len(set(of)) == 1 else of)) + "]"

        return f"data.latent_shift={values(self.shift)} data.latent_scale={values(self.scale)}"

    @torch.no_grad()
    def encode(self, images_BCYX: Tensor) -> tuple[Tensor, Tensor]:
        """Images, 0 black and 1 white, on the autoencoder's device -> the posterior of their raw latents.

        Returns:
            Mean and log-variance, float32; the log-variance within [-30, 20], as the autoencoder was trained.
        """
        _, channels, height, width = images_BCYX.shape
        self.latent_shape((channels, height, width))
        posterior = self.network.encode(images_BCYX.to(self.network.dtype) * 2 - 1).latent_dist
        return posterior.mean.float(), posterior.logvar.float()

    @torch.no_grad()
    def decode(self, latents_BCYX: Tensor) -> Tensor:
        """Latents of the transformer -> images, 0 black and 1 white, not clamped: float32 [B, 1 or 3, Y, X]."""
        raw_BCYX = self._scaling.from_model(latents_BCYX).to(self.network.dtype)
        # In slices: activations of the decoder take a hundred times the memory of its images, or more.
        num_pixels = raw_BCYX.shape[-2] * raw_BCYX.shape[-1] * self.stride**2
        slices = torch.split(raw_BCYX, max(1, PIXELS_AT_ONCE // num_pixels))
        images_BCYX = torch.cat([self.network.decode(part).sample for part in slices])
        return images_BCYX.float() / 2 + 0.5


def shift_and_scale(config: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The shift and scale of an AutoencoderKL's config, one value for each latent channel."""
    num_channels = config.latent_channels
    shift = config.latents_mean or [config.shift_factor or 0.0] * num_channels
    std = config.latents_std or [1.0] * num_channels
    if not len(shift) == len(std) == num_channels:
        raise ValueError(f"latents_mean and latents_std need {num_channels} values each")
    scale = tuple(config.scaling_factor / value for value in std)
    limits = torch.finfo(torch.float32)  # in which latents are scaled
    if not all(abs(value) <= limits.max for value in (*shift, *scale)) or min(map(abs, scale)) < limits.tiny:
        raise ValueError("latents need finite shifts, and finite scales that are not 0, in float32")
    return tuple(map(float, shift)), scale


# ---------------------------------------------------------------------------------------------------------------------
# Networks of diffusers


def make_network(config: Mapping[str, Any], name: str) -> nn.Module:
    """An AutoencoderKL with random weights.

    Args:
        config: arguments of AutoencoderKL; names that begin with an underscore are for people.
        name: where the config comes from, for the message.
    """
    from diffusers import AutoencoderKL  # here: it takes seconds, and brings transformers along

    try:
        _check_sizes(config)
        network: Any = AutoencoderKL(**{key: value for key, value in config.items() if not key.startswith("_")})
        shift_and_scale(network.config)
    except Exception as error:  # of diffusers' and torch's own, for whatever a config says
        raise UserError(
            f"{name}: expected the config of an {_CLASS}, but it makes none ({one_line(error):.200})"
        ) from error
    made: nn.Module = network
    return made


def _check_sizes(config: Mapping[str, Any]) -> None:
    """ValueError where a config says sizes that no autoencoder has, and that take too long to be built."""
    for key, value in config.items():
        if key in _SCALING:
            continue
        values = value if isinstance(value, list | tuple) else [value]
        smallest, largest = (0, _MOST_LAYERS) if key == "layers_per_block" else (1, _LARGEST_SIZE)
        numbers = [one for one in values if isinstance(one, int | float) and not isinstance(one, bool)]
        if not all(isinstance(one, int) and smallest <= one <= largest for one in numbers):
            raise ValueError(f"{key} is no whole number between {smallest} and {largest}")
        if key.startswith(("block_", "down_", "up_")) and len(values) > _MOST_LAYERS:
            raise ValueError(f"{key} has more than {_MOST_LAYERS} values")


def fill_network(config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> nn.Module:
    """An AutoencoderKL with these weights, no tensor more or less; arguments as `make_network`."""
    with torch.device("meta"):
        network = make_network(config, f"{name}: {CONFIG_FILE}")
    expected = network.state_dict()
    found, wanted = ({key: value.shape for key, value in these.items()} for these in (tensors, expected))
    others = [key for key, value in tensors.items() if not value.is_floating_point()]
    different = tensor_differences(found, wanted)
    if not different and others:
        different = f"not of floating point: {others[0]}"
    if different:
        raise UserError(
            f"{name}: expected the {len(expected)} tensors of the {_CLASS} that {CONFIG_FILE} describes, got others "
            f"({different}); give config and weights that belong together"
        )
    network.load_state_dict(dict(tensors), assign=True)
    return network


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A hash of weights: names, dtypes, shapes and values; their order and the file they came from do not matter."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        head = json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode()
        values: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(len(head).to_bytes(8, "little") + head)
        digest.update(values)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Folders in diffusers' layout


def read_config(folder: Path, key: str) -> dict[str, Any]:
    """The config of an autoencoder's folder."""
    path = folder / CONFIG_FILE
    try:
        config: Any = read_json(path)
        found = config["_class_name"]
    except OSError as error:
        raise UserError(
            f"{key}: expected an autoencoder's folder with {CONFIG_FILE} and {WEIGHTS_FILE}, but {path} cannot be read "
            f"({error.strerror}); of a whole diffusers pipeline give the subfolder vae"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{key}: {path} is no config of diffusers ({error!r:.120}); restore it") from error
    if found != _CLASS:
        raise UserError(f"{key}: expected an {_CLASS}, got {found!r:.80} in {path}; give another autoencoder's folder")
    return config


def _read_tensors(folder: Path, key: str) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in _PICKLES)
        raise UserError(
            f"{key}: expected {path}, which is not there"
            + (
                f", only {pickles[0]}, a pickle, and such files can run code when they are read; convert it with: "
                f"python tools/import_autoencoder.py {folder / pickles[0]} OTHER_FOLDER"
                if pickles
                else "; give the folder that diffusers or tools/import_autoencoder.py wrote"
            )
        )
    try:
        check_safetensors(path)
        return current_names(load_file(path))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{key}: {path} cannot be read ({one_line(error):.200}); restore it") from error


def current_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an AutoencoderKL of any version of diffusers, by the names that they have today."""
    renamed = {}
    for name, value in tensors.items():
        for old, new in _OLD_NAMES.items():
            name = name.replace(old, new)
        renamed[name] = value
    return renamed


def write_folder(folder: Path, network: nn.Module) -> None:
    """Writes an AutoencoderKL, in its precision, as diffusers does, where nothing is yet; OSError where it cannot."""
    files.make_folder(folder)
    saved: Any = network
    try:
        saved.save_pretrained(folder, safe_serialization=True)
    except SafetensorError as error:  # what the disk says to its writer
        raise OSError(one_line(error)) from error
    # safetensors lets nobody else read what it writes.
    files.open_to_others(folder / WEIGHTS_FILE)


def holds(folder: Path, network: nn.Module) -> bool:
    """Whether a folder holds this AutoencoderKL already, config and weights."""
    try:
        there = fill_network(read_config(folder, str(folder)), _read_tensors(folder, str(folder)), str(folder))
    except UserError:
        return False
    return _config_text(there) == _config_text(network) and (
        fingerprint(there.state_dict()) == fingerprint(network.state_dict())
    )


def _config_text(network: nn.Module) -> str:
    config: Any = network.config
    return json.dumps({key: value for key, value in config.items() if not key.startswith("_")}, sort_keys=True)
