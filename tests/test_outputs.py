"""Outputs are whole or not there."""

from pathlib import Path

import pytest

from cfpretrain.base import files, outputs
from cfpretrain.base.console import UserError


def test_an_output_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with outputs.whole_or_nothing(out, "OUT") as hidden:
        hidden.mkdir()
        (hidden / "file").write_text("whole")
        with (
            pytest.raises(UserError, match=rf"^OUT: {out} is being written by another process"),
            outputs.whole_or_nothing(out, "OUT"),
        ):
            raise AssertionError
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["file"]
    assert list(out.parent.iterdir()) == [out]


def fail(hidden: Path, out: Path) -> None:
    assert not hidden.exists()
    hidden.write_text("half")
    raise OSError(28, "No space left on device")


def finish_first(hidden: Path, out: Path) -> None:
    hidden.write_text("late")
    out.write_text("mine")


@pytest.mark.parametrize(
    ("way", "message"),
    [
        (fail, r"cannot be written \(No space left on device\); free some space or give another"),
        (finish_first, "expected a path where nothing is yet, got"),
    ],
)
def test_an_output_that_fails_leaves_nothing_of_its_own(tmp_path: Path, way, message) -> None:
    out = tmp_path / "out"
    (tmp_path / ".out.partial" / "out").mkdir(parents=True)  # of a process that was killed
    with pytest.raises(UserError, match=message), outputs.whole_or_nothing(out, "OUT") as hidden:
        way(hidden, out)
    assert [path.read_text() for path in tmp_path.iterdir()] == (["mine"] if way is finish_first else [])


@pytest.mark.parametrize(
    ("in_the_way", "message"),
    [
        ("out", "expected a path where nothing is yet"),
        (
            ".out.partial",
            r"\S*/\.out\.partial is in the way of .*: expected a folder of your own, got no folder; remove it",
        ),
        ("", r"cannot be written \(Not a directory"),
    ],
)
def test_what_is_in_the_way_of_an_output_is_named(tmp_path: Path, in_the_way, message) -> None:
    folder = tmp_path / "folder"
    if in_the_way:
        folder.mkdir()
    (folder / in_the_way).write_text("mine")
    with pytest.raises(UserError, match=f"^OUT: .*{message}"), outputs.whole_or_nothing(folder / "out", "OUT"):
        raise AssertionError
    assert (folder / in_the_way).read_text() == "mine"


def test_a_hidden_folder_that_is_a_link_is_called_one(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").symlink_to(tmp_path)
    message = r"\.out\.partial is in the way of \S*/out: expected a folder of your own, got a link; remove it$"
    with pytest.raises(UserError, match=message), outputs.whole_or_nothing(tmp_path / "out", "OUT"):
        raise AssertionError


def test_what_a_killed_writer_of_the_output_left_beside_it_is_removed(tmp_path: Path) -> None:
    """As of `evaluate_fid.py --out scores.json`, which was killed while it wrote its scores."""
    for name in ("scores.json", "other.json"):
        files.hidden_beside(tmp_path / name).write_text("half")
    work = outputs.Unfinished(tmp_path / "scores.json", "--out")
    work.take()
    work.release()
    assert [path.name[:-9] for path in tmp_path.glob(".writing.*")] == [".writing.other.json"]
