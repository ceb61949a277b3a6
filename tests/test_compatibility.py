"""Shards fit a config, each other and an autoencoder, or every reason why not is named."""

import dataclasses

import pytest

from cfpretrain.base.config import Config, DataConfig, ModelConfig, TrainConfig
from cfpretrain.base.console import UserError
from cfpretrain.data.compatibility import check_autoencoder, check_infos, samples_an_epoch
from tests.test_shards import INFO

CONFIG = Config(
    model=ModelConfig(latent_size=4, latent_channels=2, num_classes=3),
    data=DataConfig(shards=("data/one",), latent_shift=INFO.latent_shift, latent_scale=INFO.latent_scale),
    train=TrainConfig(global_batch_size=16, micro_batch_size=8),
)


def test_shards_that_fit_the_config_pass() -> None:
    check_infos([INFO], CONFIG)
    one_value = dataclasses.replace(INFO, latent_shift=(0.5, 0.5))
    check_infos([one_value], dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, latent_shift=(0.5,))))


MISFITS = [
    ("model", {"latent_size": 8}, "model.latent_size: expected 4", "got 8"),
    ("model", {"latent_channels": 3}, "model.latent_channels: expected 2", "got 3"),
    ("model", {"num_classes": 1000}, "model.num_classes: expected 3", "got 1000"),
    ("data", {"latent_shift": (0.5,)}, "data.latent_shift: expected [0.5, 0.25]", "got [0.5]"),
    ("data", {"latent_scale": (2.0, 0.2325)}, "data.latent_scale: expected [2.0, 4.0]", "got [2.0, 0.2325]"),
    ("data", {"num_canonical_nodes": 64}, "data.num_canonical_nodes: expected at most 50", "got 64"),
    ("train", {"global_batch_size": 64}, "train.global_batch_size: expected at most 50", "got 64"),
    ("data", {"repeat": (0.3,)}, "train.global_batch_size: expected at most 15", "got 16"),
]


@pytest.mark.parametrize(("section", "values", "expected", "got"), MISFITS)
def test_shards_that_do_not_fit_are_named_by_their_key(section: str, values: dict, expected: str, got: str) -> None:
    changed = dataclasses.replace(getattr(CONFIG, section), **values)
    with pytest.raises(UserError) as raised:
        check_infos([INFO], dataclasses.replace(CONFIG, **{section: changed}))
    message = str(raised.value)
    assert expected in message
    assert got in message
    assert "data/one" in message
    assert "|" not in message


def test_mirrors_and_autoencoders_must_be_those_of_the_shards() -> None:
    with pytest.raises(UserError, match=r"data.mirror_prob: expected 0.*got 0.5"):
        check_infos([dataclasses.replace(INFO, has_mirror=False)], CONFIG)
    pixels = dataclasses.replace(INFO, autoencoder="identity", has_posterior=False, has_mirror=False)
    check_infos([pixels], CONFIG)
    with_one = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, autoencoder="some/folder"))
    with pytest.raises(UserError, match=r"data.autoencoder: expected none.*got some/folder"):
        check_infos([pixels], with_one)


def test_latents_are_not_cropped_again() -> None:
    cropping = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, crop="random"))
    for made_by in ("adm", "dali", ""):
        with pytest.raises(UserError, match=r"data\.crop: expected adm, since the shards hold latents, .*got random"):
            check_infos([dataclasses.replace(INFO, crop=made_by)], cropping)
    check_infos([dataclasses.replace(INFO, crop="random")], cropping)  # what images become


def test_an_autoencoder_of_other_weights_or_another_scale_is_refused() -> None:
    check_autoencoder(INFO, "0123456789abcdef", [0.5, 0.25], [2.0, 4.0], "--autoencoder")
    for changed, word in (
        (("fedcba", [0.5, 0.25], [2.0, 4.0]), "of fingerprint 0123456789abcdef, got fedcba"),
        (("0123456789abcdef", [0.5, 0.0], [2.0, 4.0]), r"of shift \(0.5, 0.25\), got \(0.5, 0.0\)"),
        (("0123456789abcdef", [0.5, 0.25], [2.0, 1.0]), r"of scale \(2.0, 4.0\), got \(2.0, 1.0\)"),
    ):
        with pytest.raises(UserError, match=f"--autoencoder: expected the autoencoder that made the latents, {word}"):
            check_autoencoder(INFO, *changed, "--autoencoder")


def test_latents_that_look_like_pixels_need_their_autoencoder() -> None:
    info = dataclasses.replace(INFO, latent_shape=(3, 4, 4), latent_shift=(0.0,) * 3, latent_scale=(1.0,) * 3)
    model = dataclasses.replace(CONFIG.model, latent_channels=3)
    data = dataclasses.replace(CONFIG.data, latent_shift=(0.0,), latent_scale=(1.0,))
    with pytest.raises(UserError, match=r"data.autoencoder: expected the folder of the one that made these latents"):
        check_infos([info], dataclasses.replace(CONFIG, model=model, data=data))
    named = dataclasses.replace(data, autoencoder="some/folder")
    check_infos([info], dataclasses.replace(CONFIG, model=model, data=named))


def test_all_misfits_come_at_once() -> None:
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, latent_size=8, num_classes=9),
        data=dataclasses.replace(CONFIG.data, latent_scale=(1.0,)),
    )
    with pytest.raises(UserError, match=r"model\.latent_size.*\| data\.latent_scale.*\| model\.num_classes"):
        check_infos([INFO], config)
    with pytest.raises(UserError, match="rows as columns"):
        check_infos([dataclasses.replace(INFO, latent_shape=(2, 4, 8))], CONFIG)


def test_several_folders_must_be_alike() -> None:
    two = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, shards=("data/one", "data/two")))
    check_infos([INFO, dataclasses.replace(INFO, num_samples=7, source="else")], two)
    other = dataclasses.replace(INFO, class_names=("cat", "owl", "dog"), autoencoder="fedcba9876543210")
    with pytest.raises(UserError, match=r"data/two: expected autoencoder as in the first.*data/two: .*class_names"):
        check_infos([INFO, other], two)


def test_samples_of_an_epoch() -> None:
    assert samples_an_epoch([50, 10], (1.0,)) == [50, 10]
    assert samples_an_epoch([50, 10], (0.5, 2.25)) == [25, 22]
