"""Trains a small KL autoencoder on image shards, and writes it as a folder in diffusers' layout.

    python tools/train_autoencoder.py data/mnist-images data/autoencoders/digits --held-out data/mnist-held-out-images
    python tools/train_autoencoder.py data/photos-images data/autoencoders/photos --max-minutes 60

It is made for small images: everything lies in memory, and training takes minutes to hours on a CPU; a GPU is used
where there is one. The loss is the squared error of pixels in [-1, 1] plus a small weight on the posterior's KL
divergence from a normal distribution, both as means over values; there is neither a perceptual nor an adversarial term,
as photographs want them.

It may be stopped (Ctrl-C, SIGTERM, a closed terminal) or killed at any moment; the same command goes on. Until it ends,
its state lies in the hidden folder .OUT.partial beside OUT, with reconstructions.png: held-out images beside what the
autoencoder makes of them. Same seed and --num-steps, same weights, whether or not it was stopped: on a CPU bit by bit,
on the same kind of machine with as many threads; on a GPU but for rounding.
Exit code 2: a mistake; 75: it was asked to stop.
"""

import argparse
import math
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cfpretrain.base import files
from cfpretrain.base.command_line import Parser, check_range
from cfpretrain.base.console import (
    EXIT_REQUEUE,
    UserError,
    ending_in_one_line,
    path_argument,
    phase,
    say,
)
from cfpretrain.base.stopping import StopRequest, leave_before_training

if TYPE_CHECKING:
    from torch import Tensor

    from examples.digits.autoencoder_training import Training

