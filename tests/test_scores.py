"""Small sets of images beside a floor."""

from pathlib import Path

import pytest
import torch

from cfpretrain.base import runtime
from examples.digits.embedded import distances_beside_floor
from tests import small_features
from tests.image_files import digits
from tests.processes import run_in_processes

CPU = torch.device("cpu")


def distances() -> dict[str, float]:
    runtime.start(CPU)
    try:
        real, other = (torch.from_numpy(digits(first, 400)).permute(0, 3, 1, 2) for first in (0, 900))
        noise = torch.randint(256, (333, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        candidates = {"other": other, "noise": noise, "few": real[:150]}
        return distances_beside_floor(real, candidates, small_features.make(CPU, Path()))
    finally:
        runtime.stop()


def test_small_sets_lie_beside_their_floor_on_any_ranks() -> None:
    [one] = run_in_processes(distances, 1)
    assert one["real_against_real"] < one["other"] < one["noise"] / 3
    for found in (*run_in_processes(distances, 2), *run_in_processes(distances, 4)):
        assert found == pytest.approx(one, rel=1e-9)


def test_sets_are_cut_to_one_size() -> None:
    """Fewer images lie farther away, so a small set makes all others small."""
    real = torch.from_numpy(digits(0, 300)).permute(0, 3, 1, 2)
    extractor = small_features.make(CPU, Path())
    found = distances_beside_floor(real, {"few": real[:40], "many": real[:70]}, extractor)
    cut = distances_beside_floor(real, {"few": real[:40], "many": real[:40]}, extractor)
    assert found == cut
    assert found["many"] == found["few"]
    whole = distances_beside_floor(real, {}, extractor)
    assert whole["real_against_real"] < found["real_against_real"]
