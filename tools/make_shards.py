"""Writes shard folders for training and evaluation.

python tools/make_shards.py --source digits --out data/digits --held-out data/digits-held-out
"""

import argparse
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from cfpretrain.console import UserError, exit_with, phase, say

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from cfpretrain.data.shards import ShardInfo

_HELD_OUT_SHARE = 297 / 1797  # leaves 1,500 of the digits for training


def main() -> None:
    """Parses the command line and writes what it asks for."""
    parser = argparse.ArgumentParser(description="Write shard folders for training and evaluation.")
    parser.add_argument("--source", choices=sorted(_SOURCES), required=True, help="digits: 1797 real 8x8 digits")
    parser.add_argument("--out", type=Path, required=True, help="folder for the training samples")
    parser.add_argument("--held-out", type=Path, help="folder for the samples kept from training")
    args = parser.parse_args()
    try:
        if args.held_out is not None and args.held_out.resolve() == args.out.resolve():
            raise UserError(f"--held-out: expected another folder than --out, got {args.held_out} for both")
        _SOURCES[args.source](args.out, args.held_out)
    except UserError as error:
        exit_with(error)


def make_digits(out: Path, held_out: Path | None) -> None:
    """Writes scikit-learn's digits: pixels / 16 in [0, 1]; a sample's id is its index in `load_digits`."""
    with phase("reading scikit-learn's digits"):
        from sklearn.datasets import load_digits

        pixels_BYX, labels_B = load_digits(return_X_y=True)
        pixels_BYX = pixels_BYX.reshape(-1, 8, 8)
        held_out_ids = split(labels_B)
    train_ids = sorted(set(range(len(labels_B))) - set(held_out_ids))
    for folder, ids, part in ((out, train_ids, "training part"), (held_out, held_out_ids, "held-out part")):
        if folder is not None:
            samples = ((i, pixels_BYX[i][None] / 16, int(labels_B[i])) for i in ids)
            _write(folder, len(ids), f"scikit-learn load_digits, {part}", samples)


def split(labels_B: "NDArray[np.int64]") -> list[int]:
    """The indices to hold out: the same share of every class, picked by a hash of the index."""
    held_out: list[int] = []
    for label in sorted(set(labels_B.tolist())):
        members = [i for i, own in enumerate(labels_B.tolist()) if own == label]
        members.sort(key=lambda i: hashlib.blake2b(f"held-out/{i}".encode()).digest())
        held_out += members[: round(len(members) * _HELD_OUT_SHARE)]
    return sorted(held_out)


def _write(folder: Path, num_samples: int, source: str, samples: "Iterable[tuple[int, ArrayLike, int]]") -> None:
    with phase(f"writing {folder}"):
        from cfpretrain.data.shards import ShardInfo, write_shards

        info = ShardInfo(
            autoencoder="identity",
            latent_shape=(1, 8, 8),
            latent_shift=(0.5,),
            latent_scale=(2.0,),
            class_names=tuple(map(str, range(10))),
            num_samples=num_samples,
            source=source,
        )
        written = write_shards(folder, info, samples)
    say(f"{folder}: {'' if written else 'already there: '}{_describe(folder, info)}")


def _describe(folder: Path, info: "ShardInfo") -> str:
    shape = " x ".join(map(str, info.latent_shape))
    megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    return f"{info.num_samples} samples of {len(info.class_names)} classes, {shape}, {megabytes:.2f} MB ({info.source})"


_SOURCES: dict[str, Callable[[Path, Path | None], None]] = {"digits": make_digits}


if __name__ == "__main__":
    main()
