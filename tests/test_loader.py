"""The loader: one order for any number of ranks, no sample twice in an epoch, exact resume."""

import dataclasses
import gc
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cfpretrain.base.config import Config
from cfpretrain.base.console import UserError
from cfpretrain.core import seeds
from cfpretrain.data import reader
from cfpretrain.data.loader import Loader, Position, epoch_order, epoch_visits
from cfpretrain.data.samples import Samples
from cfpretrain.data.shards import INFO_FILE, INFO_HASH, Shards
from tests.latent_shards import as_read, config_for, id_of, moment_of, write_samples
from tests.processes import REPOSITORY, run_in_processes, shared_memory, wait_until

PINNED_FIRST = [71, 37, 14, 65, 93, 13, 73, 82, 18, 66, 40, 54]
PINNED_HASH = "b3f8d50e88a4f4f5253aadf6079e8777a7969ab1f07e302502a05571062abd6b"


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gives a folder of so many samples, in shards of twenty; tests read it only."""
    root = tmp_path_factory.mktemp("loader")

    def make(num_samples: int, **settings: Any) -> Path:
        folder = root / "-".join([str(num_samples), *(f"{name}={value}" for name, value in settings.items())])
        return folder if folder.exists() else write_samples(folder, num_samples, **settings)

    return make


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def run_rank(
    config: Config, rank: int, world_size: int, num_steps: int, position: Position | None = None, **options: int
) -> tuple[list[list[Samples]], Position]:
    """The batches of one rank's next steps, and the position after them."""
    with closing(Loader(config, as_read, rank, world_size, position, **options)) as loader:
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


@given(
    sizes=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=5), min_size=1, max_size=4),
    repeats=st.lists(st.sampled_from([0.3, 0.5, 1.0, 1.0, 1.7, 2.0, 3.25]), min_size=4, max_size=4),
    num_canonical_nodes=st.integers(1, 4),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 20),
)
def test_an_epoch_visits_each_folder_as_often_as_it_says(
    sizes: list[list[int]], repeats: list[float], num_canonical_nodes: int, seed: int, epoch: int
) -> None:
    counts = [sum(folder) for folder in sizes]
    wanted = [round(count * repeat) for count, repeat in zip(counts, repeats, strict=False)]
    assume(sum(wanted) >= num_canonical_nodes)
    config = config_for(
        ["unused"] * len(sizes), 1, 1, num_canonical_nodes, seed=seed, repeat=tuple(repeats[: len(sizes)])
    )
    arrays = [np.array(folder) for folder in sizes]
    visits = epoch_visits(config, arrays, epoch)
    np.testing.assert_array_equal(visits, epoch_visits(config, arrays, epoch))
    assert len(set(visits.tolist())) == len(visits) == sum(wanted)
    places, repetitions = visits & ((1 << 56) - 1), visits >> 56
    ends = np.cumsum(counts)
    for folder, (end, count) in enumerate(zip(ends, counts, strict=True)):
        mine = (places >= end - count) & (places < end)
        assert mine.sum() == wanted[folder]
        # Whole repetitions first: no sample comes a second time before all have come once.
        times = np.bincount(places[mine] - (end - count), minlength=count)
        assert times.max() - times.min() <= 1
        assert all(set(repetitions[places == place].tolist()) == set(range(n)) for place, n in _counted(places[mine]))


def _counted(places: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(*(column.tolist() for column in np.unique(places, return_counts=True)), strict=True))


def test_the_random_part_of_a_folder_is_another_in_each_epoch() -> None:
    config = config_for("unused", repeat=(0.5,))
    chosen = [frozenset(epoch_visits(config, [np.full(5, 20)], epoch).tolist()) for epoch in range(4)]
    assert len(set(chosen)) == 4
    assert len(frozenset.union(*chosen)) > 80


def test_the_order_of_one_folder_is_that_of_earlier_versions() -> None:
    """Runs go on under a new version: their place in the data means what it meant."""
    visits = epoch_visits(config_for("unused", num_canonical_nodes=3, seed=7), [np.array([20, 20, 20, 20, 20, 1])], 4)
    assert visits[:12].tolist() == PINNED_FIRST
    assert hashlib.sha256(visits.astype("<i8").tobytes()).hexdigest() == PINNED_HASH


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


