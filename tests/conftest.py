"""What holds for every test."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import processes
from tests.digits import small_run, write_digits
from tests.strictness import FOREIGN_WARNINGS

# No test passes or fails by the clock.
settings.register_profile("timeless", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("timeless")

# Torch says some things once a process: what is wrong in one test would be hidden in the next.
torch.set_warn_always(True)


# Where several processes take file after file, those that wait run beside those that compute, and the last one ends
# with a short one.
_LONGEST_FIRST = [
    "watchdog",
    "stopping",
    "engine",
    "train_autoencoder",
    "evaluator",
    "replay",
    "block_causal",
    "s3",
    "memory",
    "train",
    "image_runs",
    "planted_links",
    "device_runs",
    "make_shards",
    "encode_latents",
    "sample",
    "sick_runs",
    "checkpoint_writer",
    "measure_launches",
    "elastic",
    "loader",
    "online",
    "nothing_is_run",
    "evaluate_fid",
    "measure_step",
    "given_folders",
    "runtime",
    "mosaic",
    "extending",
    "crash_test",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ignores foreign warnings by marks: `pytest -W error` overrules filters in pyproject.toml, but not those."""
    places = {f"test_{name}.py": place for place, name in enumerate(_LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    for item in items:
        for message, category in FOREIGN_WARNINGS.items():
            item.add_marker(pytest.mark.filterwarnings(f"ignore:{message}:{category.__name__}"))


@pytest.fixture(autouse=True)
def _no_rank_is_left_running() -> Iterator[None]:
    yield
    processes.end_ranks()


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 100 real digits; tests read them only."""
    return write_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture(scope="session")
def whole_run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 12 steps on 2 ranks, over two epochs of 6 steps and a tail; tests read it only."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    for ended in processes.run_script("cfpretrain/train.py", small_run(shards, folder), 2):
        assert ended.code == 0, ended.err
    return folder
