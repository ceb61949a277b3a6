"""Language models in Hugging Face's layout, both ways: tensors under our names, and a run folder that starts from them.

A folder holds config.json and model.safetensors, or several such files and their index. Each tensor is a renaming of
theirs, or theirs behind one another, with every bit kept; `language_layouts.py` says which. Pickles are not read.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from cfpretrain.base import files, outputs
from cfpretrain.base.config import Config
from cfpretrain.base.console import UserError, say
from cfpretrain.base.differences import tensor_differences
from cfpretrain.core.design import CHANGES
from cfpretrain.data.tokenizer import TextTokenizer
from cfpretrain.export.imported_run import Counters, ForeignCheckpoint
from cfpretrain.export.language_layouts import (
    EMBEDDING,
    HEAD,
    LM_HEAD,
    POSITIONS,
    LanguageSettings,
    is_buffer,
    make_entries,
    prefix_of,
    read_settings,
    write_settings,
)
from cfpretrain.export.weight_files import read_json_as, read_weights, write_weights
from cfpretrain.run.build import TOKENIZER_FILE, Step, find_checkpoint, initial_weights, parameter_shapes
from cfpretrain.run.checkpoint import EMA, WEIGHTS

CONFIG_FILE, TOKENIZER_CONFIG_FILE, WEIGHTS_STEM = "config.json", "tokenizer_config.json", "model"
ORDINALS = "ordinal_table.weight"
_TABLES = (EMBEDDING, POSITIONS, HEAD)  # rows of which may be more or fewer: of tokens, of places

_FIX = "get the folder again, as save_pretrained writes it"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of `model` in a config: what stands for a trunk as it usually is.
_UNCHANGED: dict[str, Any] = {
    name: {"mlp": "auto", "rotary_scaling": []}.get(name, 0) for name in CHANGES if name != "separate_image_weights"
}


@dataclass(frozen=True)
class LanguageModel:
    """A language model with its tensors under our names; they come into memory when they are read."""

    settings: LanguageSettings
    plain: Mapping[str, Any]  # its whole config.json
    shapes: Mapping[str, tuple[int, ...]]  # of its tensors, under our names
    dtype: torch.dtype  # that all of them are stored in
    read: Callable[[str], Tensor]  # one of them, by our name
    tokenizer: Path | None = None  # its tokenizer.json

    def overrides(self) -> list[str]:
        """Those of a config by which a model gets this trunk, and texts where there is a tokenizer."""
        settings = self.settings
        values = {"trunk": settings.trunk, "width": settings.width, "depth": settings.depth}
        values |= {"num_heads": settings.num_heads} | _UNCHANGED | dict(settings.changes)
        found = [
            f"model.{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items()
        ]
        if self.tokenizer is not None:
            found.append(f"data.tokenizer={json.dumps(str(self.tokenizer))}")
            found.append(f"model.vocabulary={TextTokenizer.load(self.tokenizer, 'MODEL').size}")
        return found


def open_language_model(folder: Path, name: str) -> LanguageModel:
    """A language model in a folder; UserError where it is none whose blocks ours compute, or lacks a tensor.

    Args:
        name: argument that gave the folder, for messages.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise UserError(
            f"{name}: expected a folder with {CONFIG_FILE} and {WEIGHTS_STEM}.safetensors, got {folder}; give one as "
            "transformers' save_pretrained writes it"
        )
    plain = read_json_as(dict[str, Any], file, _FIX)
    settings = read_settings(plain, str(file))
    if not any((folder / f"{WEIGHTS_STEM}.safetensors{ending}").is_file() for ending in ("", ".index.json")):
        raise UserError(
            f"{name}: {folder} holds no {WEIGHTS_STEM}.safetensors, and pickles, as pytorch_model.bin is one, are not "
            "read; save it again with transformers' save_pretrained"
        )
    stored, prefix = read_weights(folder, WEIGHTS_STEM, name, _FIX), prefix_of(settings)
    has_prefix = any(key.startswith(prefix) for key in stored)
    tensors = {
        key if has_prefix or key == LM_HEAD else f"{prefix}{key}": value
        for key, value in stored.items()
        if not is_buffer(key) and not (settings.is_tied and key == LM_HEAD)
    }
    entries = {entry.ours: entry for entry in make_entries(settings)}
    expected = {key: shape for entry in entries.values() for key, shape in entry.shapes().items()}
    different = tensor_differences({key: tuple(value.shape) for key, value in tensors.items()}, expected)
    if different:
        raise UserError(f"{name}: {folder}: tensors {different}, by {CONFIG_FILE}; {_FIX}")
    dtypes = {value.dtype for value in tensors.values()}
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
        raise UserError(
            f"{name}: {folder}: expected all tensors in one of fp32, bf16 and fp16, got "
            f"{', '.join(sorted(map(str, dtypes)))}; save it in one of them"
        )
    shapes = {ours: entry.shape for ours, entry in entries.items()}
    file = folder / TOKENIZER_FILE
    return LanguageModel(
        settings,
        plain,
        shapes,
        dtypes.pop(),
        lambda ours: entries[ours].join(tensors.__getitem__),
        file if file.is_file() else None,
    )


