"""Which samples a rank trains on at each step, and the position from which a run goes on.

An epoch's order is MosaicML's elastically deterministic one (py1e shuffle, interleaved over canonical nodes): a
function of the seed, the epoch, the shards, `num_canonical_nodes` and `shuffle_block_size`. It is cut into global
batches, and a global batch into the ranks' shares, so neither ranks nor accumulation nor workers change what a step
sees.

`StreamingDataset` itself is not used: it repeats samples at the end of an epoch to even out ranks and canonical nodes,
restarts threads and barriers at every epoch, and keeps state in named shared memory that outlives a killed run. Here
workers are handed the indices of a micro-batch and need no state; they read ahead across the border of an epoch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from streaming.base.partition import get_partitions
from streaming.base.shuffle import get_shuffle
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cfpretrain import seeds
from cfpretrain.config import Config
from cfpretrain.console import UserError
from cfpretrain.data.shards import Shards, check_info, fingerprint
from cfpretrain.lifeline import leave_signals_to_the_rank

_Request = tuple[int, NDArray[np.int64]]  # the epoch, and places in the shard folder: one micro-batch


@dataclass(frozen=True)
class Position:
    """Where in the data a run stands: the next global batch begins here."""

    epoch: int = 0
    samples_in_epoch: int = 0  # consumed by all ranks together; read ahead does not count


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one rank."""

    ids_B: Tensor  # int64, stable ids of the samples
    epoch: int
    latents_BCYX: Tensor  # float32, raw: shift and scale are the model's
    labels_B: Tensor  # int64

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with its tensors on `device`."""
        return Batch(self.ids_B.to(device), self.epoch, self.latents_BCYX.to(device), self.labels_B.to(device))


class Loader:
    """Yields, forever, this rank's micro-batches of each global batch: one list for one optimizer step.

    In an epoch every sample comes at most once. The tail that does not fill a global batch, fewer than
    `train.global_batch_size` samples and others in each epoch, is dropped.

    Args:
        config: its `data`, `train`, `model` and `run.seed`; checked by `config.check`.
        rank: this rank, 0 to world_size - 1.
        world_size: number of ranks.
        position: where to go on; any `Position` this class gave, under any number of ranks.
        ranks_per_node: with more than one node, keeps the shards that a node reads few; changes no global batch.
            None: all ranks are on one node.

    Raises:
        UserError: the shards are missing, damaged, do not fit the config or end before `position`.
    """

    def __init__(
        self,
        config: Config,
        rank: int,
        world_size: int,
        position: Position | None = None,
        ranks_per_node: int | None = None,
    ) -> None:
        self._shards = Shards(config.data.shards)
        check_info(self._shards.info, config)
        self.fingerprint = order_fingerprint(config)
        self._config = config
        self._rank = rank
        self._ranks_per_node = ranks_per_node or world_size
        self._num_nodes = world_size // self._ranks_per_node
        assert self._num_nodes * self._ranks_per_node == world_size
        assert 0 <= rank < world_size
        self._accumulation = config.accumulation_steps(world_size)
        self._position = self._turn_epoch(self._checked(position or Position()))
        self._workers: Iterator[Batch] | None = _start_reading(self._shards, config, self._requests())

    @property
    def position(self) -> Position:
        """Where the batches handed out so far end: what a checkpoint after their optimizer step stores."""
        return self._position

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch."""
        return len(self._shards) // self._config.train.global_batch_size

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        assert self._workers is not None, "the loader is closed"
        batches = [next(self._workers) for _ in range(self._accumulation)]
        self._position = self._after(self._position)
        return batches

    def close(self) -> None:
        """Ends the worker processes; the position stays readable."""
        self._workers = None  # torch ends them when its iterator is dropped

    def _after(self, position: Position) -> Position:
        samples = position.samples_in_epoch + self._config.train.global_batch_size
        return self._turn_epoch(Position(position.epoch, samples))

    def _checked(self, position: Position) -> Position:
        if position.samples_in_epoch > len(self._shards):
            raise UserError(
                f"data.shards: expected more than {position.samples_in_epoch} samples, the place in the epoch where "
                f"the run goes on, got {len(self._shards)}; give the shards that the run began with"
            )
        return position

    def _turn_epoch(self, position: Position) -> Position:
        left = len(self._shards) - position.samples_in_epoch
        return Position(position.epoch + 1, 0) if left < self._config.train.global_batch_size else position

    def _requests(self) -> Iterator[_Request]:
        """This rank's micro-batches from the position on; runs ahead of the consumer, so it keeps its own position."""
        position, batch_size = self._position, self._config.train.global_batch_size
        while True:
            epoch = position.epoch
            order = epoch_order(self._config, self._shards.shard_sizes, epoch)
            while position.epoch == epoch:
                begin = position.samples_in_epoch
                share = self._share(order[begin : begin + batch_size])
                for micro_batch in np.split(share, self._accumulation):
                    yield epoch, micro_batch
                position = self._after(position)

    def _share(self, global_batch: NDArray[np.int64]) -> NDArray[np.int64]:
        # Neighbours in the order belong to different canonical nodes, so nodes are the fastest axis.
        grid = global_batch.reshape(-1, self._ranks_per_node, self._num_nodes)
        return grid[:, self._rank % self._ranks_per_node, self._rank // self._ranks_per_node]


def order_fingerprint(config: Config) -> str:
    """What a position means: the shards' fingerprint and the knobs that decide the order of an epoch."""
    data = config.data
    return f"{fingerprint(data.shards)}-{data.num_canonical_nodes}-{data.shuffle_block_size}"


def epoch_order(config: Config, shard_sizes: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
    """The order in which an epoch visits the samples of a shard folder.

    Args:
        config: `run.seed`, `data.num_canonical_nodes` and `data.shuffle_block_size` are used.
        shard_sizes: samples of each shard.
        epoch: from 0.

    Returns:
        A permutation of range(sum of shard_sizes).
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


class _MicroBatches(Dataset[Batch]):
    """Reads a requested micro-batch; runs in the worker processes."""

    def __init__(self, shards: Shards, seed: int, mirror_prob: float) -> None:
        self._shards = shards
        self._mirror_key = seeds.key(seed, "mirror")
        self._mirror_prob = mirror_prob

    def __getitem__(self, request: _Request) -> Batch:
        epoch, indices = request
        ids_B, latents_BCYX, labels_B = self._shards.read(indices)
        if self._mirror_prob > 0:
            keys_B = seeds.fold(seeds.fold(self._mirror_key, epoch), ids_B)
            mirrored_B = seeds.uniform(keys_B) < self._mirror_prob
            latents_BCYX = torch.where(mirrored_B[:, None, None, None], latents_BCYX.flip(-1), latents_BCYX)
        return Batch(ids_B, epoch, latents_BCYX, labels_B)


def _start_reading(shards: Shards, config: Config, requests: Iterator[_Request]) -> Iterator[Batch]:
    data_loader = DataLoader(
        _MicroBatches(shards, config.run.seed, config.data.mirror_prob),
        sampler=_Requests(requests),
        batch_size=None,  # a request is a whole micro-batch
        num_workers=config.data.num_workers,
        # A fork starts in milliseconds; any other way imports torch and streaming again in every worker (10 to 30 s).
        multiprocessing_context="fork" if config.data.num_workers else None,
        worker_init_fn=leave_signals_to_the_rank,
        generator=torch.Generator(),  # else torch would draw from the global one
    )
    return iter(data_loader)


class _Requests:
    """An iterable of requests, which is all that torch asks of a sampler."""

    def __init__(self, requests: Iterator[_Request]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[_Request]:
        return self._requests
