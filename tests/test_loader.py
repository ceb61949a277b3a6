"""The loader: one order for any number of ranks, no sample twice in an epoch, exact resume."""

import dataclasses
import json
import multiprocessing
import os
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from cfpretrain.config import Config, DataConfig, ModelConfig, RunConfig, TrainConfig
from cfpretrain.console import UserError
from cfpretrain.data import shards
from cfpretrain.data.loader import Batch, Loader, Position, epoch_order
from cfpretrain.data.shards import ShardInfo, fingerprint, write_shards
from tests.processes import run_in_processes


def latent_of(sample_id: int) -> np.ndarray:
    return np.random.default_rng(sample_id).standard_normal((2, 4, 4)).astype(np.float16)


def id_of(place: int) -> int:
    return 1000 + 3 * place


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gives a folder of so many samples, in shards of about twenty."""
    root = tmp_path_factory.mktemp("loader")

    def make(num_samples: int) -> Path:
        folder = root / str(num_samples)
        if not folder.exists():
            info = ShardInfo("identity", (2, 4, 4), (0.0, 0.0), (1.0, 1.0), ("a", "b", "c"), num_samples, "test")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(shards, "_SHARD_BYTES", 1800)
                write_shards(folder, info, ((id_of(i), latent_of(id_of(i)), i % 3) for i in range(num_samples)))
        return folder

    return make


def config_for(
    folder: Path,
    global_batch_size: int = 24,
    micro_batch_size: int = 6,
    num_canonical_nodes: int = 1,
    num_workers: int = 0,
    mirror_prob: float = 0.0,
    seed: int = 5,
) -> Config:
    return Config(
        run=RunConfig(seed=seed),
        model=ModelConfig(latent_size=4, latent_channels=2, num_classes=3),
        data=DataConfig(
            shards=str(folder),
            latent_scale=(1.0,),
            mirror_prob=mirror_prob,
            num_workers=num_workers,
            num_canonical_nodes=num_canonical_nodes,
            shuffle_block_size=64,
        ),
        train=TrainConfig(global_batch_size=global_batch_size, micro_batch_size=micro_batch_size),
    )


def run_rank(
    config: Config, rank: int, world_size: int, num_steps: int, position: Position | None = None, **options: int
) -> tuple[list[list[Batch]], Position]:
    """The batches of one rank's next steps, and the position after them."""
    with closing(Loader(config, rank, world_size, position, **options)) as loader:
        steps = [next(loader) for _ in range(num_steps)]
        return steps, loader.position


def ids_of_steps(
    config: Config, world_size: int, num_steps: int, position: Position | None = None, **options: int
) -> tuple[list[list[int]], Position]:
    """The sorted ids of each global batch, and the position after the last; ranks run one after another."""
    merged: list[list[int]] = [[] for _ in range(num_steps)]
    positions = set()
    for rank in range(world_size):
        steps, after = run_rank(config, rank, world_size, num_steps, position, **options)
        positions.add(after)
        for ids, batches in zip(merged, steps, strict=True):
            assert len(batches) == config.accumulation_steps(world_size)
            assert all(len(batch.ids_B) == config.train.micro_batch_size for batch in batches)
            ids += [i for batch in batches for i in batch.ids_B.tolist()]
    assert len(positions) == 1
    return [sorted(ids) for ids in merged], positions.pop()


# ---------------------------------------------------------------------------------------------------------------------
# The order


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    num_canonical_nodes=st.integers(1, 9),
    seed=st.integers(-5, 5),
    epoch=st.integers(0, 100),
)
def test_an_epoch_visits_every_sample_once(sizes: list[int], num_canonical_nodes: int, seed: int, epoch: int) -> None:
    config = config_for(Path("unused"), num_canonical_nodes=min(num_canonical_nodes, sum(sizes)), seed=seed)
    order = epoch_order(config, np.array(sizes), epoch)
    assert sorted(order.tolist()) == list(range(sum(sizes)))
    np.testing.assert_array_equal(order, epoch_order(config, np.array(sizes), epoch))


