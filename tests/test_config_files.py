"""YAML and overrides as people write them: what is read as it was meant, what is refused, and who is named for it."""

from pathlib import Path

import pytest

from cfpretrain.base import config as configs
from cfpretrain.base.console import UserError
from tests.processes import REPOSITORY

TINY = REPOSITORY / "configs" / "tiny.yaml"


def refusal(paths: Path | list[Path], overrides: list[str] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        configs.load(paths, overrides or [])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def both_ways(key: str, text: str, tmp_path: Path) -> tuple[Path, str]:
    """A file and an override that set a key to a text as it stands."""
    section, name = key.split(".")
    file = tmp_path / "mine.yaml"
    file.write_text(f"{section}:\n  {name}: {text}\n")
    return file, f"{key}={text}"


@pytest.mark.parametrize(
    "text", ["100000", "1e5", "1E+5", "1.0e5", "100000.0", "100_000", "'100000'", '"1e5"', "' 100000 '"]
)
def test_a_whole_number_however_it_is_written(text, tmp_path: Path) -> None:
    file, override = both_ways("train.num_steps", text, tmp_path)
    for config in (configs.load([TINY, file]), configs.load(TINY, [override])):
        assert config.train.num_steps == 100_000
        assert type(config.train.num_steps) is int


def test_a_large_whole_number_loses_no_digit() -> None:
    assert configs.load(TINY, ["run.seed='1234567890123456789'"]).run.seed == 1234567890123456789


@pytest.mark.parametrize("text", ["1e-4", "1.e-4", "0.0001", ".0001", "'1e-4'", "'0.0001'", "1_00e-6"])
def test_a_number_however_it_is_written(text, tmp_path: Path) -> None:
    file, override = both_ways("train.learning_rate", text, tmp_path)
    for config in (configs.load([TINY, file]), configs.load(TINY, [override])):
        assert config.train.learning_rate == 1e-4


@pytest.mark.parametrize("text", ["true", "yes", "on", "'true'", "True", "'Yes'"])
def test_true_or_false_however_it_is_written(text, tmp_path: Path) -> None:
    file, override = both_ways("engine.compile_blocks", text, tmp_path)
    assert configs.load([TINY, file]).engine.compile_blocks is True
    assert configs.load(TINY, [override]).engine.compile_blocks is True
    assert configs.load(TINY, [override, "engine.compile_blocks='off'"]).engine.compile_blocks is False


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("train.num_steps", "0100", "expected a number without a leading 0 (octal to YAML), got 0100"),
        ("train.num_steps", "-010", "expected a number without a leading 0 (octal to YAML), got -010"),
        ("train.num_steps", "'0100'", "expected a whole number, got '0100'"),
        ("train.learning_rate", "'01'", "expected a number, got '01'"),
        ("train.max_train_seconds", "1:30", "expected a number, got 1:30, which YAML counts in sixties"),
        ("data.latent_scale", "[1.0, 010]", "expected a number without a leading 0 (octal to YAML), got 010"),
        ("train.num_steps", "1.5", "expected a whole number, got 1.5"),
        ("train.num_steps", "1e400", "expected a whole number, got inf"),
        ("train.num_steps", "0o100", "expected a whole number, got '0o100'"),
        ("train.num_steps", "many", "expected a whole number, got 'many'"),
        (
            "train.num_steps",
            "",
            "expected a whole number, got nothing, as YAML also reads ~ and null; leave the key out",
        ),
        ("run.folder", "~", "expected a text, got nothing, as YAML also reads ~ and null; leave the key out"),
        (
            "run.folder",
            "2024",
            "expected a text, got 2024; put it in quotes, on a command line in both kinds: \"'2024'\"",
        ),
        ("run.folder", "???", "expected a value, got ???; give one, or leave the key out for its default"),
        ("run.folder", "[a]", "expected a text, got ['a']"),
        ("run.folder", '"a\\0b"', "expected a text, got 'a\\x00b'"),
        ("run.folder", "on", "expected a text, got True; put it in quotes"),
        ("engine.compile_blocks", "1", "expected true or false, got 1"),
        ("metrics.wandb", "off", "expected one of auto, online, offline, disabled; got False"),
    ],
)
def test_what_is_not_what_it_looks_like_is_refused_by_key(key, text, message, tmp_path: Path) -> None:
    file, override = both_ways(key, text, tmp_path)
    assert refusal([TINY, file]).startswith(f"{file}: {key}: {message}")
    assert refusal(TINY, [override]).startswith(f"command line: {key}: {message}")