@settings(max_examples=12)
@given(data=st.data())
def test_any_stop_any_ranks_any_workers(folders: Any, data: st.DataObject) -> None:
    """The witness is the list of ids: what each step of an uninterrupted run on one rank sees, every other run sees."""
    sizes = data.draw(st.lists(st.sampled_from([24, 47, 101]), min_size=1, max_size=3, unique=True))
    repeat = tuple(data.draw(st.sampled_from([1.0, 1.0, 0.5, 1.5, 2.0])) for _ in sizes)
    common = {
        "global_batch_size": data.draw(st.sampled_from([4, 8, 12])),
        "num_canonical_nodes": data.draw(st.integers(1, 4)),
        "seed": data.draw(st.integers(0, 1 << 30)),
        "repeat": repeat,
        "mirror_prob": 0.5,
    }
    paths = [folders(size) for size in sizes]
    num_steps = data.draw(st.integers(1, 12))
    stops = sorted(data.draw(st.lists(st.integers(0, num_steps), max_size=2)))
    wanted, end = ids_of_steps(config_for(paths, micro_batch_size=4, **common), 1, num_steps)
    found: list[list[int]] = []
    position = Position()
    for begin, stop in itertools.pairwise([0, *stops, num_steps]):
        world_size, micro = data.draw(st.sampled_from([(1, 4), (1, 2), (2, 2), (2, 1), (4, 1)]))
        # Workers read two to four micro-batches ahead of the stop.
        config = config_for(
            paths, micro_batch_size=micro, num_workers=data.draw(st.sampled_from([0, 0, 1, 2])), **common
        )
        steps, position = ids_of_steps(config, world_size, stop - begin, position)
        found += steps
    assert found == wanted
    assert position == end


def test_over_an_epoch_each_id_comes_exactly_once(folders: Any) -> None:
    paths = [folders(24), folders(48)]
    for world_size, micro, num_workers in ((1, 4, 0), (2, 2, 2), (4, 1, 1)):
        config = config_for(paths, 8, micro, num_canonical_nodes=3, num_workers=num_workers)
        steps, after = ids_of_steps(config, world_size, 2 * 9)
        assert after == Position(2, 0)
        everything = sorted([id_of(i) for i in range(24)] + [id_of(i) + (1 << 40) for i in range(48)])
        assert sorted(chain(*steps[:9])) == sorted(chain(*steps[9:])) == everything


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
        with closing(Loader(config_for(folders(101), 24, 24, num_workers=num_workers), as_read, 0, 1)) as loader:
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
        Loader(config_for(folders(47)), as_read, 0, 1, Position(2, 96))


# ---------------------------------------------------------------------------------------------------------------------
# The batches


