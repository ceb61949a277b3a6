"""Models to sample from: a run folder and its export give the same; what is neither, or damaged, is said."""

import shutil
from pathlib import Path

import pytest
import torch

from cfpretrain import build
from cfpretrain.checkpoint import Best
from cfpretrain.console import UserError
from cfpretrain.export.diffusers_layout import ExportSettings, export
from cfpretrain.source import Source, load_source
from tests.runs import write_run

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
    assert build.find_checkpoint(scored)[1].name == "step_00000009"
    assert build.find_checkpoint(scored, "best")[1].name == "step_00000007"


def test_other_folders_of_ours_are_known(run: Path, exported: Path) -> None:
    for path, message in (
        (exported, "expected a run folder, got an export of one; give the run's"),
        (run / "checkpoints" / "step_00000007", f"expected a run folder, got a checkpoint of one; give {run}"),
    ):
        with pytest.raises(UserError, match=message):
            build.load_run(path, CPU)


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
    with pytest.raises(UserError, match=r"index\.json: expected keys with values, got \[\]; export the run again"):
        load_source(exported, CPU)
    index.write_text("{}")
    with pytest.raises(UserError, match=r"transformer does not fit .*config\.yaml: .*Missing key"):
        load_source(exported, CPU)


def test_names_of_classes(run: Path) -> None:
    source = load_source(run, CPU)
    named = Source(source.config, source.model, CPU, ("tench, Tinca", "Goldfish", "crane", "crane", "7"), "")
    assert (named.label_of("goldfish"), named.label_of("2"), named.label_of("7")) == (1, 2, 4)
    with pytest.raises(UserError, match="'crane' is the name of classes 2, 3; give a number"):
        named.label_of("crane")
    for text, near in (("GOLDFSH", "Goldfish"), ("tench", "tench, Tinca")):
        with pytest.raises(UserError, match=rf"from 0 to 4, got '{text}'; did you mean '{near}'\?"):
            named.label_of(text)


def test_classes_without_names_go_by_number(
    tmp_path: Path, run: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(shards), str(tmp_path / "gone")))
    assert load_source(tmp_path / "run", CPU).class_names == tuple("0123456789")
    assert "classes go by their numbers, since their names are read from the latents" in capsys.readouterr().out
