"""Config: typed loading, overrides, and a check that finds all problems at once."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cfpretrain import config as configs
from cfpretrain.console import UserError
from tests.processes import REPOSITORY

TINY = REPOSITORY / "configs" / "tiny.yaml"


def test_yaml_then_overrides() -> None:
    config = configs.load(TINY, ["train.num_steps=7", "data.latent_scale=[3.0]", "train.learning_rate=1e-4"])
    assert config.run.folder == "runs/demo"
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
    ("value", "key"), [(True, "train.num_steps"), ("x", "train.learning_rate"), (1, "run.folder"), ([1], "run.seed")]
)
def test_types_are_not_bent(value, key) -> None:
    section, name = key.split(".")
    with pytest.raises(UserError, match=key):
        configs.from_plain({section: {name: value}}, "x")


@pytest.mark.parametrize("override", ["--num_steps", "train.num_steps", "-x=1"])
def test_a_stray_argument_is_named(override) -> None:
    with pytest.raises(UserError, match="is not understood"):
        configs.load(TINY, [override])


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml does not exist"):
        configs.load(tmp_path / "nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(UserError, match=r"broken\.yaml cannot be read"):
        configs.load(tmp_path / "broken.yaml")


WRONG = [
    ("model.patch_size=3", "model.patch_size: expected a divisor of model.latent_size = 8"),
    ("model.num_heads=3", "model.num_heads: expected a divisor of model.width = 128"),
    ("model.depth=0", "model.depth: expected at least 1"),
    ("train.global_batch_size=63", "train.global_batch_size: expected a multiple of the 2 ranks"),
    ("train.micro_batch_size=12", "train.micro_batch_size: expected a divisor of 32"),
    ("train.micro_batch_size=0", "train.micro_batch_size: expected at least 1"),
    ("train.learning_rate=-1.0", "train.learning_rate: expected at least 0"),
    ("train.learning_rate=.nan", "train.learning_rate: expected at least 0"),
    ("train.decay_steps=100000", "train.decay_steps: expected between 0 and"),
    ("order.ar_step_decay=0.0", "order.ar_step_decay: expected between"),
    ("order.ar_weight_first=0.5", "order.ar_weight_first: expected at least order.ar_weight_last"),
    ("order.ar_weight_first=.nan", "order.ar_weight_first: expected at least 0, got nan"),
    ("run.seed=-1", "run.seed: expected at least 0, got -1"),
    ("noise.num_timesteps=20", "noise.num_timesteps: expected more than 20"),
    ("train.adam_beta1=1.0", "train.adam_beta1: expected between 0 and"),
    ("noise.beta_first=0.5", "noise.beta_first: expected at most"),
    ("engine.zero_stage=4", "engine.zero_stage: expected between 0 and 3"),
    ("sample.num_ar_steps=[17]", "sample.num_ar_steps: expected 1 to 16"),
    ("sample.num_ar_steps=[]", "sample.num_ar_steps: expected at least one"),
    ("sample.num_denoising_steps=1", "sample.num_denoising_steps: expected between 2 and 1000"),
    ("data.latent_scale=[1.0,2.0]", "data.latent_scale: expected 1 or 1 values"),
    ("data.latent_scale=0", "data.latent_scale: expected non-zero"),
    ("data.mirror_prob=1.5", "data.mirror_prob: expected between 0 and 1"),
]


@pytest.mark.parametrize(("override", "message"), WRONG)
def test_impossible_values_are_refused_by_name(override, message) -> None:
    config = configs.load(TINY, [override])
    with pytest.raises(UserError) as caught:
        configs.check(config, world_size=2)
    assert message in str(caught.value)


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
