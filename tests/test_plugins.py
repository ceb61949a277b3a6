"""The tests run beside plugins of pytest that they do not use."""

import os
import subprocess
import sys
from pathlib import Path

from tests.processes import REPOSITORY


def test_plugins_that_warn_as_pytest_starts_do_not_stop_it(tmp_path: Path) -> None:
    (tmp_path / "warns.py").write_text("import warnings\ndef pytest_configure(): warnings.warn('disabled')\n")
    (tmp_path / "warns-1.dist-info").mkdir()
    (tmp_path / "warns-1.dist-info" / "METADATA").write_text("Name: warns\nVersion: 1\n")
    (tmp_path / "warns-1.dist-info" / "entry_points.txt").write_text("[pytest11]\nbenchmark = warns\nasyncio = warns\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-W",
            "error",
            "-p",
            "no:cacheprovider",
            "--collect-only",
            "tests/test_seeds.py",
        ],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
