"""Shard folders: MosaicML's MDS files plus `cfpretrain.json`, which says what is in them.

There are two kinds, made one after the other: images (tools/make_shards.py), and latents (tools/encode_latents.py),
which training reads. Columns of both: `id` (unique in the folder, stable), `label` (index into the class names),
`caption` and `checksum` (of the other columns, held against them at every read). Images have `image`, the bytes of a
file. Latents have `mean` and, as the description says, `log_variance` of the autoencoder's posterior, and both of the
mirrored image. Latents are raw: shift and scale are recorded beside them and applied in core/latents.py alone.
"""

import bisect
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cfpretrain.autoencoder import are_pixels
from cfpretrain.base import typed
from cfpretrain.base.config import Config
from cfpretrain.base.console import UserError
from cfpretrain.base.files import parse_json, read_json
from cfpretrain.data.mosaic import MDSReader, encodings
from cfpretrain.data.storage import LocalFolder, ShardFile, Source, open_source

SCHEMA_VERSION = 2
INFO_FILE, INDEX_FILE = "cfpretrain.json", "index.json"
HASH = "blake2b"  # of every shard file, kept in the index
INFO_HASH = f"{INFO_FILE}.{HASH}"  # of the description; a key of the index, which MosaicML's readers pass over
_LARGEST_SIDE = 16384
_MAX_SHARD_BYTES = 1 << 32  # MDS counts in 32 bits
MAX_ID = 1 << 40  # above it, the loader notes folder and repetition

_COMMON_COLUMNS = {"id": "int64", "label": "int32", "caption": "str", "checksum": "uint32"}
_CODERS: dict[str, type[encodings.Encoding]] = {  # of every encoding in use but arrays; none unpickles
    "int64": encodings.Int64,
    "int32": encodings.Int32,
    "uint32": encodings.UInt32,
    "str": encodings.Str,
    "bytes": encodings.Bytes,
}


class DamagedShardError(UserError):
    """A sample that is not what was written."""


@dataclass(frozen=True)
class ImagesInfo:
    """What a folder of image shards holds."""

    class_names: tuple[str, ...]
    num_samples: int
    num_rejected: int  # images that could not be read; rejected.jsonl names them
    store: str  # "lossless": PNG of the crop; "original": the bytes of the file
    image_size: int  # pixels a side of the crop, also where decoding is yet to make it
    channels: int  # 1 grey, 3 RGB
    source: str  # where the images came from, for people
    versions: dict[str, str] = field(default_factory=dict)  # of what wrote them
    background: tuple[int, int, int] = (255, 255, 255)  # RGB behind what was transparent
    changes: dict[str, int] = field(default_factory=dict)  # images that lost something, by what: see images.py


@dataclass(frozen=True)
class LatentsInfo:
    """What a folder of latent shards holds."""

    autoencoder: str  # "identity": latents are pixels; else the fingerprint of the autoencoder's weights
    latent_shape: tuple[int, int, int]  # channels, rows, columns
    latent_shift: tuple[float, ...]  # one a channel; the model sees (raw - shift) * scale
    latent_scale: tuple[float, ...]  # one a channel
    class_names: tuple[str, ...]
    num_samples: int
    source: str  # where the images came from, for people
    image_size: int = 0  # pixels a side of what was encoded
    crop: str = ""  # "adm": PIL's, exact; "dali": near it
    has_posterior: bool = False  # log-variances are there
    has_mirror: bool = False  # the mirrored images' moments are there; pixels need none, they are flipped
    statistics: dict[str, list[float]] = field(default_factory=dict)  # mean and std of raw latents, one a channel
    versions: dict[str, str] = field(default_factory=dict)  # of what wrote them


Info = ImagesInfo | LatentsInfo
_KINDS: dict[str, type[ImagesInfo] | type[LatentsInfo]] = {"images": ImagesInfo, "latents": LatentsInfo}


