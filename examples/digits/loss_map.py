"""The loss over the paper's two axes, noise level and AR position: measured, and drawn as a heat map.

Beside it, where captions are learned, their loss over the places of a text.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cfpretrain.autoencoder import deterministic_convolutions
from cfpretrain.base.config import Config
from cfpretrain.core.ar import step_begin
from cfpretrain.core.modalities import IMAGE
from cfpretrain.core.model import CausalFusion
from cfpretrain.core.objective import DenoisingLoss
from cfpretrain.core.texts import TEXT
from cfpretrain.data.online import OnlineEncoder, TrainingData
from cfpretrain.data.samples import ImageFiles, Visits, place_images
from cfpretrain.evaluation.figures import Floats, label_log, make_figure, quiet_ticks, save
from cfpretrain.evaluation.pictures import INK, PAPER, QUIET

from matplotlib.axes import Axes  # isort: skip  # after `figures`, which says how it is imported
from matplotlib.figure import Figure  # isort: skip
from matplotlib.ticker import MaxNLocator  # isort: skip

_BATCH = 256


def read_means(data: TrainingData, config: Config, most: int) -> tuple[Tensor, Tensor, list[str]]:
    """Raw latents of at most so many samples from all over the first folder, their labels and captions.

    They are means of posteriors, not mirrored; those of images are encoded as training encodes them, and bad images
    left out where training skips them. Of interleaved samples, those of the first image.
    """
    shards = data.folders[0]
    places = np.linspace(0, len(shards) - 1, min(len(shards), most)).round().astype(int).tolist()
    samples = shards.samples(places)
    labels_N = torch.tensor([int(sample["label"]) for sample in samples])
    captions = [str(sample["caption"]) for sample in samples]
    if not data.encodings:
        shape = data.latents[0].latent_shape
        means = [sample["mean"].reshape(-1, *shape)[0] for sample in samples]
        return torch.from_numpy(np.stack(means)).float(), labels_N, captions
    ids_N = torch.tensor([int(sample["id"]) for sample in samples])
    images = ImageFiles.of(Visits(step=0, epoch=0, ids_B=ids_N, labels_B=labels_N, columns=samples))
    with deterministic_convolutions():
        moments, skipped = OnlineEncoder(data.encodings, config).moments(images, torch.zeros_like(ids_N).bool())
    sample_I, _ = place_images(len(samples), images.segments)
    first_N = torch.searchsorted(sample_I, torch.arange(len(samples)))
    good = [place for place in range(len(samples)) if place not in skipped]
    return moments["mean"][first_N[good]].float(), labels_N[good], [captions[place] for place in good]


@torch.no_grad()
def measure_loss_map(
    model: CausalFusion,
    loss: DenoisingLoss,
    latents_NCYX: Tensor,
    labels_N: Tensor,
    num_bins: int,
    passes: int,
    texts: Sequence[Sequence[int]] = (),
) -> tuple[Floats, list[float], list[float]]:
    """Mean squared error of the prediction, by timestep and by the number of clean tokens before the AR step.

    Splits, orders and timesteps follow their training laws, and so does what samples with texts are trained as, but
    for interleaved ones, which are left out; no condition is dropped and AR weights are not applied. Latents are as the
    model sees them, and each is used `passes` times, with other draws each time. `texts` are the tokens of each one's
    caption.

    Returns:
        (errors [num_bins, L], NaN where nothing fell; edges of the timesteps; edges of the positions).
    """
    objective = _without_drops(loss)
    num_tokens, device, num_timesteps = model.grid**2, latents_NCYX.device, loss.process.num_timesteps
    latents_NCYX, labels_N = latents_NCYX.cpu(), labels_N.cpu()
    totals, counts = torch.zeros(2, num_bins * num_tokens, dtype=torch.float64)
    for epoch in range(passes):
        for step, ids_B in enumerate(torch.arange(len(latents_NCYX)).chunk(-(-len(latents_NCYX) // _BATCH))):
            shared = epoch * len(latents_NCYX) + step
            draws = objective.draw(shared, epoch, ids_B, labels_N[ids_B], num_tokens, model.patch_values)
            batch = objective.prepare(
                latents_NCYX[ids_B], draws, (), [texts[i] for i in ids_B.tolist()] if texts else ()
            )
            error_BL = objective(model, batch.to(device))[IMAGE].squared_error_BLP.mean(-1).cpu()
            level_B = (draws.timesteps_B * num_bins // num_timesteps).long()
            cells = (level_B[:, None] * num_tokens + step_begin(draws.steps_BL)).flatten()
            totals += cells.bincount(error_BL.double().flatten(), num_bins * num_tokens)
            counts += cells.bincount(minlength=num_bins * num_tokens)
    errors = (totals / counts).reshape(num_bins, num_tokens).numpy()
    timestep_edges = np.linspace(0, num_timesteps, num_bins + 1).tolist()
    return errors, timestep_edges, list(range(num_tokens + 1))


def _without_drops(loss: DenoisingLoss, task: str | None = None) -> DenoisingLoss:
    """The loss of samples that have all that they are conditioned on; `task`: all are trained as it."""
    tasks = loss.tasks
    if tasks is not None:
        weights = tasks.weights if task is None else {task: 1.0}
        pairs = {name: weight for name, weight in weights.items() if name != "interleaved" and weight}
        # Where there are none but interleaved samples, images without any condition.
        lacks_text = 0.0 if pairs else 1.0
        weights = pairs or {"text_to_image": 1.0}
        tasks = replace(tasks, weights=weights, text_drop_prob=lacks_text, image_drop_prob=0.0)
    return replace(loss, label_drop_prob=0.0, tasks=tasks)


@torch.no_grad()
def measure_text_losses(
    model: CausalFusion, loss: DenoisingLoss, latents_NCYX: Tensor, labels_N: Tensor, texts: Sequence[Sequence[int]]
) -> Floats:
    """Mean -log p of the next token of captions behind their images, by the place in the text; arguments as above."""
    objective, device = _without_drops(loss, "image_to_text"), latents_NCYX.device
    totals, counts = torch.zeros(2, 2 + max(map(len, texts)), dtype=torch.float64)
    for ids_B in torch.arange(len(texts)).split(_BATCH):
        labels_B = labels_N.cpu()[ids_B]
        draws = objective.draw(0, 0, ids_B, labels_B, model.grid**2, model.patch_values)
        batch = objective.prepare(latents_NCYX.cpu()[ids_B], draws, (), [texts[i] for i in ids_B.tolist()]).to(device)
        entering = [one.keep_clean(num) for one, num in zip(batch.segments, batch.num_clean, strict=True)]
        logits_BTV = model(entering, batch.intervals_BMI, place_BM=batch.place_BM)[TEXT]
        (text,) = (one for one in entering if one.kind == TEXT)
        assert text.targets is not None
        assert text.weights_BL is not None
        assert text.positions_BL is not None
        error_BT = F.cross_entropy(logits_BTV.float().transpose(1, 2), text.targets, reduction="none") * text.weights_BL
        places = text.positions_BL.flatten().cpu()
        totals += places.bincount(error_BT.flatten().double().cpu(), len(totals))
        counts += places.bincount(text.weights_BL.flatten().double().cpu(), len(totals))
    return (totals / counts)[:-1].numpy()  # nothing follows the last token


def draw_loss_map(
    path: Path,
    loss_TS: Floats,
    timestep_edges: Sequence[float],
    position_edges: Sequence[float],
    title: str,
    text_loss_T: Floats | None = None,
) -> None:
    """Writes the errors of `measure_loss_map` as a PNG; cells in which nothing fell are hatched.

    `text_loss_T`: those of `measure_text_losses`, below; None: there are no texts.
    """
    figure = make_figure(8.2, 4.8 if text_loss_T is None else 7.4, title)
    if text_loss_T is None:
        axes = figure.subplots()
    else:
        axes, below = figure.subplots(2, 1, height_ratios=[4.8, 2.6])
        _draw_text_losses(below, text_loss_T)
    _draw_map(figure, axes, loss_TS, timestep_edges, position_edges)
    save(figure, path)


def _draw_text_losses(axes: Axes, text_loss_T: Floats) -> None:
    axes.bar(range(1, len(text_loss_T) + 1), text_loss_T, color="#2563a8")
    axes.set_xlabel("place in the text of the token that is predicted; the last ones are of the longest texts alone")
    axes.set_ylabel("mean -log p")
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    quiet_ticks(axes)


def _draw_map(
    figure: Figure,
    axes: Axes,
    loss_TS: Floats,
    timestep_edges: Sequence[float],
    position_edges: Sequence[float],
) -> None:
    from matplotlib.colors import LogNorm, Normalize  # after `figures`, which says how it is imported

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
