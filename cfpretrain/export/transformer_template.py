"""CausalFusion, a causal diffusion transformer (arXiv 2412.12095), as a diffusers model: network and sampler.

The letters at the end of a tensor's name are its axes: B samples, L tokens of an image, N noised tokens, M tokens of a
sequence, K keys, D width, H heads, E head width, P values of a token, Q condition tokens, T timesteps, C channels,
Y rows, X columns.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from cfpretrain.core.ar import choose_sizes
from cfpretrain.core.continuation import Drawing, Writing, caption_images, continue_samples, generate_behind_texts
from cfpretrain.core.latents import LatentScaling, patchify, take_tokens, unpatchify
from cfpretrain.core.model import CausalFusion
from cfpretrain.core.process import process_of_scheduler
from cfpretrain.core.regions import kept_first, parse_region
from cfpretrain.core.sampler import Guidance, generate, noise_by_image, sampling_orders
from cfpretrain.core.solvers import SOLVERS, Solver
from cfpretrain.core.texts import Marks
from cfpretrain.core.token_choice import TokenChoice


class CausalFusionTransformer(CausalFusion, ModelMixin, ConfigMixin):
    """The network with its own sampler."""

    config: Any

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        grid: int,  # rows = columns of tokens
        patch_size: int,  # latent rows = columns of a token
        latent_channels: int,
        width: int,
        depth: int,
        num_heads: int,
        num_cond_tokens: int,  # condition tokens a class
        num_classes: int,  # without the null class
        learnable_positions: bool,  # else fixed 2-d sin-cos
        token_order: str,  # in which tokens are made, as in training
        block_size: int,
        latent_shift: Sequence[float],  # one value, or one a channel; the network sees (raw - shift) * scale
        latent_scale: Sequence[float],
        prediction_type: str,  # what the network predicts, in diffusers' words
        trunk_kind: str = "causalfusion",  # what a block computes
        block_changes: Mapping[str, Any] | None = None,  # in what it differs from others of its kind
        vocabulary: int = 0,  # token ids of texts; 0: it has no texts
        max_text_tokens: int = 0,  # of one text, the two that frame it among them
        max_segments: int = 0,  # of a sample, that are told their places among its texts and images
    ) -> None:
        super().__init__(
            grid=grid,
            patch_values=patch_size**2 * latent_channels,
            width=width,
            depth=depth,
            num_heads=num_heads,
            num_cond_tokens=num_cond_tokens,
            num_classes=num_classes,
            learnable_positions=learnable_positions,
            trunk_kind=trunk_kind,
            block_changes=block_changes,
            vocabulary=vocabulary,
            max_text_tokens=max_text_tokens,
            max_segments=max_segments,
        )

    @property
    def scaling(self) -> LatentScaling:
        """Between raw latents and those that the network sees."""
        # Made when it is asked for: diffusers may make modules without memory for tensors.
        return LatentScaling(self.config.latent_shift, self.config.latent_scale)

    @torch.no_grad()
    def sample(
        self,
        conditions: Tensor | Sequence[Sequence[int]],
        image_ids_B: Tensor,
        *,
        marks: Sequence[int] = (),
        latents_BCYX: Tensor | None = None,
        region_L: Tensor | None = None,
        on_step: Callable[[], None] = lambda: None,
        **how: Any,
    ) -> Tensor:
        """Generates latents; an image is a function of seed and id. Arguments are the pipeline's, but these.

        Args:
            conditions: classes, int64 [B]; or the tokens of texts, without those that frame them.
            image_ids_B: int64.
            marks: these, as of `Marks`.
            latents_BCYX: float32, in the network's scale: images to edit.
            region_L: bool, the tokens of these that are regenerated; the others come back as they are.
            on_step: called after every denoising step.
            how: see `_how`.

        Returns:
            float32 [B, C, Y, X] in the network's scale.
        """
        config, device = self.config, image_ids_B.device
        order_BL, given_BKP, num_kept = self._orders(how["seed"], image_ids_B), None, 0
        if latents_BCYX is not None and region_L is not None:
            order_BL, num_kept = kept_first(order_BL, region_L.to(device))
            given_BKP = take_tokens(patchify(latents_BCYX, config.patch_size), order_BL[:, :num_kept])
        sizes, solver, guidance = self._how(self.grid**2 - num_kept, **how)

        def watch(_: int, num_steps_left: int, *__: Tensor) -> None:
            if num_steps_left < how["num_inference_steps"]:
                on_step()

        noise = noise_by_image(how["seed"], image_ids_B, self.patch_values)
        makes = order_BL, sizes, solver, guidance, noise, given_BKP, watch
        if isinstance(conditions, Tensor):
            tokens_BLP = generate(self, conditions, *makes)
        else:
            tokens_BLP = generate_behind_texts(self, conditions, Marks(*marks), *makes)
        return unpatchify(tokens_BLP, config.patch_size)

    @torch.no_grad()
    def caption(
        self, latents_BCYX: Tensor, ids_B: Tensor, prefixes: Sequence[Sequence[int]], **writing: Any
    ) -> list[list[int]]:
        """The tokens of a text for each image, its beginning among them, without those that frame it.

        Args:
            latents_BCYX: float32, in the network's scale.
            ids_B: int64, numbers of the images.
            prefixes: the tokens that each text begins with.
            writing: see `_writing`.
        """
        images_BLP = patchify(latents_BCYX, self.config.patch_size)
        return caption_images(self, images_BLP, ids_B, self._writing(**writing), prefixes)

    @torch.no_grad()
    def interleave(
        self,
        parts: Sequence[Sequence[int] | Tensor],
        ids_B: Tensor,
        *,
        max_new_parts: int,
        first: str | None,
        writing: Mapping[str, Any],
        **how: Any,
    ) -> list[list[int] | Tensor]:
        """What the model adds to a sample: tokens of texts, and images, latents [C, Y, X] in the network's scale.

        Args:
            parts: the sample's, alike.
            ids_B: int64 [1], its number.
            max_new_parts: see `continue_samples`.
            first: see there.
            writing: how texts are written, see `_writing`.
            how: images are made, see `_how`.
        """
        config, num_tokens = self.config, self.grid**2
        sizes, solver, guidance = self._how(num_tokens, **how)
        sizes_of_image = num_tokens, self.patch_values, sizes, solver, how["seed"], guidance
        drawing = Drawing(*sizes_of_image, config.token_order, config.block_size)
        given = [patchify(part[None], config.patch_size)[0] if isinstance(part, Tensor) else part for part in parts]
        [new] = continue_samples(self, [given], ids_B, self._writing(**writing), drawing, max_new_parts, [first])
        return [
            unpatchify(part[None], config.patch_size)[0] if isinstance(part, Tensor) else list(part) for part in new
        ]

    def _orders(self, seed: int, image_ids_B: Tensor) -> Tensor:
        order = self.config.token_order, self.config.block_size
        return sampling_orders(seed, image_ids_B.cpu(), self.grid**2, *order).to(image_ids_B.device)

    def _how(
        self,
        num_tokens: int,
        *,
        seed: int,  # of noise and orders
        scheduler: Mapping[str, Any],  # the config of a scheduler, which says the noise schedule
        num_inference_steps: int,
        solver: str,
        level_spacing: str,
        num_ar_steps: int,
        ar_step_sizes: str | Sequence[int],
        guidance_scale: float,
        guidance_schedule: str,
        guidance_interval: tuple[int, int | None],
    ) -> tuple[list[int], Solver, Guidance]:
        """How so many tokens are made: the pipeline's arguments, checked."""
        _check_choice("solver", solver, SOLVERS)
        _check_choice("level_spacing", level_spacing, ("time", "log_snr"))
        if isinstance(ar_step_sizes, str):
            _check_choice("ar_step_sizes", ar_step_sizes, ("equal", "cosine"))
        _check_choice("guidance_schedule", guidance_schedule, ("constant", "linear"))
        _check_finite("guidance_scale", guidance_scale)
        process = process_of_scheduler(self.config.prediction_type, scheduler)
        return (
            choose_sizes(num_tokens, num_ar_steps, ar_step_sizes),
            Solver(process, num_inference_steps, level_spacing, solver),
            Guidance(guidance_scale, guidance_schedule, *guidance_interval),
        )

    def _writing(
        self,
        *,
        marks: Sequence[int],
        max_tokens: int,
        seed: int,
        temperature: float,
        top_k: int,
        top_p: float,
        guidance_scale: float,
    ) -> Writing:
        """How texts are written: the pipeline's arguments, checked."""
        if not (temperature >= 0 and top_k >= 0 and 0 < top_p <= 1):
            raise ValueError(
                "temperature, top_k, top_p: expected at least 0, at least 0, and above 0 up to 1, got "
                f"{temperature}, {top_k}, {top_p}"
            )
        _check_finite("guidance_scale", guidance_scale)
        return Writing(Marks(*marks), max_tokens, seed, TokenChoice(temperature, top_k, top_p), guidance_scale)

    def region(self, region: str | Tensor) -> Tensor:
        """Tokens to regenerate, bool [L]: of a text or a mask, as `CausalFusionPipeline.edit` takes them."""
        if isinstance(region, str):
            return parse_region(region, self.grid)
        if tuple(region.shape) not in ((self.grid, self.grid), (self.grid**2,)) or region.dtype != torch.bool:
            raise ValueError(
                f"expected a mask of {self.grid} x {self.grid} tokens, true or false, got {list(region.shape)} of "
                f"{region.dtype}"
            )
        if not region.any():
            raise ValueError("expected a mask that is true where the image is regenerated, got false everywhere")
        return region.flatten()


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
