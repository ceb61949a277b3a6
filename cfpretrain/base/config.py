"""Every knob of a run, typed: dataclasses <- YAML <- `key.sub=value`; `config_checks` says which go together."""

import os
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from cfpretrain.base import config_files, typed
from cfpretrain.base.config_files import Origin
from cfpretrain.base.config_files import to_plain as to_plain
from cfpretrain.base.config_files import to_shown as to_shown
from cfpretrain.base.config_files import to_yaml as to_yaml
from cfpretrain.base.config_files import without_texts as without_texts
from cfpretrain.base.typed import Address, FilePath, Natural, NotNegative, Positive, Range, Share
from cfpretrain.core import attention
from cfpretrain.core.design import CHANGES, BlockDesign, make_design

# What a run folder holds, and an export.
CONFIG_FILE, CHECKPOINTS, INDEX_FILE = "config.yaml", "checkpoints", "model_index.json"

# The Inception Score has ten splits, and none may be empty.
_FEWEST_SCORED = 20


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
    # The null class is index num_classes; 0 = no classes at all, but texts.
    num_classes: Annotated[int, Range(0, 1_000_000)] = 1000
    position_embedding: Literal["learnable", "sincos"] = "learnable"
    vocabulary: Annotated[int, Range(0, 1_000_000)] = 0  # token ids of texts, as data.tokenizer has; 0 = no texts
    max_text_tokens: Annotated[int, Range(2, 65536)] = 64  # of a text, the two that frame it among them
    max_segments: Annotated[int, Range(2, 4096)] = 2  # texts and images of a sample, which are told their places
    # What a block computes (see core.design): the paper's, or a language model's.
    trunk: Literal["causalfusion", "gpt2", "llama", "qwen3"] = "causalfusion"
    # Of its blocks, in which models of one kind differ; 0, auto or nothing: as the kind has it.
    num_kv_heads: Annotated[int, Range(0, 1024)] = 0  # heads with keys and values of their own; 0 = num_heads
    head_width: Annotated[int, Range(0, 65536)] = 0  # 0 = width / num_heads
    mlp_width: Annotated[int, Range(0, 262_144)] = 0  # inside of the MLP; 0 = 4 * width
    mlp: Literal["auto", "gelu", "gelu_tanh", "swiglu"] = "auto"
    norm_eps: Annotated[float, Range(0, 1)] = 0.0
    rotary_base: NotNegative = 0.0  # of rotary positions
    # Llama 3's: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings.
    rotary_scaling: tuple[float, ...] = ()
    # Images and classes have norms and matrices of their own beside those of texts.
    separate_image_weights: bool = False

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

    @property
    def block_changes(self) -> dict[str, Any]:
        """What the blocks have otherwise than others of their kind, as `core.design.make_design` takes it."""
        return {name: getattr(self, name) for name in CHANGES if getattr(self, name) not in (0, False, "auto", ())}

    @property
    def design(self) -> BlockDesign:
        """What a block computes, and its sizes."""
        return make_design(self.trunk, self.width, self.num_heads, self.block_changes)

    @property
    def has_paper_blocks(self) -> bool:
        """Whether a block computes what the paper's does."""
        return self.design == make_design("causalfusion", self.width, self.num_heads)


@dataclass(frozen=True)
class OrderConfig:
    num_ar_steps: Natural = 0  # AR steps (S) of every image; 0 = drawn
    # P(S) is proportional to ar_step_decay^(S-1), where S is drawn.
    ar_step_decay: Annotated[float, Range(1e-9, 1)] = 0.9
    ar_step_sizes: Literal["random", "equal"] = "random"  # uniform cut points, or num_ar_steps equal steps
    ar_split: Literal["sample", "batch"] = "sample"  # each sample has its own split, or a global batch shares one
    ar_weight_first: NotNegative = 2.0  # loss weight of a step that begins at token 0
    ar_weight_last: NotNegative = 1.0  # its limit for a step that begins at token L
    ar_weight_schedule: Literal["linear", "cosine"] = "linear"
    token_order: Literal["random", "raster", "block_raster", "dilated"] = "random"  # see core.ar.fixed_order
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
class TasksConfig:
    # What a sample is trained as, drawn with these weights for each visit (core.tasks).
    class_to_image: NotNegative = 1.0
    text_to_image: NotNegative = 0.0
    image_to_text: NotNegative = 0.0
    interleaved: NotNegative = 0.0  # the texts and images of a sample, which shards then have as segments


