import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cfpretrain.base import runtime
from cfpretrain.base.console import UserError
from cfpretrain.evaluation.neighbours import precision_recall
from tests.processes import run_in_processes


def oracle_inside(points: np.ndarray, centres: np.ndarray, k: int) -> float:
    """Share of points inside a ball, one pair of points at a time."""
    num_inside = 0
    radii = []
    for i, centre in enumerate(centres):
        others = [float(((centre - other) ** 2).sum()) for j, other in enumerate(centres) if j != i]
        radii.append(sorted(others)[k - 1])
    for point in points:
        num_inside += any(float(((point - c) ** 2).sum()) <= r for c, r in zip(centres, radii, strict=True))
    return num_inside / len(points)


@settings(max_examples=60, deadline=None)
@given(
    num_real=st.integers(5, 25),
    num_generated=st.integers(5, 25),
    k=st.integers(1, 4),
    block=st.integers(1, 30),
    seed=st.integers(0, 10_000),
)
def test_equals_brute_force_with_ties_and_duplicates(
    num_real: int, num_generated: int, k: int, block: int, seed: int
) -> None:
    # A small integer lattice: equal points and equal distances abound, and squared distances are exact.
    numbers = np.random.default_rng(seed)
    real = numbers.integers(0, 4, (num_real, 3)).astype(np.float64)
    generated = numbers.integers(0, 5, (num_generated, 3)).astype(np.float64)
    precision, recall = precision_recall(torch.tensor(real), torch.tensor(generated), k=k, block=block)
    assert precision == oracle_inside(generated, real, k)
    assert recall == oracle_inside(real, generated, k)


def test_blocks_do_not_change_the_result() -> None:
    generator = torch.Generator().manual_seed(0)
    real, generated = torch.randn(90, 8, generator=generator), 1.1 * torch.randn(70, 8, generator=generator)
    whole = precision_recall(real, generated)
    assert 0.1 < whole[0] < 0.99
    assert all(precision_recall(real, generated, block=block) == whole for block in (1, 7, 64, 1000))


def brute_force(points_NF: Tensor, centres_MF: Tensor, k: int) -> float:
    def distances(rows: Tensor, columns: Tensor) -> Tensor:
        return torch.cdist(rows.double(), columns.double(), compute_mode="donot_use_mm_for_euclid_dist")

    radii_M = distances(centres_MF, centres_MF).fill_diagonal_(torch.inf).kthvalue(k, dim=1).values
    return float((distances(points_NF, centres_MF) <= radii_M).any(1).double().mean())


def sets(kind: str) -> tuple[Tensor, Tensor]:
    """Real and generated points, float32, as networks give them and as failed models do."""
    generator = torch.Generator().manual_seed(3)
    real = torch.randn(300, 64, generator=generator).relu() + 5
    generated = 1.05 * torch.randn(250, 64, generator=generator).relu() + 5
    if kind == "copies of real images":
        generated[::2] = real[:125]
    elif kind == "copies among themselves":
        real[100:200], generated[50:150] = real[:100], generated[:1]
    elif kind == "one constant image":
        generated[:] = generated[0]
    elif kind == "the same constant image":
        real[:], generated[:] = real[0], real[0]
    elif kind == "nearly equal images":
        generated = real[0] + 1e-6 * torch.randn(250, 64, generator=generator)
    elif kind == "one outlier":
        real[7] *= 1e8
    else:
        assert kind == "unlike"
    return real, generated


@pytest.mark.parametrize("block", [2048, 37])
@pytest.mark.parametrize(
    "kind",
    [
        "unlike",
        "copies of real images",
        "copies among themselves",
        "one constant image",
        "the same constant image",
        "nearly equal images",
        "one outlier",
    ],
)
def test_equals_brute_force_on_features(kind: str, block: int) -> None:
    real, generated = sets(kind)
    expected = brute_force(generated, real, 3), brute_force(real, generated, 3)
    assert precision_recall(real, generated, block=block) == expected


def share_work(real: np.ndarray, generated: np.ndarray) -> tuple[float, float]:
    runtime.start(torch.device("cpu"))
    return precision_recall(torch.from_numpy(real), torch.from_numpy(generated), block=37, together=True)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_work(world_size: int) -> None:
    real, generated = sets("copies among themselves")
    expected = precision_recall(real, generated)
    assert run_in_processes(share_work, world_size, real.numpy(), generated.numpy()) == [expected] * world_size


def test_a_set_against_itself_is_perfect() -> None:
    points = torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
    assert precision_recall(points, points.clone()) == (1.0, 1.0)


def test_one_mode_has_precision_without_recall() -> None:
    generator = torch.Generator().manual_seed(2)
    modes = torch.tensor([[0.0, 0.0], [100.0, 0.0]]).repeat(50, 1)
    real = modes + torch.randn(100, 2, generator=generator)
    generated = torch.randn(100, 2, generator=generator)
    precision, recall = precision_recall(real, generated)
    assert precision > 0.9
    assert 0.4 < recall <= 0.5


def test_an_image_is_not_its_own_neighbour_but_its_copy_is() -> None:
    spread = torch.tensor([[0.0], [1.0], [3.0]])
    near = torch.tensor([[0.5], [0.9]])
    assert precision_recall(spread, near, k=1)[0] == 1.0
    copies = torch.tensor([[0.0], [0.0], [5.0], [5.0]])
    assert precision_recall(copies, near, k=1)[0] == 0.0


@pytest.mark.parametrize(("num_real", "num_generated", "who"), [(3, 10, "real"), (10, 3, "generated")])
def test_too_few_images_are_refused(num_real: int, num_generated: int, who: str) -> None:
    with pytest.raises(UserError, match=f"more than k = 3 {who} images, got 3"):
        precision_recall(torch.rand(num_real, 2), torch.rand(num_generated, 2))
