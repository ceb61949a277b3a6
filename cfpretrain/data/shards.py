"""Shard folders: MosaicML's MDS files plus `cfpretrain.json`, which says what the numbers in them mean.

Columns of a sample: `id` (int64, unique in its source and stable), `label` (int32, index into the class names) and
`latent` (float16 [C, Y, X], raw: neither shifted nor scaled). The folder records the shift and the scale under which
the model sees its latents, (raw - shift) * scale; they are applied in model/autoencoder.py and nowhere else.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
import uuid
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from streaming import MDSWriter
from streaming.base.format.mds import MDSReader
from torch import Tensor

from cfpretrain.config import Config
from cfpretrain.console import UserError

SCHEMA_VERSION = 1

_INFO_FILE = "cfpretrain.json"
_INDEX_FILE = "index.json"
_SHARD_BYTES = 1 << 26
_HASH = "blake2b"  # of every shard file, kept in the index


@dataclass(frozen=True)
class ShardInfo:
    """What a shard folder holds."""

    autoencoder: str  # "identity": latents are pixels; else the fingerprint of the autoencoder's weights
    latent_shape: tuple[int, int, int]  # channels, rows, columns
    latent_shift: tuple[float, ...]  # one a channel
    latent_scale: tuple[float, ...]  # one a channel
    class_names: tuple[str, ...]
    num_samples: int
    source: str  # where the samples came from, for people
    schema_version: int = SCHEMA_VERSION


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_shards(folder: str | Path, info: ShardInfo, samples: Iterable[tuple[int, ArrayLike, int]]) -> bool:
    """Writes a shard folder, all of it or nothing.

    Files are written to a hidden folder beside `folder`, which takes the final name once everything is on disk. A
    killed write leaves at most that hidden folder, `.NAME.writing-*`, which may be deleted.

    Args:
        folder: must be empty or not exist, unless it is complete and of the same `info`.
        info: what is written.
        samples: (id, latent [C, Y, X] of finite numbers, label) of each sample.

    Returns:
        True if it was written, False if it was already there; `samples` is then not read.

    Raises:
        UserError: the folder holds something else, or a sample does not fit `info`.
    """
    final = Path(folder)
    if _holds_something(final):
        _refuse_other_content(final, info)
        return False
    unfinished = final.parent / f".{final.name}.writing-{uuid.uuid4().hex[:8]}"
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"folder {final} cannot be written ({error.strerror}); choose another place") from error
    try:
        _write_samples(unfinished, info, samples)
        (unfinished / _INFO_FILE).write_text(json.dumps(dataclasses.asdict(info), indent=2) + "\n")
        _sync(unfinished)
        os.rename(unfinished, final)
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    _sync_file(final.parent)
    return True


def _write_samples(folder: Path, info: ShardInfo, samples: Iterable[tuple[int, ArrayLike, int]]) -> None:
    shape = ",".join(map(str, info.latent_shape))
    writer = MDSWriter(
        columns={"id": "int64", "label": "int32", "latent": f"ndarray:float16:{shape}"},
        out=str(folder),
        hashes=[_HASH],
        size_limit=_SHARD_BYTES,
    )
    ids = array("q")
    try:
        for sample_id, latent, label in samples:
            writer.write({"id": sample_id, "label": label, "latent": _checked_latent(info, sample_id, latent, label)})
            ids.append(sample_id)
        _check_ids(np.frombuffer(ids, np.int64), info)
    except BaseException:
        # Leaving through the writer's own context manager would finish the index of half a data set.
        writer.cancel_future_jobs()
        raise
    writer.finish()


def _checked_latent(info: ShardInfo, sample_id: int, latent: ArrayLike, label: int) -> NDArray[np.float16]:
    raw = np.asarray(latent, np.float32)
    if raw.shape != info.latent_shape:
        raise UserError(f"sample {sample_id}: expected a latent of shape {info.latent_shape}, got {raw.shape}")
    if not 0 <= label < len(info.class_names):
        raise UserError(f"sample {sample_id}: expected a label from 0 to {len(info.class_names) - 1}, got {label}")
    with np.errstate(over="ignore"):
        stored = raw.astype(np.float16)
    if not np.isfinite(stored).all():
        raise UserError(f"sample {sample_id}: expected numbers that float16 can hold, got {raw.min():g}..{raw.max():g}")
    return stored


def _check_ids(ids: NDArray[np.int64], info: ShardInfo) -> None:
    if len(ids) != info.num_samples or not len(ids):
        raise UserError(f"source {info.source!r}: expected {info.num_samples or 'some'} samples, got {len(ids)}")
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) != len(ids):
        raise UserError(f"source {info.source!r}: expected unique sample ids, got {unique[counts > 1][0]} twice")


def _holds_something(folder: Path) -> bool:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give the name of a folder to write shards to")
    return folder.is_dir() and any(folder.iterdir())


def _refuse_other_content(folder: Path, info: ShardInfo) -> None:
    """Raises UserError unless `folder` is a complete shard folder of the same info."""
    advice = "delete it or choose another folder"
    try:
        there = Shards(folder, key=str(folder)).info
    except UserError as error:
        raise UserError(f"folder {folder} is not empty and holds no complete shards ({error}); {advice}") from error
    different = [f.name for f in dataclasses.fields(info) if getattr(there, f.name) != getattr(info, f.name)]
    if different:
        raise UserError(f"folder {folder} holds other shards already (different: {', '.join(different)}); {advice}")


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        _sync_file(path)
    _sync_file(folder)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_info(folder: str | Path, key: str = "data.shards") -> ShardInfo:
    """Reads what a shard folder says of itself.

    Args:
        folder: a folder written by `write_shards`.
        key: config key that gave it, for the message.

    Raises:
        UserError: the folder is missing, empty or not one of ours, or its description cannot be read.
    """
    path = Path(folder)
    make = f"make shards with: python tools/make_shards.py --source digits --out {folder}"
    expected = f"{key}: expected a folder of shards"
    if "://" in str(folder):
        raise UserError(f"{expected} on this machine, got the address {folder}; copy the shards here first")
    if not path.is_dir():
        raise UserError(f"{expected}, but {folder} does not exist; {make}")
    if not any(path.iterdir()):
        raise UserError(f"{expected}, but {folder} is empty; {make}")
    for name in (_INFO_FILE, _INDEX_FILE):
        if not (path / name).is_file():
            raise UserError(f"{expected}, but {folder} has no {name}; {make}")
    return _parse_info(path / _INFO_FILE, key)


def _parse_info(path: Path, key: str) -> ShardInfo:
    again = "write the folder again with tools/make_shards.py"
    try:
        plain: dict[str, Any] = json.loads(path.read_text())
        version = plain.pop("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(f"expected schema_version {SCHEMA_VERSION}, got {version!r}")
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in plain.items()}
        return ShardInfo(**fields)  # a field that is missing or not ours fails here
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{key}: {path} cannot be read ({error}); {again}") from error


def check_info(info: ShardInfo, config: Config) -> None:
    """Refuses shards that the config does not describe, naming every problem at once.

    Raises:
        UserError: each problem names its config key, what was expected, what came and the fix.
    """
    problems = [*_check_latents(info, config), *_check_counts(info, config)]
    if problems:
        raise UserError(f"shards {config.data.shards} do not fit the config: {' | '.join(problems)}")


def _check_latents(info: ShardInfo, config: Config) -> Iterable[str]:
    model = config.model
    channels, rows, columns = info.latent_shape
    if rows != columns:
        yield f"data.shards: expected latents of as many rows as columns, got {rows} x {columns}; crop the images"
    elif rows != model.latent_size:
        yield f"model.latent_size: expected {rows}, the rows of the shards' latents, got {model.latent_size}"
    if channels != model.latent_channels:
        yield f"model.latent_channels: expected {channels}, as in the shards, got {model.latent_channels}"
        return
    for name in ("latent_shift", "latent_scale"):
        recorded, given = getattr(info, name), getattr(config.data, name)
        full = given * channels if len(given) == 1 else given
        if not all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(recorded, full, strict=True)):
            yield f"data.{name}: expected {list(recorded)}, which the shards record, got {list(given)}; set it so"


def _check_counts(info: ShardInfo, config: Config) -> Iterable[str]:
    num_classes, batch = len(info.class_names), config.train.global_batch_size
    if num_classes != config.model.num_classes:
        yield f"model.num_classes: expected {num_classes}, the classes in the shards, got {config.model.num_classes}"
    if info.num_samples < batch:
        yield f"train.global_batch_size: expected at most {info.num_samples}, the samples in the shards, got {batch}"
    if info.num_samples < config.data.num_canonical_nodes:
        yield (
            f"data.num_canonical_nodes: expected at most {info.num_samples}, the samples in the shards, "
            f"got {config.data.num_canonical_nodes}"
        )


def fingerprint(folder: str | Path) -> str:
    """A hash of what the folder holds: its description and its index, in which every shard file has a hash."""
    digest = hashlib.blake2b(digest_size=16)
    for name in (_INFO_FILE, _INDEX_FILE):
        content = (Path(folder) / name).read_bytes()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


class Shards:
    """The samples of a shard folder, read by index.

    MosaicML's shard readers are used without its `StreamingDataset`, so nothing lies in shared memory and no process
    group is needed: any process may read any sample at any time.

    Args:
        folder: a folder written by `write_shards`.
        key: config key that gave it, for messages.

    Raises:
        UserError: as `read_info`; or a shard file is missing or damaged.
    """

    def __init__(self, folder: str | Path, key: str = "data.shards") -> None:
        self.info = read_info(folder, key)
        self._readers = _open_readers(Path(folder), key)
        self.shard_sizes: NDArray[np.int64] = np.array([len(reader) for reader in self._readers], np.int64)
        self._ends = self.shard_sizes.cumsum()
        if self.shard_sizes.sum() != self.info.num_samples:
            raise UserError(
                f"{key}: {folder}: expected {self.info.num_samples} samples, as {_INFO_FILE} says, "
                f"got {self.shard_sizes.sum()} in {_INDEX_FILE}; write the folder again"
            )

    def __len__(self) -> int:
        return self.info.num_samples

    def read(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """Reads samples by their place in the folder, 0 to len - 1.

        Returns:
            ids_B int64, latents_BCYX raw float32, labels_B int64.
        """
        shard_of = np.searchsorted(self._ends, indices, side="right")
        places = indices - (self._ends - self.shard_sizes)[shard_of]
        samples = [self._readers[s][p] for s, p in zip(shard_of.tolist(), places.tolist(), strict=True)]
        ids_B = np.array([sample["id"] for sample in samples], np.int64)
        labels_B = np.array([sample["label"] for sample in samples], np.int64)
        latents_BCYX = np.stack([sample["latent"] for sample in samples]).astype(np.float32)
        return torch.from_numpy(ids_B), torch.from_numpy(latents_BCYX), torch.from_numpy(labels_B)


def _open_readers(folder: Path, key: str) -> list[MDSReader]:
    again = "write the folder again"
    try:
        entries = json.loads((folder / _INDEX_FILE).read_text())["shards"]
        readers = [MDSReader.from_json(str(folder), "", entry) for entry in entries]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{key}: {folder / _INDEX_FILE} cannot be read ({error}); {again}") from error
    for reader in readers:
        reader.validate(allow_unsafe_types=False)
        for file, _ in reader.file_pairs:
            path = folder / file.basename
            size = path.stat().st_size if path.is_file() else 0
            if size != file.bytes:
                raise UserError(f"{key}: {path}: expected {file.bytes} bytes, got {size}; {again}")
    return readers


def read_all(folder: str | Path, key: str = "data.shards") -> tuple[Tensor, Tensor, Tensor]:
    """Reads a whole folder into memory: for small sets, as evaluation wants them.

    Returns:
        ids_B int64, latents_BCYX raw float32, labels_B int64, in the order of writing.

    Raises:
        UserError: as `Shards`.
    """
    shards = Shards(folder, key)
    return shards.read(np.arange(len(shards)))
