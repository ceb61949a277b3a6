"""From a config to what it describes, and from a run folder to its model."""

from pathlib import Path

import pytest
import torch

from cfpretrain.base import config as configs
from cfpretrain.base.console import UserError
from cfpretrain.run import build
from tests.test_config import TINY


def test_sampling_decodes_what_training_normalised() -> None:
    """One shift and one scale: what goes into training comes out of sampling, whatever the config says."""
    config = configs.load(TINY, ["data.latent_shift=[0.1]", "data.latent_scale=[3.7]"])
    raw = torch.rand(2, 1, 8, 8)
    decoded = build.make_autoencoder(config, torch.device("cpu")).decode(build.make_scaling(config).to_model(raw))
    torch.testing.assert_close(decoded, raw)


@pytest.mark.parametrize("num_classes", [10, 37])
def test_the_null_class_is_one_beyond_the_last(num_classes) -> None:
    config = configs.load(TINY, [f"model.num_classes={num_classes}"])
    with torch.device("meta"):
        model = build.make_model(config)
    assert model.null_class == build.make_loss(config).null_class == num_classes
    assert model.class_embedder.embedding_table.num_embeddings == num_classes + 1


@pytest.mark.parametrize(("key", "value"), [("data.shards", []), ("noise.num_timesteps", 0)])
def test_a_config_that_was_spoilt_is_named(tmp_path: Path, key, value) -> None:
    plain = configs.to_plain(configs.load(TINY))
    section, name = key.split(".")
    plain[section][name] = value
    (tmp_path / build.CONFIG_FILE).write_text(configs.to_yaml(plain))
    with pytest.raises(UserError, match=key):
        build.find_checkpoint(tmp_path)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.yaml"):
        build.find_checkpoint(tmp_path)
    (tmp_path / build.CONFIG_FILE).write_text(configs.to_yaml(configs.load(TINY)))
    with pytest.raises(UserError, match="no complete checkpoint"):
        build.find_checkpoint(tmp_path)
