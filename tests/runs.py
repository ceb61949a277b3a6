"""Run folders with random weights, for tools that read one."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cfpretrain.base.config import to_plain, to_yaml
from cfpretrain.core import seeds
from cfpretrain.core.design import CHANGES
from cfpretrain.data.tokenizer import TextTokenizer
from cfpretrain.run import build
from tests import checkpoints
from tests.digits import small_config

STEP = 7
TOKENIZER = TextTokenizer.train(["a seven", "a three, written by hand", "two bold numbers: one and two"] * 9, 280)


def write_run(folder: Path, shards: Path, *overrides: str, **state: Any) -> Path:
    """A run of the tiny preset made tinier at step 7; its average and its weights are different random values.

    Args:
        folder: of the run.
        shards: latents of digits.
        overrides: of the config.
        state: of the checkpoint, where it is to be another.
    """
    config = small_config(shards, folder, *overrides)
    folder.mkdir(parents=True)
    (folder / build.CONFIG_FILE).write_text(to_yaml(config))
    shapes = {name: tuple(value.shape) for name, value in build.make_model(config).named_parameters()}
    full = {
        content: {
            name: seeds.normal(seeds.key(0, f"{content} {name}"), shape) * (0.02 if len(shape) > 1 else 1)
            for name, shape in shapes.items()
        }
        for content in checkpoints.CONTENTS
    }
    state = checkpoints.make_state(
        STEP,
        **{
            "config": to_plain(config),
            "class_names": list(map(str, range(10))),
            "autoencoder": build.make_autoencoder(config, torch.device("cpu")).fingerprint,
            "working_folder": str(Path.cwd()),
            **state,
        },
    )
    checkpoints.write(build.make_store(config), state, *checkpoints.whole(full))
    return folder


def write_text_run(folder: Path, shards: Path, *overrides: str, **state: Any) -> Path:
    """The same of a model with texts of `TOKENIZER`."""
    copy = folder / build.TOKENIZER_FILE
    sizes = (f"model.vocabulary={TOKENIZER.size}", "model.max_text_tokens=32", "model.max_segments=5")
    tasks = (f"data.tasks.{name}={i}" for i, name in enumerate(("class_to_image", "image_to_text", "text_to_image"), 1))
    texts = (*sizes, *tasks, f"data.tokenizer={copy}")
    write_run(folder, shards, *texts, *overrides, **{"tokenizer": TOKENIZER.fingerprint, **state})
    copy.write_text(TOKENIZER.to_json())
    return folder


def as_older(run: Path) -> Path:
    """Turns a run's checkpoints into those of schema 2, which recorded nothing of the config but the model."""

    def change(plain: dict[str, Any]) -> dict[str, Any]:
        for key in ("history", "class_names", "autoencoder", "working_folder"):
            del plain[key]
        return plain | {"schema_version": 2, "model": plain.pop("config")["model"]}

    return _with_changed_states(run, change)


def as_before_noise_processes(run: Path) -> Path:
    """Takes the choice of a noise process, and of a trunk, out of a run's config and records."""
    keys = ("process", "flow_times", "trunk", *CHANGES)

    def change(plain: dict[str, Any]) -> dict[str, Any]:
        sections = {
            name: {key: value for key, value in plain["config"][name].items() if key not in keys}
            for name in ("noise", "model")
        }
        return plain | {"config": plain["config"] | sections}

    lines = (run / build.CONFIG_FILE).read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.strip().startswith(tuple(f"{key}:" for key in keys))]
    assert len(kept) == len(lines) - len(keys)
    (run / build.CONFIG_FILE).write_text("".join(kept))
    return _with_changed_states(run, change)


def _with_changed_states(run: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    for file in run.glob("checkpoints/step_*/state.json"):
        plain = json.loads(file.read_text())
        del plain["sha256"]
        plain = change(plain)
        sha256 = hashlib.sha256((json.dumps(plain, indent=2, sort_keys=True) + "\n").encode()).hexdigest()
        file.write_text(json.dumps(plain | {"sha256": sha256}))
    return run
