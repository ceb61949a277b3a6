"""The door to wandb: real runs offline, with a service that dies, stops or does not start."""

import signal
from pathlib import Path

import pytest

from cfpretrain.run import tracker
from cfpretrain.run.tracker import Tracker
from tests.processes import run_alone


def test_wandb_offline_keeps_numbers_and_goes_on_with_its_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    door = Tracker("auto", "cfpretrain-test", tmp_path, None, {"train": {"num_steps": 3}})
    assert door.run_id
    door.log({"step": 1, "loss": 0.5, "mfu": None})
    door.close()
    again = Tracker("offline", "cfpretrain-test", tmp_path, door.run_id, {})
    assert again.run_id == door.run_id
    again.close()
    files = list((tmp_path / "wandb").glob(f"offline-run-*/run-{door.run_id}.wandb"))
    assert len(files) == 2
    assert any(b"loss" in file.read_bytes() for file in files)


def test_a_name_is_told_as_it_is_shown(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    door = Tracker("auto", "mine", tmp_path, None, {"data": {"shards": ("a\u202eb",), "x\u200b": 1}})
    door.close()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    told = file.read_bytes()
    assert rb'["a\\u202eb"]' in told  # in JSON
    assert rb'"x\\u200b"' in told
    assert not capsys.readouterr().out
    Tracker("auto", "mine\x1b[2J", tmp_path, None, {}).close()
    (line,) = capsys.readouterr().out.splitlines()
    assert "WARNING: wandb failed (Invalid project name" in line


def test_disabled_tracking_writes_nothing(tmp_path: Path) -> None:
    door = Tracker("disabled", "x", tmp_path, None, {})
    door.log({"step": 1, "loss": 0.5})
    door.close()
    assert door.run_id is None
    assert list(tmp_path.iterdir()) == []


def test_mode_is_online_only_where_a_key_is(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert tracker._resolve_mode("auto") == "offline"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert tracker._resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert tracker._resolve_mode("auto") == "online"
    assert tracker._resolve_mode("offline") == "offline"


@pytest.mark.parametrize("name", ["wandb", ".wandb"])
def test_settings_in_the_current_folder_are_not_read(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """They would say to whom the user's key is sent, and the current folder may be a stranger's run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    (tmp_path / name / "settings").write_text("[default]\nbase_url = http://127.0.0.1:1\n")
    door = Tracker("offline", "cfpretrain-test", tmp_path / "run", None, {})
    door.log({"step": 1, "loss": 0.5})
    door.close()
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert f"WARNING: wandb is not started: it would read {tmp_path / name / 'settings'}; move that to" in said
    assert not (tmp_path / "run").exists()


# A service that gets a signal after the first row; then rows, a picture and the end.
AILING = """
import signal, sys, time
from pathlib import Path
import psutil
from cfpretrain.run.tracker import Tracker

door = Tracker("offline", "cfpretrain-test", Path(sys.argv[1]), None, {})
door.log({"step": 1, "loss": 0.5})
service = next(child for child in psutil.Process().children() if child.name() == "wandb-core")
service.send_signal(int(sys.argv[2]))
for step in range(2, 8):
    door.log({"step": step, "loss": 0.5})
    door.log_picture("samples", Path("no such picture.png"), step)
    time.sleep(0.1)
door.close(2.0)
print("closed", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP], ids=lambda n: n.name)
def test_a_service_that_fails_is_said_once_and_keeps_nobody(tmp_path: Path, number: signal.Signals) -> None:
    ended = run_alone(AILING, [str(tmp_path), str(int(number))], environment={"HOME": str(tmp_path)})
    assert ended.code == 0, ended.err
    lines = ended.out.strip().splitlines()
    assert len(lines) == 2, ended.out
    warning, closed = lines
    assert "WARNING: wandb " in warning
    assert str(tmp_path / "wandb") in warning
    assert closed == "closed"
    assert "Traceback" not in ended.err


def test_a_service_that_cannot_start_is_said_once(tmp_path: Path, monkeypatch, capsys) -> None:
    """Nobody listens where the environment says that it is."""
    monkeypatch.setenv("WANDB_SERVICE", "3-1-unix-nobody-listens")
    door = Tracker("offline", "cfpretrain-test", tmp_path, None, {})
    assert door.run_id
    door.log({"step": 1, "loss": 0.5})
    door.close()
    assert capsys.readouterr().out.count("WARNING: wandb failed") == 1
