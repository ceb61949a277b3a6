"""tools/import_official.py and the export back: bit for bit, trainable, and nothing in a file is run."""

import argparse
import dataclasses
import json
import os
import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cfpretrain.base import config as configs
from cfpretrain.base.config import Config
from cfpretrain.base.console import UserError
from cfpretrain.core.modalities import sincos_positions
from cfpretrain.data.loader import Loader
from cfpretrain.export.official import our_name, to_official, write_official
from cfpretrain.run import build
from cfpretrain.run.checkpoint import open_weights
from cfpretrain.run.state import read_state
from cfpretrain.training.folder import prepare_folder
from tests.checkpoints import same_bits
from tests.digits import small_config, small_run, write_digits
from tests.folders import Bomb
from tests.golden_cases import CASES, load
from tests.processes import run_script
from tests.runs import write_run
from tools import import_official

State = dict[str, Tensor]
SIZES = {
    "latent_size": 4,
    "latent_channels": 3,
    "patch_size": 2,
    "width": 20,
    "depth": 2,
    "num_heads": 2,
    "num_cond_tokens": 3,
    "num_classes": 5,
}


def overrides(**changes: object) -> list[str]:
    """The small model's sizes, with changes such as `width=24`, on the command line."""
    return [f"model.{key}={value}" for key, value in (SIZES | changes).items()]


@pytest.fixture
def empty_config(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A config file that sets nothing."""
    file = tmp_path_factory.mktemp("config") / "plain.yaml"
    file.write_text("{}\n")
    return [str(file)]


def official_state(config: Config, seed: int) -> State:
    """Random tensors of the config's model under the official names."""
    generator = torch.Generator().manual_seed(seed)
    shapes = build.parameter_shapes(config)
    ours = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return to_official(ours, config.model.grid)


def small_state(seed: int = 0, **changes: object) -> State:
    return official_state(configs.from_plain({"model": SIZES | changes}, "the test"), seed)


def renamed(state: Mapping[str, Tensor]) -> State:
    return {our_name(name): value for name, value in state.items()}


def equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(same_bits(first[name], second[name]) for name in first)


def of_run(run: Path, content: str) -> State:
    [checkpoint] = (run / "checkpoints").glob("step_*")
    return open_weights(checkpoint, content).read_all()  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------
# There and back


@pytest.mark.parametrize("case_name", CASES)
def test_official_to_ours_to_official_is_exact(case_name: str, tmp_path: Path, empty_config: list[str]) -> None:
    """The golden models of the official code: every name, type and bit comes back, weights and averages apart."""
    case = load(case_name)
    c, weights = case.config, case.group("weights.")
    ema = {name: value * 0.5 for name, value in weights.items()}
    args = argparse.Namespace(model="CausalFusion-XL", lr=1e-4)
    torch.save({"model": weights, "ema": ema, "opt": {"state": {}}, "args": args}, tmp_path / "official.pt")
    sizes = overrides(
        latent_size=c["grid"],
        latent_channels=c["channels"],
        patch_size=c["patch"],
        width=c["width"],
        depth=c["depth"],
        num_heads=c["heads"],
        num_cond_tokens=c["cond_tokens"],
        num_classes=c["classes"],
    )
    import_official.run(tmp_path / "official.pt", tmp_path / "run", empty_config, sizes)
    write_official(tmp_path / "run", tmp_path / "again.pt")
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert again.keys() == {"model", "ema"}
    for key, theirs in (("model", weights), ("ema", ema)):
        assert equal(again[key], theirs)
        assert {value.dtype for value in again[key].values()} == {torch.float32}
    assert sorted(os.listdir(tmp_path)) == ["again.pt", "official.pt", "run"]


def official_sincos(grid: int, width: int) -> np.ndarray:
    """The table as the field's code computes it, in NumPy: float64, then rounded."""

    def axis(positions: np.ndarray) -> np.ndarray:
        frequencies = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4.0))
        angles = np.einsum("m,d->md", positions.reshape(-1), frequencies)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    columns, rows = np.meshgrid(np.arange(grid, dtype=np.float32), np.arange(grid, dtype=np.float32))
    return np.concatenate([axis(columns), axis(rows)], axis=1).astype(np.float32)


@pytest.mark.parametrize(("grid", "width"), [(2, 20), (16, 1024), (16, 1280), (16, 1408)])
def test_fixed_positions_are_those_of_the_official_file(grid: int, width: int) -> None:
    assert same_bits(sincos_positions(grid, width), torch.from_numpy(official_sincos(grid, width)))


