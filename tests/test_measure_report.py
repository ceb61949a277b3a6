"""tools/measure.py report, which is tools/gpu_report.py too: what it runs, when it ends, and what it writes."""

import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.processes import REPOSITORY, wait_until
from tools.measuring import report
from tools.measuring.report import Section
from tools.measuring.report_tables import to_markdown

SAYS = "print('so far'); print('{\"value\": 3}')"
HANGS = (
    "import subprocess, sys, time;"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
    "print(child.pid, flush=True); time.sleep(600)"
)


def section(*programs: str, seconds: float = 1000.0, **others: Any) -> Section:
    return Section("part one", seconds, tuple((sys.executable, "-c", program) for program in programs), **others)


def run(one: Section, folder: Path, seconds: float = 60.0) -> dict[str, Any]:
    return report.run_section(one, time.monotonic() + seconds, folder)


# ---------------------------------------------------------------------------
# A section


def test_what_commands_print_last_is_measured(tmp_path: Path) -> None:
    found = run(section(SAYS, SAYS.replace("3", "4")), tmp_path)
    assert (found["state"], found["results"]) == ("measured", [{"value": 3}, {"value": 4}])
    assert (tmp_path / "part_one.0.log").read_text().startswith("so far")


def test_a_command_is_told_when_to_end(tmp_path: Path) -> None:
    one = section("import sys, json; print(json.dumps({'seconds': float('{seconds}')}))", seconds=20.0)
    [found] = run(one, tmp_path, seconds=100.0)["results"]
    assert 0 < found["seconds"] <= 50 - report._MARGIN_SECONDS


def test_a_failure_is_named_by_its_last_line(tmp_path: Path) -> None:
    found = run(section(SAYS, "raise ValueError('too little memory')"), tmp_path)
    assert (found["state"], found["why"]) == ("failed", "ValueError: too little memory")
    assert found["results"] == [{"value": 3}]
    assert run(section("raise SystemExit(3)"), tmp_path)["why"] == "it said nothing"


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or a zombie that nobody has waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def children_of(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found


def test_time_that_is_over_ends_a_section_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "part_one.log"

    def monotonic() -> float:
        """A clock on which the time is over once the command has said who its child is."""
        return 1e9 if log.exists() and log.read_text().endswith("\n") else 0.0

    monkeypatch.setattr(report, "time", SimpleNamespace(monotonic=monotonic, sleep=time.sleep))
    found = report.run_section(section(HANGS), 1000.0, tmp_path)
    assert found["state"] == "out of time"
    wait_until(lambda: has_ended(int(log.read_text().split()[0])))


@pytest.mark.parametrize(("seconds_left", "wanted"), [(480.0, 240.0), (150.0, 100.0), (60.0, 60.0)])
def test_a_section_that_hangs_leaves_half_of_the_time_to_others(seconds_left: float, wanted: float) -> None:
    assert report.seconds_for(section(seconds=100.0), seconds_left) == wanted


def test_what_a_child_left_running_is_ended(tmp_path: Path) -> None:
    found = run(section(HANGS.replace("; time.sleep(600)", "")), tmp_path)
    assert found["state"] == "measured"
    wait_until(lambda: has_ended(int((tmp_path / "part_one.log").read_text().split()[0])))


def test_tests_that_fail_are_a_result() -> None:
    log = "..F.\n==== short test summary info ====\nFAILED tests/test_a.py::test_b - assert 1 == 2\n"
    log += "=== 1 failed, 3 passed, 700 deselected in 12.34s ===\n"
    assert report.measured_in(log) == {
        "summary": "1 failed, 3 passed, 700 deselected in 12.34s",
        "failures": ["FAILED tests/test_a.py::test_b - assert 1 == 2"],
    }
    log = "tests/test_a.py::test_b[x y] PASSED [ 10%]\ntests/test_a.py::test_c FAILED [ 20%]\ntests/test_a.py::test_d "
    assert report.measured_in(log) == {
        "summary": "2 tests until its time was over",
        "failures": ["FAILED tests/test_a.py::test_c"],
    }
    assert report.measured_in('{"value": 1}\nWarning: {later}\n{not json\n') == {"value": 1}
    assert report.measured_in("Traceback\n") is None


@pytest.mark.parametrize(
    ("one", "seconds_left", "why"),
    [
        (section(), 900, None),
        (section(), 499, "it takes about 1000 s, and 499 s are left"),
        (section(needs_gpu=True), 900, "needs a GPU"),
        (section(packages=("torch", "no_such_package", "no_such.part")), 900, "no_such_package, no_such.part is not"),
    ],
)
def test_reasons_to_leave_out(one: Section, seconds_left: float, why: str | None) -> None:
    found = report.reason_to_leave_out(one, on_gpu=False, seconds_left=seconds_left)
    assert found == why or (found is not None and why is not None and found.startswith(why))


# ---------------------------------------------------------------------------
# All of them


@pytest.mark.parametrize("on_gpu", [True, False])
def test_every_command_is_of_a_tool_and_a_config_that_exist(on_gpu: bool, tmp_path: Path) -> None:
    planned = report.sections(on_gpu, tmp_path)
    assert len({one.name for one in planned}) == len(planned)
    for one in planned:
        for command in one.commands:
            files = [part for part in command if part.endswith((".py", ".yaml"))]
            assert all((REPOSITORY / part).is_file() for part in files), command


def test_a_cpu_has_every_kind_of_section_that_a_gpu_has(tmp_path: Path) -> None:
    def tools(on_gpu: bool) -> set[str]:
        return {command[2] for one in report.sections(on_gpu, tmp_path) for command in one.commands}

    assert tools(on_gpu=True) == tools(on_gpu=False)


def test_sections_are_chosen_by_name() -> None:
    planned = [Section(name, 1, (), only_if_asked=name == "sweep") for name in ("XL", "L", "sweep")]
    assert [one.name for one in report.chosen(planned, None, sweep=False)] == ["XL", "L"]
    assert [one.name for one in report.chosen(planned, None, sweep=True)] == ["XL", "L", "sweep"]
    assert [one.name for one in report.chosen(planned, ["sweep", "environment"], False)] == ["sweep"]


def start(folder: Path, *options: str) -> "subprocess.Popen[str]":
    command = [sys.executable, str(REPOSITORY / "tools" / "gpu_report.py"), "--out", str(folder), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder.parent)


def test_time_that_is_over_ends_the_report_with_what_it_has(tmp_path: Path) -> None:
    process = start(tmp_path / "report", "--minutes", "0.005")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert err.startswith("[cfpretrain] error: no section was measured; ")
    found = json.loads((tmp_path / "report" / "report.json").read_text())["sections"]
    states = {name: of["state"] for name, of in found.items()}
    assert states.pop("environment") == "out of time"
    assert set(states.values()) == {"left out"}
    assert "- tiny: left out: it takes about" in (tmp_path / "report" / "report.md").read_text()


def test_who_stops_it_leaves_nothing_running(tmp_path: Path) -> None:
    process = start(tmp_path / "report")
    log = tmp_path / "report" / "environment.log"
    wait_until(lambda: log.exists() and bool(children_of(process.pid)))
    [child] = children_of(process.pid)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "[cfpretrain] interrupted\n")
    wait_until(lambda: has_ended(child))


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text("{}")
    for options, message in (
        (["--minutes", "0"], "--minutes: expected"),
        (["--out", "file/x"], "--out: file/x"),
        (["--only", "XXL"], "--only: expected sections among environment, 3B"),
        ([], f"--out: {tmp_path / 'report'} holds a report"),
    ):
        process = start(tmp_path / "report", *options)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2
        assert err.startswith(f"[cfpretrain] error: {message}")
        assert err.count("\n") == 1


