"""Shows what a shard folder holds; with --verify, reads all of it.

    python tools/inspect_shards.py data/mnist-latents --grid grid.png --autoencoder configs/autoencoders/digits
    python tools/inspect_shards.py data/mnist-images --autoencoder configs/autoencoders/digits --verify

It ends with the lines of a config that trains on them: on latents, or straight from images.
--verify holds every file against its hash and every sample against its checksum, decodes every image, counts the
classes and the lines of rejected.jsonl, and looks for ids that come twice. Exit code 0: all is well; 2: it is not, and
a line says what and where.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfpretrain.base import files
from cfpretrain.base.command_line import Parser, check_range
from cfpretrain.base.config import DataConfig
from cfpretrain.base.console import (
    Progress,
    UserError,
    address_argument,
    ending_in_one_line,
    one_line,
    path_argument,
    phase,
    printable,
    say,
)
from cfpretrain.evaluation.sampling_options import check_picture

if TYPE_CHECKING:
    from torch import Tensor

    from cfpretrain.autoencoder import KLAutoencoder
    from cfpretrain.data.shards import ImagesInfo, LatentsInfo, Shards

_COLUMNS, _MOST_ROWS = 8, 6
_MOST_NAMES = 10
_MAX_LIST_BYTES = 2**30  # of rejected images


# Named as in the section data of a config.
_CACHE_OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {
    "cache_folder": (address_argument, "for copies of shards from an address"),
    "cache_limit_gb": (float, "the most that they fill; 0 = no limit"),
    "download_patience_seconds": (float, "how long a storage that is away is asked again"),
}


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    parser.add_argument(
        "shards", type=address_argument, help="a folder of image or latent shards, or its address (s3://bucket/folder)"
    )
    parser.add_argument("--verify", action="store_true", help="read everything: hashes, checksums, images, ids")
    parser.add_argument("--grid", type=path_argument, metavar="PNG", help="draw samples from all over the folder")
    parser.add_argument(
        "--autoencoder",
        type=path_argument,
        help="its folder: it decodes latents for --grid, and encodes images during training",
    )
    for name, (kind, text) in _CACHE_OPTIONS.items():
        default = getattr(DataConfig(), name)
        option, shown = f"--{name.replace('_', '-')}", f"{text} (default {default})"
        parser.add_argument(option, type=kind, default=default, metavar=name.rpartition("_")[2].upper(), help=shown)
    arguments = parser.parse_args()
    with ending_in_one_line():
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Prints, draws and verifies, in this order."""
    if arguments.grid is not None:
        check_picture("--grid", arguments.grid)
    check_range("--cache-limit-gb", arguments.cache_limit_gb, 0)
    check_range("--download-patience-seconds", arguments.download_patience_seconds, 0)
    with phase("loading torch and streaming"):
        from cfpretrain.data.cache import Cache
        from cfpretrain.data.shards import Shards
    cache = Cache.of(DataConfig(**{name: getattr(arguments, name) for name in _CACHE_OPTIONS}))
    shards = Shards(arguments.shards, "shards", cache)
    autoencoder = None if arguments.autoencoder is None else _load(shards, arguments.autoencoder)
    _print_description(shards)
    _print_config(shards, autoencoder, arguments.autoencoder)
    if arguments.grid is not None:
        _draw(shards, arguments.grid, autoencoder)
    if arguments.verify:
        _verify(shards)


def _load(shards: "Shards", folder: Path) -> "KLAutoencoder":
    """The autoencoder of latents, where UserError refuses any other, or one for images."""
    from cfpretrain.autoencoder import KLAutoencoder
    from cfpretrain.data.compatibility import check_autoencoder
    from cfpretrain.data.shards import ImagesInfo

    info = shards.info
    if not isinstance(info, ImagesInfo) and info.autoencoder == "identity":
        raise UserError(f"--autoencoder: expected none for shards of pixels, got {folder}; leave it out")
    autoencoder = KLAutoencoder.load(folder, "cpu", key="--autoencoder")
    if not isinstance(info, ImagesInfo):
        check_autoencoder(info, autoencoder.fingerprint, autoencoder.shift, autoencoder.scale, "--autoencoder")
    return autoencoder


