"""From a config to what it describes (network, objective, autoencoder), and from a run folder to its model."""

import dataclasses
import functools
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch

from cfpretrain.autoencoder import IdentityAutoencoder, KLAutoencoder
from cfpretrain.base import config as configs
from cfpretrain.base import config_checks
from cfpretrain.base.config import Config
from cfpretrain.base.console import UserError, one_line, say
from cfpretrain.base.files import read_json
from cfpretrain.base.typed import Natural, NotNegative, from_plain
from cfpretrain.core import attention
from cfpretrain.core.ar import ARSettings
from cfpretrain.core.block import BlockSettings
from cfpretrain.core.latents import LatentScaling
from cfpretrain.core.model import CausalFusion, WriteInitialValues, write_initial_values
from cfpretrain.core.norm import has_apex
from cfpretrain.core.objective import Batch, DenoisingLoss
from cfpretrain.core.process import NoiseProcess, make_process
from cfpretrain.core.tasks import Tasks
from cfpretrain.core.texts import TEXT, Marks
from cfpretrain.data.interleaved import num_images
from cfpretrain.data.sample_texts import encode_texts
from cfpretrain.data.samples import Prepare, Samples
from cfpretrain.data.shards import read_info
from cfpretrain.data.tokenizer import TextTokenizer
from cfpretrain.run.checkpoint import TensorFile, check_shapes, open_weights
from cfpretrain.run.checkpoint_store import CheckpointStore, step_of
from cfpretrain.run.state import TrainingState, means_the_same, read_state
from cfpretrain.run.tensor_files import DamagedCheckpointError

# What a run folder holds.
CONFIG_FILE, METRICS_FILE, SUMMARY_FILE = configs.CONFIG_FILE, "metrics.jsonl", "summary.json"
INDEX_FILE = configs.INDEX_FILE  # by which an exported folder is known
CHECKPOINTS, SAMPLES = configs.CHECKPOINTS, "samples"
# Its one line says why the same command should be run again; without it, it should not.
REQUEUE_FILE = "requeue"
SUMMARY_NUMBERS = (
    *("num_steps", "train_seconds", "world_size", "zero_stage", "images_per_second"),
    *("loss_first", "loss_last"),  # without one where no loss was finite
)
LOCK_FILE = "lock"
TOKENIZER_FILE = "tokenizer.json"  # a copy of `data.tokenizer`

Autoencoder = IdentityAutoencoder | KLAutoencoder


class _End(TypedDict):
    num_steps: Natural
    train_seconds: NotNegative


