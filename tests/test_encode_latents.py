"""tools/encode_latents.py on real processes: any ranks and any kills, the same bytes; mistakes end all ranks."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from cfpretrain.base.console import EXIT_REQUEUE, EXIT_USER_ERROR
from cfpretrain.data.shards import read_info
from tests.folders import content
from tests.image_files import encoded, write_images
from tests.processes import REPOSITORY, Rank, run_tool, start_script, wait_for_files, wait_until
from tests.test_latent_shards import write_autoencoder
from tests.test_pixels import crops
from tests.test_watchdog import LAUNCHER

SCRIPT = "tools/encode_latents.py"
SIZE = 32
NUM_SHARDS, EACH = 24, 5


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many small shards of real photos; tests read them only."""
    files = list(map(encoded, crops(NUM_SHARDS * EACH, SIZE)))
    shards = [files[number * EACH : (number + 1) * EACH] for number in range(NUM_SHARDS)]
    return write_images(tmp_path_factory.mktemp("images") / "images", shards, SIZE)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_autoencoder(tmp_path_factory.mktemp("autoencoder") / "small", block_out_channels=[16, 32])


def command(images: Path, autoencoder: Path | str, out: Path, *options: str) -> list[str]:
    return [str(images), "--autoencoder", str(autoencoder), "--out", str(out), "--batch-size", "4", *options]


run = partial(run_tool, SCRIPT)


def write_undisturbed(folder: Path, images: Path, autoencoder: Path | str, shape: str) -> dict[str, bytes]:
    out = folder / "latents"
    ended = run(command(images, autoencoder, out))
    assert (ended.code, ended.err) == (0, "")
    assert f"encoding {NUM_SHARDS * EACH} images of 32 x 32 pixels (a test)" in ended.out
    assert f"{out}: {NUM_SHARDS * EACH} latents of 2 classes, {shape} (a test)" in ended.out
    assert list(folder.iterdir()) == [out]
    assert read_info(out).num_samples == NUM_SHARDS * EACH
    return content(out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, images: Path, autoencoder: Path) -> dict[str, bytes]:
    """What one rank writes that nobody disturbs."""
    return write_undisturbed(tmp_path_factory.mktemp("whole"), images, autoencoder, "4 x 16 x 16")


@pytest.fixture(scope="module")
def whole_pixels(tmp_path_factory: pytest.TempPathFactory, images: Path) -> dict[str, bytes]:
    """The same without an autoencoder, which is quick to start."""
    return write_undisturbed(tmp_path_factory.mktemp("pixels"), images, "identity", "3 x 32 x 32")


def test_two_ranks_write_the_same_bytes(tmp_path: Path, images: Path, autoencoder: Path, whole) -> None:
    out = tmp_path / "latents"
    ended = run(command(images, autoencoder, out), world_size=2)
    assert (ended.code, ended.err) == (0, "")
    assert content(out) == whole


def test_what_is_there_is_left_alone(tmp_path: Path, images: Path, whole_pixels) -> None:
    out = tmp_path / "latents"
    out.mkdir()
    for name, data in whole_pixels.items():
        (out / name).write_bytes(data)
    ended = run(command(images, "identity", out), world_size=2)
    assert (ended.code, ended.err) == (0, "")
    assert f"{out}: already there: latents of {NUM_SHARDS * EACH} images" in ended.out
    assert content(out) == whole_pixels


