"""A run folder made of a checkpoint that others wrote: it trains on and is sampled from as one of our own."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cfpretrain.autoencoder import KLAutoencoder
from cfpretrain.base import config as configs
from cfpretrain.base import files, outputs, runtime
from cfpretrain.base.config import Config, to_plain, to_yaml
from cfpretrain.base.console import UserError, phase, say
from cfpretrain.base.differences import tensor_differences
from cfpretrain.data.shards import LatentsInfo, read_info
from cfpretrain.export.foreign_files import check_finite
from cfpretrain.run.build import CHECKPOINTS, CONFIG_FILE, TOKENIZER_FILE, checked, make_tokenizer, parameter_shapes
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
_Q_NORM, _PROJ = "trunk.blocks.0.attn.q_norm.weight", "trunk.blocks.0.attn.proj.weight"


@dataclass(frozen=True)
class Counters:
    """Where the imported training stands; its place in the data is not known, so an epoch begins."""

    step: int  # optimizer steps taken or skipped
    optimizer_step: int  # updates that the moments are of; 0 where they begin at 0
    num_skipped: int = 0


@dataclass(frozen=True)
class ForeignCheckpoint:
    """A checkpoint that others wrote, found and checked; its parameters are those of the config's model."""

    source: str  # argument and path, for messages
    counters: Counters
    read_tensor: ReadTensor  # asked for one at a time, so that host memory is bounded by the largest
    about: str = ""  # printed after the number of parameters


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


def check_shapes(found: Shapes, config: Config, source: str, beside: Shapes | None = None) -> None:
    """Refuses tensors that are not those of the config's model, under our names; those of `beside` may be there too."""
    expected = parameter_shapes(config)
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
            "model.num_heads": shapes[_PROJ][1] // head_width,
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


def import_run(
    folder: Path,
    paths: Sequence[str],
    overrides: Sequence[str],
    allow_env: bool,
    read: Callable[[Config], ForeignCheckpoint],
    source: Path,
) -> None:
    """Makes a run folder of a checkpoint that others wrote, under a config of `config.load`'s arguments."""
    outputs.refuse_existing(folder, "RUN")
    config = checked(configs.load(paths, overrides, allow_env))
    with phase(f"reading {source}"):
        found = read(config)
    with phase(f"writing {folder}"):
        write_run(folder, config, found)
    num_parameters = sum(map(math.prod, parameter_shapes(config).values()))
    say(f"{folder}: {num_parameters:,} parameters {found.about}; train on with")
    say(f"    deepspeed cfpretrain/train.py --config {folder}/config.yaml")


def write_run(folder: Path, config: Config, found: ForeignCheckpoint) -> None:
    """Writes a run folder with one complete checkpoint, of the config with another `run.folder`: whole or not there."""
    if config.train.optimizer != "adamw":
        raise UserError(
            f"train.optimizer: expected adamw, whose state an imported run begins with, got {config.train.optimizer}"
        )
    tokenizer, data = make_tokenizer(config), config.data
    if tokenizer is not None:  # a copy in the folder is what the run goes on with
        data = dataclasses.replace(data, tokenizer=str(folder / TOKENIZER_FILE))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, folder=str(folder)), data=data)
    class_names, autoencoder = _latents_of(config)
    state = TrainingState(
        **dataclasses.asdict(found.counters),
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
        tokenizer="" if tokenizer is None else tokenizer.fingerprint,
    )
    with outputs.whole_or_nothing(folder, "RUN") as unfinished:
        files.make_folder(unfinished)
        files.replace(unfinished / CONFIG_FILE, to_yaml(config))
        if tokenizer is not None:
            files.replace(unfinished / TOKENIZER_FILE, tokenizer.to_json())
        _write_checkpoint(unfinished / CHECKPOINTS, state, parameter_shapes(config), found)


def _latents_of(config: Config) -> tuple[list[str], str]:
    """The names of the classes and the autoencoder's fingerprint, where the config's data or autoencoder is at hand."""
    names: list[str] = []
    if Path(config.data.shards[0]).is_dir():
        with suppress(UserError):  # said where training on is asked for
            info = read_info(config.data.shards[0])
            if len(info.class_names) == config.model.num_classes:
                names = list(info.class_names)
            if isinstance(info, LatentsInfo):
                return names, info.autoencoder
    if Path(config.data.autoencoder).is_dir() and config.data.autoencoder:
        return names, KLAutoencoder.load(config.data.autoencoder, "cpu").fingerprint
    return names, ""


def _write_checkpoint(folder: Path, state: TrainingState, shapes: Shapes, found: ForeignCheckpoint) -> None:
    store = CheckpointStore(folder, keep_last=1, keep_every_steps=0)
    partial = store.path(state.step, ".partial")
    files.make_folder(partial)

    def read(content: str, name: str) -> memoryview:
        stored = found.read_tensor(content, name).detach().resolve_neg().float().contiguous()
        check_finite(stored, f"{found.source}: {content} of {name}")
        return bytes_of(stored)

    hashes = {}
    for content in CONTENTS:
        whole = ((name, 0, read(content, name)) for name in sorted(shapes))
        hashes[content] = write_ranges(tensor_file(partial, content), shapes, state.step, whole, with_header=True)
    store.publish(state.step, [hashes], state.to_json())
