"""The loss over the paper's two axes, noise level and AR position: measured, and drawn as a heat map."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cfpretrain.autoencoder import deterministic_convolutions
from cfpretrain.base.config import Config
from cfpretrain.core.ar import step_begin
from cfpretrain.core.modalities import IMAGE
from cfpretrain.core.model import CausalFusion
from cfpretrain.core.objective import DenoisingLoss
from cfpretrain.data.online import OnlineEncoder, TrainingData
from cfpretrain.data.samples import ImageFiles, Visits, place_images
from cfpretrain.evaluation.figures import Floats, label_log, make_figure, quiet_ticks, save
from cfpretrain.evaluation.pictures import INK, PAPER, QUIET

_BATCH = 256


def read_means(data: TrainingData, config: Config, most: int) -> tuple[Tensor, Tensor]:
    """Raw latents of at most so many samples from all over the first folder, and their labels.

    They are means of posteriors, not mirrored; those of images are encoded as training encodes them, and bad images
    left out where training skips them. Of interleaved samples, those of the first image.
    """
    shards = data.folders[0]
    places = np.linspace(0, len(shards) - 1, min(len(shards), most)).round().astype(int).tolist()
    samples = shards.samples(places)
    labels_N = torch.tensor([int(sample["label"]) for sample in samples])
    if not data.encodings:
        shape = data.latents[0].latent_shape
        means = [sample["mean"].reshape(-1, *shape)[0] for sample in samples]
        return torch.from_numpy(np.stack(means)).float(), labels_N
    ids_N = torch.tensor([int(sample["id"]) for sample in samples])
    images = ImageFiles.of(Visits(step=0, epoch=0, ids_B=ids_N, labels_B=labels_N, columns=samples))
    with deterministic_convolutions():
        moments, skipped = OnlineEncoder(data.encodings, config).moments(images, torch.zeros_like(ids_N).bool())
    sample_I, _ = place_images(len(samples), images.segments)
    first_N = torch.searchsorted(sample_I, torch.arange(len(samples)))
    good = [place for place in range(len(samples)) if place not in skipped]
    return moments["mean"][first_N[good]].float(), labels_N[good]


@torch.no_grad()
def measure_loss_map(
    model: CausalFusion, loss: DenoisingLoss, latents_NCYX: Tensor, labels_N: Tensor, num_bins: int, passes: int
) -> tuple[Floats, list[float], list[float]]:
    """Mean squared error of the prediction, by timestep and by the number of clean tokens before the AR step.

    Splits, orders and timesteps follow their training laws; labels are not dropped and AR weights not applied. Latents
    are as the model sees them, and each is used `passes` times, with other draws each time.

    Returns:
        (errors [num_bins, L], NaN where nothing fell; edges of the timesteps; edges of the positions).
    """
    # Of a model with texts, images of their classes, or without any condition where there are no classes.
    weights = {"class_to_image" if loss.null_class else "text_to_image": 1.0}
    tasks = None if loss.tasks is None else replace(loss.tasks, weights=weights, text_drop_prob=1.0)
    objective = replace(loss, label_drop_prob=0.0, tasks=tasks)
    num_tokens, device, num_timesteps = model.grid**2, latents_NCYX.device, loss.process.num_timesteps
    latents_NCYX, labels_N = latents_NCYX.cpu(), labels_N.cpu()
    totals, counts = torch.zeros(2, num_bins * num_tokens, dtype=torch.float64)
    for epoch in range(passes):
        for step, ids_B in enumerate(torch.arange(len(latents_NCYX)).chunk(-(-len(latents_NCYX) // _BATCH))):
            shared = epoch * len(latents_NCYX) + step
            draws = objective.draw(shared, epoch, ids_B, labels_N[ids_B], num_tokens, model.patch_values)
            batch = objective.prepare(latents_NCYX[ids_B], draws)
            error_BL = objective(model, batch.to(device))[IMAGE].squared_error_BLP.mean(-1).cpu()
            level_B = (draws.timesteps_B * num_bins // num_timesteps).long()
            cells = (level_B[:, None] * num_tokens + step_begin(draws.steps_BL)).flatten()
            totals += cells.bincount(error_BL.double().flatten(), num_bins * num_tokens)
            counts += cells.bincount(minlength=num_bins * num_tokens)
    errors = (totals / counts).reshape(num_bins, num_tokens).numpy()
    timestep_edges = np.linspace(0, num_timesteps, num_bins + 1).tolist()
    return errors, timestep_edges, list(range(num_tokens + 1))


def draw_loss_map(
    path: Path, loss_TS: Floats, timestep_edges: Sequence[float], position_edges: Sequence[float], title: str
) -> None:
    """Writes the errors of `measure_loss_map` as a PNG; cells in which nothing fell are hatched."""
    from matplotlib.colors import LogNorm, Normalize  # after `figures`, which says how it is imported

    figure = make_figure(8.2, 4.8, title)
    axes = figure.subplots()
    axes.set_facecolor("#eceff3")
    axes.set_xlabel("noise level: timestep t of the diffusion (0 = clean)")
    axes.set_ylabel("AR position: clean tokens\nbefore the AR step")
    axes.set_xlim(timestep_edges[0], timestep_edges[-1])
    axes.set_ylim(position_edges[0], position_edges[-1])
    for side in axes.spines.values():
        side.set_visible(False)
    quiet_ticks(axes)
    known = loss_TS[np.isfinite(loss_TS)]
    if len(known) == 0:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color=QUIET)
        save(figure, path)
        return
    spread_is_large = known.min() > 0 and known.max() > 8 * known.min()
    limits = (float(known.min()), float(known.max()))
    scale = LogNorm(*limits) if spread_is_large else Normalize(*limits)
    whole = (timestep_edges[0], timestep_edges[-1]), position_edges[0], position_edges[-1]
    axes.fill_between(*whole, hatch="///", facecolor="#eceff3", edgecolor="#c3c9d2", lw=0)
    mesh = axes.pcolormesh(
        timestep_edges, position_edges, loss_TS.T, norm=scale, cmap="viridis", edgecolor=PAPER, linewidth=0.6
    )
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=24)
    bar.set_label("mean squared error per value" + (" (log scale)" if spread_is_large else ""), color=INK)
    bar.outline.set_visible(False)
    quiet_ticks(bar.ax)
    if spread_is_large:
        label_log(bar.ax.yaxis)
    save(figure, path)