def _print_description(shards: "Shards") -> None:
    from cfpretrain.data.images import describe_changes
    from cfpretrain.data.shards import ImagesInfo, columns_of

    info = shards.info
    sizes = shards.shard_sizes
    megabytes = sum(file.num_bytes for file in shards.files) / 1e6
    names = ", ".join(info.class_names[:_MOST_NAMES]) + ", ..." * (len(info.class_names) > _MOST_NAMES)
    lines = {
        "holds": f"{info.kind}, from {info.source}",
        "samples": f"{len(shards):,} in {len(sizes)} shards of {sizes.min()} to {sizes.max()}, {megabytes:,.1f} MB",
        "classes": f"{len(info.class_names)}: {names}",
        "columns": ", ".join(f"{name} {kind}" for name, kind in sorted(columns_of(info).items())),
    }
    if info.most_segments:
        lines["segments"] = f"up to {info.most_segments} texts and images a sample"
    if isinstance(info, ImagesInfo):
        lines["images"] = f"{info.store}, {info.image_size} x {info.image_size} x {info.channels}"
        lines["rejected"] = f"{info.num_rejected}" + ", see rejected.jsonl" * bool(info.num_rejected)
        changes = describe_changes(info.changes, info.background, info.image_size)
        lines |= {"of these" if i == 0 else " " * (i + 1): text for i, text in enumerate(changes)}
    else:
        lines["latents"] = " x ".join(map(str, info.latent_shape)) + f" of {info.image_size} px, crop {info.crop}"
        lines["autoencoder"] = info.autoencoder
        lines["scaling"] = f"(raw - {_short(info.latent_shift)}) * {_short(info.latent_scale)}"
        for name, values in info.statistics.items():
            lines[f"raw {name}"] = _short(values)
    lines["made with"] = ", ".join(f"{name} {version}" for name, version in info.versions.items())
    lines["fingerprint"] = shards.fingerprint
    for name, text in lines.items():
        print(f"{name:>12}: {printable(text)}", flush=True)


def _print_config(shards: "Shards", autoencoder: "KLAutoencoder | None", folder: Path | None) -> None:
    """What a config for these shards must say; images may be trained from as they are."""
    from cfpretrain.data.shards import ImagesInfo

    info, said = shards.info, "a config for them says"
    if isinstance(info, ImagesInfo):
        info = _describe_latents(shards, info, autoencoder)
        said = "to train from these images, without encode_latents.py, a config says"
        if autoencoder is None:
            said += " (of pixels; with --autoencoder: of its latents)"
    print(said, *_config_lines(info, shards.source.address, folder), sep="\n  ", flush=True)


def _describe_latents(shards: "Shards", info: "ImagesInfo", autoencoder: "KLAutoencoder | None") -> "LatentsInfo":
    """Of those that training makes of images; without an autoencoder they are the pixels."""
    import torch

    from cfpretrain.autoencoder import IdentityAutoencoder
    from cfpretrain.core.latents import LatentScaling
    from cfpretrain.data.latent_shards import Encoding

    made_by = autoencoder or IdentityAutoencoder(LatentScaling([0.5] * info.channels, [2.0] * info.channels))
    return Encoding(shards, made_by, torch.device("cpu"), "fp32", batch_size=1, with_mirror=True).describe()


