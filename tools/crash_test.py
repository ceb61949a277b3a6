"""Kills a training run again and again, restarts it with the same command, and compares it with a run left alone.

    python tools/crash_test.py --kills 50 --out runs/crash --config configs/tiny.yaml [key.sub=value ...]

It sees what a user sees: the command, its output, the run folder and the processes. Each kill is a SIGKILL at a random
moment (while starting, while the loader starts, in steps, in the write of a checkpoint, in sampling) to one rank, all
ranks, the launcher alone, or all of them. `--ranks 2,1,4` restarts with another of these numbers each time; a second
run left alone, on the next number, then says how much the order of summation changes by itself.

Exit code 0: every step and sample is there once, and the numbers are those of the run left alone (bit for bit where the
number of ranks stays). The last line is JSON: `lost` and `doubled` count samples, `where` says what the seconds of the
campaign went into, `goodput` is the share of the steps that were kept. `--out` keeps both runs and the whole output.
"""

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cfpretrain
from cfpretrain.base import files
from cfpretrain.base.command_line import Parser, add_config
from cfpretrain.base.console import UserError, exit_with, path_argument

MOMENTS = ("start", "loader", "step", "step", "checkpoint", "checkpoint", "sampling")  # as often as they stand there
TARGETS = ("rank", "ranks", "launcher", "node")

_MARKER = "CFPRETRAIN_CRASH_TEST"  # in the environment of everything we start, so that orphans are found as well
_START = "CFPRETRAIN_CRASH_TEST_START"  # of one start of the command, which orphans of the one before do not carry
_POLL_SECONDS = 0.02
_QUICK_POLL_SECONDS = 0.002  # for what is over in a moment: a checkpoint of a small model
_PATIENCE_SECONDS = 900.0  # without a new step, or an end that is due
_ORPHAN_SECONDS = 90.0  # as long a rank may outlive the run that it belonged to
_WRITE_SECONDS = 0.1  # after the write of a checkpoint has begun, the kill comes within
_MAX_UNPLANNED_IN_ROW = 3
_READ_SECONDS = 2.0  # for the last lines of a command that has ended
# Summation order alone changes losses by as much within the first steps, in fp32.
_RELATIVE_ERROR = 1e-5


class CampaignError(Exception):
    """The run did something that ends the campaign."""


# ---------------------------------------------------------------------------
# What to kill, and when


@dataclass(frozen=True)
class Kill:
    """One planned kill.

    Attributes:
        moment: one of MOMENTS.
        target: one of TARGETS.
        step: not before this step is done; means nothing for "start" and "loader".
        last_step: once it is done the kill comes at once: a run that is complete cannot be killed.
        share: a random number in [0, 1), for the place within the moment and the choice of the rank.
    """

    moment: str
    target: str
    step: int
    last_step: int
    share: float


