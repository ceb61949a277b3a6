"""The launch environment: what launchers set is understood, and what none sets ends a command with one line."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cfpretrain.base import launch
from cfpretrain.base.console import UserError
from cfpretrain.base.launch import Launch
from tests.processes import REPOSITORY, Ended, launcher_environment, run_alone

MEETING = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
PAIR = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", **MEETING}
VARIABLES = (*PAIR, "LOCAL_WORLD_SIZE", *launch._TASKS)

# Every command that runs on ranks, or minds how many there are, with the least that it takes.
COMMANDS = {
    "cfpretrain/train.py": ["--config", "configs/tiny.yaml"],
    "tools/sample.py": ["runs/none"],
    "tools/caption.py": ["runs/none", "images"],
    "tools/interleave.py": ["runs/none", "text:one"],
    "tools/edit.py": ["runs/none", "--generate", "0", "--region", "top", "--class", "1"],
    "tools/encode_latents.py": ["images", "--autoencoder", "identity", "--out", "latents"],
    "tools/evaluate_fid.py": ["runs/none", "--reference", "images"],
    "tools/report.py": ["runs/none", "--images", "images", "--held-out", "images"],
    "tools/text_report.py": ["runs/none", "--files", "files", "--images", "images", "--held-out", "images"],
    "tools/replay.py": ["runs/none", "--step", "1"],
    "tools/measure.py": ["saving", "--config", "configs/tiny.yaml"],
    "tools/measure_step.py": ["--config", "configs/tiny.yaml"],
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without anything of a launcher's."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "want"),
    [
        ({}, Launch()),
        (launcher_environment(1, 2, 29500), Launch(1, 2, 1, 2)),
        # torchrun on two machines.
        (
            {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "GROUP_RANK": "1", **MEETING},
            Launch(9, 16, 1, 8),
        ),
        # cluster/slurm.sbatch in a job step of four tasks.
        ({**PAIR, "WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}, Launch(1, 4, 1, 2)),
        # An mpirun of one's own that says no more than torch needs.
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", **MEETING}, Launch(3, 4, 3, 1)),
        # One rank: what is left of another start says nothing about it.
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "7", "MASTER_PORT": "many"}, Launch()),
        ({"MASTER_ADDR": "node1", "MASTER_PORT": "29500", "LOCAL_SIZE": "8"}, Launch()),
        ({"RANK": "0"}, Launch()),
        # A job script on one task, and the shell of `salloc --ntasks=8`.
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, Launch()),
        # Tasks that are told to be runs of their own.
        ({"RANK": "0", "WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "8"}, Launch()),
    ],
)
def test_what_launchers_set_is_understood(variables, want, environment) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    assert launch.read() == want


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE in the environment: 2 ranks, but RANK is not set"),
        ({"WORLD_SIZE": "2", **MEETING}, "WORLD_SIZE in the environment: 2 ranks, but RANK is not set"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE in the environment: expected a whole number, at least 1, got ''"),
        ({**PAIR, "WORLD_SIZE": ""}, "WORLD_SIZE in the environment: expected a whole number, at least 1, got ''"),
        (
            {**PAIR, "WORLD_SIZE": "two"},
            "WORLD_SIZE in the environment: expected a whole number, at least 1, got 'two'",
        ),
        ({**PAIR, "WORLD_SIZE": "0"}, "WORLD_SIZE in the environment: expected a whole number, at least 1, got '0'"),
        ({**PAIR, "RANK": ""}, "RANK in the environment: expected a whole number, at least 0, got ''"),
        ({**PAIR, "RANK": "-1"}, "RANK in the environment: expected a whole number, at least 0, got '-1'"),
        ({**PAIR, "RANK": "1.0"}, "RANK in the environment: expected a whole number, at least 0, got '1.0'"),
        ({**PAIR, "RANK": "2"}, "RANK in the environment: expected less than WORLD_SIZE = 2, got 2"),
        ({"RANK": "1"}, "RANK in the environment: expected less than WORLD_SIZE = 1 (not set), got 1"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR in the environment: expected to be set where WORLD_SIZE = 2"),
        ({**PAIR, "MASTER_ADDR": ""}, "MASTER_ADDR in the environment: expected to be set where WORLD_SIZE = 2"),
        ({**PAIR, "MASTER_PORT": "port"}, "MASTER_PORT in the environment: expected a whole number, at least 1"),
        ({**PAIR, "MASTER_PORT": "65536"}, "MASTER_PORT in the environment: expected a port, 1 to 65535, got 65536"),
        ({**PAIR, "LOCAL_RANK": ""}, "LOCAL_RANK in the environment: expected a whole number, at least 0, got ''"),
        ({**PAIR, "LOCAL_RANK": "2"}, "LOCAL_RANK in the environment: expected less than the 2 ranks of this machine"),
        ({**PAIR, "LOCAL_SIZE": "8"}, "LOCAL_SIZE in the environment: expected at most WORLD_SIZE = 2, got 8"),
        (
            {**PAIR, "LOCAL_WORLD_SIZE": "1"},
            "LOCAL_SIZE in the environment: expected the same as LOCAL_WORLD_SIZE = 1, got 2",
        ),
        (
            {"SLURM_STEP_NUM_TASKS": "2"},
            "SLURM_STEP_NUM_TASKS: srun has started 2 tasks and RANK and WORLD_SIZE are not",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2", "WORLD_SIZE": "1"}, "OMPI_COMM_WORLD_SIZE: mpirun has started 2 tasks"),
        ({"PMI_SIZE": "16"}, "PMI_SIZE: an MPI launcher has started 16 tasks"),
    ],
)
def test_what_no_launcher_sets_is_refused_by_name(variables, message, environment) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(UserError) as caught:
        launch.read()
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_rank_that_is_not_told_its_place_among_gpus_is_refused(environment) -> None:
    """All would compute on the first GPU."""
    for name, value in PAIR.items():
        if name != "LOCAL_RANK":
            environment.setenv(name, value)
    with pytest.raises(UserError, match="LOCAL_RANK in the environment: expected to be set where WORLD_SIZE = 2"):
        launch.read()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "2"}, {**PAIR, "RANK": "2"}], ids=["left over", "no such rank"])
def test_every_command_on_ranks_ends_with_one_line(command, variables, tmp_path: Path) -> None:
    """Before torch is loaded, and before anything is read or written."""
    ended = without_torch([str(REPOSITORY / command), *COMMANDS[command]], tmp_path, variables)
    assert ended.code == 2, ended.err
    assert ended.out == ""
    lines = ended.err.splitlines()
    assert len(lines) == 1, ended.err
    assert lines[0].startswith(
        f"[cfpretrain] error: {'WORLD_SIZE' if len(variables) == 1 else 'RANK'} in the environment"
    )
    assert list(tmp_path.iterdir()) == []


WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def without_torch(command: list[str], folder: Path, variables: dict[str, str]) -> Ended:
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *command],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name not in VARIABLES} | variables,
        capture_output=True,
        text=True,
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def test_a_command_that_runs_alone_does_not_mind(tmp_path: Path) -> None:
    """Nor is it silent, as a rank other than the first would be."""
    ended = subprocess.run(
        [sys.executable, REPOSITORY / "tools" / "inspect_shards.py", "latents", "--grid", "grid.tar"],
        cwd=tmp_path,
        env=os.environ | PAIR | {"WORLD_SIZE": "8", "LOCAL_SIZE": "many"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("[cfpretrain] error: --grid: "), ended.stderr


def test_no_command_on_ranks_is_left_out() -> None:
    """Who asks for the number of ranks, or starts together with others, has checked the environment."""
    for path in [REPOSITORY / "cfpretrain" / "train.py", *(REPOSITORY / "tools").glob("*.py")]:
        tree = ast.parse(path.read_text())
        named = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        is_command = any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
        # `estimate_memory --measure` runs one rank, and without it none.
        if is_command and named & {"world_size", "ranks_of_a_tool"} and path.name != "estimate_memory.py":
            assert str(path.relative_to(REPOSITORY)) in COMMANDS


STARTED = """
import torch
from cfpretrain.base import runtime
runtime.start(torch.device("cpu"))
print(runtime.rank(), runtime.world_size(), runtime.ranks_per_node())
runtime.stop()
"""


@pytest.mark.parametrize(
    "variables", [{"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "3"}, {"LOCAL_SIZE": "8"}], ids=str
)
def test_what_is_accepted_stays_accepted_after_a_start(variables: dict[str, str]) -> None:
    """A start completes the environment for the libraries that read it."""
    ended = run_alone(STARTED, environment=variables)
    assert ended.code == 0, ended.err
    assert ended.out.split()[:2] == ["0", "1"]
