"""From a config to what it describes (network, objective, autoencoder), and from a run folder to its model."""

import dataclasses
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from cfpretrain import config as configs
from cfpretrain import memory
from cfpretrain.checkpoint import CheckpointStore, read_state, read_tensors
from cfpretrain.config import Config
from cfpretrain.console import UserError, say
from cfpretrain.data.reader import Prepare, Samples
from cfpretrain.data.shards import read_latents_info
from cfpretrain.engine import WriteInitialValues, ds_config
from cfpretrain.loss import Batch, NoisePredictionLoss
from cfpretrain.model import attention
from cfpretrain.model.autoencoder import IdentityAutoencoder, KLAutoencoder, LatentScaling
from cfpretrain.model.norm import has_apex
from cfpretrain.model.transformer import BlockSettings, CausalFusion, initialise, write_initial_values
from cfpretrain.noise import linear_schedule

# What a run folder holds.
CONFIG_FILE, METRICS_FILE, SUMMARY_FILE = "config.yaml", "metrics.jsonl", "summary.json"
INDEX_FILE = "model_index.json"  # by which an exported folder is known
CHECKPOINTS, SAMPLES = "checkpoints", "samples"
# Its one line says why the same command should be run again; without it, it should not.
REQUEUE_FILE = "requeue"
LOCK_FILE = "lock"


Autoencoder = IdentityAutoencoder | KLAutoencoder


