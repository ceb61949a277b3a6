"""Measures everything on one GPU: tables for docs/benchmarks.md, and all figures as JSON.

    python tools/measure.py report --minutes 8 --out gpu-report
    python tools/measure.py report --minutes 8 --out sweep --only environment sweep

Nothing is downloaded: training runs on shards of noise, networks have random weights. Each section is a measuring tool
in a process of its own, in order of priority; `compile` fills the caches of the compilers in many processes before
anything is timed. When the time is over, what still runs is ended with its children, and the report holds what there
is: report.json and report.md are written again after every section, and SECTION.log holds what a section said. A
section that fails, or whose GPU or package is not there, says so and ends nothing.

Without a GPU it runs the same sections at tiny sizes, in a minute or two.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

from cfpretrain.base import files
from cfpretrain.base.console import UserError, explaining, say
from tools.measuring import tool
from tools.measuring.report_tables import to_markdown

_ROOT = Path(__file__).resolve().parents[2]
_POLL_SECONDS = 0.1
_LIMIT = "{seconds}"  # in a command: after which it must end by itself
_OUT = "{out}"  # in a command: the file that gets the best settings
_MARGIN_SECONDS = 15.0
_COMPILE_THREADS = "2"  # of the compiler in each of many processes


@dataclass(frozen=True)
class Section:
    """A part of the report."""

    name: str  # of it and of its log
    seconds: float  # that it takes, roughly
    commands: Sequence[Sequence[str]]  # tools with their options, `_LIMIT` among them; several run at once
    needs_gpu: bool = False  # it has nothing to measure without one
    packages: tuple[str, ...] = ()  # that it needs beside those of every run
    only_if_asked: bool = False  # it is left out unless `--only` names it


def measure(arguments: argparse.Namespace) -> None:
    """Runs the sections and writes the report."""
    if not (_ROOT / "configs").is_dir():
        raise UserError("measure report: expected a checkout of cfpretrain, whose configs it measures; run it there")
    if not 0 < arguments.minutes < float("inf"):
        raise UserError(f"--minutes: expected a number above 0, got {arguments.minutes:g}")
    known = {section.name for on_gpu in (False, True) for section in sections(on_gpu, arguments.out)}
    for name in arguments.only or []:
        if name not in known | {"environment"}:
            raise UserError(f"--only: expected sections among environment, {', '.join(sorted(known))}, got {name!r}")
    end = time.monotonic() + 60 * arguments.minutes
    # What is stopped writes no further, and leaves no process behind.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    report = Report(arguments.out)
    environment = Section("environment", 20, (tool("machine"),))
    found = run_section(environment, end, arguments.out)
    report.add(environment, found)
    on_gpu = any(result.get("device") == "cuda" for result in found["results"])
    wanted = chosen(sections(on_gpu, arguments.out), arguments.only, arguments.sweep)
    for section in wanted:
        why_not = reason_to_leave_out(section, on_gpu, end - time.monotonic())
        if why_not is None:
            # Unless it comes to its end.
            report.add(section, {"state": "interrupted", "why": "the report was stopped while it ran"})
            report.add(section, run_section(section, end, arguments.out))
        else:
            report.add(section, {"state": "left out", "why": why_not})
    say(f"see {arguments.out / 'report.md'}")
    if wanted and not report.has_measured(wanted):
        raise UserError(f"no section was measured; {arguments.out / 'report.md'} says why")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


# ---------------------------------------------------------------------------
# What is measured


_XL = "step --config configs/XL.yaml --fit --pairs 8 train.global_batch_size=256"
_3B = "step --config configs/3B.yaml --fit --pairs 8 train.global_batch_size=64"
_3B += " engine.activation_checkpointing=false engine.ema_on_host=true"
_L = "step --config configs/L.yaml --fit --pairs 8 train.global_batch_size=256"
_L_TEXT = "step --config configs/L-text.yaml --fit --pairs 8 train.global_batch_size=256"
_SAMPLING = "sampling --config configs/XL.yaml --alone --precision bf16 --num-ar-steps 1 8 --batch-size 64"
_SAMPLING += " --num-denoising-steps 25"
_SAVING = "saving --config configs/L.yaml --kinds unguarded full saving --pairs 2 --block-steps 8"
_SAVING += " --warm-up-steps 16 train.global_batch_size=64"
_PHOTOS = "--store original --layout kl16 --precision bf16"
_TESTS = "pytest -m gpu -v -rfE --tb=short"

# Of each section the seconds that it takes, roughly, and its commands (of measure.py, or pytest), in order of priority.
_ON_A_GPU: dict[str, tuple[Any, ...]] = {
    "compile": (
        100,
        # Sequences of 320, 576, 1280 and 2112 tokens.
        *(f"attention --compile --tokens {n} --head-widths {w}" for n in (128, 256, 608, 1024) for w in (64, 128)),
        *(f"{step} --compile" for step in (_XL, _3B, _L)),
    ),
    "XL": (70, f"{_XL} --profile"),
    "attention": (60, "attention --tokens 128 256 608 1024 --head-widths 64 128"),
    "3B": (90, f"{_3B} --profile"),
    "XL bare": (50, f"{_XL} --bare"),
    "gpu tests": (120, _TESTS),
    "XL from images": (90, f"{_XL} --photos kl16"),
    "images": (80, f"data images {_PHOTOS} --images 512 --batch-size 64 --workers 4 --pairs 2"),
    **{f"L stage {n}": (40, f"{_L} --profile engine.zero_stage={n}") for n in (2, 1, 3, 0)},
    "L with texts": (60, f"{_L_TEXT} --profile"),
    "sampling": (40, _SAMPLING),
    "checkpoint": (60, _SAVING),
    "features": (30, "evaluation one-rank --features inception --batches 10 --batch-size 128"),
    "encoding": (50, "data encode --layout kl16 --precision bf16 --images 512 --batch-size 32 --pairs 1"),
    "loader": (30, "data loader --pairs 1"),
    "batches": (25, "data ready --pairs 1"),
    "sweep": (150, f"launches --seconds {_LIMIT} --out {_OUT}"),
}

_TINY = "--config configs/tiny.yaml model.width=32 model.depth=2 model.num_heads=2 data.num_workers=1"
_TINY += " train.global_batch_size=8 train.micro_batch_size=4"
_TINY_STEP = f"step {_TINY} --fit --pairs 2"
_TINY_TEXTS = "model.vocabulary=300 data.tokenizer=words data.tasks.text_to_image=1 data.tasks.image_to_text=1"
_TINY_ATTENTION = "--tokens 16 --head-widths 32 --num-heads 2 --batch-size 2"
_TINY_SAMPLING = "sampling --config configs/tiny.yaml --alone --num-ar-steps 2 --batch-size 2 --pairs 1"
_TINY_SAMPLING += " --num-denoising-steps 2"
# With tiny sizes, so that tests run all sections.
_ON_A_CPU: dict[str, tuple[Any, ...]] = {
    "compile": (8, f"attention --compile {_TINY_ATTENTION}", f"{_TINY_STEP} --compile"),
    "tiny": (8, f"{_TINY_STEP} --profile"),
    "attention": (5, f"attention {_TINY_ATTENTION}"),
    "tiny bare": (8, f"{_TINY_STEP} --bare"),
    "gpu tests": (1, _TESTS),
    "tiny from images": (12, f"{_TINY_STEP} --photos small model.latent_channels=4 data.encode_batch_size=4"),
    "images": (12, "data images --store original --size 32 --images 8 --batch-size 4 --workers 1 --pairs 1"),
    "tiny stage 1": (8, f"{_TINY_STEP} engine.zero_stage=1"),
    "tiny with texts": (8, f"{_TINY_STEP} {_TINY_TEXTS}"),
    "sampling": (6, _TINY_SAMPLING),
    "checkpoint": (8, f"saving {_TINY} --kinds full saving --pairs 1 --block-steps 2 --warm-up-steps 2"),
    "features": (8, "evaluation one-rank --features inception --batches 10 --batch-size 1"),
    "encoding": (9, "data encode --images 8 --size 32 --pairs 1"),
    "loader": (6, "data loader --latents demo --samples 64 --pairs 1"),
    "batches": (6, "data ready --latents demo --samples 64 --pairs 1"),
    "sweep": (1, "launches"),
}
# Beside those of every run.
_OF_IMAGES = ("encoding", "images", "XL from images", "tiny from images")
_PACKAGES = {"gpu tests": ("pytest",), **dict.fromkeys(_OF_IMAGES, ("diffusers", "nvidia.dali", "sklearn"))}


def sections(on_gpu: bool, out: Path) -> list[Section]:
    """The sections in order of priority."""

    def words_of(command: str) -> list[str]:
        words = [str((out / "launches.json").resolve()) if word == _OUT else word for word in command.split()]
        return [sys.executable, "-m", *words] if words[0] == "pytest" else tool(*words)

    return [
        Section(
            name,
            seconds,
            list(map(words_of, commands)),
            needs_gpu=name in ("gpu tests", "sweep"),
            packages=_PACKAGES.get(name, ()),
            only_if_asked=name == "sweep",
        )
        for name, (seconds, *commands) in (_ON_A_GPU if on_gpu else _ON_A_CPU).items()
    ]


def chosen(planned: Sequence[Section], only: Sequence[str] | None, sweep: bool) -> list[Section]:
    """Those that the command asks for."""
    if only is not None:
        return [section for section in planned if section.name in only]
    return [section for section in planned if sweep or not section.only_if_asked]


def reason_to_leave_out(section: Section, on_gpu: bool, seconds_left: float) -> str | None:
    """Why a section cannot run here and now; None where it can."""
    if section.needs_gpu and not on_gpu:
        return "needs a GPU"
    absent = []
    for name in section.packages:
        try:
            is_there = find_spec(name) is not None
        except ModuleNotFoundError:  # of the package around it
            is_there = False
        absent += [] if is_there else [name]
    if absent:
        return f"{', '.join(absent)} is not installed"
    if seconds_left < section.seconds / 2:
        return f"it takes about {section.seconds:.0f} s, and {max(0.0, seconds_left):.0f} s are left"
    return None


# ---------------------------------------------------------------------------
# Running a section


def run_section(section: Section, end: float, out: Path) -> dict[str, Any]:
    """Runs the commands of a section, at once, and ends them when their time is over.

    Args:
        section: whose commands print JSON on their last line, or, of pytest, a summary.
        end: of the report, by `time.monotonic`.
        out: folder of the logs.

    Returns:
        `state` ("measured", "failed" or "out of time"), `seconds`, `results` (what each command measured) and `why`.
    """
    say(f"{section.name} ...")
    begin = time.monotonic()
    limit = seconds_for(section, max(0.0, end - begin))
    must_end = str(max(1, int(limit - _MARGIN_SECONDS)))
    commands = [[part.replace(_LIMIT, must_end) for part in command] for command in section.commands]
    stem = section.name.replace(" ", "_")
    logs = [out / (f"{stem}.{i}.log" if len(commands) > 1 else f"{stem}.log") for i in range(len(commands))]
    with _processes(commands, logs) as processes:
        while any(process.poll() is None for process in processes) and time.monotonic() < begin + limit:
            time.sleep(_POLL_SECONDS)
        codes = [process.poll() for process in processes]
    texts = [log.read_text(errors="replace") for log in logs]
    measured = list(map(measured_in, texts))
    seconds = time.monotonic() - begin
    found = {"state": "measured", "seconds": seconds, "results": [one for one in measured if one is not None]}
    # pytest's code says whether tests failed, which is a result.
    failed = [text for code, text, one in zip(codes, texts, measured, strict=True) if code != 0 and one is None]
    if None in codes:
        found |= {"state": "out of time", "why": f"ended after {seconds:.0f} s"}
    elif failed:
        lines = [line.strip() for line in failed[0].splitlines() if line.strip()]
        found |= {"state": "failed", "why": lines[-1][:300] if lines else "it said nothing"}
    return found


def seconds_for(section: Section, seconds_left: float) -> float:
    """How long a section may take: one that hangs leaves half of what is left to the others."""
    return min(seconds_left, max(section.seconds, seconds_left / 2))


@contextmanager
def _processes(commands: Sequence[Sequence[str]], logs: Sequence[Path]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The commands, each in a group of processes of its own, which is ended with the block."""
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    if len(commands) > 1:
        environment |= {"TORCHINDUCTOR_COMPILE_THREADS": _COMPILE_THREADS}
    started: list[subprocess.Popen[bytes]] = []
    try:
        for command, log in zip(commands, logs, strict=True):
            files.remove(log)  # of a report that was killed
            with files.create(log) as file:
                started.append(
                    subprocess.Popen(
                        command, cwd=_ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
                    )
                )
        yield started
    finally:
        for process in started:
            with suppress(ProcessLookupError):  # all of it has ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def measured_in(text: str) -> dict[str, Any] | None:
    """What a log ends with: JSON of a tool, or a summary of pytest; None where there is neither."""
    lines = text.splitlines()
    for line in reversed(lines):
        if line.startswith("{"):
            try:
                return dict(json.loads(line))
            except ValueError:
                continue
        if re.search(r"\d (passed|failed|errors?|deselected)\b.* in [\d.]+s", line):
            return {
                "summary": line.strip("= "),
                "failures": [one for one in lines if re.match(r"(FAILED|ERROR) ", one)],
            }
    verdicts = [match for line in lines if (match := re.match(r"(tests/\S+::.*) (PASSED|FAILED|ERROR)\b", line))]
    if not verdicts:
        return None
    failures = [f"{match[2]} {match[1]}" for match in verdicts if match[2] != "PASSED"]
    return {"summary": f"{len(verdicts)} tests until its time was over", "failures": failures}


# ---------------------------------------------------------------------------
# The report


class Report:
    """report.json and report.md in a folder beside the logs, written again with every section."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sections: dict[str, dict[str, Any]] = {}
        if (folder / "report.json").exists():
            raise UserError(f"--out: {folder} holds a report; choose another folder, or remove it")
        with explaining(f"--out: {folder} cannot be made ({{reason}}); choose another"):
            files.make_folder(folder, follow=True)

    def add(self, section: Section, found: dict[str, Any]) -> None:
        """Adds what was found to the report."""
        self._sections[section.name] = found
        files.replace(self._folder / "report.json", json.dumps({"sections": self._sections}, indent=1) + "\n")
        files.replace(self._folder / "report.md", to_markdown(self._sections))
        if found["state"] != "interrupted":
            took = f" in {found['seconds']:.0f} s" if "seconds" in found else ""
            say(f"{section.name}: {found['state']}{took}{': ' + found['why'] if 'why' in found else ''}")

    def has_measured(self, wanted: Sequence[Section]) -> bool:
        """Whether there is a result of any of these sections."""
        return any(self._sections[section.name]["state"] == "measured" for section in wanted)
