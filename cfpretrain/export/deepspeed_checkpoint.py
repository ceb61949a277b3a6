"""Reads checkpoints in DeepSpeed's own format (ZeRO stages 1, 2 and 3, any number of ranks), and runs nothing in them.

The layout, read in DeepSpeed 0.19.8: in a folder such as `global_step1000/`, which `latest` beside it names,

    mp_rank_00_model_states.pt                         order and shapes of the parameters, counters; stage 3: one a rank
    [bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt   rank R's part of the fp32 weights and of Adam's moments

A rank's part is one flat tensor a group of parameters. At stages 1 and 2 the ranks' parts of a group follow one
another, and together hold its parameters one after another, each with some padding. (`param_slice_mappings`, which
seems to say the same, is wrong where `round_robin_gradients` is on.) At stage 3 each parameter is cut into equal parts,
one a rank, and the last ones are padded.

DeepSpeed's own reader (`zero_to_fp32`) is not used: it runs what is in the files, leaves out the moments, and refuses
what bf16 at stage 1 writes.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfpretrain.base.config import Config
from cfpretrain.base.console import UserError, one_line, say
from cfpretrain.base.files import read_text
from cfpretrain.export import foreign_files
from cfpretrain.export.imported_run import Counters, ForeignCheckpoint, check_shapes
from cfpretrain.export.official import our_names

# What the files hold besides data; they are read without DeepSpeed's code.
_PLACEHOLDERS = (
    "argparse.Namespace",
    "builtins.getattr",  # by which Python 3.11.0 to 3.11.3 pickles a member of an enum
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
_OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
_MOMENTS = ("exp_avg", "exp_avg_sq")
_MAX_NAME_BYTES = 4096  # of what `latest` may hold

_Group = Mapping[str, tuple[int, ...]]  # shapes of parameters


class _Piece(NamedTuple):
    """Some values of a parameter: `numel` from `begin` on in a rank's flat tensor of a group."""

    rank: int
    group: int
    begin: int
    numel: int


@dataclass(frozen=True)
class ZeroCheckpoint:
    """What a checkpoint of DeepSpeed's holds."""

    shapes: dict[str, tuple[int, ...]]  # of the parameters, under the names they have there
    counters: Counters  # steps
    num_ranks: int  # that wrote it
    pieces: dict[str, list[_Piece]]  # of each parameter, in the order of its values
    flats: dict[str, list[list[Tensor]]]  # tensors by content ("weights", "exp_avg", "exp_avg_sq"), rank and group

    def tensor(self, content: str, name: str) -> Tensor:
        """A whole parameter's values, fp32: "weights", "exp_avg" or "exp_avg_sq"."""
        flats = self.flats[content]
        parts = [flats[at.rank][at.group].narrow(0, at.begin, at.numel) for at in self.pieces[name]]
        return torch.cat(parts).view(self.shapes[name])


def read_deepspeed(folder: Path, config: Config) -> ForeignCheckpoint:
    """A checkpoint of the config's model, under our names of the parameters or the official ones."""
    say(
        "WARNING: DeepSpeed's files are pickles, which can run code when other tools read them; here they are read as "
        "data only, and refused where they hold more"
    )
    source = f"FOLDER: {folder}"
    found = read_zero_checkpoint(folder)
    theirs = {ours: name for name, ours in our_names(found.shapes, source).items()}
    check_shapes({ours: found.shapes[name] for ours, name in theirs.items()}, config, source)
    say("WARNING: DeepSpeed keeps no EMA: the averages begin as the weights")

    def read_tensor(content: str, name: str) -> Tensor:
        return found.tensor("weights" if content == "ema" else content, theirs[name])

    at = found.counters
    about = f"with moments at step {at.step} ({at.optimizer_step} updates), written by {found.num_ranks} ranks"
    return ForeignCheckpoint(source, at, read_tensor, about)


def read_zero_checkpoint(folder: Path) -> ZeroCheckpoint:
    """Opens a checkpoint, in its folder or the one above; its tensors come into memory one at a time, when used."""
    folder = _find_folder(folder)
    model_file = next((folder / file for file in _MODEL_FILES if (folder / file).is_file()), None)
    files = _find_optimizer_files(folder)
    if model_file is None:
        raise UserError(f"FOLDER: expected {' or '.join(_MODEL_FILES)} in {folder}, got neither; restore it")
    model = foreign_files.read(model_file, "FOLDER", _PLACEHOLDERS)
    ranks = [foreign_files.read(file, "FOLDER", _PLACEHOLDERS) for file in files]
    try:
        return _open(model, [rank["optimizer_state_dict"] for rank in ranks])
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else f"{error}"
        raise UserError(
            f"FOLDER: {folder} is not what DeepSpeed 0.19 writes of AdamW at ZeRO stage 1, 2 or 3: {reason:.200}"
        ) from error


def _find_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"FOLDER: expected a folder that DeepSpeed's save_checkpoint wrote, got {folder}; give one")
    latest = folder / "latest"
    if not latest.exists():
        return folder
    try:
        tag = read_text(latest, _MAX_NAME_BYTES).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"FOLDER: {latest} cannot be read ({one_line(error)}); give its folder") from error
    if not tag or Path(tag).name != tag or not (folder / tag).is_dir():
        raise UserError(f"FOLDER: {latest}: expected the name of a folder beside it, got {tag!r:.80}; give that folder")
    return folder / tag


