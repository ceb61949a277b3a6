"""A run folder made of a checkpoint that others wrote: it trains on and is sampled from as one of our own."""

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cfpretrain.autoencoder import KLAutoencoder
from cfpretrain.base import files, runtime
from cfpretrain.base.config import Config, to_plain, to_yaml
from cfpretrain.base.console import UserError
from cfpretrain.base.outputs import whole_or_nothing
from cfpretrain.base.plans import tensor_differences
from cfpretrain.data.shards import read_latents_info
from cfpretrain.export.foreign_files import check_finite
from cfpretrain.run.build import CHECKPOINTS, CONFIG_FILE, make_model
from cfpretrain.run.checkpoint import EMA, WEIGHTS, tensor_file
from cfpretrain.run.checkpoint_store import CheckpointStore
from cfpretrain.run.guard import Guard
from cfpretrain.run.state import TrainingState
from cfpretrain.run.tensor_files import Shapes, bytes_of, write_ranges

# (one of CONTENTS, name of a parameter) -> its values, in full shape, of at most 32 bits
ReadTensor = Callable[[str, str], Tensor]

CONTENTS = (WEIGHTS, EMA, "exp_avg", "exp_avg_sq")  # of a run that trains with AdamW
POSITIONS = "image_embedder.pos_embed"
_X_PROJ = "image_embedder.x_proj.weight"
_CLASS_TABLE = "class_embedder.embedding_table.weight"
_COND_POSITIONS = "class_embedder.cond_pos_embed"
_Q_NORM = "trunk.blocks.0.attn.q_norm.weight"


@dataclass(frozen=True)
class Counters:
    """Where the imported training stands; its place in the data is not known, so an epoch begins."""

    step: int  # optimizer steps taken or skipped
    optimizer_step: int  # updates that the moments are of; 0 where they begin at 0
    num_skipped: int = 0


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


def expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The parameters of the config's model."""
    with torch.device("meta"):
        model = make_model(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def check_shapes(found: Shapes, config: Config, source: str, beside: Shapes | None = None) -> None:
    """Refuses tensors that are not those of the config's model.

    Args:
        found: under our names.
        config: says what they should be.
        source: where they are from, for the message.
        beside: tensors that may be there too.
    """
    expected = expected_shapes(config)
    expected |= {name: shape for name, shape in (beside or {}).items() if name in found}
    there, here = _sizes(found), _sizes(expected)
    problems = [
        f"{key}: expected {here[key]}, got {there[key]}" for key in here if there.get(key, here[key]) != here[key]
    ]
    different = " | ".join(problems) or tensor_differences(found, expected)
    if different:
        raise UserError(
            f"{source} does not fit the config: {'' if problems else 'tensors '}{different}; give the config of its "
            "model, or set these keys on the command line"
        )


def _sizes(shapes: Shapes) -> dict[str, int]:
    """What the shapes say of a model, by the keys of the config; nothing where they are those of no model."""
    try:
        (width, patch_values), (head_width,) = shapes[_X_PROJ], shapes[_Q_NORM]
        sizes = {
            "model.width": width,
            "model.depth": len({name.split(".")[2] for name in shapes if name.startswith("trunk.blocks.")}),
            "model.num_heads": width // head_width,
            "model.num_cond_tokens": shapes[_COND_POSITIONS][1],
            "model.num_classes": shapes[_CLASS_TABLE][0] - 1,
            "model.patch_size ** 2 * model.latent_channels": patch_values,
        }
        if POSITIONS in shapes:
            sizes["(model.latent_size / model.patch_size) ** 2"] = shapes[POSITIONS][1]
    except (KeyError, ValueError, IndexError, ZeroDivisionError):
        return {}
    return sizes


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_run(folder: Path, config: Config, counters: Counters, read_tensor: ReadTensor, source: str) -> None:
    """Writes a run folder with one complete checkpoint: it is there whole or not at all.

    Host memory is bounded by the largest tensor.

    Args:
        folder: nothing may be there.
        config: of the run; `run.folder` becomes `folder`.
        counters: where training goes on.
        read_tensor: asked for each parameter of the config's model and each content, one at a time.
        source: where they are from, for messages.
    """
    if config.train.optimizer != "adamw":
        raise UserError(
            f"train.optimizer: expected adamw, whose state an imported run begins with, got {config.train.optimizer}"
        )
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, folder=str(folder)))
    with whole_or_nothing(folder, "RUN") as unfinished:
        files.make_folder(unfinished)
        files.replace(unfinished / CONFIG_FILE, to_yaml(config))
        state = _make_state(config, counters)
        _write_checkpoint(unfinished / CHECKPOINTS, state, expected_shapes(config), read_tensor, source)


def _make_state(config: Config, counters: Counters) -> TrainingState:
    class_names, autoencoder = _latents_of(config)
    return TrainingState(
        step=counters.step,
        optimizer_step=counters.optimizer_step,
        num_skipped=counters.num_skipped,
        num_rewinds=0,
        epoch=0,
        samples_in_epoch=0,
        train_seconds=0.0,
        seed=config.run.seed,
        config=to_plain(config),
        history=[],
        class_names=class_names,
        autoencoder=autoencoder,
        working_folder=str(Path.cwd()),
        data_fingerprint="",  # any data will do
        guard=Guard(config.guard).to_plain(),
        wandb_run_id=None,
        versions=runtime.package_versions("torch"),
    )


def _latents_of(config: Config) -> tuple[list[str], str]:
    """The names of the classes and the autoencoder's fingerprint, where the config's data or autoencoder is at hand."""
    if Path(config.data.shards[0]).is_dir():
        with suppress(UserError):  # said where training on is asked for
            info = read_latents_info(config.data.shards[0])
            is_of_them = len(info.class_names) == config.model.num_classes
            return list(info.class_names) if is_of_them else [], info.autoencoder
    if Path(config.data.autoencoder).is_dir() and config.data.autoencoder:
        return [], KLAutoencoder.load(config.data.autoencoder, "cpu").fingerprint
    return [], ""


def _write_checkpoint(folder: Path, state: TrainingState, shapes: Shapes, read_tensor: ReadTensor, source: str) -> None:
    store = CheckpointStore(folder, keep_last=1, keep_every_steps=0)
    partial = store.path(state.step, ".partial")
    files.make_folder(partial)
    hashes = {}
    for content in CONTENTS:
        whole = (
            (name, 0, bytes_of(_as_stored(read_tensor(content, name), f"{source}: {content} of {name}")))
            for name in sorted(shapes)
        )
        hashes[content] = write_ranges(tensor_file(partial, content), shapes, state.step, whole, with_header=True)
    store.publish(state.step, [hashes], state.to_json())


def _as_stored(values: Tensor, what: str) -> Tensor:
    stored = values.detach().resolve_neg().float().contiguous()
    check_finite(stored, what)
    return stored
