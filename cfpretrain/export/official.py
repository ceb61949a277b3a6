"""The official CausalFusion code's checkpoints and ours, both ways: an exact renaming, every tensor bit for bit."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cfpretrain.base import outputs
from cfpretrain.base.config import Config
from cfpretrain.base.console import UserError, say
from cfpretrain.core.modalities import sincos_positions
from cfpretrain.export import foreign_files
from cfpretrain.export.imported_run import POSITIONS, Counters, ForeignCheckpoint, check_shapes
from cfpretrain.run import build

_OURS_BY_OFFICIAL = {
    "x_proj.": "image_embedder.x_proj.",
    "pos_embed": "image_embedder.pos_embed",
    "t_embedder.": "image_embedder.t_embedder.",
    "y_embedder.embedding_table.": "class_embedder.embedding_table.",
    "cond_pos_embed": "class_embedder.cond_pos_embed",
    "blocks.": "trunk.blocks.",
    "final_layer.0.": "noise_head.norm.",
    "final_layer.1.": "noise_head.linear.",
}
# What torch's data parallelism and compiler put before every name.
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")
# The official files' keys for what we call weights and EMA.
_KEYS: dict[Literal["weights", "ema"], str] = {"weights": "model", "ema": "ema"}
# An exact widening to fp32 exists from these.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# An average of a table that never moves drifts by rounding: up to half a last bit a step, over some 1 / (1 - decay).
_POSITION_DRIFT = 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# Names


def _rename(name: str, prefixes: Mapping[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name[len(old) :]
    raise ValueError(f"tensor {name!r} is not part of a CausalFusion model; known: {', '.join(prefixes)}")


def our_name(name: str) -> str:
    """The official name of a parameter, or ours, with or without what wrappers put before it -> ours.

    Raises:
        ValueError: the model has no such parameter.
    """
    name = _WRAPPERS.sub("", name)
    return name if name.startswith(tuple(_OURS_BY_OFFICIAL.values())) else _rename(name, _OURS_BY_OFFICIAL)


def our_names(names: Iterable[str], source: str) -> dict[str, str]:
    """`our_name` of each parameter of a checkpoint, by the name that it has there."""
    try:
        renamed = {name: our_name(name) for name in names}
    except ValueError as error:
        raise UserError(f"{source}: {error}; give a checkpoint of CausalFusion") from error
    if len(set(renamed.values())) < len(renamed):
        raise UserError(f"{source}: expected each tensor once, got some under two names; give another file")
    return renamed


def to_official(tensors: Mapping[str, Tensor], grid: int) -> dict[str, Tensor]:
    """Our names -> the official ones; fixed sin-cos positions are written out, as the official state dict has them.

    Raises:
        ValueError: a tensor that the official model does not have.
    """
    official_by_ours = {ours: official for official, ours in _OURS_BY_OFFICIAL.items()}
    renamed = {_rename(name, official_by_ours): value for name, value in tensors.items()}
    if "pos_embed" not in renamed:
        renamed["pos_embed"] = sincos_positions(grid, renamed["x_proj.bias"].shape[0])[None]
    return renamed


# ---------------------------------------------------------------------------------------------------------------------
# Files


def read_official(file: Path, config: Config, step: int) -> ForeignCheckpoint:
    """The weights and averages of an official checkpoint, or of a bare state dict; the moments of Adam are 0.

    Prints what is left out, or is used as both. The tensors must be those of `config.model`.

    Args:
        file: .pt or .safetensors; nothing in it is run.
        config: of the run to be made.
        step: that the weights are of, which the file does not say.
    """
    _check_is_official(config)
    source = f"FILE: {file}"
    content = foreign_files.read(file, "FILE", placeholders=["argparse.Namespace"])
    found = {ours: content[key] for ours, key in _KEYS.items() if isinstance(content.get(key), Mapping)}
    left_out = sorted(str(key) for key in content if key not in _KEYS.values()) if found else []
    if left_out:
        say(f"left out of {file}: {', '.join(left_out)}")
    taken = {ours: _take(tensors, config, source) for ours, tensors in (found or {"weights": content}).items()}
    if len(taken) == 1:
        missing = next((key for ours, key in _KEYS.items() if ours not in taken), None)
        what = f"has no key {missing!r}" if found else "is a bare state dict"
        say(f"WARNING: {file} {what}: its one set of tensors becomes both the weights and their averages (EMA)")
        taken = dict.fromkeys(_KEYS, *taken.values())
    say("the optimizer starts from zero: Adam's moments are 0 (whatever state the file has of one is not used)")

    def read_tensor(content: str, name: str) -> Tensor:
        return taken[content][name] if content in taken else torch.zeros(taken["weights"][name].shape)

    return ForeignCheckpoint(source, Counters(step, optimizer_step=0), read_tensor, f"at step {step}")


def _check_is_official(config: Config) -> None:
    """Refuses a config whose model the official code does not have."""
    if not config.model.has_paper_blocks:
        raise UserError(
            "model.trunk: expected the blocks of causalfusion, which official models have, got "
            f"{config.model.trunk}{config.model.block_changes or ''}"
        )
    if config.noise.process != "epsilon":
        raise UserError(f"noise.process: expected epsilon, which official models predict, got {config.noise.process}")


def _take(tensors: Mapping[Any, Any], config: Config, source: str) -> dict[str, Tensor]:
    """A state dict under our names, as the parameters of the config's model."""
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"{source}: expected tensors by name, got {type(value).__name__} under {name!r:.40}")
        if value.dtype not in _DTYPES:
            raise UserError(
                f"{source}: expected tensors of float32, bfloat16 or float16, got {value.dtype} under {name}; save it "
                "as float32"
            )
    model = config.model
    fixed = {} if model.position_embedding == "learnable" else {POSITIONS: (1, model.num_tokens, model.width)}
    renamed = {ours: tensors[name] for name, ours in our_names(tensors, source).items()}
    check_shapes({name: tuple(value.shape) for name, value in renamed.items()}, config, source, beside=fixed)
    if fixed and POSITIONS in renamed:
        _check_positions(renamed.pop(POSITIONS), model.grid, source)
    return renamed


def _check_positions(table: Tensor, grid: int, source: str) -> None:
    """Refuses positions that were learned, where the config says fixed ones."""
    difference = float((table.float() - sincos_positions(grid, table.shape[-1])).abs().max())
    if not difference <= _POSITION_DRIFT:
        raise UserError(
            f"{source}: model.position_embedding: expected the fixed sin-cos positions, got others by up to "
            f"{difference:.3g}; set model.position_embedding=learnable"
        )
    if difference:
        say(f"{source}: pos_embed is off the sin-cos table by up to {difference:.1g} (rounding): ours is exact")


def write_official(run: Path, out: Path) -> None:
    """Writes the latest checkpoint of a run as the official code's .pt: weights under `model`, averages under `ema`."""
    outputs.refuse_existing(out, "OUT")
    found = build.find_checkpoint(run)
    _check_is_official(found.config)
    tensors = {"model": found.open_weights("raw").read_all(), "ema": found.open_weights().read_all()}
    try:
        content = {key: to_official(of_key, found.config.model.grid) for key, of_key in tensors.items()}
    except ValueError as error:  # as of a modality that the official code lacks
        raise UserError(f"{run}: {error}; leave --format official out") from error
    foreign_files.write(out, content)