def test_batches_hold_the_raw_samples(folders: Any) -> None:
    for num_workers in (0, 2):
        steps, _ = run_rank(config_for(folders(101), num_workers=num_workers), 1, 2, 5)
        for batch in (batch for batches in steps for batch in batches):
            assert (batch.ids_B.dtype, batch.latents_BCYX.dtype) == (torch.int64, torch.float32)
            assert batch.labels_B.dtype == torch.int64
            ids = batch.ids_B.tolist()
            np.testing.assert_array_equal(batch.latents_BCYX.numpy(), np.stack([moment_of(i) for i in ids]))
            assert batch.labels_B.tolist() == [(i - 1000) // 3 % 3 for i in ids]


def test_mirroring_is_a_function_of_seed_epoch_and_id(folders: Any) -> None:
    def mirrored(config: Config, world_size: int) -> dict[tuple[int, int], bool]:
        """Whether (epoch, id) came mirrored; anything but the sample or its flip along X fails."""
        found = {}
        for rank in range(world_size):
            steps, _ = run_rank(config, rank, world_size, 16)
            for batch in (batch for batches in steps for batch in batches):
                for i, latent_CYX in zip(batch.ids_B.tolist(), batch.latents_BCYX.numpy(), strict=True):
                    plain = moment_of(i).astype(np.float32)
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


def latents_by_visit(config: Config, world_size: int, num_steps: int) -> dict[tuple[int, int], np.ndarray]:
    """(epoch, id) -> the latent that training sees."""
    found: dict[tuple[int, int], np.ndarray] = {}
    for rank in range(world_size):
        steps, _ = run_rank(config, rank, world_size, num_steps)
        for batch in chain(*steps):
            found |= zip(((batch.epoch, i) for i in batch.ids_B.tolist()), batch.latents_BCYX.numpy(), strict=True)
    return found


@pytest.mark.parametrize("shape", [(2, 4, 4), (5, 3, 3), (16, 16, 16)])
def test_latents_are_drawn_from_the_posterior_of_the_image_or_of_its_mirror(folders: Any, shape: Any) -> None:
    folder = folders(48, shape=shape, has_posterior=True, has_mirror=True)
    found = latents_by_visit(config_for(folder, 24, 24, shape=shape, mirror_prob=0.5), 1, 4)
    num_mirrored, noises = 0, []
    for (epoch, i), latent_CYX in found.items():
        keys = seeds.fold(seeds.fold(torch.stack([seeds.key(5, "mirror"), seeds.key(5, "posterior")]), epoch), i)
        mirrored = bool(seeds.uniform(keys[0]) < 0.5)
        prefix = "mirror_" * mirrored
        mean, log_variance = (
            moment_of(i, prefix + name, shape).astype(np.float64) for name in ("mean", "log_variance")
        )
        noise = seeds.normal(keys[1], shape).numpy()
        np.testing.assert_allclose(latent_CYX, mean + np.exp(log_variance / 2) * noise, rtol=1e-5, atol=1e-6)
        num_mirrored += mirrored
        noises.append(noise)
    assert 24 < num_mirrored < 72  # of 96 fair coins: five standard deviations
    assert len({noise.tobytes() for noise in noises}) == 96


def test_a_latent_does_not_depend_on_what_is_drawn_with_it(folders: Any) -> None:
    """Not on the micro-batch, the ranks, the workers, or threads; to the last bit, for shapes that fill no vector."""
    for shape in ((5, 3, 3), (2, 4, 4)):
        folder = folders(48, shape=shape, has_posterior=True, has_mirror=True)
        settings = {"shape": shape, "mirror_prob": 0.5}
        wanted = latents_by_visit(config_for(folder, 24, 24, **settings), 1, 4)
        assert len(wanted) == 96
        for world_size, micro, num_workers in ((1, 1, 0), (1, 3, 1), (2, 12, 0), (2, 4, 2), (4, 2, 0), (8, 3, 0)):
            config = config_for(folder, 24, micro, num_workers=num_workers, **settings)
            found = latents_by_visit(config, world_size, 4)
            assert found.keys() == wanted.keys()
            assert all(np.array_equal(found[visit], wanted[visit]) for visit in wanted)


def test_repetitions_of_a_sample_are_other_draws_under_other_ids(folders: Any) -> None:
    paths = [folders(n, has_posterior=True, has_mirror=True) for n in (24, 48)]
    found = latents_by_visit(config_for(paths, 24, 24, repeat=(2.0, 1.0)), 1, 4)
    assert len(found) == 96
    for place in range(24):
        in_first, in_second = (found[0, id_of(place) + (folder << 40)] for folder in (0, 1))
        again = found[0, id_of(place) + (1 << 56)]
        assert not np.array_equal(in_first, again)
        assert not np.array_equal(in_first, in_second)


def test_folders_that_differ_are_refused(folders: Any) -> None:
    paths = [folders(47), folders(48, has_posterior=True, has_mirror=True)]
    with pytest.raises(UserError, match=r"data\.shards: .*: expected autoencoder as in the first folder"):
        Loader(config_for(paths), as_read, 0, 1)


def test_mirrors_that_were_not_encoded_are_refused(folders: Any) -> None:
    folder = folders(47, has_posterior=True)
    with pytest.raises(UserError, match=r"data\.mirror_prob: expected 0"):
        Loader(config_for(folder, mirror_prob=0.5), as_read, 0, 1)
    assert len(latents_by_visit(config_for(folder, num_workers=2), 1, 1)) == 24


def test_the_global_generators_are_left_alone(folders: Any) -> None:
    torch_state, numpy_state = torch.get_rng_state(), repr(np.random.get_state(legacy=False)["state"])
    for num_workers in (0, 2):
        run_rank(config_for(folders(101), mirror_prob=0.5, num_workers=num_workers), 0, 1, 5)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert repr(np.random.get_state(legacy=False)["state"]) == numpy_state


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_prepared_for_the_steps_that_they_are_for(folders: Any, num_workers: int) -> None:
    """And where nothing of the training process's state can enter: in the workers, where there are some."""
    config = config_for(folders(101), 24, 6, num_workers=num_workers)

    def prepare(samples: Samples, step: int) -> tuple[int, int, list[int]]:
        return os.getpid(), step, samples.ids_B.tolist()

    with closing(Loader(config, prepare, 0, 1, Position(1, 72), step=7)) as loader:
        steps = [next(loader) for _ in range(3)]
    read, _ = run_rank(config, 0, 1, 3, Position(1, 72))
    assert [[ids for _, _, ids in batches] for batches in steps] == [[b.ids_B.tolist() for b in bs] for bs in read]
    assert [{step for _, step, _ in batches} for batches in steps] == [{7}, {8}, {9}]
    processes = {process for batches in steps for process, _, _ in batches}
    assert (os.getpid() in processes) == (num_workers == 0)


def test_a_step_read_ahead_is_not_counted_before_it_is_taken(folders: Any, tmp_path: Path) -> None:
    """And what cannot be read is known before it is asked for."""
    folder = copy_of(folders(101), tmp_path)
    wanted, _ = run_rank(config_for(folder), 0, 1, 2)
    with closing(Loader(config_for(folder), as_read, 0, 1)) as loader:
        loader.read_ahead()
        loader.read_ahead()
        assert (loader.position, loader.problem) == (Position(0, 0), None)
        for path in folder.glob("shard.*"):
            path.unlink()
        assert torch.equal(next(loader)[0].ids_B, wanted[0][0].ids_B)
        assert loader.position == Position(0, 24)
        loader.read_ahead()
        assert loader.problem is not None
        with pytest.raises(UserError, match=re.escape(loader.problem)):
            next(loader)
        assert loader.position == Position(0, 24)


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def test_closing_ends_the_workers(folders: Any) -> None:
    before = set(multiprocessing.active_children())
    shared_before = shared_memory()
    loader = Loader(config_for(folders(101), num_workers=2), as_read, 0, 1)
    next(loader)
    assert len(set(multiprocessing.active_children()) - before) == 2
    loader.close()
    loader.close()
    assert set(multiprocessing.active_children()) == before
    wait_until(lambda: shared_memory() <= shared_before)
    assert loader.position == Position(0, 24)
    with pytest.raises(AssertionError, match="closed"):
        next(loader)


def assert_reads(loader: Loader, wanted: list[list[Samples]]) -> None:
    for step in wanted:
        for batch, expected in zip(next(loader), step, strict=True):
            assert torch.equal(batch.latents_BCYX, expected.latents_BCYX)


def error_while_reading(folder: Path, num_workers: int, damage: Callable[[], object]) -> str:
    """What the loader says where `damage` happens after its start; the samples before are those of a whole folder."""
    wanted, _ = run_rank(config_for(folder, 24, 3), 0, 1, 8)
    with closing(Loader(config_for(folder, 24, 3, num_workers=num_workers), as_read, 0, 1)) as loader:
        damage()
        with pytest.raises(UserError) as raised:
            assert_reads(loader, wanted)
    assert "\n" not in str(raised.value)
    assert not multiprocessing.active_children()
    return str(raised.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_damaged_under_a_run(folders: Any, tmp_path: Path, num_workers: int) -> None:
    folder = copy_of(folders(101), tmp_path)
    path = folder / "shard.00002.mds"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(moment_of(id_of(45)).tobytes()) + 7] ^= 1
    message = error_while_reading(folder, num_workers, lambda: path.write_bytes(flipped))
    assert message.startswith(f"data.shards: {path}: sample ")
    assert "is damaged (its checksum differs); copy the file from where it is whole" in message
    path.write_bytes(whole)
    message = error_while_reading(folder, num_workers, lambda: path.write_bytes(whole[:-9]))
    assert message.startswith(f"data.shards: {path}: expected a file of {len(whole)} bytes, got {len(whole) - 9}; copy")
    path.write_bytes(whole)
    message = error_while_reading(folder, num_workers, path.unlink)
    assert message.startswith(f"data.shards: {path}: expected a file of {len(whole)} bytes, it is missing; copy")


def test_an_index_that_names_a_missing_file_is_seen_before_the_first_step(folders: Any, tmp_path: Path) -> None:
    folder = copy_of(folders(101), tmp_path)
    index = folder / "index.json"
    index.write_text(index.read_text().replace("shard.00002.mds", "shard.00009.mds"))
    with pytest.raises(UserError, match=r"data\.shards: .*/shard\.00009\.mds: .*it is missing; copy it from where"):
        Loader(config_for(folder, num_workers=2), as_read, 0, 1)


def read_steps(loader: Loader, num_steps: int) -> None:
    for _ in range(num_steps):
        next(loader)


def test_a_worker_that_is_killed(folders: Any) -> None:
    with closing(Loader(config_for(folders(101), num_workers=2), as_read, 0, 1)) as loader:
        next(loader)
        victim = multiprocessing.active_children()[0]
        os.kill(victim.pid or 0, signal.SIGKILL)
        victim.join()  # where torch would raise, in whatever the main thread does
        with pytest.raises(UserError, match=r"data\.num_workers: a process that reads data ended by SIGKILL") as raised:
            read_steps(loader, 20)
        assert "\n" not in str(raised.value)
    assert not multiprocessing.active_children()


def test_a_worker_that_is_killed_with_batches_on_their_way(folders: Any) -> None:
    """What it has handed over lies with it, and cannot be fetched any more."""
    with closing(Loader(config_for(folders(101), num_workers=1), as_read, 0, 1)) as loader:
        next(loader)
        [victim] = multiprocessing.active_children()
        time.sleep(1)  # until the queue is full
        os.kill(victim.pid or 0, signal.SIGKILL)
        victim.join()
        with pytest.raises(UserError, match=r"data\.num_workers: a process that reads data ended by SIGKILL"):
            read_steps(loader, 20)


def end_at_once(_: int) -> None:
    os._exit(3)


def test_a_worker_that_dies_at_its_start(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "leave_signals_to_the_rank", end_at_once)
    monkeypatch.setattr(multiprocessing, "active_children", list)  # dead before they were counted
    ended = pytest.raises(UserError, match=r"data\.num_workers: a process that reads data ended at its start")
    with closing(Loader(config_for(folders(101), num_workers=1), as_read, 0, 1)) as loader, ended:
        next(loader)


class Destroyed:
    """In a ring with itself; says where the collection of garbage found it."""

    def __init__(self, where: Path) -> None:
        self.where, self.ring = where, self

    def __del__(self) -> None:
        self.where.write_text(str(os.getpid()))


def test_workers_do_not_collect_the_garbage_of_the_training_process(folders: Any, tmp_path: Path) -> None:
    """Its destructors may wait for threads that a fork has not."""

    def prepare(samples: Samples, step: int) -> Samples:
        gc.collect()
        return samples

    gc.disable()
    try:
        Destroyed(tmp_path / "where")
        with closing(Loader(config_for(folders(101), num_workers=1), prepare, 0, 1)) as loader:
            next(loader)
        assert not (tmp_path / "where").exists()
    finally:
        gc.enable()
    gc.collect()
    assert (tmp_path / "where").read_text() == str(os.getpid())


def read_on(folder: Path, started: str) -> None:
    """A rank that has read some steps, and would go on."""
    with closing(Loader(config_for(folder, num_workers=2), as_read, 0, 1)) as loader:
        read_steps(loader, 3)
        Path(started).write_text(" ".join(str(worker.pid) for worker in multiprocessing.active_children()))
        time.sleep(60)


UNCLOSED = """
import json, sys
from cfpretrain.data.loader import Loader
from tests.latent_shards import as_read, config_for
loader = Loader(config_for(sys.argv[1], num_workers=1, **json.loads(sys.argv[2])), as_read, 0, 1)
next(loader)
sys.exit(2)
"""


def test_a_process_that_an_error_ends_does_not_wait_for_its_workers(folders: Any) -> None:
    command = [sys.executable, "-c", UNCLOSED, str(folders(101)), "{}"]
    assert subprocess.run(command, cwd=REPOSITORY, timeout=120).returncode == 2


def test_a_killed_run_leaves_nothing_that_stops_the_next(folders: Any, tmp_path: Path) -> None:
    before = shared_memory()
    started = tmp_path / "started"
    rank = multiprocessing.get_context("fork").Process(target=read_on, args=(folders(101), str(started)))
    rank.start()
    wait_until(lambda: started.exists() and bool(started.read_text()))
    workers = [int(pid) for pid in started.read_text().split()]
    os.kill(rank.pid or 0, signal.SIGKILL)
    rank.join()
    # At once, while the workers of the dead rank are still there.
    ids_of_steps(config_for(folders(101), num_workers=2), 1, 5)
    wait_until(lambda: not any(_is_running(worker) for worker in workers))
    wait_until(lambda: shared_memory() <= before)


def _is_running(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def test_waiting_is_counted(folders: Any) -> None:
    with closing(Loader(config_for(folders(101)), as_read, 0, 1)) as loader:
        assert loader.waited_seconds == 0
        next(loader)
        assert loader.waited_seconds > 0


def test_shards_that_do_not_fit_are_refused(folders: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.global_batch_size: expected at most 47"):
        Loader(config_for(folders(47), 48), as_read, 0, 1)
    with pytest.raises(UserError, match=r"data\.shards.*does not exist"):
        Loader(config_for(tmp_path / "nowhere"), as_read, 0, 1)


def test_the_fingerprint_is_the_folders(folders: Any) -> None:
    with closing(Loader(config_for(folders(101)), as_read, 0, 1)) as loader:
        assert loader.fingerprint.startswith(Shards(folders(101)).fingerprint)


def gather_ids(config: Config, num_steps: int) -> list[list[int]]:
    """Runs in every rank, and leaves nothing in shared memory: the sorted ids of each global batch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    before = shared_memory()
    steps, _ = run_rank(config, dist.get_rank(), dist.get_world_size(), num_steps)
    mine = [[i for batch in batches for i in batch.ids_B.tolist()] for batches in steps]
    theirs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(theirs, mine)
    wait_until(lambda: shared_memory() <= before)
    return [sorted(chain(*shares)) for shares in zip(*theirs, strict=True)]


# Ranks of the loader share nothing, so the tests above run them one after another; here they are processes.
@pytest.mark.parametrize(("world_size", "num_workers"), [(2, 2), pytest.param(4, 0, marks=pytest.mark.slow)])
def test_real_ranks_see_the_same_global_batches(folders: Any, world_size: int, num_workers: int) -> None:
    wanted, _ = ids_of_steps(config_for(folders(101)), 1, 9)
    config = config_for(folders(101), 24, 3, num_workers=num_workers)
    for steps in run_in_processes(gather_ids, world_size, config, 9):
        assert steps == wanted


def test_a_label_of_no_class_is_refused_where_it_is_read(tmp_path: Path) -> None:
    """A checksum says that it was written so."""
    folder = write_samples(tmp_path / "shards", 24)
    description, index = (json.loads((folder / name).read_text()) for name in (INFO_FILE, "index.json"))
    text = json.dumps(description | {"class_names": ["a", "b"]})
    (folder / INFO_FILE).write_text(text)
    (folder / "index.json").write_text(json.dumps(index | {INFO_HASH: hashlib.blake2b(text.encode()).hexdigest()}))
    config = config_for(folder)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=2))
    what = rf"^data.shards: {folder}/shard.0000\d.mds: sample \d+ is damaged \(its label is 2, of 2 classes\); .*$"
    with closing(Loader(config, as_read, 0, 1)) as loader, pytest.raises(UserError, match=what):
        next(loader)