@pytest.mark.slow
def test_the_whole_report_at_tiny_sizes(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("on a GPU it has its real sizes")
    process = start(tmp_path / "report", "--minutes", "20")
    _, err = process.communicate(timeout=1300)
    assert process.returncode == 0, err
    folder = tmp_path / "report"
    found = json.loads((folder / "report.json").read_text())["sections"]
    states = {name: of["state"] for name, of in found.items()}
    assert (states.pop("gpu tests"), found["gpu tests"]["why"]) == ("left out", "needs a GPU")
    of_images = ("encoding", "images", "tiny from images")
    if states["encoding"] == "left out":  # where their packages are not installed
        assert {states.pop(name) for name in of_images} == {"left out"}
    assert set(states.values()) == {"measured"}, found
    assert found["tiny stage 1"]["results"][0]["config"]["engine"]["zero_stage"] == 1
    if "images" in states:
        assert found["tiny from images"]["results"][0]["encoding"]["flops"] > 0
        assert len(found["images"]["results"][0]["rates"]) == 4
    tiny = found["tiny"]["results"][0]
    assert tiny["seconds"]
    assert tiny["profile"]["shares"]
    text = (folder / "report.md").read_text()
    titles = (
        "| step | micro-batch",
        "| seconds of the start",
        "| share of the busy time",
        "| tokens / head",
        "| what |",
    )
    assert all(title in text for title in titles)
    assert "failed" not in text
    assert not list(folder.glob(".writing.*"))


# ---------------------------------------------------------------------------
# Tables


def gpu_step(**others: Any) -> dict[str, Any]:
    return {
        "side": "trainer",
        "micro_batch_size": 64,
        "seconds_per_step": 1.5,
        "images_per_second": 170.67,
        "mfu": 0.3842,
        "peak_memory_bytes": 68_300_000_000,
        "estimated_memory_bytes": 71_000_000_000,
        "blocks": {"attention": "triton"},
        "config": {"train": {"global_batch_size": 256}, "engine": {"zero_stage": 2}},
        "start_seconds": {
            "imports": 9.1,
            "building": 30.0,
            "building the model, ZeRO stage 2": 2.0,
            "waiting for the run that uses runs/x": 0.1,
        },
        **others,
    }


def test_tables_of_a_gpu() -> None:
    profile = {"busy_share": 0.971, "num_launches": 12345, "num_synchronisations": 1, "shares": {"attention": 0.1}}
    row = {"length": 576, "head_width": 64, "batch_size": 32, "backend": "triton", "visible_share": 0.39, "error": 1e-3}
    row |= {"forward": 1.6e-4, "kernels": 9e-4, "both": 1.1e-3}
    row |= {"forward_tflops": 271.0, "kernels_tflops": 200.0, "both_tflops": 180.0}
    hardware = {"gpu": "NVIDIA H200", "cpu": "Xeon", "cores": 16}
    results = {
        "environment": {"hardware": hardware, "versions": {"torch": "2.11.0"}, "matmul_tflops": 795.0},
        "XL": gpu_step(profile=profile),
        "XL bare": gpu_step(side="bare"),
        "attention": {"attention": [row], "not_measured": {"flex, head 128": "no choices"}},
        "gpu tests": {"summary": "1 failed, 19 passed in 60s", "failures": ["FAILED tests/test_x.py::test_y"]},
        "checkpoint": {"stall_seconds": 1.25, "added": {"saving": 0.021}},
        "batches": {"unit": "ms", "batch_size": 64, "spent": {"by workers": [0.31, 0.22]}},
        "XL from images": gpu_step(encoding={"flops": 1.379e11, "tflop_per_second": 23.456}),
        "images": {
            "unit": "images/s",
            "rates": {"loader, from images": [900.0, 901.5]},
            "encoding_flops": 137867296768,
            "precision": "bf16",
            "batch_size": 64,
        },
        "sweep": {
            "best": [
                {"kernel": "forward", "head_width": 64, "launch": [64, 32, 4, 4], "of_best": 1.02, "lengths": [576]}
            ]
        },
    }
    sections = {name: {"state": "measured", "seconds": 9.0, "results": [one]} for name, one in results.items()}
    lines = to_markdown(sections | {"3B": {"state": "failed", "why": "OutOfMemoryError"}}).splitlines()
    assert lines[0].startswith("NVIDIA H200, Xeon, 16 cores; torch 2.11.0.")
    assert "| XL | 64 x 4 | 2 | triton | 1.5 | 170.7 | 38.4% | 68.3 / 71 | 97.1% | 12345 | 1 |" in lines
    assert "| XL bare | 64 x 4 | 2 | triton | 1.5 | 170.7 | 38.4% | 68.3 / 71 | - | - | - |" in lines
    assert "| building | 30.0 | 30.0 | 30.0 |" in lines
    assert "| building the model | 2.0 | 2.0 | 2.0 |" in lines
    assert "| XL from images: the autoencoder beside the model | 23.5 TFLOP/s |" in lines
    assert "| images, loader, from images | 901.5 images/s |" in lines
    assert "| images, encoding in bf16, 64 at once | 1.379e+11 FLOPs an image |" in lines
    assert not any("runs/x" in line for line in lines)
    assert "| attention | 10.0% |" in lines
    row_line = "| 576 / 64 | 32 | triton | 0.39 | 0.160 | 0.900 | 1.100 | 271 | 200 | 180 | 1.0e-03 |"
    assert row_line in lines
    assert "- flex, head 128: not measured: no choices" in lines
    assert "gpu tests: 1 failed, 19 passed in 60s" in lines
    assert "| checkpoint: a save keeps the step waiting | 1.25 s |" in lines
    assert "| batches of 64, by workers: the training thread | 0.22 ms a micro-batch |" in lines
    assert "| forward | 64 | Launch(64, 32, 4, 4) | 1.02 |" in lines
    assert "- 3B: failed: OutOfMemoryError" in lines


def test_a_table_that_fails_costs_no_other() -> None:
    results = {"XL": gpu_step(), "XL bare": {"side": "bare", "images_per_second": 1.0}}
    text = to_markdown({name: {"state": "measured", "results": [one]} for name, one in results.items()})
    assert "- table steps: failed: KeyError('config')" in text
    assert "- spent:" in text
