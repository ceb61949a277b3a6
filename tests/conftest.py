"""What holds for every test."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests import processes

# No test passes or fails by the clock.
settings.register_profile("timeless", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("timeless")


@pytest.fixture(autouse=True)
def _no_rank_is_left_running() -> Iterator[None]:
    yield
    processes.end_ranks()