def write_text(path: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    temporary = path.with_name(f"{path.name}.partial")
    temporary.write_text(text)
    os.replace(temporary, path)


def read_summary(folder: Path) -> dict[str, Any] | None:
    """What a complete run says of itself; None where it is not complete, or its summary is damaged."""
    try:
        summary = json.loads((folder / SUMMARY_FILE).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(summary, dict):
        return None
    counts = (summary.get("num_steps"), summary.get("train_seconds"))
    return summary if all(isinstance(count, int | float) for count in counts) else None


def load_config(paths: str | Path | Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """A config, checked; on how many ranks it will train is not known. Arguments and errors as `config.load`."""
    config = configs.load(paths, overrides)
    # So many ranks divide whatever there is to divide.
    configs.check(config, max(1, config.train.global_batch_size))
    return config


def load_run_config(folder: Path) -> Config:
    """The config of a run folder, checked; UserError where the folder is no run's."""
    path = folder / CONFIG_FILE
    if (folder / INDEX_FILE).is_file():
        raise UserError(f"run folder {folder}: expected a run folder, got an export of one; give the run's")
    if not path.is_file():
        run = folder.parents[1] if len(folder.parents) > 1 else folder
        if (run / CONFIG_FILE).is_file():
            raise UserError(f"run folder {folder}: expected a run folder, got a checkpoint of one; give {run}")
        raise UserError(f"run folder {folder} holds no {path.name}; give a folder that cfpretrain/train.py has written")
    config = load_config(path)
    # The folder may have been moved since.
    return dataclasses.replace(config, run=dataclasses.replace(config.run, folder=str(folder)))


def choose_blocks(config: Config, device_type: str) -> BlockSettings:
    """How the blocks compute in training on a device.

    Args:
        config: its section `engine` decides.
        device_type: "cpu" or "cuda".

    Raises:
        UserError: what the config asks for does not run there.
    """
    engine, model = config.engine, config.model
    try:
        cached = attention.choose_cached(
            engine.cached_attention, device_type, engine.precision, model.width // model.num_heads
        )
    except ValueError as error:
        raise UserError(f"engine.cached_attention: {error}") from error
    fused_norm = device_type == "cuda" and not engine.compile_blocks and has_apex()
    return BlockSettings(
        choose_attention(config, device_type),
        cached,
        engine.compile_blocks,
        engine.activation_checkpointing,
        fused_norm,
    )


def choose_attention(config: Config, device_type: str) -> str:
    """The backend of attention in training on a device ("cpu" or "cuda"); raises as `choose_blocks` does."""
    engine, model = config.engine, config.model
    try:
        return attention.choose(engine.attention, device_type, model.width // model.num_heads)
    except ValueError as error:
        raise UserError(f"engine.attention: {error}") from error


def make_model(config: Config, blocks: BlockSettings | None = None) -> CausalFusion:
    """The network, with weights of no particular value.

    Args:
        config: its section `model` says what the network is.
        blocks: how it computes; left out, in the plainest way, which runs everywhere.
    """
    model = config.model
    return CausalFusion(
        grid=model.grid,
        patch_values=model.patch_values,
        width=model.width,
        depth=model.depth,
        num_heads=model.num_heads,
        num_cond_tokens=model.num_cond_tokens,
        num_classes=model.num_classes,
        learnable_positions=model.position_embedding == "learnable",
        blocks=blocks,
    )


def initial_weights(config: Config) -> WriteInitialValues:
    """What `Engine.initialise` gives a model of `make_model`, drawn on the device that holds it."""
    return functools.partial(write_initial_values, config.run.seed, config.model.grid)


def make_untrained(config: Config, device: torch.device) -> CausalFusion:
    """The model as a run begins with it, in fp32, for sampling: what any training must beat."""
    with torch.device("meta"):
        model = make_model(config)
    model.to_empty(device=device)
    initialise(model, config.run.seed)
    return model.eval().requires_grad_(False)


def class_names(config: Config) -> tuple[str, ...]:
    """The names of the classes, from the latents trained on; their numbers where those are not at hand."""
    numbers = tuple(map(str, range(config.model.num_classes)))
    try:
        names = read_latents_info(config.data.shards[0]).class_names
    except UserError as error:
        say(
            "WARNING: classes go by their numbers, since their names are read from the latents trained on, which are "
            f"not at hand; a relative data.shards is sought from where the run was started: {error}"
        )
        return numbers
    return names if len(names) == len(numbers) else numbers


def make_loss(config: Config) -> NoisePredictionLoss:
    """The training objective."""
    order, noise = config.order, config.noise
    return NoisePredictionLoss(
        schedule=linear_schedule(noise.num_timesteps, noise.beta_first, noise.beta_last),
        patch_size=config.model.patch_size,
        num_cond_tokens=config.model.num_cond_tokens,
        null_class=config.model.num_classes,
        label_drop_prob=config.train.label_drop_prob,
        ar_step_decay=order.ar_step_decay,
        ar_split=order.ar_split,
        ar_weight_first=order.ar_weight_first,
        ar_weight_last=order.ar_weight_last,
        ar_weight_schedule=order.ar_weight_schedule,
        seed=config.run.seed,
        num_ar_steps=order.num_ar_steps,
        ar_step_sizes=order.ar_step_sizes,
        token_order=order.token_order,
        block_size=order.block_size,
        clean_multiple=config.clean_token_multiple(),
    )


def make_prepare(config: Config) -> Prepare[Batch]:
    """What makes of samples as they are read the batch of a training step: the loader's share of the step."""
    scaling, loss, model = make_scaling(config), make_loss(config), config.model

    def prepare(samples: Samples, step: int) -> Batch:
        draws = loss.draw(step, samples.epoch, samples.ids_B, samples.labels_B, model.num_tokens, model.patch_values)
        return loss.prepare(scaling.to_model(samples.latents_BCYX), draws)

    return prepare


def make_scaling(config: Config) -> LatentScaling:
    """Shift and scale between raw latents and those that the network sees."""
    return LatentScaling(config.data.latent_shift, config.data.latent_scale)


def make_autoencoder(config: Config, device: torch.device) -> Autoencoder:
    """What turns the network's latents into images; UserError where `data.autoencoder` cannot be loaded."""
    if config.data.autoencoder:
        return KLAutoencoder.load(config.data.autoencoder, device)
    return IdentityAutoencoder(make_scaling(config))


def make_store(config: Config) -> CheckpointStore:
    """The checkpoints of a run."""
    keep = config.checkpoint
    return CheckpointStore(Path(config.run.folder) / CHECKPOINTS, keep.keep_last, keep.keep_every_steps)


# Of a checkpoint: its step, the one with the best score while training, or the latest.
Step = int | Literal["best"] | None


def find_checkpoint(run: Path, step: Step = None) -> tuple[Config, Path]:
    """The config of a run, and a checkpoint of it.

    Raises:
        UserError: the folder is no run's, or it holds no such checkpoint.
    """
    config = load_run_config(run)
    store = make_store(config)
    there = store.candidates()
    if not there:
        raise UserError(f"run folder {run} holds no complete checkpoint yet; train until checkpoint.every_steps")
    if step is None:
        return config, there[0]
    if step == "best":
        best = store.best()
        if best is None:
            raise UserError(
                f"--step: expected a run that scores itself (evaluation.every_steps), got {run}; leave it out"
            )
        step = best.step
    found = next((one for one in there if one.name == f"step_{step:08d}"), None)
    if found is None:
        steps = ", ".join(str(int(one.name.removeprefix("step_"))) for one in reversed(there))
        raise UserError(f"--step: expected a checkpoint of {run} (steps {steps}), got {step}")
    return config, found


def load_run(
    folder: Path, device: torch.device, which: Literal["ema", "weights"] = "ema", step: Step = None
) -> tuple[Config, CausalFusion, int]:
    """The model of a run's checkpoint, for sampling and scoring.

    Args:
        folder: of the run.
        device: where the model will compute.
        which: the averaged weights, or the trained ones themselves.
        step: of the checkpoint; see `find_checkpoint`.

    Returns:
        The run's config, the model in fp32 on `device`, and the checkpoint's step.

    Raises:
        UserError: the folder is not a run's, or holds no such checkpoint.
    """
    config, checkpoint = find_checkpoint(folder, step)
    found_step = read_state(checkpoint).step
    with torch.device("meta"):
        model = make_model(config)
    try:
        model.load_state_dict(read_tensors(checkpoint, which), assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"checkpoint {checkpoint} does not fit {folder / CONFIG_FILE}: {reason:.300}") from error
    return config, model.to(device).eval().requires_grad_(False), found_step


def plan_memory(config: Config, num_ranks: int, on_gpu: bool) -> tuple[memory.Network, memory.Plan]:
    """The sizes of a config's network and the plan of its step, from which `memory.estimate` follows."""
    with torch.device("meta"):
        numels = [parameter.numel() for parameter in make_model(config).parameters()]
    device = torch.device("cuda" if on_gpu else "cpu")
    settings = ds_config(config, num_ranks, device)["zero_optimization"]
    attention = choose_attention(config, device.type)
    return memory.network_of(config, numels), memory.plan_of(config, num_ranks, settings, attention, on_gpu)
