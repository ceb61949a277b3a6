"""Checks of knobs against each other, the number of ranks and the origin of values; warnings of likely mistakes."""

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from cfpretrain.base.config import Config, DataConfig, ModelConfig, can_checkpoint, is_recorded
from cfpretrain.base.config_files import COMMAND_LINE, Origin
from cfpretrain.base.console import UserError
from cfpretrain.core import attention

# Each length is compiled, which takes minutes, and torch has a limit.
_MOST_COMPILED_LENGTHS = 16
_MOST_VALUES = 2**28  # of the tokens of an image


def check(config: Config, world_size: int) -> None:
    """Refuses a config that cannot run on `world_size` ranks; the message names every problem.

    Each names its key, what was expected, what came and the fix.
    """
    problems = [
        *_check_run(config),
        *_check_batch(config, world_size),
        *_check_noise(config),
        *_check_data(config),
        *_check_texts(config),
        *_check_conditions(config),
        *_check_model(config),
        *_check_order(config),
        *_check_engine(config),
        *_check_sampling(config),
    ]
    if problems:
        count = "" if len(problems) == 1 else f"{len(problems)} problems: "
        raise UserError(f"config: {count}{' | '.join(problems)}")


def _check_run(config: Config) -> Iterable[str]:
    if not config.run.folder.strip():
        yield "run.folder: expected the path of a folder, got an empty text; give one, e.g. run.folder=runs/mine"
    if not 0 <= config.train.decay_steps <= config.train.num_steps:
        yield (
            f"train.decay_steps: expected between 0 and train.num_steps = {config.train.num_steps}, "
            f"got {config.train.decay_steps}; change it with train.num_steps, 0 for a constant learning rate"
        )


def _check_batch(config: Config, world_size: int) -> Iterable[str]:
    global_size = config.train.global_batch_size
    if global_size % world_size:
        yield (
            f"train.global_batch_size: expected a multiple of the {world_size} ranks, got {global_size}; "
            "change it or the number of ranks"
        )
        return
    share, micro = global_size // world_size, config.micro_batch_size(world_size)
    if share % micro:
        yield (
            f"train.micro_batch_size: expected a divisor of {share}, a rank's share of train.global_batch_size = "
            f"{global_size} on {world_size} ranks, got {micro}"
        )


