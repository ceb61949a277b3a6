"""What people see: rank 0 alone speaks, phases stay alive, mistakes are one line."""

import argparse
import importlib
import mmap
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cfpretrain.base import console
from tests.processes import REPOSITORY


def test_paths_are_expanded_and_addresses_are_not(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert console.path_argument("~/a b/../c/") == Path("/home/me/a b/../c")
    assert console.address_argument("~/latents/") == "/home/me/latents"
    assert console.address_argument("s3://bucket/~/latents/") == "s3://bucket/~/latents/"
    assert console.address_argument("identity") == "identity"
    assert console.address_argument("") == ""
    with pytest.raises(argparse.ArgumentTypeError, match="~nobody-of-this-name"):
        console.address_argument("~nobody-of-this-name/x")


@pytest.mark.parametrize(("rank", "want"), [(0, "[cfpretrain] hello\n"), (1, "")])
def test_rank_zero_alone_speaks(rank, want, monkeypatch, capsys) -> None:
    monkeypatch.setattr(console, "_rank", rank)
    console.say("hello")
    assert capsys.readouterr().out == want


def test_names_that_are_no_text_are_said(capsys) -> None:
    console.say("out\udcff.png")
    assert capsys.readouterr().out == "[cfpretrain] out\\udcff.png\n"


def test_ctrl_c_is_one_line(capsys) -> None:
    with pytest.raises(SystemExit) as caught, console.ending_in_one_line():
        raise KeyboardInterrupt
    assert (caught.value.code, capsys.readouterr().err) == (130, "[cfpretrain] interrupted\n")


@pytest.mark.parametrize(("rank", "want"), [(0, "[cfpretrain] error: no such key\n"), (1, "")])
def test_a_mistake_ends_every_rank_with_one_line(rank, want, monkeypatch, capsys) -> None:
    monkeypatch.setattr(console, "_rank", rank)
    monkeypatch.setattr(console, "_LINGER_SECONDS", 0.0)
    with pytest.raises(SystemExit) as caught:
        console.exit_with(console.UserError("no such key"))
    assert caught.value.code == 2
    assert capsys.readouterr().err == want


def test_a_long_mistake_is_cut(capsys) -> None:
    with pytest.raises(SystemExit):
        console.exit_with(console.UserError("\x1b" * 10**6))
    line = capsys.readouterr().err
    assert line.startswith("[cfpretrain] error: \\x1b\\x1b")
    assert line.endswith(" ...\n")
    assert len(line) < 3_000


def test_a_long_phase_says_that_it_lives(monkeypatch, capsys) -> None:
    monkeypatch.setattr(console, "_HEARTBEAT_SECONDS", 0.01)
    lines: list[str] = []
    with console.phase("waiting"):
        while len(lines) < 3:
            time.sleep(0.01)
            lines += capsys.readouterr().out.splitlines()
    assert lines[0] == "[cfpretrain] waiting ..."
    assert lines[1].startswith("[cfpretrain] still waiting (")
    # Once it ends, it is quiet.
    capsys.readouterr()
    time.sleep(0.05)
    assert capsys.readouterr().out == ""


def test_seconds_of_phases_add_up(monkeypatch) -> None:
    monkeypatch.setattr(console, "phase_seconds", {})
    with console.phase("reading"):
        pass
    first = console.phase_seconds["reading"]
    with pytest.raises(ValueError, match="damaged"), console.phase("reading"):
        raise ValueError("damaged")
    assert console.phase_seconds.keys() == {"reading"}
    assert console.phase_seconds["reading"] >= first >= 0


def test_progress_without_a_terminal_is_lines(monkeypatch, capsys) -> None:
    monkeypatch.setattr(console, "_HEARTBEAT_SECONDS", 0.0)
    progress = console.Progress(total=100, done=0)
    progress.show(10, "loss 0.5", seconds_left=125)
    progress.close()
    assert capsys.readouterr().out == "[cfpretrain] step 10/100  loss 0.5  2:05 left\n"


def test_progress_on_a_terminal_is_a_bar(monkeypatch, capsys) -> None:
    monkeypatch.setattr(console, "_has_terminal", lambda: True)
    progress = console.Progress(total=100, done=40)
    progress.show(60, "loss 0.5", seconds_left=5)
    progress.close()
    shown = capsys.readouterr().err
    assert "60/100" in shown
    assert "loss 0.5, 0:05 left" in shown


def test_progress_of_many_items_has_their_rate_and_the_time_left(monkeypatch, capsys) -> None:
    now = 100.0
    monkeypatch.setattr(console, "_HEARTBEAT_SECONDS", 0.0)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    progress = console.Progress(total=500, done=200, unit="image")
    progress.show(200)
    now += 10
    progress.show(220, "3 rejected")
    progress.close()
    assert capsys.readouterr().out == "[cfpretrain] image 220/500  2.00 images/s, 3 rejected  2:20 left\n"


def test_the_first_line_comes_before_torch(tmp_path: Path) -> None:
    """Importing torch takes seconds on a busy machine: by then something has been said."""
    (tmp_path / "torch.py").write_text("print('torch begins', flush=True)\nraise SystemExit(7)\n")
    program = textwrap.dedent(f"""
        import runpy, sys
        sys.path.insert(0, {str(tmp_path)!r})
        sys.argv = ["train.py", "--config", "configs/tiny.yaml"]
        runpy.run_path("cfpretrain/train.py", run_name="__main__")
    """)
    ended = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    lines = ended.stdout.splitlines()
    assert lines.index("[cfpretrain] loading torch ...") < lines.index("torch begins")


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(2**46),  # torch's RuntimeError
        lambda: bytearray(2**50),  # Python's MemoryError
        lambda: np.empty(2**50),  # NumPy's own
        lambda: mmap.mmap(-1, 2**50),  # the system's OSError
    ],
)
def test_memory_that_is_not_there_is_one_line(allocate, capsys) -> None:
    def fail() -> None:
        try:
            allocate()
        finally:
            raise RuntimeError("what fails after it")

    with pytest.raises(SystemExit) as caught, console.ending_in_one_line():
        fail()
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert said.startswith("[cfpretrain] error: no memory left on rank 0 (")
    assert "--batch-size" in said
    assert said.count("\n") == 1


def test_the_gpus_out_of_memory_is_one_line_with_the_notes_of_who_knows() -> None:
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. If reserved but unallocated memory is large try ..."
    )
    error.add_note("lower this")
    said = str(console.explain_no_memory(error))
    assert said == "no memory left on rank 0 (CUDA out of memory. Tried to allocate 2.00 GiB.); lower this"
    assert console.explain_no_memory(RuntimeError("CUDA error: an illegal memory access was encountered")) is None
    assert console.explain_no_memory(OSError(28, "No space left on device")) is None


def test_a_package_that_is_missing_is_one_line(capsys) -> None:
    with pytest.raises(SystemExit), console.ending_in_one_line():
        importlib.import_module("package_that_nobody_has")
    said = capsys.readouterr().err
    assert said.startswith("[cfpretrain] error: package_that_nobody_has is not installed here; pip install")
    with pytest.raises(ModuleNotFoundError), console.ending_in_one_line():
        importlib.import_module("cfpretrain.module_that_nobody_has")
