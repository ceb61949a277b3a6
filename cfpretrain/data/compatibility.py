"""Do shards fit a config, each other, and an autoencoder?"""

import math
from collections.abc import Iterable, Sequence

from cfpretrain.autoencoder import are_pixels
from cfpretrain.base.config import Config
from cfpretrain.base.console import UserError
from cfpretrain.data.shards import LatentsInfo


def check_infos(infos: Sequence[LatentsInfo], config: Config) -> None:
    """Refuses latents that the config does not describe, naming every problem at once.

    Args:
        infos: of the folders `config.data.shards`, in that order; of images, what they become.
        config: its sections model, data and train count.
    """
    first = infos[0]
    problems = [*_check_latents(first, config), *_check_counts(infos, config)]
    problems += _check_interleaved(infos, config)
    for address, info in zip(config.data.shards[1:], infos[1:], strict=True):
        problems += _check_alike(first, info, address, config)
    if problems:
        raise UserError(f"shards {', '.join(config.data.shards)} do not fit the config: {' | '.join(problems)}")


def _check_latents(info: LatentsInfo, config: Config) -> Iterable[str]:
    model = config.model
    channels, rows, columns = info.latent_shape
    if rows != columns:
        yield f"data.shards: expected latents of as many rows as columns, got {rows} x {columns}; crop the images"
    elif rows != model.latent_size:
        yield f"model.latent_size: expected {rows}, the rows of the latents, got {model.latent_size}"
    if config.data.mirror_prob > 0 and info.has_posterior and not info.has_mirror:
        yield (
            f"data.mirror_prob: expected 0, since the shards hold no mirrored images, got {config.data.mirror_prob:g}; "
            "encode them again without --no-mirror, or set it to 0"
        )
    if config.data.crop == "random" and info.crop != "random":
        yield (
            "data.crop: expected adm, since the shards hold latents, of images that were cropped before, got random; "
            "set it so, or give image shards"
        )
    if config.data.autoencoder and info.autoencoder == "identity":
        yield f"data.autoencoder: expected none for shards of pixels, got {config.data.autoencoder}; leave it out"
    if info.autoencoder != "identity" and are_pixels(channels) and not config.data.autoencoder:
        yield (
            f"data.autoencoder: expected the folder of the one that made these latents of {channels} channels, which "
            "would be taken for pixels, got none; set it"
        )
    if channels != model.latent_channels:
        yield f"model.latent_channels: expected {channels}, those of the latents, got {model.latent_channels}"
        return
    for name in ("latent_shift", "latent_scale"):
        recorded, given = getattr(info, name), getattr(config.data, name)
        full = given * channels if len(given) == 1 else given
        if not all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(recorded, full, strict=True)):
            values = list(recorded[:1] if len(set(recorded)) == 1 else recorded)
            yield f"data.{name}: expected {values}, as the autoencoder says, got {list(given)}; set it so"


def _check_counts(infos: Sequence[LatentsInfo], config: Config) -> Iterable[str]:
    num_classes, batch = len(infos[0].class_names), config.train.global_batch_size
    num_samples = sum(samples_an_epoch([info.num_samples for info in infos], config.data.repeat))
    if config.model.num_classes not in (0, num_classes):
        yield f"model.num_classes: expected {num_classes}, the classes in the shards, got {config.model.num_classes}"
    if num_samples < batch:
        yield f"train.global_batch_size: expected at most {num_samples}, the samples of an epoch, got {batch}"
    if num_samples < config.data.num_canonical_nodes:
        yield (
            f"data.num_canonical_nodes: expected at most {num_samples}, the samples of an epoch, "
            f"got {config.data.num_canonical_nodes}"
        )


def _check_interleaved(infos: Sequence[LatentsInfo], config: Config) -> Iterable[str]:
    if not config.data.tasks.interleaved:
        return
    lacking = [address for address, info in zip(config.data.shards, infos, strict=True) if not info.most_segments]
    if lacking:
        yield (
            f"data.tasks.interleaved: expected 0 for shards without segments, got {config.data.tasks.interleaved:g} "
            f"for {', '.join(lacking)}; set it so, or make shards of a table with the column segments"
        )
    most = max(info.most_segments for info in infos)
    if most > config.model.max_segments:
        yield (
            f"model.max_segments: expected at least {most}, the texts and images of a sample in the shards, got "
            f"{config.model.max_segments}; set it so"
        )


def _check_alike(first: LatentsInfo, info: LatentsInfo, address: str, config: Config) -> Iterable[str]:
    may_differ = ["num_samples", "source", "statistics", "versions", "most_segments"]
    may_differ += ["class_names"] * (not config.model.num_classes)
    if bool(first.most_segments) != bool(info.most_segments):
        yield (
            f"data.shards: {address}: expected interleaved samples in all folders or in none; a caption and an image "
            'are one, too: write ["a caption", {"image": "a.png"}] as segments'
        )
    for name, expected in vars(first).items():
        got = getattr(info, name)
        if expected != got and name not in may_differ:
            yield f"data.shards: {address}: expected {name} as in the first folder, {expected!r:.80}, got {got!r:.80}"


def check_autoencoder(
    info: LatentsInfo, fingerprint: str, shift: Sequence[float], scale: Sequence[float], key: str
) -> None:
    """Refuses an autoencoder that did not make the latents, or scales them otherwise: it would decode them wrongly.

    It is known by its fingerprint, shift and scale; `key` is the config key or option that gave it.
    """
    for name, expected, got in (
        ("fingerprint", info.autoencoder, fingerprint),
        ("shift", info.latent_shift, tuple(shift)),
        ("scale", info.latent_scale, tuple(scale)),
    ):
        if expected != got:
            raise UserError(
                f"{key}: expected the autoencoder that made the latents, of {name} {expected}, got {got}; give that "
                "one, or encode the images with this one"
            )


def samples_an_epoch(num_samples: Sequence[int], repeat: Sequence[float]) -> list[int]:
    """How many samples of each folder an epoch has: `repeat` times those it holds (one value, or one a folder)."""
    full = tuple(repeat) * len(num_samples) if len(repeat) == 1 else repeat
    return [round(count * times) for count, times in zip(num_samples, full, strict=True)]