def _config_lines(info: "LatentsInfo", address: str, autoencoder: Path | None) -> list[str]:
    """In YAML; the autoencoder's folder is yet to be filled in where none is given."""
    # Of pixels none, also where the config below names one.
    data: dict[str, Any] = {"shards": address, "autoencoder": ""}
    if info.autoencoder != "identity":
        data["autoencoder"] = str(autoencoder or "FOLDER")
    for name in ("latent_shift", "latent_scale"):
        values = getattr(info, name)
        data[name] = list(values[:1] if len(set(values)) == 1 else values)
    if info.has_posterior and not info.has_mirror:
        data["mirror_prob"] = 0.0
    channels, rows, _ = info.latent_shape
    model = {"latent_size": rows, "latent_channels": channels, "num_classes": len(info.class_names)}
    if info.most_segments:
        model["max_segments"] = max(2, info.most_segments)
    return [f"{section}: {json.dumps(values)}" for section, values in (("model", model), ("data", data))]


def _short(values: Any) -> str:
    numbers = [f"{value:.4g}" for value in values]
    return numbers[0] if len(set(numbers)) == 1 else "[" + ", ".join(numbers) + "]"


# ---------------------------------------------------------------------------------------------------------------------
# A look at some


def _draw(shards: "Shards", path: Path, autoencoder: "KLAutoencoder | None") -> None:
    import numpy as np
    import torch

    from cfpretrain.evaluation import pictures

    columns = min(_COLUMNS, len(shards))
    num_rows = min(_MOST_ROWS, len(shards) // columns)
    places = np.linspace(0, len(shards) - 1, num_rows * columns).round().astype(int).tolist()
    with phase(f"drawing {path}", announce=False):
        samples = [shards.sample(place) for place in places]
        images, note = _look_at(shards, samples, autoencoder)
        names = shards.info.class_names
        captions = [sample["caption"] or _texts(sample) or names[sample["label"]] for sample in samples]
        first = ", of each the first image" if shards.info.most_segments else ""
        title = f"{shards.source.address}: {len(shards):,} samples\n{len(places)} from all over it{first}{note}"
        cell = max(64, images.shape[-1] if images.shape[-1] <= 128 else 128)
        if images.shape[-1] > cell:
            images = torch.nn.functional.interpolate(images, (cell, cell), mode="area")
        try:
            files.make_folder(path.parent, follow=True)
            files.remove_leftovers(path.parent.resolve(), path.name)
            pictures.sample_grid(path, images, [""] * num_rows, title, (0.0, 1.0), cell, captions)
        except OSError as error:
            raise UserError(f"--grid: {path} cannot be written ({error.strerror or error}); give another") from error
    say(f"see {path}")


def _texts(sample: dict[str, Any]) -> str:
    """Of an interleaved sample, images as #."""
    from cfpretrain.data.interleaved import parse_column

    segments = parse_column(sample["segments"]) if "segments" in sample else ()
    return " ".join("#" if one is None else one for one in segments)


def _look_at(
    shards: "Shards", samples: list[dict[str, Any]], autoencoder: "KLAutoencoder | None"
) -> "tuple[Tensor, str]":
    """The first images of samples, 0 black and 1 white, and what the title must say of them."""
    import numpy as np
    import torch

    from cfpretrain.autoencoder import IdentityAutoencoder
    from cfpretrain.core.latents import LatentScaling
    from cfpretrain.data.images import centre_crop, read_image
    from cfpretrain.data.interleaved import files_of
    from cfpretrain.data.shards import ImagesInfo
    from cfpretrain.evaluation.pictures import false_colours

    info = shards.info
    if isinstance(info, ImagesInfo):
        images = [read_image(files_of(sample)[0], info.channels == 1) for sample in samples]
        crops = [centre_crop(image, info.image_size) for image in images]
        pixels_BYXC = torch.from_numpy(np.stack([np.asarray(crop) for crop in crops]))
        return pixels_BYXC.reshape(*pixels_BYXC.shape[:3], -1).permute(0, 3, 1, 2).float() / 255, ""
    scaling = LatentScaling(info.latent_shift, info.latent_scale)
    firsts = [sample["mean"].reshape(-1, *info.latent_shape)[0] for sample in samples]
    latents_BCYX = scaling.to_model(torch.from_numpy(np.stack(firsts)))
    if info.autoencoder == "identity":
        return IdentityAutoencoder(scaling).decode(latents_BCYX), ""
    if autoencoder is None:
        return false_colours(latents_BCYX), ", latents in false colours (give --autoencoder)"
    return autoencoder.decode(latents_BCYX), ", decoded"


# ---------------------------------------------------------------------------------------------------------------------
# All of it


def _verify(shards: "Shards") -> None:
    import numpy as np

    ids = np.empty(len(shards), np.int64)
    labels: Counter[int] = Counter()
    done = 0
    progress = Progress(len(shards), 0, "sample")
    for number, file in enumerate(shards.files):
        name = f"{shards.source.address}/{file.name}"
        with shards.source.open(file) as opened:
            _verify_file(opened, name, file.digest)
        for sample in shards.shard(number):
            problem = _problem(sample, shards)
            if problem is not None:
                raise UserError(f"shards: {name}: sample {sample['id']} {problem}; write the folder again")
            ids[done] = sample["id"]
            labels[int(sample["label"])] += 1
            done += 1
            progress.show(done)
    progress.close()
    _verify_rejected(shards)
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) != len(ids):
        twice = unique[counts > 1][0]
        raise UserError(f"shards: {shards.source.address}: id {twice} comes twice; write the folder again")
    of_classes = [labels[i] for i in range(len(shards.info.class_names))]
    say(
        f"verified: {len(shards.files)} files, {done:,} samples, every hash and checksum right, ids unique, "
        f"{min(of_classes)} to {max(of_classes)} samples a class"
    )


