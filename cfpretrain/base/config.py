"""Every knob of a run, typed: dataclasses <- YAML <- `key.sub=value`, checked once, never mutated."""

import math
import os
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from cfpretrain.base import config_files
from cfpretrain.base.config_files import Address, FilePath, Origin, Range
from cfpretrain.base.config_files import to_plain as to_plain
from cfpretrain.base.config_files import to_shown as to_shown
from cfpretrain.base.config_files import to_yaml as to_yaml
from cfpretrain.base.config_files import without_texts as without_texts
from cfpretrain.base.console import UserError
from cfpretrain.core import attention

# What a run folder holds, and an export.
CONFIG_FILE, CHECKPOINTS, INDEX_FILE = "config.yaml", "checkpoints", "model_index.json"

# The Inception Score has ten splits, and none may be empty.
_FEWEST_SCORED = 20
# Each length is compiled, which takes minutes, and torch has a limit.
_MOST_COMPILED_LENGTHS = 16
_MOST_VALUES = 2**28  # of the tokens of an image

Natural = Annotated[int, Range(0)]
Positive = Annotated[int, Range(1)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]


@dataclass(frozen=True)
class RunConfig:
    folder: FilePath = "runs/run"  # everything a run writes lies here
    seed: Natural = 0


@dataclass(frozen=True)
class ModelConfig:
    latent_size: Annotated[int, Range(1, 4096)] = 16  # rows = columns of the latent grid
    latent_channels: Annotated[int, Range(1, 4096)] = 16
    patch_size: Annotated[int, Range(1, 4096)] = 1  # latent rows = columns of one token
    width: Annotated[int, Range(1, 65536)] = 1024
    depth: Annotated[int, Range(1, 512)] = 24
    num_heads: Annotated[int, Range(1, 1024)] = 16
    num_cond_tokens: Annotated[int, Range(1, 16384)] = 64  # condition tokens a class (Q)
    num_classes: Annotated[int, Range(1, 1_000_000)] = 1000  # the null class is index num_classes
    position_embedding: Literal["learnable", "sincos"] = "learnable"

    @property
    def grid(self) -> int:
        """Rows = columns of the token grid."""
        return self.latent_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Tokens of an image (L)."""
        return self.grid**2

    @property
    def patch_values(self) -> int:
        """Values of one token (P)."""
        return self.patch_size**2 * self.latent_channels


@dataclass(frozen=True)
class OrderConfig:
    num_ar_steps: Natural = 0  # AR steps (S) of every image; 0 = drawn
    # P(S) is proportional to ar_step_decay^(S-1), where S is drawn.
    ar_step_decay: Annotated[float, Range(1e-9, 1)] = 0.9
    ar_step_sizes: Literal["random", "equal"] = "random"  # uniform cut points, or num_ar_steps equal steps
    ar_split: Literal["sample", "batch"] = "sample"  # who shares a split: nobody, or a global batch
    ar_weight_first: NotNegative = 2.0  # loss weight of a step that begins at token 0
    ar_weight_last: NotNegative = 1.0  # its limit for a step that begins at token L
    ar_weight_schedule: Literal["linear", "cosine"] = "linear"
    token_order: Literal["random", "raster", "block_raster", "dilated"] = "random"  # see order.fixed_order
    block_size: Positive = 4  # block_raster: rows = columns of tokens of a block; dilated: the stride


@dataclass(frozen=True)
class NoiseConfig:
    # What the network predicts: the noise or v on DDPM's schedule, or the velocity of flow matching.
    process: Literal["epsilon", "v", "flow"] = "epsilon"
    num_timesteps: Annotated[int, Range(2, 1_000_000)] = 1000
    beta_first: Annotated[float, Range(1e-9, 1)] = 1e-4  # betas are scaled by 1000 / num_timesteps
    beta_last: Share = 0.02  # both of epsilon and v
    flow_times: Literal["logit_normal", "uniform"] = "logit_normal"  # how flow draws times in training


@dataclass(frozen=True)
class DataConfig:
    shards: tuple[Address, ...] = ("data/latents",)  # folders of latent shards, or addresses: s3://bucket/folder
    # How often an epoch goes through each; one value, or one a folder.
    repeat: tuple[Annotated[float, Range(1e-9, 127)], ...] = (1.0,)
    autoencoder: FilePath = ""  # folder of the autoencoder behind the latents, to decode samples; none: pixels
    latent_shift: tuple[float, ...] = (0.0,)  # model sees (raw - shift) * scale; one value, or C
    latent_scale: tuple[float, ...] = (0.2325,)
    mirror_prob: Share = 0.5  # 0 for digits and text
    num_workers: Annotated[int, Range(0, 1024)] = 4  # loader processes a rank; 0 loads in the training process
    num_canonical_nodes: Positive = 1  # fixes the shuffle whatever the number of nodes
    shuffle_block_size: Positive = 262144  # samples shuffled together
    cache_folder: FilePath = "data/cache"  # copies of shards from addresses; may be shared by runs
    cache_limit_gb: NotNegative = 0.0  # 0 = none; the least recently used make place
    download_patience_seconds: NotNegative = 300.0  # a storage that is away is asked again for so long


@dataclass(frozen=True)
class TrainConfig:
    global_batch_size: Positive = 2048  # samples an optimizer step, over all ranks
    micro_batch_size: Positive = 32  # most samples a forward on one rank
    num_steps: Positive = 500_000
    max_train_seconds: NotNegative = 0.0  # stop after this much training too; 0 = no limit
    label_drop_prob: Share = 0.1  # labels replaced by the null class
    learning_rate: NotNegative = 8e-4
    warmup_steps: Natural = 25_000
    decay_steps: int = 0  # the last of num_steps, over which the learning rate falls to 0; 0 = constant
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: matrices of the blocks by Muon, the rest by AdamW
    muon_momentum: Annotated[float, Range(0, 1 - 1e-9)] = 0.95
    adam_beta1: Annotated[float, Range(0, 1 - 1e-9)] = 0.9
    adam_beta2: Annotated[float, Range(0, 1 - 1e-9)] = 0.95
    adam_eps: NotNegative = 1e-15
    weight_decay: NotNegative = 0.0  # of matrices: norms, biases and embeddings do not decay
    clip_grad_norm: NotNegative = 1.0  # 0 = no clipping
    ema_decay: Share = 0.9999


@dataclass(frozen=True)
class EngineConfig:
    zero_stage: Annotated[int, Range(0, 3)] = 3
    precision: Literal["bf16", "fp32"] = "bf16"
    # Where the mask holds: in training. auto: our kernel (triton) on a GPU, else what runs there.
    attention: str = "auto"  # a backend of core.attention
    cached_attention: str = "auto"  # where all is visible: in sampling
    compile_blocks: bool = False  # torch.compile; the first steps of each length take minutes
    # Clean tokens are padded up to a multiple of it, so that sequences have few lengths; 0 = at most 9 lengths where
    # kernels are compiled for each (compile_blocks, or attention: flex, which auto is on a GPU where heads are 16 or
    # more wide and not 32, 64 or 128), else no padding.
    clean_token_multiple: int = 0
    activation_checkpointing: bool = False  # keep only the blocks' inputs, compute the rest twice
    ema_on_host: bool = False  # EMA in host memory


@dataclass(frozen=True)
class GuardConfig:
    # A loss or gradient norm that lies so many robust standard deviations above the median of the latest applied steps
    # is a spike, and its step is skipped, as one is that is not finite; 0 = only those.
    spike_deviations: NotNegative = 20.0
    window_steps: Annotated[int, Range(32, 1_000_000)] = 200  # applied steps that say what is usual
    max_skips_in_row: Positive = 10  # then back to the last checkpoint, and on with the data after the skipped
    max_rewinds: Natural = 3  # in a run; then it stops
    # A run ends when a rank keeps the others waiting for longer.
    rank_timeout_seconds: Annotated[float, Range(5)] = 600.0


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: Positive = 1000
    keep_last: Positive = 2
    keep_every_steps: Natural = 0  # kept forever when its step is a multiple of this; 0 = none


@dataclass(frozen=True)
class SampleConfig:
    every_steps: Natural = 5000  # a grid of EMA samples; 0 = only at the end
    num_per_class: Annotated[int, Range(1, 10_000)] = 4
    max_classes: Positive = 10  # classes shown in the grid
    num_denoising_steps: int = 250
    guidance: NotNegative = 2.0
    num_ar_steps: tuple[int, ...] = (1,)  # one picture for each


@dataclass(frozen=True)
class EvaluationConfig:
    every_steps: Natural = 0  # a score of the EMA weights beside real images, and one at the end; 0 = none at all
    reference: FilePath = ""  # real images: a folder of files, image shards or an .npz; or an .npz of their statistics
    features: str = "effnet_lite0"  # or inception; module:function on the command line alone
    feature_weights: FilePath = ""  # file of the FID Inception's weights, for features: inception
    feature_label: str = ""  # takes other weights of it, and names their score
    # Generated for a score, over all ranks; classes evenly spread.
    num_images: Annotated[int, Range(_FEWEST_SCORED, 10_000_000)] = 5000
    guidance: NotNegative = 1.0  # 1 = none
    num_ar_steps: int = 1
    num_denoising_steps: int = 25  # of each AR step
    solver: Literal["ddpm", "ddim", "dpm++", "sde-dpm++"] = "sde-dpm++"


@dataclass(frozen=True)
class MetricsConfig:
    log_every_steps: Positive = 20
    log_sample_ids: bool = False  # in each row, the ids of the samples that the step was trained on
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"  # auto: offline without a key
    wandb_project: str = "cfpretrain"


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    order: OrderConfig = field(default_factory=OrderConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    def micro_batch_size(self, world_size: int) -> int:
        """Samples a forward on one rank: fewer than the knob says where the global batch leaves a rank fewer."""
        return min(self.train.micro_batch_size, self.train.global_batch_size // world_size)

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches a rank adds up in one optimizer step."""
        return self.train.global_batch_size // (self.micro_batch_size(world_size) * world_size)

    def compiles_lengths(self) -> bool:
        """Whether kernels are compiled for each length of a sequence, on whatever device that is.

        A config means the same sequences on every device, so a CPU pads them as a GPU does.
        """
        head_width = self.model.width // self.model.num_heads
        return self.engine.compile_blocks or attention.needs_padding(self.engine.attention, head_width)

    def clean_token_multiple(self) -> int:
        """What the number of clean image tokens is padded up to a multiple of, resolved: 1 (no padding) to L."""
        num_tokens = self.model.num_tokens
        if self.engine.clean_token_multiple:
            return min(self.engine.clean_token_multiple, num_tokens)
        if not self.compiles_lengths():
            return 1
        # Multiples of 64: 64 at 256 tokens (5 lengths), 128 at 1024 (9 lengths).
        return min(64 * -(-num_tokens // 512), num_tokens)


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load(paths: str | Path | Sequence[str | Path], overrides: Sequence[str] = (), allow_env: bool = False) -> Config:
    """Reads YAML files and `key.sub=value` overrides into a typed config.

    Args:
        paths: one file or several; where two set the same key, the later one wins.
        overrides: win over all files.
        allow_env: whether `${oc.env:NAME}` is read, in what the user wrote.

    Raises:
        UserError: a file is missing or not YAML; unknown keys and wrong types, all in one message; `${` in the config
            of a run or an export, which holds values alone.
    """
    return load_with_origins(paths, overrides, allow_env)[0]


def load_recorded(file: str | Path) -> Config:
    """The config of a run or an export, which holds values alone; errors as `load`."""
    return typing.cast(Config, config_files.load(Config, file, (), is_recorded=lambda _: True)[0])


def is_recorded(file: Path) -> bool:
    """Whether a config is of a run or an export, by what lies beside it."""
    folder = file.expanduser().parent
    return file.name == CONFIG_FILE and any(os.path.lexists(folder / name) for name in (CHECKPOINTS, INDEX_FILE))


def check_code(config: Config, origins: Mapping[str, Origin], allow_code: bool) -> None:
    """Refuses to import what a file names: a stranger's run would have its own code run where it is trained on.

    Args:
        config: of a run that is to train.
        origins: of `load_with_origins`.
        allow_code: whether a file of the user's own may name it; that of a run may not.

    Raises:
        UserError: says how to name it.
    """
    named, origin = config.evaluation.features, origins.get("evaluation.features")
    if ":" not in named or not config.evaluation.every_steps or origin is None:
        return
    if origin.name != config_files.COMMAND_LINE and (not allow_code or is_recorded(Path(origin.name))):
        raise UserError(
            f"{origin.name}: evaluation.features: {named!r:.100} is code, which a config file may not run; to run it, "
            "give evaluation.features=MODULE:FUNCTION on the command line, or --allow-code with a config of your own"
        )


def load_with_origins(
    paths: str | Path | Sequence[str | Path], overrides: Sequence[str] = (), allow_env: bool = False
) -> tuple[Config, dict[str, Origin]]:
    """As `load`, and for each key that is set ("train.num_steps") the file that it came from, or the command line."""
    return config_files.load(Config, paths, overrides, allow_env, is_recorded)


def from_plain(plain: Any, source: str) -> Config:
    """Builds a config from nested dicts; raises UserError with every unknown key, wrong type and reference."""
    config_files.refuse_references(plain, source)
    return typing.cast(Config, config_files.from_plain(Config, plain, source))


# ---------------------------------------------------------------------------------------------------------------------
# Checking


def check(config: Config, world_size: int) -> None:
    """Refuses a config that cannot run on `world_size` ranks, naming every problem at once.

    Raises:
        UserError: each problem names its key, what was expected, what came and the fix.
    """
    outside = list(config_files.out_of_range(config, Config))
    wrong = {problem.key for problem in outside}
    problems = [*map(str, outside), *_check_numbers(config), *_check_data(config)]
    if not wrong & {("train", "global_batch_size"), ("train", "micro_batch_size")}:
        problems += _check_batch(config, world_size)
    if "model" not in {section for section, *_ in wrong}:
        problems += [
            *_check_model(config.model),
            *_check_order(config),
            *_check_engine(config),
            *_check_sampling(config),
            *_check_scaling(config),
        ]
    if problems:
        count = "" if len(problems) == 1 else f"{len(problems)} problems: "
        raise UserError(f"config: {count}{' | '.join(problems)}")


def _check_numbers(config: Config) -> Iterable[str]:
    if not config.run.folder.strip():
        yield "run.folder: expected the path of a folder, got an empty text; give one, e.g. run.folder=runs/mine"
    if not 0 <= config.train.decay_steps <= config.train.num_steps:
        yield (
            f"train.decay_steps: expected between 0 and train.num_steps = {config.train.num_steps}, "
            f"got {config.train.decay_steps}; change it with train.num_steps, 0 for a constant learning rate"
        )
    if config.order.ar_weight_first < config.order.ar_weight_last:
        yield (
            f"order.ar_weight_first: expected at least order.ar_weight_last = {config.order.ar_weight_last:g}, "
            f"got {config.order.ar_weight_first:g}; earlier AR steps weigh more"
        )
    if config.noise.beta_first > config.noise.beta_last:
        yield f"noise.beta_first: expected at most noise.beta_last = {config.noise.beta_last:g}; noise grows with t"
    has_betas = config.noise.process != "flow" and config.noise.num_timesteps >= 1
    if has_betas and config.noise.beta_last * 1000 / config.noise.num_timesteps >= 1:
        yield (
            f"noise.num_timesteps: expected more than {1000 * config.noise.beta_last:g}, since betas are scaled by "
            f"1000 / num_timesteps and must stay under 1, got {config.noise.num_timesteps}"
        )


def doubts(config: Config, origins: Mapping[str, Origin]) -> list[str]:
    """What is allowed and hardly ever meant, a line for each.

    Args:
        config: passed the check.
        origins: of `load_with_origins`.
    """
    train, found = config.train, []
    if train.warmup_steps > train.num_steps:
        found.append(
            f"train.warmup_steps: {train.warmup_steps} are more than train.num_steps = {train.num_steps}: the learning "
            f"rate never exceeds {train.learning_rate * train.num_steps / train.warmup_steps:.3g}; set fewer"
        )
    initial_share = train.ema_decay**train.num_steps
    if initial_share > 0.05:
        found.append(
            f"train.ema_decay: at the end {initial_share:.0%} of the averaged weights, which make the samples, are "
            f"still the initial ones; for {train.num_steps} steps set about {max(0.0, 1 - 10 / train.num_steps):.3g}"
        )
    return [*found, *_doubt_mirrors(config.data, origins)]


def _doubt_mirrors(data: DataConfig, origins: Mapping[str, Origin]) -> Iterable[str]:
    """A preset for digits under a config for photos: nothing else would tell that they are never mirrored."""
    shards, mirrors = origins.get("data.shards"), origins.get("data.mirror_prob")
    if data.mirror_prob > 0 or shards is None or mirrors is None or shards.name == config_files.COMMAND_LINE:
        return
    if mirrors < shards:
        yield (
            f"data.mirror_prob: 0 in {mirrors.name} also holds for data.shards of {shards.name}, so no image is "
            f"mirrored; set it in {shards.name} too: 0.5 where a mirrored image is as good, else 0"
        )


def _check_model(model: ModelConfig) -> Iterable[str]:
    if model.num_tokens * model.width > _MOST_VALUES:
        yield (
            f"model.latent_size: expected at most {_MOST_VALUES:g} values of all tokens together, got "
            f"{model.num_tokens} tokens of model.width = {model.width}; set a larger model.patch_size"
        )
    if model.latent_size % model.patch_size:
        yield f"model.patch_size: expected a divisor of model.latent_size = {model.latent_size}, got {model.patch_size}"
    if model.width % model.num_heads:
        yield f"model.num_heads: expected a divisor of model.width = {model.width}, got {model.num_heads}"
    if model.width % 4:
        yield f"model.width: expected a multiple of 4 (2-d sin-cos positions), got {model.width}"


def _check_order(config: Config) -> Iterable[str]:
    order, num_tokens, grid = config.order, config.model.num_tokens, config.model.grid
    if order.num_ar_steps > num_tokens:
        yield (
            f"order.num_ar_steps: expected at most {num_tokens} (the tokens of an image), or 0 to draw it, "
            f"got {order.num_ar_steps}"
        )
    if order.ar_step_sizes == "equal" and order.num_ar_steps == 0:
        yield (
            "order.ar_step_sizes: equal sizes need a fixed number of AR steps, got order.num_ar_steps = 0 (drawn); "
            "set order.num_ar_steps, or order.ar_step_sizes=random"
        )
    if order.token_order in ("block_raster", "dilated") and order.block_size >= 1 and grid % order.block_size:
        yield (
            f"order.block_size: expected a divisor of {grid}, the token grid's rows, for "
            f"order.token_order = {order.token_order}, got {order.block_size}"
        )


def _check_engine(config: Config) -> Iterable[str]:
    engine, model = config.engine, config.model
    key = ("engine", "clean_token_multiple")
    yield from map(str, config_files.in_range(key, engine.clean_token_multiple, 0, model.num_tokens))
    for knob, name, job in (
        ("attention", engine.attention, "training"),
        ("cached_attention", engine.cached_attention, "sampling"),
    ):
        if name not in attention.names(job):
            yield f"engine.{knob}: expected one of {', '.join(attention.names(job))}; got {name!r}"
    if engine.attention not in attention.names("training"):
        return
    if model.width % model.num_heads == 0:
        yield from _check_head_width(engine.attention, model.width // model.num_heads)
    if 1 <= engine.clean_token_multiple <= model.num_tokens and config.compiles_lengths():
        yield from _check_num_lengths(config)
    if engine.activation_checkpointing and not can_checkpoint(engine.zero_stage, engine.precision):
        yield (
            "engine.activation_checkpointing: expected false at engine.zero_stage = 0 in bf16, which would recompute "
            "with the fp32 weights, got true; set engine.zero_stage=1"
        )


def can_checkpoint(zero_stage: int, precision: str) -> bool:
    """Whether activation checkpointing recomputes what the forward computed."""
    return zero_stage > 0 or precision == "fp32"


def _check_num_lengths(config: Config) -> Iterable[str]:
    order, multiple = config.order, config.clean_token_multiple()
    if order.ar_step_sizes == "equal" or order.num_ar_steps == 1:
        return
    # The last AR step begins at S - 1 at the earliest, and at L - 1 at the latest.
    first, last = -(-max(order.num_ar_steps - 1, 0) // multiple), -(-(config.model.num_tokens - 1) // multiple)
    num_lengths = last - first + 1
    if num_lengths > _MOST_COMPILED_LENGTHS:
        yield (
            f"engine.clean_token_multiple: expected one that makes at most {_MOST_COMPILED_LENGTHS} lengths, since "
            f"kernels are compiled for each, got {multiple}, which makes {num_lengths}; set a larger one, or 0 to have "
            "it chosen"
        )


def _check_head_width(name: str, head_width: int) -> Iterable[str]:
    if name != "auto" and head_width not in attention.BACKENDS[name].head_widths:
        yield (
            f"engine.attention: {name} needs heads of width {attention.BACKENDS[name].widths}, got model.width / "
            f"model.num_heads = {head_width}; change model.num_heads, or set engine.attention=sdpa"
        )


def _check_data(config: Config) -> Iterable[str]:
    data, patience = config.data, config.data.download_patience_seconds
    if not data.shards or "" in data.shards:
        yield f"data.shards: expected folders or addresses, got {list(data.shards)}"
    places = [one.rstrip("/") if "://" in one else os.path.realpath(one) for one in data.shards]
    twice = [one for one, place in zip(data.shards, places, strict=True) if places.count(place) > 1]
    if twice:
        yield f"data.shards: expected each folder once, got {' and '.join(twice)}; set data.repeat to see it more often"
    if len(data.repeat) not in (1, len(data.shards)):
        yield f"data.repeat: expected 1 or {len(data.shards)} values (one a folder), got {len(data.repeat)}"
    if not data.cache_folder:
        yield "data.cache_folder: expected the path of a folder, got an empty text"
    is_remote = any("://" in address for address in data.shards)
    if is_remote and not patience < config.guard.rank_timeout_seconds:
        yield (
            f"data.download_patience_seconds: expected less than guard.rank_timeout_seconds = "
            f"{config.guard.rank_timeout_seconds:g}, after which a waiting rank is taken for lost, got {patience:g}"
        )


def _check_sampling(config: Config) -> Iterable[str]:
    sample, evaluation = config.sample, config.evaluation
    if not sample.num_ar_steps:
        yield "sample.num_ar_steps: expected at least one number of AR steps, got none"
    sections = {"sample": sample.num_ar_steps}
    # A section that is off need not fit: its defaults are of larger models.
    if evaluation.every_steps:
        sections["evaluation"] = (evaluation.num_ar_steps,)
        if not evaluation.reference:
            yield (
                "evaluation.reference: expected real images (a folder, image shards or an .npz), got none; give them, "
                "or set evaluation.every_steps=0"
            )
    for section, num_ar_steps in sections.items():
        num_levels = getattr(config, section).num_denoising_steps
        yield from map(
            str, config_files.in_range((section, "num_denoising_steps"), num_levels, 2, config.noise.num_timesteps)
        )
        for num in num_ar_steps:
            if not 1 <= num <= max(config.model.num_tokens, 1):
                num_tokens = config.model.num_tokens
                yield f"{section}.num_ar_steps: expected 1 to {num_tokens} (the tokens of an image), got {num}"


def _check_scaling(config: Config) -> Iterable[str]:
    channels = config.model.latent_channels
    for name in ("latent_shift", "latent_scale"):
        values = getattr(config.data, name)
        if len(values) not in (1, channels):
            yield f"data.{name}: expected 1 or {channels} values (one a latent channel), got {len(values)}"
        if not all(map(math.isfinite, values)):
            yield f"data.{name}: expected finite numbers, got {', '.join(map(str, values))}"
    if 0.0 in config.data.latent_scale:
        yield "data.latent_scale: expected non-zero numbers, got 0"


def _check_batch(config: Config, world_size: int) -> Iterable[str]:
    train = config.train
    if train.global_batch_size % world_size:
        yield (
            f"train.global_batch_size: expected a multiple of the {world_size} ranks, got {train.global_batch_size}; "
            "change it or the number of ranks"
        )
        return
    share, micro = train.global_batch_size // world_size, config.micro_batch_size(world_size)
    if share % micro:
        yield (
            f"train.micro_batch_size: expected a divisor of {share}, a rank's share of train.global_batch_size = "
            f"{train.global_batch_size} on {world_size} ranks, got {micro}"
        )
