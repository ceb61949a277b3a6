"""Models to sample from: a run folder and its export give the same; what is neither, or damaged, is said."""

import csv
import dataclasses
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cfpretrain.autoencoder import KLAutoencoder
from cfpretrain.base.console import UserError
from cfpretrain.data.tables import from_cell
from cfpretrain.evaluation.image_set import ImageSet
from cfpretrain.evaluation.source import Source, load_source
from cfpretrain.export.diffusers_layout import ExportSettings, export
from cfpretrain.run import build
from cfpretrain.run.checkpoint_store import Best
from tests.runs import as_before_noise_processes, as_older, write_run
from tests.test_autoencoder import write as write_autoencoder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A run folder with random weights; tests read it only."""
    return write_run(tmp_path_factory.mktemp("runs") / "run", shards)


@pytest.fixture
def exported(tmp_path: Path, run: Path) -> Path:
    """The same as an export of several files of weights."""
    export(run, tmp_path / "exported", ExportSettings(max_shard_bytes=20_000))
    assert len(list((tmp_path / "exported" / "transformer").glob("*.safetensors"))) > 1
    return tmp_path / "exported"


def same_weights(one: Source, other: Source) -> bool:
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_and_its_export_are_the_same_model(run: Path, exported: Path) -> None:
    one, other = load_source(run, CPU), load_source(exported, CPU)
    assert same_weights(one, other)
    assert one.class_names == other.class_names == tuple("0123456789")
    assert one.config.model == other.config.model
    assert (one.title, other.title) == (f"{run}, step 7, EMA weights", str(exported))
    assert not any(parameter.requires_grad for parameter in other.model.parameters())


def test_raw_weights_and_bf16(run: Path, exported: Path) -> None:
    raw = load_source(run, CPU, weights="raw")
    assert raw.title.endswith("raw weights")
    assert not same_weights(raw, load_source(run, CPU))
    assert {value.dtype for value in load_source(exported, CPU, "bf16").model.parameters()} == {torch.bfloat16}
    with pytest.raises(UserError, match=r"--weights: .* is an export, which holds the weights it was made of"):
        load_source(exported, CPU, weights="raw")


def test_a_checkpoint_by_its_step_or_score(tmp_path: Path, run: Path, exported: Path) -> None:
    assert ", step 7, " in load_source(run, CPU, step=7).title
    with pytest.raises(UserError, match=r"--step: expected a checkpoint of .* \(steps 7\), got 8"):
        load_source(run, CPU, step=8)
    with pytest.raises(UserError, match=r"--step: expected a run that scores itself \(evaluation.every_steps\), got "):
        load_source(run, CPU, step="best")
    with pytest.raises(UserError, match=r"--step: .* is an export, of one step; leave it out"):
        load_source(exported, CPU, step=7)
    scored = shutil.copytree(run, tmp_path / "scored")
    store = build.make_store(build.load_run_config(scored))
    assert store.keep_if_best(Best(7, 1.0, {}))
    shutil.copytree(store.folder / "step_00000007", store.folder / "step_00000009")
    (store.folder / "latest").write_text("step_00000009\n")
    assert build.find_checkpoint(scored).path.name == "step_00000009"
    assert build.find_checkpoint(scored, "best").path.name == "step_00000007"


def test_other_folders_of_ours_are_known(run: Path, exported: Path) -> None:
    for path, message in (
        (exported, "expected a run folder, got an export of one; give the run's"),
        (run / "checkpoints" / "step_00000007", f"expected a run folder, got a checkpoint of one; give {run}"),
    ):
        with pytest.raises(UserError, match=message):
            build.find_checkpoint(path)


def test_damaged_exports(exported: Path) -> None:
    broken = next((exported / "transformer").glob("*.safetensors"))
    whole = broken.read_bytes()
    broken.write_bytes(whole[:100])
    with pytest.raises(UserError, match=f"source: {broken} is no file of tensors, or a damaged one"):
        load_source(exported, CPU)
    broken.unlink()
    with pytest.raises(UserError, match=f"source: expected a file of tensors .* got {broken}, which is not there"):
        load_source(exported, CPU)
    broken.write_bytes(whole)
    index = exported / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text("[]")
    with pytest.raises(
        UserError, match=r"index\.json: the file: expected keys with values, got \[\]; export the run again"
    ):
        load_source(exported, CPU)
    index.write_text("{}")
    with pytest.raises(UserError, match=r"index\.json: .*weight_map: missing; export the run again"):
        load_source(exported, CPU)
    index.write_text('{"metadata": {}, "weight_map": {}}')
    with pytest.raises(UserError, match=r"transformer does not fit .*config\.yaml: .*Missing key"):
        load_source(exported, CPU)


def test_a_word_that_is_no_class_is_a_mistake_of_the_user(run: Path) -> None:
    source = dataclasses.replace(load_source(run, CPU), class_names=("crane", "bass"))
    assert source.label_of("bass") == source.label_of("1") == 1
    with pytest.raises(UserError, match=r"class: expected a name, or a number from 0 to 1, got 'base'; did you mean"):
        source.label_of("base")


def edit_config(run: Path, old: str, new: str) -> None:
    text = (run / "config.yaml").read_text()
    assert old in text
    (run / "config.yaml").write_text(text.replace(old, new))


def test_classes_of_an_older_checkpoint_without_its_data_go_by_number(
    tmp_path: Path, run: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = as_older(shutil.copytree(run, tmp_path / "run"))
    edit_config(older, str(shards), str(tmp_path / "gone"))
    assert load_source(older, CPU).class_names == tuple("0123456789")
    assert "classes go by their numbers, since this checkpoint does not say their names" in capsys.readouterr().out


def test_the_config_of_an_older_checkpoint_is_that_of_its_run(tmp_path: Path, run: Path) -> None:
    older = as_older(shutil.copytree(run, tmp_path / "run"))
    edit_config(older, "beta_last: 0.02", "beta_last: 0.03")
    source = load_source(older, CPU)
    assert source.config.noise.beta_last == 0.03
    assert same_weights(source, load_source(run, CPU))
    edit_config(older, "depth: 2", "depth: 3")
    with pytest.raises(UserError, match=r"config\.yaml contradicts checkpoint .*: model.depth is 2 there and 3 in"):
        load_source(older, CPU)


def test_a_run_of_before_predicts_epsilon(tmp_path: Path, run: Path) -> None:
    """Whose record says nothing of it."""
    older = as_before_noise_processes(shutil.copytree(run, tmp_path / "run"))
    source = load_source(older, CPU)
    assert source.config.noise.process == "epsilon"
    assert same_weights(source, load_source(run, CPU))
    edit_config(older, "noise:\n", "noise:\n  process: flow\n")
    with pytest.raises(UserError, match=r"contradicts checkpoint .*: noise.process is epsilon there and flow in the"):
        load_source(older, CPU)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("beta_last: 0.02", "beta_last: 0.5", "noise.beta_last is 0.02 there and 0.5 in the config"),
        ("num_timesteps: 1000", "num_timesteps: 500", "noise.num_timesteps is 1000 there and 500 in the config"),
        ("latent_shift:\n  - 0.5", "latent_shift:\n  - 0.1", r"data.latent_shift is \[0.5\] there and \[0.1\] in"),
        ("latent_scale:\n  - 2.0", "latent_scale:\n  - 1.0", r"data.latent_scale is \[2.0\] there and \[1.0\] in"),
    ],
)
def test_an_edited_config_that_contradicts_the_checkpoint_is_refused(
    tmp_path: Path, run: Path, old: str, new: str, said: str
) -> None:
    edited = shutil.copytree(run, tmp_path / "run")
    edit_config(edited, old, new)
    for action in (
        lambda: load_source(edited, CPU),
        lambda: build.config_at(edited, 5),
        lambda: export(edited, tmp_path / "exported", ExportSettings()),
    ):
        with pytest.raises(UserError, match=f"run/config.yaml contradicts checkpoint .*step_00000007.*{said}"):
            action()
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("beta_last: 0.02", "beta_last: 0.5", "beta_end is 0.02 there and 0.5 by config.yaml"),
        ("latent_scale:\n  - 2.0", "latent_scale:\n  - 1.0", "latent_scale is .2.0. there and .1.0"),
        ("token_order: random", "token_order: raster", "token_order is 'random' there and 'raster' by"),
        ("process: epsilon", "process: flow", "prediction_type is 'epsilon' there and 'flow_prediction' by"),
    ],
)
def test_an_export_with_an_edited_config_is_refused(exported: Path, old: str, new: str, said: str) -> None:
    edit_config(exported, old, new)
    with pytest.raises(UserError, match=rf"config\.yaml contradicts .*scheduler_config\.json: {said}"):
        load_source(exported, CPU)


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        ("transformer/config.json", '"num_heads": 2', '"num_heads": 4', "num_heads is 4 there and 2 by config.yaml"),
        ("scheduler/scheduler_config.json", '"beta_end": 0.02', '"beta_end": "0.02"', "beta_end is '0.02' there and"),
    ],
)
def test_an_export_of_which_another_file_was_edited_is_refused(
    exported: Path, file: str, old: str, new: str, said: str
) -> None:
    text = (exported / file).read_text()
    assert old in text
    (exported / file).write_text(text.replace(old, new))
    with pytest.raises(UserError, match=rf"config\.yaml contradicts .*scheduler_config\.json: {said}"):
        load_source(exported, CPU)


def test_weights_of_another_type_are_refused(exported: Path) -> None:
    file = next((exported / "transformer").glob("*.safetensors"))
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file(tensors | {name: tensors[name].to(torch.complex64)}, file)
    with pytest.raises(UserError, match=rf"{name}: expected fp32, bf16 or fp16, got torch\.complex64"):
        load_source(exported, CPU)


def test_what_may_change_is_taken_from_the_checkpoint(tmp_path: Path, run: Path) -> None:
    edited = shutil.copytree(run, tmp_path / "run")
    edit_config(edited, "learning_rate: 0.001", "learning_rate: 0.5")
    edit_config(edited, "token_order: random", "token_order: raster")
    config = load_source(edited, CPU).config
    assert (config.train.learning_rate, config.order.token_order) == (0.001, "random")
    assert config.run.folder == str(edited)
    export(edited, tmp_path / "exported", ExportSettings())
    assert "learning rate 0.001," in (tmp_path / "exported" / "README.md").read_text()
    assert json.loads((tmp_path / "exported" / "transformer" / "config.json").read_text())["token_order"] == "random"
    assert load_source(tmp_path / "exported", CPU).config.train.learning_rate == 0.001


def test_names_and_weights_are_the_same_from_any_directory(
    tmp_path: Path, run: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With shards that a relative path names, and after they are gone."""
    moved = shutil.copytree(run, tmp_path / "run")
    edit_config(moved, str(shards), "data/gone")
    here = load_source(moved, CPU)
    monkeypatch.chdir(tmp_path)
    there = load_source(Path("run"), CPU)
    assert here.class_names == there.class_names == tuple("0123456789")
    assert same_weights(here, there)
    assert "WARNING" not in capsys.readouterr().out