def plan_kills(seed: int, num_kills: int, num_steps: int, targets: Sequence[str] = TARGETS) -> list[Kill]:
    """Kills spread over a run, each moment and target about as often as it stands in its list."""
    draw = random.Random(f"{seed} kills")
    latest = max(1, num_steps * 19 // 20)
    steps = sorted(draw.randint(1, latest) for _ in range(num_kills))
    moments, sides = _deck(draw, MOMENTS, num_kills), _deck(draw, targets, num_kills)
    return [Kill(m, t, s, latest, draw.random()) for m, t, s in zip(moments, sides, steps, strict=True)]


def _deck(draw: random.Random, cards: Sequence[str], count: int) -> list[str]:
    dealt: list[str] = []
    while len(dealt) < count:
        dealt += draw.sample(cards, len(cards))
    return dealt[:count]


# ---------------------------------------------------------------------------
# Processes


def our_processes(marker: str, variable: str = _MARKER) -> tuple[list[int], list[int]]:
    """Process ids of ranks (in the order of ranks) and of launchers among everything started with a marker."""
    ranks: dict[int, tuple[int, int]] = {}
    launchers = []
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        found = _look_at(pid, f"{variable}={marker}")
        if found is None:
            continue
        rank, parent = found
        if rank is None:
            launchers.append(pid)
        else:
            ranks[pid] = rank, parent
    # A rank's own children (workers, wandb) carry its environment too.
    own = [(rank, pid) for pid, (rank, parent) in ranks.items() if parent not in ranks]
    return [pid for _, pid in sorted(own)], launchers


def _look_at(pid: int, marked: str) -> tuple[int | None, int] | None:
    """The rank (None: a launcher) and parent of a live process that carries the marker."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    if marked not in environment or state == "Z":
        return None
    rank = next((line.partition("=")[2] for line in environment if line.startswith("RANK=")), None)
    return (None if rank is None else int(rank)), int(parent)


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


# ---------------------------------------------------------------------------
# One start of the command


@dataclass
class Attempt:
    """One start of the command, to its end; times are of `time.monotonic`.

    Attributes:
        num_ranks: it was started with.
        began, ended: the command's start and end.
        built: when the model stood and its weights were to be filled; the loader comes next.
        trained: when it entered the loop, at step `from_step`.
        first_step: when the first new row of metrics was on disk.
        killed: when our kill struck.
        last_step: the last step seen.
        kill: what was done: moment, target.
    """

    num_ranks: int
    began: float
    built: float | None = None
    trained: float | None = None
    from_step: int | None = None
    first_step: float | None = None
    last_row: float | None = None
    killed: float | None = None
    ended: float | None = None
    last_step: int = 0
    kill: tuple[str, str] | None = None
    code: int | None = None
    sampling_seconds: list[float] = field(default_factory=list)


class Command:
    """The training command under way: its output is read by a thread, its run folder is watched by `watch`.

    Args:
        arguments: the command line.
        folder: its run folder.
        marker: goes into the environment.
        num_ranks: noted.
        log: the output's copy.
    """

    def __init__(self, arguments: list[str], folder: Path, marker: str, num_ranks: int, log: Path) -> None:
        self.folder, self.marker = folder, marker
        self.attempt = Attempt(num_ranks, time.monotonic())
        self.lines: list[str] = []
        self._start = uuid.uuid4().hex
        self._log = os.fdopen(files.open_to_change(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "w")
        self._log.write(f"--- {' '.join(arguments)}\n")
        self._process = subprocess.Popen(
            arguments,
            env=os.environ | {_MARKER: marker, _START: self._start},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._sampling_since: float | None = None
        self._metrics_size = -1
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        # Goes on after the command's end for as long as orphans of it write.
        assert self._process.stdout is not None
        with self._log, self._process.stdout as stream:
            for line in stream:
                self._log.write(line)
                self._log.flush()
                self._note(line.rstrip())

    def _note(self, line: str) -> None:
        entered = re.search(r"training from step (\d+) to", line)
        if entered:
            self.attempt.from_step = self.attempt.last_step = int(entered[1])
            self.attempt.trained = time.monotonic()
        if "resuming from" in line or "initialising the weights" in line:
            self.attempt.built = self.attempt.built or time.monotonic()
        if "[cfpretrain] sampling" in line:
            self._sampling_since = time.monotonic()
        self.lines.append(line)

    def is_complete(self) -> bool:
        """Whether the command, which has ended, has ended its run."""
        self._reader.join(_READ_SECONDS)
        return self.attempt.code == 0 and self.has("done: step", "nothing to do: ")

    def has(self, *parts: str) -> bool:
        """Whether a line with one of these parts has been read."""
        return any(part in line for line in list(self.lines) for part in parts)

    def watch(self) -> bool:
        """Looks once: notes new steps; False when the command has ended."""
        attempt = self.attempt
        step = self._look_for_steps() if attempt.trained else 0
        if step > attempt.last_step:
            attempt.last_step, attempt.last_row = step, time.monotonic()
            attempt.first_step = attempt.first_step or attempt.last_row
            if self._sampling_since is not None:
                attempt.sampling_seconds.append(attempt.last_row - self._sampling_since)
                self._sampling_since = None
        if self._process.poll() is None:
            quiet_since = attempt.killed or attempt.last_row or attempt.began
            if time.monotonic() - quiet_since > _PATIENCE_SECONDS:
                raise CampaignError(f"no new step and no end for {_PATIENCE_SECONDS:.0f} s{self.tail()}")
            return True
        attempt.code = self._process.returncode
        attempt.ended = attempt.ended or time.monotonic()
        return False

    def _look_for_steps(self) -> int:
        try:
            size = (self.folder / "metrics.jsonl").stat().st_size
        except FileNotFoundError:
            return 0
        if size == self._metrics_size:
            return self.attempt.last_step
        self._metrics_size = size
        return last_step_on_disk(self.folder)

    def wait_until(self, condition: Callable[[], bool], poll_seconds: float = _POLL_SECONDS) -> bool:
        """Watches until a condition holds; False where the command ended before."""
        while not condition():
            if not self.watch():
                return False
            time.sleep(poll_seconds)
        return True

    def strike(self, kill: Kill, moment: str) -> None:
        """Kills what is to be killed, with what there is of it."""
        ranks, launchers = our_processes(self._start, _START)
        target = kill.target if ranks else "node"
        self.attempt.killed = time.monotonic()
        if target == "rank":
            _kill([ranks[int(kill.share * len(ranks))]])
        elif target == "ranks":
            _kill(ranks)
        elif target == "launcher":
            _kill(launchers)
        else:
            _kill(launchers + ranks)
        self.attempt.kill = (moment, target)

    def tail(self) -> str:
        """The end of the output."""
        self._reader.join(_READ_SECONDS)
        return "".join(f"\n    | {line}" for line in self.lines[-25:])


def last_step_on_disk(folder: Path) -> int:
    """The step of the last whole row of a run's metrics; 0 without one."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(-min(1 << 16, file.seek(0, os.SEEK_END)), os.SEEK_END)
            whole = file.read().rpartition(b"\n")[0]
    except FileNotFoundError:
        return 0
    found = re.findall(rb'"step": (\d+)', whole.rpartition(b"\n")[2])
    return int(found[0]) if found else 0


def _writes_checkpoint(folder: Path) -> bool:
    try:
        return any(name.endswith(".partial") for name in os.listdir(folder / "checkpoints"))
    except FileNotFoundError:
        return False


@dataclass(frozen=True)
class Durations:
    """What the run left alone took, in seconds: random moments lie within."""

    start: float
    loader: float
    step: float
    sampling: float


def reach(command: Command, kill: Kill, usual: Durations) -> str | None:
    """Watches a command until the moment of a kill; returns that moment, None where the command ended before."""
    attempt, moment = command.attempt, kill.moment

    def is_late() -> bool:
        return attempt.last_step >= kill.last_step

    if moment == "start":
        due = attempt.began + kill.share * usual.start
    elif moment == "loader":
        if not command.wait_until(lambda: attempt.built is not None):
            return None
        due = time.monotonic() + kill.share * usual.loader
    else:
        # At least one new step, so that steps are what is killed.
        if not command.wait_until(lambda: attempt.first_step is not None and attempt.last_step >= kill.step):
            return None
        within = 2 * usual.step
        if moment == "checkpoint":
            within = _WRITE_SECONDS
            command.wait_until(lambda: _writes_checkpoint(command.folder) or is_late(), _QUICK_POLL_SECONDS)
        elif moment == "sampling":
            within, seen = usual.sampling, len(command.lines)
            command.wait_until(lambda: any("] sampling" in line for line in command.lines[seen:]) or is_late())
        if is_late():
            moment, within = "step", 0.0
        due = time.monotonic() + kill.share * within
    return moment if command.wait_until(lambda: time.monotonic() >= due, _QUICK_POLL_SECONDS) else None


# ---------------------------------------------------------------------------
# Runs


class Runner:
    """Starts the command and keeps what happened.

    Args:
        configs: the config files.
        overrides: `key.sub=value`, over ours.
        out: where runs and output go.
        port: of the launcher, the same at every start, as a user's is.
    """

    def __init__(self, configs: Sequence[str], overrides: Sequence[str], out: Path, port: int) -> None:
        self._configs, self._overrides, self._out, self._port = configs, overrides, out, port
        self.marker = uuid.uuid4().hex

    def start(self, name: str, num_ranks: int) -> Command:
        """Starts the command for the run folder `name`."""
        train = Path(cfpretrain.__file__).parent / "train.py"
        launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(num_ranks)]
        # The end must be that of the steps: a limit in seconds comes at another step each time.
        ours = ["train.max_train_seconds=0", "metrics.wandb=disabled", "metrics.log_every_steps=1"]
        arguments = [*launcher, "--master_port", str(self._port), str(train)]
        for config in self._configs:
            arguments += ["--config", config]
        arguments += [*ours, *self._overrides, "metrics.log_sample_ids=true", f"run.folder={self._out / name}"]
        return Command(arguments, self._out / name, self.marker, num_ranks, self._out / "output.log")

    def run_alone(self, name: str, num_ranks: int) -> Attempt:
        """A run that nobody kills."""
        _say(f"{name}: {num_ranks} ranks, left alone")
        command = self.start(name, num_ranks)
        while command.watch():
            time.sleep(_POLL_SECONDS)
        attempt = command.attempt
        if not command.is_complete() and attempt.code == 2:
            said = [line.partition("error: ")[2] for line in command.lines if "[cfpretrain] error: " in line]
            raise UserError(said[0] if said else command.tail())
        if not command.is_complete():
            raise CampaignError(f"the run left alone ended with exit code {attempt.code}{command.tail()}")
        assert attempt.ended is not None
        _say(f"{name}: {attempt.last_step} steps in {attempt.ended - attempt.began:.0f} s")
        return attempt

    def run_campaign(self, name: str, kills: list[Kill], num_ranks: Sequence[int], usual: Durations) -> list[Attempt]:
        """A run with these kills, on one of these numbers of ranks at each start, until it is complete."""
        draw = random.Random(f"{kills} ranks")
        attempts: list[Attempt] = []
        planned = list(kills)
        unplanned_in_row = 0
        while True:
            ranks = num_ranks[0] if not attempts else draw.choice(num_ranks)
            command = self.start(name, ranks)
            attempts.append(command.attempt)
            moment = reach(command, planned[0], usual) if planned else None
            if moment is not None:
                command.strike(planned.pop(0), moment)
                unplanned_in_row = 0
            while command.watch():
                time.sleep(_POLL_SECONDS)
            _say(f"{name}: start {len(attempts)} {describe(command.attempt)}")
            if command.attempt.kill is not None:
                continue
            if command.is_complete():
                return attempts
            unplanned_in_row += 1
            if not (command.folder / "requeue").exists() or unplanned_in_row > _MAX_UNPLANNED_IN_ROW:
                raise CampaignError(f"the run ended by itself with exit code {command.attempt.code}{command.tail()}")


