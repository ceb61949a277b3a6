"""What holds for every test."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import processes
from tests.digits import write_digits

# No test passes or fails by the clock.
settings.register_profile("timeless", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("timeless")

# Torch says some things once a process: what is wrong in one test would then be hidden in the next.
torch.set_warn_always(True)

# Other people's warnings that a test cannot avoid. As marks of every test they hold under `pytest -W error` too, which
# overrules filters in pyproject.toml.
FOREIGN_WARNINGS = [
    # Torch 2.11, as it first imports inductor: for compiled blocks and FlexAttention.
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
    # Dynamo looks at it while it traces with gradients, and hides the warning but from filters that make it an error.
    "ignore:The .grad attribute of a Tensor",
    # Inductor recommends them on a GPU; the tolerances of fp32 do not.
    "ignore:TensorFloat32 tensor cores",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ignores `FOREIGN_WARNINGS`, below what a test's own marks say."""
    for item in items:
        for warning in FOREIGN_WARNINGS:
            item.add_marker(pytest.mark.filterwarnings(warning), append=False)


@pytest.fixture(autouse=True)
def _no_rank_is_left_running() -> Iterator[None]:
    yield
    processes.end_ranks()


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 100 real digits; tests read them only."""
    return write_digits(tmp_path_factory.mktemp("data") / "digits")
