"""What holds for every test."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import processes
from tests.digits import write_digits
from tests.strictness import FOREIGN_WARNINGS

# No test passes or fails by the clock.
settings.register_profile("timeless", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("timeless")

# Torch says some things once a process: what is wrong in one test would be hidden in the next.
torch.set_warn_always(True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ignores foreign warnings by marks: `pytest -W error` overrules filters in pyproject.toml, but not those."""
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
