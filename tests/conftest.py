"""What holds for every test."""

from collections.abc import Iterator

import pytest

from tests import processes


@pytest.fixture(autouse=True)
def _no_rank_is_left_running() -> Iterator[None]:
    yield
    processes.end_ranks()
