"""The tensors of a checkpoint that leaves, one by one."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from cfpretrain.base.console import UserError
from cfpretrain.run import tensor_files
from cfpretrain.run.checkpoint import open_tensors, tensor_file
from cfpretrain.run.tensor_files import HashedRange, Header, remedy


@dataclass(frozen=True)
class CheckpointTensors:
    """The tensors of one file of a checkpoint, each byte of which is held against its hash when it is read."""

    file: Path  # safetensors, fp32
    header: Header  # where they lie
    ranges: Mapping[str, Sequence[HashedRange]]  # hashes of each tensor's values

    @classmethod
    def open(cls, checkpoint: Path, content: Literal["ema", "weights"], step: int) -> "CheckpointTensors":
        """Reads where the tensors lie; UserError where the file or its hashes are missing or damaged."""
        file = tensor_file(checkpoint, content)
        try:
            _, header, ranges = open_tensors(checkpoint, step, [content])[content]
        except OSError as error:
            raise _unreadable(file, error) from error
        by_name: dict[str, list[HashedRange]] = {name: [] for name in header.shapes}
        for place in ranges:
            by_name[place.name].append(place)
        return cls(file, header, by_name)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By name."""
        return self.header.shapes

    def read(self, name: str) -> Tensor:
        """One tensor, fp32; UserError where it is not what was written."""
        alone = dataclasses.replace(self.header, shapes={name: self.header.shapes[name]})
        try:
            return tensor_files.read_whole(self.file, alone, self.ranges[name])[name]
        except OSError as error:
            raise _unreadable(self.file, error) from error


def _unreadable(file: Path, error: OSError) -> UserError:
    return UserError(f"{error.filename or file} cannot be read: {error.strerror or error}; {remedy(file)}")
