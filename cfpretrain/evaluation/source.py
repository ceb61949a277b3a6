"""A model to sample from, wherever it comes from: a run folder, or a folder in diffusers' layout that we exported."""

import dataclasses
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cfpretrain.autoencoder import are_pixels
from cfpretrain.base.class_names import label_of
from cfpretrain.base.config import Config, load_recorded
from cfpretrain.base.console import UserError, excerpt, one_line, say
from cfpretrain.core import attention
from cfpretrain.core.block import BlockSettings
from cfpretrain.core.model import CausalFusion
from cfpretrain.core.texts import FRAME, Marks
from cfpretrain.data.images import SUFFIXES
from cfpretrain.data.tokenizer import SPECIAL, TextTokenizer
from cfpretrain.export import foreign_files
from cfpretrain.export.diffusers_layout import (
    SCHEDULER,
    SCHEDULER_FILE,
    TOKENIZER,
    TRANSFORMER,
    VAE,
    WEIGHTS_STEM,
    ModelIndex,
    scheduler_config,
    tokenizer_of,
    transformer_config,
)
from cfpretrain.export.tokenizer_template import TOKENIZER_FILE
from cfpretrain.export.weight_files import read_json_as, read_weights
from cfpretrain.run.build import (
    CONFIG_FILE,
    INDEX_FILE,
    Autoencoder,
    RunCheckpoint,
    Step,
    checked,
    find_checkpoint,
    make_autoencoder,
    make_model,
)
from cfpretrain.run.state import means_the_same

_FIX = "export the run again"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Source:
    """A model to sample from; its weights are read when they are first asked for."""

    path: Path  # a run folder, or an exported one
    device: torch.device  # where the model computes
    precision: str  # in which: "fp32" or "bf16"
    config: Config  # that the weights were trained with
    class_names: tuple[str, ...]  # one for each class; their numbers where names are not known
    title: str  # whose weights they are, for people
    checkpoint: RunCheckpoint | None  # of a run; None: an export
    weights: str  # of a run: "ema" or "raw"

    @property
    def has_classes(self) -> bool:
        """Whether it was trained to make images of classes."""
        return self.config.data.tasks.class_to_image > 0

    def label_of(self, text: str, option: str = "class") -> int:
        """The class that an option's word means (`class_names.label_of`); UserError where it means none, or several."""
        if not self.has_classes:
            raise UserError(
                f"{option}: expected a text, since {self.title} was trained without classes "
                f"(data.tasks.class_to_image), got {text!r}; give --prompt"
            )
        try:
            return label_of(text, self.class_names)
        except ValueError as error:
            raise UserError(f"{option}: {error}") from error

    def load(self) -> None:
        """Brings the weights into memory, where they are not."""
        self.model.eval()

    @functools.cached_property
    def model(self) -> CausalFusion:
        """For sampling alone."""
        if self.checkpoint is None:
            model = _load_export(self.path, self.config)
        else:
            model = self.checkpoint.load_model(self.weights)
        head_width = self.config.model.design.head_width
        cached = attention.choose("auto", "sampling", self.device.type, self.precision, head_width, say)
        model.trunk.settings = BlockSettings(sampling_attention=cached)
        return model.to(device=self.device, dtype=_DTYPES[self.precision]).eval().requires_grad_(False)

    @functools.cached_property
    def tokenizer(self) -> TextTokenizer | None:
        """What makes tokens of texts, which is the one that it was trained with; None for a model without texts."""
        if self.checkpoint is not None:
            return tokenizer_of(self.checkpoint)
        data, vocabulary = self.config.data, self.config.model.vocabulary
        return TextTokenizer.load_trained(Path(data.tokenizer), "source", vocabulary) if vocabulary else None

    def texts(self, option: str) -> TextTokenizer:
        """The tokenizer; UserError where the model has no texts, which the option needs."""
        if self.tokenizer is None:
            raise UserError(
                f"{option}: expected a model with texts (model.vocabulary), got {self.title}, which was trained without"
            )
        return self.tokenizer

    def marks(self, option: str) -> Marks:
        """The tokens that frame texts; UserError as of `texts`."""
        return Marks(*self.texts(option).marks)

    def tokens_of(self, option: str, text: str, max_tokens: int | None = None) -> list[int]:
        """The tokens of a text that an option gives, without those that frame it.

        UserError where it is of more than `max_tokens` with these two (None: than the model knows), or is no text that
        the tokenizer can write.
        """
        tokenizer, most = self.texts(option), (max_tokens or self.config.model.max_text_tokens) - FRAME
        wanted = f"{option}: expected a text that the model's tokenizer can write, got"
        mark = next((one for one in SPECIAL if one in text), None)
        if mark is not None:
            raise UserError(f"{wanted} {mark} in it, which stands between texts and is no word; leave it out")
        if Path(text).suffix.lower() in SUFFIXES and os.path.lexists(text):
            raise UserError(f"{option}: expected a text, got the image file {text}; give words")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{wanted} bytes that are no UTF-8 ({one_line(error):.100}); write it in UTF-8") from error
        unknown = tokenizer.unknown_part(text)
        if unknown:
            raise UserError(f"{wanted} {unknown!r} in it, of which it has no token; leave it out")
        tokens = tokenizer.encode(text)
        if len(tokens) > most:
            words = excerpt(repr(text), 80)
            raise UserError(f"{option}: expected at most {most} tokens, got {len(tokens)} in {words}; shorten it")
        return tokens

    def make_autoencoder(self) -> Autoencoder:
        """What decodes its latents; UserError where it names none and its latents are no pixels."""
        if not self.config.data.autoencoder and not are_pixels(self.config.model.latent_channels):
            raise UserError(
                f"{self.title}: expected a model that names its autoencoder (data.autoencoder), so that its latents "
                f"become images, got none; write the autoencoder's folder into its {CONFIG_FILE}"
            )
        if self.checkpoint is not None:
            return self.checkpoint.make_autoencoder(self.device)
        return make_autoencoder(self.config, self.device)


