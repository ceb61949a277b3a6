"""tools/measuring.py: shards of noise fit any recipe."""

import json
from contextlib import closing
from pathlib import Path

import pytest

from cfpretrain.base import config as configs
from cfpretrain.data.loader import Loader
from cfpretrain.data.shards import read_latents_info
from tests.processes import REPOSITORY
from tools import measuring


@pytest.mark.parametrize(
    ("preset", "overrides", "has_posterior", "has_mirror"),
    [
        ("tiny", (), False, False),
        ("tiny", ("data.mirror_prob=0.5",), False, False),  # pixels are flipped
        ("demo", (), True, False),
        ("XL", (), True, True),
    ],
)
def test_shards_of_noise_fit_the_recipe(
    tmp_path: Path, preset: str, overrides: tuple[str, ...], has_posterior: bool, has_mirror: bool
) -> None:
    small = ("train.global_batch_size=8", "train.micro_batch_size=4", "data.num_workers=0", *overrides)
    config = configs.load(REPOSITORY / "configs" / f"{preset}.yaml", small)
    config = measuring.on_noise(config, tmp_path)
    configs.check(config, 1)
    info = read_latents_info(tmp_path / "latents")
    assert (info.has_posterior, info.has_mirror) == (has_posterior, has_mirror)
    model = config.model
    with closing(Loader(config, lambda samples, step: samples, 0, 1)) as loader:
        batches = [next(loader) for _ in range(loader.steps_per_epoch + 1)]
    shape = (4, model.latent_channels, model.latent_size, model.latent_size)
    assert all(one.latents_BCYX.shape == shape and one.latents_BCYX.isfinite().all() for b in batches for one in b)
    assert (config.metrics.wandb, config.run.folder) == ("disabled", str(tmp_path / "run"))


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["tools/measuring.py"])
    measuring.main()
    found = json.loads(capsys.readouterr().out)
    assert found["matmul_tflops"] > 0
    assert found["versions"]["torch"]
    assert found["hardware"]["cores"] >= 1
