"""Which samples a rank trains on at each step, and the position from which a run goes on.

An epoch's order is MosaicML's elastically deterministic one (py1e shuffle, interleaved over canonical nodes): a
function of the seed, the epoch, the shards, `repeat`, `num_canonical_nodes` and `shuffle_block_size`. It is cut into
global batches, and a global batch into the ranks' shares, so neither ranks nor accumulation nor workers change what a
step sees. Nor do they change a sample: mirror and posterior noise are drawn from the seed, the epoch and its id.

Workers also make the samples into what the step needs (`prepare`); of images, a thread does, which has them decoded and
encoded before (`data.online`). A whole step is read ahead, across the border of an epoch too: ranks learn before a step
begins that one of them cannot read its share.
"""

import atexit
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic

import numpy as np
import torch
from numpy.typing import NDArray

from cfpretrain.base.config import Config
from cfpretrain.base.console import UserError, phase, say
from cfpretrain.core import seeds
from cfpretrain.data.compatibility import check_infos, samples_an_epoch
from cfpretrain.data.mosaic import get_partitions, get_shuffle
from cfpretrain.data.online import EncodingReader, TrainingData, open_training_data
from cfpretrain.data.reader import MicroBatches, Reader, Request
from cfpretrain.data.samples import REPETITION_BIT, LatentReading, Prepare, T, VisitDraws
from cfpretrain.data.shards import Shards
from cfpretrain.data.storage import RemoteFolder


@dataclass(frozen=True)
class Position:
    """Where in the data a run stands: the next global batch begins here."""

    epoch: int = 0
    samples_in_epoch: int = 0  # consumed by all ranks together; read ahead does not count