def test_a_problem_names_the_file_that_it_comes_from(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("train: {num_steps: many, learning_rat: 1.0}\nengine: {precision: fp8}")
    second.write_text("engine: {precision: fp4}\nmodle: {}")
    assert refusal([first, second], ["run.seed=x"]).split(" | ") == [
        f"5 problems: {first}: train.num_steps: expected a whole number, got 'many'",
        f"{first}: train.learning_rat: unknown key; did you mean train.learning_rate?",
        f"{second}: engine.precision: expected one of bf16, fp32; got 'fp4'",
        f"{second}: modle: unknown key; did you mean model?",
        "command line: run.seed: expected a whole number, got 'x'",
    ]
    second.write_text("- a list")
    assert refusal([first, second]) == f"{second}: the file: expected keys with values, got ['a list']"
    assert refusal([TINY, tmp_path / "third.yaml"]).startswith(f"config file {tmp_path / 'third.yaml'} does not exist")


def test_an_unknown_key_of_the_command_line_is_not_blamed_on_the_file() -> None:
    assert refusal(TINY, ["train.num_step=5"]) == (
        "command line: train.num_step: unknown key; did you mean train.num_steps?"
    )


def test_a_flat_key_of_an_overlay_is_named_with_how_to_write_it(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("train.num_steps: 9\n")
    assert refusal([TINY, tmp_path / "mine.yaml"]) == (
        f"{tmp_path / 'mine.yaml'}: train.num_steps: unknown key; in a file, write train: and num_steps: below it, two "
        "spaces further in"
    )


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train: {num_steps: 1}\ntrain: {num_steps: 2}", ["duplicate key train"]),
        ("train:\n\tnum_steps: 1", ["cannot be read: while scanning", "line 2"]),
        ("train: {num_steps: 1", ["cannot be read: while parsing"]),
        ("run: {folder: '${HOME}/x'}", ["'HOME' not found", "or as ${oc.env:NAME} to the environment"]),
        ("train:\n", ["train: expected keys with values, got nothing; leave the key out"]),
        ("train:\n- num_steps: 5", ["train: expected keys with values, got [{'num_steps': 5}]"]),
        ("train: 5", ["train: expected keys with values, got 5"]),
        ("just words", ["just words: unknown key; known here: run, model"]),
        ("on: 1", ["True: unknown key"]),
        ("a: 1\n---\nb: 2", ["expected a single document"]),
    ],
)
def test_broken_files_are_named(text, parts, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    said = refusal([TINY, file])
    for part in [str(file), *parts]:
        assert part in said


@pytest.mark.parametrize(
    "override", ["run.seed=[1", "run.seed=&a [*a]", "run.seed=*x", "run.folder=%d", "run.folder=@x"]
)
def test_broken_overrides_are_named(override) -> None:
    assert refusal(TINY, [override]).startswith(f"the overrides {override} cannot be read: ")


def test_files_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "picture.yaml").write_bytes(b"\x89PNG\xff\xfe")
    assert refusal(tmp_path / "picture.yaml").startswith(f"config file {tmp_path / 'picture.yaml'} cannot be read: ")
    assert refusal(tmp_path).startswith(f"config file {tmp_path} cannot be read: ")
    assert "does not exist" in refusal(Path("~nobody-of-this-name/x.yaml"))


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert configs.load([TINY, tmp_path / "empty.yaml"]) == configs.load(TINY)


def test_where_values_come_from(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("train: {num_steps: 9, label_drop_prob: '${train.ema_decay}'}")
    _, origins = configs.load_with_origins([TINY, tmp_path / "mine.yaml"], ["train.num_steps=7", "run.seed=1"])
    assert origins["train.num_steps"] == origins["run.seed"] == (2, "command line")
    assert origins["train.label_drop_prob"] == (1, str(tmp_path / "mine.yaml"))
    assert origins["data.shards"] == (0, str(TINY))
    assert "train.weight_decay" not in origins


def test_a_long_value_of_an_override_is_cut() -> None:
    with pytest.raises(UserError) as caught:
        configs.load(TINY, [f"engine.precision={'x' * 10**5}"])
    assert len(str(caught.value)) < 1000
