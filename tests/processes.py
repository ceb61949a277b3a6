"""Runs functions and scripts in N real gloo processes, as a launcher would.

The processes are forked from a server that has imported torch and DeepSpeed once: a rank starts in a fraction of a
second instead of ten.
"""

import importlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent


@cache
def _server() -> Any:
    """What forks ranks."""
    # It inherits the environment of the moment, and computes nothing itself: no threads are forked away.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "torch",
            "deepspeed",
            "deepspeed.runtime.zero.utils",
            # What DeepSpeed's engine imports when it is built; those that this DeepSpeed does not have are passed over.
            "torch._inductor.compile_fx",
            "torch._dynamo.repro.after_dynamo",
            "torch._inductor.compiler_bisector",
            "deepspeed.module_inject.auto_ep_layer",
            "deepspeed.runtime.superoffload.superoffload_stage3",
            "deepspeed.runtime.zero.muon.muon_optimizer",
            "cfpretrain.core.attention.sdpa",
            "matplotlib.figure",
            "matplotlib.backends.backend_agg",
            "cfpretrain.training.trainer",
            "cfpretrain.evaluation.figures",
            "diffusers.models.autoencoders.autoencoder_kl",
            # What the modules import whose functions run in ranks.
            "hypothesis",
            "pytest",
            "tests.digits",
            "tests.processes",
            "tests.preloaded",
        ]
    )
    return context


def _context(device: str) -> Any:
    """What starts ranks. A GPU's driver does not live on in a fork, so that ranks there import all by themselves."""
    return _server() if device == "cpu" else multiprocessing.get_context("spawn")


def _environment(rank: int, world_size: int, port: int, device: str) -> dict[str, str]:
    """The launcher's, and what keeps a rank to its device on a machine with GPUs."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return launcher_environment(rank, world_size, port) | {"DS_ACCELERATOR": device} | hidden


def wait_until(condition: Callable[[], bool], timeout_s: float = 60, ranks: Sequence["Rank"] = ()) -> None:
    """Waits for what another process does, none of `ranks` ending; the clock ends a wait for one that hangs."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, [rank.said() for rank in ranks]
        assert all(rank.poll() is None for rank in ranks), [rank.communicate() for rank in ranks]
        time.sleep(0.005)


def shared_memory() -> set[str]:
    """Names in shared memory; of other tests, which run beside, they come and go: wait for those before to be all.

    Those of joblib stay, whose processes scikit-learn keeps.
    """
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.loky-")}


def wait_for_files(folder: Path, pattern: str, num: int, ranks: Sequence["Rank"]) -> None:
    """Waits for at least so many files in a folder, or for the end of all ranks."""
    wait_until(lambda: len(list(folder.glob(pattern))) >= num or all(rank.poll() is not None for rank in ranks))


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launcher_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What the deepspeed launcher sets for a rank of a one-node run (LOCAL_WORLD_SIZE is not among it)."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def set_constants(constants: Mapping[str, Any]) -> None:
    """Sets constants of the library in this process, named as in "base.console._LINGER_SECONDS"."""
    for name, value in constants.items():
        module, _, constant = name.rpartition(".")
        found = importlib.import_module(f"cfpretrain.{module}")
        assert hasattr(found, constant), name
        setattr(found, constant, value)


def run_in_processes(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 240, device: str = "cpu"
) -> list[Any]:
    """Calls `function(*args)` in `world_size` processes with the launcher's environment.

    Args:
        function: importable at module level; it starts the process group itself if it wants one.
        world_size: number of ranks.
        args: picklable arguments, the same for every rank.
        timeout_s: the whole group is ended after this long.
        device: "cpu" or "cuda", all that the ranks may find on this machine.

    Returns:
        What each rank returned, in rank order.

    Raises:
        RuntimeError: a rank raised (with its traceback), died, or did not end in time.
    """
    context, port = _context(device), free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    ranks = [
        context.Process(target=_serve, args=(pipes[r][1], _environment(r, world_size, port, device), function, args))
        for r in range(world_size)
    ]
    for process in ranks:
        process.start()
    try:
        return _receive_all([pipe for pipe, _ in pipes], ranks, timeout_s)
    finally:
        failed = sys.exc_info()[0] is not None
        for process in ranks:
            process.join(0 if failed else 10)
            if process.is_alive():
                process.kill()
                process.join()


def _receive_all(pipes: list[Connection], ranks: list[Any], timeout_s: float) -> list[Any]:
    """What the ranks return; the first failure is raised, though other ranks may still wait for the one that failed."""
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    while len(results) < len(pipes):
        for rank, (pipe, process) in enumerate(zip(pipes, ranks, strict=True)):
            if rank in results:
                continue
            alive = process.is_alive()
            if pipe.poll():
                ok, value = pipe.recv()
                if not ok:
                    raise RuntimeError(f"rank {rank} raised:\n{value}")
                results[rank] = value
            elif not alive:
                raise RuntimeError(f"rank {rank} died with exit code {process.exitcode}")
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"ranks {sorted(set(range(len(pipes))) - set(results))} did not end in {timeout_s:.0f} s"
            )
        time.sleep(0.02)
    return [results[rank] for rank in range(len(pipes))]


