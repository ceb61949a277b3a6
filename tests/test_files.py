"""files.py: nothing that was planted under a name is followed, opened or emptied."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from cfpretrain.base import files


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A folder of somebody else's, with a file."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "key").write_text("secret")
    return folder


def check_untouched(victim: Path) -> None:
    assert [path.name for path in victim.iterdir()] == ["key"]
    assert (victim / "key").read_text() == "secret"
    assert stat.S_IMODE(victim.stat().st_mode) == 0o777 & ~files._umask()


def test_a_link_is_replaced_and_not_written_through(tmp_path: Path, victim: Path) -> None:
    for target in (victim, victim / "key", tmp_path / "nowhere"):
        (tmp_path / "file").symlink_to(target)
        files.replace(tmp_path / "file", "new")
        assert not (tmp_path / "file").is_symlink()
        assert files.read_text(tmp_path / "file") == "new"
        (tmp_path / "file").unlink()
    check_untouched(victim)
    assert not (tmp_path / "nowhere").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(TypeError):
        files.replace(tmp_path / "file", lambda opened: opened.write(1))  # type: ignore[arg-type]
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(
    "change",
    [
        files.create,
        files.open_lock,
        lambda path: files.open_to_change(path, os.O_RDWR),
        files.try_lock,
        files.make_folder,
        files.check_folder,
        files.clear,
        lambda path: files.opened(path, os.O_WRONLY | os.O_CREAT).__enter__(),
        lambda path: files.opened(path, os.O_RDONLY).__enter__(),
        lambda path: files.copy(path, path.with_name("copy"), lambda _: True),
        lambda path: files.publish(path.parent / "mine", path),
    ],
)
@pytest.mark.parametrize("target", ["victim", "victim/key", "victim/new"])
def test_a_link_is_refused(tmp_path: Path, victim: Path, change: Callable[[Path], object], target: str) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / target)
    with pytest.raises(OSError, match=r"."):
        change(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert not (tmp_path / "copy").exists()
    check_untouched(victim)


def test_what_a_link_leads_to_is_not_removed(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").symlink_to(victim / "key")
    (tmp_path / "folder" / "link").symlink_to(victim)
    (tmp_path / "link").symlink_to(victim)
    for name in ("folder", "link", "absent"):
        files.remove(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]
    check_untouched(victim)


def test_a_hard_link_would_change_another_file(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "file").hardlink_to(victim / "key")
    with pytest.raises(OSError, match="another name"):
        files.open_to_change(tmp_path / "file", os.O_RDWR)
    check_untouched(victim)


def test_leftovers_of_the_dead_go_and_what_lives_stays(tmp_path: Path, victim: Path) -> None:
    for name in ("out", "out.json", "o*t"):
        files.hidden_beside(tmp_path / name).write_text("half")
    hidden = files.hidden_beside(tmp_path / "out")
    hidden.symlink_to(victim / "key")
    files.hidden_beside(tmp_path / "out").mkdir()

    def write(opened: IO[bytes]) -> None:
        opened.write(b"new")
        files.remove_leftovers(tmp_path, "o*t")
        assert len(list(tmp_path.glob(".writing.*"))) == 5
        files.remove_leftovers(tmp_path, "out")
        assert [path.name[:-9] for path in tmp_path.glob(".writing.*")].count(".writing.out") == 1
        assert len(list(tmp_path.glob(".writing.*"))) == 2
        files.remove_leftovers(tmp_path)
        assert len(list(tmp_path.glob(".writing.*"))) == 1

    files.replace(tmp_path / "out", write)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "victim"]
    (tmp_path / "link").symlink_to(victim)
    files.hidden_beside(victim / "key").write_text("half")
    for name in ("link", "absent"):
        files.remove_leftovers(tmp_path / name)
    assert len(list(victim.iterdir())) == 2
    files.remove_leftovers(victim)
    check_untouched(victim)


def test_a_file_that_is_taken_for_a_leftover_as_it_is_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    create = files.create

    def create_late(file: Path) -> IO[bytes]:
        opened = create(file)
        if not made:
            files.remove_leftovers(tmp_path)  # before it is locked
        made.append(file)
        return opened

    monkeypatch.setattr(files, "create", create_late)
    files.replace(tmp_path / "file", "new")
    assert len(made) == 2
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


def test_only_a_regular_file_of_the_right_kind_is_copied(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no picture")
    os.mkfifo(tmp_path / "pipe")
    for name in ("text", "pipe", "."):
        with pytest.raises(OSError, match=r"expected kind|not a regular file|Is a directory"):
            files.copy(tmp_path / name, tmp_path / "copy", files.is_png)
    (tmp_path / "png").write_bytes(files.PNG_BEGIN + bytes(5000))
    with pytest.raises(OSError, match="at most 100 are read"):
        files.copy(tmp_path / "png", tmp_path / "copy", files.is_png, max_bytes=100)
    assert not (tmp_path / "copy").exists()
    files.copy(tmp_path / "png", tmp_path / "copy", files.is_png)
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "png").read_bytes()


def test_unfinished_work_is_private_until_it_has_its_name(tmp_path: Path) -> None:
    files.make_folder(tmp_path / "a" / ".hidden", private=True)
    assert stat.S_IMODE((tmp_path / "a" / ".hidden").stat().st_mode) == 0o700
    files.make_folder(tmp_path / "a" / ".hidden", private=True)
    files.publish(tmp_path / "a" / ".hidden", tmp_path / "a" / "out")
    assert stat.S_IMODE((tmp_path / "a" / "out").stat().st_mode) == 0o777 & ~files._umask()


def test_a_folder_of_anothers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.make_folder(tmp_path / "shared" / "folder")
    files.check_folder(tmp_path / "shared" / "folder")
    mine, lstat = os.geteuid(), os.lstat
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    files.check_folder(tmp_path / "shared" / "folder")  # who owns the folder above owns this too
    found = [*lstat(tmp_path)]
    found[stat.ST_UID] = mine + 2
    monkeypatch.setattr(os, "lstat", lambda _: os.stat_result(found))
    with pytest.raises(FileExistsError, match="another user's folder"):
        files.make_folder(tmp_path / "shared" / "folder")


def test_a_process_that_takes_a_folder_while_it_is_removed_keeps_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the removal, once the lock has no name, another process takes one of that name and begins."""
    folder, unlink, taken = tmp_path / "folder", os.unlink, []
    names = list(map(str, range(20)))  # many, since folders are listed in no order

    def remove(path: Path, **where: int) -> None:
        unlink(path, **where)
        if os.path.basename(path) == "lock" and not taken:
            taken.append(files.try_lock(folder / "lock"))
            for name in names:
                (folder / name).write_text("another's")

    folder.mkdir()
    lock = files.try_lock(folder / "lock")
    assert lock is not None
    for name in names:
        (folder / name).write_text("mine")
    monkeypatch.setattr(os, "unlink", remove)
    files.remove_locked(folder, "lock")
    os.close(lock)
    assert taken not in ([], [None])
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "lock": "",
        **dict.fromkeys(names, "another's"),
    }
    os.close(taken[0])


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    lock, waited = files.try_lock(tmp_path / "lock"), []

    def wait() -> None:
        waited.append(None)
        if len(waited) == 3:
            os.close(lock)

    with files.locked(tmp_path / "lock", wait):
        assert files.try_lock(tmp_path / "lock") is None
    assert len(waited) == 3
    again = files.try_lock(tmp_path / "lock")  # free
    assert again is not None
    with pytest.raises(ZeroDivisionError), files.locked(tmp_path / "lock", lambda: 1 / 0):
        pass
    os.close(again)


def test_a_lock_is_held_by_one_and_known_when_it_has_gone(tmp_path: Path) -> None:
    lock = files.try_lock(tmp_path / "lock")
    assert lock is not None
    assert files.try_lock(tmp_path / "lock") is None
    files.make_folder(tmp_path / "folder")
    inner = files.try_lock(tmp_path / "folder" / "lock")
    (tmp_path / "folder" / "rest").touch()
    files.remove_locked(tmp_path / "folder", "lock")
    assert not (tmp_path / "folder").exists()
    for descriptor in (lock, inner):
        assert descriptor is not None
        os.close(descriptor)
    again = files.try_lock(tmp_path / "lock")
    assert again is not None
    os.close(again)
