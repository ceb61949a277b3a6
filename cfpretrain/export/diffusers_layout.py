"""A run leaves as a folder in diffusers' layout, with code of its own that needs no cfpretrain.

    model_index.json                       names the parts and the code
    pipeline_<hash>.py                     `pipeline_template.py`
    transformer/transformer_<hash>.py      `transformer_template.py` with the modules that it uses, joined by `bundle`
    transformer/config.json, *.safetensors
    scheduler/scheduler_config.json        the noise schedule
    vae/                                   the run's autoencoder; pixels have none
    tokenizer/tokenizer_<hash>.py          `tokenizer_template.py`, of a model with texts
    tokenizer/tokenizer.json               the run's own
    config.yaml, README.md, samples.png    the run's config, the model card, a grid of samples where the run has one

diffusers copies code into one folder of modules that all models share, so each file stands alone and has a name that no
other content has. Weights are copied tensor by tensor, each held against its hash: the memory that this takes does not
grow with the model. The same weights make the same files, whatever ranks and ZeRO stage wrote them.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch

from cfpretrain import autoencoder
from cfpretrain.base import config as configs
from cfpretrain.base import files, outputs
from cfpretrain.base.config import Config
from cfpretrain.base.console import UserError, reason_of
from cfpretrain.data.tokenizer import TextTokenizer
from cfpretrain.export import model_card, plain_files
from cfpretrain.export.bundle import bundle, content_name
from cfpretrain.export.imported_run import check_shapes
from cfpretrain.export.plain import STAND_INS
from cfpretrain.export.tokenizer_template import TOKENIZER_FILE
from cfpretrain.export.weight_files import write_weights
from cfpretrain.run import build

WEIGHTS_STEM = "diffusion_pytorch_model"
TRANSFORMER, VAE, SCHEDULER, TOKENIZER = "transformer", "vae", "scheduler", "tokenizer"
SCHEDULER_FILE, SAMPLES_FILE = "scheduler_config.json", "samples.png"

_MAX_PICTURE_BYTES = 2**28
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


_Part = tuple[str | None, ...]  # a package, or a file of code, and the class in it


class ModelIndex(TypedDict, total=False):
    """`model_index.json`; diffusers writes more keys where it saves a folder again."""

    _class_name: _Part
    transformer: _Part
    scheduler: _Part
    vae: _Part
    tokenizer: _Part
    id2label: dict[str, str]


@dataclass(frozen=True)
class ExportSettings:
    """What leaves of a run, and how."""

    weights: Literal["ema", "raw"] = "ema"  # "ema", or "raw" for the trained weights themselves
    step: build.Step = None  # of the checkpoint; see `build.find_checkpoint`
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the weights' files
    max_shard_bytes: int = 5 * 10**9  # a file of weights is no larger, unless one tensor is
    licence: str = "unknown"  # for the model card


def export(run: Path, out: Path, settings: ExportSettings) -> None:
    """Writes the model of a run, of any ranks and ZeRO stage, as a folder that is hidden until it is complete."""
    outputs.refuse_existing(out, "OUT")
    found = build.find_checkpoint(run, settings.step)
    tensors = found.open_weights(settings.weights)
    check_shapes(tensors.header.shapes, found.config, str(tensors.path))
    # Loaded for its checks, and for exact values; it is small beside a model of any size.
    loaded = found.make_autoencoder(torch.device("cpu"))
    class_names, tokenizer = found.class_names(), tokenizer_of(found)
    samples = _newest_samples(run, found.state.step)
    with outputs.whole_or_nothing(out, "OUT") as folder:
        files.make_folder(folder)
        for part in (TRANSFORMER, SCHEDULER):
            files.make_folder(folder / part)
        _write_parts(folder, found.config, class_names, loaded.shift, loaded.scale)
        if tokenizer is not None:
            _write_tokenizer(folder, tokenizer)
        write_weights(
            folder / TRANSFORMER,
            WEIGHTS_STEM,
            tensors.header.shapes,
            tensors.read,
            _DTYPES[settings.dtype],
            settings.max_shard_bytes,
        )
        if samples:
            _copy_picture(samples, folder / SAMPLES_FILE)
        card = model_card.text(
            name=out.name,
            config=found.config,
            state=found.state,
            summary=build.read_summary(run),
            weights=settings.weights,
            dtype=settings.dtype,
            licence=settings.licence,
            class_names=class_names,
            tokenizer=tokenizer,
            num_parameters=sum(map(math.prod, tensors.header.shapes.values())),
            samples=SAMPLES_FILE if samples else None,
        )
        files.replace(folder / "README.md", card)


# ---------------------------------------------------------------------------------------------------------------------
# Beside the weights


def _write_parts(
    folder: Path, config: Config, class_names: Sequence[str], shift: Sequence[float], scale: Sequence[float]
) -> None:
    """Code, configs and autoencoder."""
    pipeline = bundle("cfpretrain.export.pipeline_template")
    transformer = bundle("cfpretrain.export.transformer_template", STAND_INS)
    pipeline_name, transformer_name = content_name("pipeline", pipeline), content_name(TRANSFORMER, transformer)
    files.replace(folder / f"{pipeline_name}.py", pipeline)
    files.replace(folder / TRANSFORMER / f"{transformer_name}.py", transformer)
    scaling = {"latent_shift": list(shift), "latent_scale": list(scale)}
    _write_json(folder / TRANSFORMER / "config.json", transformer_config(config) | scaling)
    scheduler = scheduler_config(config)
    _write_json(folder / SCHEDULER / SCHEDULER_FILE, scheduler)
    vae = config.data.autoencoder
    index: ModelIndex = {
        "_class_name": (pipeline_name, "CausalFusionPipeline"),
        "transformer": (transformer_name, "CausalFusionTransformer"),
        "scheduler": ("diffusers", scheduler["_class_name"]),
        "vae": ("diffusers", "AutoencoderKL") if vae else (None, None),
        **({"tokenizer": _tokenizer_code()[::2]} if config.model.vocabulary else {}),
        # A list would be taken for one more part.
        "id2label": {str(number): label for number, label in enumerate(class_names)},
    }
    _write_json(folder / build.INDEX_FILE, index)
    if vae:
        files.make_folder(folder / VAE)
        # Read and checked by now; in the hub's cache they are links.
        for file, is_right in ((autoencoder.CONFIG_FILE, _is_json), (autoencoder.WEIGHTS_FILE, _is_safetensors)):
            files.copy(Path(vae, file), folder / VAE / file, is_right, follow=True)
    files.replace(folder / build.CONFIG_FILE, configs.to_yaml(configs.without_texts(config)))


def tokenizer_of(found: build.RunCheckpoint) -> TextTokenizer | None:
    """The tokenizer of a run, whose folder has a copy; None for a model without texts."""
    if not found.config.model.vocabulary:
        return None
    file = Path(found.config.run.folder, build.TOKENIZER_FILE)
    # Behind a link might lie a file of this machine, which would leave with an export.
    trained = found.config.model.vocabulary, found.state.tokenizer
    return TextTokenizer.load_trained(file, "run folder", *trained, follow=False)


def _tokenizer_code() -> tuple[str, str, str]:
    """The name of the file, its text, and the class in it."""
    text = bundle("cfpretrain.export.tokenizer_template", plain_files.STAND_INS)
    return content_name(TOKENIZER, text), text, "CausalFusionTokenizer"


def _write_tokenizer(folder: Path, tokenizer: TextTokenizer) -> None:
    files.make_folder(folder / TOKENIZER)
    name, text, _ = _tokenizer_code()
    files.replace(folder / TOKENIZER / f"{name}.py", text)
    files.replace(folder / TOKENIZER / TOKENIZER_FILE, tokenizer.to_json())


def _newest_samples(run: Path, step: int) -> Path | None:
    """The grid of samples nearest to a step, not beyond it; of several, the one of the fewest AR steps."""
    by_step = [(grid.name.split("_")[1], grid) for grid in sorted((run / build.SAMPLES).glob("step_*_ar_steps_*.png"))]
    newest = max((number for number, _ in by_step if number <= f"{step:08d}"), default="")
    return next((grid for number, grid in by_step if number == newest), None)


def _is_json(begin: bytes) -> bool:
    return begin.lstrip().startswith(b"{")


def _is_safetensors(begin: bytes) -> bool:
    return _is_json(begin[8:])


def _copy_picture(picture: Path, target: Path) -> None:
    """Copies a PNG of the run's; UserError where it is something else, which might be any file of this machine."""
    try:
        files.check_folder(picture.parent)
        files.copy(picture, target, files.is_png, _MAX_PICTURE_BYTES)
    except OSError as error:
        raise UserError(
            f"RUN: {picture}: expected a picture to show, which is no link ({reason_of(error)}); remove it"
        ) from error