def test_orders_differ_between_epochs_and_seeds() -> None:
    sizes = np.full(5, 20)
    orders = {
        tuple(epoch_order(config_for(Path("unused"), seed=seed), sizes, epoch))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


@pytest.mark.parametrize(
    ("num_samples", "global_batch_size", "num_canonical_nodes"),
    [(101, 24, 1), (101, 24, 7), (96, 24, 5), (97, 48, 4), (47, 24, 3), (24, 24, 5), (95, 12, 12)],
)
def test_no_sample_comes_twice_in_an_epoch(
    folders: Any, num_samples: int, global_batch_size: int, num_canonical_nodes: int
) -> None:
    config = config_for(folders(num_samples), global_batch_size, 3, num_canonical_nodes)
    steps_per_epoch = num_samples // global_batch_size
    known = {id_of(place) for place in range(num_samples)}
    for world_size in (1, 2, 4):
        steps, after = ids_of_steps(config, world_size, 3 * steps_per_epoch)
        assert after == Position(3, 0)
        epochs = [steps[i : i + steps_per_epoch] for i in range(0, len(steps), steps_per_epoch)]
        for epoch in epochs:
            seen = [i for ids in epoch for i in ids]
            assert len(seen) == len(set(seen))
            assert set(seen) <= known
            assert len(known) - len(seen) < global_batch_size
        if num_samples > global_batch_size:
            assert epochs[0] != epochs[1] != epochs[2]


def test_other_samples_are_dropped_in_every_epoch(folders: Any) -> None:
    steps, _ = ids_of_steps(config_for(folders(47)), 1, 20)
    assert len({tuple(ids) for ids in steps}) == 20
    assert len({i for ids in steps for i in ids}) == 47


def test_global_batches_do_not_depend_on_ranks_or_workers(folders: Any) -> None:
    folder = folders(101)
    wanted, _ = ids_of_steps(config_for(folder, num_canonical_nodes=2), 1, 9)
    for world_size, micro, num_workers, ranks_per_node in [
        (1, 24, 0, 1),
        (1, 4, 2, 1),
        (2, 12, 0, 2),
        (2, 2, 2, 1),
        (4, 6, 0, 4),
        (4, 3, 0, 2),
        (6, 4, 0, 2),
        (8, 1, 0, 2),
    ]:
        config = config_for(folder, 24, micro, 2, num_workers)
        steps, _ = ids_of_steps(config, world_size, 9, ranks_per_node=ranks_per_node)
        assert steps == wanted, (world_size, micro, num_workers, ranks_per_node)


def test_the_order_within_a_rank_does_not_depend_on_workers_or_accumulation(folders: Any) -> None:
    def stream(micro: int, num_workers: int) -> list[int]:
        steps, _ = run_rank(config_for(folders(101), 24, micro, num_workers=num_workers), 1, 2, 9)
        return [i for batches in steps for batch in batches for i in batch.ids_B.tolist()]

    assert stream(12, 0) == stream(3, 0) == stream(3, 2) == stream(12, 2)


def test_a_node_keeps_to_its_own_samples(folders: Any) -> None:
    # Two canonical nodes on two nodes: what a node reads in one epoch, the other never reads.
    config = config_for(folders(96), num_canonical_nodes=2)
    read = []
    for node in (0, 1):
        steps = [run_rank(config, rank, 4, 8, ranks_per_node=2)[0] for rank in (2 * node, 2 * node + 1)]
        read.append({i for rank in steps for batches in rank for batch in batches for i in batch.ids_B.tolist()})
    assert len(read[0]) == len(read[1]) == 48
    assert not read[0] & read[1]


# ---------------------------------------------------------------------------------------------------------------------
# The position


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_gives_exactly_the_remaining_batches(folders: Any, num_workers: int) -> None:
    config = config_for(folders(101), 24, 3, 3, num_workers)
    num_steps = 11
    wanted, _ = ids_of_steps(config, 1, num_steps)
    rng = np.random.default_rng(num_workers)
    for worlds in ((2, 1), (1, 2), (4, 2, 1), (1, 1, 1)) if num_workers == 0 else ((2, 1),):
        stops = [0, *sorted(rng.integers(1, num_steps, len(worlds) - 1).tolist()), num_steps]
        steps: list[list[int]] = []
        position = Position()
        for world_size, begin, end in zip(worlds, stops, stops[1:], strict=False):
            more, after = ids_of_steps(config, world_size, end - begin, position)
            steps += more
            position = Position(**json.loads(json.dumps(dataclasses.asdict(after))))
        assert steps == wanted, (worlds, stops)


def test_the_position_counts_what_was_handed_out(folders: Any) -> None:
    # Workers read ahead, the last steps of an epoch and the first of the next included.
    for num_workers in (0, 2):
        with closing(Loader(config_for(folders(101), 24, 24, num_workers=num_workers), 0, 1)) as loader:
            assert loader.steps_per_epoch == 4
            positions = [loader.position]
            for batches in loader:
                positions.append(loader.position)
                assert batches[0].epoch == positions[-2].epoch
                if len(positions) == 7:
                    break
        assert positions == [*(Position(0, 24 * k) for k in range(4)), *(Position(1, 24 * k) for k in range(3))]


def test_a_position_in_the_dropped_tail_begins_the_next_epoch(folders: Any) -> None:
    config = config_for(folders(101))
    assert ids_of_steps(config, 1, 2, Position(0, 96)) == ids_of_steps(config, 1, 2, Position(1, 0))


def test_another_global_batch_goes_on_at_the_same_sample(folders: Any) -> None:
    small, large = config_for(folders(101), 12), config_for(folders(101), 36)
    first, position = ids_of_steps(small, 1, 3)
    then, after = ids_of_steps(large, 2, 1, position)
    everything, _ = ids_of_steps(small, 1, 6)
    assert sorted([*chain(*first), *then[0]]) == sorted(chain(*everything))
    assert after == Position(1, 0)


def test_a_position_of_larger_shards_is_refused(folders: Any) -> None:
    with pytest.raises(UserError, match=r"data\.shards: expected more than 96 samples.*got 47.*began with"):
        Loader(config_for(folders(47)), 0, 1, Position(2, 96))


# ---------------------------------------------------------------------------------------------------------------------
# The batches


def test_batches_hold_the_raw_samples(folders: Any) -> None:
    for num_workers in (0, 2):
        steps, _ = run_rank(config_for(folders(101), num_workers=num_workers), 1, 2, 5)
        for batch in (batch for batches in steps for batch in batches):
            assert (batch.ids_B.dtype, batch.latents_BCYX.dtype) == (torch.int64, torch.float32)
            assert batch.labels_B.dtype == torch.int64
            ids = batch.ids_B.tolist()
            np.testing.assert_array_equal(batch.latents_BCYX.numpy(), np.stack([latent_of(i) for i in ids]))
            assert batch.labels_B.tolist() == [(i - 1000) // 3 % 3 for i in ids]


def test_mirroring_is_a_function_of_seed_epoch_and_id(folders: Any) -> None:
    def mirrored(config: Config, world_size: int) -> dict[tuple[int, int], bool]:
        """Whether (epoch, id) came mirrored; anything but the sample or its flip along X fails."""
        found = {}
        for rank in range(world_size):
            steps, _ = run_rank(config, rank, world_size, 16)
            for batch in (batch for batches in steps for batch in batches):
                for i, latent_CYX in zip(batch.ids_B.tolist(), batch.latents_BCYX.numpy(), strict=True):
                    plain = latent_of(i).astype(np.float32)
                    is_plain = np.array_equal(latent_CYX, plain)
                    assert is_plain or np.array_equal(latent_CYX, plain[:, :, ::-1])
                    found[batch.epoch, i] = not is_plain
        return found

    folder = folders(101)
    one = mirrored(config_for(folder, mirror_prob=0.5), 1)
    assert len(one) == 4 * 96
    # 384 fair coins: six standard deviations are 59.
    assert abs(sum(one.values()) - 192) < 59
    assert mirrored(config_for(folder, 24, 3, mirror_prob=0.5, num_workers=2), 2) == one
    other_order = mirrored(config_for(folder, 12, 3, 3, mirror_prob=0.5), 4)
    in_both_orders = other_order.keys() & one.keys()
    assert len(in_both_orders) > 100
    assert all(one[key] == other_order[key] for key in in_both_orders)
    in_both = [i for epoch, i in one if epoch == 0 and (1, i) in one]
    assert any(one[0, i] != one[1, i] for i in in_both)
    reseeded = mirrored(config_for(folder, mirror_prob=0.5, seed=6), 1)
    assert any(one[key] != value for key, value in reseeded.items() if key in one)
    assert not any(mirrored(config_for(folder, mirror_prob=0.0), 1).values())
    assert all(mirrored(config_for(folder, mirror_prob=1.0), 1).values())


def test_the_global_generators_are_left_alone(folders: Any) -> None:
    torch_state, numpy_state = torch.get_rng_state(), repr(np.random.get_state(legacy=False)["state"])
    for num_workers in (0, 2):
        run_rank(config_for(folders(101), mirror_prob=0.5, num_workers=num_workers), 0, 1, 5)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert repr(np.random.get_state(legacy=False)["state"]) == numpy_state


def test_a_batch_moves_with_all_its_tensors(folders: Any) -> None:
    (batch,) = run_rank(config_for(folders(101), 24, 24), 0, 1, 1)[0][0]
    moved = batch.to("meta")
    assert moved.epoch == batch.epoch
    for name in ("ids_B", "latents_BCYX", "labels_B"):
        assert getattr(moved, name).device.type == "meta"
        assert getattr(moved, name).shape == getattr(batch, name).shape


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def test_closing_ends_the_workers(folders: Any) -> None:
    before = set(multiprocessing.active_children())
    shared_before = set(os.listdir("/dev/shm"))
    loader = Loader(config_for(folders(101), num_workers=2), 0, 1)
    next(loader)
    assert len(set(multiprocessing.active_children()) - before) == 2
    loader.close()
    loader.close()
    assert set(multiprocessing.active_children()) == before
    assert set(os.listdir("/dev/shm")) == shared_before
    assert loader.position == Position(0, 24)
    with pytest.raises(AssertionError, match="closed"):
        next(loader)


def test_shards_that_do_not_fit_are_refused(folders: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.global_batch_size: expected at most 47"):
        Loader(config_for(folders(47), 48), 0, 1)
    with pytest.raises(UserError, match=r"data\.shards.*does not exist"):
        Loader(config_for(tmp_path / "nowhere"), 0, 1)


def test_the_fingerprint_is_the_folders(folders: Any) -> None:
    with closing(Loader(config_for(folders(101)), 0, 1)) as loader:
        assert loader.fingerprint.startswith(fingerprint(folders(101)))


def gather_ids(config: Config, num_steps: int) -> tuple[list[list[int]], set[str]]:
    """Runs in every rank: the sorted ids of each global batch, and what is left in shared memory."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    before = set(os.listdir("/dev/shm"))
    steps, _ = run_rank(config, dist.get_rank(), dist.get_world_size(), num_steps)
    mine = [[i for batch in batches for i in batch.ids_B.tolist()] for batches in steps]
    theirs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(theirs, mine)
    return [sorted(chain(*shares)) for shares in zip(*theirs, strict=True)], set(os.listdir("/dev/shm")) - before


# Ranks of the loader share nothing, so the tests above run them one after another; here they are processes.
@pytest.mark.parametrize(("world_size", "num_workers"), [(2, 2), pytest.param(4, 0, marks=pytest.mark.slow)])
def test_real_ranks_see_the_same_global_batches(folders: Any, world_size: int, num_workers: int) -> None:
    wanted, _ = ids_of_steps(config_for(folders(101)), 1, 9)
    config = config_for(folders(101), 24, 3, num_workers=num_workers)
    for steps, left in run_in_processes(gather_ids, world_size, config, 9):
        assert steps == wanted
        assert not left