def kind_of(info: Info) -> str:
    """ "images" or "latents"."""
    return next(kind for kind, cls in _KINDS.items() if type(info) is cls)


def image_columns() -> dict[str, str]:
    """The columns of image shards, with their MDS encodings."""
    return {**_COMMON_COLUMNS, "image": "bytes"}


def latent_columns(latent_shape: Sequence[int], has_posterior: bool, has_mirror: bool) -> dict[str, str]:
    """The columns of latent shards, with their MDS encodings."""
    array = "ndarray:float16:" + ",".join(map(str, latent_shape))
    names = ["mean"]
    if has_posterior:
        names.append("log_variance")
    if has_mirror:
        names += [f"mirror_{name}" for name in names]
    return {**_COMMON_COLUMNS, **dict.fromkeys(names, array)}


def columns_of(info: Info) -> dict[str, str]:
    """The columns that a folder of this description has."""
    if isinstance(info, ImagesInfo):
        return image_columns()
    return latent_columns(info.latent_shape, info.has_posterior, info.has_mirror)


def checksum(sample: Mapping[str, Any]) -> int:
    """CRC-32 over the names and values of a sample, its `checksum` apart."""
    value = 0
    for name in sorted(sample.keys() - {"checksum"}):
        value = zlib.crc32(_as_bytes(sample[name]), zlib.crc32(name.encode(), value))
    return value


def _as_bytes(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, np.ndarray):
        return value.tobytes()
    return value if isinstance(value, bytes) else int(value).to_bytes(8, "little", signed=True)


# ---------------------------------------------------------------------------------------------------------------------
# What a folder says of itself


def info_text(info: Info, plan: Mapping[str, Any]) -> str:
    """The content of `cfpretrain.json`: the description, and the plan by which the folder was made."""
    plain = {"schema_version": SCHEMA_VERSION, "kind": kind_of(info), **dataclasses.asdict(info), "plan": dict(plan)}
    return json.dumps(plain, indent=2) + "\n"


def read_info(folder: str | Path, key: str = "data.shards") -> Info:
    """Reads what a shard folder says of itself.

    Args:
        folder: a shard folder, or the address of one.
        key: config key or option that gave it, for the message.

    Raises:
        UserError: the folder is missing, empty or not one of ours, or its description cannot be read.
    """
    return _read_info(open_source(folder, key), key)


def read_images_info(folder: str | Path, key: str) -> ImagesInfo:
    """`read_info` of a folder that must hold images; UserError where it holds others."""
    info = read_info(folder, key)
    if not isinstance(info, ImagesInfo):
        raise UserError(f"{key}: expected shards of images, got latents in {folder}; give what make_shards.py wrote")
    return info


def read_latents_info(folder: str | Path, key: str = "data.shards") -> LatentsInfo:
    """`read_info` of a folder that must hold latents; UserError where it holds others."""
    return _of_latents(read_info(folder, key), str(folder), key)


def _of_latents(info: Info, address: str, key: str) -> LatentsInfo:
    if not isinstance(info, LatentsInfo):
        raise UserError(
            f"{key}: expected shards of latents, got images in {address}; encode them with: "
            f"python tools/encode_latents.py {address} --autoencoder FOLDER --out OTHER_FOLDER"
        )
    return info