def load_source(
    path: Path, device: torch.device, precision: str = "fp32", weights: str = "ema", step: Step = None
) -> Source:
    """As `open_source`, with the weights in memory."""
    source = open_source(path, device, precision, weights, step)
    source.load()
    return source


def open_source(
    path: Path, device: torch.device, precision: str = "fp32", weights: str = "ema", step: Step = None
) -> Source:
    """Finds a model to sample from, in milliseconds.

    Args:
        path: a run folder, or an exported one.
        device: where the model will compute.
        precision: in which: "fp32" or "bf16".
        weights: of a run: "ema" or "raw"; an export holds one of them, and is asked for none.
        step: of a run's checkpoint; see `build.find_checkpoint`.
    """
    if (path / INDEX_FILE).is_file():
        if weights != "ema":
            raise UserError(f"--weights: {path} is an export, which holds the weights it was made of; leave it out")
        if step is not None:
            raise UserError(f"--step: {path} is an export, of one step; leave it out")
        config = _export_config(path)
        names = read_json_as(ModelIndex, path / INDEX_FILE, _FIX).get("id2label", {})
        class_names = tuple(names.get(str(i), str(i)) for i in range(config.model.num_classes))
        return Source(path, device, precision, config, class_names, f"{path}", None, weights)
    if (path / CONFIG_FILE).is_file():
        found = find_checkpoint(path, step)
        title = f"{path}, step {found.state.step}, {'EMA' if weights == 'ema' else 'raw'} weights"
        return Source(path, device, precision, found.config, found.class_names(), title, found, weights)
    raise UserError(_no_source(path))


def _no_source(path: Path) -> str:
    wanted = f"{path}: expected a run folder (with {CONFIG_FILE}) or an exported one (with {INDEX_FILE}), got"
    if path.is_file():
        return f"{wanted} a file; of an official checkpoint tools/import_official.py makes a run folder"
    return f"{wanted} {'another folder' if path.is_dir() else 'nothing: it does not exist'}"


# ---------------------------------------------------------------------------------------------------------------------
# Exported folders


def _export_config(folder: Path) -> Config:
    config = load_recorded(folder / CONFIG_FILE)
    autoencoder = str(folder / VAE) if (folder / VAE).is_dir() else ""
    tokenizer = str(folder / TOKENIZER / TOKENIZER_FILE) if config.model.vocabulary else ""
    data = dataclasses.replace(config.data, autoencoder=autoencoder, tokenizer=tokenizer)
    config = checked(dataclasses.replace(config, data=data))
    _check_export(folder, config)
    return config


def _check_export(folder: Path, config: Config) -> None:
    """Refuses a config that was edited: the pipeline of the export would make other pixels than we do."""
    files = [folder / TRANSFORMER / "config.json", folder / SCHEDULER / SCHEDULER_FILE]
    found = {key: value for file in files for key, value in read_json_as(dict[str, Any], file, _FIX).items()}
    expected = transformer_config(config) | scheduler_config(config)
    differing = [
        f"{key} is {excerpt(repr(found.get(key)), 100)} there and {excerpt(repr(value), 100)} by {CONFIG_FILE}"
        for key, value in expected.items()
        if key != "_class_name" and not means_the_same(found.get(key), value)
    ]
    if differing:
        raise UserError(
            f"{folder / CONFIG_FILE} contradicts {files[0]} and {files[1].name}: {', '.join(differing)}; set it as "
            "they say, or export the run again"
        )


def _load_export(folder: Path, config: Config) -> CausalFusion:
    with torch.device("meta"):
        model = make_model(config)
    try:
        tensors = read_weights(folder / TRANSFORMER, WEIGHTS_STEM, "source", _FIX)
        for name, values in tensors.items():
            if values.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise UserError(f"{folder / TRANSFORMER}: {name}: expected fp32, bf16 or fp16, got {values.dtype}")
            foreign_files.check_finite(values, f"{folder / TRANSFORMER}: {name}")
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder / TRANSFORMER} does not fit {folder / CONFIG_FILE}: {reason:.300}") from error
    return model