def language_model_of(run: Path, step: Step, weights: str, dtype: torch.dtype) -> tuple[LanguageModel, dict[str, str]]:
    """The text side of a run's checkpoint as a language model, and its tokenizer's files by their names.

    It continues texts that begin a sample: the vector of the first place among a sample's segments is added to the
    embeddings, since a language model is told no such places.
    """
    found = find_checkpoint(run, step)
    model = found.config.model
    if not model.vocabulary:
        raise UserError(
            f"RUN: expected a run with texts, got {run}, whose model.vocabulary is 0; export it to diffusers"
        )
    tokenizer, tensors = TextTokenizer.load(run / TOKENIZER_FILE, "RUN"), found.open_weights(weights)

    def read(name: str) -> Tensor:
        values = tensors.read(name)
        return values + tensors.read(ORDINALS)[0] if name == EMBEDDING else values

    sizes = (model.depth, model.vocabulary, model.max_text_tokens)
    changes = {name: one for name, one in model.block_changes.items() if name != "separate_image_weights"}
    settings = LanguageSettings(model.trunk, model.width, model.num_heads, changes, *sizes, is_tied=False)
    settings = replace(settings, is_tied=torch.equal(read(EMBEDDING), read(HEAD)))
    marks = {"bos_token": tokenizer.begin, "eos_token": tokenizer.end, "pad_token": tokenizer.pad}
    plain = write_settings(settings) | {f"{name}_id": number for name, number in marks.items()}
    plain["torch_dtype"] = str(dtype).removeprefix("torch.")
    shapes = {entry.ours: entry.shape for entry in make_entries(settings)}
    of_tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast"} | {
        name: tokenizer.name_of(i) for name, i in marks.items()
    }
    beside = {TOKENIZER_FILE: tokenizer.to_json(), TOKENIZER_CONFIG_FILE: json.dumps(of_tokenizer, indent=2) + "\n"}
    return LanguageModel(settings, plain, shapes, dtype, read), beside


