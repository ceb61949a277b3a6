"""CausalFusion, a causal diffusion transformer (arXiv 2412.12095), as a diffusers model: network and sampler.

The letters at the end of a tensor's name are its axes: B samples, L tokens of an image, N noised tokens, M tokens of a
sequence, K keys, D width, H heads, E head width, P values of a token, Q condition tokens, T timesteps, C channels,
Y rows, X columns.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from cfpretrain.core.ar import choose_sizes
from cfpretrain.core.latents import LatentScaling, patchify, take_tokens, unpatchify
from cfpretrain.core.model import CausalFusion
from cfpretrain.core.process import process_of_scheduler
from cfpretrain.core.regions import kept_first, parse_region
from cfpretrain.core.sampler import Guidance, generate, noise_by_image, sampling_orders
from cfpretrain.core.solvers import SOLVERS, Solver


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
        )

    @property
    def scaling(self) -> LatentScaling:
        """Between raw latents and those that the network sees."""
        # Made when it is asked for: diffusers may make modules without memory for tensors.
        return LatentScaling(self.config.latent_shift, self.config.latent_scale)

    @torch.no_grad()
    def sample(
        self,
        labels_B: Tensor,
        image_ids_B: Tensor,
        *,
        seed: int,
        scheduler: Mapping[str, Any],
        num_inference_steps: int,
        solver: str,
        level_spacing: str,
        num_ar_steps: int,
        ar_step_sizes: str | Sequence[int],
        guidance_scale: float,
        guidance_schedule: str,
        guidance_interval: tuple[int, int | None],
        latents_BCYX: Tensor | None = None,
        region_L: Tensor | None = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Generates latents; an image is a function of seed and id. Arguments are the pipeline's, but these.

        Args:
            labels_B, image_ids_B: int64; the ids are on the CPU.
            scheduler: the config of a scheduler, which says the noise schedule.
            latents_BCYX: float32, in the network's scale: images to edit.
            region_L: bool, the tokens of these that are regenerated; the others come back as they are.
            on_step: called after every denoising step.

        Returns:
            float32 [B, C, Y, X] in the network's scale.
        """
        _check_choice("solver", solver, SOLVERS)
        _check_choice("level_spacing", level_spacing, ("time", "log_snr"))
        if isinstance(ar_step_sizes, str):
            _check_choice("ar_step_sizes", ar_step_sizes, ("equal", "cosine"))
        _check_choice("guidance_schedule", guidance_schedule, ("constant", "linear"))
        config, device = self.config, labels_B.device
        orders_BL = sampling_orders(seed, image_ids_B, self.grid**2, config.token_order, config.block_size)
        order_BL, given_BKP, num_kept = orders_BL.to(device), None, 0
        if latents_BCYX is not None and region_L is not None:
            order_BL, num_kept = kept_first(order_BL, region_L.to(device))
            given_BKP = take_tokens(patchify(latents_BCYX, config.patch_size), order_BL[:, :num_kept])
        sizes = choose_sizes(self.grid**2 - num_kept, num_ar_steps, ar_step_sizes)

        def watch(_: int, num_steps_left: int, *__: Tensor) -> None:
            if num_steps_left < num_inference_steps:
                on_step()

        tokens_BLP = generate(
            self,
            labels_B,
            order_BL,
            sizes,
            Solver(process_of_scheduler(config.prediction_type, scheduler), num_inference_steps, level_spacing, solver),
            Guidance(guidance_scale, guidance_schedule, *guidance_interval),
            noise_by_image(seed, image_ids_B.to(device), self.patch_values),
            given_BKP=given_BKP,
            watch=watch,
        )
        return unpatchify(tokens_BLP, config.patch_size)

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
