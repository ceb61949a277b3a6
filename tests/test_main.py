"""The installed command: every verb runs its tool, from a checkout and from a wheel, and mistakes are one line."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cfpretrain.__main__ import VERBS, file_of
from tests.processes import REPOSITORY

WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from cfpretrain.__main__ import main; main()"


def run(*words: str, place: Path = REPOSITORY) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"PYTHONPATH": str(place)}
    command = [sys.executable, "-c", WITHOUT_TORCH, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=place)


def test_help_lists_every_verb_with_a_line_each() -> None:
    ended = run("--help")
    assert ended.returncode == 0, ended.stderr
    width = max(map(len, VERBS)) + 2
    for verb, (_, text) in VERBS.items():
        assert f"\n  {verb:<{width}}{text}\n" in ended.stdout
        assert file_of(verb).is_file()


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_its_tool(verb: str) -> None:
    ended = run(verb, "--help")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(f"usage: cfpretrain {verb} ")


def test_what_a_verb_measures_is_part_of_its_usage() -> None:
    assert run("measure", "step", "--help").stdout.startswith("usage: cfpretrain measure step ")


@pytest.mark.parametrize("words", [[], ["sampel"], ["sample", "runs/none", "--num-images", "0"]])
def test_mistakes_are_one_line(words: list[str]) -> None:
    ended = run(*words)
    assert ended.returncode == 2
    assert ended.stderr.startswith("[cfpretrain] error: ")
    assert ended.stderr.count("\n") == 1


def test_what_a_launcher_adds_comes_first() -> None:
    """`deepspeed --module cfpretrain sample ...`."""
    ended = run("--local_rank=0", "sample", "runs/none", "--num-images", "0")
    assert (ended.returncode, ended.stderr.split(":")[1]) == (2, " --num-images")


def test_a_wheel_carries_the_tools(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    for name in ("cfpretrain", "tools"):
        unwanted = shutil.ignore_patterns("__pycache__", "cfpretrain")
        shutil.copytree(REPOSITORY / name, tmp_path / "source" / name, ignore=unwanted)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, tmp_path / "source" / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*build, str(tmp_path), str(tmp_path / "source")], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (entry,) = (tmp_path / "site").glob("*.dist-info/entry_points.txt")
    assert "cfpretrain = cfpretrain.__main__:main" in entry.read_text()
    for verb in ("sample", "measure", "crash-test"):
        assert run(verb, "--help", place=tmp_path / "site").returncode == 0
    assert run("sample", "runs/none", "--num-images", "0", place=tmp_path / "site").returncode == 2
