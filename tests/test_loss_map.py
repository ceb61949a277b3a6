"""The loss over noise level and AR position."""

import dataclasses

import numpy as np
import pytest
import torch

from cfpretrain.core import seeds
from cfpretrain.core.process import make_process
from cfpretrain.evaluation.loss_map import measure_loss_map
from tests.test_loss import LOSS
from tests.test_transformer import small_model

LATENTS = seeds.normal(seeds.fold(seeds.key(0, "latents"), torch.arange(40)), (1, 6, 6))
LABELS = torch.arange(40) % 5


@pytest.mark.parametrize(
    ("process", "expected"), [(make_process(), 1), (make_process("flow", flow_times="uniform"), 2)], ids=str
)
def test_a_model_that_predicts_nothing_has_the_same_loss_everywhere(process, expected) -> None:
    model, loss = small_model(random_head=False), dataclasses.replace(LOSS, process=process)
    errors, timestep_edges, position_edges = measure_loss_map(model, loss, LATENTS, LABELS, num_bins=4, passes=50)
    assert errors.shape == (4, 9)
    assert timestep_edges == [0.0, 250.0, 500.0, 750.0, 1000.0]
    assert position_edges == list(range(10))
    # The error of predicting 0 is the square of standard normal noise; of a velocity, of noise and as much image.
    assert np.nanmax(abs(errors / expected - 1)) < 0.5
    assert abs(np.nanmean(errors) / expected - 1) < 0.05


def test_cells_without_samples_are_nan() -> None:
    errors, *_ = measure_loss_map(small_model(), LOSS, LATENTS[:2], LABELS[:2], num_bins=50, passes=1)
    assert np.isnan(errors).any()
    assert np.isfinite(errors).any()
