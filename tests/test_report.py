"""tools/report.py: what it refuses before it takes any time, and a small run scored whole."""

import argparse
import dataclasses
import json
import signal
import sys
from pathlib import Path

import pytest

from cfpretrain.base import config as configs
from cfpretrain.base.console import UserError
from cfpretrain.run import build
from examples.digits import report
from tests.digits import digits, digits_info, write_latents
from tests.image_files import write_digits, write_images
from tests.processes import Rank, run_script, start_script, wait_until
from tests.runs import write_run
from tests.test_config import TINY


def refused(
    monkeypatch: pytest.MonkeyPatch,
    run: Path,
    override: str,
    images: Path = Path(),
    held_out: Path = Path(),
    guidance: float = 2.0,
) -> str:
    config = configs.load(TINY, [override])
    found = argparse.Namespace(config=config, state=argparse.Namespace(step=100))
    monkeypatch.setattr(build, "find_checkpoint", lambda folder: found)
    arguments = argparse.Namespace(
        run=run,
        images=images,
        held_out=held_out,
        num_images=100,
        num_ar_steps=[1],
        num_denoising_steps=10,
        batch_size=10,
        guidance=guidance,
    )
    with pytest.raises(UserError) as raised:
        report.run(arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_latents_are_not_scored_in_false_colours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    message = refused(monkeypatch, tmp_path, "model.latent_channels=16")
    assert "expected a run that names its autoencoder (data.autoencoder)" in message


@pytest.mark.parametrize("guidance", [float("nan"), float("inf"), -1.0])
def test_no_scale_to_guide_by_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, guidance) -> None:
    message = refused(monkeypatch, tmp_path, "run.seed=0", guidance=guidance)
    assert message == f"--guidance: expected 0 to 1000 (1: none), got {guidance}"


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000], ids=["empty", "cut", "list", "deep"])
def test_a_damaged_report_is_none(tmp_path: Path, text) -> None:
    (tmp_path / "report.json").write_text(text)
    assert report._table_there(tmp_path, {}) is None


def write_one(folder: Path, size: int, class_names: tuple[str, ...]) -> Path:
    """Shards of one image, which nobody reads."""
    return write_images(folder, [[b""]], size, class_names=class_names, channels=1)