class Summary(_End, total=False):
    """What a complete run says of itself; earlier versions did not say all of it."""

    world_size: Natural
    zero_stage: Natural
    engine_precision: str
    num_skipped_steps: Natural
    num_rewinds: Natural
    skipped_steps: list[Natural]
    images_per_second: NotNegative
    loss_first: NotNegative | None  # where no loss was finite
    loss_last: NotNegative | None
    peak_rss_mb: NotNegative
    versions: dict[str, str]


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The `Summary` of a complete run, without its None values; None where there is none, or it is damaged."""
    file = folder / SUMMARY_FILE
    try:
        summary: Summary = from_plain(Summary, read_json(file), SUMMARY_FILE, ignore_unknown=True)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        say(f"WARNING: {file} is left out, as if the run were not complete: {one_line(error)}")
        return None
    return {name: value for name, value in summary.items() if value is not None}


def checked(config: Config) -> Config:
    """The config, checked, where it is not known on how many ranks it will train."""
    # So many ranks divide whatever there is to divide.
    config_checks.check(config, max(1, config.train.global_batch_size))
    return config


def load_run_config(folder: Path) -> Config:
    """The config of a run folder, checked."""
    path = folder / CONFIG_FILE
    if (folder / INDEX_FILE).is_file():
        raise UserError(f"run folder {folder}: expected a run folder, got an export of one; give the run's")
    if not path.is_file():
        run = folder.parents[1] if len(folder.parents) > 1 else folder
        if (run / CONFIG_FILE).is_file():
            raise UserError(f"run folder {folder}: expected a run folder, got a checkpoint of one; give {run}")
        raise UserError(f"run folder {folder} holds no {path.name}; give a folder that cfpretrain/train.py has written")
    config = checked(configs.load_recorded(path))
    # The folder may have been moved since.
    return dataclasses.replace(config, run=dataclasses.replace(config.run, folder=str(folder)))


def choose_blocks(config: Config, device_type: str) -> BlockSettings:
    """How the blocks compute in training on a device ("cpu" or "cuda")."""
    engine = config.engine
    return BlockSettings(
        choose_attention(config, device_type),
        _choose_backend(config, "cached_attention", "sampling", device_type),
        engine.compile_blocks,
        engine.activation_checkpointing,
        fused_norm=device_type == "cuda" and not engine.compile_blocks and has_apex(),
    )


def choose_attention(config: Config, device_type: str) -> str:
    """The backend of attention in training on a device ("cpu" or "cuda")."""
    return _choose_backend(config, "attention", "training", device_type)


def _choose_backend(config: Config, key: str, job: str, device_type: str) -> str:
    engine, head_width = config.engine, config.model.design.head_width
    try:
        return attention.choose(getattr(engine, key), job, device_type, engine.precision, head_width, say)
    except ValueError as error:
        raise UserError(f"engine.{key}: {error}") from error


def make_model(config: Config, blocks: BlockSettings | None = None) -> CausalFusion:
    """The network, with weights of no particular value; without `blocks` it computes as it can everywhere."""
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
        trunk_kind=model.trunk,
        block_changes=model.block_changes,
        blocks=blocks,
        vocabulary=model.vocabulary,
        max_text_tokens=model.max_text_tokens,
        max_segments=model.max_segments if model.vocabulary else 0,
    )


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The network's parameters, by name."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in make_model(config).named_parameters()}


def initial_weights(config: Config) -> WriteInitialValues:
    """What `Engine.initialise` gives a model of `make_model`, drawn on the device that holds it."""
    return functools.partial(write_initial_values, config.run.seed, config.model.grid)


def _names_of_shards(config: Config) -> tuple[str, ...]:
    """The names of the classes, from the shards trained on; their numbers where those are not on this machine."""
    numbers = tuple(map(str, range(config.model.num_classes)))
    address = config.data.shards[0]
    names: tuple[str, ...] = ()
    reason = f"{address} is an address"  # a store of unknown owner is not contacted from here
    if "://" not in address:
        try:
            names = read_info(address).class_names
        except UserError as error:
            reason = str(error)
    if not names:
        say(
            "WARNING: classes go by their numbers, since this checkpoint does not say their names, and the shards "
            f"trained on are not at hand in {Path.cwd()}: {reason}"
        )
    return names if len(names) == len(numbers) else numbers


def make_noise_process(config: Config) -> NoiseProcess:
    """How tokens are noised, and what the network predicts."""
    return make_process(**vars(config.noise))


def make_tokenizer(config: Config) -> TextTokenizer | None:
    """What makes tokens of texts; None for a model without them."""
    if not config.model.vocabulary:
        return None
    tokenizer = TextTokenizer.load(Path(config.data.tokenizer), "data.tokenizer")
    if tokenizer.size != config.model.vocabulary:
        raise UserError(
            f"model.vocabulary: expected {tokenizer.size}, the token ids of {config.data.tokenizer} with the special "
            f"ones, got {config.model.vocabulary}; set it so"
        )
    return tokenizer


def _make_tasks(config: Config, tokenizer: TextTokenizer | None) -> Tasks | None:
    if tokenizer is None:
        return None
    marks = Marks(*tokenizer.marks)
    return Tasks(vars(config.data.tasks), config.train.text_drop_prob, config.train.image_drop_prob, marks)


def make_loss(config: Config) -> DenoisingLoss:
    """The training objective."""
    return DenoisingLoss(
        process=make_noise_process(config),
        ar=ARSettings(**vars(config.order)),
        patch_size=config.model.patch_size,
        num_cond_tokens=config.model.num_cond_tokens,
        null_class=config.model.num_classes,
        label_drop_prob=config.train.label_drop_prob,
        seed=config.run.seed,
        clean_multiple=config.clean_token_multiple(),
        tasks=_make_tasks(config, make_tokenizer(config)),
        weights={TEXT: config.train.text_loss_weight},
        has_rotary=config.model.design.rotary_base > 0,
    )


def make_prepare(config: Config) -> Prepare[Batch]:
    """What makes of samples as they are read the batch of a training step: the loader's share of the step."""
    scaling, loss, model, tokenizer = make_scaling(config), make_loss(config), config.model, make_tokenizer(config)

    def prepare(samples: Samples, step: int) -> Batch:
        sizes = model.num_tokens, model.patch_values, list(map(num_images, samples.segments))
        draws = loss.draw(step, samples.epoch, samples.ids_B, samples.labels_B, *sizes)
        latents_BCYX, texts = scaling.to_model(samples.latents_BCYX), encode_texts(samples, tokenizer, config)
        batch = loss.prepare(latents_BCYX, draws, tuple(samples.skipped), *texts)
        return dataclasses.replace(batch, skipped=tuple(samples.skipped.values()))

    return prepare