def _verify_file(opened: FileIO, name: str, digest: str) -> None:
    import hashlib

    from cfpretrain.data.shards import HASH

    found = hashlib.file_digest(opened, HASH).hexdigest()
    if found != digest:
        raise UserError(
            f"shards: {name}: expected the {HASH} hash {digest[:16]}... of the index, got {found[:16]}...; copy the "
            "file from where it is whole, or write the folder again"
        )


def _verify_rejected(shards: "Shards") -> None:
    from cfpretrain.data.image_shards import REJECTED_FILE

    source = shards.source
    expected, found = getattr(shards.info, "num_rejected", 0), 0
    if not expected:
        return
    try:
        with source.opened(REJECTED_FILE, _MAX_LIST_BYTES) as lines:  # one for each image
            for line in lines:
                image = files.parse_json(line)
                if not isinstance(image, dict) or not image.keys() >= {"id", "path", "reason"}:
                    raise ValueError(f"expected id, path and reason of an image, got {line!r:.80}")
                found += 1
        problem = f"got {found}"
    except (OSError, ValueError) as error:
        found, problem = -1, f"but it cannot be read ({one_line(error):.200})"
    if found != expected:
        raise UserError(
            f"shards: {source.address}/{REJECTED_FILE}: expected {expected} images, as the description says, "
            f"{problem}; copy it from where it is whole, or write the folder again"
        )


def _problem(sample: dict[str, Any], shards: "Shards") -> str | None:
    """What is wrong with a sample that is as it was written."""
    import numpy as np

    from cfpretrain.data.images import RejectedImageError, read_image
    from cfpretrain.data.interleaved import files_of
    from cfpretrain.data.shards import ImagesInfo

    info = shards.info
    if not isinstance(info, ImagesInfo):
        arrays = [value for value in sample.values() if isinstance(value, np.ndarray)]
        return None if all(np.isfinite(array).all() for array in arrays) else "is not finite"
    expected = (info.image_size, info.image_size)
    for file in files_of(sample):
        try:
            size = read_image(file, info.channels == 1).size
        except RejectedImageError as error:
            return f"does not decode ({error})"
        if info.store == "lossless" and size != expected:
            return f"is {size[0]} x {size[1]}, not {expected[0]}"
    return None


if __name__ == "__main__":
    main()
