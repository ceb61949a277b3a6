"""What holds for every test."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests import processes
from tests.digits import write_digits

# No test passes or fails by the clock.
settings.register_profile("timeless", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("timeless")


@pytest.fixture(autouse=True)
def _no_rank_is_left_running() -> Iterator[None]:
    yield
    processes.end_ranks()


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 100 real digits; tests read them only."""
    return write_digits(tmp_path_factory.mktemp("data") / "digits")