ODD_NAMES = ["a|b", "new\nline", "caf\udce9", '","', "\u540d\u524d", "10", "name:3", " ", "-1", "7"]


def test_names_with_odd_characters(tmp_path: Path, shards: Path) -> None:
    """They go with the run and its export, each can be asked for, and no table or card is broken by them."""
    run = write_run(tmp_path / "run", shards, class_names=ODD_NAMES)
    export(run, tmp_path / "exported", ExportSettings())
    for path in (run, tmp_path / "exported"):
        source = load_source(path, CPU)
        assert list(source.class_names) == ODD_NAMES
        assert [source.label_of(f"name:{name}") for name in ODD_NAMES] == list(range(10))
    card = (tmp_path / "exported" / "README.md").read_text()
    assert r'| Classes | 10: a\|b, new\\nline, caf\\udce9, ",", ' + "\u540d\u524d, 10, name:3,  , -1, 7 |" in card
    # "7" is the number of another class: the card's example must run.
    assert "pipe([0, 9], num_ar_steps=4" in card
    table = ImageSet(tmp_path / "out", list(range(10)), ODD_NAMES, 2, {})._table()
    rows = list(csv.DictReader(io.StringIO(table.decode(errors="surrogateescape"), newline="")))
    assert [(from_cell(row["label"]), int(row["index"])) for row in rows] == [
        (name, i) for i, name in enumerate(ODD_NAMES)
    ]