def describe(attempt: Attempt) -> str:
    """One line about a start of the command that has ended."""
    assert attempt.ended is not None
    reached = f"steps {attempt.from_step} to {attempt.last_step}" if attempt.trained else "no step"
    if attempt.kill is None or attempt.killed is None:
        end = f"ended with exit code {attempt.code}"
    else:
        moment, target = attempt.kill
        end = f"killed: {target} in {moment}; ended {attempt.ended - attempt.killed:.1f} s later"
    return f"({attempt.num_ranks} ranks): {reached} in {attempt.ended - attempt.began:.1f} s, {end}"


# ---------------------------------------------------------------------------
# Accounts

Row = dict[str, Any]


def read_rows(folder: Path) -> list[Row]:
    """All rows of a complete run's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def ids_by_epoch(rows: list[Row]) -> dict[int, Counter[int]]:
    """How often each sample was trained on, or skipped, in each epoch."""
    found: dict[int, Counter[int]] = defaultdict(Counter)
    epoch = 0
    for row in rows:
        found[epoch].update(row["sample_ids"])
        epoch = row["epoch"]  # where the step's batch ended, so that of the next one
    return dict(found)


def account_samples(rows: list[Row], left_alone: list[Row]) -> tuple[int, int]:
    """Samples that an interrupted run lost and trained on more than once in an epoch.

    The tail of an epoch, which fills no batch, is lost in neither: what the run left alone was trained on counts.

    Args:
        rows: of the interrupted run.
        left_alone: of the other.

    Raises:
        CampaignError: the run left alone was trained on a sample twice in an epoch.
    """
    wanted, found = ids_by_epoch(left_alone), ids_by_epoch(rows)
    for epoch, counts in wanted.items():
        twice = [sample for sample, count in counts.items() if count > 1]
        if twice:
            raise CampaignError(f"the run left alone was trained on samples {twice[:5]} twice in epoch {epoch}")
    lost = sum((counts - found.get(epoch, Counter())).total() for epoch, counts in wanted.items())
    doubled = sum(count - 1 for counts in found.values() for count in counts.values() if count > 1)
    return lost, doubled


def loss_errors(rows: list[Row], left_alone: list[Row]) -> list[float]:
    """The largest relative error of the loss up to each step that both runs have; a loss that one lacks is infinite."""
    wanted = {row["step"]: row["loss"] for row in left_alone}
    errors, largest = [], 0.0
    for row in rows:
        ours, theirs = row["loss"], wanted.get(row["step"])
        if ours is None or theirs is None:
            largest = largest if ours is theirs else float("inf")
        else:
            largest = max(largest, abs(ours - theirs) / abs(theirs))
        errors.append(largest)
    return errors


def numbers(rows: list[Row]) -> list[tuple[Any, ...]]:
    """What must repeat bit by bit: JSON keeps every bit of a double."""
    keys = ("step", "loss", "grad_norm", "learning_rate", "epoch", "num_skipped_steps", "sample_ids")
    return [tuple(row[key] for key in keys) for row in rows]


def equal_tensors(ours: Path, theirs: Path) -> dict[str, bool]:
    """Whether two runs' last checkpoints hold the same bits, for each of their files."""
    from safetensors.numpy import load_file

    contents = [{file.stem for file in _latest(folder).glob("*.safetensors")} for folder in (ours, theirs)]
    equal = dict.fromkeys(contents[0] ^ contents[1], False)
    for content in contents[0] & contents[1]:
        a, b = (load_file(_latest(folder) / f"{content}.safetensors") for folder in (ours, theirs))
        equal[content] = a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)
    return equal


