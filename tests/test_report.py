"""tools/report.py: what it refuses before it takes any time. (`make demo` runs it whole.)"""

import argparse
from pathlib import Path

import pytest

from cfpretrain import build
from cfpretrain import config as configs
from cfpretrain.console import UserError
from tests.test_config import TINY
from tools import report


def test_latents_are_not_scored_in_false_colours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = configs.load(TINY, ["model.latent_channels=16"])
    monkeypatch.setattr(build, "load_run", lambda folder, device: (config, None, 100))
    arguments = argparse.Namespace(
        run=tmp_path,
        images=tmp_path,
        held_out=tmp_path,
        num_images=100,
        num_ar_steps=[1],
        num_denoising_steps=10,
        num_accuracy_steps=10,
        batch_size=10,
        guidance=2.0,
    )
    with pytest.raises(UserError, match=r"expected a run that names its autoencoder \(data\.autoencoder\)"):
        report.run(arguments)
