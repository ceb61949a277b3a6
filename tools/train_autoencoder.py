"""Trains a small KL autoencoder on image shards, and writes it as a folder in diffusers' layout.

    python tools/train_autoencoder.py data/mnist-images data/autoencoders/digits --held-out data/mnist-held-out-images

It is made for small images: everything lies in memory, and training takes minutes on a CPU. The loss is the squared
error of pixels in [-1, 1] plus a small weight on the posterior's KL divergence from a normal distribution, both as
means over values; there is neither a perceptual nor an adversarial term, as photographs want them. Same seed, same
weights, on the same kind of machine with as many threads.
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfpretrain.console import Progress, UserError, ending_in_one_line, path_argument, phase, say

if TYPE_CHECKING:
    from torch import Tensor

_BATCH = 500  # images at once where nothing is learned
_WARM_UP = 1 / 30  # share of the steps
_NORM_GROUPS = 8


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Train a small KL autoencoder on image shards.")
    parser.add_argument(
        "images", type=path_argument, help="image shards, as tools/make_shards.py writes them (lossless)"
    )
    parser.add_argument("out", type=path_argument, help="folder to write; it must not be there yet")
    parser.add_argument(
        "--held-out", type=path_argument, required=True, help="image shards for the reconstruction error"
    )
    parser.add_argument(
        "--channels",
        type=int,
        nargs="+",
        default=[16, 32, 40, 40],
        help=f"of each level, multiples of {_NORM_GROUPS}; each level but the last halves the image "
        "(default 16 32 40 40)",
    )
    parser.add_argument("--latent-channels", type=int, default=4, help="default 4")
    parser.add_argument(
        "--init",
        type=path_argument,
        help="folder of an autoencoder to go on from, in place of random weights and its sizes",
    )
    parser.add_argument("--kl-weight", type=float, default=0.003, help="default 0.003")
    parser.add_argument("--num-steps", type=int, default=4000, help="default 4000")
    parser.add_argument("--batch-size", type=int, default=64, help="default 64")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="after warm-up; falls to 0 (default 2e-3)")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    arguments = parser.parse_args()
    with ending_in_one_line():
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Trains, measures, writes, and reads back what was written."""
    _check(arguments)
    with phase("loading torch and diffusers"):
        import torch

        from cfpretrain.data.images import read_all_images
        from cfpretrain.evaluation.reconstruction import reconstruction_error
        from cfpretrain.model import autoencoder
    autoencoder.refuse_existing(arguments.out)
    with phase("reading the images"):
        train, held_out = (
            read_all_images(folder, key)[0]
            for folder, key in ((arguments.images, "IMAGES"), (arguments.held_out, "--held-out"))
        )
    if train.shape[1:] != held_out.shape[1:]:
        raise UserError(
            f"--held-out: expected images of shape {list(train.shape[1:])} as in {arguments.images}, "
            f"got {list(held_out.shape[1:])}; make both shards alike"
        )
    if arguments.init is None:
        network = make_network(arguments, train.shape[1], train.shape[2])
    else:
        network = read_network(arguments.init, train.shape[1])
    parameters = sum(value.numel() for value in network.parameters())
    say(f"{len(train)} images of {' x '.join(map(str, train.shape[1:]))}, {parameters:,} parameters")
    train_network(network, train, arguments)
    network.half().float()  # what is measured below is what is written
    with phase("measuring the latents"):
        mean, std = measure_latents(network, train, arguments.seed)
    network.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=1.0)
    autoencoder.write_folder(arguments.out, network.half())
    made = autoencoder.KLAutoencoder.load(arguments.out, "cpu", key="OUT")
    say(f"{arguments.out}: fingerprint {made.fingerprint}")
    cpu = torch.device("cpu")
    for name, images in (("training", train), ("held-out", held_out)):
        error = reconstruction_error(made, images, cpu)
        say(f"mean squared error of reconstructed {name} images on [-1, 1]: {error:.5f}")
    say(f"in a config: {made.scaling_overrides()}")


