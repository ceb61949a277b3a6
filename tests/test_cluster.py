"""cluster/: the job scripts, run by a driver that plays Slurm and ssh; ranks are small scripts or real training."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.digits import small_run, write_digits
from tests.processes import REPOSITORY, free_port, wait_until

SLURM, HOSTFILE = REPOSITORY / "cluster" / "slurm.sbatch", REPOSITORY / "cluster" / "hostfile.sh"
SCRIPTS = sorted((REPOSITORY / "cluster").glob("*.s*"))

# What Slurm and ssh do, as far as the scripts see it.
PROGRAMS = {
    "srun": """
while [[ $1 == --* ]]; do shift; done
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & tasks+=($!)
done
for signal in USR1 TERM; do trap "kill -$signal \\"\\${tasks[@]}\\"" $signal; done
highest=0
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2>/dev/null; do wait "$task"; done
    wait "$task"; code=$?
    highest=$((code > highest ? code : highest))
done
exit $highest
""",
    "scontrol": """
case $1 in
show) tr , '\\n' <<<"$3" ;;
requeue) echo "$2" >>"$SCHEDULER/requeued" ;;
esac
""",
    # The last argument is the command, and no variable of this side is there.
    "ssh": """
while [[ $1 == -o ]]; do shift 2; done
echo "$1" >>"$SCHEDULER/logins"
exec env -i PATH="$PATH" SCHEDULER="$SCHEDULER" bash -c "$2"
""",
}


@dataclass(frozen=True)
class Ended:
    """A job script that ended."""

    code: int
    out: str


class Machine:
    """A machine with the programs above and an interpreter that is a shell script instead of python.

    Args:
        folder: for its files.
        rank: what each rank runs, in bash, in place of training; "$folder" is the run folder. None: training itself.
    """

    def __init__(self, folder: Path, rank: str | None) -> None:
        self.folder, self.run_folder = folder, folder / "run"
        self.run_folder.mkdir(parents=True)
        programs = folder / "bin"
        programs.mkdir()
        for name, text in PROGRAMS.items():
            _write_program(programs / name, text)
        python = sys.executable
        if rank is not None:
            python = str(programs / "rank")
            _write_program(programs / "rank", f'folder="${{@: -1}}"; folder=${{folder#run.folder=}}\n{rank}')
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PBS_"))}
        self.environment = kept | {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "SCHEDULER": str(folder),
            "PYTHON": python,
            "MASTER_PORT": str(free_port()),
            "RESTART_SECONDS": "0",
        }
        self.num_starts = 0

    def start(self, script: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Starts a job script; what it writes goes on in one file over all starts."""
        with (self.folder / "log").open("a") as log:
            return subprocess.Popen(
                # A shell cannot trap what was ignored when it started, as SIGINT is under a job of a shell's own.
                ["env", "--default-signal=INT", "bash", str(script), *arguments],
                cwd=self.folder,
                env=self.environment | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def start_slurm(self, *arguments: str, num_tasks: int = 2) -> subprocess.Popen[str]:
        """Starts slurm.sbatch as a job of one node, as often as it was requeued."""
        self.num_starts += 1
        return self.start(
            SLURM,
            *(str(self.run_folder), *(arguments or ("--config", "some.yaml"))),
            SLURM_SUBMIT_DIR=str(REPOSITORY),
            SLURM_JOB_ID=str(free_port()),  # the script's port follows from it
            SLURM_JOB_NODELIST="127.0.0.1",
            SLURM_NTASKS=str(num_tasks),
            SLURM_NTASKS_PER_NODE=str(num_tasks),
            SLURM_RESTART_COUNT=str(self.num_starts - 1),
        )

    def wait(self, job: subprocess.Popen[str], timeout_s: float = 120) -> Ended:
        try:
            return Ended(job.wait(timeout_s), (self.folder / "log").read_text())
        finally:
            if job.poll() is None:
                job.kill()
                job.wait()

    def run_slurm(self) -> Ended:
        return self.wait(self.start_slurm())

    def num_requeued(self) -> int:
        path = self.folder / "requeued"
        return len(path.read_text().splitlines()) if path.exists() else 0

    def set_latest(self, step: int) -> None:
        (self.run_folder / "checkpoints").mkdir(exist_ok=True)
        (self.run_folder / "checkpoints" / "latest").write_text(f"step_{step:08d}\n")

    def notes(self) -> list[dict[str, str]]:
        """What ranks left by `note` (see NOTE)."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("note.*"))]


def _write_program(path: Path, text: str) -> None:
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)


# A rank that tells how it was started.
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS", "NCCL_DEBUG", "MY_SECRET")
NOTE = (
    "{ echo -n '{'; for name in "
    + " ".join(NAMES)
    + """; do echo -n "\\"$name\\": \\"${!name:-}\\", "; done; echo "\\"arguments\\": \\"$*\\"}"; } """
    + '>"$SCHEDULER/note.$RANK"\n'
)
# A rank that trains until a signal, writes it down, and wants to go on.
PREEMPTIBLE = """
stop() { echo "$1" >>"$SCHEDULER/signals.$RANK"; echo "told by $1" >"$folder/requeue"; exit 75; }
for signal in TERM INT USR1; do trap "stop $signal" $signal; done
touch "$SCHEDULER/ready.$RANK"
while true; do sleep 0.05; done
"""


@contextmanager
def no_rank_left(machine: Machine) -> Iterator[None]:
    """Ends what a failed test may have left."""
    try:
        yield
    finally:
        marker = f"SCHEDULER={machine.folder}".encode()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if marker in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)
            except OSError:
                continue


# ---------------------------------------------------------------------------
# The text of the scripts


def test_shellcheck_has_nothing_to_say() -> None:
    assert len(SCRIPTS) == 3
    checker = Path(sys.executable).parent / "shellcheck"
    ended = subprocess.run(
        [checker, "--external-sources", *SCRIPTS], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout


def test_directives_come_first_and_ask_for_what_the_logic_needs() -> None:
    """sbatch reads directives up to the first command only."""
    lines = SLURM.read_text().splitlines()
    head = lines[: next(i for i, line in enumerate(lines) if line and not line.startswith("#"))]
    directives = {line.removeprefix("#SBATCH ") for line in head if line.startswith("#SBATCH ")}
    assert len(directives) == sum(line.startswith("#SBATCH") for line in lines)
    assert {"--requeue", "--signal=B:USR1@120", "--open-mode=append"} <= directives


# ---------------------------------------------------------------------------
# Again or not


@pytest.mark.parametrize(
    ("rank", "requeued", "code", "said"),
    [
        ("exit 0", False, 0, "is complete"),
        ("echo 'rank 1 died' >$folder/requeue; exit 75", True, 0, "runs again from step_00000004: rank 1 died"),
        # The first rank's code does not hide the other's.
        ("echo hung >$folder/requeue; exit $((RANK * 75))", True, 0, "runs again from step_00000004: hung"),
        ("exit 2", False, 2, "running it again would not help"),
        ("exit 3", False, 3, "running it again would not help"),
        # The reason of an earlier end does not count against a mistake in the config.
        ("echo preempted >$folder/requeue; exit 2", False, 2, "running it again would not help"),
        ("exit 1", False, 1, "left no"),
        ("kill -KILL $$", True, 0, "runs again from step_00000004: killed, exit code 137"),
    ],
)
def test_a_job_is_requeued_where_it_helps(rank: str, requeued: bool, code: int, said: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path, rank)
    machine.set_latest(4)
    ended = machine.run_slurm()
    assert ended.code == code, ended.out
    assert said in ended.out
    assert machine.num_requeued() == requeued


def test_restarts_without_progress_come_to_an_end(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "echo 'rank 1 died' >$folder/requeue; exit 75")
    # Every start writes a checkpoint: as many as it takes.
    for step in range(6):
        machine.set_latest(step)
        machine.run_slurm()
    assert machine.num_requeued() == 6
    # None does: three more, and no further.
    for _ in range(4):
        ended = machine.run_slurm()
    assert machine.num_requeued() == 9
    assert ended.code == 75
    assert "restarted 3 times without a new checkpoint (latest: step_00000005); the last end: rank 1 died" in ended.out
    # A person has fixed it and submits it again: the count starts over.
    machine.run_slurm()
    assert machine.num_requeued() == 10


def test_a_run_that_never_reached_a_checkpoint_ends_too(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "kill -KILL $$")
    for _ in range(4):
        ended = machine.run_slurm()
    assert machine.num_requeued() == 3
    assert ended.code == 137


# ---------------------------------------------------------------------------
# What a run folder or the environment says is text


SUBSCRIPT = "BASH_VERSINFO[$(touch TRACE)]"


@pytest.mark.parametrize(
    "notes", [f"step_00000004 {SUBSCRIPT}", f"{SUBSCRIPT} {SUBSCRIPT}", "step_00000004 idle", "step_00000004 08", "\0"]
)
def test_no_number_of_a_run_folder_is_evaluated(notes: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path, "kill -KILL $$")
    machine.set_latest(4)
    (machine.run_folder / "idle_restarts").write_text(notes.replace("TRACE", str(tmp_path / "trace")) + "\n")
    ended = machine.run_slurm()
    assert not (tmp_path / "trace").exists()
    again = "08" not in notes  # which is a count of 8, past the three that are allowed
    assert (ended.code, machine.num_requeued()) == ((0, 1) if again else (137, 0)), ended.out
    if again:
        assert (machine.run_folder / "idle_restarts").read_text() == "step_00000004 0\n"


@pytest.mark.parametrize("name", ["idle_restarts", "requeue", "checkpoints/latest"])
def test_no_link_and_no_pipe_of_a_run_folder_is_followed(name: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path, "exit 137")
    (tmp_path / "key").write_text("my private key\n")
    (machine.run_folder / "checkpoints").mkdir()
    (machine.run_folder / name).symlink_to(tmp_path / "key")
    assert "my private key" not in machine.run_slurm().out
    assert (tmp_path / "key").read_text() == "my private key\n"
    (machine.run_folder / name).unlink()
    os.mkfifo(machine.run_folder / name)
    assert machine.run_slurm().code == 0  # and does not wait
    assert machine.num_requeued() == 2


def test_what_a_run_folder_says_moves_no_cursor(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "printf 'died \\e]0;title\\a\\nnext' >$folder/requeue; exit 75")
    (machine.run_folder / "checkpoints").mkdir()
    (machine.run_folder / "checkpoints" / "latest").write_text("\033[2J")
    assert "runs again from none: died ?]0;title?\n" in machine.run_slurm().out


@pytest.mark.parametrize(
    "name", ["MAX_IDLE_RESTARTS", "WAIT_SECONDS", "RESTART_SECONDS", "MASTER_PORT", "SLURM_JOB_ID"]
)
def test_no_number_of_the_environment_is_evaluated(name: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path, "exit 75")
    planted = {name: SUBSCRIPT.replace("TRACE", str(tmp_path / "trace"))}
    slurm = {"SLURM_SUBMIT_DIR": str(REPOSITORY), "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "a"}
    for script, more in ((SLURM, slurm), (HOSTFILE, {})):
        job = machine.start(script, str(machine.run_folder), "--config", "x", **(more | planted))
        assert machine.wait(job).code == 2
    said = machine.wait(job).out.splitlines()
    assert len(said) == 2
    assert all(f": {name}: expected a whole number" in line for line in said)
    assert not (tmp_path / "trace").exists()


def test_no_argument_of_another_host_is_evaluated(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "")
    for place in range(5):
        arguments = ["0", "1", "1", "a", "29500"]
        arguments[place] = SUBSCRIPT.replace("TRACE", str(tmp_path / "trace"))
        assert machine.wait(machine.start(HOSTFILE, "--ranks-of-this-host", *arguments, "true")).code == 2
    assert not (tmp_path / "trace").exists()


def test_a_host_is_no_option_of_ssh(tmp_path: Path) -> None:
    option = f"-oProxyCommand=touch${{IFS}}{tmp_path / 'trace'}"
    machine = Machine(tmp_path, "exit 75")
    (tmp_path / "hosts").write_text(f"{option} slots=1\n")
    for arguments in (["--hosts", option], ["--hostfile", str(tmp_path / "hosts")]):
        ended = machine.wait(machine.start(HOSTFILE, *arguments, str(machine.run_folder), "--config", "x"))
        assert ended.code == 2
    slurm = {"SLURM_SUBMIT_DIR": str(REPOSITORY), "SLURM_JOB_ID": "1"}
    for nodes in (option, f"a,{option}"):
        job = machine.start(SLURM, str(machine.run_folder), "--config", "x", SLURM_JOB_NODELIST=nodes, **slurm)
        ended = machine.wait(job)
        assert ended.code == 2
    assert ended.out.count("\n") == 4
    assert not (tmp_path / "logins").exists()
    assert not (tmp_path / "trace").exists()


# ---------------------------------------------------------------------------
# Signals under Slurm


def test_the_warning_reaches_every_rank_and_the_job_is_requeued(tmp_path: Path) -> None:
    machine = Machine(tmp_path, PREEMPTIBLE)
    with no_rank_left(machine):
        job = machine.start_slurm(num_tasks=3)
        wait_until(lambda: len(list(tmp_path.glob("ready.*"))) == 3)
        job.send_signal(signal.SIGUSR1)
        ended = machine.wait(job)
    assert [(tmp_path / f"signals.{rank}").read_text() for rank in range(3)] == ["USR1\n"] * 3
    assert ended.code == 0
    assert machine.num_requeued() == 1
    assert "runs again from none: told by USR1" in ended.out


def test_a_cancelled_job_is_not_requeued(tmp_path: Path) -> None:
    machine = Machine(tmp_path, PREEMPTIBLE)
    with no_rank_left(machine):
        job = machine.start_slurm()
        wait_until(lambda: len(list(tmp_path.glob("ready.*"))) == 2)
        # As scancel does: the script, and the tasks past srun.
        job.send_signal(signal.SIGTERM)
        for task in _ranks(machine):
            os.kill(task, signal.SIGTERM)
        ended = machine.wait(job)
    assert ended.code == 75
    assert machine.num_requeued() == 0
    assert [(tmp_path / f"signals.{rank}").read_text() for rank in range(2)] == ["TERM\n"] * 2


def _ranks(machine: Machine) -> list[int]:
    rank = f"{machine.folder}/bin/rank".encode()
    commands = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            commands[int(process.name)] = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
    return [pid for pid, command in commands.items() if command[:2] == [b"bash", rank]]


def test_ranks_of_a_job_know_their_places(tmp_path: Path) -> None:
    machine = Machine(tmp_path, NOTE)
    assert machine.wait(machine.start_slurm("--config", "a b.yaml", "train.num_steps=3")).code == 0
    for rank, note in enumerate(machine.notes()):
        assert {name: note[name] for name in NAMES[:6]} == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }
        arguments = f"cfpretrain/train.py --config a b.yaml train.num_steps=3 run.folder={machine.run_folder}"
        assert note["arguments"] == arguments
    assert len(machine.notes()) == 2


# ---------------------------------------------------------------------------
# Over ssh


def test_the_hostfile_comes_from_a_list_a_file_or_the_batch_system(tmp_path: Path) -> None:
    def print_hosts(*arguments: str, **environment: str) -> str:
        machine = Machine(tmp_path / str(len(list(tmp_path.iterdir()))), "")
        ended = machine.wait(machine.start(HOSTFILE, *arguments, "--print", **environment))
        assert ended.code == 0, ended.out
        return ended.out

    assert print_hosts("--hosts", "a:8,b", "--slots", "2") == "a slots=8\nb slots=2\n"
    (tmp_path / "hosts").write_text("# two\na slots=4\n\nb   slots=4 # the other\n")
    assert print_hosts("--hostfile", str(tmp_path / "hosts")) == "a slots=4\nb slots=4\n"
    (tmp_path / "pbs").write_text("a\na\nb\nb\n")
    assert print_hosts("--slots", "8", PBS_NODEFILE=str(tmp_path / "pbs")) == "a slots=8\nb slots=8\n"
    assert print_hosts("--slots", "8", SLURM_JOB_NODELIST="a,b") == "a slots=8\nb slots=8\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--config", "x"], "no hosts: give --hosts"),
        (["--hosts"], "--hosts: expected a value"),
        (["--hosts", "a:many", "run", "--config", "x"], "expected host:N or host slots=N, got slots=many"),
        (["--hosts", "a", "--slots", "0", "run", "--config", "x"], "--slots: expected a number from 1, got 0"),
        (["--hostfile", "/nowhere", "run", "--config", "x"], "/nowhere cannot be read"),
        (["--hosts", "a", "--config", "x"], "--config: unknown option"),
        (["--hosts", "localhost,b", "run", "--config", "x"], "the others know, got localhost"),
        (["--hosts", "a:1"], "usage: "),
    ],
)
def test_mistakes_are_one_line_and_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path, "")
    ended = machine.wait(machine.start(HOSTFILE, *arguments))
    assert ended.code == 2
    assert ended.out.startswith("hostfile.sh: ")
    assert message in ended.out
    assert ended.out.count("\n") == 1


def run_over_ssh(machine: Machine, hosts: str, **environment: str) -> subprocess.Popen[str]:
    return machine.start(HOSTFILE, "--hosts", hosts, str(machine.run_folder), "--config", "a b.yaml", **environment)


def test_ranks_of_all_hosts_know_their_places_and_the_settings_but_no_secret(tmp_path: Path) -> None:
    machine = Machine(tmp_path, NOTE)
    machine.environment["PYTHON"] = str(tmp_path / "bin" / "rank")
    ended = machine.wait(run_over_ssh(machine, "a:1,b:2", NCCL_DEBUG="a 'b", MY_SECRET="key", OMP_NUM_THREADS="3"))
    assert ended.code == 0, ended.out
    assert sorted((tmp_path / "logins").read_text().split()) == ["a", "b"]
    places = [(note["RANK"], note["LOCAL_RANK"], note["LOCAL_SIZE"]) for note in machine.notes()]
    assert places == [("0", "0", "1"), ("1", "0", "2"), ("2", "1", "2")]
    for note in machine.notes():
        assert (note["WORLD_SIZE"], note["MASTER_ADDR"], note["OMP_NUM_THREADS"]) == ("3", "a", "3")
        assert (note["NCCL_DEBUG"], note["MY_SECRET"]) == ("a 'b", "")
        assert note["arguments"] == f"cfpretrain/train.py --config a b.yaml run.folder={machine.run_folder}"


def test_a_rank_that_dies_starts_the_run_again(tmp_path: Path) -> None:
    """The second start is the last: the first left its traces."""
    machine = Machine(
        tmp_path,
        """
        if [[ -e $folder/again.$RANK ]]; then exit 0; fi
        touch "$folder/again.$RANK"
        if [[ $RANK == 1 ]]; then kill -KILL $$; fi
        echo "rank 1 died" >"$folder/requeue"; exit 75""",
    )
    ended = machine.wait(run_over_ssh(machine, "a:1,b:1"))
    assert ended.code == 0, ended.out
    assert "runs again from none: rank 1 died" in ended.out
    assert ended.out.count("2 ranks on a b") == 2


def test_a_rank_that_hangs_while_others_ended_is_killed(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "trap '' TERM; if [[ $RANK == 1 ]]; then sleep 600; fi; exit 3")
    with no_rank_left(machine):
        ended = machine.wait(run_over_ssh(machine, "localhost:2", WAIT_SECONDS="1", MAX_IDLE_RESTARTS="0"))
    # 137 counts as killed; this one is not to be restarted without progress.
    assert ended.code == 137
    assert "restarted 0 times without a new checkpoint" in ended.out


@pytest.mark.parametrize(("told", "heard"), [("SIGUSR1", "USR1"), ("SIGTERM", "TERM"), ("SIGINT", "TERM")])
def test_a_signal_reaches_the_ranks_of_all_hosts(told: str, heard: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path, PREEMPTIBLE)
    with no_rank_left(machine):
        job = run_over_ssh(machine, "a:1,b:2")
        wait_until(lambda: len(list(tmp_path.glob("ready.*"))) == 3)
        job.send_signal(getattr(signal, told))
        ended = machine.wait(job)
    assert [(tmp_path / f"signals.{rank}").read_text() for rank in range(3)] == [f"{heard}\n"] * 3
    assert ended.code == 75
    assert "the same command goes on" in ended.out


def test_ranks_end_when_the_script_is_gone(tmp_path: Path) -> None:
    machine = Machine(tmp_path, PREEMPTIBLE)
    with no_rank_left(machine):
        job = run_over_ssh(machine, "a:1,localhost:2")
        wait_until(lambda: len(list(tmp_path.glob("ready.*"))) == 3)
        job.kill()
        job.wait()
        wait_until(lambda: len(list(tmp_path.glob("signals.*"))) == 3)
    assert [(tmp_path / f"signals.{rank}").read_text() for rank in range(3)] == ["TERM\n"] * 3


# ---------------------------------------------------------------------------
# Real training


@pytest.mark.slow
def test_a_preempted_job_is_requeued_and_completes(tmp_path: Path) -> None:
    """Two ranks, warned in the middle of training: each step once, and nothing left to requeue on."""
    machine = Machine(tmp_path, None)
    arguments = small_run(write_digits(tmp_path / "digits"), machine.run_folder, "train.num_steps=60")
    with no_rank_left(machine):
        job = machine.start_slurm(*arguments)
        wait_until(lambda: job.poll() is not None or _num_rows(machine.run_folder) >= 3, 240)
        job.send_signal(signal.SIGUSR1)
        ended = machine.wait(job, 240)
        assert ended.code == 0, ended.out
        assert machine.num_requeued() == 1, ended.out
        assert "runs again from step_000000" in ended.out
        assert 3 <= _num_rows(machine.run_folder) < 60

        ended = machine.wait(machine.start_slurm(*arguments), 240)
    assert ended.code == 0, ended.out
    assert machine.num_requeued() == 1
    assert "is complete" in ended.out
    assert not (machine.run_folder / "requeue").exists()
    assert not (machine.run_folder / "idle_restarts").exists()
    steps = [json.loads(line)["step"] for line in (machine.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 61))


def _num_rows(run_folder: Path) -> int:
    metrics = run_folder / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0
