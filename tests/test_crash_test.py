"""tools/crash_test.py: its accounts, and that it finds what broken resumes do; real training when slow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file

from tests.digits import small_run, write_digits
from tests.processes import REPOSITORY, wait_until
from tools import crash_test
from tools.compare_runs import Row
from tools.crashing import accounts
from tools.crashing import command as watched
from tools.crashing.accounts import Attempt, CampaignError
from tools.crashing.command import Command

# ---------------------------------------------------------------------------
# Plan and accounts


def test_kills_repeat_with_the_seed_and_are_of_all_kinds() -> None:
    kills = crash_test.plan_kills(7, 50, 1000)
    assert kills == crash_test.plan_kills(7, 50, 1000)
    assert kills != crash_test.plan_kills(8, 50, 1000)
    assert len(kills) == 50
    assert [kill.step for kill in kills] == sorted(kill.step for kill in kills)
    assert kills[0].step > 0
    assert kills[-1].step <= 950
    assert {kill.moment for kill in kills} == set(crash_test.MOMENTS)
    assert {kill.target for kill in kills} == set(crash_test.TARGETS)
    assert {kill.target for kill in crash_test.plan_kills(7, 9, 1000, ("rank",))} == {"rank"}


def make_rows(batches: list[list[int]], epochs: list[int]) -> list[Row]:
    """Rows of steps from 1; `epochs` as the trainer logs them: where the next batch lies."""
    return [
        {
            "step": i + 1,
            "loss": 2.0 - i / 8,
            "grad_norm": 1.0,
            "learning_rate": 0.1,
            "epoch": epoch,
            "num_skipped_steps": 0,
            "sample_ids": batch,
            "images_per_second": 4.0,
            "train_seconds": (i + 1) * 0.6,
        }
        for i, (batch, epoch) in enumerate(zip(batches, epochs, strict=True))
    ]


# Two epochs of five samples in batches of two: sample 4 is the tail of the first, sample 0 that of the second.
WHOLE = make_rows([[0, 1], [2, 3], [4, 3], [2, 1]], [0, 1, 1, 2])


@pytest.mark.parametrize(
    ("batches", "epochs", "lost", "doubled"),
    [
        ([[0, 1], [2, 3], [4, 3], [2, 1]], [0, 1, 1, 2], 0, 0),
        ([[0, 1], [0, 1], [4, 3], [2, 1]], [0, 1, 1, 2], 2, 2),  # the place in the epoch was forgotten
        ([[0, 1], [2, 3], [2, 1]], [0, 1, 2], 2, 0),  # a step is missing
        ([[0, 1], [4, 3], [2, 1], [0, 1]], [1, 1, 2, 2], 2, 0),  # the rest of an epoch was left out
        ([[0, 1], [2, 3], [4, 3], [4, 3], [2, 1]], [0, 1, 1, 1, 2], 0, 2),  # a step came twice
    ],
)
def test_samples_lost_and_doubled(batches: list[list[int]], epochs: list[int], lost: int, doubled: int) -> None:
    assert accounts.account_samples(make_rows(batches, epochs), WHOLE) == (lost, doubled)


def test_a_run_left_alone_that_repeats_samples_is_no_measure() -> None:
    wrong = make_rows([[0, 1], [1, 2]], [0, 1])
    with pytest.raises(CampaignError, match=r"samples \[1\] twice in epoch 0"):
        accounts.account_samples(wrong, wrong)


def test_numbers_repeat_bit_by_bit_and_speed_is_none_of_them() -> None:
    assert accounts.numbers(WHOLE) == accounts.numbers([row | {"images_per_second": 1.0} for row in WHOLE])
    assert accounts.numbers(WHOLE) != accounts.numbers([row | {"grad_norm": 1.0 + 2**-52} for row in WHOLE])


def test_seconds_are_all_accounted_for() -> None:
    """Killed at 10 s while starting, at 18 s in step 3 (of which 1 and 2 were kept), then from step 2 to the end."""
    attempts = [
        Attempt(2, 0.0, killed=10.0, ended=10.5),
        Attempt(2, 11.0, trained=15.0, from_step=0, first_step=16.0, last_row=17.5, killed=18.0, ended=20.0),
        Attempt(2, 20.0, trained=25.0, from_step=2, first_step=25.5, last_row=26.25, ended=27.0),
    ]
    # Steps take 0.5 s, and 0.1 s each goes to checkpoints.
    where = accounts.account_time(attempts, WHOLE, 2)
    assert where == pytest.approx(
        {
            "steps": 2.0,
            "checkpoints_and_samples": 0.4,
            "redone": 3.0 + 1.25 - 2.4,
            "start": 10.0 + 4.0 + 5.0,
            "stop": 0.5 + 2.0,
            "close": 0.75,
            "between": 0.5,
        }
    )
    assert sum(where.values()) == pytest.approx(27.0)
    # A row that closes a window of two speaks for both.
    sparse = [{k: v for k, v in row.items() if k != "images_per_second" or row["step"] % 2 == 0} for row in WHOLE]
    assert accounts.step_seconds(sparse, 2) == pytest.approx(2.0)


def write_checkpoint(run_folder: Path, values: dict[str, np.ndarray]) -> None:
    folder = run_folder / "checkpoints" / "step_00000004"
    folder.mkdir(parents=True, exist_ok=True)
    for content in ("weights", "ema", "exp_avg", "exp_avg_sq"):
        save_file(values, folder / f"{content}.safetensors")
    (run_folder / "checkpoints" / "latest").write_text("step_00000004\n")


def test_one_bit_of_a_tensor_makes_checkpoints_unequal(tmp_path: Path) -> None:
    values = {"a": np.arange(4, dtype=np.float32), "b": np.zeros(2, dtype=np.float32)}
    for name in ("ours", "theirs"):
        write_checkpoint(tmp_path / name, values)
    assert all(accounts.equal_tensors(tmp_path / "ours", tmp_path / "theirs").values())
    # -0.0 == 0.0, and yet it is another number.
    changed = values | {"b": np.array([0.0, -0.0], dtype=np.float32)}
    save_file(changed, tmp_path / "ours" / "checkpoints" / "step_00000004" / "ema.safetensors")
    equal = accounts.equal_tensors(tmp_path / "ours", tmp_path / "theirs")
    assert equal == {"weights": True, "ema": False, "exp_avg": True, "exp_avg_sq": True}


def test_the_last_step_is_that_of_the_last_whole_row(tmp_path: Path) -> None:
    assert watched.last_step_on_disk(tmp_path) == 0
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("")
    assert watched.last_step_on_disk(tmp_path) == 0
    metrics.write_text('{"step": 1, "loss": 2.0}\n{"step": 12, "loss": 1.0}\n{"step": 13, "lo')
    assert watched.last_step_on_disk(tmp_path) == 12


# ---------------------------------------------------------------------------
# Processes


def test_processes_are_found_by_their_marker_orphans_too(tmp_path: Path) -> None:
    """A launcher with two ranks, one of them with a worker that has its environment; then the launcher is gone."""
    script = tmp_path / "tree.sh"
    script.write_text('RANK=1 bash -c "echo $$ >/dev/null; sleep 60 & wait" &\nRANK=0 sleep 60 &\ntouch "$1"\nwait\n')
    environment = os.environ | {watched._MARKER: "mine"}
    launcher = subprocess.Popen(["bash", str(script), str(tmp_path / "ready")], env=environment)
    other = subprocess.Popen(["sleep", "60"], env=os.environ | {watched._MARKER: "theirs", "RANK": "0"})
    try:
        wait_until(lambda: len(watched.our_processes("mine")[0]) == 2)
        ranks, launchers = watched.our_processes("mine")
        assert launchers == [launcher.pid]
        commands = [Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0] for pid in ranks]
        assert commands == [b"sleep", b"bash"]
        watched.kill(launchers)
        launcher.wait()
        assert watched.our_processes("mine") == (ranks, [])
    finally:
        for process in psutil.process_iter(["environ"]):
            if (process.info["environ"] or {}).get(watched._MARKER) == "mine":
                watched.kill([process.pid])
        other.kill()
        other.wait()
    # A killed orphan is there until the system has collected it.
    wait_until(lambda: watched.our_processes("mine") == ([], []))


def test_a_kill_spares_the_orphans_of_the_start_before(tmp_path: Path) -> None:
    """They may still be ending when the command begins again, and are not what is to be killed."""
    orphan = subprocess.Popen(["sleep", "60"], env=os.environ | {watched._MARKER: "campaign", "RANK": "0"})
    command = Command(["sleep", "60"], tmp_path, "campaign", 1, tmp_path / "log")
    try:
        wait_until(lambda: bool(watched.our_processes(command._start, watched._START)[1]))
        command.strike("start", "ranks", 0.5)
        command.wait_for_end()
        assert command.attempt.kill == ("start", "node")
        assert orphan.poll() is None
    finally:
        orphan.kill()
        orphan.wait()


# ---------------------------------------------------------------------------
# A campaign on a small program that stands for training

TRAINING = '''
"""Says, writes and resumes as training does; `bug` names what it gets wrong after a resume."""
import fcntl, json, os, subprocess, sys, time
folder, bug, role = sys.argv[1:]
os.makedirs(f"{folder}/checkpoints", exist_ok=True)
if role == "launcher":
    command = [sys.executable, __file__, folder, bug, str(os.getpid())]
    rank = subprocess.Popen(command, env=os.environ | {"RANK": "0"})
    sys.exit(abs(rank.wait()))
lock = open(f"{folder}/lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
import numpy as np
from safetensors.numpy import save_file

def say(text): print("[cfpretrain]", text, flush=True)

def save(step, weight):
    final = f"{folder}/checkpoints/step_{step:08d}"
    if os.path.exists(final): return
    os.makedirs(final + ".partial", exist_ok=True)
    time.sleep(0.02)
    for content in ("weights", "ema", "exp_avg", "exp_avg_sq"):
        save_file({"w": np.array([weight], np.float32)}, f"{final}.partial/{content}.safetensors")
    os.rename(final + ".partial", final)
    with open(f"{folder}/checkpoints/latest.partial", "w") as file: file.write(f"step_{step:08d}")
    os.rename(f"{folder}/checkpoints/latest.partial", f"{folder}/checkpoints/latest")

begin, weight, rows = 0, np.float32(1), []
if os.path.exists(f"{folder}/checkpoints/latest"):
    with open(f"{folder}/checkpoints/latest") as file: name = file.read().strip()
    from safetensors.numpy import load_file
    say(f"resuming from {name}")
    begin, weight = int(name[5:]), load_file(f"{folder}/checkpoints/{name}/weights.safetensors")["w"][0]
    with open(f"{folder}/metrics.jsonl") as file: rows = [json.loads(line) for line in file if line.endswith("\\n")]
    if bug == "rounds": weight = np.float32(weight * np.float32(1 + 1e-6))
else:
    say("initialising the weights")
with open(f"{folder}/config.yaml", "w") as file: file.write("train: {global_batch_size: 2}")
with open(f"{folder}/metrics.jsonl", "w") as file:
    file.writelines(json.dumps(row) + "\\n" for row in rows if row["step"] <= begin)
say(f"training from step {begin} to 120")
for step in range(begin + 1, 121):
    time.sleep(0.005 if step <= 110 else 0.05)  # kills that are late come before the end, on a busy machine too
    weight = np.float32(weight * np.float32(0.99))
    # One place is lost and another seen twice, wherever in an epoch it resumes.
    place = (step - 1 + (bug == "jumps" and begin < step <= begin + 5 and begin > 0)) % 30
    row = dict(step=step, loss=float(weight), grad_norm=1.0, learning_rate=0.1, epoch=step // 30, num_skipped_steps=0,
               sample_ids=[2 * place, 2 * place + 1], images_per_second=400.0, train_seconds=step * 0.006)
    with open(f"{folder}/metrics.jsonl", "a") as file: file.write(json.dumps(row) + "\\n")
    if step % 10 == 0: save(step, weight)
    if step % 25 == 0 or step == 120:
        say("sampling 2 images")
        time.sleep(0.02)
    if os.getppid() != int(role):
        with open(f"{folder}/requeue", "w") as file: file.write("the launcher is gone")
        os._exit(75)
    if bug == "dies" and step == 50: sys.exit("bad luck")
say("done: step 120")
'''


def run_campaign(folder: Path, bug: str, num_kills: int) -> tuple[dict[str, object], bool]:
    out, program = folder / "out", folder / "training.py"
    out.mkdir()
    program.write_text(TRAINING)

    def start(name: str, num_ranks: int) -> Command:
        arguments = [sys.executable, str(program), str(out / name), bug if name == "killed" else "", "launcher"]
        return Command(arguments, out / name, str(folder), num_ranks, out / "output.log")

    alone = crash_test.run_alone(start, "alone", 1)
    kills = crash_test.plan_kills(0, num_kills, alone.last_step)
    attempts = crash_test.run_campaign(start, "killed", kills, [1], crash_test.usual_seconds(alone))
    assert watched.count_orphans(str(folder)) == 0
    return accounts.report(out, attempts, num_kills, [])


def test_a_campaign_on_a_sound_program_is_well(tmp_path: Path) -> None:
    found, good = run_campaign(tmp_path, "", 14)
    assert good, found
    assert found["kills"] == 14
    assert found["restarts"] == 14 + int(str(found["unplanned_ends"]))
    assert set(found["moments"]) == set(crash_test.MOMENTS)  # type: ignore[call-overload]
    assert (found["lost"], found["doubled"], found["max_relative_loss_error"]) == (0, 0, 0.0)
    where, seconds = found["where"], float(str(found["seconds"]))
    assert sum(where.values()) == pytest.approx(seconds, abs=0.5)  # type: ignore[attr-defined]


def test_a_campaign_finds_a_forgotten_place_in_the_data(tmp_path: Path) -> None:
    found, good = run_campaign(tmp_path, "jumps", 4)
    assert not good
    assert int(str(found["lost"])) > 0
    assert found["weights_equal"] is True


def test_a_campaign_finds_weights_that_changed_in_the_last_bits(tmp_path: Path) -> None:
    found, good = run_campaign(tmp_path, "rounds", 4)
    assert not good
    assert (found["lost"], found["doubled"]) == (0, 0)
    assert not found["loss_equal"]
    assert not found["weights_equal"]
    assert 0 < float(str(found["max_relative_loss_error"])) < 1e-4


def test_a_run_that_ends_by_itself_ends_the_campaign(tmp_path: Path) -> None:
    with pytest.raises(CampaignError, match=r"ended by itself with exit code 1(?s:.*)bad luck"):
        run_campaign(tmp_path, "dies", 0)


def test_a_command_that_stands_still_ends_the_campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "_PATIENCE_SECONDS", 0.2)
    command = Command(["sleep", "60"], tmp_path, "still", 1, tmp_path / "log")
    try:
        with pytest.raises(CampaignError, match="no new step and no end"):
            crash_test.reach(command, crash_test.Kill("step", "rank", 1, 9, 0.0), {"step": 1.0})
    finally:
        command._process.kill()
        command._process.wait()


# ---------------------------------------------------------------------------
# The command line


def test_mistakes_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--config", "x.yaml", "--out", str(tmp_path)]
    assert crash_test.parse([*given, "--ranks", "2,1", "train.num_steps=3"]).ranks == [2, 1]
    for wrong in (["--ranks", "two"], ["--ranks", "0"], ["--targets", "rank,gpu"], ["--kills", "-1"]):
        with pytest.raises(SystemExit, match="2"):
            crash_test.parse([*given, *wrong])
    assert "expected numbers from 1 with commas between, got two" in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(crash_test.UserError, match="--out: expected a new folder"):
        crash_test.run(crash_test.parse(given))


@pytest.mark.slow
def test_three_kills_of_real_training(tmp_path: Path) -> None:
    """Under the deepspeed launcher on 2 ranks: bit-identical to a run left alone, nothing lost or doubled."""
    config, path, *overrides = small_run(write_digits(tmp_path / "digits"), tmp_path / "unused", "train.num_steps=300")
    overrides += ["checkpoint.every_steps=20", "sample.every_steps=50", "guard.rank_timeout_seconds=60"]
    options = ["--kills", "3", "--seed", "1", "--out", str(tmp_path / "out")]
    ended = subprocess.run(
        [sys.executable, "tools/crash_test.py", *options, config, path, *overrides],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert (found["kills"], found["lost"], found["doubled"]) == (3, 0, 0)
    assert found["loss_equal"]
    assert found["weights_equal"]
    assert found["ema_equal"]
    assert found["max_relative_loss_error"] == 0.0
