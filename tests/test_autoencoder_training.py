"""What the training of an autoencoder goes on from, and which images it sees when."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cfpretrain.autoencoder import fingerprint, make_network
from cfpretrain.base.console import SickRunError, UserError
from examples.digits.autoencoder_training import StoppedError, Training, evenly
from tests.test_autoencoder import SMALL

NUM = 10
NEVER = SimpleNamespace(reason=None)
IMAGES_BCYX = torch.randint(256, (NUM, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
SETTINGS: dict[str, Any] = {
    "--num-steps": 6,
    "--batch-size": 4,
    "--learning-rate": 1e-3,
    "--kl-weight": 0.01,
    "--seed": 3,
}


def make_training(folder: Path, **settings: Any) -> Training:
    torch.manual_seed(0)
    network = make_network(SMALL, "test")
    named = {f"--{name.replace('_', '-')}": value for name, value in settings.items()}
    return Training(network, IMAGES_BCYX, IMAGES_BCYX[:3], SETTINGS | named, folder)


@pytest.mark.parametrize("size", [3, 4, 10, 23])
def test_every_epoch_shows_every_image_once(tmp_path: Path, size) -> None:
    training = make_training(tmp_path, batch_size=size)
    seen = []
    for training.step in range(2 * NUM):
        seen += training._batch().tolist()
    epochs = [tuple(seen[begin : begin + NUM]) for begin in range(0, len(seen), NUM)]
    assert all(sorted(epoch) == list(range(NUM)) for epoch in epochs)
    assert len(set(epochs)) == len(epochs)


def weights(training: Training) -> str:
    return fingerprint(training.network.state_dict())


def test_weights_follow_from_the_seed_and_not_from_stops(tmp_path: Path) -> None:
    found = []
    for seed in (3, 3, 4):
        training = make_training(tmp_path / "nothing", seed=seed)
        training.folder = tmp_path
        training.run(NEVER, 60, math.inf)
        found.append(weights(training))
    assert found[0] == found[1] != found[2]
    (tmp_path / "state.safetensors").unlink()
    for _ in range(SETTINGS["--num-steps"]):
        training = make_training(tmp_path)
        before = training.step
        training.run(NEVER, 60, training.seconds + 1e-9)  # one step
        assert training.step == before + 1
    assert weights(make_training(tmp_path)) == found[0]


def test_a_request_leaves_a_state_before_the_next_step(tmp_path: Path) -> None:
    training = make_training(tmp_path)
    with pytest.raises(StoppedError):
        training.run(SimpleNamespace(reason="a test"), 60, math.inf)
    assert training.step == 0
    before, again = weights(training), make_training(tmp_path)
    with torch.no_grad():
        next(again.network.parameters()).add_(1)
    assert weights(make_training(tmp_path)) == before != weights(again)


def test_only_the_same_settings_go_on(tmp_path: Path) -> None:
    training = make_training(tmp_path, num_steps=None)
    training.settle(7, math.inf)
    assert training.num_steps == 7
    training.save()
    assert make_training(tmp_path, num_steps=None).num_steps == 7
    with pytest.raises(UserError, match=r"other settings \(--num-steps: 7 there, 6 now\); give those, or delete it"):
        make_training(tmp_path)


@pytest.mark.parametrize("place", [2, 100, -1])
def test_a_damaged_state_is_one_line(tmp_path: Path, place) -> None:
    make_training(tmp_path).save()
    file = tmp_path / "state.safetensors"
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"state.safetensors is damaged \(.*\); delete .* to begin again") as raised:
        make_training(tmp_path)
    assert "\n" not in str(raised.value)


def test_timing_a_step_changes_nothing(tmp_path: Path) -> None:
    training = make_training(tmp_path)
    before = weights(training)
    training.settle(1, math.inf)
    assert weights(training) == before
    assert all(value.grad is None for value in training.network.parameters())


def test_what_diverges_ends_in_one_line(tmp_path: Path) -> None:
    training = make_training(tmp_path)
    with torch.no_grad():
        next(training.network.parameters()).fill_(math.inf)
    with pytest.raises(
        SickRunError, match=r"the loss of step 1 is not finite; delete .* give a smaller --learning-rate"
    ):
        training.run(NEVER, 60, math.inf)


def test_the_learning_rate_rises_and_falls_to_nothing(tmp_path: Path) -> None:
    training = make_training(tmp_path, num_steps=60, learning_rate=0.5)
    rates = []
    for training.step in range(61):
        rates.append(training._learning_rate())
    assert rates[0] == pytest.approx(0.25)  # a thirtieth of the steps
    assert rates[1] == pytest.approx(0.5, rel=1e-2)
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-12)


def test_evenly() -> None:
    assert evenly(torch.arange(10), 4).tolist() == [0, 3, 6, 9]
    assert evenly(torch.arange(3), 4).tolist() == [0, 1, 2]