def _check(arguments: argparse.Namespace) -> None:
    for name, values, least in (
        ("--channels", arguments.channels, _NORM_GROUPS),
        *((f"--{name}", [getattr(arguments, name.replace("-", "_"))], 1) for name in ("latent-channels", "num-steps")),
        ("--batch-size", [arguments.batch_size], 1),
        ("--kl-weight", [arguments.kl_weight], 0),
        ("--seed", [arguments.seed], 0),
    ):
        if not least <= min(values) <= max(values) < math.inf:
            raise UserError(f"{name}: expected at least {least}, got {' '.join(map(str, values))}")
    if any(num % _NORM_GROUPS for num in arguments.channels):
        raise UserError(f"--channels: expected multiples of {_NORM_GROUPS}, got {arguments.channels}")
    if not 0 < arguments.learning_rate < 1:
        raise UserError(f"--learning-rate: expected a number between 0 and 1, got {arguments.learning_rate}")


def make_network(arguments: argparse.Namespace, image_channels: int, image_size: int) -> Any:
    """An AutoencoderKL with random weights, which follow from the seed."""
    import torch

    from cfpretrain.model import autoencoder

    num_levels = len(arguments.channels)
    if image_size % 2 ** (num_levels - 1):
        raise UserError(
            f"--channels: expected levels that halve images of {image_size} pixels to whole sizes, got {num_levels}; "
            "give fewer, or pad the images"
        )
    config = {
        "in_channels": image_channels,
        "out_channels": image_channels,
        "latent_channels": arguments.latent_channels,
        "block_out_channels": arguments.channels,
        "down_block_types": ["DownEncoderBlock2D"] * num_levels,
        "up_block_types": ["UpDecoderBlock2D"] * num_levels,
        "layers_per_block": 1,
        "norm_num_groups": _NORM_GROUPS,
        "sample_size": image_size,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(arguments.seed)
        return autoencoder.make_network(config, "--channels")


def read_network(folder: Path, image_channels: int) -> Any:
    """The AutoencoderKL of a folder, ready to be trained."""
    from cfpretrain.model import autoencoder

    made = autoencoder.KLAutoencoder.load(folder, "cpu", key="--init")
    if made.image_channels != image_channels:
        raise UserError(
            f"--init: expected an autoencoder of {image_channels} channels, as the images have, got "
            f"{made.image_channels} in {folder}; give another"
        )
    return made.network.requires_grad_(True)


def train_network(network: Any, images_BCYX: "Tensor", arguments: argparse.Namespace) -> None:
    """Trains in place.

    Args:
        network: an AutoencoderKL.
        images_BCYX: uint8.
        arguments: of the command.
    """
    import torch

    generator = torch.Generator().manual_seed(arguments.seed)
    num_steps, begin = arguments.num_steps, time.monotonic()
    num_warm_up = math.ceil(_WARM_UP * num_steps)
    optimizer = torch.optim.AdamW(network.parameters(), lr=arguments.learning_rate, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / num_warm_up) * (1 + math.cos(math.pi * step / num_steps)) / 2,
    )
    progress = Progress(num_steps, 0)
    network.train()
    for step, batch in enumerate(_batches(images_BCYX, arguments.batch_size, num_steps, generator), start=1):
        posterior = network.encode(batch).latent_dist
        squared_error = (network.decode(posterior.sample(generator)).sample - batch).square().mean()
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
        optimizer.zero_grad()
        (squared_error + arguments.kl_weight * divergence).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        left = (time.monotonic() - begin) / step * (num_steps - step)
        progress.show(step, f"squared error {squared_error.item():.4f}  KL {divergence.item():.3f} nats a value", left)
    progress.close()
    network.eval()


def _batches(images_BCYX: "Tensor", size: int, num: int, generator: Any) -> "Iterator[Tensor]":
    """Batches of pixels in [-1, 1], in a new order each epoch."""
    import torch

    order: Tensor = torch.empty(0, dtype=torch.int64)
    for _ in range(num):
        while len(order) < size:
            order = torch.cat([order, torch.randperm(len(images_BCYX), generator=generator)])
        chosen, order = order[:size], order[size:]
        yield images_BCYX[chosen].float() / 127.5 - 1


def measure_latents(network: Any, images_BCYX: "Tensor", seed: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of the posterior's samples, in four digits."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        samples_BCYX = torch.cat(
            [
                network.encode(batch.float() / 127.5 - 1).latent_dist.sample(generator)
                for batch in images_BCYX.split(_BATCH)
            ]
        )
    std_C, mean_C = torch.std_mean(samples_BCYX.double(), dim=(0, 2, 3))
    mean, std = ([float(f"{value:.4g}") for value in values_C.tolist()] for values_C in (mean_C, std_C))
    return mean, std


if __name__ == "__main__":
    main()