def _latest(folder: Path) -> Path:
    return folder / "checkpoints" / (folder / "checkpoints" / "latest").read_text().strip()


def step_seconds(rows: list[Row], batch_size: int) -> float:
    """Seconds of all steps without what happens between them (checkpoints, samples)."""
    seconds, count = 0.0, 0
    for row in rows:
        count += 1
        if "images_per_second" in row:
            seconds += count * batch_size / row["images_per_second"]
            count = 0
    return seconds


def account_time(attempts: list[Attempt], rows: list[Row], batch_size: int) -> dict[str, float]:
    """What the seconds of a run went into; their sum is the time from the first start to the last end."""
    steps = step_seconds(rows, batch_size)
    in_loop = rows[-1]["train_seconds"]
    where = dict.fromkeys(("steps", "checkpoints_and_samples", "redone", "start", "stop", "close", "between"), 0.0)
    where["steps"], where["checkpoints_and_samples"] = steps, in_loop - steps
    for i, attempt in enumerate(attempts):
        assert attempt.ended is not None
        stopped = attempt.killed or attempt.ended
        where["start"] += (attempt.trained or stopped) - attempt.began
        where["stop"] += attempt.ended - stopped
        if attempt.trained is not None:
            loop_ended = stopped if i < len(attempts) - 1 else attempt.last_row or attempt.trained
            where["redone"] += max(0.0, loop_ended - attempt.trained)
            where["close"] += max(0.0, stopped - loop_ended)
        if i:
            where["between"] += attempt.began - (attempts[i - 1].ended or attempt.began)
    where["redone"] -= in_loop  # all that passed in the loop, but for what the finished run counts as its own
    return where


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 1) for name, value in values.items()}