def test_images_of_another_size_or_other_classes_are_refused(
    shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before sampling, which takes minutes."""
    names = tuple(map(str, range(10)))
    fitting = write_one(tmp_path / "fitting", 8, names)
    large = write_one(tmp_path / "large", 16, names)
    other = write_one(tmp_path / "other", 8, (*names[:9], "ten"))
    source = f"data.shards={shards}"
    message = refused(monkeypatch, tmp_path, source, large, fitting)
    assert message == f"--images: expected image_size 8 as of {shards}, got 16"
    message = refused(monkeypatch, tmp_path, f"data.shards={fitting}", large, fitting)  # a run straight from images
    assert message == f"--images: expected image_size 8 as of {fitting}, got 16"
    message = refused(monkeypatch, tmp_path, source, fitting, other)
    assert message.startswith(f"--held-out: expected class_names {names} as of {shards}, got ('0', ")
    message = refused(monkeypatch, tmp_path, source, fitting, shards)
    assert message.startswith("--held-out: expected shards of images, got latents in")


def test_too_few_classes_or_images_are_refused_before_sampling(
    shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = tuple(map(str, range(10)))
    few = write_one(tmp_path / "few", 8, names)
    message = refused(monkeypatch, tmp_path, f"data.shards={shards}", few, few)
    assert message == "--images, --held-out: expected at least 18 images together for 10 classes, got 2; give more"
    one = dataclasses.replace(digits_info(4), class_names=("0",))
    alike = write_latents(tmp_path / "latents", one, [(i, 0, pixels) for i, _, pixels in digits(4)])
    few = write_one(tmp_path / "one", 8, ("0",))
    message = refused(monkeypatch, tmp_path, f"data.shards={alike}", few, few)
    assert message == "RUN: expected at least 2 classes, which the scores tell apart, got 1"


def test_help_tells_every_limit(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", "--help"])
    with pytest.raises(SystemExit):
        report.main()
    said = " ".join(capsys.readouterr().out.split())
    for text in ("100 to 1000000", "1 to the run's number of tokens", "2 to the run's noise.num_timesteps",
                 "0 to 1000 (default 2)", "at least 2 classes", "at least 8 images more than classes"):  # fmt: skip
        assert text in said


def test_the_order_of_settings_and_the_place_of_images_make_no_other_report() -> None:
    settings = {"num_ar_steps": [1, 4, 16], "num_scored": 100, "images": "data/images"}
    for there in ({"num_ar_steps": [16, 4, 1]}, {"images": "/elsewhere/images"}, {"precision": 0.5}):
        assert report._is_of(settings | there, settings)
    for there in ({"num_ar_steps": [1, 4]}, {"num_ar_steps": "1"}, {"num_scored": 200}):
        assert not report._is_of(settings | there, settings)
    assert not report._is_of({}, settings)


@pytest.mark.parametrize(
    "changed",
    [
        *({name: value} for name in ("loss_first", "train_seconds", "images_per_second") for value in ("x", None, [])),
        *({name: value} for name in ("class_accuracy", "precision", "fd_effnet_lite0") for value in (None, [1], 5)),
    ],
)
def test_an_earlier_report_that_lacks_something_is_made_again(changed: dict[str, object], tmp_path: Path) -> None:
    settings = {"num_ar_steps": [1], "guidance": 2.0, "num_embedded": 100}
    judged = {"value": 0.5, "real_against_real": 0.5, "cheat": 0.5, "untrained": 0.5}
    whole: dict[str, object] = {
        **settings,
        **dict.fromkeys(build.SUMMARY_NUMBERS, 1.0),
        **{name: {"1": 0.5} for name in ("class_accuracy", "class_accuracy_unguided")},
        **dict.fromkeys(("precision", "recall", "frechet_pixel", "fd_effnet_lite0"), judged),
        **dict.fromkeys(("classifier_accuracy_on_real", "autoencoder_reconstruction_mse"), 0.5),
    }
    (tmp_path / "report.json").write_text(json.dumps(whole))
    table = report._table_there(tmp_path, settings)
    assert table is not None
    assert "loss 1.000 -> 1.000" in table
    (tmp_path / "report.json").write_text(json.dumps(whole | changed))
    assert report._table_there(tmp_path, settings) is None


def options(folder: Path) -> list[str]:
    """Of a report on the digits that are written there."""
    images, held_out = write_digits(folder / "images", 0, 500), write_digits(folder / "held_out", 500, 200)
    given = ["--images", str(images), "--held-out", str(held_out), "--num-images", "100", "--num-ar-steps", "1", "2"]
    return [*given, "--num-denoising-steps", "3", "--batch-size", "20"]


def num_kept(run: Path) -> int:
    """Batches that are kept: 25 in all."""
    return len(list(run.glob(".report.partial/*/batch_*.npy")))


def wait_for_a_batch(run: Path, ranks: list[Rank]) -> None:
    before = num_kept(run)
    wait_until(lambda: num_kept(run) > before or ranks[0].poll() is not None)


def test_a_report_that_is_cut_off_keeps_its_samples(shards: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", shards)
    arguments, kept = [str(run), *options(tmp_path)], 0
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
        [rank] = start_script("tools/report.py", arguments, 1)
        wait_for_a_batch(run, [rank])
        rank.send_signal(number)
        said, err = rank.communicate(60)
        assert err == ""
        if number == signal.SIGKILL:
            assert rank.returncode == -signal.SIGKILL
        else:
            assert rank.returncode == 75
            assert said.endswith(f"stopped ({number.name}); the same command goes on\n")
        if kept:
            assert f"; {20 * kept} of 500 are there already" in said
        assert num_kept(run) > kept
        kept = num_kept(run)
    assert not (run / "report.json").exists()


@pytest.mark.slow
def test_a_run_is_scored_beside_floor_cheat_and_an_untrained_model(shards: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", shards)
    given = options(tmp_path)
    first, second = run_script("tools/report.py", [str(run), *given], 2)
    assert (first.code, second.code) == (0, 0), first.err
    assert not list(run.glob(".report*"))
    report = json.loads((run / "report.json").read_text())
    embedded = report["fd_effnet_lite0"]
    # Neither of these models has learned anything.
    assert 0 < embedded["real_against_real"] < min(embedded["value"], embedded["untrained"]) / 2
    assert report["num_embedded"] == 100
    assert f"{embedded['untrained']:.3f}" in first.out
    [again] = run_script("tools/report.py", [str(run), *given, "--num-ar-steps", "2", "1", "1"])
    assert "nothing to do" in again.out
    assert f"{embedded['untrained']:.3f}" in again.out

    # One that was cut off, on another number of ranks, is the same, and so is that of a run straight from images.
    other = write_run(tmp_path / "other", tmp_path / "images")
    ranks = start_script("tools/report.py", [str(other), *given], 1)
    wait_for_a_batch(other, ranks)
    ranks[0].kill()
    ranks[0].communicate(60)
    [last] = run_script("tools/report.py", [str(other), *given, "--num-ar-steps", "2", "1"])
    assert "are there already" in last.out
    assert (other / "loss_map.png").is_file()
    found = json.loads((other / "report.json").read_text())
    # Two ranks add up features in another order.
    assert found.pop("fd_effnet_lite0") == pytest.approx(report.pop("fd_effnet_lite0"), rel=1e-9)
    assert found == report
