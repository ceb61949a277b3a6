"""Environments where cfpretrain is not, for what leaves it."""

import os
import subprocess
import venv
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement


def make_environment(folder: Path, *more: str) -> Path:
    """The python of a new environment with torch, diffusers, `more` and what these need, as it is installed here."""
    venv.create(folder / "venv", symlinks=True, with_pip=False)
    [site_packages] = (folder / "venv").glob("lib/python*/site-packages")
    needed = ["torch", "diffusers", "safetensors", "numpy", "pillow", *more]
    for name in needed:  # grows as it goes
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or []} - {".."}:
            if not (site_packages / top).exists():
                (site_packages / top).symlink_to(found.locate_file(top))
        wanted = [Requirement(text) for text in found.requires or []]
        needed += [
            one.name
            for one in wanted
            if one.name not in needed and (one.marker is None or one.marker.evaluate({"extra": ""}))
        ]
    return folder / "venv" / "bin" / "python"


def run_elsewhere(python: Path, folder: Path, script: str, *arguments: object) -> tuple[str, str]:
    """What a script of tests/ prints and says in such an environment, run in a folder."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [str(python), str(Path(__file__).with_name(script)), *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=600)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout, ended.stderr
