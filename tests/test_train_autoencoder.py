"""tools/train_autoencoder.py, on small real digits; and the autoencoder that the demo uses."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from cfpretrain.autoencoder import WEIGHTS_FILE, KLAutoencoder
from examples.digits import example_images, train_autoencoder
from examples.digits.autoencoder_training import PICTURE_FILE
from examples.digits.reconstruction import reconstruction_error
from tests.image_files import write_digits
from tests.processes import REPOSITORY, Rank, wait_until

LONG = ["--channels", "8", "8", "--num-steps", "40", "--batch-size", "16", "--save-seconds", "0"]
STEPS = ["--channels", "8", "16", "--num-steps", "60", "--batch-size", "32", "--learning-rate", "0.004"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Training and held-out images, as arguments; tests read them only."""
    folder = tmp_path_factory.mktemp("images")
    return [str(write_digits(folder / "train", 0, 400)), "--held-out", str(write_digits(folder / "held-out", 400, 100))]


def start(images: list[str], out: Path, *options: str) -> Rank:
    arguments = [images[0], str(out), *images[1:], *options]
    return Rank("tools/train_autoencoder.py", arguments, {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})


def train(images: list[str], out: Path, *options: str) -> str:
    """Trains in a process of its own, which takes its signals over; returns what it says."""
    process = start(images, out, *options)
    said, err = process.communicate(120)
    assert process.returncode == 0, err
    return said


def refused(images: list[str], out: Path, *options: str) -> str:
    process = start(images, out, *options)
    _, err = process.communicate(120)
    assert process.returncode == 2
    assert err.startswith("[cfpretrain] error: ")
    assert err.count("\n") == 1
    return err


def held_out_error(said: str) -> float:
    return float(re.search(r"held-out images on \[-1, 1\]: ([0-9.]+)", said)[1])


def test_it_learns_says_its_error_and_writes_what_it_measured(images, tmp_path) -> None:
    said = train(images, tmp_path / "out", *STEPS)
    error = held_out_error(said)
    pixels = torch.from_numpy(load_digits().images[400:500, None]).float() / 16 * 2 - 1
    assert error < 0.5 * float(pixels.var())
    autoencoder = KLAutoencoder.load(tmp_path / "out", "cpu")
    assert f"fingerprint {autoencoder.fingerprint}" in said
    assert {value.dtype for value in load_file(tmp_path / "out" / WEIGHTS_FILE).values()} == {torch.float16}
    # Scaled latents have mean 0 and deviation 1, posterior samples of the training set that is.
    digits = torch.from_numpy(load_digits().images[:400, None] * 255 / 16).to(torch.uint8).float() / 255
    mean, log_variance = autoencoder.encode(digits)
    sampled = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    shift, scale = (torch.tensor(values).reshape(-1, 1, 1) for values in (autoencoder.shift, autoencoder.scale))
    seen = (sampled - shift) * scale
    assert seen.mean(dim=(0, 2, 3)).abs().max() < 0.05
    assert (seen.std(dim=(0, 2, 3)) - 1).abs().max() < 0.05
    # The error that was printed, from what was written.
    repeated = 2 * (autoencoder.decode((autoencoder.encode(pixels / 2 + 0.5)[0] - shift) * scale) - pixels / 2 - 0.5)
    assert abs(float(repeated.square().mean()) - error) < 0.02 * error
    # The config's lines are those of the folder.
    assert f"data.latent_shift=[{','.join(f'{value:.9g}' for value in autoencoder.shift)}]" in said


def saved(out: Path) -> int:
    """A number that changes with each saved state."""
    state = out.with_name(f".{out.name}.partial") / "state.safetensors"
    return state.stat().st_mtime_ns if state.exists() else 0


def wait_for_a_state(out: Path, process: Rank) -> None:
    before = saved(out)
    wait_until(lambda: saved(out) != before or process.poll() is not None)


