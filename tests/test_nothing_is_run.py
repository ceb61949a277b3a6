"""Files are data: with a program planted in any place where a file of others is read, none is run.

No more is the environment read or a store opened because such a file says so. Checkpoints of the official code, of
DeepSpeed and of autoencoders have such tests beside their converters.
"""

import io
import json
import os
import pickle
import shutil
import socket
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cfpretrain import train
from cfpretrain.base import config as configs
from cfpretrain.base import console
from cfpretrain.base.config import load as load_config
from cfpretrain.base.config import to_plain
from cfpretrain.base.console import UserError
from cfpretrain.data.loader import Loader
from cfpretrain.evaluation.editing import read_crop, read_region
from cfpretrain.evaluation.source import load_source
from cfpretrain.export.diffusers_layout import ExportSettings, export
from cfpretrain.export.official import write_official
from cfpretrain.run import build
from cfpretrain.run.checkpoint import load, open_weights
from cfpretrain.run.metrics import read_metrics
from cfpretrain.run.state import read_state
from tests.checkpoints import random_bits, whole, zero_like
from tests.digits import write_digits
from tests.folders import Bomb
from tests.latent_shards import as_read
from tests.processes import REPOSITORY, Ended, run_alone, run_in_processes
from tests.runs import STEP, as_older, write_run, write_text_run
from tools import replay

CPU = torch.device("cpu")


def bombs(trace: Path) -> dict[str, bytes]:
    """Contents of files that make a folder in careless hands."""
    archive, array = io.BytesIO(), io.BytesIO()
    torch.save({"x": Bomb(trace)}, archive)
    np.save(array, np.array([Bomb(trace)], dtype=object))
    return {
        "pickle": pickle.dumps(Bomb(trace), protocol=2),
        "torch": archive.getvalue(),
        "numpy": array.getvalue(),
        "yaml": f"run: !!python/object/apply:os.mkdir [{str(trace)!r}]\n".encode(),
        "python": f"import os\nos.mkdir({str(trace)!r})\n".encode(),
    }


def test_the_bombs_go_off(tmp_path: Path) -> None:
    """In careless hands: else this module would prove nothing."""
    import yaml

    for name, careless in {
        "pickle": pickle.loads,
        "torch": lambda data: torch.load(io.BytesIO(data), weights_only=False),
        "numpy": lambda data: np.load(io.BytesIO(data), allow_pickle=True),
        "yaml": yaml.unsafe_load,
        "python": exec,
    }.items():
        careless(bombs(tmp_path / name)[name])
        assert (tmp_path / name).is_dir()


def resume(run: Path) -> None:
    """As the trainer reads the checkpoint that it goes on from."""
    config = load_config(run / build.CONFIG_FILE)
    shapes = {name: tuple(value.shape) for name, value in build.make_model(config).named_parameters()}
    path = build.make_store(config).candidates()[0]
    load(path, *whole(zero_like(random_bits(shapes, 0))), config=to_plain(config))


def read_run(run: Path) -> list[Callable[[], Any]]:
    checkpoint = run / build.CHECKPOINTS / f"step_{STEP:08d}"
    return [
        lambda: build.find_checkpoint(run).load_model(),
        lambda: load_source(run, CPU),
        lambda: resume(run),
        lambda: read_state(checkpoint),
        lambda: open_weights(checkpoint, "weights").read_all(),
        lambda: build.read_summary(run),
        lambda: read_metrics(run / build.METRICS_FILE),
        lambda: write_official(run, run.parent / "out.pt"),
    ]


def read_export(folder: Path) -> list[Callable[[], Any]]:
    return [lambda: load_source(folder, CPU)]


def read_text_export(folder: Path) -> list[Callable[[], Any]]:
    return [*read_export(folder), lambda: load_source(folder, CPU).tokenizer]


def read_shards(folder: Path) -> list[Callable[[], Any]]:
    config = load_config(folder.parent / "run" / build.CONFIG_FILE)

    def read() -> None:
        loader = Loader(config, as_read, 0, 1)
        next(loader)
        loader.close()

    return [read]