_MOST_MEASURED = 1000  # images behind the latents' mean and deviation, and behind each error
_NORM_GROUPS = 8
_NUM_STEPS = 4000
_HELD_OUT_EVERY = 20  # where no held-out images are given
_MADE = "made"  # OUT, until it is whole


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("images", type=path_argument, help="image shards, as tools/make_shards.py writes them (lossless)")
    add("out", type=path_argument, help="folder to write; it must not be there yet")
    add("--held-out", type=path_argument, metavar="SHARDS", help="image shards for the reconstruction error (default: "
        f"every {_HELD_OUT_EVERY}th of IMAGES, kept from training)")  # fmt: skip
    add("--channels", type=int, nargs="+", default=[16, 32, 40, 40], help="of each level, multiples of "
        f"{_NORM_GROUPS}; each level but the last halves the image (default 16 32 40 40)")  # fmt: skip
    add("--latent-channels", type=int, default=4, help="default 4")
    add("--init", type=path_argument, metavar="FOLDER",
        help="autoencoder to go on from, in place of random weights and its sizes")  # fmt: skip
    add("--kl-weight", type=float, default=0.003, help="default 0.003")
    add("--num-steps", type=int, help=f"default {_NUM_STEPS}, or as many as fit into --max-minutes")
    add("--max-minutes", type=float, default=math.inf,
        help="of training, all starts together; then it ends with what it has (default: no limit)")  # fmt: skip
    add("--batch-size", type=int, default=64, help="default 64")
    add("--learning-rate", type=float, default=2e-3, help="after warm-up; falls to 0 (default 2e-3)")
    add("--seed", type=int, default=0, help="default 0")
    add("--save-seconds", type=float, default=60.0, help="between two saved states, at least (default 60)")
    arguments = parser.parse_args()
    with ending_in_one_line():
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Trains, measures, reads back what was written, and gives it its name; or saves, and ends with exit code 75."""
    _check(arguments)
    stop = StopRequest(leave_before_training)
    stop.listen()
    with phase("loading torch and diffusers"):
        from cfpretrain.base import outputs, runtime
        from examples.digits.autoencoder_training import PICTURE_FILE, StoppedError, Training
    outputs.refuse_existing(arguments.out, "OUT")
    device = runtime.pick_device()
    images = _read_images(arguments)
    if arguments.init is None:
        network = make_network(arguments, *images.train.shape[1:3])
    else:
        network = read_network(arguments.init, images.train.shape[1])
    parameters = sum(value.numel() for value in network.parameters())
    say(f"{len(images.train)} images of {' x '.join(map(str, images.train.shape[1:]))}, {parameters:,} parameters")
    work = outputs.Unfinished(arguments.out, "OUT", kind="partial")
    with work.writing():
        work.take()
        settings = _settings(arguments, images, network)
        training = Training(network.to(device), images.train, images.held_out, settings, work.folder)
        training.settle(_NUM_STEPS, 60 * arguments.max_minutes)
        say(f"originals beside reconstructions, drawn with each saved state: {work.folder / PICTURE_FILE}")
        stop.leave = None  # from here on there is something to save
        try:
            training.run(stop, arguments.save_seconds, 60 * arguments.max_minutes)
            overrides = _finish(training, images, stop)
        except StoppedError:
            say(f"stopped at step {training.step} of {training.num_steps}; the same command goes on")
            sys.exit(EXIT_REQUEUE)
    work.publish(work.folder / _MADE)
    say(f"{arguments.out} is written; originals beside reconstructions: {arguments.out / PICTURE_FILE}")
    say(f"in a config: {overrides}")


def _check(arguments: argparse.Namespace) -> None:
    for channels in arguments.channels:
        check_range("--channels", channels, _NORM_GROUPS)
    for name, least in (("latent_channels", 1), ("num_steps", 1), ("batch_size", 1), ("kl_weight", 0), ("seed", 0),
                        ("save_seconds", 0)):  # fmt: skip
        value = getattr(arguments, name)
        if value is not None:
            check_range(f"--{name.replace('_', '-')}", value, least)
    if any(num % _NORM_GROUPS for num in arguments.channels):
        raise UserError(f"--channels: expected multiples of {_NORM_GROUPS}, got {arguments.channels}")
    if not 0 < arguments.learning_rate < 1:
        raise UserError(f"--learning-rate: expected a number between 0 and 1, got {arguments.learning_rate}")
    if not arguments.max_minutes > 0:
        raise UserError(f"--max-minutes: expected more than 0, got {arguments.max_minutes}")


# ---------------------------------------------------------------------------------------------------------------------
# Images and networks


class Images(NamedTuple):
    """Images to train on and images kept from training, uint8 [B, C, Y, X], and which they are, for the settings."""

    train: "Tensor"
    held_out: "Tensor"
    which: dict[str, str]


def _read_images(arguments: argparse.Namespace) -> Images:
    import torch

    from cfpretrain.data.shards import Shards
    from examples.digits.pixels import read_all_images

    def read(folder: Path, key: str) -> "tuple[Tensor, str]":
        with phase(f"reading the images of {folder}"):
            return read_all_images(folder, key)[0], Shards(folder, key).fingerprint

    train, which = read(arguments.images, "IMAGES")
    if arguments.held_out is None:
        if len(train) < 2:
            raise UserError(f"IMAGES: expected at least 2 images, one of them to be held out, got {len(train)}")
        is_held_out = torch.arange(len(train)) % _HELD_OUT_EVERY == 0
        say(
            f"{int(is_held_out.sum())} of {len(train)} images are held out: every {_HELD_OUT_EVERY}th of "
            f"{arguments.images} from the first on; --held-out gives others"
        )
        which_held_out = f"every {_HELD_OUT_EVERY}th of IMAGES"
        train, held_out = train[~is_held_out], train[is_held_out]
    else:
        held_out, which_held_out = read(arguments.held_out, "--held-out")
        if train.shape[1:] != held_out.shape[1:]:
            raise UserError(
                f"--held-out: expected images of shape {list(train.shape[1:])} as in {arguments.images}, "
                f"got {list(held_out.shape[1:])}; make both shards alike"
            )
    return Images(train, held_out, {"IMAGES": which, "--held-out": which_held_out})


def _settings(arguments: argparse.Namespace, images: Images, network: Any) -> dict[str, Any]:
    """All that the weights depend on, by argument; an autoencoder to go on from by its fingerprint."""
    from cfpretrain.autoencoder import fingerprint

    names = ["num_steps", "batch_size", "learning_rate", "kl_weight", "seed"]
    names += [] if arguments.init else ["channels", "latent_channels"]
    given = {f"--{name.replace('_', '-')}": getattr(arguments, name) for name in names}
    return {**images.which, "--init": fingerprint(network.state_dict()) if arguments.init else None, **given}


def make_network(arguments: argparse.Namespace, image_channels: int, image_size: int) -> Any:
    """An AutoencoderKL with random weights, which follow from the seed."""
    import torch

    from cfpretrain import autoencoder

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
    from cfpretrain import autoencoder

    made = autoencoder.KLAutoencoder.load(folder, "cpu", key="--init")
    if made.image_channels != image_channels:
        raise UserError(
            f"--init: expected an autoencoder of {image_channels} channels, as the images have, got "
            f"{made.image_channels} in {folder}; give another"
        )
    return made.network.requires_grad_(True)


# ---------------------------------------------------------------------------------------------------------------------
# The end


def _finish(training: "Training", images: Images, stop: "StopRequest") -> str:
    """Measures, writes OUT under another name, reads it back, and says its errors; returns what a config needs."""
    from cfpretrain import autoencoder
    from examples.digits.autoencoder_training import PICTURE_FILE, check, evenly, measure_latents
    from examples.digits.reconstruction import reconstruction_error

    network = training.network.half().float()  # what is measured here is what is written
    device, folder = next(network.parameters()).device, training.folder / _MADE
    with phase("measuring the latents"):
        mean, std = measure_latents(network, evenly(images.train, _MOST_MEASURED), training.settings["--seed"], stop)
    network.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=1.0)
    files.remove(folder)
    autoencoder.write_folder(folder, network.half())
    made = autoencoder.KLAutoencoder.load(folder, device, key="OUT")
    say(f"fingerprint {made.fingerprint}")
    for name, some in (("training", images.train), ("held-out", images.held_out)):
        with phase(f"measuring the error of {name} images", announce=False):
            error = reconstruction_error(made, evenly(some, _MOST_MEASURED), device, partial(check, stop))
        say(f"mean squared error of reconstructed {name} images on [-1, 1]: {error:.5f}")
    training.draw(folder / PICTURE_FILE, made)
    for path in folder.iterdir():
        files.flush(path)
    return made.scaling_overrides()


if __name__ == "__main__":
    main()
