"""The door to files of tensors that others write: pickles (.pt, .pth, .bin, .ckpt) and safetensors, read as data.

A pickle is a program. Torch's restricted reader follows it as far as it makes tensors, numbers, texts and containers;
the classes that a caller names come as `Placeholder`s, and their own code is neither looked up nor run. Whatever else a
file asks for, it is refused.
"""

import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from cfpretrain.base import files
from cfpretrain.base.console import UserError
from cfpretrain.base.files import check_safetensors
from cfpretrain.base.outputs import whole_or_nothing


class Placeholder:
    """An object of a class that was not looked up: what it was made of, and its attributes as the file says them."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


def read(file: Path, name: str, placeholders: Sequence[str] = ()) -> Mapping[Any, Any]:
    """What a .safetensors file holds, or one that `torch.save` wrote. Its tensors come into memory when they are used.

    Args:
        file: the file.
        name: argument or option that gave it, for messages.
        placeholders: full names of the classes that it may have objects of.
    """
    if not file.is_file():
        found = "is a folder" if file.is_dir() else "is no file" if file.exists() else "is not there"
        raise UserError(f"{name}: expected a file of tensors (.pt or .safetensors), got {file}, which {found}")
    try:
        content = _read(file, placeholders)
    except OSError as error:
        raise UserError(f"{name}: {file} cannot be read ({error.strerror or error}); make it readable") from error
    except Exception as error:  # a foreign file can break the reader in any way
        raise UserError(f"{name}: {_reason(file, error)}") from error
    unfit = _find_unfit(content)
    if unfit is not None:
        raise UserError(
            f"{name}: expected plain tensors in {file}, with a value for each place, got one of shape "
            f"{list(unfit.shape)}, {unfit.layout}, on {unfit.device}; get it again"
        )
    if not isinstance(content, Mapping):
        raise UserError(f"{name}: expected tensors by name in {file}, got {type(content).__name__}; give a checkpoint")
    return content


def check_finite(values: Tensor, what: str) -> None:
    """UserError where a tensor holds NaN or infinities, which training and sampling would only spread."""
    num_wrong = values.numel() - int(torch.isfinite(values).sum())
    if num_wrong:
        raise UserError(
            f"{what}: expected finite numbers, got NaN or infinity in {num_wrong:,} of {values.numel():,} values; take "
            "an earlier checkpoint of that training"
        )


def _read(file: Path, placeholders: Sequence[str]) -> Any:
    if file.suffix.lower() == ".safetensors":
        check_safetensors(file)
        return load_file(file)
    allowed: Any = [(Placeholder, name) for name in placeholders]
    with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
        warnings.simplefilter("ignore")  # what the reader warns of it then refuses
        # Only archives can be mapped; before torch 1.6 files were none.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))


def _find_unfit(content: Any) -> Tensor | None:
    """A tensor that stands for more values than it holds: a copy of it would take the memory that it only declares."""
    left, seen = [content], set()
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            if value.layout is not torch.strided or value.device.type != "cpu":
                return value
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                return value
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            left += value.values() if isinstance(value, Mapping) else value
    return None


def _reason(file: Path, error: Exception) -> str:
    asked_for = re.search(r"GLOBAL (\S+)", str(error))
    if asked_for is None:
        # Torch wraps the reason in the advice to read the file without the restricted reader.
        reason = str(error).rpartition("WeightsUnpickler error:")[2].partition("\n\nCheck the documentation")[0]
        reason = " ".join(reason.split()) or repr(error)
        return (
            f"{file} is no file of tensors, or a damaged one, or a bare pickle, which could run code ({reason:.120}); "
            "get it again, as torch.save writes it or as .safetensors"
        )
    return (
        f"expected nothing but tensors, numbers and texts in {file}, got {asked_for[1]}, which could run code, and is "
        "refused; take the same weights as .safetensors"
    )


def write(file: Path, content: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Writes tensors by name, under some keys, as `torch.save` does: the file is there whole or not at all."""
    with whole_or_nothing(file, "OUT") as unfinished, files.create(unfinished) as opened:
        try:
            torch.save({key: dict(tensors) for key, tensors in content.items()}, opened)
        except RuntimeError as error:
            # Torch's writer of archives raises one of its own over what the disk says.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
