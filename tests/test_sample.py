"""tools/sample.py on real processes: any ranks and any kills, the same bytes; mistakes end all ranks with one line."""

import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from cfpretrain.base.console import EXIT_REQUEUE, EXIT_USER_ERROR
from tests.folders import content
from tests.image_files import pixels
from tests.processes import run_alone, run_script, run_tool, start_script, wait_for_files
from tests.runs import write_run

SCRIPT = "tools/sample.py"
QUICK = ["--solver", "ddim", "--num-denoising-steps", "2", "--batch-size", "4"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A run folder with random weights; tests read it only."""
    return write_run(tmp_path_factory.mktemp("runs") / "run", shards)


run = partial(run_tool, SCRIPT)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, source: Path) -> dict[str, dict[str, bytes]]:
    """What one rank writes that nobody disturbs, by name."""
    folder = tmp_path_factory.mktemp("whole")
    for name in ("out", "out.npz"):
        ended = run([source, "--out", folder / name, "--num-images", 18, *QUICK])
        assert (ended.code, ended.err) == (0, "")
        assert f"18 images: {folder / name}" in ended.out
    return {name: content(folder / name) for name in ("out", "out.npz")}


def test_folder_and_archive_hold_the_same_images_of_all_classes(whole, tmp_path: Path) -> None:
    (tmp_path / "out.npz").write_bytes(whole["out.npz"]["out.npz"])
    with np.load(tmp_path / "out.npz") as archive:
        images, labels = archive["arr_0"], archive["arr_1"]
    assert images.shape == (18, 8, 8, 3)
    assert labels.tolist() == [i % 10 for i in range(18)]
    for i, image in enumerate(images):
        (tmp_path / "one.png").write_bytes(whole["out"][f"{i:06d}.png"])
        assert (pixels(tmp_path / "one.png") == image).all()
    assert whole["out"]["labels.csv"].decode().splitlines()[:3] == [
        "path,label,index",
        "000000.png,0,0",
        "000001.png,1,1",
    ]


@pytest.mark.parametrize("name", ["out", "out.npz"])
def test_two_ranks_write_the_same_bytes_and_the_same_command_says_that_they_are_there(
    tmp_path: Path, source: Path, whole, name
) -> None:
    command = [source, "--out", tmp_path / name, "--num-images", 18, *QUICK]
    ended = run(command, world_size=2)
    assert (ended.code, ended.err) == (0, "")
    assert content(tmp_path / name) == whole[name]
    ended = run(command, world_size=2)
    assert (ended.code, ended.err) == (0, "")
    assert f"nothing to do: {tmp_path / name} holds these 18 images already" in ended.out
    assert content(tmp_path / name) == whole[name]


@pytest.mark.parametrize("name", ["out", "out.npz"])
def test_kills_leave_no_trace(tmp_path: Path, source: Path, whole, name) -> None:
    command = list(map(str, [source, "--out", tmp_path / name, "--num-images", 18, *QUICK]))
    unfinished = tmp_path / f".{name}.unfinished"
    for num_batches, world_size in ((1, 2), (3, 1)):
        ranks = start_script(SCRIPT, command, world_size)
        wait_for_files(unfinished, "[0b]*", num_batches * (4 if name == "out" else 1), ranks)
        ranks[0].kill()
        for rank in ranks:
            rank.communicate(timeout=60)
            assert rank.returncode in (-signal.SIGKILL, EXIT_REQUEUE, 0), rank.said()
    assert run(command).code == 0
    assert content(tmp_path / name) == whole[name]
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_a_folder_of_which_images_are_gone_is_made_whole(tmp_path: Path, source: Path, whole) -> None:
    (tmp_path / "out").mkdir()
    for name, data in whole["out"].items():
        (tmp_path / "out" / name).write_bytes(data)
    command = [source, "--out", tmp_path / "out", "--num-images", 18, *QUICK]
    for damaged, said in (
        ("000005.png", "sampling 4 images; 14 of 18 are there already"),
        ("labels.csv", "sampling 0"),
    ):
        (tmp_path / "out" / damaged).unlink()
        ended = run(command, world_size=2)
        assert (ended.code, ended.err) == (0, "")
        assert said in ended.out
        assert content(tmp_path / "out") == whole["out"]


def test_a_grid_by_names_and_numbers(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "grid.PNG"
    ended = run([source, "--out", out, "--classes", "3", "7", "--num-per-class", 2, "--num-ar-steps", 4, *QUICK], 2)
    assert (ended.code, ended.err) == (0, "")
    assert f"{source}, step 7, EMA weights: AR steps 4, denoising steps 2 (ddim)" in ended.out
    assert ended.out.endswith(f"4 images: {out}\n")
    assert pixels(out).shape[1] > 2 * 56
    assert list(tmp_path.iterdir()) == [out]


def test_raw_weights_precision_and_order_are_taken(tmp_path: Path, source: Path) -> None:
    """Images of random weights are black and white, so that bf16 and an order may not show; the plan tells."""
    command = [source, "--num-images", 4, "--ar-sizes", "6,10", *QUICK]
    ended = run([*command, "--out", tmp_path / "ema"])
    assert (ended.code, ended.err) == (0, "")
    for options in (["--weights", "raw"], ["--precision", "bf16"], ["--order", "raster"]):
        ended = run([*command, "--out", tmp_path / "ema", *options])
        assert ended.code == EXIT_USER_ERROR
        what = "token_order: " if "--order" in options else "other weights"
        assert "holds images of other settings already (" in ended.err
        assert what in ended.err
        ended = run([*command, "--out", tmp_path / options[1], *options])
        assert (ended.code, ended.err) == (0, "")
    assert any(
        (pixels(tmp_path / "raw" / f"{i:06d}.png") != pixels(tmp_path / "ema" / f"{i:06d}.png")).any() for i in range(4)
    )


def test_the_way_of_an_image_is_drawn(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "way.png"
    ended = run([source, "--trajectory", out, "--classes", "7", "--num-ar-steps", 4, *QUICK])
    assert (ended.code, ended.err) == (0, "")
    height, width, _ = pixels(out).shape
    assert (height > 4 * 72, width > 3 * 72) == (True, True)


MISTAKES = [
    (["--classes", "sevn"], "--classes: expected a name, or a number from 0 to 9, got 'sevn'; names are 0, 1, 2"),
    (["--classes", "10"], "--classes: expected a name, or a number from 0 to 9, got '10'; did you mean '1' or '0'?"),
    (["--num-ar-steps", "17"], "--num-ar-steps: expected 1 to 16, got 17"),
    (["--num-ar-steps", "0"], "--num-ar-steps: expected 1 to 16, got 0"),
    (["--ar-sizes", "some"], "--ar-sizes: expected equal or cosine, or sizes such as 1,3,12, got 'some'"),
    (["--ar-sizes", "8,9"], "--ar-sizes: sizes of AR steps: expected 2 numbers of at least 1 that add up to 16"),
    (["--num-denoising-steps", "1"], "--num-denoising-steps: expected 2 to 1000, got 1"),
    (["--guidance", "nan"], "--guidance: expected 0 to 1000 (1: none), got nan"),
    (["--guidance", "1e308"], "--guidance: expected 0 to 1000 (1: none), got 1e+308"),
    (["--block-size", "-5"], "--block-size: expected 1 to 4, got -5"),
    (["--ar-sizes", "17,-1"], "--ar-sizes: expected 1 to 16, got 17"),
    (["--ar-sizes", "9,-1"], "--ar-sizes: expected 1 to 16, got -1"),
    (["--guidance-interval", "700", "100"], "--guidance-interval: expected 700 to 999, got 100"),
    (["--batch-size", "0"], "--batch-size: expected 1 to 4096, got 0"),
    (["--num-images", "0"], "--num-images: expected at least 1, got 0"),
    (["--num-images", "7"], "--num-images: expected a multiple of the 10 classes for a grid, got 7; give --num-per"),
    (["--num-images", "10", "--num-per-class", "1"], "--num-images: expected alone, got --num-per-class too"),
    (["--out", "digits.jpg"], "--out: expected NAME.png, NAME.npz or the name of a folder, got digits.jpg"),
    (["--out", "nowhere/at/all.png"], "--out: expected a place in a folder that is there, got nowhere/at/all.png"),
    (["--out", "docs/images/demo_samples.png"], "--out: expected a place where nothing is yet, got docs/images/demo_s"),
    (["--trajectory", "README.md"], "--trajectory: expected a name that ends in .png, got README.md"),
    (["--order", "dilated", "--block-size", "3"], "--block-size: block_size: expected a divisor of the token grid's 4"),
    (["--trajectory", "way.png", "--out", "out.png"], "--trajectory: expected alone, got --out too"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=[" ".join(options) for options, _ in MISTAKES])
def test_mistakes(source: Path, options, message) -> None:
    ended = run([source, *options])
    assert ended.code == EXIT_USER_ERROR
    assert f"[cfpretrain] error: {message}" in ended.err
    assert ended.err.count("\n") == 1


def test_names_that_are_numbers_of_others(tmp_path: Path, shards: Path) -> None:
    """Classes 0 to 11 in the order of text: the same words give the same bytes from any directory, or are refused."""
    names = sorted(map(str, range(12)))
    source = write_run(tmp_path / "run", shards, "model.num_classes=12", class_names=names)
    edit = ["tools/edit.py", source, "--generate", "10", "--class", "0", "--region", "top"]
    for script, *arguments in ([SCRIPT, source, "--classes", "10"], edit):
        ended = run_tool(script, arguments)
        assert ended.code == EXIT_USER_ERROR
        said = f"{arguments[1]}: '10' is the name of class 2, and class 10 is '8'; give name:10 or index:10"
        assert ended.err == f"[cfpretrain] error: {said}\n"
    made = {}
    for word, folder in (("name:10", tmp_path), ("index:2", tmp_path), ("name:10", tmp_path / "run")):
        out = tmp_path / f"{len(made)}"
        arguments = [os.path.relpath(source, folder), "--out", str(out), "--classes", word, "--num-images", "2", *QUICK]
        ended = run_alone(SCRIPT, arguments, cwd=folder)
        assert ended.code == 0, ended.err
        made[out] = content(out)
    first, *others = made.values()
    assert all(other == first for other in others)
    assert first["labels.csv"].decode().splitlines()[1:] == ["000000.png,10,2", "000001.png,10,2"]


@pytest.mark.parametrize("script", [SCRIPT, "tools/edit.py"])
def test_a_class_with_a_typo_is_found_before_the_weights_are_read(tmp_path: Path, shards: Path, script: str) -> None:
    source = write_run(tmp_path / "run", shards)
    for file in source.glob("checkpoints/step_*/*.safetensors"):
        file.unlink()
    words = ["--classes", "sevn"] if script == SCRIPT else ["--generate", "1", "--region", "top", "--class", "sevn"]
    [ended] = run_script(script, [str(source), *words])
    assert ended.code == EXIT_USER_ERROR
    option = "--classes" if script == SCRIPT else "--class"
    assert f"error: {option}: expected a name, or a number from 0 to 9, got 'sevn'" in ended.err
    [ended] = run_script(script, [str(source), *(word.replace("sevn", "7") for word in words)])
    assert ended.code == EXIT_USER_ERROR
    assert "ema.safetensors" in ended.err


def test_what_no_source_is(tmp_path: Path) -> None:
    (tmp_path / "official.pt").write_bytes(b"")
    wanted = "expected a run folder (with config.yaml) or an exported one (with model_index.json), got"
    for path, got in (
        (tmp_path / "absent", "nothing: it does not exist"),
        (tmp_path, "another folder"),
        (tmp_path / "official.pt", "a file; of an official checkpoint tools/import_official.py makes a run folder"),
    ):
        ended = run([path], world_size=2)
        assert (ended.code, ended.err) == (EXIT_USER_ERROR, f"[cfpretrain] error: {path}: {wanted} {got}\n")