def write_language_model(
    out: Path,
    model: LanguageModel,
    max_shard_bytes: int = 5 * 10**9,
    beside: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Writes a folder as transformers does, whole or not at all; what `open_language_model` opened, byte for byte.

    A head that was tied to the table of embeddings and differs from it by now, as after training, is written apart.
    `beside` has the contents of further files by their names.
    """
    outputs.refuse_existing(out, "OUT")
    settings = model.settings
    if settings.is_tied and not torch.equal(model.read(EMBEDDING), model.read(HEAD)):
        say("the head is no longer the table of embeddings: it is written apart (tie_word_embeddings: false)")
        settings = replace(settings, is_tied=False)
    entries = [entry for entry in make_entries(settings) if not (settings.is_tied and entry.ours == HEAD)]
    by_theirs = {key: entry for entry in entries for key in entry.theirs}
    shapes = {key: shape for entry in entries for key, shape in entry.shapes().items()}

    def read(key: str) -> Tensor:
        entry = by_theirs[key]
        return entry.split(model.read(entry.ours))[key]

    plain = dict(model.plain) if settings is model.settings else {**model.plain, "tie_word_embeddings": False}
    with outputs.whole_or_nothing(out, "OUT") as folder:
        files.make_folder(folder)
        files.replace(folder / CONFIG_FILE, json.dumps(plain, indent=2, sort_keys=True) + "\n")
        for name, text in beside.items():
            files.replace(folder / name, text)
        write_weights(folder, WEIGHTS_STEM, shapes, read, model.dtype, max_shard_bytes)


def start_from(model: LanguageModel, config: Config, source: str) -> ForeignCheckpoint:
    """The first weights of a run whose trunk, and whatever else it shares with a language model, is the model's.

    The rest begins as in a new run, but for the places of segments, whose vectors are 0, so that texts have the logits
    that the language model gives them. Prints what is taken, what is initialised, and what the run's model has no place
    for. Tokens that the language model lacks begin as the mean of all: as an average token, hence with a small
    probability (J. Hewitt, "Initializing new word embeddings for pretrained language models", 2021).
    """
    shapes, write = parameter_shapes(config), initial_weights(config)
    taken = {name for name in shapes if _there(name) in model.shapes}
    num_places, max_tokens = model.shapes.get(POSITIONS, (math.inf,))[0], config.model.max_text_tokens
    if POSITIONS in taken and num_places < max_tokens:
        raise UserError(
            f"model.max_text_tokens: expected at most {num_places}, the positions of {source}, got {max_tokens}"
        )
    found, expected = (
        {
            name: shape[name in _TABLES :]
            for name, shape in of.items()
            if _there(name) == name and (name in taken or name.startswith("trunk."))
        }
        for of in (model.shapes, shapes)
    )
    different = tensor_differences(found, expected)
    if different:
        raise UserError(
            f"{source} does not fit the config: tensors {different}; leave out the keys of `model` that say what "
            "blocks are"
        )
    for name, wanted in vars(model.settings.design).items():  # what no tensor shows, as norm_eps
        got = getattr(config.model.design, name)
        if got != wanted and name != "separate_image_weights":
            raise UserError(f"model.{name}: expected {wanted}, as {source} has it, got {got}; leave it out")
    initialised = sorted({name.split(".")[0] for name in shapes if name not in taken})
    unused = sorted(name for name in model.shapes if name not in taken)
    say(f"taken: {len(taken)} tensors; initialised: {', '.join(initialised) or 'none'}")
    if unused:
        say(f"WARNING: the model of the config has no place for {', '.join(unused)}, which are left out")

    def read_tensor(content: str, name: str) -> Tensor:
        if content not in (WEIGHTS, EMA):
            return torch.zeros(shapes[name])
        if name in taken:
            values = model.read(_there(name))
            return _with_rows(values, shapes[name][0]) if name in _TABLES else values
        if name == ORDINALS:
            return torch.zeros(shapes[name])
        values = torch.empty(shapes[name])
        write(name, shapes[name], 0, values.view(-1))
        return values

    return ForeignCheckpoint(source, Counters(step=0, optimizer_step=0), read_tensor, "at step 0")


def _there(name: str) -> str:
    """The tensor that one of a run begins as; the weights of images begin as those of texts."""
    return name.replace(".image.", ".") if name.startswith("trunk.") else name


def _with_rows(table: Tensor, num_rows: int) -> Tensor:
    """The first rows of a table; those that it lacks are the mean of all."""
    missing = max(0, num_rows - len(table))
    return torch.cat([table[:num_rows].float(), table.float().mean(0).expand(missing, -1)])
