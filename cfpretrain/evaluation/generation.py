"""Images from a model, made by all ranks together: the same images on any number of ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cfpretrain import runtime
from cfpretrain.build import make_autoencoder, make_loss
from cfpretrain.config import Config
from cfpretrain.evaluation.pictures import false_colours
from cfpretrain.model.autoencoder import are_pixels
from cfpretrain.model.transformer import unpatchify
from cfpretrain.noise import Schedule, respace
from cfpretrain.order import equal_sizes
from cfpretrain.sampler import Model, NoiseDraw, generate, noise_by_image, sampling_orders


@dataclass(frozen=True)
class GenerationSettings:
    """How images are made.

    Attributes:
        num_ar_steps: AR steps, of equal size.
        num_denoising_steps: levels that each AR step runs through.
        guidance: scale of classifier-free guidance; 1 = none.
        batch_size: images a forward on one rank.
        seed: of noise and orders.
    """

    num_ar_steps: int
    num_denoising_steps: int
    guidance: float
    batch_size: int
    seed: int


# Latents as the model sees them -> images [B, 1 or 3, Y, X], 0 black and 1 white.
Decode = Callable[[Tensor], Tensor]


def decode_to_look_at(config: Config, device: torch.device) -> tuple[Decode, str]:
    """How latents become a picture, whether or not an autoencoder is at hand, and what its title must say of it."""
    if config.data.autoencoder or are_pixels(config.model.latent_channels):
        return make_autoencoder(config, device).decode, ""
    return false_colours, "false colours"


def generate_for(
    config: Config,
    model: Model,
    labels: Sequence[int],
    settings: GenerationSettings,
    device: torch.device,
    decode: Decode | None = None,
) -> Tensor:
    """`generate_images` with the schedule, the sizes and, but for another `decode`, the autoencoder of a config."""
    return generate_images(
        model,
        decode or make_autoencoder(config, device).decode,
        labels,
        settings,
        make_loss(config).schedule,
        config.model.num_tokens,
        config.model.patch_size,
        device,
        config.order.token_order,
        config.order.block_size,
    )


def grid_title(step: int, settings: GenerationSettings, note: str = "") -> str:
    """What stands above a grid of samples, with what `decode_to_look_at` says of it."""
    return (
        f"step {step}, EMA weights, guidance {settings.guidance:g}\n"
        f"AR steps {settings.num_ar_steps}, denoising steps {settings.num_denoising_steps}" + f", {note}" * bool(note)
    )


def generate_images(
    model: Model,
    decode: Decode,
    labels: Sequence[int],
    settings: GenerationSettings,
    schedule: Schedule,
    num_tokens: int,
    patch_size: int,
    device: torch.device,
    token_order: str = "random",
    block_size: int = 1,
) -> Tensor:
    """One image for each label; image i has id i, which fixes its noise and order.

    The images are cut into batches of equal size, dealt to the ranks in turn. The last batches are filled up with
    surplus images, so that every rank runs the same number of forwards (ZeRO-3 would hang otherwise) and no image
    depends on the number of ranks.

    Args:
        model: predicts epsilon; called alike on all ranks.
        decode: makes images of latents.
        labels: the class of each image.
        settings: how.
        schedule: the full noise schedule.
        num_tokens: L.
        patch_size: latent rows = columns of a token.
        device: where the model computes.
        token_order, block_size: see `order.draw_orders`.

    Returns:
        float32 [len(labels), C, Y, X] on the CPU, on every rank.
    """
    rank, world_size, size = runtime.rank(), runtime.world_size(), settings.batch_size
    num_rounds = -(-len(labels) // (size * world_size))
    padded = torch.tensor([*labels, *[labels[-1]] * (num_rounds * world_size * size - len(labels))])
    made = []
    for round_index in range(num_rounds):
        begin = (round_index * world_size + rank) * size
        ids_B = torch.arange(begin, begin + size)
        tokens_BLP = generate(
            model,
            padded[ids_B].to(device),
            sampling_orders(settings.seed, ids_B, num_tokens, token_order, block_size).to(device),
            equal_sizes(num_tokens, settings.num_ar_steps),
            respace(schedule, settings.num_denoising_steps),
            settings.guidance,
            _ticking(noise_by_image(settings.seed, ids_B.to(device), model.patch_values)),
        )
        made.append(decode(unpatchify(tokens_BLP, patch_size)).cpu())
    by_rank = torch.stack([torch.stack(images) for images in runtime.gather(made)], dim=1)
    return by_rank.flatten(0, 2)[: len(labels)]


def _ticking(draw_noise: NoiseDraw) -> NoiseDraw:
    """The same noise, each draw of which, one a denoising step, says that this rank goes on."""

    def draw(denoising_step: int, positions_BN: Tensor) -> Tensor:
        runtime.tick()
        return draw_noise(denoising_step, positions_BN)

    return draw
