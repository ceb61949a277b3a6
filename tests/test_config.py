"""Config: typed loading, overrides, and a check that finds all problems at once."""

import dataclasses
import math
import typing
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cfpretrain.base import config as configs
from cfpretrain.base.config_files import Address, FilePath
from cfpretrain.base.console import UserError
from cfpretrain.core.ar import ARSettings
from cfpretrain.core.modalities import class_segment, image_segment
from cfpretrain.core.work import sequence_lengths
from tests.processes import REPOSITORY

TINY = REPOSITORY / "configs" / "tiny.yaml"


def test_yaml_then_overrides() -> None:
    config = configs.load(TINY, ["train.num_steps=7", "data.latent_scale=[3.0]", "train.learning_rate=1e-4"])
    assert config.run.folder == "runs/tiny"
    assert config.train.num_steps == 7
    assert config.data.latent_scale == (3.0,)
    assert config.train.learning_rate == 1e-4
    # A number where a list may stand is a list of one.
    assert config.data.latent_shift == (0.5,)


def test_resolved_config_loads_again(tmp_path: Path) -> None:
    config = configs.load(TINY, ["sample.num_ar_steps=[1,2,16]"])
    (tmp_path / "config.yaml").write_text(configs.to_yaml(config))
    assert configs.load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_preset_passes_its_own_check(path: Path) -> None:
    configs.check(configs.load(path), world_size=1)
    configs.check(configs.load(path), world_size=8)


def test_later_files_win_and_overrides_win_over_all(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("train: {num_steps: 3, ema_decay: 0.5}\ndata: {latent_scale: [1.0, 2.0]}")
    (tmp_path / "b.yaml").write_text("train: {num_steps: 4}\ndata: {latent_scale: [5.0]}")
    config = configs.load([TINY, tmp_path / "a.yaml", tmp_path / "b.yaml"], ["train.ema_decay=0.25"])
    assert (config.train.num_steps, config.train.ema_decay, config.data.latent_scale) == (4, 0.25, (5.0,))
    # What no later file names stays.
    assert config.train.global_batch_size == configs.load(TINY).train.global_batch_size
    assert configs.load([TINY]) == configs.load(str(TINY)) == configs.load(TINY)


def test_all_wrong_keys_and_types_in_one_message() -> None:
    plain = {"train": {"learning_rat": 1.0, "num_steps": 1.5}, "modle": {}, "engine": {"precision": "fp8"}, "run": 3}
    with pytest.raises(UserError) as caught:
        configs.from_plain(plain, "some.yaml")
    message = str(caught.value)
    assert message.startswith("some.yaml: 5 problems")
    for part in (
        "train.learning_rat: unknown key; did you mean train.learning_rate?",
        "train.num_steps: expected a whole number, got 1.5",
        "modle: unknown key; did you mean model?",
        "engine.precision: expected one of bf16, fp32; got 'fp8'",
        "run: expected keys with values, got 3",
    ):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (True, "train.num_steps"),
        (1.5, "train.num_steps"),
        (math.inf, "train.num_steps"),
        ("0100", "train.num_steps"),
        ("1.5", "train.num_steps"),
        ("x", "train.learning_rate"),
        (True, "train.learning_rate"),
        (1, "run.folder"),
        (None, "run.folder"),
        ([1], "run.seed"),
        (1, "engine.compile_blocks"),
        ("y", "engine.compile_blocks"),
        (None, "data.latent_scale"),
    ],
)
def test_types_are_not_bent(value, key) -> None:
    section, name = key.split(".")
    with pytest.raises(UserError, match=key):
        configs.from_plain({section: {name: value}}, "x")