def make_scaling(config: Config) -> LatentScaling:
    """Shift and scale between raw latents and those that the network sees."""
    return LatentScaling(config.data.latent_shift, config.data.latent_scale)


def make_autoencoder(config: Config, device: torch.device, fingerprint: str = "") -> Autoencoder:
    """What turns the network's latents into images.

    Args:
        config: its section `data` says which.
        device: where it will compute.
        fingerprint: of the autoencoder behind the latents that were trained on, which alone is accepted then; empty
            where it is not known.
    """
    if not config.data.autoencoder:
        return IdentityAutoencoder(make_scaling(config))
    check_relative("data.autoencoder", config.data.autoencoder)
    found = KLAutoencoder.load(config.data.autoencoder, device)
    trained = make_scaling(config)
    for name, expected, got in (
        ("fingerprint", fingerprint, found.fingerprint),
        ("shift", trained.shift, found.shift),
        ("scale", trained.scale, found.scale),
    ):
        if fingerprint and not means_the_same(expected, got):
            raise UserError(
                f"data.autoencoder: expected the autoencoder behind the latents that were trained on, of {name} "
                f"{expected}, got {got} in {config.data.autoencoder}; give that one"
            )
    return found


def check_relative(key: str, path: str) -> None:
    """Refuses a relative path of a config that leads nowhere from here, and says what it is relative to."""
    if "://" not in path and not os.path.isabs(path) and not os.path.lexists(path):
        raise UserError(
            f"{key}: {path} does not exist in {Path.cwd()}, the working directory, to which a relative path is "
            "relative; give the command where it exists, or write it as an absolute path"
        )


def make_store(config: Config) -> CheckpointStore:
    """The checkpoints of a run."""
    keep = config.checkpoint
    return CheckpointStore(Path(config.run.folder) / CHECKPOINTS, keep.keep_last, keep.keep_every_steps)


# Of a checkpoint: its step, the one with the best score while training, or the latest.
Step = int | Literal["best"] | None