def _check_noise(config: Config) -> Iterable[str]:
    noise = config.noise
    if noise.beta_first > noise.beta_last:
        yield f"noise.beta_first: expected at most noise.beta_last = {noise.beta_last:g}; noise grows with t"
    if noise.process != "flow" and noise.beta_last * 1000 / noise.num_timesteps >= 1:
        yield (
            f"noise.num_timesteps: expected more than {1000 * noise.beta_last:g}, since betas are scaled by "
            f"1000 / num_timesteps and must stay under 1, got {noise.num_timesteps}"
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
    if any("://" in address for address in data.shards) and not patience < config.guard.rank_timeout_seconds:
        yield (
            f"data.download_patience_seconds: expected less than guard.rank_timeout_seconds = "
            f"{config.guard.rank_timeout_seconds:g}, after which a waiting rank is taken for lost, got {patience:g}"
        )
    channels = config.model.latent_channels
    for name, values in (("latent_shift", data.latent_shift), ("latent_scale", data.latent_scale)):
        if len(values) not in (1, channels):
            yield f"data.{name}: expected 1 or {channels} values (one a latent channel), got {len(values)}"
        if not all(map(math.isfinite, values)):
            yield f"data.{name}: expected finite numbers, got {', '.join(map(str, values))}"
    if 0.0 in data.latent_scale:
        yield "data.latent_scale: expected non-zero numbers, got 0"


def _check_texts(config: Config) -> Iterable[str]:
    tasks, vocabulary = vars(config.data.tasks), config.model.vocabulary
    if not any(tasks.values()):
        yield f"data.tasks: expected a weight above 0, got none; set one of {', '.join(tasks)}"
    for name, weight in tasks.items():
        if weight and name != "class_to_image" and not vocabulary:
            yield (
                f"data.tasks.{name}: expected 0 for a model without texts, got {weight:g}; set model.vocabulary to the "
                "size of data.tokenizer"
            )
    if tasks["class_to_image"] and not config.model.num_classes:
        yield (
            f"data.tasks.class_to_image: expected 0 for model.num_classes = 0, got {tasks['class_to_image']:g}; set it "
            "so, and another task, or the number of classes"
        )
    if vocabulary and not config.data.tokenizer:
        yield (
            f"data.tokenizer: expected a tokenizer.json of model.vocabulary = {vocabulary} tokens, got none; set it, "
            "or model.vocabulary=0"
        )


def _check_model(config: Config) -> Iterable[str]:
    model = config.model
    if model.num_tokens * model.width > _MOST_VALUES:
        yield (
            f"model.latent_size: expected at most {_MOST_VALUES:g} values of all tokens together, got "
            f"{model.num_tokens} tokens of model.width = {model.width}; set a larger model.patch_size"
        )
    if model.latent_size % model.patch_size:
        yield f"model.patch_size: expected a divisor of model.latent_size = {model.latent_size}, got {model.patch_size}"
    if model.width % model.num_heads and not model.head_width:
        yield f"model.num_heads: expected a divisor of model.width = {model.width}, got {model.num_heads}"
    if model.width % 4:
        yield f"model.width: expected a multiple of 4 (2-d sin-cos positions), got {model.width}"
    yield from _check_design(model)
    yield from _check_freeze(config)


def _check_freeze(config: Config) -> Iterable[str]:
    freeze = config.train.freeze
    if "text" in freeze and not config.model.vocabulary:
        yield "train.freeze: expected no text where a model has none, got text; leave it out, or set model.vocabulary"
    separate = config.model.separate_image_weights
    if "trunk" in freeze and config.train.optimizer == "muon" and not separate:
        yield (
            "train.optimizer: expected adamw where train.freeze has trunk, whose matrices are what muon moves, got muon"
        )
    if separate and not config.model.vocabulary:
        yield (
            "model.separate_image_weights: expected false where a model has no texts, got true; leave it out, or set "
            "model.vocabulary"
        )


def _check_design(model: ModelConfig) -> Iterable[str]:
    design = model.design
    if design.num_heads % design.num_kv_heads:
        yield (
            f"model.num_kv_heads: expected a divisor of model.num_heads = {design.num_heads}, got {design.num_kv_heads}"
        )
    if design.rotary_base and design.head_width % 2:
        yield (
            f"model.head_width: expected an even number, since rotary positions turn pairs of values, got "
            f"{design.head_width}"
        )
    if not design.rotary_scaling:
        return
    if not design.rotary_base:
        yield (
            f"model.rotary_scaling: expected none where a trunk ({model.trunk}) has no rotary positions; leave it out, "
            "or set model.rotary_base"
        )
    values = design.rotary_scaling
    if len(values) != 4 or not all(map(math.isfinite, values)) or not (min(values) > 0 and values[1] < values[2]):
        yield (
            "model.rotary_scaling: expected factor, low_freq_factor, high_freq_factor and "
            f"original_max_position_embeddings, above 0 and the second below the third, got {list(values)}"
        )


def _check_order(config: Config) -> Iterable[str]:
    order, num_tokens, grid = config.order, config.model.num_tokens, config.model.grid
    if order.ar_weight_first < order.ar_weight_last:
        yield (
            f"order.ar_weight_first: expected at least order.ar_weight_last = {order.ar_weight_last:g}, "
            f"got {order.ar_weight_first:g}; earlier AR steps weigh more"
        )
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
    if order.token_order in ("block_raster", "dilated") and grid % order.block_size:
        yield (
            f"order.block_size: expected a divisor of {grid}, the token grid's rows, for "
            f"order.token_order = {order.token_order}, got {order.block_size}"
        )


def _check_engine(config: Config) -> Iterable[str]:
    engine, num_tokens = config.engine, config.model.num_tokens
    if engine.activation_checkpointing and not can_checkpoint(engine.zero_stage, engine.precision):
        yield (
            "engine.activation_checkpointing: expected false at engine.zero_stage = 0 in bf16, which would recompute "
            "with the fp32 weights, got true; set engine.zero_stage=1"
        )
    if engine.cached_attention not in attention.names("sampling"):
        known = ", ".join(attention.names("sampling"))
        yield f"engine.cached_attention: expected one of {known}; got {engine.cached_attention!r}"
    if engine.attention not in attention.names("training"):
        yield f"engine.attention: expected one of {', '.join(attention.names('training'))}; got {engine.attention!r}"
        return
    model, backend = config.model, attention.BACKENDS.get(engine.attention)  # none for auto
    is_whole, head_width = model.head_width or model.width % model.num_heads == 0, model.design.head_width
    if is_whole and backend and head_width not in backend.head_widths:
        name = "model.head_width" if model.head_width else "model.width / model.num_heads"
        yield (
            f"engine.attention: {engine.attention} needs heads of width {backend.widths}, got {name} = {head_width}; "
            f"change {name.split(' ')[-1]}, or set engine.attention=sdpa"
        )
    if not 0 <= engine.clean_token_multiple <= num_tokens:
        yield f"engine.clean_token_multiple: expected between 0 and {num_tokens}, got {engine.clean_token_multiple}"
    elif engine.clean_token_multiple and config.compiles_lengths():
        yield from _check_num_lengths(config)


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


def _check_sampling(config: Config) -> Iterable[str]:
    sample, evaluation = config.sample, config.evaluation
    if not sample.num_ar_steps:
        yield "sample.num_ar_steps: expected at least one number of AR steps, got none"
    sections = [("sample", sample.num_denoising_steps, sample.num_ar_steps)]
    # A section that is off need not fit: its defaults are of larger models.
    if evaluation.every_steps:
        sections.append(("evaluation", evaluation.num_denoising_steps, (evaluation.num_ar_steps,)))
        if not evaluation.reference:
            yield (
                "evaluation.reference: expected real images (a folder, image shards or an .npz), got none; give them, "
                "or set evaluation.every_steps=0"
            )
    num_tokens, num_timesteps = config.model.num_tokens, config.noise.num_timesteps
    for section, num_levels, num_ar_steps in sections:
        if not 2 <= num_levels <= num_timesteps:
            yield f"{section}.num_denoising_steps: expected between 2 and {num_timesteps}, got {num_levels}"
        for num in num_ar_steps:
            if not 1 <= num <= num_tokens:
                yield f"{section}.num_ar_steps: expected 1 to {num_tokens} (the tokens of an image), got {num}"


def _check_conditions(config: Config) -> Iterable[str]:
    """Of what samples are made that are shown and scored."""
    prompts, captions, tasks = config.sample.prompts, config.evaluation.captions, config.data.tasks
    if prompts and not (tasks.text_to_image or tasks.interleaved):
        yield (
            f"sample.prompts: expected none without data.tasks.text_to_image or interleaved, got {len(prompts)}; leave "
            "them out, or train on one of these"
        )
    if not config.evaluation.every_steps:
        return
    if captions and not (tasks.text_to_image or tasks.image_to_text):
        yield f"evaluation.captions: expected none for a model without texts, got {captions}; leave them out"
    if not captions and not tasks.class_to_image:
        yield (
            "evaluation.captions: expected latent shards with captions, since without data.tasks.class_to_image no "
            "image of a class can be scored, got none; name them, or set evaluation.every_steps=0"
        )


def check_code(config: Config, origins: Mapping[str, Origin], allow_code: bool) -> None:
    """Refuses to import the code that a file names: a stranger's config would have its own code run.

    Args:
        config: of a run that is to train.
        origins: of `config.load_with_origins`.
        allow_code: whether a file of the user's own may name it; that of a run may not.
    """
    named, origin = config.evaluation.features, origins.get("evaluation.features")
    if ":" not in named or not config.evaluation.every_steps or origin is None:
        return
    if origin.name != COMMAND_LINE and (not allow_code or is_recorded(Path(origin.name))):
        raise UserError(
            f"{origin.name}: evaluation.features: {named!r:.100} is code, which a config file may not run; to run it, "
            "give evaluation.features=MODULE:FUNCTION on the command line, or --allow-code with a config of your own"
        )


def doubts(config: Config, origins: Mapping[str, Origin]) -> list[str]:
    """Warnings of likely mistakes, a line each, in a checked config; `origins`: see `load_with_origins`."""
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
    tasks = config.data.tasks
    if config.data.mirror_prob and tasks.text_to_image + tasks.image_to_text + tasks.interleaved:
        found.append(
            f"data.mirror_prob: {config.data.mirror_prob:g} of the images are mirrored, and texts that say left or "
            "right are false of them; set 0 where some do"
        )
    if "text" in train.freeze and tasks.image_to_text + tasks.interleaved:
        found.append(
            "train.freeze: with text, the tokens that frame texts stay as they began too, and a model may not learn "
            "where a text ends; set train.freeze=[trunk]"
        )
    return [*found, *_doubt_mirrors(config.data, origins)]


def _doubt_mirrors(data: DataConfig, origins: Mapping[str, Origin]) -> Iterable[str]:
    """A preset for digits under a config for photos: nothing else would tell that they are never mirrored."""
    shards, mirrors = origins.get("data.shards"), origins.get("data.mirror_prob")
    if data.mirror_prob > 0 or shards is None or mirrors is None or shards.name == COMMAND_LINE:
        return
    if mirrors < shards:
        yield (
            f"data.mirror_prob: 0 in {mirrors.name} also holds for data.shards of {shards.name}, so no image is "
            f"mirrored; set it in {shards.name} too: 0.5 where a mirrored image is as good, else 0"
        )
