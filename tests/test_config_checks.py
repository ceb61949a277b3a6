"""What must fit together in a config: all problems at once, each by its name, and what is only doubtful."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cfpretrain.base import config as configs
from cfpretrain.base import config_checks
from cfpretrain.base.console import UserError
from cfpretrain.core.ar import ARSettings
from cfpretrain.core.modalities import class_segment, image_segment
from cfpretrain.core.work import sequence_lengths
from tests.test_config import TINY

WRONG = [
    ("data.shards=[]", "data.shards: expected folders or addresses, got []"),
    ("data.shards=[a,b,a]", "data.shards: expected each folder once, got a and a; set data.repeat"),
    ("data.repeat=[1.0,2.0]", "data.repeat: expected 1 or 1 values (one a folder), got 2"),
    ("data.repeat=0", "data.repeat: expected between 1e-09 and 127, got 0"),
    ("data.cache_limit_gb=-1", "data.cache_limit_gb: expected at least 0"),
    ("model.patch_size=3", "model.patch_size: expected a divisor of model.latent_size = 8"),
    ("model.num_heads=3", "model.num_heads: expected a divisor of model.width = 128"),
    ("model.depth=0", "model.depth: expected between 1 and 512"),
    ("train.global_batch_size=63", "train.global_batch_size: expected a multiple of the 2 ranks"),
    ("train.micro_batch_size=12", "train.micro_batch_size: expected a divisor of 32"),
    ("train.micro_batch_size=0", "train.micro_batch_size: expected at least 1"),
    ("train.learning_rate=-1.0", "train.learning_rate: expected at least 0"),
    ("train.learning_rate=.nan", "train.learning_rate: expected at least 0"),
    ("train.decay_steps=100000", "train.decay_steps: expected between 0 and"),
    ("order.ar_step_decay=0.0", "order.ar_step_decay: expected between"),
    ("order.ar_weight_first=0.5", "order.ar_weight_first: expected at least order.ar_weight_last"),
    (
        "order.num_ar_steps=17",
        "order.num_ar_steps: expected at most 16 (the tokens of an image), or 0 to draw it, got 17",
    ),
    ("order.num_ar_steps=-1", "order.num_ar_steps: expected at least 0, got -1"),
    ("order.ar_step_sizes=equal", "order.ar_step_sizes: equal sizes need a fixed number of AR steps"),
    ("order.block_size=0", "order.block_size: expected at least 1"),
    ("engine.clean_token_multiple=17", "engine.clean_token_multiple: expected between 0 and 16, got 17"),
    ("data.latent_scale=.inf", "data.latent_scale: expected finite numbers, got inf"),
    ("order.ar_weight_first=.nan", "order.ar_weight_first: expected at least 0, got nan"),
    ("run.seed=-1", "run.seed: expected at least 0, got -1"),
    ("noise.num_timesteps=20", "noise.num_timesteps: expected more than 20"),
    ("train.adam_beta1=1.0", "train.adam_beta1: expected between 0 and"),
    ("noise.beta_first=0.5", "noise.beta_first: expected at most"),
    ("engine.zero_stage=4", "engine.zero_stage: expected between 0 and 3"),
    ("sample.num_ar_steps=[17]", "sample.num_ar_steps: expected 1 to 16"),
    ("sample.num_ar_steps=[]", "sample.num_ar_steps: expected at least one"),
    ("sample.num_denoising_steps=1", "sample.num_denoising_steps: expected between 2 and 1000"),
    ("evaluation.every_steps=-1", "evaluation.every_steps: expected at least 0"),
    ("evaluation.every_steps=10", "evaluation.reference: expected real images (a folder, image shards or an .npz)"),
    ("evaluation.num_images=19", "evaluation.num_images: expected between 20 and 1e+07, got 19"),
    ("evaluation.guidance=.nan", "evaluation.guidance: expected at least 0"),
    ("data.latent_scale=[1.0,2.0]", "data.latent_scale: expected 1 or 1 values"),
    ("data.latent_scale=0", "data.latent_scale: expected non-zero"),
    ("data.mirror_prob=1.5", "data.mirror_prob: expected between 0 and 1"),
    ("data.shards=[a,b/../a/]", "data.shards: expected each folder once, got a and b/../a/; set data.repeat"),
    ("data.shards=[s3://b/a/,s3://b/a]", "data.shards: expected each folder once, got s3://b/a/ and s3://b/a;"),
    ("run.folder=' '", "run.folder: expected the path of a folder, got an empty text"),
]


@pytest.mark.parametrize(("override", "message"), WRONG)
def test_impossible_values_are_refused_by_name(override, message) -> None:
    with pytest.raises(UserError) as caught:
        config_checks.check(configs.load(TINY, [override]), world_size=2)
    assert message in str(caught.value)


def test_flow_matching_has_no_betas() -> None:
    few = ["noise.num_timesteps=20", "sample.num_denoising_steps=20"]
    config_checks.check(configs.load(TINY, ["noise.process=flow", "noise.flow_times=uniform", *few]), world_size=1)
    with pytest.raises(UserError, match=r"noise\.num_timesteps: expected more than 20"):
        config_checks.check(configs.load(TINY, ["noise.process=v", *few]), world_size=1)
    with pytest.raises(UserError, match=r"noise\.process: expected one of epsilon, v, flow; got 'x0'"):
        configs.load(TINY, ["noise.process=x0"])


def test_a_rank_that_waits_for_a_storage_is_not_taken_for_lost() -> None:
    local = configs.load(TINY, ["data.download_patience_seconds=600"])
    config_checks.check(local, world_size=1)
    remote = configs.load(TINY, ["data.download_patience_seconds=600", "data.shards=s3://bucket/digits"])
    with pytest.raises(UserError, match=r"expected less than guard\.rank_timeout_seconds = 600"):
        config_checks.check(remote, world_size=1)


SCORED = ("evaluation.every_steps=10", "evaluation.reference=images")
TOKENS_256 = ("model.latent_size=16", "model.patch_size=1")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["order.token_order=block_raster", "order.block_size=3"],
            "order.block_size: expected a divisor of 4, the token grid's rows, for order.token_order = block_raster",
        ),
        (
            ["order.token_order=dilated", "order.block_size=8"],
            "order.block_size: expected a divisor of 4, the token grid's rows, for order.token_order = dilated, got 8",
        ),
        (
            ["engine.attention=triton", "model.num_heads=8"],
            "engine.attention: triton needs heads of width 32, 64, 128, got model.width / model.num_heads = 16",
        ),
        (
            ["engine.attention=flex", "model.num_heads=16"],
            "engine.attention: flex needs heads of width 16 or more, got model.width / model.num_heads = 8; change "
            "model.num_heads, or set engine.attention=sdpa",
        ),
        (
            ["engine.activation_checkpointing=true", "engine.zero_stage=0", "engine.precision=bf16"],
            "engine.activation_checkpointing: expected false at engine.zero_stage = 0 in bf16",
        ),
        (
            ["engine.attention=triton", "model.head_width=24"],
            "engine.attention: triton needs heads of width 32, 64, 128, got model.head_width = 24; change "
            "model.head_width, or set engine.attention=sdpa",
        ),
        (["model.num_kv_heads=3"], "model.num_kv_heads: expected a divisor of model.num_heads = 4, got 3"),
        (["model.trunk=llama", "model.head_width=33"], "model.head_width: expected an even number, since rotary"),
        (["model.rotary_scaling=[8,1,4,8192]"], "model.rotary_scaling: expected none where a trunk (causalfusion)"),
        (["model.trunk=llama", "model.rotary_scaling=[8,4,1,8192]"], "model.rotary_scaling: expected factor, low_freq"),
        ([*SCORED, "evaluation.num_ar_steps=17"], "evaluation.num_ar_steps: expected 1 to 16 (the tokens of an image)"),
        (
            [*SCORED, "evaluation.num_denoising_steps=1"],
            "evaluation.num_denoising_steps: expected between 2 and 1000, got 1",
        ),
        (["model.latent_size=4", "order.num_ar_steps=5"], "order.num_ar_steps: expected at most 4"),
        (
            [*TOKENS_256, "engine.compile_blocks=true", "engine.clean_token_multiple=1"],
            "engine.clean_token_multiple: expected one that makes at most 16 lengths, since kernels are compiled for "
            "each, got 1, which makes 256; set a larger one, or 0",
        ),
        (
            [*TOKENS_256, "engine.attention=flex", "engine.clean_token_multiple=16"],
            "got 16, which makes 17",
        ),
    ],
)
def test_impossible_combinations_are_refused_by_name(overrides, message) -> None:
    with pytest.raises(UserError) as caught:
        config_checks.check(configs.load(TINY, overrides), world_size=2)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["order.num_ar_steps=16", "order.ar_step_sizes=equal"],
        ["order.token_order=dilated", "order.block_size=2"],
        SCORED,
        # Nothing uses it.
        ["order.token_order=raster", "order.block_size=3"],
        ["engine.attention=triton", "model.num_heads=2"],
        ["engine.attention=flex", "model.num_heads=8"],
        ["engine.activation_checkpointing=true", "engine.zero_stage=0"],
        ["engine.clean_token_multiple=16"],
        [*TOKENS_256, "engine.clean_token_multiple=1"],
        [*TOKENS_256, "engine.compile_blocks=true", "engine.clean_token_multiple=17"],
        [*TOKENS_256, "engine.compile_blocks=true", "engine.clean_token_multiple=1", "order.num_ar_steps=1"],
        [*TOKENS_256, "engine.compile_blocks=true", "engine.clean_token_multiple=1", "order.num_ar_steps=241"],
        [
            *TOKENS_256,
            "engine.compile_blocks=true",
            "engine.clean_token_multiple=1",
            "order.num_ar_steps=4",
            "order.ar_step_sizes=equal",
        ],
    ],
)
def test_what_is_possible_is_not_refused(overrides) -> None:
    config_checks.check(configs.load(TINY, overrides), world_size=2)


@pytest.mark.parametrize("name", ["patch_size", "num_heads", "latent_size"])
def test_a_size_of_zero_is_refused_before_anything_divides_by_it(name) -> None:
    with pytest.raises(UserError, match=f"model.{name}: expected between 1 and [0-9]+, got 0"):
        config_checks.check(configs.load(TINY, [f"model.{name}=0"]), world_size=2)


@given(st.integers(0, 36), st.integers(1, 36))
def test_lengths_are_counted_before_they_are_compiled(num_ar_steps, multiple) -> None:
    """The check's arithmetic, against all lengths that can be drawn."""
    base = configs.load(TINY, ["model.latent_size=6", "model.patch_size=1", "engine.compile_blocks=true"])
    config = dataclasses.replace(
        base,
        order=dataclasses.replace(base.order, num_ar_steps=num_ar_steps),
        engine=dataclasses.replace(base.engine, clean_token_multiple=multiple),
    )
    image = image_segment(torch.zeros(1, 36, dtype=torch.int64))
    lengths = sequence_lengths([class_segment(4), image], ARSettings(num_ar_steps), multiple)
    if len(lengths) <= 16:
        config_checks.check(config, world_size=1)
    else:
        with pytest.raises(UserError, match=f"which makes {len(lengths)};"):
            config_checks.check(config, world_size=1)