def kill_until_complete(arguments: Sequence[str], out: Path, num_kills: int, draw: random.Random) -> None:
    """`kill -9` of all ranks, or of one, with ever more shards written; then a run to the end."""
    records = out.parent / f".{out.name}.unfinished" / "records"
    for kill in range(num_kills):
        # The last ones may come while the folder gets its name.
        target = round(NUM_SHARDS * (kill + draw.random()) / num_kills)
        ranks = start_script(SCRIPT, arguments, 1 + kill % 2)
        wait_for_files(records, "[0-9]*", target, ranks)
        time.sleep(draw.uniform(0, 0.2))
        for rank in draw.sample(ranks, draw.randint(1, len(ranks))):
            rank.kill()
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(signal.SIGTERM)  # as a launcher that misses one
            rank.communicate(timeout=60)
            assert rank.returncode in (-signal.SIGKILL, -signal.SIGTERM, EXIT_REQUEUE, 0), rank.said()
    assert run(arguments, 1 + num_kills % 2).code == 0


def test_kills_leave_no_trace(tmp_path: Path, images: Path, whole_pixels) -> None:
    out = tmp_path / "latents"
    kill_until_complete(command(images, "identity", out), out, 2, random.Random(5))
    assert content(out) == whole_pixels
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(tmp_path: Path, images: Path, autoencoder: Path, whole) -> None:
    out = tmp_path / "latents"
    kill_until_complete(command(images, autoencoder, out), out, 20, random.Random(6))
    assert content(out) == whole
    assert list(tmp_path.iterdir()) == [out]


@pytest.fixture(scope="module")
def long_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One shard after others keeps a rank at work for seconds."""
    file = encoded(crops(1, 8)[0])
    return write_images(tmp_path_factory.mktemp("long") / "images", [[file], [file], [file], [file] * 4000], 8)


def wait_for_long_work(ranks: Sequence[Rank], out: Path) -> None:
    """Until all but the long shard is written."""
    records = out.parent / f".{out.name}.unfinished" / "records"
    wait_until(lambda: all((records / f"{number:05d}.json").exists() for number in range(3)), 120, ranks)


def test_a_rank_that_dies_ends_the_others(tmp_path: Path, long_images: Path) -> None:
    out = tmp_path / "latents"
    ranks = start_script(SCRIPT, [*command(long_images, "identity", out), "--batch-size", "1"], 2)
    wait_for_long_work(ranks, out)
    ranks[1].kill()
    _, err = ranks[0].communicate(timeout=60)
    assert ranks[0].returncode == EXIT_REQUEUE
    assert "rank 0: another rank is gone" in err
    assert "the same command goes on" in err
    assert not out.exists()


# Slow enough that the launcher's end is noticed, once in a few seconds, long before the work is done.
AS_SLOW_SCRIPT = """
import runpy, sys, time
from cfpretrain.autoencoder import IdentityAutoencoder

encode = IdentityAutoencoder.encode
IdentityAutoencoder.encode = lambda *arguments: (time.sleep(0.02), encode(*arguments))[1]
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_launcher_that_is_gone_ends_it_and_the_same_command_goes_on(tmp_path: Path, long_images: Path) -> None:
    def arguments(name: str) -> list[str]:
        return [*command(long_images, "identity", tmp_path / name), "--batch-size", "1"]

    assert run(arguments("whole")).code == 0
    out = tmp_path / "latents"
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, AS_SLOW_SCRIPT, SCRIPT, *arguments("latents")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"CROSS_RANK": "0", "OMP_NUM_THREADS": "1"},
    ) as launcher:
        assert launcher.stdout is not None
        records = tmp_path / ".latents.unfinished" / "records"
        wait_until(lambda: len(list(records.glob("[0-9]*"))) >= 3 or launcher.poll() is not None)
        assert launcher.poll() is None, launcher.stdout.read()
        launcher.kill()  # the rank lives on, and holds the pipe open until it ends
        said = launcher.stdout.read()
    assert said.endswith("[cfpretrain] stopped (the launcher is gone); the same command goes on\n")
    assert not out.exists()
    ended = run(arguments("latents"))
    assert (ended.code, ended.err) == (0, "")
    assert "; 3 of 4 shards are there already" in ended.out
    assert content(out) == content(tmp_path / "whole")