def test_fixed_positions_come_back(tmp_path: Path, empty_config: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """They are no parameter of ours; an average that has drifted by rounding is one, and is said."""
    state = small_state(position_embedding="sincos")
    assert same_bits(state["pos_embed"][0], sincos_positions(2, 20))
    torch.save({"model": state, "ema": state | {"pos_embed": state["pos_embed"] * (1 - 1e-6)}}, tmp_path / "a.pt")
    import_official.run(tmp_path / "a.pt", tmp_path / "run", empty_config, overrides(position_embedding="sincos"))
    assert capsys.readouterr().out.count("pos_embed is off the sin-cos table by up to") == 1
    assert "image_embedder.pos_embed" not in of_run(tmp_path / "run", "weights")
    write_official(tmp_path / "run", tmp_path / "again.pt")
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert equal(again["model"], state)
    assert equal(again["ema"], state)


def test_learned_positions_are_not_taken_for_fixed_ones(tmp_path: Path, empty_config: list[str]) -> None:
    torch.save(small_state(), tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"expected the fixed sin-cos positions.*model\.position_embedding=learnable"):
        import_official.run(tmp_path / "a.pt", tmp_path / "run", empty_config, overrides(position_embedding="sincos"))
    assert os.listdir(tmp_path) == ["a.pt"]


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of files


def wrapped(state: State) -> State:
    return {f"module._orig_mod.{name}": value for name, value in state.items()}


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("model", "has no key 'ema': its one set of tensors becomes both"),
        ("ema", "has no key 'model': its one set of tensors becomes both"),
        ("bare", "is a bare state dict: its one set of tensors becomes both"),
        ("ours", "is a bare state dict"),
        ("old format", "is a bare state dict"),
        ("safetensors", "is a bare state dict"),
    ],
)
def test_a_file_with_one_set_of_tensors(
    kind: str, said: str, tmp_path: Path, empty_config: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    state = small_state()
    file = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pt")
    if kind == "safetensors":
        save_file(state, file)
    elif kind == "old format":
        torch.save(state, file, _use_new_zipfile_serialization=False)
    else:
        contents: dict[str, Any] = {"bare": wrapped(state), "ours": renamed(state)}
        torch.save(contents.get(kind, {kind: wrapped(state)}), file)
    import_official.run(file, tmp_path / "run", empty_config, overrides())
    out = capsys.readouterr().out
    assert f"WARNING: {file} {said}" in out
    assert "Adam's moments are 0" in out
    for content in ("weights", "ema"):
        assert equal(of_run(tmp_path / "run", content), renamed(state))


def test_half_precision_widens_exactly(tmp_path: Path, empty_config: list[str]) -> None:
    halves = {name: value.to(torch.bfloat16) for name, value in small_state().items()}
    parameters = {name: torch.nn.Parameter(value.half()) for name, value in small_state(1).items()}
    # Torch may keep a minus sign apart from the values.
    halves["x_proj.bias"] = torch.complex(torch.zeros(20), -halves["x_proj.bias"].float()).conj().imag
    assert halves["x_proj.bias"].is_neg()
    torch.save({"model": halves, "ema": parameters}, tmp_path / "a.pt")
    import_official.run(tmp_path / "a.pt", tmp_path / "run", empty_config, overrides())
    for content, there in (("weights", halves), ("ema", parameters)):
        assert equal(
            of_run(tmp_path / "run", content), {our_name(n): v.detach().resolve_neg().float() for n, v in there.items()}
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("content", ["model", "ema"])
def test_values_that_are_no_numbers_are_refused(
    content: str, value: float, tmp_path: Path, empty_config: list[str]
) -> None:
    sick = {key: {name: tensor.clone() for name, tensor in small_state().items()} for key in ("model", "ema")}
    sick[content]["blocks.0.attn.qkv.weight"].view(-1)[[3, 7]] = value
    size = sick[content]["blocks.0.attn.qkv.weight"].numel()
    torch.save(sick, tmp_path / "a.pt")
    which = {"model": "weights", "ema": "ema"}[content]
    message = f"FILE: .*a.pt: {which} of trunk.blocks.0.attn.qkv.weight: expected finite .* in 2 of {size:,} values"
    with pytest.raises(UserError, match=message):
        import_official.run(tmp_path / "a.pt", tmp_path / "run", empty_config, overrides())
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_the_record_of_an_imported_run(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its config says, with names and autoencoder where its data is at hand; it cannot be trained on otherwise."""
    monkeypatch.chdir(tmp_path)
    _, path, *rest = small_run(shards, tmp_path / "elsewhere")
    torch.save(official_state(configs.load(path, rest), 0), "a.pt")
    import_official.run(Path("a.pt"), Path("known"), [path], rest, step=5)
    import_official.run(Path("a.pt"), Path("unknown"), [path], [*rest, "data.shards=gone"])
    known = read_state(Path("known/checkpoints/step_00000005"))
    assert (known.class_names, known.autoencoder) == (list("0123456789"), "identity")
    assert known.working_folder == str(tmp_path)
    assert known.config["noise"]["beta_last"] == 0.02
    unknown = read_state(Path("unknown/checkpoints/step_00000000"))
    assert (unknown.class_names, unknown.autoencoder) == ([], "")
    for overrides in (["noise.beta_last=0.03"], ["data.latent_shift=0.25", "data.latent_scale=4"]):
        config = configs.load("known/config.yaml", [*overrides, "run.folder=known"])
        with pytest.raises(UserError, match=r"is of another model: |do not fit the config"):
            prepare_folder(config, torch.device("cpu"))
    state = dataclasses.replace(known, autoencoder="0123456789abcdef")
    Path("known/checkpoints/step_00000005/state.json").write_text(state.to_json())
    with pytest.raises(UserError, match=r"expected latents of the autoencoder 0123.*, got those of identity"):
        prepare_folder(configs.load("known/config.yaml"), torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------------------
# What it is good for


def test_it_trains_on(tmp_path: Path) -> None:
    """The first loss is that of the imported weights, Adam starts from zero, and the averages go on from the file's."""
    shards = write_digits(tmp_path / "digits")
    run = tmp_path / "run"
    config = small_config(shards, run)
    weights, ema = official_state(config, 0), official_state(config, 1)
    torch.save({"model": weights, "ema": ema}, tmp_path / "official.pt")
    _, path, *rest = small_run(shards, tmp_path / "elsewhere", "train.num_steps=402", "train.decay_steps=0")
    import_official.run(tmp_path / "official.pt", run, [path], rest, step=400)
    state = read_state(run / "checkpoints" / "step_00000400")
    assert (state.step, state.optimizer_step, state.epoch, state.samples_in_epoch) == (400, 0, 0, 0)

    found = build.find_checkpoint(run)
    assert (found.state.step, found.config.run.folder) == (400, str(run))
    model = found.load_model()
    assert equal(model.state_dict(), renamed(ema))

    for ended in run_script("cfpretrain/train.py", ["--config", str(run / "config.yaml"), "metrics.wandb=disabled"], 2):
        assert ended.code == 0, ended.err
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [401, 402]
    model.load_state_dict(renamed(weights))
    expected = first_loss(configs.load(run / "config.yaml"), model, step=400)
    assert rows[0]["loss"] == pytest.approx(expected, rel=1e-5)

    trained, averages = (
        open_weights(run / "checkpoints" / "step_00000402", which).read_all() for which in ("weights", "ema")
    )
    decay = found.config.train.ema_decay
    assert read_state(run / "checkpoints" / "step_00000402").optimizer_step == 2
    for name, value in renamed(ema).items():
        # Two steps of a warmed-up Adam move a weight by two learning rates at most, and an average by far less.
        assert float((trained[name] - renamed(weights)[name]).abs().max()) <= 2.1 * found.config.train.learning_rate
        expected_average = decay**2 * value + (1 - decay**2) * trained[name]
        torch.testing.assert_close(averages[name], expected_average, rtol=0, atol=2e-4)


def first_loss(config: Config, model: Any, step: int) -> float:
    """The loss of the first global batch of the data, in one forward."""
    loader = Loader(config, build.make_prepare(config), 0, 1, step=step)
    total, count = 0.0, 0.0
    for batch in next(loader):
        with torch.no_grad():
            terms = build.make_loss(config)(model, batch)["image"]
        total, count = total + float(terms.total), count + float(terms.count)
    loader.close()
    return total / count


# ---------------------------------------------------------------------------------------------------------------------
# What it refuses


def refusal(tmp_path: Path, file: Path, config: list[str], sizes: list[str] | None = None) -> str:
    """The message of an import that leaves nothing behind."""
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError) as error:
        import_official.run(file, tmp_path / "run", config, overrides() if sizes is None else sizes)
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(tmp_path)) == before
    return str(error.value)


def test_every_size_that_differs_is_named(tmp_path: Path, empty_config: list[str]) -> None:
    torch.save({"model": small_state()}, tmp_path / "a.pt")
    sizes = overrides(
        latent_size=8, latent_channels=4, width=24, depth=3, num_heads=3, num_cond_tokens=4, num_classes=1000
    )
    message = refusal(tmp_path, tmp_path / "a.pt", empty_config, sizes)
    for key, expected, got in (
        ("model.width", 24, 20),
        ("model.depth", 3, 2),
        ("model.num_heads", 3, 2),
        ("model.num_cond_tokens", 4, 3),
        ("model.num_classes", 1000, 5),
        ("model.patch_size ** 2 * model.latent_channels", 16, 12),
        ("(model.latent_size / model.patch_size) ** 2", 16, 4),
    ):
        assert f"{key}: expected {expected}, got {got}" in message
    assert message.startswith(f"FILE: {tmp_path / 'a.pt'} does not fit the config: ")


def test_a_size_of_one_key_only_is_named_alone(tmp_path: Path, empty_config: list[str]) -> None:
    torch.save({"model": small_state()}, tmp_path / "a.pt")
    message = refusal(tmp_path, tmp_path / "a.pt", empty_config, overrides(depth=3))
    assert "fit the config: model.depth: expected 3, got 2; give the config" in message


def changed(**changes: Any) -> dict[str, Any]:
    return small_state() | {name.replace("__", "."): value for name, value in changes.items()}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(adaLN__weight=torch.zeros(2)), r"tensor 'adaLN\.weight' is not part of a CausalFusion model"),
        (
            changed(blocks__0__attn__proj__bias=torch.zeros(7)),
            r"another shape: trunk\.blocks\.0\.attn\.proj\.bias \(7,\) instead of",
        ),
        (changed(blocks__0__extra__bias=torch.zeros(7)), r"unknown: trunk\.blocks\.0\.extra\.bias"),
        ({n: v for n, v in small_state().items() if "fc1" not in n}, r"missing: trunk\.blocks\.0\.mlp\.fc1\.weight"),
        ({}, "tensors missing: .* and 38 more"),
        (changed(module__x_proj__bias=torch.zeros(20)), "each tensor once"),
        (changed(x_proj__bias=torch.zeros(20, dtype=torch.float64)), "float32, bfloat16 or float16, got torch.float64"),
        (changed(x_proj__bias=torch.zeros(20).to_sparse()), "expected plain tensors"),
        (changed(x_proj__bias=torch.zeros(20, device="meta")), "expected plain tensors .* on meta"),
        (changed(x_proj__bias=3), "expected tensors by name, got int under 'x_proj.bias'"),
        ({"model": {3: torch.zeros(1)}}, "expected tensors by name, got Tensor under 3"),
        ([1, 2], "expected tensors by name in .*, got list"),
        (torch.zeros(3), "expected tensors by name in .*, got Tensor"),
    ],
)
def test_other_contents_are_refused(content: Any, message: str, tmp_path: Path, empty_config: list[str]) -> None:
    torch.save(content, tmp_path / "a.pt")
    found = refusal(tmp_path, tmp_path / "a.pt", empty_config)
    assert found.startswith("FILE: ")
    assert re.search(message, found), found


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("kind", ["text", "empty", "cut", "folder", "absent"])
def test_what_is_no_checkpoint_is_refused(name: str, kind: str, tmp_path: Path, empty_config: list[str]) -> None:
    file = tmp_path / name
    if kind == "folder":
        file.mkdir()
    elif kind == "cut":
        save_file(small_state(), file) if name.endswith("s") else torch.save(small_state(), file)
        file.write_bytes(file.read_bytes()[:-1000])
    elif kind != "absent":
        file.write_bytes(b"" if kind == "empty" else b"certainly no checkpoint")
    message = refusal(tmp_path, file, empty_config)
    assert message.startswith("FILE: ")
    assert str(file) in message


