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
import random
import re
import signal
import socket
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tools share code

import cfpretrain
from cfpretrain.base import files
from cfpretrain.base.command_line import Parser, add_config
from cfpretrain.base.console import UserError, exit_with, path_argument
from tools.crashing.accounts import Attempt, CampaignError, report
from tools.crashing.command import QUICK_POLL_SECONDS, TARGETS, Command, count_orphans, kill, our_processes

MOMENTS = ("start", "loader", "step", "step", "checkpoint", "checkpoint", "sampling")  # as often as they stand there

_WRITE_SECONDS = 0.1  # after the write of a checkpoint has begun, the kill comes within
_MAX_UNPLANNED_IN_ROW = 3


# ---------------------------------------------------------------------------
# What to kill, and when


@dataclass(frozen=True)
class Kill:
    """One planned kill."""

    moment: str  # one of MOMENTS
    target: str  # one of TARGETS
    step: int  # not before this step is done; means nothing for "start" and "loader"
    last_step: int  # once it is done the kill comes at once: a run that is complete cannot be killed
    share: float  # a random number in [0, 1), for the place within the moment and the choice of the rank


def plan_kills(seed: int, num_kills: int, num_steps: int, targets: Sequence[str] = TARGETS) -> list[Kill]:
    """Kills spread over a run, each moment and target about as often as it stands in its list."""
    draw = random.Random(f"{seed} kills")
    latest = max(1, num_steps * 19 // 20)
    steps = sorted(draw.randint(1, latest) for _ in range(num_kills))

    def deal(cards: Sequence[str]) -> list[str]:
        return [card for _ in range(-(-num_kills // len(cards))) for card in draw.sample(cards, len(cards))][:num_kills]

    moments, sides = deal(MOMENTS), deal(targets)
    return [Kill(m, t, s, latest, draw.random()) for m, t, s in zip(moments, sides, steps, strict=True)]


def reach(command: Command, planned: Kill, usual: Mapping[str, float]) -> str | None:
    """Watches a command until the moment of a kill; returns that moment, None where the command ended before.

    Args:
        command: just started.
        planned: the kill.
        usual: seconds within which the kill comes, for each moment.
    """
    attempt, moment = command.attempt, planned.moment
    within = usual[moment]

    def is_late() -> bool:
        return attempt.last_step >= planned.last_step

    if moment == "loader":
        if not command.wait_until(lambda: attempt.built is not None):
            return None
    elif moment != "start":
        # At least one new step, so that a kill undoes work.
        if not command.wait_until(lambda: attempt.first_step is not None and attempt.last_step >= planned.step):
            return None
        num_samplings = command.num_samplings
        if moment == "checkpoint":
            written = command.folder / "checkpoints"
            command.wait_until(lambda: any(written.glob("*.partial")) or is_late(), QUICK_POLL_SECONDS)
        elif moment == "sampling":
            command.wait_until(lambda: command.num_samplings > num_samplings or is_late())
        if is_late():
            moment, within = "step", 0.0
    due = planned.share * within + (attempt.began if moment == "start" else time.monotonic())
    return moment if command.wait_until(lambda: time.monotonic() >= due, QUICK_POLL_SECONDS) else None


def usual_seconds(alone: Attempt) -> dict[str, float]:
    """Seconds of each moment in the run left alone: random kills lie within."""
    return {
        "start": alone.first_step - alone.began,
        "loader": alone.first_step - alone.built,
        "step": 2 * (alone.last_row - alone.trained) / max(1, alone.last_step),
        "checkpoint": _WRITE_SECONDS,
        "sampling": statistics.median(alone.sampling_seconds or [1.0]),
    }


# ---------------------------------------------------------------------------
# Runs

# Starts the command for the run folder of a name, on a number of ranks.
Start = Callable[[str, int], Command]


def training(arguments: argparse.Namespace, out: Path, marker: str) -> Start:
    """Starts of training under the launcher, always on the same port, as a user's are; our settings win."""
    train = Path(cfpretrain.__file__).parent / "train.py"
    launcher = [
        str(Path(sys.executable).parent / "deepspeed"),
        "--master_port",
        str(_free_port()),
        "--num_accelerators",
    ]
    # The end must be that of the steps: a limit in seconds comes at another step each time.
    settings = ["train.max_train_seconds=0", "metrics.wandb=disabled", "metrics.log_every_steps=1"]
    settings += [*arguments.overrides, "metrics.log_sample_ids=true"]
    options = [word for config in arguments.config for word in ("--config", config)]
    options += ["--allow-env"] * arguments.allow_env

    def start(name: str, num_ranks: int) -> Command:
        words = [*launcher, str(num_ranks), str(train), *options, *settings, f"run.folder={out / name}"]
        return Command(words, out / name, marker, num_ranks, out / "output.log")

    return start


def _free_port() -> int:
    # Below the ports that the system hands out, so that no other process gets it between two starts.
    for port in random.sample(range(20000, 30000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise CampaignError("no free port from 20000 to 30000")


def run_alone(start: Start, name: str, num_ranks: int) -> Attempt:
    """A run without kills."""
    _say(f"{name}: {num_ranks} ranks, left alone")
    command = start(name, num_ranks)
    command.wait_for_end()
    attempt = command.attempt
    if not command.is_complete():
        if attempt.code == 2:
            said = [line.partition("error: ")[2] for line in command.lines if "[cfpretrain] error: " in line]
            raise UserError(said[0] if said else command.tail())
        raise CampaignError(f"the run left alone ended with exit code {attempt.code}{command.tail()}")
    _say(f"{name}: {attempt.last_step} steps in {attempt.ended - attempt.began:.0f} s")
    return attempt


def run_campaign(
    start: Start, name: str, kills: Sequence[Kill], num_ranks: Sequence[int], usual: Mapping[str, float]
) -> list[Attempt]:
    """A run with these kills, on one of these numbers of ranks at each start, until it is complete."""
    draw = random.Random(f"{kills} ranks")
    attempts: list[Attempt] = []
    planned = list(kills)
    unplanned_in_row = 0
    while True:
        command = start(name, draw.choice(num_ranks) if attempts else num_ranks[0])
        attempts.append(command.attempt)
        moment = reach(command, planned[0], usual) if planned else None
        if moment is not None:
            due = planned.pop(0)
            command.strike(moment, due.target, due.share)
            unplanned_in_row = 0
        command.wait_for_end()
        _say(f"{name}: start {len(attempts)} {_describe(command.attempt)}")
        if command.attempt.kill is not None:
            continue
        if command.is_complete():
            return attempts
        unplanned_in_row += 1
        if not (command.folder / "requeue").exists() or unplanned_in_row > _MAX_UNPLANNED_IN_ROW:
            raise CampaignError(f"the run ended by itself with exit code {command.attempt.code}{command.tail()}")


def _describe(attempt: Attempt) -> str:
    reached = f"steps {attempt.from_step} to {attempt.last_step}" if attempt.trained else "no step"
    end = f"ended with exit code {attempt.code}"
    if attempt.kill is not None:
        moment, target = attempt.kill
        end = f"killed: {target} in {moment}; ended {attempt.ended - attempt.killed:.1f} s later"
    return f"({attempt.num_ranks} ranks): {reached} in {attempt.ended - attempt.began:.1f} s, {end}"


# ---------------------------------------------------------------------------
# The command


def _say(text: str) -> None:
    print(f"[crash_test] {text}", flush=True)


def _ranks(text: str) -> list[int]:
    if not re.fullmatch(r"[1-9][0-9]*(,[1-9][0-9]*)*", text):
        raise argparse.ArgumentTypeError(f"expected numbers from 1 with commas between, got {text}")
    return [int(number) for number in text.split(",")]


def _targets(text: str) -> list[str]:
    if not set(text.split(",")) <= set(TARGETS):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(TARGETS)} with commas between, got {text}")
    return text.split(",")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    add_config(parser)
    add = parser.add_argument
    add("--out", required=True, type=path_argument, help="a new folder for the runs and their output")
    add("--kills", type=int, default=50, help="default 50, about 20 s each on two cores")
    add("--seed", type=int, default=0, help="of the moments and targets (default 0)")
    add("--ranks", type=_ranks, default=[2], help="e.g. 2, or 2,1,4: one of them at each restart (default 2)")
    add("--targets", type=_targets, default=list(TARGETS),
        help="what is killed: rank (one), ranks (all), launcher (alone), node (both); default all four")  # fmt: skip
    found = parser.parse_intermixed_args(arguments)
    if found.kills < 0:
        parser.error(f"--kills: expected at least 0, got {found.kills}")
    return found


def run(arguments: argparse.Namespace) -> bool:
    """The campaign; whether all is well."""
    out: Path = arguments.out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: expected a new folder, got {out}, which holds files; remove it or name another")
    files.make_folder(out, follow=True)
    marker = uuid.uuid4().hex
    start = training(arguments, out, marker)
    try:
        alone = run_alone(start, "alone", arguments.ranks[0])
        controls = {f"alone_on_{n}": n for n in arguments.ranks if n != arguments.ranks[0]}
        for name, num_ranks in controls.items():
            run_alone(start, name, num_ranks)
        kills = plan_kills(arguments.seed, arguments.kills, alone.last_step, arguments.targets)
        attempts = run_campaign(start, "killed", kills, arguments.ranks, usual_seconds(alone))
        found, good = report(out, attempts, len(kills), list(controls))
        found |= {"seed": arguments.seed, "seconds_alone": round(alone.ended - alone.began, 1)}
        found["orphans"] = count_orphans(marker)
    finally:
        ranks, launchers = our_processes(marker)
        kill(launchers + ranks)
    good = good and not found["orphans"]
    files.replace(out / "report.json", json.dumps(found, indent=2) + "\n")
    _say(f"{'all is well' if good else 'NOT WELL'}; both runs and {out / 'output.log'} are kept")
    print(json.dumps(found), flush=True)
    return good


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