def test_a_signal_stops_it(tmp_path: Path, images: Path) -> None:
    arguments = command(images, "identity", tmp_path / "latents")
    for number in (signal.SIGTERM, signal.SIGINT):
        # Of two ranks one is missing, for which the other waits.
        rank, missing = start_script(SCRIPT, arguments, 2)
        missing.kill()
        wait_until(lambda rank=rank: "loading torch" in rank.said(), 60, [rank])
        rank.send_signal(number)
        out, err = rank.communicate(timeout=60)
        assert (rank.returncode, err) == (EXIT_REQUEUE, "")
        assert out.endswith(f"[cfpretrain] stopped ({number.name}); the same command goes on\n")


def test_a_folder_belongs_to_one_command_with_one_way_of_encoding(tmp_path: Path, long_images: Path) -> None:
    out = tmp_path / "latents"
    arguments = [*command(long_images, "identity", out), "--batch-size", "1"]
    (first,) = start_script(SCRIPT, arguments, 1)
    wait_for_long_work([first], out)
    first.send_signal(signal.SIGSTOP)
    second = run(arguments)
    assert second.code == EXIT_USER_ERROR
    assert f"{out} is being written by another process; wait" in second.err
    first.kill()
    first.communicate()
    other = run([*arguments, "--batch-size", "5"])
    assert other.code == EXIT_USER_ERROR
    assert f"{tmp_path / '.latents.unfinished'} is the unfinished work of other settings (batch_size: " in other.err


@pytest.mark.parametrize(
    ("given", "other", "options", "message"),
    [
        ("nowhere", "identity", [], "IMAGES: expected a folder of shards"),
        ("", "identity", [], "IMAGES: expected a folder of shards, but the empty name has no cfpretrain.json"),
        ("images", "identity", ["--out", "IMAGES"], "--out: expected another folder than IMAGES, got "),
        ("latents", "identity", [], "IMAGES: expected shards of images, got latents in "),
        ("images", "nowhere", [], "--autoencoder: expected an autoencoder's folder with config.json"),
        ("images", "grey", [], "--autoencoder: expected images of 1 channels with sides that are multiples of 2"),
        ("images", "identity", ["--precision", "bf16"], "--precision: expected fp32 without a GPU, got bf16; leave"),
        ("images", "identity", ["--batch-size", "0"], "--batch-size: expected 1 to 4096, got 0"),
        ("images", "identity", ["--out", "setup.py"], "setup.py is a file; give the name of a folder"),
    ],
)
def test_a_mistake_is_one_line(folders: dict[str, Path], tmp_path: Path, given, other, options, message) -> None:
    out = tmp_path / "out"
    paths = [folders.get(name, name) for name in (given, other)]
    options = [str(folders["images"]) if option == "IMAGES" else option for option in options]
    ended = run([*command(*paths, out), *options])
    assert ended.code == EXIT_USER_ERROR
    (line,) = ended.err.splitlines()
    assert line.startswith("[cfpretrain] error: ")
    assert message in line
    assert not out.exists()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, images: Path, whole: dict[str, bytes]) -> dict[str, Path]:
    """What mistakes are made with."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "latents").mkdir()
    for name, data in whole.items():
        (folder / "latents" / name).write_bytes(data)
    grey = write_autoencoder(folder / "grey", in_channels=1, out_channels=1)
    return {"images": images, "latents": folder / "latents", "grey": grey}


def test_an_image_that_cannot_be_decoded_ends_all_ranks(tmp_path: Path) -> None:
    good = encoded(crops(1, SIZE)[0])
    images = write_images(tmp_path / "images", [[good] * 2, [good, b"hello"], [good]], SIZE)
    ended = run(command(images, "identity", tmp_path / "latents"), world_size=2)
    assert ended.code == EXIT_USER_ERROR
    (line,) = [line for line in ended.err.splitlines() if line.startswith("[cfpretrain]")]  # DALI prints its own
    assert "shard.00001.mds: image of id 9: it is no image" in line