def _find_optimizer_files(folder: Path) -> list[Path]:
    """One file a rank, in the order of the ranks."""
    found: dict[int, Path] = {}
    for path in folder.iterdir():
        match = _OPTIMIZER_FILE.fullmatch(path.name)
        if match is None:
            continue
        if int(match[2]) != 0 or int(match[1]) in found:
            raise UserError(
                f"FOLDER: expected one *_optim_states.pt a rank, without tensor parallelism, got {path.name} in "
                f"{folder} too; give a checkpoint of ZeRO alone"
            )
        found[int(match[1])] = path
    if not found:
        raise UserError(
            f"FOLDER: expected files *_optim_states.pt of ZeRO stage 1, 2 or 3 in {folder}, got none; give the folder "
            "of a checkpoint, or the one with `latest` in it"
        )
    missing = [rank for rank in range(len(found)) if rank not in found]
    if missing:
        raise UserError(
            f"FOLDER: expected the files of all ranks in {folder}, got none of rank {missing[0]}; restore it"
        )
    return [found[rank] for rank in range(len(found))]


# ---------------------------------------------------------------------------------------------------------------------
# Layout


def _open(model: Mapping[str, Any], ranks: Sequence[Mapping[str, Any]]) -> ZeroCheckpoint:
    count = ranks[0]["partition_count"]
    num_ranks = max(count) if isinstance(count, list) else count
    if num_ranks != len(ranks):
        raise ValueError(f"files of {len(ranks)} ranks, where {num_ranks} wrote it")
    is_stage_3 = "fp32_flat_groups" in ranks[0]
    weights = "fp32_flat_groups" if is_stage_3 else "single_partition_of_fp32_groups"
    inner = "optimizer_state_dict" if is_stage_3 else "base_optimizer_state"
    flats = {"weights": [[_checked(flat) for flat in rank[weights]] for rank in ranks]}
    for moment in _MOMENTS:
        flats[moment] = [[_checked(state[moment]) for state in _states(rank[inner])] for rank in ranks]
    groups = [{name: tuple(map(int, shape)) for name, shape in group.items()} for group in model["param_shapes"]]
    shapes = {name: shape for group in groups for name, shape in group.items()}
    found = (
        _pieces_of_stage_3(groups, len(ranks))
        if is_stage_3
        else _pieces_of_stages_1_and_2(groups, ranks[0].get("param_alignment_paddings"), flats["weights"])
    )
    pieces = {name: [piece for piece in of_name if piece.numel > 0] for name, of_name in found}
    _check_pieces(shapes, pieces, flats)
    # Apex and DeepSpeed's own optimizers count in the group.
    step = _states(ranks[0][inner])[0].get("step")
    optimizer_step = int(ranks[0][inner]["param_groups"][0]["step"] if step is None else step)
    counters = Counters(int(model["global_steps"]), optimizer_step, int(model["skipped_steps"]))
    return ZeroCheckpoint(shapes, counters, len(ranks), pieces, flats)


def _states(optimizer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Adam's state of each flat tensor, in the order of the groups."""
    states = optimizer["state"]
    if not states:
        raise ValueError("no moments: it was saved before the first step, or without the optimizer's state")
    return [states[group] for group in sorted(states)]


def _checked(flat: Tensor) -> Tensor:
    if flat.dtype != torch.float32 or flat.dim() != 1:
        raise ValueError(f"a flat tensor of {flat.dtype} and {flat.dim()} axes, where float32 and one are expected")
    return flat


def _pieces_of_stages_1_and_2(
    groups: Sequence[_Group], paddings: Sequence[Sequence[int]] | None, flats: Sequence[Sequence[Tensor]]
) -> Iterator[tuple[str, list[_Piece]]]:
    for number, group in enumerate(groups):
        size = flats[0][number].numel()  # of each rank's part, but that the last one may be without its padding
        begin = 0
        for (name, shape), padding in zip(group.items(), paddings[number] if paddings else repeat(0), strict=False):
            end = begin + math.prod(shape)
            bounds = [(max(begin, rank * size), min(end, (rank + 1) * size)) for rank in range(len(flats))]
            yield (
                name,
                [_Piece(rank, number, low - rank * size, high - low) for rank, (low, high) in enumerate(bounds)],
            )
            begin = end + padding


def _pieces_of_stage_3(groups: Sequence[_Group], num_ranks: int) -> Iterator[tuple[str, list[_Piece]]]:
    for number, group in enumerate(groups):
        begin = 0
        for name, shape in group.items():
            size = -(-math.prod(shape) // num_ranks)
            parts = [min(size, math.prod(shape) - rank * size) for rank in range(num_ranks)]
            yield name, [_Piece(rank, number, begin, numel) for rank, numel in enumerate(parts)]
            begin += size


def _check_pieces(
    shapes: _Group, pieces: Mapping[str, Sequence[_Piece]], flats: Mapping[str, Sequence[Sequence[Tensor]]]
) -> None:
    """Refuses a checkpoint that does not hold each value of each parameter."""
    for name, shape in shapes.items():
        num_values = sum(at.numel for at in pieces.get(name, ()))
        if num_values != math.prod(shape):
            raise ValueError(f"{num_values} values of {name}, where its shape is {shape}")
        for content, of_ranks in flats.items():
            for at in pieces[name]:
                flat = of_ranks[at.rank][at.group]
                if not 0 <= at.begin <= at.begin + at.numel <= flat.numel():
                    raise ValueError(f"{content} of {name} outside what rank {at.rank} wrote")