PLACES = {
    "args": lambda bomb: {"model": small_state(), "args": bomb},
    "in args": lambda bomb: {"model": small_state(), "args": argparse.Namespace(callback=bomb)},
    "model": lambda bomb: {"model": bomb},
    "tensor": lambda bomb: {"ema": small_state() | {"x_proj.bias": bomb}},
    "opt": lambda bomb: {"model": small_state(), "opt": {"state": {0: bomb}}},
    "all": lambda bomb: bomb,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("form", "by"), [("archive", "mkdir"), ("old", "eval"), ("pickle", "mkdir")])
def test_a_planted_pickle_is_refused_and_not_run(
    form: str, place: str, by: str, tmp_path: Path, empty_config: list[str]
) -> None:
    trace, file = tmp_path / "trace", tmp_path / "a.pt"
    content = PLACES[place](Bomb(trace, by))
    if form == "pickle":
        file.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form == "archive")
    message = refusal(tmp_path, file, empty_config)
    assert not trace.exists()
    if form != "pickle" or place == "all":
        assert "expected nothing but tensors, numbers and texts in" in message
        assert f"got {'posix.mkdir' if by == 'mkdir' else 'eval'}, which could run code, and is refused" in message
    file.rename(tmp_path / "a.safetensors")
    refusal(tmp_path, tmp_path / "a.safetensors", empty_config)
    assert not trace.exists()