@dataclass(frozen=True)
class DataConfig:
    # Folders of latent shards, or of image shards, which are encoded during training; or addresses: s3://bucket/folder
    shards: tuple[Address, ...] = ("data/latents",)
    # How often an epoch goes through each; one value, or one a folder.
    repeat: tuple[Annotated[float, Range(1e-9, 127)], ...] = (1.0,)
    # Folder of the autoencoder behind the latents, which decodes samples and encodes images; none: latents are pixels.
    autoencoder: FilePath = ""
    latent_shift: tuple[float, ...] = (0.0,)  # model sees (raw - shift) * scale; one value, or C
    latent_scale: tuple[float, ...] = (0.2325,)
    mirror_prob: Share = 0.5  # 0 for digits and text
    tasks: TasksConfig = field(default_factory=TasksConfig)
    tokenizer: FilePath = ""  # a tokenizer.json, for texts: the captions in the shards
    # Of image shards alone. random: the paper knows no such crop; of half the area or more (of long images, which are
    # only in shards of originals, less), scaled to the images' size.
    crop: Literal["adm", "random"] = "adm"
    encode_batch_size: Annotated[int, Range(1, 4096)] = 32  # images encoded at once; fewer are padded to it
    on_bad_image: Literal["stop", "skip"] = "stop"  # one that cannot be decoded; skip: its loss is 0
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
    text_drop_prob: Share = 0.1  # text_to_image without the text
    image_drop_prob: Share = 0.1  # image_to_text without the image
    text_loss_weight: NotNegative = 0.1  # of the mean over the tokens of texts, beside that over the values of images
    # What stays as it is: the trunk; of texts, embeddings (and those of segments' places) and head. Both together are a
    # language model, which then gives texts the same logits for good.
    freeze: tuple[Literal["trunk", "text"], ...] = ()
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
    window_steps: Annotated[int, Range(32, 1_000_000)] = 200  # the latest applied steps, which define what is normal
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
    max_classes: Positive = 10  # classes shown in the grid, or captions
    prompts: tuple[str, ...] = ()  # with data.tasks.text_to_image, shown instead of the first captions of data.shards
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
    captions: Address = ""  # latent shards not trained on, with captions: they are drawn instead of classes, and scored
    num_captions: Positive = 500  # the first of them
    # Generated for a score, over all ranks; classes, or these captions, evenly spread.
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

    def encoding_padding(self, world_size: int) -> int:
        """Images by which a micro-batch is filled up to whole encoded batches, where image shards are trained on."""
        return -self.micro_batch_size(world_size) % self.data.encode_batch_size

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches a rank adds up in one optimizer step."""
        return self.train.global_batch_size // (self.micro_batch_size(world_size) * world_size)

    def compiles_lengths(self) -> bool:
        """Whether kernels are compiled for each length of a sequence, on whatever device that is.

        A config means the same sequences on every device, so a CPU pads them as a GPU does.
        """
        return self.engine.compile_blocks or attention.needs_padding(
            self.engine.attention, self.model.design.head_width
        )

    def clean_token_multiple(self) -> int:
        """What the number of clean image tokens is padded up to a multiple of, resolved: 1 (no padding) to L."""
        num_tokens = self.model.num_tokens
        if self.engine.clean_token_multiple:
            return min(self.engine.clean_token_multiple, num_tokens)
        if not self.compiles_lengths():
            return 1
        # Multiples of 64: 64 at 256 tokens (5 lengths), 128 at 1024 (9 lengths).
        return min(64 * -(-num_tokens // 512), num_tokens)


def can_checkpoint(zero_stage: int, precision: str) -> bool:
    """Whether activation checkpointing recomputes what the forward computed."""
    return zero_stage > 0 or precision == "fp32"


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load(paths: str | Path | Sequence[str | Path], overrides: Sequence[str] = (), allow_env: bool = False) -> Config:
    """Reads YAML files and `key.sub=value` overrides into a typed config.

    Args:
        paths: one file or several; where two set the same key, the later one wins.
        overrides: win over all files.
        allow_env: whether `${oc.env:NAME}` is read where the user wrote it: a run's or an export's config holds values.
    """
    return load_with_origins(paths, overrides, allow_env)[0]


def load_with_origins(
    paths: str | Path | Sequence[str | Path], overrides: Sequence[str] = (), allow_env: bool = False
) -> tuple[Config, dict[str, Origin]]:
    """As `load`, and for each key that is set ("train.num_steps") the file that it came from, or the command line."""
    return config_files.load(Config, paths, overrides, allow_env, is_recorded)


def load_recorded(file: str | Path) -> Config:
    """The config of a run or an export, which holds values alone."""
    return typing.cast(Config, config_files.load(Config, file, (), is_recorded=lambda _: True)[0])


def is_recorded(file: Path) -> bool:
    """Whether a config is of a run or an export, by the files beside it."""
    folder = file.expanduser().parent
    return file.name == CONFIG_FILE and any(os.path.lexists(folder / name) for name in (CHECKPOINTS, INDEX_FILE))


def from_plain(plain: Any, source: str) -> Config:
    """Builds a config from nested dicts of a file (`source`) that a run recorded."""
    config_files.refuse_references(plain, source)
    return typing.cast(Config, typed.from_plain(Config, plain, source))
