"""Images that come into the pipeline of an export, and that it gives out: pixels <-> latents in the network's scale."""

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from torch import Tensor

_PIXELS_AT_ONCE = 1 << 19  # decoded together: 8 images of 256 px
_MOST_PIXELS = 2 * (PIL.Image.MAX_IMAGE_PIXELS or 1 << 27)  # where PIL refuses to decode


@dataclass(frozen=True)
class Images:
    """Pixels <-> latents of a model."""

    transformer: Any
    vae: Any  # an AutoencoderKL; None where latents are pixels
    device: torch.device  # where they are made

    def given(self, image: Any, latents: Tensor | None, num_images: int | None = None) -> Tensor:
        """The latents of images that a user gives, so many if that is known: float32 [B, C, Y, X]."""
        if (image is None) == (latents is None):
            raise ValueError("image: expected an image or latents, got both or none")
        if latents is not None:
            _check_shape("latents", latents, [num_images or len(latents), *self._latent_shape])
            if not latents.isfinite().all():
                raise ValueError("latents: expected finite numbers, got others")
            return latents.to(self.device, torch.float32)
        channels = self._latent_shape[0] if self.vae is None else self.vae.config.in_channels
        side = self._latent_shape[1] * self._stride
        pixels_BCYX = _as_pixels(image, channels, side)
        _check_shape("image", pixels_BCYX, [num_images or len(pixels_BCYX), channels, side, side])
        if not ((pixels_BCYX >= 0) & (pixels_BCYX <= 1)).all():
            low, high = pixels_BCYX.min().item(), pixels_BCYX.max().item()
            raise ValueError(f"image: expected values from 0 to 1, got {low:g} to {high:g}; divide bytes by 255")
        return self._encode(pixels_BCYX.to(self.device))

    def given_part(self, image: Any) -> Tensor:
        """The latents of an image among the parts of a sample: [C, Y, X]."""
        if isinstance(image, Tensor) and self.vae is not None and list(image.shape) == self._latent_shape:
            return self.given(None, image[None])[0]
        return self.given(image if isinstance(image, PIL.Image.Image) else _as_tensor(image)[None], None)[0]

    def output(self, latents_BCYX: Tensor, output_type: str) -> Any:
        """Images as an `output_type` of the pipeline says."""
        return latents_BCYX if output_type == "latent" else _OUTPUTS[output_type](self._decode(latents_BCYX))

    @property
    def _latent_shape(self) -> list[int]:
        """Of an image: channels, rows, columns."""
        config = self.transformer.config
        return [config.latent_channels, *[config.grid * config.patch_size] * 2]

    @property
    def _stride(self) -> int:
        """Pixels a side of what becomes one latent."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    def _encode(self, pixels_BCYX: Tensor) -> Tensor:
        if self.vae is None:
            return self.transformer.scaling.to_model(pixels_BCYX)
        posterior = self.vae.encode(pixels_BCYX.to(self.vae.dtype) * 2 - 1).latent_dist
        return self.transformer.scaling.to_model(posterior.mean)

    def _decode(self, latents_BCYX: Tensor) -> Tensor:
        """Latents -> images in [0, 1]."""
        raw_BCYX = self.transformer.scaling.from_model(latents_BCYX)
        if self.vae is not None:
            # In slices: activations of the decoder take a hundred times the memory of its images, or more.
            num_pixels = raw_BCYX.shape[-2] * raw_BCYX.shape[-1] * self._stride**2
            slices = torch.split(raw_BCYX.to(self.vae.dtype), max(1, _PIXELS_AT_ONCE // num_pixels))
            images_BCYX = torch.cat([self.vae.decode(part).sample for part in slices]).float() / 2 + 0.5
        elif raw_BCYX.shape[1] in (1, 3):
            images_BCYX = raw_BCYX
        else:
            raise ValueError(
                f"output_type: expected 'latent', since the autoencoder of these {raw_BCYX.shape[1]} channels is not "
                "part of this folder"
            )
        return images_BCYX.clamp(0, 1)


def check_output(output_type: str) -> None:
    """ValueError where it is none."""
    if output_type not in _OUTPUTS:
        raise ValueError(f"output_type: expected one of {', '.join(_OUTPUTS)}, got {output_type!r}")


def _check_shape(name: str, values: Tensor, expected: list[int]) -> None:
    if list(values.shape) != expected:
        raise ValueError(f"{name}: expected {expected} in all, got {list(values.shape)}")


def _as_pixels(image: Any, channels: int, side: int) -> Tensor:
    """PIL images of any size and of any mode of 8 bits, an array or a tensor -> float32 [B, C, Y, X] in [0, 1].

    Of PIL images the centre crop is taken, of `side` pixels a side; others stay as they are.
    """
    if isinstance(image, PIL.Image.Image):
        image = [image]
    if isinstance(image, list | tuple) and image and all(isinstance(one, PIL.Image.Image) for one in image):
        deep = [one.mode for one in image if one.mode[0] in "IF"]
        if deep:  # as PIL turns these into bytes, nearly all would be white
            raise ValueError(f"image: expected 8 bits a channel, got mode {deep[0]}; scale the image to them first")
        crops = [_centre_crop(_opaque(one).convert("L" if channels == 1 else "RGB"), side) for one in image]
        arrays = [np.asarray(one, dtype=np.float32) / 255 for one in crops]
        image = np.stack([one[None] if one.ndim == 2 else one.transpose(2, 0, 1) for one in arrays])
    return _as_tensor(image).float()


def _opaque(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image as viewers show it: upright, and on white where it is transparent; in RGB."""
    with contextlib.suppress(Exception):  # damaged EXIF, which viewers ignore too
        image = PIL.ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _centre_crop(image: PIL.Image.Image, side: int) -> PIL.Image.Image:
    """ADM's, as for training: halved by the box filter, the rest by the bicubic one, and the middle cut out."""
    if not min(image.size):
        raise ValueError(f"image: expected pixels, got {image.width} x {image.height}")
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), PIL.Image.Resampling.BOX)
    scale = side / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > _MOST_PIXELS:
        raise ValueError(f"image: expected one less thin, got {image.width} x {image.height}; crop it first")
    image = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _as_tensor(image: Any) -> Tensor:
    try:
        return torch.as_tensor(image)
    except (TypeError, RuntimeError, ValueError):
        raise ValueError(f"image: expected PIL images, or one array or tensor, got {image!r:.80}") from None


def _to_arrays(images_BCYX: Tensor) -> Any:
    return images_BCYX.cpu().permute(0, 2, 3, 1).numpy()


def _to_pil(images_BCYX: Tensor) -> list[PIL.Image.Image]:
    bytes_BYXC = (_to_arrays(images_BCYX) * 255).round().astype(np.uint8)
    return [PIL.Image.fromarray(one.squeeze(-1) if one.shape[-1] == 1 else one) for one in bytes_BYXC]


_OUTPUTS: dict[str, Any] = {
    "pil": _to_pil,
    "np": _to_arrays,
    "pt": lambda images_BCYX: images_BCYX,
    "latent": None,
}