@dataclass(frozen=True)
class RunCheckpoint:
    """A checkpoint of a run, and what it was trained with."""

    config: Config  # in force when it was written, but that data and autoencoder lie where the run folder's config says
    path: Path  # of its folder
    state: TrainingState

    def class_names(self) -> tuple[str, ...]:
        """One for each class; their numbers where names are not known."""
        if not self.config.model.num_classes:
            return ()
        return tuple(self.state.class_names) or _names_of_shards(self.config)

    def make_autoencoder(self, device: torch.device) -> Autoencoder:
        """What turns its latents into images, which is the one that it was trained with."""
        return make_autoencoder(self.config, device, self.state.autoencoder)

    def open_weights(self, weights: str = "ema") -> TensorFile:
        """The averaged weights ("ema") or the trained ones ("raw"), to be read tensor by tensor."""
        return open_weights(self.path, "ema" if weights == "ema" else "weights")

    def load_model(self, weights: str = "ema") -> CausalFusion:
        """The model with these weights, in fp32 on the CPU, for sampling and scoring."""
        there = self.open_weights(weights)
        check_shapes(there, parameter_shapes(self.config))
        with torch.device("meta"):
            model = make_model(self.config)
        model.load_state_dict(there.read_all(), assign=True)
        return model.eval().requires_grad_(False)


def find_checkpoint(run: Path, step: Step = None) -> RunCheckpoint:
    """A checkpoint of a run, whose config.yaml must not contradict it."""
    current = load_run_config(run)
    store = make_store(current)
    there = store.candidates()
    if not there:
        raise UserError(f"run folder {run} holds no complete checkpoint yet; train until checkpoint.every_steps")
    if step == "best":
        best = store.best()
        if best is None:
            raise UserError(
                f"--step: expected a run that scores itself (evaluation.every_steps), got {run}; leave it out"
            )
        step = best.step
    found = next((one for one in there if step is None or step_of(one) == step), None)
    if found is None:
        steps = ", ".join(str(step_of(one)) for one in reversed(there))
        raise UserError(f"--step: expected a checkpoint of {run} (steps {steps}), got {step}")
    return _with_its_config(found, read_state(found), current)


def config_at(run: Path, step: int) -> Config:
    """The config in force when a run made a step; that of the last start where no later checkpoint records one."""
    current = load_run_config(run)
    for path in reversed(make_store(current).candidates()):  # the oldest first
        with suppress(DamagedCheckpointError):
            state = read_state(path)
            if state.step >= step:
                at_step = dataclasses.replace(state, config=state.config_at(step))
                return _with_its_config(path, at_step, current).config
    return current


def _with_its_config(path: Path, state: TrainingState, current: Config) -> RunCheckpoint:
    """A checkpoint with the config that it says; an older one says little of it, and `current` is taken."""
    file = Path(current.run.folder) / CONFIG_FILE
    contradictions = state.contradictions(configs.to_plain(current))
    if contradictions:
        raise UserError(
            f"{file} contradicts checkpoint {path}, whose weights mean nothing under it: {', '.join(contradictions)}; "
            "set it as the checkpoint says"
        )
    num_names, num_classes = len(state.class_names), current.model.num_classes
    if num_names not in (0, num_classes):
        raise UserError(
            f"checkpoint {path}: expected the names of {num_classes} classes, as its model has, got {num_names}"
        )
    if not state.has_record:
        return RunCheckpoint(current, path, state)
    trained = configs.from_plain(state.config, str(path))
    data = dataclasses.replace(
        trained.data,
        shards=current.data.shards,
        repeat=current.data.repeat,
        cache_folder=current.data.cache_folder,
        autoencoder=_find_autoencoder(current.data.autoencoder or trained.data.autoencoder, state.working_folder),
    )
    return RunCheckpoint(dataclasses.replace(trained, run=current.run, data=data), path, state)


def _find_autoencoder(folder: str, working_folder: str) -> str:
    """Where the autoencoder is: a relative path is first looked for where the run was trained, and then here."""
    there = os.path.join(working_folder, folder)
    is_elsewhere = folder and working_folder and os.path.realpath(working_folder) != os.path.realpath(".")
    return there if is_elsewhere and os.path.isdir(there) else folder