def report(out: Path, attempts: list[Attempt], planned: int, controls: Sequence[str]) -> tuple[dict[str, Any], bool]:
    """The last line, and whether all is well.

    Args:
        out: holds the runs `killed`, `alone` and those named in `controls`.
        attempts: of the run `killed`.
        planned: kills.
        controls: runs left alone on other numbers of ranks; with none, all must be equal bit for bit.
    """
    from cfpretrain.base import config

    batch_size = config.load(out / "alone" / "config.yaml").train.global_batch_size
    rows, left_alone = read_rows(out / "killed"), read_rows(out / "alone")
    lost, doubled = account_samples(rows, left_alone)
    errors = loss_errors(rows, left_alone)
    tensors = equal_tensors(out / "killed", out / "alone")
    loss_equal = numbers(rows) == numbers(left_alone)
    began, ended = attempts[0].began, attempts[-1].ended or 0.0
    where = account_time(attempts, rows, batch_size)
    kills = [attempt.kill for attempt in attempts if attempt.kill is not None]
    restarts = [a.first_step - a.began for a in attempts[1:] if a.from_step and a.first_step]
    found: dict[str, Any] = {
        "kills": len(kills),
        "restarts": len(attempts) - 1,
        "lost": lost,
        "doubled": doubled,
        "loss_equal": loss_equal,
        "weights_equal": tensors["weights"],
        "ema_equal": tensors["ema"],
        "moments_equal": all(equal for content, equal in tensors.items() if content not in ("weights", "ema")),
        "max_relative_loss_error": max(errors, default=float("inf")),
        "seconds": round(ended - began, 1),
        "goodput": round(where["steps"] / (ended - began), 4),
        "where": _rounded(where),
        "restart_seconds": round(statistics.median(restarts), 1) if restarts else None,
        "restart_seconds_max": round(max(restarts), 1) if restarts else None,
        "unplanned_ends": len(attempts) - 1 - len(kills),
        "moments": dict(Counter(moment for moment, _ in kills)),
        "targets": dict(Counter(target for _, target in kills)),
        "num_steps": len(rows),
    }
    steps_right = [row["step"] for row in rows] == [row["step"] for row in left_alone]
    good = lost == doubled == 0 and steps_right and len(kills) == planned
    if controls:
        drifts = [loss_errors(read_rows(out / name), left_alone) for name in controls]
        found["control_relative_loss_error"] = max(drift[-1] for drift in drifts)
        allowed = [max(_RELATIVE_ERROR, 2 * max(step)) for step in zip(*drifts, strict=True)]
        found["within_drift"] = len(errors) == len(allowed) and all(map(_at_most, errors, allowed))
        good = good and found["within_drift"]
    else:
        good = good and loss_equal and all(tensors.values())
    return found, good


