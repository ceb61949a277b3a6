"""A model to sample from, wherever it comes from: a run folder, or a folder in diffusers' layout that we exported."""

import dataclasses
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfpretrain import build
from cfpretrain.build import (
    CONFIG_FILE,
    INDEX_FILE,
    Autoencoder,
    Step,
    load_config,
    load_run,
    make_autoencoder,
    make_model,
)
from cfpretrain.config import Config
from cfpretrain.console import UserError
from cfpretrain.export import foreign_files
from cfpretrain.export.diffusers_layout import TRANSFORMER, VAE, WEIGHTS_STEM
from cfpretrain.model import attention
from cfpretrain.model.autoencoder import are_pixels
from cfpretrain.model.transformer import BlockSettings, CausalFusion

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_NUM_NAMES_SHOWN = 10


@dataclass(frozen=True)
class Source:
    """A model to sample from.

    Attributes:
        config: of the model.
        model: on `device`, for sampling alone.
        device: where it computes.
        class_names: one for each class; their numbers where names are not known.
        title: whose weights they are, for people.
    """

    config: Config
    model: CausalFusion
    device: torch.device
    class_names: tuple[str, ...]
    title: str

    def label_of(self, text: str) -> int:
        """The class of this name, or number; UserError where there is none, or several have the name."""
        found = [i for i, name in enumerate(self.class_names) if name.casefold() == text.casefold()]
        if not found and text.isdecimal() and int(text) < len(self.class_names):
            found = [int(text)]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"class: {text!r} is the name of classes {', '.join(map(str, found))}; give a number")
        by_folded = {name.casefold(): name for name in self.class_names}
        # "tench" is far from "tench, Tinca tinca" by the letters that differ.
        holding = [name for name in by_folded if text.casefold() in name]
        near = [
            by_folded[name] for name in holding or difflib.get_close_matches(text.casefold(), by_folded, cutoff=0.5)
        ]
        some = ", ".join(self.class_names[:_NUM_NAMES_SHOWN]) + ", ..." * (len(self.class_names) > _NUM_NAMES_SHOWN)
        raise UserError(
            f"class: expected a name, or a number from 0 to {len(self.class_names) - 1}, got {text!r}; "
            + (f"did you mean {' or '.join(map(repr, near[:3]))}?" if near else f"names are {some}")
        )

    def make_autoencoder(self) -> Autoencoder:
        """What decodes its latents; UserError where it names none and its latents are no pixels."""
        if not self.config.data.autoencoder and not are_pixels(self.config.model.latent_channels):
            raise UserError(
                f"{self.title}: expected a model that names its autoencoder (data.autoencoder), so that its latents "
                f"become images, got none; write the autoencoder's folder into its {CONFIG_FILE}"
            )
        return make_autoencoder(self.config, self.device)


def load_source(
    path: Path, device: torch.device, precision: str = "fp32", weights: str = "ema", step: Step = None
) -> Source:
    """Loads a model to sample from.

    Args:
        path: a run folder, or an exported one.
        device: where the model will compute.
        precision: in which: "fp32" or "bf16".
        weights: of a run: "ema" or "raw"; an export holds one of them, and is asked for none.
        step: of a run's checkpoint; see `build.find_checkpoint`.

    Raises:
        UserError: it is neither, or not complete.
    """
    if (path / INDEX_FILE).is_file():
        if weights != "ema":
            raise UserError(f"--weights: {path} is an export, which holds the weights it was made of; leave it out")
        if step is not None:
            raise UserError(f"--step: {path} is an export, of one step; leave it out")
        config, model, class_names = _load_export(path)
        title = f"{path}"
    elif (path / CONFIG_FILE).is_file():
        config, model, of_step = load_run(path, torch.device("cpu"), "ema" if weights == "ema" else "weights", step)
        class_names = build.class_names(config)
        title = f"{path}, step {of_step}, {'EMA' if weights == 'ema' else 'raw'} weights"
    else:
        raise UserError(_no_source(path))
    cached = attention.choose_cached("auto", device.type, precision, config.model.width // config.model.num_heads)
    model.trunk.settings = BlockSettings(cached_attention=cached)
    model = model.to(device=device, dtype=_DTYPES[precision]).eval().requires_grad_(False)
    return Source(config, model, device, class_names, title)


def _no_source(path: Path) -> str:
    wanted = f"{path}: expected a run folder (with {CONFIG_FILE}) or an exported one (with {INDEX_FILE}), got"
    if path.is_file():
        return f"{wanted} a file; of an official checkpoint tools/import_official.py makes a run folder"
    return f"{wanted} {'another folder' if path.is_dir() else 'nothing: it does not exist'}"


# ---------------------------------------------------------------------------------------------------------------------
# Exported folders


def _load_export(folder: Path) -> tuple[Config, CausalFusion, tuple[str, ...]]:
    config = load_config(folder / CONFIG_FILE)
    autoencoder = str(folder / VAE) if (folder / VAE).is_dir() else ""
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, autoencoder=autoencoder))
    with torch.device("meta"):
        model = make_model(config)
    try:
        model.load_state_dict(_read_tensors(folder / TRANSFORMER), assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder / TRANSFORMER} does not fit {folder / CONFIG_FILE}: {reason:.300}") from error
    names = _read_json(folder / INDEX_FILE).get("id2label") or {}
    return config, model, tuple(names.get(str(i), str(i)) for i in range(config.model.num_classes))


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    whole = f"{WEIGHTS_STEM}.safetensors"
    index = folder / f"{whole}.index.json"
    files = set((_read_json(index).get("weight_map") or {}).values()) if index.is_file() else {whole}
    return {
        name: values for file in sorted(files) for name, values in foreign_files.read(folder / file, "source").items()
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); export the run again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected keys with values, got {content!r:.40}; export the run again")
    return content
