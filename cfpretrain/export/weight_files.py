"""Weights as Hugging Face's libraries store them: STEM.safetensors, or several such files and an index of them."""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from cfpretrain.base import files
from cfpretrain.base.console import UserError, say
from cfpretrain.base.files import read_json
from cfpretrain.base.typed import from_plain
from cfpretrain.export import foreign_files
from cfpretrain.run import tensor_files
from cfpretrain.run.tensor_files import Shapes

_NAMES_OF_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_WEIGHTS_FILE = re.compile(r"[\w-][\w.-]*\.safetensors")


class WeightsIndex(TypedDict):
    """Which file holds which tensor, where there are several."""

    metadata: dict[str, Any]
    weight_map: dict[str, str]


def write_weights(
    folder: Path,
    stem: str,
    shapes: Shapes,
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    """Writes tensors into a folder, in the order of their names, one in memory at a time.

    Args:
        read: gives a tensor of `shapes` by its name.
        dtype: of the files: fp32, bf16 or fp16.
        max_shard_bytes: a file is no larger, unless one tensor is.
    """
    shards = _plan_shards(stem, shapes, dtype.itemsize, max_shard_bytes)
    for number, (file_name, names) in enumerate(shards.items(), start=1):
        say(f"writing weights, file {number} of {len(shards)}")
        with files.create(folder / file_name) as file:
            of_file = {name: shapes[name] for name in names}
            header = tensor_files.encode_header(of_file, {"format": "pt"}, _NAMES_OF_DTYPES[dtype], dtype.itemsize)
            file.write(header)
            for name in names:
                values = read(name)
                for chunk in values.flatten().split(tensor_files.CHUNK_VALUES):
                    file.write(tensor_files.bytes_of(chunk.to(dtype).view(torch.uint8)))
                del values  # before the next one is read
    if len(shards) > 1:
        weight_map = {name: file_name for file_name, names in shards.items() for name in names}
        size = dtype.itemsize * sum(map(math.prod, shapes.values()))
        index: WeightsIndex = {"metadata": {"total_size": size}, "weight_map": weight_map}
        files.replace(folder / f"{stem}.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _plan_shards(stem: str, shapes: Shapes, value_bytes: int, max_shard_bytes: int) -> dict[str, list[str]]:
    """Which tensors lie in which file, in the order of their names; as diffusers and transformers name files."""
    shards: list[list[str]] = [[]]
    num_bytes = 0
    for name in sorted(shapes):
        size = value_bytes * math.prod(shapes[name])
        if shards[-1] and num_bytes + size > max_shard_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(name)
        num_bytes += size
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {
        f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors": names for number, names in enumerate(shards, start=1)
    }


def read_weights(folder: Path, stem: str, name: str, fix: str) -> Mapping[str, Tensor]:
    """The tensors of a folder by their names, which come into memory when they are used.

    Args:
        name: argument that gave the folder, for messages.
        fix: what to do about a damaged one, for messages.
    """
    whole = f"{stem}.safetensors"
    index = folder / f"{whole}.index.json"
    names = {whole}
    if os.path.lexists(index):
        names = set(read_json_as(WeightsIndex, index, fix)["weight_map"].values())
    for one in names:
        if not _WEIGHTS_FILE.fullmatch(one):
            raise UserError(f"{index}: expected names of .safetensors files beside it, got {one!r:.80}; {fix}")
    return {key: values for one in sorted(names) for key, values in foreign_files.read(folder / one, name).items()}


def read_json_as(kind: Any, path: Path, fix: str) -> Any:
    """What a JSON file holds, as a value of a type; `fix` says what to do about a damaged one."""
    try:
        return from_plain(kind, read_json(path), str(path), ignore_unknown=True)
    except UserError as error:
        raise UserError(f"{error}; {fix}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); {fix}") from error
