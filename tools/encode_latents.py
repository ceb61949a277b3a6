"""Encodes image shards with an autoencoder: writes the latent shards that training reads.

    python tools/encode_latents.py data/images --autoencoder autoencoders/kl16 --out data/latents
    deepspeed tools/encode_latents.py data/images --autoencoder autoencoders/kl16 --out data/latents

The second command takes every GPU. Killed at any moment, the same command goes on, with any number of ranks; the bytes
that it writes depend on neither. Exit code 2: a mistake; 75: it was asked to stop, or lost a rank.
"""

import argparse
import os
from typing import TYPE_CHECKING, Any

from cfpretrain.base.command_line import Parser, add_local_rank, check_range, run_on_ranks
from cfpretrain.base.console import (
    Progress,
    UserError,
    address_argument,
    count,
    path_argument,
    phase,
    say,
)

if TYPE_CHECKING:
    from cfpretrain.data.latent_shards import Encoding
    from cfpretrain.data.shard_writer import ShardWriter

_PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    parser.add_argument("images", type=address_argument, help="a folder of image shards, as make_shards.py writes them")
    parser.add_argument(
        "--autoencoder",
        type=address_argument,
        required=True,
        help="a folder in diffusers' layout; or identity: latents are pixels",
    )
    parser.add_argument("--out", type=path_argument, required=True, help="folder for the latent shards")
    parser.add_argument(
        "--batch-size", type=int, default=32, help="images encoded at once, by a GPU or a core (default 32)"
    )
    parser.add_argument("--no-mirror", action="store_true", help="leave mirrored images out, as digits and text need")
    parser.add_argument(
        "--precision", choices=_PRECISIONS, default="fp32", help="of the autoencoder on a GPU (default fp32)"
    )
    add_local_rank(parser)
    run_on_ranks(run, parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    """Encodes on all ranks; rank 0 begins and finishes the folder."""
    check_range("--batch-size", arguments.batch_size, 1, 4096)
    with phase("loading torch and streaming"):
        from cfpretrain.base import runtime
    device = runtime.pick_device()
    with runtime.ranks_of_a_tool(device):
        with runtime.together():
            encoding, writer = _prepare(arguments, device)
        _work(encoding, writer)


def _prepare(arguments: argparse.Namespace, device: Any) -> "tuple[Encoding, ShardWriter]":
    import torch

    from cfpretrain.autoencoder import IdentityAutoencoder, KLAutoencoder
    from cfpretrain.core.latents import LatentScaling
    from cfpretrain.data.latent_shards import Encoding
    from cfpretrain.data.shard_writer import ShardWriter
    from cfpretrain.data.shards import Shards, read_images_info

    info = read_images_info(arguments.images, "IMAGES")
    if os.path.realpath(arguments.out) == os.path.realpath(arguments.images):
        raise UserError(f"--out: expected another folder than IMAGES, got {arguments.out} for both; choose another")
    if device.type == "cpu" and arguments.precision != "fp32":
        raise UserError(f"--precision: expected fp32 without a GPU, got {arguments.precision}; leave the option out")
    autoencoder: IdentityAutoencoder | KLAutoencoder
    if arguments.autoencoder == "identity":
        autoencoder = IdentityAutoencoder(LatentScaling([0.5] * info.channels, [2.0] * info.channels))
    else:
        with phase("loading the autoencoder"):
            dtype = getattr(torch, _PRECISIONS[arguments.precision])
            autoencoder = KLAutoencoder.load(arguments.autoencoder, device, dtype, key="--autoencoder")
    encoding = Encoding(
        images=Shards(arguments.images, "IMAGES"),
        autoencoder=autoencoder,
        device=device,
        precision=arguments.precision,
        batch_size=arguments.batch_size,
        with_mirror=not arguments.no_mirror,
    )
    return encoding, ShardWriter(arguments.out, encoding.columns, encoding.plan())


def _work(encoding: "Encoding", writer: "ShardWriter") -> None:
    from cfpretrain.base import runtime
    from cfpretrain.data.latent_shards import encode

    with runtime.together():
        missing = _begin(encoding, writer) if runtime.rank() == 0 else None
    missing = runtime.gather(missing)[0]
    if missing is None:
        return
    sizes = encoding.images.shard_sizes
    done_before = int(sizes.sum() - sizes[missing].sum())
    progress = Progress(int(sizes.sum()), done_before, "image")
    try:
        with runtime.Exchange(lambda num_done: progress.show(done_before + num_done)) as exchange:
            mine = missing[runtime.rank() :: runtime.world_size()]
            encode(encoding, writer, mine, runtime.num_cores(), exchange.add)
    finally:
        progress.close()
    with runtime.together():
        if runtime.rank() == 0:
            info = encoding.describe(writer.records(len(sizes)))
            writer.finish(info, len(sizes))
            shape = " x ".join(map(str, info.latent_shape))
            say(
                f"{writer.folder}: {info.num_samples} latents of {count(len(info.class_names), 'class', 'classes')}, "
                f"{shape} ({info.source})"
            )


def _begin(encoding: "Encoding", writer: "ShardWriter") -> list[int] | None:
    """The shards that are missing; None where the folder is there already."""
    info = encoding.info
    if writer.is_complete():
        say(f"{writer.folder}: already there: latents of {info.num_samples} images")
        return None
    writer.begin()
    num_shards = len(encoding.images.shard_sizes)
    missing = writer.missing(num_shards)
    size, there = info.image_size, num_shards - len(missing)
    begun = f"; {there} of {num_shards} shards are there already" if there else ""
    kind = "interleaved samples of images" if info.most_segments else "images"
    say(f"encoding {info.num_samples} {kind} of {size} x {size} pixels ({info.source}){begun}")
    return missing


if __name__ == "__main__":
    main()
