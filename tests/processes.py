"""Runs a function in N real gloo processes, as a launcher would, and returns what each rank returned."""

import multiprocessing
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent


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


def run_in_processes(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 240) -> list[Any]:
    """Calls `function(*args)` in `world_size` spawned processes with the launcher's environment.

    Args:
        function: importable at module level; it starts the process group itself if it wants one.
        world_size: number of ranks.
        args: picklable arguments, the same for every rank.
        timeout_s: the whole group is ended after this long.

    Returns:
        What each rank returned, in rank order.

    Raises:
        RuntimeError: a rank raised (with its traceback), died, or did not end in time.
    """
    context = multiprocessing.get_context("spawn")
    port = free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    ranks = [
        context.Process(target=_serve, args=(pipes[r][1], launcher_environment(r, world_size, port), function, args))
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


def start_script(script: str, arguments: Sequence[str], world_size: int) -> list[subprocess.Popen[str]]:
    """Starts a script of the repository on each rank, with the launcher's environment and `--local_rank`."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, str(REPOSITORY / script), f"--local_rank={rank}", *arguments],
            env=os.environ | launcher_environment(rank, world_size, port),
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]


def run_script(script: str, arguments: Sequence[str], world_size: int = 1, timeout_s: float = 240) -> list[Ended]:
    """Runs a script of the repository on each rank and waits for all; none is left running."""
    ranks = start_script(script, arguments, world_size)
    try:
        ended = []
        for process in ranks:
            out, err = process.communicate(timeout=timeout_s)
            ended.append(Ended(process.returncode, out, err))
        return ended
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
                process.communicate()