def _at_most(error: float, allowed: float) -> bool:
    return error <= allowed


# ---------------------------------------------------------------------------
# The command


def _say(text: str) -> None:
    print(f"[crash_test] {text}", flush=True)


def _free_port() -> int:
    import socket

    # Below the ports that the system hands out, so that nobody is given it between two starts.
    for port in random.sample(range(20000, 30000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise CampaignError("no free port from 20000 to 30000")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    add_config(parser)
    parser.add_argument("--out", required=True, type=path_argument, help="a new folder for the runs and their output")
    parser.add_argument("--kills", type=int, default=50, help="default 50, about 20 s each on two cores")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and targets (default 0)")
    parser.add_argument("--ranks", default="2", help="e.g. 2, or 2,1,4: one of them at each restart (default 2)")
    parser.add_argument(
        "--targets",
        default=",".join(TARGETS),
        help="what is killed: rank (one), ranks (all), launcher (alone), node (both); default all four kinds",
    )
    found = parser.parse_intermixed_args(arguments)
    try:
        found.ranks = [int(number) for number in found.ranks.split(",")]
    except ValueError:
        parser.error(f"--ranks: expected numbers with commas between, got {found.ranks}")
    found.targets = found.targets.split(",")
    if min(found.ranks) < 1 or not set(found.targets) <= set(TARGETS) or found.kills < 0:
        parser.error("expected --ranks from 1, --kills from 0, --targets of " + ", ".join(TARGETS))
    return found


def run(arguments: argparse.Namespace) -> bool:
    """The campaign; whether all is well."""
    out: Path = arguments.out.absolute()
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out: expected a new folder, got {out}, which holds files; remove it or name another")
    files.make_folder(out, follow=True)
    runner = Runner(arguments.config, [*arguments.overrides, *["--allow-env"] * arguments.allow_env], out, _free_port())
    try:
        alone = runner.run_alone("alone", arguments.ranks[0])
        controls = {f"alone_on_{n}": n for n in arguments.ranks if n != arguments.ranks[0]}
        for name, num_ranks in controls.items():
            runner.run_alone(name, num_ranks)
        kills = plan_kills(arguments.seed, arguments.kills, alone.last_step, arguments.targets)
        attempts = runner.run_campaign("killed", kills, arguments.ranks, _durations(alone))
        found, good = report(out, attempts, len(kills), list(controls))
        found["seed"], found["seconds_alone"] = arguments.seed, round((alone.ended or 0.0) - alone.began, 1)
        found["orphans"] = _count_orphans(runner.marker)
    finally:
        ranks, launchers = our_processes(runner.marker)
        _kill(launchers + ranks)
    good = good and not found["orphans"]
    files.replace(out / "report.json", json.dumps(found, indent=2) + "\n")
    _say(f"{'all is well' if good else 'NOT WELL'}; both runs and {out / 'output.log'} are kept")
    print(json.dumps(found), flush=True)
    return good


def _durations(alone: Attempt) -> Durations:
    assert alone.trained is not None
    assert alone.built is not None
    assert alone.first_step is not None
    assert alone.last_row is not None
    steps = (alone.last_row - alone.trained) / max(1, alone.last_step)
    sampling = statistics.median(alone.sampling_seconds) if alone.sampling_seconds else 1.0
    return Durations(alone.first_step - alone.began, alone.first_step - alone.built, steps, sampling)


def _count_orphans(marker: str) -> int:
    """Processes of the run that outlive it for longer than they may."""
    deadline = time.monotonic() + _ORPHAN_SECONDS
    while (left := sum(map(len, our_processes(marker)))) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def main() -> None:
    """The command."""
    arguments = parse()
    try:
        good = run(arguments)
    except UserError as error:
        exit_with(error)
    except CampaignError as error:
        _say(f"NOT WELL: {error}")
        good = False
    except KeyboardInterrupt:
        _say("stopped")
        sys.exit(128 + signal.SIGINT)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