def transformer_config(config: Config) -> dict[str, Any]:
    """What the pipeline's transformer is built with."""
    model, order = config.model, config.order
    # The paper's blocks are not named, nor that there are no texts: an export of before names neither.
    changes = {name: list(one) if isinstance(one, tuple) else one for name, one in model.block_changes.items()}
    blocks = {"trunk_kind": model.trunk, "block_changes": changes}
    texts = {name: getattr(model, name) for name in ("vocabulary", "max_text_tokens", "max_segments")}
    return (
        ({} if model.has_paper_blocks else blocks)
        | (texts if model.vocabulary else {})
        | {
            "_class_name": "CausalFusionTransformer",
            "grid": model.grid,
            "patch_size": model.patch_size,
            "latent_channels": model.latent_channels,
            "width": model.width,
            "depth": model.depth,
            "num_heads": model.num_heads,
            "num_cond_tokens": model.num_cond_tokens,
            "num_classes": model.num_classes,
            "learnable_positions": model.position_embedding == "learnable",
            "token_order": order.token_order,
            "block_size": order.block_size,
            "latent_shift": list(config.data.latent_shift),
            "latent_scale": list(config.data.latent_scale),
            "prediction_type": build.make_noise_process(config).prediction_type,
        }
    )


def scheduler_config(config: Config) -> dict[str, Any]:
    """The noise process that the model was trained with, as diffusers' schedulers write it down."""
    return build.make_noise_process(config).scheduler_config()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    files.replace(path, json.dumps(content, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# The hub


def push(folder: Path, repository: str) -> None:
    """Uploads an exported folder to a repository of the hub, which is made (private) where it is not there."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder))
    except Exception as error:  # what the hub's client raises depends on its version
        raise UserError(
            f"--push: {repository}: {' '.join(str(error).split()):.200}; {folder} is complete, upload it later with: "
            f"hf upload {repository} {folder}"
        ) from error