# ---------------------------------------------------------------------------
# The autoencoder


@pytest.fixture
def latent_run(tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run in `project/runs/run` that names its autoencoder relative to `project`, where it was trained."""
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    decoder = KLAutoencoder.load(write_autoencoder(Path("ae")), CPU)
    scaling = decoder.scaling_overrides().split()
    sizes = ["model.latent_size=8", f"model.latent_channels={decoder.latent_channels}", "model.patch_size=1"]
    return write_run(tmp_path / "project" / "runs" / "run", shards, "data.autoencoder=ae", *scaling, *sizes)


def test_a_relative_autoencoder_is_found_from_any_directory(
    tmp_path: Path, latent_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = load_source(latent_run, CPU).make_autoencoder()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    # Another one under the same relative path.
    write_autoencoder(Path("ae"), seed=1)
    there = load_source(latent_run, CPU).make_autoencoder()
    assert here.fingerprint == there.fingerprint
    export(latent_run, tmp_path / "exported", ExportSettings())
    assert load_source(tmp_path / "exported", CPU).make_autoencoder().fingerprint == here.fingerprint


def test_another_autoencoder_is_refused(tmp_path: Path, latent_run: Path) -> None:
    write_autoencoder(tmp_path / "other", seed=1)
    edit_config(latent_run, "autoencoder: ae", f"autoencoder: {tmp_path / 'other'}")
    message = rf"data.autoencoder: expected the autoencoder behind the latents .* of fingerprint .* in {tmp_path}/other"
    for action in (
        lambda: load_source(latent_run, CPU).make_autoencoder(),
        lambda: build.find_checkpoint(latent_run).make_autoencoder(CPU),
        lambda: export(latent_run, tmp_path / "exported", ExportSettings()),
    ):
        with pytest.raises(UserError, match=message):
            action()


def test_an_autoencoder_that_scales_otherwise_is_refused(tmp_path: Path, latent_run: Path) -> None:
    config = Path("ae/config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.7}))
    with pytest.raises(UserError, match=r"data.autoencoder: expected the autoencoder behind .*, of scale .*, got "):
        load_source(latent_run, CPU).make_autoencoder()


def test_a_relative_path_that_leads_nowhere_says_what_it_is_relative_to(
    tmp_path: Path, latent_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = shutil.move(tmp_path / "project" / "runs" / "run", tmp_path / "run")
    shutil.rmtree("ae")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"data.autoencoder: ae does not exist in {tmp_path}, the working directory"):
        load_source(moved, CPU).make_autoencoder()