# What may be missing or damaged, and what of an export only diffusers reads.
PASSED_OVER = (build.SUMMARY_FILE, build.METRICS_FILE, "requeue", "scheduler_config.json", "config.json")
READERS = {"run": read_run, "export": read_export, "text_export": read_text_export, "digits": read_shards}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its shards and its export."""
    folder = tmp_path_factory.mktemp("made")
    shards = write_digits(folder / "digits")
    run = write_run(folder / "run", shards)
    export(run, folder / "export", ExportSettings())
    export(write_text_run(folder / "text_run", shards), folder / "text_export", ExportSettings())
    for name in (build.SUMMARY_FILE, build.METRICS_FILE):
        (run / name).write_text("{}\n")
    return folder


@pytest.mark.parametrize("which", READERS)
def test_no_file_of_a_folder_is_run(which: str, made: Path, tmp_path: Path) -> None:
    places = sorted(path.relative_to(made) for path in (made / which).rglob("*") if path.is_file())
    assert len(places) >= {"run": 9, "export": 6, "text_export": 8, "digits": 3}[which]
    trace = tmp_path / "trace"
    for place in places:
        for name, content in bombs(trace).items():
            (made / place).rename(tmp_path / "kept")
            (made / place).write_bytes(content)
            try:
                num_refused = sum(is_refused(read) for read in READERS[which](made / which))
            finally:
                shutil.move(tmp_path / "kept", made / place)
                (made / "out.pt").unlink(missing_ok=True)
            assert not trace.exists(), (place, name)
            assert num_refused or place.suffix in (".py", ".md", ".png") or place.name in PASSED_OVER, (place, name)


def is_refused(read: Callable[[], Any]) -> bool:
    try:
        read()
    except UserError as error:
        return "\n" not in str(error)
    return False


@pytest.mark.parametrize("suffix", [".png", ".npy", ".pt"])
def test_no_picture_and_no_mask_is_run(suffix: str, tmp_path: Path) -> None:
    for name, content in bombs(tmp_path / "trace").items():
        file = tmp_path / f"{name}{suffix}"
        file.write_bytes(content)
        assert is_refused(lambda file=file: read_crop(file, 8, True))
        assert is_refused(lambda file=file: read_region(str(file), 4, 8, (8, 8)))
    assert not (tmp_path / "trace").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The environment

TINY, TRAIN = REPOSITORY / "configs" / "tiny.yaml", "cfpretrain/train.py"
KEY, SECRET = "WANDB_API_KEY", "0123-a-key-4567"
ENV = f"${{oc.env:{KEY}}}"


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    """A key in the environment, which nothing hides yet."""
    monkeypatch.setattr(console, "_hidden", {})
    monkeypatch.setenv(KEY, SECRET)
    return SECRET


@pytest.mark.parametrize(
    "text",
    [
        f"data: {{shards: ['s3://bucket/{ENV}']}}",
        f"metrics: {{wandb_project: '{ENV}'}}",
        f"train: {{num_steps: '{ENV}'}}",
        f"data: {{latent_scale: [1.0, '{ENV}']}}",
        f'metrics: {{wandb_project: "\\x24{{oc.env:{KEY}}}"}}',  # ${ as YAML may write it
        f"'{ENV}': {{x: 1}}",
        f"run: {{'{ENV}': 1}}",
        "train: {num_steps: '${model.width}'}",
        "run: '${train}'",
    ],
)
def test_what_a_run_or_an_export_holds_is_not_resolved(
    text: str, made: Path, tmp_path: Path, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("run", "export"):
        folder = shutil.copytree(made / name, tmp_path / name)
        (folder / build.CONFIG_FILE).write_text(text)
        reads: list[Callable[[], Any]] = [
            lambda folder=folder: load_source(folder, CPU),
            lambda folder=folder: configs.load([TINY, folder / build.CONFIG_FILE], allow_env=True),
            lambda name=name: configs.load([TINY, f"~/{name}/{build.CONFIG_FILE}"], allow_env=True),
        ]
        for read in reads:
            with pytest.raises(UserError, match=r"\$\{") as caught:
                read()
            assert secret not in str(caught.value)
            assert "\n" not in str(caught.value)


def test_what_a_checkpoint_records_is_not_resolved(made: Path, tmp_path: Path, secret: str) -> None:
    config = to_plain(load_config(made / "run" / build.CONFIG_FILE))
    config["metrics"]["wandb_project"] = ENV
    run = write_run(tmp_path / "run", made / "digits", config=config)
    with pytest.raises(UserError, match="wandb_project: expected a value, as a run records it"):
        load_source(run, CPU)


@pytest.mark.parametrize(
    "text",
    [
        ENV,
        "${oc.coerce:planted.Kind,1}",
        f'${{oc.decode:"{ENV}"}}',
        f"${{oc.select:run.folder,{ENV}}}",
        f"${{oc.${{run.folder}}:{KEY}}}",
        "${oc.create:{a:1}}",
    ],
)
def test_a_file_of_ones_own_refers_to_keys_alone(text: str, tmp_path: Path, monkeypatch, secret: str) -> None:
    (tmp_path / "planted.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'trace')!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.yaml").write_text(json.dumps({"metrics": {"wandb_project": text}}))
    for paths, overrides in (([TINY, tmp_path / "mine.yaml"], []), ([TINY], [f"metrics.wandb_project='{text}'"])):
        for allow_env in (False, True):
            if allow_env and text == ENV:
                continue
            with pytest.raises(UserError) as caught:
                configs.load(paths, overrides, allow_env)
            assert secret not in str(caught.value)
    assert not (tmp_path / "trace").exists()


def test_what_the_environment_says_is_shown_by_its_name(tmp_path: Path, secret: str, capsys) -> None:
    config = configs.load(TINY, [f"metrics.wandb_project={ENV}", "run.folder=${metrics.wandb_project}/run"], True)
    assert config.metrics.wandb_project == secret
    assert config.run.folder == f"{secret}/run"
    assert configs.to_shown(config)["metrics"]["wandb_project"] == ENV  # which wandb gets
    console.say(f"writing {config.run.folder}")
    assert capsys.readouterr().out == f"[cfpretrain] writing {ENV}/run\n"
    for key in ("train.num_steps", "train.learning_rate", "engine.precision", "engine.compile_blocks", "data.repeat"):
        with pytest.raises(UserError, match=rf"{key}: expected .*\$\{{oc\.env:{KEY}\}}") as caught:
            configs.load(TINY, [f"{key}={ENV}"], True)
        assert secret not in str(caught.value)
    shown = Namespace(
        config=[str(TINY)],
        overrides=[f"data.shards=['s3://{ENV}/x']", f"run.folder='{ENV}'", f"data.autoencoder='{ENV}'"],
        allow_env=True,
        allow_code=False,
        num_ranks=1,
    )
    train.dry_run(shown)
    said = capsys.readouterr().out
    assert f"s3://{ENV}/x" in said
    assert secret not in said


def test_no_text_of_the_machine_is_exported(made: Path, tmp_path: Path) -> None:
    texts = ["metrics.wandb_project=my-key", "data.cache_folder=/my-key/x", "evaluation.reference=/my-key/y"]
    run = write_run(tmp_path / "run", made / "digits", *texts)
    export(run, tmp_path / "out", ExportSettings())
    for file in (tmp_path / "out").rglob("*"):
        assert not file.is_file() or (
            b"my-key" not in file.read_bytes() and str(tmp_path) not in file.read_text("latin-1")
        )
    assert load_source(tmp_path / "out", CPU).config.model == load_source(run, CPU).config.model


# ---------------------------------------------------------------------------------------------------------------------
# Code that a config names


def start(folder: Path, script: str, *arguments: str) -> Ended:
    """As a user does in a folder, which may hold a stranger's modules."""
    store = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "S3_"))}
    return run_alone(script, arguments, environment=store, cwd=folder, path=[folder])


