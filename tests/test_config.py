"""Config: typed loading and overrides."""

import math
import typing
from pathlib import Path

import pytest

from cfpretrain.base import config as configs
from cfpretrain.base import config_checks
from cfpretrain.base.console import UserError
from cfpretrain.base.typed import Address, FilePath
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
    config_checks.check(configs.load(path), world_size=1)
    config_checks.check(configs.load(path), world_size=8)


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


PATHS = [
    "run.folder",
    "data.shards",
    "data.autoencoder",
    "data.tokenizer",
    "data.cache_folder",
    "evaluation.reference",
    "evaluation.feature_weights",
    "evaluation.captions",
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
                ("data", ["shards", "autoencoder", "tokenizer", "cache_folder"]),
                ("evaluation", ["reference", "feature_weights", "captions"]),
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
    others = ["engine.attention", "engine.cached_attention", "sample.prompts"]
    assert found["text"] == [*others, "evaluation.features", "evaluation.feature_label", "metrics.wandb_project"]


@pytest.mark.parametrize("text", ["$HOME/x", "runs/$SLURM_JOB_ID", "~nobody-of-this-name/x"])
def test_what_a_path_cannot_hold_is_refused(text) -> None:
    with pytest.raises(
        UserError, match=r"command line: run\.folder: expected a path, got '.*': .*(only a shell|no such user)"
    ):
        configs.load(TINY, [f"run.folder={text}"])