def _read_info(source: Source, key: str) -> Info:
    again = "write the folder again"
    name = f"{source.address}/{INFO_FILE}"
    text = _required_text(source, INFO_FILE, key)
    try:
        plain: dict[str, Any] = parse_json(text)
        version = plain.pop("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(f"expected schema_version {SCHEMA_VERSION}, got {version!r}")
        cls = _KINDS[plain.pop("kind")]
        del plain["plan"]
        info: Info = typed.from_plain(cls, plain, "its values")
        _check_size(info)
        return info
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{key}: {name} cannot be read ({error}); {again}") from error


def _check_size(info: Info) -> None:
    """ValueError where the size of an image is one that none has: a crop or an array would be made of it."""
    num_values = info.image_size**2 if isinstance(info, ImagesInfo) else math.prod(info.latent_shape)
    sizes = (info.image_size, *(() if isinstance(info, ImagesInfo) else info.latent_shape))
    if min(sizes) < 0 or max(sizes) > _LARGEST_SIDE or num_values > _LARGEST_SIDE**2:
        raise ValueError(f"expected images of 0 to {_LARGEST_SIDE} pixels a side, got sizes {sizes}")


def read_plan(folder: Path) -> dict[str, Any]:
    """By which plan a folder of this machine was made; empty where it does not say."""
    try:
        plan = read_json(folder / INFO_FILE)["plan"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return plan if isinstance(plan, dict) else {}


def _required_text(source: Source, name: str, key: str) -> str:
    try:
        return source.text(name)
    except FileNotFoundError as error:
        is_there = "://" in source.address or Path(source.address).exists()
        got = f"has no {name}" if is_there else "does not exist"
        raise UserError(
            f"{key}: expected a folder of shards, but {source.address or 'the empty name'} {got}; make shards with "
            "tools/make_shards.py and tools/encode_latents.py"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: {source.address}/{name} cannot be read ({error}); restore it") from error


def fingerprint(source: Source, key: str = "data.shards") -> str:
    """A hash of what the folder holds: its description and its index, in which every shard file has a hash."""
    digest = hashlib.blake2b(digest_size=16)
    for name in (INFO_FILE, INDEX_FILE):
        content = _required_text(source, name, key).encode()
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Do they fit the config?


def check_infos(infos: Sequence[LatentsInfo], config: Config) -> None:
    """Refuses latent shards that the config does not describe, naming every problem at once.

    Args:
        infos: of the folders `config.data.shards`, in that order.
        config: its sections model, data and train count.

    Raises:
        UserError: each problem names its config key, what was expected, what came and the fix.
    """
    first = infos[0]
    problems = [*_check_latents(first, config), *_check_counts(infos, config)]
    for address, info in zip(config.data.shards[1:], infos[1:], strict=True):
        problems += _check_alike(first, info, address)
    if problems:
        raise UserError(f"shards {', '.join(config.data.shards)} do not fit the config: {' | '.join(problems)}")


def _check_latents(info: LatentsInfo, config: Config) -> Iterable[str]:
    model = config.model
    channels, rows, columns = info.latent_shape
    if rows != columns:
        yield f"data.shards: expected latents of as many rows as columns, got {rows} x {columns}; crop the images"
    elif rows != model.latent_size:
        yield f"model.latent_size: expected {rows}, the rows of the shards' latents, got {model.latent_size}"
    if config.data.mirror_prob > 0 and info.has_posterior and not info.has_mirror:
        yield (
            f"data.mirror_prob: expected 0, since the shards hold no mirrored images, got {config.data.mirror_prob:g}; "
            "encode them again without --no-mirror, or set it to 0"
        )
    if config.data.autoencoder and info.autoencoder == "identity":
        yield f"data.autoencoder: expected none for shards of pixels, got {config.data.autoencoder}; leave it out"
    if info.autoencoder != "identity" and are_pixels(channels) and not config.data.autoencoder:
        yield (
            f"data.autoencoder: expected the folder of the one that made these latents of {channels} channels, which "
            "would be taken for pixels, got none; set it"
        )
    if channels != model.latent_channels:
        yield f"model.latent_channels: expected {channels}, as in the shards, got {model.latent_channels}"
        return
    for name in ("latent_shift", "latent_scale"):
        recorded, given = getattr(info, name), getattr(config.data, name)
        full = given * channels if len(given) == 1 else given
        if not all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(recorded, full, strict=True)):
            yield f"data.{name}: expected {list(recorded)}, which the shards record, got {list(given)}; set it so"


def _check_counts(infos: Sequence[LatentsInfo], config: Config) -> Iterable[str]:
    num_classes, batch = len(infos[0].class_names), config.train.global_batch_size
    num_samples = sum(samples_an_epoch([info.num_samples for info in infos], config.data.repeat))
    if num_classes != config.model.num_classes:
        yield f"model.num_classes: expected {num_classes}, the classes in the shards, got {config.model.num_classes}"
    if num_samples < batch:
        yield f"train.global_batch_size: expected at most {num_samples}, the samples of an epoch, got {batch}"
    if num_samples < config.data.num_canonical_nodes:
        yield (
            f"data.num_canonical_nodes: expected at most {num_samples}, the samples of an epoch, "
            f"got {config.data.num_canonical_nodes}"
        )


def _check_alike(first: LatentsInfo, info: LatentsInfo, address: str) -> Iterable[str]:
    for name in (
        *("autoencoder", "latent_shape", "latent_shift", "latent_scale", "class_names"),
        *("image_size", "crop", "has_posterior", "has_mirror"),
    ):
        expected, got = getattr(first, name), getattr(info, name)
        if expected != got:
            yield f"data.shards: {address}: expected {name} as in the first folder, {expected!r:.80}, got {got!r:.80}"


def config_lines(info: LatentsInfo, address: str, autoencoder: str | None = None) -> list[str]:
    """What a config for these shards must say, in YAML; the autoencoder's folder is yet to be filled in without one."""
    data: dict[str, Any] = {"shards": address}
    if info.autoencoder != "identity":
        data["autoencoder"] = autoencoder or "FOLDER"
    data |= {"latent_shift": list(info.latent_shift), "latent_scale": list(info.latent_scale)}
    if info.has_posterior and not info.has_mirror:
        data["mirror_prob"] = 0.0
    channels, rows, _ = info.latent_shape
    model = {"latent_size": rows, "latent_channels": channels, "num_classes": len(info.class_names)}
    return [f"{section}: {json.dumps(values)}" for section, values in (("model", model), ("data", data))]


def check_autoencoder(
    info: LatentsInfo, fingerprint: str, shift: Sequence[float], scale: Sequence[float], key: str
) -> None:
    """Refuses an autoencoder that did not make the latents, or scales them otherwise: it would decode them wrongly.

    Raises:
        UserError: names `key`, the config key or option that gave the autoencoder.
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


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass(frozen=True)
class LatentBatch:
    """Samples of latent shards; raw moments as float32, those of the mirrored images under `mirror_`."""

    ids_B: Tensor  # int64
    labels_B: Tensor  # int64
    mean_BCYX: Tensor
    log_variance_BCYX: Tensor | None = None
    mirror_mean_BCYX: Tensor | None = None
    mirror_log_variance_BCYX: Tensor | None = None


class Shards:
    """The samples of a shard folder, read by index and held against their checksums.

    MosaicML's shard readers are used without its `StreamingDataset`, so nothing lies in shared memory and no process
    group is needed: any process may read any sample at any time.

    Args:
        folder: a shard folder, or the address of one.
        key: config key or option that gave it, for messages.
        source: where its files lie, where that is known already.

    Raises:
        UserError: as `read_info`; or a shard file is missing or cut short.
    """

    def __init__(self, folder: str | Path, key: str = "data.shards", source: Source | None = None) -> None:
        self.source = source or open_source(folder, key)
        self._key = key
        self.info = _read_info(self.source, key)
        self._readers = _open_readers(self.source, columns_of(self.info), key)
        self.files = [_file_of(reader) for reader in self._readers]
        self.shard_sizes: NDArray[np.int64] = np.array([len(reader) for reader in self._readers], np.int64)
        self._ends: list[int] = self.shard_sizes.cumsum().tolist()
        if self.shard_sizes.sum() != self.info.num_samples:
            raise UserError(
                f"{key}: {self.source.address}: expected {self.info.num_samples} samples, as {INFO_FILE} says, "
                f"got {self.shard_sizes.sum()} in {INDEX_FILE}; write the folder again"
            )
        if isinstance(self.source, LocalFolder):
            for file in self.files:
                self.source.open(file).close()

    def __len__(self) -> int:
        return self.info.num_samples

    @property
    def latents_info(self) -> LatentsInfo:
        """The description of a folder that must hold latents; UserError where it holds images."""
        return _of_latents(self.info, self.source.address, self._key)

    def shard(self, number: int) -> Iterator[dict[str, Any]]:
        """The samples of one shard, in order; arguments and errors as for `sample`."""
        first = self._ends[number] - int(self.shard_sizes[number])
        return map(self.sample, range(first, first + int(self.shard_sizes[number])))

    def sample(self, index: int) -> dict[str, Any]:
        """`samples` of one index."""
        return self.samples([index])[0]

    def samples(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Samples by their places in the folder, 0 to len - 1: the columns of each. Opens each file once.

        Raises:
            DamagedShardError: one is not what was written.
            UserError: a file is missing or cannot be fetched.
        """
        positions: dict[int, list[int]] = {}
        for position, index in enumerate(indices):
            positions.setdefault(bisect.bisect_right(self._ends, index), []).append(position)
        found: dict[int, dict[str, Any]] = {}
        for shard, wanted in positions.items():
            first = self._ends[shard] - int(self.shard_sizes[shard])
            places = [indices[position] - first for position in wanted]
            found.update(zip(wanted, self._read(shard, places), strict=True))
        return [found[position] for position in range(len(indices))]

    def _read(self, shard: int, places: Sequence[int]) -> list[dict[str, Any]]:
        problem = ""
        for _ in range(3):  # a copy may prove damaged, and another come
            with self.source.open(self.files[shard]) as file:
                samples: list[dict[str, Any]] = []
                try:
                    for place in places:
                        sample = self._readers[shard].read(file, place)
                        if checksum(sample) != sample["checksum"]:
                            raise ValueError("its checksum differs")
                        if not 0 <= sample["label"] < len(self.info.class_names):
                            raise ValueError(f"its label is {sample['label']}, of {len(self.info.class_names)} classes")
                        samples.append(sample)
                    return samples
                except (ValueError, IndexError, TypeError, OSError, MemoryError) as error:
                    problem = f"sample {place} is damaged ({error})"
            if not self.source.drop(self.files[shard]):
                break
        raise DamagedShardError(
            f"{self._key}: {self.source.address}/{self.files[shard].name}: {problem}; copy the file from where it is "
            "whole, or write the folder again"
        )

    def read_latents(self, indices: NDArray[np.int64]) -> LatentBatch:
        """Reads samples of latent shards by their places in the folder; errors as for `sample`."""
        samples = self.samples(indices.tolist())

        def stacked(name: str) -> Tensor | None:
            if name not in samples[0]:
                return None
            return torch.from_numpy(np.stack([sample[name] for sample in samples]).astype(np.float32))

        mean_BCYX = stacked("mean")
        assert mean_BCYX is not None, "not latents"
        return LatentBatch(
            torch.tensor([int(sample["id"]) for sample in samples]),
            torch.tensor([int(sample["label"]) for sample in samples]),
            mean_BCYX,
            stacked("log_variance"),
            stacked("mirror_mean"),
            stacked("mirror_log_variance"),
        )


class _Reader(MDSReader):
    """MosaicML's, for files that are open; it would look up how each column is decoded again for every sample."""

    def read(self, file: FileIO, place: int) -> dict[str, Any]:
        """The columns of a sample, by its place in the shard.

        Raises:
            ValueError, IndexError, TypeError, OSError or MemoryError: the file is damaged.
        """
        # After the number of samples: where each begins, and the last ends.
        ends = os.pread(file.fileno(), 8, 4 * (1 + place))
        begin, end = int.from_bytes(ends[:4], "little"), int.from_bytes(ends[4:], "little")
        if not begin <= end <= self.raw_data.bytes:
            raise ValueError(f"bytes {begin} to {end} of {self.raw_data.bytes}")
        return self.decode_sample(os.pread(file.fileno(), end - begin, begin))

    def decode_sample(self, data: bytes) -> dict[str, Any]:
        """The columns of a sample, from its bytes."""
        sizes, begin = [], 0
        for fixed in self.column_sizes:
            sizes.append(fixed or int.from_bytes(data[begin : begin + 4], "little"))
            begin += 0 if fixed else 4
        sample = {}
        for name, encoding, size in zip(self.column_names, self.column_encodings, sizes, strict=True):
            sample[name] = _coder(encoding).decode(data[begin : begin + size])
            begin += size
        return sample


@functools.cache
def _coder(encoding: str) -> encodings.Encoding:
    """What decodes a column of ours."""
    name, _, details = encoding.partition(":")
    return encodings.NDArray.from_str(details) if name == "ndarray" else _CODERS[name]()


def _check_description(source: Source, index: Mapping[str, Any], key: str) -> None:
    """Refuses a description that is not what was written: a wrong scale would be believed."""
    text, expected = _required_text(source, INFO_FILE, key), index.get(INFO_HASH, "none")
    got = hashlib.new(HASH, text.encode()).hexdigest()
    if got != expected:
        raise UserError(
            f"{key}: {source.address}/{INFO_FILE}: expected the hash that {INDEX_FILE} records, {expected!r:.20}, got "
            f"{got:.16}; restore both files, or write the folder again"
        )


@dataclass(frozen=True)
class _FileEntry:
    basename: str
    bytes: int
    hashes: dict[str, str]


@dataclass(frozen=True)
class _ShardEntry:
    """What an index says of a shard, as MosaicML's writer does."""

    column_encodings: list[str]
    column_names: list[str]
    column_sizes: list[int | None]
    compression: str | None
    format: str
    hashes: list[str]
    raw_data: _FileEntry
    samples: int
    size_limit: int | None
    version: int
    zip_data: None


@dataclass(frozen=True)
class _Index:
    shards: tuple[_ShardEntry, ...]


def _open_readers(source: Source, columns: Mapping[str, str], key: str) -> list[_Reader]:
    again = "write the folder again"
    name = f"{source.address}/{INDEX_FILE}"
    try:
        index = parse_json(_required_text(source, INDEX_FILE, key))
        _check_description(source, index, key)
        entries = typed.from_plain(_Index, index, f"{key}: {name} cannot be read, {again}", ignore_unknown=True).shards
        readers: list[_Reader] = [_Reader.from_json("", "", dataclasses.asdict(entry)) for entry in entries]
        for reader in readers:
            # Nothing else is decoded: one of MDS's encodings is a pickle.
            found = dict(zip(reader.column_names, reader.column_encodings, strict=True))
            if found != columns:
                raise ValueError(f"expected columns {dict(columns)}, got {found}")
            _file_of(reader)
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{key}: {name} cannot be read ({error}); {again}") from error
    return readers


def _file_of(reader: MDSReader) -> ShardFile:
    name, digest = reader.raw_data.basename, reader.raw_data.hashes[HASH]
    if not re.fullmatch("[0-9a-f]{128}", digest):  # it names a copy
        raise ValueError(f"expected a {HASH} hash of 128 hexadecimal digits, got {digest!r:.40}")
    if Path(name).name != name or reader.zip_data is not None:
        raise ValueError(f"expected the plain name of a raw file in the folder, got {name!r}")
    num_bytes, least = (
        reader.raw_data.bytes,
        4 * (2 + reader.samples),
    )  # their number, where each begins and the last ends
    if not (reader.samples >= 0 and least <= num_bytes <= _MAX_SHARD_BYTES):
        raise ValueError(f"expected {name} to hold {reader.samples} samples, which {num_bytes} bytes cannot")
    return ShardFile(name, num_bytes, digest)