def test_code_is_named_on_the_command_line_alone(made: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (tmp_path / "planted.py").write_text(f"import os\nos.mkdir({str(trace)!r})\n")
    asked = ["evaluation.every_steps=4", f"evaluation.reference={tmp_path}", "evaluation.num_images=20"]
    named = "evaluation.features=planted:make"
    run = write_run(tmp_path / "run", made / "digits", *asked, named, "train.num_steps=8", data_fingerprint="")
    own = tmp_path / "mine.yaml"
    shutil.copyfile(run / build.CONFIG_FILE, own)
    assert load_source(run, CPU).config.evaluation.features == "planted:make"  # a text
    for refused in ([run / build.CONFIG_FILE], [run / build.CONFIG_FILE, "--allow-code"], [own]):
        ended = start(tmp_path, TRAIN, "--config", *map(str, refused))
        assert ended.code == 2, ended
        assert "is code, which a config file may not run" in ended.err
    assert not trace.exists()
    ended = start(tmp_path, TRAIN, "--config", str(run / build.CONFIG_FILE), named)
    assert ended.code == 2
    assert "evaluation.features: planted:make cannot be imported" in ended.err
    assert trace.is_dir()
    trace.rmdir()
    start(tmp_path, TRAIN, "--config", str(own), "--allow-code")
    assert trace.is_dir()


# ---------------------------------------------------------------------------------------------------------------------
# The network


@pytest.fixture
def silent_store(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A store that answers nobody; calling it says how many have come."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        listener.setblocking(False)
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")

        def count() -> int:
            for number in range(100):
                try:
                    listener.accept()[0].close()
                except BlockingIOError:
                    return number
            return 100

        yield count


def replay_refuses(run: Path) -> str:
    with pytest.raises(UserError) as caught:
        replay.run(run, STEP + 1, [])
    return str(caught.value)


@pytest.mark.parametrize("older", [False, True])
def test_no_tool_opens_a_store_that_a_run_names(older: bool, made: Path, tmp_path: Path, silent_store) -> None:
    names = {} if older else {"class_names": [f"digit {i}" for i in range(10)]}
    run = write_run(tmp_path / "run", made / "digits", "data.shards=['s3://bucket/x']", **names)
    if older:
        as_older(run)
    assert load_source(run, CPU).class_names == tuple(f"{'' if older else 'digit '}{i}" for i in range(10))
    if not older:
        export(run, tmp_path / "export", ExportSettings())
    (run / build.METRICS_FILE).write_text(json.dumps({"step": STEP + 1, "loss": 1.0}) + "\n")
    config = str(run / build.CONFIG_FILE)
    [said] = run_in_processes(replay_refuses, 1, run)
    assert "data.shards" in said
    assert "is only opened where the command line says so" in said
    for script, arguments in (
        ("tools/sample.py", [str(run), "--out", str(tmp_path / "a.png"), "--num-denoising-steps", "2"]),
        ("tools/estimate_memory.py", ["--config", config]),
        (TRAIN, ["--config", config, "--dry-run"]),
    ):
        ended = start(tmp_path, script, *arguments)
        assert ended.code == 0, ended
    assert silent_store() == 0
    with socket.create_connection(("127.0.0.1", int(os.environ["S3_ENDPOINT_URL"].rpartition(":")[2]))):
        assert silent_store() == 1  # else it would not count