def test_the_reader_allows_nothing_for_good(tmp_path: Path, empty_config: list[str]) -> None:
    before = set(torch.serialization.get_safe_globals())
    torch.save({"model": small_state(), "args": argparse.Namespace()}, tmp_path / "a.pt")
    import_official.run(tmp_path / "a.pt", tmp_path / "run", empty_config, overrides())
    assert set(torch.serialization.get_safe_globals()) == before


# ---------------------------------------------------------------------------------------------------------------------
# The target


def test_an_existing_target_is_left_alone(
    tmp_path: Path, empty_config: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(small_state(), tmp_path / "a.pt")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("mine")
    command = ["import_official.py", str(tmp_path / "a.pt"), str(tmp_path / "run"), "--config", *empty_config]
    monkeypatch.setattr(sys, "argv", [*command, *overrides()])
    with pytest.raises(SystemExit) as ended:
        import_official.main()
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert f"RUN: expected a path where nothing is yet, got {tmp_path / 'run'}" in err
    assert err.count("\n") == 1
    assert (tmp_path / "run" / "mine").read_text() == "mine"


@pytest.mark.parametrize("call", ["rename", "fsync", "pwrite"])
def test_a_write_that_fails_leaves_nothing(
    call: str, tmp_path: Path, empty_config: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(small_state(), tmp_path / "a.pt")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    assert "cannot be written (No space left on device)" in refusal(tmp_path, tmp_path / "a.pt", empty_config)


def test_what_a_kill_left_is_no_run_and_is_written_over(tmp_path: Path, empty_config: list[str]) -> None:
    torch.save(small_state(), tmp_path / "a.pt")
    (tmp_path / ".run.partial" / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / ".run.partial" / "run" / "summary.json").write_text("{}")
    import_official.run(tmp_path / "a.pt", tmp_path / "run", empty_config, overrides())
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "run"]
    assert sorted(os.listdir(tmp_path / "run")) == ["checkpoints", "config.yaml"]


@pytest.mark.parametrize("step", [-1, 10**22])
def test_a_step_that_no_run_takes_is_refused(step: int, tmp_path: Path, empty_config: list[str]) -> None:
    with pytest.raises(UserError, match=rf"^--step: expected 0 to 1000000000000, got {step}"):
        import_official.run(tmp_path / "a.pt", tmp_path / "run", empty_config, overrides(), step)


def test_official_models_predict_epsilon(tmp_path: Path, empty_config: list[str], shards: Path) -> None:
    torch.save(small_state(), tmp_path / "a.pt")
    message = "noise.process: expected epsilon, which official models predict, got v"
    with pytest.raises(UserError, match=message):
        import_official.run(tmp_path / "a.pt", tmp_path / "run", empty_config, [*overrides(), "noise.process=v"])
    with pytest.raises(UserError, match=message):
        write_official(write_run(tmp_path / "v", shards, "noise.process=v"), tmp_path / "out.pt")
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "out.pt").exists()


def test_an_export_needs_a_run_and_a_free_place(
    tmp_path: Path, empty_config: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"run folder .*nowhere"):
        write_official(tmp_path / "nowhere", tmp_path / "out.pt")
    torch.save(small_state(), tmp_path / "a.pt")
    import_official.run(tmp_path / "a.pt", tmp_path / "run", empty_config, overrides())
    with pytest.raises(UserError, match=r"OUT: expected a path where nothing is yet, got .*a\.pt"):
        write_official(tmp_path / "run", tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"OUT: .*out\.pt cannot be written \(Not a directory"):
        write_official(tmp_path / "run", tmp_path / "a.pt" / "out.pt")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"out\.pt cannot be written \(No space left on device\)"):
        write_official(tmp_path / "run", tmp_path / "out.pt")
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "run"]
