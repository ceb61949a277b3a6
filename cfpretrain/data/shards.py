"""Shard folders: MosaicML's MDS files plus `cfpretrain.json`, which says what is in them.

There are two kinds, made one after the other: images (tools/make_shards.py), and latents (tools/encode_latents.py),
which training reads. Columns of both: `id` (unique in the folder, stable), `label` (index into the class names),
`caption` and `checksum` (of the other columns, held against them at every read). Images have `image`, the bytes of a
file. Latents have `mean` and, as the description says, `log_variance` of the autoencoder's posterior, and both of the
mirrored image. Latents are raw: shift and scale are recorded beside them and applied in core/latents.py alone.

Interleaved samples have several images each, and `segments` (`interleaved.py`): of images, `images` holds the files one
behind another, and `image_ends` where each ends; arrays of latents are [n, C, Y, X].
"""

import bisect
import dataclasses
import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cfpretrain.base.console import UserError
from cfpretrain.base.files import parse_json, read_json
from cfpretrain.base.typed import Natural, from_plain
from cfpretrain.data.cache import Cache, ShardFile
from cfpretrain.data.interleaved import check_images
from cfpretrain.data.mosaic import encodings
from cfpretrain.data.storage import LocalFolder, Source, open_source

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


@dataclass(frozen=True)
class ImagesInfo:
    """What a folder of image shards holds."""

    kind = "images"
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
    most_segments: Natural = 0  # texts and images of an interleaved sample; 0: each sample is an image


@dataclass(frozen=True)
class LatentsInfo:
    """What a folder of latent shards holds."""

    kind = "latents"
    autoencoder: str  # "identity": latents are pixels; else the fingerprint of the autoencoder's weights
    latent_shape: tuple[int, int, int]  # channels, rows, columns
    latent_shift: tuple[float, ...]  # one a channel; the model sees (raw - shift) * scale
    latent_scale: tuple[float, ...]  # one a channel
    class_names: tuple[str, ...]
    num_samples: int
    source: str  # where the images came from, for people
    image_size: int = 0  # pixels a side of what was encoded
    crop: str = ""  # "adm": PIL's, exact; "dali": near it; "random": another at each visit, in training alone
    has_posterior: bool = False  # log-variances are there
    has_mirror: bool = False  # the mirrored images' moments are there; pixels need none, they are flipped
    statistics: dict[str, list[float]] = field(default_factory=dict)  # mean and std of raw latents, one a channel
    versions: dict[str, str] = field(default_factory=dict)  # of what wrote them
    most_segments: Natural = 0  # texts and images of an interleaved sample; 0: each sample is an image


Info = ImagesInfo | LatentsInfo
_KINDS: dict[str, type[ImagesInfo] | type[LatentsInfo]] = {cls.kind: cls for cls in (ImagesInfo, LatentsInfo)}


def image_columns(is_interleaved: bool = False) -> dict[str, str]:
    """The columns of image shards, with their MDS encodings."""
    if is_interleaved:
        return {**_COMMON_COLUMNS, "segments": "str", "images": "bytes", "image_ends": "ndarray:int64"}
    return {**_COMMON_COLUMNS, "image": "bytes"}


def latent_columns(
    latent_shape: Sequence[int], has_posterior: bool, has_mirror: bool, is_interleaved: bool = False
) -> dict[str, str]:
    """The columns of latent shards, with their MDS encodings."""
    array = "ndarray:float16" + (":" + ",".join(map(str, latent_shape))) * (not is_interleaved)
    names = ["mean"]
    if has_posterior:
        names.append("log_variance")
    if has_mirror:
        names += [f"mirror_{name}" for name in names]
    return {**_COMMON_COLUMNS, **dict.fromkeys(["segments"] * is_interleaved, "str"), **dict.fromkeys(names, array)}


def columns_of(info: Info) -> dict[str, str]:
    """The columns that a folder of this description has."""
    is_interleaved = info.most_segments > 0
    if isinstance(info, ImagesInfo):
        return image_columns(is_interleaved)
    return latent_columns(info.latent_shape, info.has_posterior, info.has_mirror, is_interleaved)


def _latent_shape(info: Info) -> tuple[int, ...]:
    return () if isinstance(info, ImagesInfo) else info.latent_shape


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
    plain = {"schema_version": SCHEMA_VERSION, "kind": info.kind, **dataclasses.asdict(info), "plan": dict(plan)}
    return json.dumps(plain, indent=2) + "\n"


def read_info(folder: str | Path, key: str = "data.shards") -> Info:
    """The description of a shard folder; UserError where it cannot be read.

    Args:
        folder: a shard folder, or the address of one.
        key: config key or option that gave it, for messages.
    """
    source = open_source(folder, key)
    return _parse_info(_text(source, INFO_FILE, key), f"{key}: {source.address}")