def test_all_problems_are_reported_at_once() -> None:
    config = configs.load(TINY, ["data.shards=[]", "model.num_heads=3", "train.global_batch_size=63"])
    with pytest.raises(UserError, match="config: 3 problems"):
        config_checks.check(config, world_size=2)
    with pytest.raises(UserError, match="command line: 3 problems"):
        configs.load(TINY, ["data.repeat=0", "model.depth=0", "run.seed=-1"])


@given(st.integers(1, 200), st.integers(1, 50), st.integers(1, 16))
def test_batch_arithmetic(global_batch, micro_batch, world_size) -> None:
    """What passes the check covers the global batch exactly; what does not, cannot."""
    base = configs.load(TINY)
    train = dataclasses.replace(base.train, global_batch_size=global_batch, micro_batch_size=micro_batch)
    config = dataclasses.replace(base, train=train)
    try:
        config_checks.check(config, world_size)
    except UserError:
        fits = min(micro_batch, global_batch // world_size)
        assert global_batch % world_size or (global_batch // world_size) % fits
        return
    micro = config.micro_batch_size(world_size)
    assert micro <= micro_batch
    assert micro * config.accumulation_steps(world_size) * world_size == global_batch


def test_what_is_hardly_ever_meant_is_said() -> None:
    config = configs.load(TINY, ["train.num_steps=30", "train.decay_steps=0", "train.warmup_steps=300"])
    assert config_checks.doubts(*configs.load_with_origins(TINY)) == []
    assert config_checks.doubts(config, {}) == [
        "train.warmup_steps: 300 are more than train.num_steps = 30: the learning rate never exceeds 0.0003; set fewer",
        "train.ema_decay: at the end 74% of the averaged weights, which make the samples, are still the initial ones; "
        "for 30 steps set about 0.667",
    ]


@pytest.mark.parametrize(
    ("mine", "overrides", "is_doubtful"),
    [
        ("data: {shards: photos}", [], True),
        ("data: {shards: photos, mirror_prob: 0}", [], False),
        ("data: {shards: photos, mirror_prob: 0.5}", [], False),
        ("data: {shards: photos}", ["data.mirror_prob=0"], False),
        ("data: {latent_scale: 1.0}", [], False),
        # The preset's own data in another place.
        ("train: {num_steps: 1250}", ["data.shards=elsewhere"], False),
    ],
)
def test_mirroring_that_is_off_for_other_data_is_said(mine, overrides, is_doubtful, tmp_path: Path) -> None:
    overlay = tmp_path / "mine.yaml"
    overlay.write_text(mine)
    want = [
        f"data.mirror_prob: 0 in {TINY} also holds for data.shards of {overlay}, so no image is mirrored; set it in "
        f"{overlay} too: 0.5 where a mirrored image is as good, else 0"
    ]
    assert config_checks.doubts(*configs.load_with_origins([TINY, overlay], overrides)) == (want if is_doubtful else [])
