"""The pipeline of CausalFusion (arXiv 2412.12095): class-conditional images with any number of AR steps, and editing.

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    images = pipe([3, "seven"], num_ar_steps=4, num_inference_steps=25, guidance_scale=2.0, solver="sde-dpm++").images
    edited = pipe.edit([5], region="top", image=images[:1]).images

It stands alone: torch and diffusers are all that it needs.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from torch import Tensor

from cfpretrain.base.class_names import label_of

# Noise levels and their spacing, where none are asked for.
_BY_SOLVER = {
    "ddpm": (250, "time"),
    "ddim": (50, "time"),
    "dpm++": (25, "log_snr"),
    "sde-dpm++": (25, "log_snr"),
}
_PIXELS_AT_ONCE = 1 << 19  # decoded together: 8 images of 256 px


class CausalFusionPipeline(DiffusionPipeline):
    """Generates and edits images. An image is a function of the seed and its id.

    Arguments of a call, of which a mistake raises ValueError:
        class_labels: classes by number, or by name; `name:` or `index:` before a text says which it is.
        num_ar_steps: from 1 (a diffusion transformer) to the number of tokens made (pure autoregression).
        num_inference_steps: noise levels that each AR step runs through; left out, 250 for "ddpm", 50 for "ddim",
            25 for the others.
        guidance_scale: of classifier-free guidance; 1 = none.
        solver: "ddpm", "ddim", or of second order "dpm++" and "sde-dpm++", the one for few steps. "ddim" and "dpm++"
            draw no noise on the way. Of the scheduler, only the noise schedule is used.
        seed: of noise and orders.
        ids: numbers of the images, from 0 on if left out: image i of a seed is always the same.
        ar_step_sizes: "equal", "cosine", or sizes that add up to the tokens made.
        guidance_schedule: "constant", or "linear": growing along the AR axis.
        guidance_interval: the first and last timestep (0 to 999) in which guidance acts; None for the last: to the end.
        level_spacing: noise levels evenly in "time" or in "log_snr"; left out, the latter for those of second order.
        output_type: "pil", "np", "pt" (both in [0, 1]), or "latent" (in the network's scale).
        return_dict: whether to return an `ImagePipelineOutput`, else a tuple.
        region, image, latents: see `edit`.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None,  # an AutoencoderKL; None where latents are pixels
        id2label: dict[str, str] | None = None,  # the name of each class, by its number as text
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(id2label=id2label)

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Refused: what it writes would lack the code that the folder brings."""
        raise NotImplementedError(
            "save_pretrained leaves out the code of this model; copy the folder that it came from"
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        num_ar_steps: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float = 2.0,
        solver: str = "ddpm",
        seed: int = 0,
        ids: Sequence[int] | None = None,
        ar_step_sizes: str | Sequence[int] = "equal",
        guidance_schedule: str = "constant",
        guidance_interval: tuple[int, int | None] = (0, None),
        level_spacing: str | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        region: Any = None,
        image: Any = None,
        latents: Tensor | None = None,
    ) -> Any:
        """Makes one image for each class; with a region, regenerates that of given images."""
        labels = self._labels(class_labels)
        ids = range(len(labels)) if ids is None else ids
        if len(ids) != len(labels):
            raise ValueError(f"ids: expected {len(labels)}, one for each class, got {len(ids)}")
        if output_type not in _OUTPUTS:
            raise ValueError(f"output_type: expected one of {', '.join(_OUTPUTS)}, got {output_type!r}")
        given_BCYX, region_L = None, None
        if any(value is not None for value in (region, image, latents)):
            given_BCYX, region_L = self._given(image, latents, len(labels)), self._region(region)
        usual_steps, usual_spacing = _BY_SOLVER.get(solver, _BY_SOLVER["ddpm"])
        if num_inference_steps is None:
            num_inference_steps = min(usual_steps, self.scheduler.config.num_train_timesteps)
        if not isinstance(ar_step_sizes, str):
            num_ar_steps = len(ar_step_sizes)
        with self.progress_bar(total=num_ar_steps * num_inference_steps) as bar:
            latents_BCYX = self.transformer.sample(
                torch.tensor(labels, device=self._execution_device),
                torch.tensor(list(ids), dtype=torch.int64),
                seed=seed,
                scheduler=self.scheduler.config,
                num_inference_steps=num_inference_steps,
                solver=solver,
                level_spacing=level_spacing or usual_spacing,
                num_ar_steps=num_ar_steps,
                ar_step_sizes=ar_step_sizes,
                guidance_scale=guidance_scale,
                guidance_schedule=guidance_schedule,
                guidance_interval=guidance_interval,
                latents_BCYX=given_BCYX,
                region_L=region_L,
                on_step=bar.update,
            )
        images = latents_BCYX if output_type == "latent" else _OUTPUTS[output_type](self._decode(latents_BCYX))
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def edit(
        self,
        class_labels: int | str | Sequence[int | str],
        region: Any,
        image: Any = None,
        latents: Tensor | None = None,
        **settings: Any,
    ) -> Any:
        """Regenerates a region of each image, as the class asked for; the other tokens are its context.

        They come back bit for bit in latents (`output_type="latent"`).

        Args:
            class_labels: the new class of each image.
            region: "centre", "top", "bottom", "outside", "box:Y0,X0,Y1,X1" (rows and columns of tokens, ends left out)
                or "tokens:0,1,17" (row * columns + column); or a mask of the tokens, true where they are regenerated:
                bool [rows, columns] or [tokens].
            image: PIL images, or a tensor or array [B, channels, height, width] in [0, 1].
            latents: instead of these, [B, channels, rows, columns] in the network's scale, as `output_type="latent"`
                gives them.
            settings: the other arguments of a call, e.g. `num_ar_steps` and `guidance_scale`.
        """
        return self(class_labels, region=region, image=image, latents=latents, **settings)

    # -----------------------------------------------------------------------
    # What comes in

    def _labels(self, class_labels: int | str | Sequence[int | str]) -> list[int]:
        given = [class_labels] if isinstance(class_labels, int | str) else list(class_labels)
        if not given:
            raise ValueError("class_labels: expected at least one class, got none")
        return [self._label(label) for label in given]

    def _label(self, label: Any) -> int:
        num_classes = self.transformer.num_classes
        if isinstance(label, str):
            names = {int(number): known for number, known in (self.config.id2label or {}).items()}
            try:
                return label_of(label, [names.get(i, str(i)) for i in range(num_classes)])
            except ValueError as error:
                raise ValueError(f"class_labels: {error}") from None
        # Whole numbers of numpy and torch are classes too; 3.7 and True are mistakes.
        number = label.__index__() if hasattr(label, "__index__") and not isinstance(label, bool) else -1
        if not 0 <= number < num_classes:
            raise ValueError(f"class_labels: expected 0 to {num_classes - 1}, got {label}")
        return int(number)

    def _given(self, image: Any, latents: Tensor | None, num_images: int) -> Tensor:
        """The latents to keep tokens of: float32 [B, C, Y, X] in the network's scale."""
        if (image is None) == (latents is None):
            raise ValueError("image: expected an image or latents, got both or none")
        config = self.transformer.config
        size = config.grid * config.patch_size
        if latents is not None:
            _check_shape("latents", latents, [num_images, config.latent_channels, size, size])
            return latents.to(self._execution_device, torch.float32)
        channels = config.latent_channels if self.vae is None else self.vae.config.in_channels
        pixels_BCYX = _as_pixels(image, channels)
        _check_shape("image", pixels_BCYX, [num_images, channels, *[size * self._stride] * 2])
        return self._encode(pixels_BCYX.to(self._execution_device))

    def _region(self, region: Any) -> Tensor:
        """Tokens regenerated: bool [L]."""
        if region is None:
            raise ValueError("region: expected one, since images to edit are given, got none")
        try:
            return self.transformer.region(region if isinstance(region, str | Tensor) else torch.tensor(region))
        except ValueError as error:
            raise ValueError(f"region: {error}") from error

    @property
    def _stride(self) -> int:
        """Pixels a side of what becomes one latent."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    def _encode(self, pixels_BCYX: Tensor) -> Tensor:
        if self.vae is None:
            return self.transformer.scaling.to_model(pixels_BCYX)
        posterior = self.vae.encode(pixels_BCYX.to(self.vae.dtype) * 2 - 1).latent_dist
        return self.transformer.scaling.to_model(posterior.mean)

    # -----------------------------------------------------------------------
    # What comes out

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


def _check_shape(name: str, values: Tensor, expected: list[int]) -> None:
    if list(values.shape) != expected:
        raise ValueError(f"{name}: expected {expected} in all, got {list(values.shape)}")


def _as_pixels(image: Any, channels: int) -> Tensor:
    """PIL images of any mode, an array or a tensor -> float32 [B, C, Y, X] in [0, 1]."""
    if isinstance(image, PIL.Image.Image):
        image = [image]
    if isinstance(image, list | tuple) and image and isinstance(image[0], PIL.Image.Image):
        sizes = sorted({one.size for one in image})
        if len(sizes) > 1:
            raise ValueError(f"image: expected images of one size, got {sizes}")
        arrays = [np.asarray(one.convert("L" if channels == 1 else "RGB"), dtype=np.float32) / 255 for one in image]
        image = np.stack([one[None] if one.ndim == 2 else one.transpose(2, 0, 1) for one in arrays])
    return torch.as_tensor(image).float()


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
