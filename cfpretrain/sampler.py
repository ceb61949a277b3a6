"""Generation: AR steps outside, diffusion inside, with a cache of the clean context and classifier-free guidance.

One AR step is a plain diffusion transformer; as many AR steps as tokens is pure autoregression.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from cfpretrain import seeds
from cfpretrain.model.transformer import ClassPart, ImagePart, KeyValueCache, Part
from cfpretrain.noise import Schedule, ddpm_update
from cfpretrain.order import draw_orders


class Model(Protocol):
    """What the sampler needs of a CausalFusion model; called alike on every rank, as ZeRO-3 wants."""

    depth: int
    num_cond_tokens: int
    null_class: int
    patch_values: int

    def __call__(
        self, parts: Sequence[Part], intervals_BMI: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Predicts epsilon for the noised tokens of `parts`."""


# draw(k, positions_BN) -> float32 [B, N, P]: k = 0 is where denoising starts, k = 1, 2, ... the noise after the k-th
# denoising step.
NoiseDraw = Callable[[int, Tensor], Tensor]


def noise_by_image(seed: int, image_ids_B: Tensor, patch_values: int) -> NoiseDraw:
    """Noise as a function of (seed, image, denoising step, token), whichever rank or batch the image is in."""
    keys_B = seeds.fold(seeds.key(seed, "sampling noise"), image_ids_B)

    def draw(denoising_step: int, positions_BN: Tensor) -> Tensor:
        keys_BN = seeds.fold(seeds.fold(keys_B, denoising_step)[:, None], positions_BN)
        return seeds.normal(keys_BN, (patch_values,))

    return draw


def sampling_orders(
    seed: int, image_ids_B: Tensor, num_tokens: int, token_order: str = "random", block_size: int = 1
) -> Tensor:
    """The order in which each image's tokens are made, as the model was trained: int64 [B, L].

    Args:
        seed: of random orders.
        image_ids_B: int64 [B]; an image's random order depends on its id alone.
        num_tokens: L.
        token_order, block_size: see `order.draw_orders`.
    """
    return draw_orders(seeds.fold(seeds.key(seed, "sampling order"), image_ids_B), num_tokens, token_order, block_size)


@torch.no_grad()
def generate(
    model: Model,
    labels_B: Tensor,
    order_BL: Tensor,
    ar_step_sizes: Sequence[int],
    schedule: Schedule,
    guidance: float,
    draw_noise: NoiseDraw,
) -> Tensor:
    """Generates images, AR step by AR step.

    Args:
        model: predicts epsilon.
        labels_B: int64 [B], the classes asked for.
        order_BL: int64 [B, L], which token of the grid is made at each position.
        ar_step_sizes: sizes of the AR steps, adding up to L.
        schedule: the (respaced) noise levels; each AR step runs through all of them.
        guidance: scale of classifier-free guidance, uncond + guidance * (cond - uncond); 1 leaves the branch out.
        draw_noise: the randomness, e.g. `noise_by_image`.

    Returns:
        Tokens in raster order: float32 [B, L, P], in the model's scale.
    """
    B, L = order_BL.shape
    assert sum(ar_step_sizes) == L, (ar_step_sizes, L)
    guided = guidance != 1.0
    # The branch without a class keeps its own cache: the same clean context under the null class.
    branches = [labels_B, torch.full_like(labels_B, model.null_class)] if guided else [labels_B]
    cache = KeyValueCache(model.depth, model.num_cond_tokens + L)
    model([ClassPart(torch.cat(branches))], cache=cache)

    tokens_BLP = torch.zeros(B, L, model.patch_values, device=labels_B.device)
    begin = 0
    for size in ar_step_sizes:
        positions_BN = order_BL[:, begin : begin + size]
        step_BNP = _denoise(model, cache, positions_BN, schedule, guidance, draw_noise, len(branches))
        tokens_BLP.scatter_(1, positions_BN.unsqueeze(-1).expand_as(step_BNP), step_BNP)
        begin += size
        if begin < L:
            part = _clean_part(step_BNP.repeat(len(branches), 1, 1), positions_BN.repeat(len(branches), 1))
            model([part], cache=cache)
    return tokens_BLP


def _denoise(
    model: Model,
    cache: KeyValueCache,
    positions_BN: Tensor,
    schedule: Schedule,
    guidance: float,
    draw_noise: NoiseDraw,
    num_branches: int,
) -> Tensor:
    """One AR step's tokens from noise to clean, given the context in the cache: [B, N, P]."""
    noised_BNP = draw_noise(0, positions_BN)
    branch_positions_BN = positions_BN.repeat(num_branches, 1)
    for denoising_step, level in enumerate(reversed(range(len(schedule))), start=1):
        timesteps_B = schedule.timesteps_T[level].to(positions_BN.device).expand(len(branch_positions_BN))
        part = _noised_part(noised_BNP.repeat(num_branches, 1, 1), branch_positions_BN, timesteps_B)
        epsilon_BNP = _guide(model([part], cache=cache).float(), guidance, num_branches)
        noise_BNP = draw_noise(denoising_step, positions_BN) if level > 0 else torch.zeros_like(noised_BNP)
        noised_BNP = ddpm_update(schedule, level, noised_BNP, epsilon_BNP, noise_BNP)
    return noised_BNP


def _guide(epsilon_BNP: Tensor, guidance: float, num_branches: int) -> Tensor:
    if num_branches == 1:
        return epsilon_BNP
    with_class, without_class = epsilon_BNP.chunk(2)
    return without_class + guidance * (with_class - without_class)


def _clean_part(clean_BNP: Tensor, positions_BN: Tensor) -> ImagePart:
    timesteps_B = torch.zeros(len(clean_BNP), dtype=torch.int64, device=clean_BNP.device)
    return ImagePart(clean_BNP, positions_BN, clean_BNP[:, :0], positions_BN[:, :0], timesteps_B)


def _noised_part(noised_BNP: Tensor, positions_BN: Tensor, timesteps_B: Tensor) -> ImagePart:
    return ImagePart(noised_BNP[:, :0], positions_BN[:, :0], noised_BNP, positions_BN, timesteps_B)
