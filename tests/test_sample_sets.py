"""Sets of images that are kept until what they are for is complete, made of a small run."""

from pathlib import Path

import pytest
import torch

from cfpretrain.base.config import Config
from cfpretrain.base.console import UserError
from cfpretrain.core.ar import equal_sizes
from cfpretrain.core.model import CausalFusion
from cfpretrain.core.sampler import Guidance
from cfpretrain.evaluation.generation import GenerationSettings, ImageGenerator, plan_of
from cfpretrain.run import build
from examples.digits.sample_sets import SampleSet, make_missing
from tests.runs import write_run

CPU = torch.device("cpu")
LABELS = [0, 1, 2, 3, 4]
Loaded = tuple[Config, CausalFusion]


@pytest.fixture(scope="module")
def loaded(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    found = build.find_checkpoint(write_run(tmp_path_factory.mktemp("runs") / "run", shards))
    config, model = found.config, found.load_model()
    return config, model


def make_set(loaded: Loaded, folder: Path, ar_steps: int = 2, guidance: float = 1.0) -> SampleSet:
    config, model = loaded
    settings = GenerationSettings(equal_sizes(config.model.num_tokens, ar_steps), 3, Guidance(guidance), 2, 0)
    plan = plan_of(config, "weights", "identity", settings)
    return SampleSet(f"AR steps {ar_steps}", lambda: model, LABELS, settings, folder, plan)


def test_what_is_missing_is_made_and_nothing_else(loaded: Loaded, tmp_path: Path, capsys) -> None:
    sets = [make_set(loaded, tmp_path), make_set(loaded, tmp_path, guidance=2.0), make_set(loaded, tmp_path, 1)]
    make_missing(loaded[0], sets, CPU)
    assert "sampling 15 images of 3 settings\n" in capsys.readouterr().out
    expected = [ImageGenerator(*loaded, one.settings, CPU).images(LABELS) for one in sets]
    for one, images in zip(sets, expected, strict=True):
        assert one.missing() == []
        torch.testing.assert_close(one.read(), images, rtol=0, atol=0)
    (sets[0].place / "batch_000001.npy").unlink()
    cut = sets[2].place / "batch_000002.npy"
    cut.write_bytes(cut.read_bytes()[:-4])
    (sets[1].place / "batch_000000.npy").write_bytes(b"")
    assert [one.missing() for one in sets] == [[1], [0], [2]]
    others = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("batch_*")}
    # In another order, and without one of them.
    make_missing(loaded[0], [sets[2], sets[0]], CPU)
    assert "sampling 3 images of 2 settings; 7 of 10 are there already\n" in capsys.readouterr().out
    assert [one.missing() for one in sets] == [[], [0], []]
    torch.testing.assert_close(sets[2].read(), expected[2], rtol=0, atol=0)
    changed = {file.name for file, time in others.items() if file.stat().st_mtime_ns != time}
    assert changed == {"batch_000002.npy"}


def test_sets_that_differ_lie_apart(loaded: Loaded, tmp_path: Path) -> None:
    one = make_set(loaded, tmp_path)
    others = [make_set(loaded, tmp_path, ar_steps=4), make_set(loaded, tmp_path, guidance=3.0)]
    assert len({one.place, *(other.place for other in others)}) == 3
    assert make_set(loaded, tmp_path).place == one.place


def test_a_place_that_cannot_be_written_is_one_line(loaded: Loaded, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*; fix that, and the same command goes on"):
        make_missing(loaded[0], [make_set(loaded, tmp_path / "file")], CPU)