def read_images_info(folder: str | Path, key: str) -> ImagesInfo:
    """`read_info` of a folder that must hold images."""
    info = read_info(folder, key)
    if not isinstance(info, ImagesInfo):
        raise UserError(f"{key}: expected shards of images, got latents in {folder}; give what make_shards.py wrote")
    return info


def _text(source: Source, name: str, key: str) -> str:
    try:
        return source.text(name)
    except FileNotFoundError as error:
        raise UserError(
            f"{key}: expected a folder of shards, but {source.address or 'the empty name'} has no {name}; make shards "
            "with tools/make_shards.py, and of latents with tools/encode_latents.py"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: {source.address}/{name} cannot be read ({error}); restore it") from error


def _parse_info(text: str, where: str) -> Info:
    """The description in a text; `where` begins the message of an error."""
    try:
        plain: dict[str, Any] = parse_json(text)
        version = plain.pop("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(f"expected schema_version {SCHEMA_VERSION}, got {version!r}")
        cls = _KINDS[plain.pop("kind")]
        del plain["plan"]
        info: Info = from_plain(cls, plain, "its values")
        shape = _latent_shape(info)
        sizes = (info.image_size, *shape)
        # A crop or an array of these sizes would be made.
        if min(sizes) < 0 or 0 in shape or max(sizes) > _LARGEST_SIDE or math.prod(shape) > _LARGEST_SIDE**2:
            raise ValueError(f"expected sizes of 1 to {_LARGEST_SIDE}, got {sizes}")
        return info
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{where}/{INFO_FILE} cannot be read ({error}); write the folder again") from error


def read_plan(folder: Path) -> dict[str, Any]:
    """By which plan a folder of this machine was made; empty where it does not say."""
    try:
        plan = read_json(folder / INFO_FILE)["plan"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return plan if isinstance(plan, dict) else {}


# ---------------------------------------------------------------------------------------------------------------------
# Reading


class Shards:
    """The samples of a shard folder, read by index and held against their checksums.

    MosaicML's format is read without its `StreamingDataset`, so nothing lies in shared memory and no process group is
    needed: any process may read any sample at any time. UserError as of `read_info`, or where a shard file is missing
    or cut short.

    Args:
        folder: a shard folder, or the address of one.
        key: config key or option that gave it, for messages.
        cache: of copies, for an address; None: as a config has it by default.
    """

    def __init__(self, folder: str | Path, key: str = "data.shards", cache: Cache | None = None) -> None:
        self.source, self._key = open_source(folder, key, cache), key
        where = f"{key}: {self.source.address}"
        description = _text(self.source, INFO_FILE, key)
        self.info = _parse_info(description, where)
        # MosaicML's writer sorts them.
        columns = dict(sorted(columns_of(self.info).items()))
        self._coders = {name: _coder(encoding) for name, encoding in columns.items()}
        index = _text(self.source, INDEX_FILE, key)
        self.files, sizes = _parse_index(index, description, columns, where)
        self.shard_sizes: NDArray[np.int64] = np.array(sizes, np.int64)  # samples of each
        self._ends: list[int] = self.shard_sizes.cumsum().tolist()
        if sum(sizes) != self.info.num_samples:
            raise UserError(
                f"{where}: expected {self.info.num_samples} samples, as {INFO_FILE} says, got {sum(sizes)} in "
                f"{INDEX_FILE}; write the folder again"
            )
        # A hash of what the folder holds: in the index every shard file has one.
        contents = [text.encode() for text in (description, index)]
        framed = b"".join(len(content).to_bytes(8, "little") + content for content in contents)
        self.fingerprint = hashlib.blake2b(framed, digest_size=16).hexdigest()
        if isinstance(self.source, LocalFolder):
            for file in self.files:
                self.source.open(file).close()

    def __len__(self) -> int:
        return self.info.num_samples

    def shard(self, number: int) -> Iterator[dict[str, Any]]:
        """The samples of one shard, in order; errors as of `samples`."""
        return map(self.sample, range(self._ends[number] - int(self.shard_sizes[number]), self._ends[number]))

    def sample(self, index: int) -> dict[str, Any]:
        """`samples` of one index."""
        return self.samples([index])[0]

    def samples(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Samples by their places in the folder, 0 to len - 1: the columns of each. Opens each file once.

        UserError where a file is missing or cannot be fetched, or a sample is not what was written.
        """
        by_shard: dict[int, list[int]] = {}
        for index in indices:
            by_shard.setdefault(bisect.bisect_right(self._ends, index), []).append(index)
        found: dict[int, dict[str, Any]] = {}
        for shard, wanted in by_shard.items():
            first = self._ends[shard] - int(self.shard_sizes[shard])
            samples = self._read(self.files[shard], [index - first for index in wanted])
            found.update(zip(wanted, samples, strict=True))
        return [found[index] for index in indices]

    def _read(self, file: ShardFile, places: Sequence[int]) -> list[dict[str, Any]]:
        problem = ""
        for _ in range(3):  # a copy may prove damaged, and another come
            with self.source.open(file) as opened:
                samples: list[dict[str, Any]] = []
                try:
                    for place in places:
                        sample = self._decode(_sample_bytes(opened, place, file.num_bytes))
                        if checksum(sample) != sample["checksum"]:
                            raise ValueError("its checksum differs")
                        if self.info.most_segments:
                            check_images(sample, self.info.most_segments, _latent_shape(self.info))
                        if not 0 <= sample["label"] < len(self.info.class_names):
                            raise ValueError(f"its label is {sample['label']}, of {len(self.info.class_names)} classes")
                        samples.append(sample)
                    return samples
                except (ValueError, ArithmeticError, LookupError, TypeError, OSError, MemoryError) as error:
                    problem = f"sample {place} is damaged ({error})"
            if not self.source.drop(file):
                break
        raise UserError(
            f"{self._key}: {self.source.address}/{file.name}: {problem}; copy the file from where it is whole, or "
            "write the folder again"
        )

    def _decode(self, data: bytes) -> dict[str, Any]:
        """The columns of a sample: the sizes of those whose size varies, then the values of all."""
        sizes, begin = [], 0
        for coder in self._coders.values():
            sizes.append(coder.size or int.from_bytes(data[begin : begin + 4], "little"))
            begin += 0 if coder.size else 4
        sample = {}
        for (name, coder), size in zip(self._coders.items(), sizes, strict=True):
            sample[name] = coder.decode(data[begin : begin + size])
            begin += size
        return sample


def _sample_bytes(file: FileIO, place: int, num_bytes: int) -> bytes:
    """The bytes of a sample, by its place in a file of so many bytes."""
    # After the number of samples: where each begins, and the last ends.
    ends = os.pread(file.fileno(), 8, 4 * (1 + place))
    begin, end = int.from_bytes(ends[:4], "little"), int.from_bytes(ends[4:], "little")
    if not begin <= end <= num_bytes:
        raise ValueError(f"bytes {begin} to {end} of {num_bytes}")
    return os.pread(file.fileno(), end - begin, begin)


def _coder(encoding: str) -> encodings.Encoding:
    name, _, details = encoding.partition(":")
    return encodings.NDArray.from_str(details) if name == "ndarray" else _CODERS[name]()


@dataclass(frozen=True)
class _RawFile:
    basename: str
    bytes: int
    hashes: dict[str, str]


@dataclass(frozen=True)
class _IndexEntry:
    """What an index says of a shard, as MosaicML's writer does, without what is not needed here."""

    column_encodings: list[str]
    column_names: list[str]
    format: Literal["mds"]
    raw_data: _RawFile
    samples: int
    version: Literal[2]
    zip_data: None


def _parse_index(
    text: str, description: str, columns: Mapping[str, str], where: str
) -> tuple[list[ShardFile], list[int]]:
    """The shard files of a folder with these columns, and how many samples each holds."""
    damaged, again = f"{where}/{INDEX_FILE} cannot be read", "write the folder again"
    try:
        index = parse_json(text)
        expected = index.get(INFO_HASH, "none")
        got = hashlib.new(HASH, description.encode()).hexdigest()
        if got != expected:  # a wrong scale would be believed
            raise UserError(
                f"{where}/{INFO_FILE}: expected the hash that {INDEX_FILE} records, {expected!r:.20}, got {got:.16}; "
                f"restore both files, or {again}"
            )
        entries: list[_IndexEntry] = [
            from_plain(_IndexEntry, entry, f"{damaged}, {again}", ignore_unknown=True) for entry in index["shards"]
        ]
        for entry in entries:
            # Nothing else is decoded: one of MDS's encodings is a pickle.
            found = dict(zip(entry.column_names, entry.column_encodings, strict=True))
            if list(found.items()) != list(columns.items()):
                raise ValueError(f"expected columns {columns}, got {found}")
        return [_shard_file(entry) for entry in entries], [entry.samples for entry in entries]
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{damaged} ({error}); {again}") from error


def _shard_file(entry: _IndexEntry) -> ShardFile:
    file = entry.raw_data
    digest = file.hashes[HASH]
    if not re.fullmatch("[0-9a-f]{128}", digest):  # it names a copy
        raise ValueError(f"expected a {HASH} hash of 128 hexadecimal digits, got {digest!r:.40}")
    if Path(file.basename).name != file.basename:
        raise ValueError(f"expected the plain name of a file in the folder, got {file.basename!r}")
    least = 4 * (2 + entry.samples)  # their number, where each begins and the last ends
    if not (entry.samples >= 0 and least <= file.bytes <= _MAX_SHARD_BYTES):
        raise ValueError(f"expected {file.basename} to hold {entry.samples} samples, which {file.bytes} bytes cannot")
    return ShardFile(file.basename, file.bytes, digest)