def test_killed_and_stopped_training_gives_the_weights_of_an_unstopped_one(images, tmp_path) -> None:
    out, num_done = tmp_path / "out", 0
    train(images, tmp_path / "whole", *LONG)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
        part = start(images, out, *LONG)
        wait_for_a_state(out, part)
        part.send_signal(number)
        said, err = part.communicate(60)
        assert part.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 75), said
        assert err == ""
        assert not out.exists()
        assert first_step(said) >= num_done
        num_done = first_step(said) + 1  # a state is saved after the first step here
        if number != signal.SIGKILL:
            [stopped_at] = re.findall(r"stopped at step ([0-9]+) of 40; the same command goes on\n$", said)
            assert int(stopped_at) >= num_done
            num_done = int(stopped_at)
    # A kill while OUT is written leaves a part of it.
    part_of_out = tmp_path / ".out.partial" / "made"
    part_of_out.mkdir()
    (part_of_out / WEIGHTS_FILE).write_bytes(b"")
    assert first_step(train(images, out, *LONG)) == num_done
    for file in (WEIGHTS_FILE, "config.json", PICTURE_FILE):
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def first_step(said: str) -> int:
    """The number of steps that were done as a start began."""
    found = re.search(r"going on at step ([0-9]+) of", said)
    return int(found[1]) if found else 0


@pytest.fixture
def terminal() -> Iterator[tuple[BinaryIO, str]]:
    """A terminal: the end at which a person sits, and the name of the other."""
    ends = os.openpty()
    with open(ends[0], "r+b", buffering=0) as person, open(ends[1], "r+b", buffering=0):
        yield person, os.ttyname(ends[1])


