"""Files are data: with a program planted in any place where a file of others is read, none is run.

Checkpoints of the official code, of DeepSpeed and of autoencoders have such tests beside their converters.
"""

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cfpretrain import build
from cfpretrain.checkpoint import CheckpointStore, read_tensors
from cfpretrain.config import load as load_config
from cfpretrain.config import to_plain
from cfpretrain.console import UserError
from cfpretrain.data.loader import Loader
from cfpretrain.evaluation.editing import read_crop, read_region
from cfpretrain.export.diffusers_layout import ExportSettings, export
from cfpretrain.export.official import write_official
from cfpretrain.metrics import read_metrics
from cfpretrain.source import load_source
from cfpretrain.training_state import read_state
from tests.checkpoints import random_bits, whole, zero_like
from tests.digits import write_digits
from tests.latent_shards import as_read
from tests.runs import STEP, write_run

CPU = torch.device("cpu")


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.trace,)


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
    CheckpointStore.load(path, *whole(zero_like(random_bits(shapes, 0))), config=to_plain(config))


def read_run(run: Path) -> list[Callable[[], Any]]:
    checkpoint = run / build.CHECKPOINTS / f"step_{STEP:08d}"
    return [
        lambda: build.load_run(run, CPU),
        lambda: load_source(run, CPU),
        lambda: resume(run),
        lambda: read_state(checkpoint),
        lambda: read_tensors(checkpoint, "weights"),
        lambda: build.read_summary(run),
        lambda: read_metrics(run / build.METRICS_FILE),
        lambda: write_official(run, run.parent / "out.pt"),
    ]


def read_export(folder: Path) -> list[Callable[[], Any]]:
    return [lambda: load_source(folder, CPU)]


def read_shards(folder: Path) -> list[Callable[[], Any]]:
    config = load_config(folder.parent / "run" / build.CONFIG_FILE)

    def read() -> None:
        loader = Loader(config, as_read, 0, 1)
        next(loader)
        loader.close()

    return [read]


# What may be missing or damaged, and what of an export only diffusers reads.
PASSED_OVER = (build.SUMMARY_FILE, build.METRICS_FILE, "requeue", "scheduler_config.json", "config.json")
READERS = {"run": read_run, "export": read_export, "digits": read_shards}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its shards and its export."""
    folder = tmp_path_factory.mktemp("made")
    shards = write_digits(folder / "digits")
    run = write_run(folder / "run", shards)
    export(run, folder / "export", ExportSettings())
    for name in (build.SUMMARY_FILE, build.METRICS_FILE):
        (run / name).write_text("{}\n")
    return folder


@pytest.mark.parametrize("which", READERS)
def test_no_file_of_a_folder_is_run(which: str, made: Path, tmp_path: Path) -> None:
    places = sorted(path.relative_to(made) for path in (made / which).rglob("*") if path.is_file())
    assert len(places) >= {"run": 9, "export": 6, "digits": 3}[which]
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