@pytest.mark.parametrize("override", ["--num_steps", "train.num_steps", "-x=1"])
def test_a_stray_argument_is_named(override) -> None:
    with pytest.raises(UserError, match="is not understood"):
        configs.load(TINY, [override])
    with pytest.raises(UserError, match=r"overrides run\.seed=\[1 cannot be read"):
        configs.load(TINY, ["run.seed=[1"])


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml does not exist"):
        configs.load(tmp_path / "nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(UserError, match=r"broken\.yaml cannot be read"):
        configs.load(tmp_path / "broken.yaml")


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
    config = configs.load(TINY, [override])
    with pytest.raises(UserError) as caught:
        configs.check(config, world_size=2)
    assert message in str(caught.value)


def test_flow_matching_has_no_betas() -> None:
    few = ["noise.num_timesteps=20", "sample.num_denoising_steps=20"]
    configs.check(configs.load(TINY, ["noise.process=flow", "noise.flow_times=uniform", *few]), world_size=1)
    with pytest.raises(UserError, match=r"noise\.num_timesteps: expected more than 20"):
        configs.check(configs.load(TINY, ["noise.process=v", *few]), world_size=1)
    with pytest.raises(UserError, match=r"noise\.process: expected one of epsilon, v, flow; got 'x0'"):
        configs.load(TINY, ["noise.process=x0"])


def test_a_rank_that_waits_for_a_storage_is_not_taken_for_lost() -> None:
    local = configs.load(TINY, ["data.download_patience_seconds=600"])
    configs.check(local, world_size=1)
    remote = configs.load(TINY, ["data.download_patience_seconds=600", "data.shards=s3://bucket/digits"])
    with pytest.raises(UserError, match=r"expected less than guard\.rank_timeout_seconds = 600"):
        configs.check(remote, world_size=1)


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
        configs.check(configs.load(TINY, overrides), world_size=2)
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
    configs.check(configs.load(TINY, overrides), world_size=2)


@pytest.mark.parametrize("name", ["patch_size", "num_heads", "latent_size"])
def test_a_size_of_zero_is_refused_before_anything_divides_by_it(name) -> None:
    with pytest.raises(UserError, match=f"model.{name}: expected between 1 and [0-9]+, got 0"):
        configs.check(configs.load(TINY, [f"model.{name}=0"]), world_size=2)


@pytest.mark.parametrize(
    ("engine", "latent_size", "want"),
    [
        ([], 16, 1),
        (["attention=triton"], 16, 1),
        (["attention=flex"], 16, 64),
        (["compile_blocks=true"], 16, 64),
        (["compile_blocks=true"], 32, 128),
        (["compile_blocks=true"], 24, 128),
        (["compile_blocks=true"], 4, 16),
        (["compile_blocks=true", "clean_token_multiple=100"], 16, 100),
        (["clean_token_multiple=1"], 16, 1),
    ],
)
def test_clean_tokens_are_padded_where_kernels_are_compiled(engine, latent_size, want) -> None:
    overrides = [f"model.latent_size={latent_size}", "model.patch_size=1", *(f"engine.{knob}" for knob in engine)]
    config = configs.load(TINY, overrides)
    assert config.clean_token_multiple() == want
    assert want == 1 or math.ceil(config.model.num_tokens / want) + 1 <= 9


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
        configs.check(config, world_size=1)
    else:
        with pytest.raises(UserError, match=f"which makes {len(lengths)};"):
            configs.check(config, world_size=1)


def test_all_problems_are_reported_at_once() -> None:
    config = configs.load(TINY, [override for override, _ in (WRONG[0], WRONG[3], WRONG[6])])
    with pytest.raises(UserError, match="3 problems"):
        configs.check(config, world_size=2)


@given(st.integers(1, 200), st.integers(1, 50), st.integers(1, 16))
def test_batch_arithmetic(global_batch, micro_batch, world_size) -> None:
    """What passes the check covers the global batch exactly; what does not, cannot."""
    base = configs.load(TINY)
    train = dataclasses.replace(base.train, global_batch_size=global_batch, micro_batch_size=micro_batch)
    config = dataclasses.replace(base, train=train)
    try:
        configs.check(config, world_size)
    except UserError:
        fits = min(micro_batch, global_batch // world_size)
        assert global_batch % world_size or (global_batch // world_size) % fits
        return
    micro = config.micro_batch_size(world_size)
    assert micro <= micro_batch
    assert micro * config.accumulation_steps(world_size) * world_size == global_batch


def test_what_is_hardly_ever_meant_is_said() -> None:
    config = configs.load(TINY, ["train.num_steps=30", "train.decay_steps=0", "train.warmup_steps=300"])
    assert configs.doubts(*configs.load_with_origins(TINY)) == []
    assert configs.doubts(config, {}) == [
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
    assert configs.doubts(*configs.load_with_origins([TINY, overlay], overrides)) == (want if is_doubtful else [])


PATHS = [
    "run.folder",
    "data.shards",
    "data.autoencoder",
    "data.cache_folder",
    "evaluation.reference",
    "evaluation.feature_weights",
]


def test_every_path_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a file and on the command line, so that no folder of the name ~ is ever made."""
    monkeypatch.setenv("HOME", "/home/me")

    def texts(config: configs.Config) -> set[str]:
        values = (getattr(getattr(config, section), name) for section, name in (key.split(".") for key in PATHS))
        return {text for value in values for text in ([value] if isinstance(value, str) else value)}

    (tmp_path / "paths.yaml").write_text(
        "\n".join(
            f"{section}: {{{', '.join(f'{name}: ~/a b/../c/' for name in names)}}}"
            for section, names in (
                ("run", ["folder"]),
                ("data", ["shards", "autoencoder", "cache_folder"]),
                ("evaluation", ["reference", "feature_weights"]),
            )
        )
    )
    want = {"/home/me/a b/../c/"}
    assert texts(configs.load(tmp_path / "paths.yaml")) == want
    assert texts(configs.load(TINY, [f"{key}=~/a b/../c/" for key in PATHS])) == want
    assert texts(configs.load(TINY, [f"{key}=${{oc.env:HOME}}/a b/../c/" for key in PATHS], allow_env=True)) == want
    assert configs.load(TINY, ["data.shards=['~',s3://bucket/~/x,./~/x]"]).data.shards == (
        "/home/me",
        "s3://bucket/~/x",
        "./~/x",
    )
    (tmp_path / ".yaml").write_text(f"run: {{folder: {tmp_path}}}")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert configs.load("~/.yaml") == configs.load(tmp_path / ".yaml")


def test_every_key_that_is_a_path_is_known_as_one() -> None:
    """A new text of the config is a path, and stands in `PATHS`, or it is named here."""
    found: dict[str, list[str]] = {"path": [], "text": []}
    for section, kind in typing.get_type_hints(configs.Config).items():
        for name, hint in typing.get_type_hints(kind, include_extras=True).items():
            of_item = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint
            if of_item in (str, FilePath, Address):
                found["text" if of_item is str else "path"].append(f"{section}.{name}")
    assert found["path"] == PATHS
    backends = ["engine.attention", "engine.cached_attention"]
    assert found["text"] == [*backends, "evaluation.features", "evaluation.feature_label", "metrics.wandb_project"]


@pytest.mark.parametrize("text", ["$HOME/x", "runs/$SLURM_JOB_ID", "~nobody-of-this-name/x"])
def test_what_a_path_cannot_hold_is_refused(text) -> None:
    with pytest.raises(
        UserError, match=r"command line: run\.folder: expected a path, got '.*': .*(only a shell|no such user)"
    ):
        configs.load(TINY, [f"run.folder={text}"])