# Begins a session in the terminal, and may be hung up on: these tests may run under nohup.
IN_A_TERMINAL = """
import fcntl, os, runpy, signal, sys, termios
name, *sys.argv = sys.argv[1:]
os.setsid()
terminal = os.open(name, os.O_RDWR)
fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
for stream in range(3):
    os.dup2(terminal, stream)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command_in(terminal: str, images: list[str], out: Path) -> list[str]:
    return [terminal, "tools/train_autoencoder.py", images[0], str(out), *images[1:], *LONG]


def test_ctrl_c_in_a_terminal_while_it_loads(images, terminal, tmp_path) -> None:
    (person, name), out = terminal, tmp_path / "out"
    # Not forked: it has yet to load torch.
    command = [sys.executable, "-c", IN_A_TERMINAL, *command_in(name, images, out)]
    with subprocess.Popen(command, cwd=REPOSITORY) as process:
        assert "loading torch" in person.read(4096).decode()
        person.write(b"\x03")
        assert process.wait(60) == 75
    said = person.read(1 << 16).decode()
    assert "stopped before training began; the same command starts it" in said
    assert "Traceback" not in said
    assert not saved(out)


@pytest.mark.parametrize("how", ["Ctrl-C", "closed"])
def test_a_terminal_s_ctrl_c_or_end_leaves_a_state(images, terminal, tmp_path, how) -> None:
    (person, name), out = terminal, tmp_path / "out"
    process = Rank(IN_A_TERMINAL, command_in(name, images, out), {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})
    wait_for_a_state(out, process)
    before = saved(out)
    if how == "Ctrl-C":
        person.write(b"\x03")
    else:
        person.close()
    process.communicate(60)
    assert process.returncode == 75
    if how == "Ctrl-C":
        said = person.read(1 << 16).decode()
        assert "stopped at step " in said
        assert "Traceback" not in said
    assert saved(out) > before
    said = train(images, out, *LONG)
    assert first_step(said) > 0
    assert out.is_dir()


def test_another_setting_does_not_go_on_with_an_unfinished_training(images, tmp_path) -> None:
    out = tmp_path / "out"
    part = start(images, out, *LONG)
    wait_for_a_state(out, part)
    part.kill()
    part.communicate(60)
    message = refused(images, out, *LONG, "--batch-size", "8", "--seed", "1")
    assert "other settings (--batch-size: 16 there, 8 now, --seed: 0 there, 1 now)" in message


def test_a_time_limit_ends_it_with_what_it_has(images, tmp_path) -> None:
    said = train(images, tmp_path / "out", "--channels", "8", "8", "--max-minutes", "1e-6", "--num-steps", "50")
    assert "give fewer --num-steps" in said
    assert "the time is over (--max-minutes): 49 of 50 steps are missing" in said
    assert KLAutoencoder.load(tmp_path / "out", "cpu").latent_channels == 4


def test_as_many_steps_as_fit_and_images_held_out_where_none_are_given(images, tmp_path) -> None:
    said = train([images[0]], tmp_path / "out", "--channels", "8", "8", "--max-minutes", "1e-6")
    assert "a step takes" in said
    assert ", 1 steps about" in said
    assert "the time is over" not in said
    assert f"20 of 400 images are held out: every 20th of {images[0]} from the first on" in said
    assert "380 images of 1 x 8 x 8" in said


def test_it_goes_on_from_an_autoencoder(images, tmp_path) -> None:
    before = held_out_error(train(images, tmp_path / "a", *STEPS))
    after = held_out_error(train(images, tmp_path / "b", "--init", str(tmp_path / "a"), "--num-steps", "20"))
    a, b = (KLAutoencoder.load(tmp_path / name, "cpu") for name in "ab")
    assert a.fingerprint != b.fingerprint
    assert a.latent_shape((1, 8, 8)) == b.latent_shape((1, 8, 8))
    assert after < 1.1 * before  # 20 steps from random weights would be far above


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--init", "no-such-folder"], "--init: "),
        (["--channels", "8", "12"], "--channels: expected multiples of 8"),
        (["--channels", "8", "8", "8", "8", "8"], "--channels: expected levels that halve images of 8 pixels"),
        (["--num-steps", "0"], "--num-steps: expected at least 1, got 0"),
        (["--max-minutes", "0"], "--max-minutes: expected more than 0, got 0.0"),
        (["--save-seconds", "-1"], "--save-seconds: expected at least 0, got -1.0"),
        (["--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
        (["--kl-weight", "nan"], "--kl-weight: expected at least 0, got nan"),
        (["--learning-rate", "0"], "--learning-rate: expected a number between 0 and 1"),
    ],
)
def test_mistakes_are_one_line(images, tmp_path, options, message) -> None:
    assert message in refused(images, tmp_path / "out", *options)
    assert not list(tmp_path.iterdir())


def test_held_out_images_of_another_size_are_refused(images, tmp_path) -> None:
    other = write_digits(tmp_path / "other", 0, 3, size=16)
    message = refused([images[0], "--held-out", str(other)], tmp_path / "out")
    assert "--held-out: expected images of shape [1, 8, 8]" in message


def test_the_demo_s_autoencoder_is_small_and_makes_digits_again() -> None:
    """Of digits that it has not seen; the figures are those of its README."""
    folder = REPOSITORY / "configs" / "autoencoders" / "digits"
    assert (folder / WEIGHTS_FILE).stat().st_size < 1_000_000
    autoencoder = KLAutoencoder.load(folder, "cpu")
    assert autoencoder.latent_shape((1, 32, 32)) == (4, 4, 4)
    assert autoencoder.fingerprint in (folder / "README.md").read_text()
    pixels_BYX, labels_B = example_images.read_mnist()
    held_out = example_images.split(labels_B.tolist(), 500 / 5000)
    error = reconstruction_error(autoencoder, torch.from_numpy(pixels_BYX[held_out][:, None]), torch.device("cpu"))
    assert error == pytest.approx(0.0085, abs=2e-4)


def test_help_is_quick_and_clear(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["train_autoencoder.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        train_autoencoder.main()
    assert ended.value.code == 0
    assert "image shards" in capsys.readouterr().out