def _serve(pipe: Connection, environment: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    try:
        pipe.send((True, function(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


@dataclass(frozen=True)
class Ended:
    """A rank that ended: its exit code and what it wrote."""

    code: int
    out: str
    err: str


_STARTED: list["Rank"] = []


def end_ranks() -> None:
    """Ends the scripts that a test has left running."""
    while _STARTED:
        rank = _STARTED.pop()
        if rank.poll() is None:
            rank.kill()
        rank.communicate()


class Rank:
    """A script that runs as a rank, with the methods of `subprocess.Popen` that tests need.

    Args:
        script: a file of the repository, or the text of a program.
        arguments: of its command line.
        environment: added to the server's.
        cwd: the folder it runs in.
        path: folders of further modules that it may import.
        constants: of the library that are others for it, as `set_constants` takes them.
    """

    def __init__(
        self,
        script: str,
        arguments: Sequence[str],
        environment: dict[str, str],
        cwd: Path = REPOSITORY,
        path: Sequence[Path] = (),
        constants: Mapping[str, Any] | None = None,
    ) -> None:
        context = _context(environment.get("DS_ACCELERATOR", "cpu"))
        self.args = [script, *arguments]
        self._folder: tempfile.TemporaryDirectory[str] | None = tempfile.TemporaryDirectory()
        self._said: tuple[str, ...] = ()
        self._written = [Path(self._folder.name) / name for name in ("out", "err")]
        how = (script, arguments, environment, self._written, cwd, path, constants or {})
        self._process = context.Process(target=_run_script, args=how)
        self._process.start()
        _STARTED.append(self)

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit code, negative after a signal; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def said(self) -> str:
        """What it has written to stdout so far."""
        if self._folder is None:
            return self._said[0]
        return self._written[0].read_text() if self._written[0].exists() else ""

    def communicate(self, timeout: float | None = None) -> tuple[str, ...]:
        """Waits for its end and returns what it wrote: to stdout, and to stderr."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        if self._folder is not None:
            self._said = tuple(path.read_text() if path.exists() else "" for path in self._written)
            self._folder.cleanup()
            self._folder = None
        return self._said


def _run_script(
    script: str,
    arguments: Sequence[str],
    environment: dict[str, str],
    written: Sequence[Path],
    cwd: Path,
    path: Sequence[Path],
    constants: Mapping[str, Any],
) -> None:
    for stream, file in zip((1, 2), written, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path += map(str, path)
    set_constants(constants)
    sys.argv = [script, *arguments]
    if "\n" in script:
        sys.argv[0] = "-c"
        exec(compile(script, "<a test>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(str(REPOSITORY / script), run_name="__main__")


def start_script(script: str, arguments: Sequence[str], world_size: int, device: str = "cpu", **how: Any) -> list[Rank]:
    """Starts a script on each rank, with the launcher's environment and `--local_rank`; `how`: as `Rank` takes it."""
    port = free_port()
    return [
        Rank(script, [f"--local_rank={rank}", *arguments], _environment(rank, world_size, port, device), **how)
        for rank in range(world_size)
    ]


def run_script(
    script: str, arguments: Sequence[str], world_size: int = 1, timeout_s: float = 240, device: str = "cpu", **how: Any
) -> list[Ended]:
    """Runs a script on each rank and waits for all; none is left running."""
    return end_of(start_script(script, arguments, world_size, device, **how), timeout_s)


def run_tool(script: str, arguments: Sequence[object], world_size: int = 1) -> Ended:
    """Rank 0 of a script, after all ranks ended as it did."""
    ended = run_script(script, list(map(str, arguments)), world_size)
    assert len({rank.code for rank in ended}) == 1, ended
    return ended[0]


def run_alone(script: str, arguments: Sequence[str] = (), timeout_s: float = 240, **how: Any) -> Ended:
    """Runs a script, or the text of a program, without the launcher's environment."""
    environment = {"OMP_NUM_THREADS": "1", **how.pop("environment", {})}
    [ended] = end_of([Rank(script, arguments, environment, **how)], timeout_s)
    return ended


def end_of(ranks: Sequence[Rank], timeout_s: float = 240) -> list[Ended]:
    """Waits for the end of ranks; after an error none is left running."""
    try:
        ended = []
        for process in ranks:
            out, err = process.communicate(timeout=timeout_s)
            assert process.returncode is not None
            ended.append(Ended(process.returncode, out, err))
        return ended
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
                process.communicate()
