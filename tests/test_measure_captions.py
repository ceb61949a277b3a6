"""tools/measure.py captions: the plain way writes the same captions; its figures are there and make sense."""

import json
from pathlib import Path

import pytest
import torch

from cfpretrain.base.console import EXIT_USER_ERROR
from cfpretrain.core import seeds
from cfpretrain.core.continuation import Writing, caption_images
from cfpretrain.core.texts import Marks
from tests.runs import write_run, write_text_run
from tests.test_modalities import MOST_WORDS, text_model
from tools import measure as command
from tools.measuring.captions import caption_plainly


@pytest.mark.parametrize("trunk", ["causalfusion", "llama"])
def test_the_plain_way_writes_the_same_captions(trunk: str) -> None:
    model = text_model(trunk).eval()
    with torch.no_grad():
        model.text_head.linear.weight[2] *= 3  # texts end at different places
    images_BLP = 20 * seeds.normal(seeds.fold(seeds.key(1, "images"), torch.arange(12)), (9, 4)).double()
    writing = Writing(Marks(begin=1, end=2, image=3, pad=0), MOST_WORDS)
    found = caption_images(model, images_BLP, torch.arange(12), writing)
    assert found == caption_plainly(model, images_BLP, writing)
    assert len(set(map(len, found))) > 1


def measure(*options: object) -> None:
    command.main(["captions", *map(str, options)])


def test_figures(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_text_run(tmp_path / "run", shards)
    for given in ([], ["--shards", shards]):
        measure(run, *given, "--num-images", 5, "--pairs", 1)
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found["equal"] == 5
        rates = [found[f"{name}_captions_per_second"] for name in ("cached", "plain")]
        assert found["ratio"] == pytest.approx(rates[0] / rates[1])
        assert 0 <= found["tokens"] <= 30


def test_mistakes(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, other = write_run(tmp_path / "plain", shards), write_text_run(tmp_path / "o", shards, "model.latent_size=12")
    for words, message in (
        ([plain], "SOURCE: expected a model with texts"),
        ([other, "--shards", shards], "--shards: expected latents of (1, 12, 12), as the model has, got (1, 8, 8)"),
        ([other, "--shards", tmp_path], "--shards: "),
    ):
        with pytest.raises(SystemExit) as ended:
            measure(*words)
        assert ended.value.code == EXIT_USER_ERROR
        assert message in capsys.readouterr().err