class Loader(Generic[T]):
    """Yields, forever, this rank's micro-batches of each global batch: one list for one optimizer step.

    In an epoch every sample comes once, or as often as `data.repeat` says: 2.5 means twice, and once more for a random
    half of the folder that is another in each epoch. The tail that does not fill a global batch, fewer than
    `train.global_batch_size` samples and others in each epoch, is dropped. UserError where the shards are missing,
    damaged, do not fit the config or end before `position`.

    Args:
        config: its `data`, `train`, `model` and `run.seed`; checked by `config_checks.check`.
        prepare: makes a micro-batch of its samples; its result has a method `pin_memory`, used on a GPU.
        rank: this rank, 0 to world_size - 1.
        world_size: number of ranks.
        position: where to go on; any `Position` this class gave, under any number of ranks.
        step: the optimizer step that the first list is for; the next is for the step after it.
        ranks_per_node: with more than one node, keeps the shards that a node reads few; changes no global batch.
            None: all ranks are on one node.
        device: of the training. On a GPU images are decoded and encoded there, and micro-batches come in pinned memory.
        data: the folders of the config, where they are open already.
    """

    def __init__(
        self,
        config: Config,
        prepare: Prepare[T],
        rank: int,
        world_size: int,
        position: Position | None = None,
        step: int = 0,
        ranks_per_node: int | None = None,
        device: torch.device | None = None,
        data: TrainingData | None = None,
    ) -> None:
        data = data or open_training_data(config, device)
        self._budget, folders = data.cache.budget, data.folders
        check_infos(data.latents, config)
        self.fingerprint = order_fingerprint(config, folders)
        self._shard_sizes = [folder.shard_sizes for folder in folders]
        self._num_samples = sum(samples_an_epoch([len(folder) for folder in folders], config.data.repeat))
        self._config, self._rank = config, rank
        self._ranks_per_node = ranks_per_node or world_size
        self._num_nodes = world_size // self._ranks_per_node
        assert self._num_nodes * self._ranks_per_node == world_size
        assert 0 <= rank < world_size
        _warn_of_a_small_cache(config, folders, self._num_nodes)
        self._accumulation = config.accumulation_steps(world_size)
        position = position or Position()
        if position.samples_in_epoch > self._num_samples:
            raise UserError(
                f"data.shards: expected more than {position.samples_in_epoch} samples, the place in the epoch where "
                f"the run goes on, got {self._num_samples}; give the shards that the run began with"
            )
        # Where the batches handed out so far end: what a checkpoint after their optimizer step stores.
        self.position = self._turn_epoch(position)
        self.waited_seconds = 0.0  # for batches, so far
        self.problem: str | None = None  # why the next step's micro-batches cannot be read, once that is known
        self._next: list[T] | None = None
        device, requests = device or torch.device("cpu"), self._requests(step)
        self._reader: Reader[T] | EncodingReader[T] | None
        if data.encodings:
            say(data.encodings[0].describe_work())
            _warn_of_padding(config, world_size)
            self._reader = EncodingReader(data, config, prepare, requests, self._accumulation, device)
        else:
            reading = LatentReading(data.latents[0], VisitDraws(config), prepare)
            batches, is_pinned = MicroBatches(folders, reading), device.type == "cuda"
            self._reader = Reader(batches, requests, config.data.num_workers, is_pinned, self._budget)
        # A process that an error ends would wait for its workers, which leave signals to it. (`close` starts a thread.)
        self._at_exit = atexit.register(self._reader.kill)

    def __iter__(self) -> Iterator[list[T]]:
        return self

    def __next__(self) -> list[T]:
        self.read_ahead()
        if self.problem is not None:
            raise UserError(self.problem)
        assert self._next is not None
        batches, self._next = self._next, None
        self.position = self._after(self.position)
        return batches

    def read_ahead(self) -> None:
        """Waits for what `next` will give, unless it is there; an error is kept in `problem`."""
        assert self._reader is not None, "the loader is closed"
        if self._next is not None or self.problem is not None:
            return
        with phase("waiting for data", announce=False):
            begin = time.perf_counter()
            try:
                self._next = [self._reader.read() for _ in range(self._accumulation)]
            except UserError as error:
                self.problem = str(error)
            self.waited_seconds += time.perf_counter() - begin

    def end_waiting(self) -> None:
        """From here on, what is not at hand is a `problem`: nobody waits for it. Any thread may call it."""
        self._budget.end()

    def close(self) -> None:
        """Ends the worker processes; the position stays readable."""
        atexit.unregister(self._at_exit)
        self.end_waiting()
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _after(self, position: Position) -> Position:
        samples = position.samples_in_epoch + self._config.train.global_batch_size
        return self._turn_epoch(Position(position.epoch, samples))

    def _turn_epoch(self, position: Position) -> Position:
        left = self._num_samples - position.samples_in_epoch
        return Position(position.epoch + 1, 0) if left < self._config.train.global_batch_size else position

    def _requests(self, step: int) -> Iterator[Request]:
        """This rank's micro-batches from the position on; runs ahead of the consumer, so it keeps its own position."""
        position, batch_size = self.position, self._config.train.global_batch_size
        while True:
            epoch = position.epoch
            visits = epoch_visits(self._config, self._shard_sizes, epoch)
            while position.epoch == epoch:
                begin = position.samples_in_epoch
                share = self._share(visits[begin : begin + batch_size])
                for micro_batch in np.split(share, self._accumulation):
                    yield step, epoch, micro_batch
                position, step = self._after(position), step + 1

    def _share(self, global_batch: NDArray[np.int64]) -> NDArray[np.int64]:
        # Neighbours in the order belong to different canonical nodes, so nodes are the fastest axis.
        grid = global_batch.reshape(-1, self._ranks_per_node, self._num_nodes)
        return grid[:, self._rank % self._ranks_per_node, self._rank // self._ranks_per_node]


def order_fingerprint(config: Config, folders: Sequence[Shards]) -> str:
    """What a position means: the shards' fingerprints and the knobs that decide the order of an epoch."""
    data = config.data
    shards = "+".join(folder.fingerprint for folder in folders)
    repeat = "" if set(data.repeat) == {1.0} else "x" + ",".join(map(repr, data.repeat))
    return f"{shards}{repeat}-{data.num_canonical_nodes}-{data.shuffle_block_size}"


def _warn_of_a_small_cache(config: Config, folders: Sequence[Shards], num_nodes: int) -> None:
    """Says where shards will be fetched again and again, since an epoch goes through more of them at a time."""
    data = config.data
    remote = [folder for folder in folders if isinstance(folder.source, RemoteFolder)]
    if not remote or not data.cache_limit_gb:
        return
    num_bytes, num_samples = sum(file.num_bytes for folder in remote for file in folder.files), sum(map(len, remote))
    # A shard's samples are spread over up to 1.25 blocks, in each canonical node.
    at_a_time = 1.25 * data.shuffle_block_size + 2 * max(int(folder.shard_sizes.max()) for folder in remote)
    share = min(1.0, at_a_time * max(1, data.num_canonical_nodes // num_nodes) / num_samples)
    if data.cache_limit_gb * 1e9 < share * num_bytes:
        say(
            f"WARNING: data.cache_limit_gb = {data.cache_limit_gb:g} is less than the shards that a machine reads by "
            f"turns, about {share * num_bytes / 1e9:.2g} GB: they are fetched again and again; raise it, or lower "
            f"data.shuffle_block_size = {data.shuffle_block_size}"
        )


def _warn_of_padding(config: Config, world_size: int) -> None:
    """Says where at most half of what is encoded are images."""
    micro_batch_size, size = config.micro_batch_size(world_size), config.data.encode_batch_size
    padding = config.encoding_padding(world_size)
    if padding >= micro_batch_size:
        say(
            f"WARNING: data.encode_batch_size = {size}: a micro-batch of {micro_batch_size} is padded by "
            f"{padding} images, which takes as long; set {micro_batch_size}, unless losses are to equal those of "
            f"latents that were encoded {size} at once"
        )


def epoch_visits(config: Config, shard_sizes: Sequence[NDArray[np.int64]], epoch: int) -> NDArray[np.int64]:
    """The samples that an epoch visits, in order.

    Args:
        config: `data.repeat`, `run.seed` and what `epoch_order` uses.
        shard_sizes: samples of each shard, for each folder.
        epoch: from 0.

    Returns:
        The place of each in all folders, one after another; how often it came before is added from bit 56 on.
    """
    counts = [int(sizes.sum()) for sizes in shard_sizes]
    first, visits, parts = 0, [], []
    for folder, num_visits in enumerate(samples_an_epoch(counts, config.data.repeat)):
        sizes, count = shard_sizes[folder], counts[folder]
        repetitions, rest = divmod(num_visits, count)
        for repetition in range(repetitions):
            visits.append(np.arange(first, first + count) + (repetition << REPETITION_BIT))
            parts.append(sizes)
        if rest:
            key = seeds.fold(seeds.fold(seeds.key(config.run.seed, "repeat"), epoch), folder)
            chosen = np.sort(seeds.permutation(key, count)[:rest].numpy())
            visits.append(first + chosen + (repetitions << REPETITION_BIT))
            chosen_sizes = np.bincount(np.searchsorted(sizes.cumsum(), chosen, side="right"))
            parts.append(chosen_sizes[chosen_sizes > 0])
        first += count
    # The shuffle sees each repetition of a shard as a shard, and keeps its samples near each other.
    ordered: NDArray[np.int64] = np.concatenate(visits)[epoch_order(config, np.concatenate(parts), epoch)]
    return ordered


def epoch_order(config: Config, shard_sizes: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
    """The order in which an epoch goes through the samples of shards: a permutation of range(sum of shard_sizes).

    Of the config, `run.seed`, `data.num_canonical_nodes` and `data.shuffle_block_size` are used.
    """
    num_samples, num_canonical = int(shard_sizes.sum()), config.data.num_canonical_nodes
    # Hashed, since the shuffle adds the epoch to its seed: runs of seeds 0 and 1 would share orders.
    shuffle_seed = int(seeds.integers(seeds.key(config.run.seed, "shuffle"), 1 << 31))
    shuffle = get_shuffle("py1e", shard_sizes, num_canonical, shuffle_seed, epoch, config.data.shuffle_block_size)
    # As one node with one rank and one worker, so that no sample is repeated to even those out. What remains are
    # canonical nodes of unequal size: the shorter ones repeat their last sample as the last of the interleaved order.
    places = get_partitions("orig", num_samples, num_canonical, 1, 1, 1, batch_size=1).flatten()
    num_even = num_samples - num_samples % num_canonical
    last = places[num_even:]
    repeated = np.isin(last, places[num_even - num_canonical : num_even])
    order: NDArray[np.int64] = shuffle[np.concatenate([places[:num_even], last[~repeated]])]
    return order
