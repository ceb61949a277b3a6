"""The loss over the paper's two axes: noise level and AR position."""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cfpretrain.core.ar import step_begin
from cfpretrain.core.model import CausalFusion
from cfpretrain.core.objective import DenoisingLoss

_BATCH = 256


@torch.no_grad()
def measure_loss_map(
    model: CausalFusion, loss: DenoisingLoss, latents_NCYX: Tensor, labels_N: Tensor, num_bins: int, passes: int
) -> tuple[NDArray[np.float64], list[float], list[float]]:
    """Mean squared error of the prediction, by timestep and by the number of clean tokens before the AR step.

    Splits, orders and timesteps follow their training laws; labels are not dropped and AR weights not applied.

    Args:
        model: the network.
        loss: the training objective.
        latents_NCYX: as the model sees them.
        labels_N: int64.
        num_bins: bins of the timesteps.
        passes: how often every image is used, each time with other draws.

    Returns:
        (errors [num_bins, L], NaN where nothing fell; edges of the timesteps; edges of the positions).
    """
    objective = replace(loss, label_drop_prob=0.0)
    num_tokens, device, num_timesteps = model.grid**2, latents_NCYX.device, loss.process.num_timesteps
    latents_NCYX, labels_N = latents_NCYX.cpu(), labels_N.cpu()
    totals, counts = torch.zeros(2, num_bins * num_tokens, dtype=torch.float64)
    for epoch in range(passes):
        for step, ids_B in enumerate(torch.arange(len(latents_NCYX)).chunk(-(-len(latents_NCYX) // _BATCH))):
            shared = epoch * len(latents_NCYX) + step
            draws = objective.draw(shared, epoch, ids_B, labels_N[ids_B], num_tokens, model.patch_values)
            batch = objective.prepare(latents_NCYX[ids_B], draws)
            error_BL = objective(model, batch.to(device)).squared_error_BLP.mean(-1).cpu()
            level_B = (draws.timesteps_B * num_bins // num_timesteps).long()
            cell_BL = level_B[:, None] * num_tokens + step_begin(draws.steps_BL)
            totals.index_add_(0, cell_BL.flatten(), error_BL.double().flatten())
            counts.index_add_(0, cell_BL.flatten(), torch.ones(cell_BL.numel(), dtype=torch.float64))
    errors = (totals / counts).reshape(num_bins, num_tokens).numpy()
    timestep_edges = np.linspace(0, num_timesteps, num_bins + 1).tolist()
    return errors, timestep_edges, list(range(num_tokens + 1))
