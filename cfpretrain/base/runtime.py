"""Ranks and the device: which rank this process is, which device it has, and how ranks agree."""

import importlib
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from cfpretrain import __version__
from cfpretrain.base import launch
from cfpretrain.base.console import (
    EXIT_REQUEUE,
    EXIT_USER_ERROR,
    UserError,
    exit_with,
    explain_no_memory,
    one_line,
    phase,
    print_error,
    speak_as,
)

# Longer than `guard.rank_timeout_seconds` usually is, which says more when it ends.
_TIMEOUT = timedelta(minutes=15)
_EXCHANGE_SECONDS = 5.0
_STORE_TIMEOUT = timedelta(seconds=10)
# Rank 0 keeps the store that tells the others who failed first, and no other rank may end before that one.
_KEEP_STORE_SECONDS = 3.0
_LOOPBACK = "127.0.0.1"
_LOOPBACK_NAMES = (_LOOPBACK, "localhost")  # what launchers call it
_LET_SPEAK_SECONDS = 8.0

_num_ticks = 0
_started: launch.Launch | None = None  # as `start` found it, which then completes the environment


def _launch() -> launch.Launch:
    return _started or launch.read()


def rank() -> int:
    """This process's rank; 0 without a launcher."""
    return _launch().rank


def world_size() -> int:
    """Number of ranks of the run; 1 without a launcher."""
    return _launch().world_size


def ranks_per_node() -> int | None:
    """Ranks on each machine; None where machines hold unequal numbers."""
    here = _launch().local_size
    return here if len(set(gather(here))) == 1 and world_size() % here == 0 else None


def num_cores() -> int:
    """Cores of the CPU for this rank, where its machine's are shared evenly."""
    return max(1, len(os.sched_getaffinity(0)) // _launch().local_size)


def pick_device(device_files: Path = Path("/dev")) -> torch.device:
    """This rank's GPU where there is one, else the CPU; DS_ACCELERATOR=cpu chooses the CPU.

    To be called before anything is on a GPU: its memory is then taken in segments that grow, which fragment less,
    unless the user has other settings. A GPU (in `device_files`) that torch cannot use is an error: without one, the
    run would take the CPUs beside it for days.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name, which torch prefers
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    asked = os.environ.get("DS_ACCELERATOR")
    if asked not in (None, "cpu", "cuda"):
        raise UserError(
            f"DS_ACCELERATOR in the environment: expected cpu or cuda, got {asked!r}; unset it to take the GPU where "
            "there is one"
        )
    if asked == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        here, num_gpus = launch.read(), torch.cuda.device_count()
        if here.local_size > num_gpus:
            raise UserError(
                f"--num_accelerators: expected at most {num_gpus}, the GPUs of this machine, got {here.local_size}; "
                "leave the option out to take all"
            )
        return torch.device("cuda", here.local_rank)
    unusable = next(iter(sorted(device_files.glob("nvidia[0-9]*"))), None)
    # Empty, -1 or Slurm's NoDevFiles hide them on purpose.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip()
    if unusable is not None and visible[:1].isalnum() and visible != "NoDevFiles":
        raise UserError(
            f"this machine has a GPU ({unusable}) that torch {torch.__version__} cannot use: {_why_no_cuda()}; "
            "to compute on the CPU all the same, set DS_ACCELERATOR=cpu"
        )
    if asked == "cuda":
        raise UserError(
            "DS_ACCELERATOR in the environment: cuda, and torch finds no GPU; unset it to compute on the CPU"
        )
    return torch.device("cpu")


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return "it is a build without CUDA; install one with CUDA (https://pytorch.org/get-started)"
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return one_line(error)
    return "its driver shows none; look at nvidia-smi"


def start(device: torch.device) -> None:
    """Joins the process group (nccl with gloo for CPU tensors on a GPU, gloo on a CPU).

    Where ranks meet at the loopback address, no port of theirs can be reached from another machine.
    """
    global _started
    found = _started = launch.read()
    speak_as(found.rank)
    os.environ["LOCAL_WORLD_SIZE"] = str(found.local_size)  # mosaicml-streaming reads it; deepspeed does not set it
    os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)  # DeepSpeed takes it over LOCAL_RANK, or refuses both
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if found.world_size == 1:  # DeepSpeed reads them all
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": str(found.local_rank)}
        os.environ |= {"MASTER_ADDR": _LOOPBACK, "MASTER_PORT": "0"}
    if os.environ["MASTER_ADDR"] in _LOOPBACK_NAMES:
        # Gloo and NCCL listen where the machine's name leads, else, even for one rank.
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")
    try:
        dist.init_process_group(
            backend, store=_make_store(found), rank=found.rank, world_size=found.world_size, timeout=_TIMEOUT
        )
    except (OSError, dist.DistNetworkError) as error:
        if "address already in use" not in str(error).lower():
            raise
        raise UserError(
            f"--master_port: {os.environ['MASTER_PORT']} is in use on this machine, perhaps by another run; "
            f"start this one with: deepspeed --master_port {_free_port()} ..."
        ) from error


def _make_store(found: launch.Launch) -> Any:
    """Where ranks meet; None: as torch's environment says, which listens on all addresses."""
    if found.world_size == 1:
        return dist.HashStore()  # type: ignore[attr-defined] # of this process, on no port
    # An agent of torchrun's keeps the store by itself.
    if os.environ["MASTER_ADDR"] not in _LOOPBACK_NAMES or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    port = int(os.environ["MASTER_PORT"])
    store = partial(dist.TCPStore, _LOOPBACK, port, found.world_size, timeout=_TIMEOUT)  # type: ignore[attr-defined]
    if found.rank != 0:
        return store(is_master=False)
    listener = socket.create_server((_LOOPBACK, port), backlog=socket.SOMAXCONN)
    return store(is_master=True, master_listen_fd=listener.detach())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def stop() -> None:
    """Leaves the process group."""
    global _started
    _started = None
    if dist.is_initialized():
        dist.destroy_process_group()


def tick() -> None:
    """Counts progress of this rank; called at the same places on all ranks."""
    global _num_ticks
    _num_ticks += 1


def num_ticks() -> int:
    """The number of `tick`s so far."""
    return _num_ticks


def barrier() -> None:
    """Waits for every rank; nothing on one process without a group."""
    gather(None)


def gather(item: Any) -> list[Any]:
    """The items of all ranks, in rank order, on every rank. They travel pickled, so they should be small."""
    if not dist.is_initialized():
        return [item]
    items: list[Any] = [None] * dist.get_world_size()
    with _raising_lost_rank():
        dist.all_gather_object(items, item)
    return items


def agree(problem: str | None) -> None:
    """UserError on every rank where any has a problem: the problem of the lowest such rank."""
    if not sum_over_ranks(torch.tensor([float(problem is not None)])):
        return  # this is called in every step, and one number travels in a third of the time of texts
    for found in gather(problem):
        if found is not None:
            raise UserError(found)


@contextmanager
def together() -> Iterator[None]:
    """Runs a block on each rank; a UserError on one of them is raised on all, as `agree` does."""
    problem = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    agree(problem)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum over ranks of a small tensor, as a new tensor on its device; on a GPU, the host does not wait for it."""
    total = values.clone()
    if dist.is_initialized():
        with _raising_lost_rank():
            dist.all_reduce(total)
    return total


def read_back(values: torch.Tensor) -> list[float]:
    """Numbers from the device; on a GPU, the host waits for them."""
    return values.tolist()


class LostRankError(RuntimeError):
    """Another rank is gone."""


@contextmanager
def _raising_lost_rank() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(str(error)) from error


def connect_to_store() -> Any:
    """The store of the process group, by a connection of its own: the group's may be waiting inside a collective."""
    return dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=_STORE_TIMEOUT
    )


def first_to_fail(code: int) -> tuple[int, int]:
    """The rank that called this first, and its exit code: it says what is wrong, and the others end with that code."""
    if not dist.is_initialized() or world_size() == 1:
        return rank(), code
    try:
        first = connect_to_store().compare_set("cfpretrain/first to fail", "", f"{rank()} {code}").decode()
    except RuntimeError:  # rank 0, which keeps the store, is gone
        return rank(), code
    if rank() == 0:
        time.sleep(_KEEP_STORE_SECONDS)
    first_rank, first_code = map(int, first.split())
    return first_rank, first_code


def leave_after_the_first(code: int) -> NoReturn:
    """Ends this rank without a message, once the one that failed first has said why and ended."""
    time.sleep(_LET_SPEAK_SECONDS)
    os._exit(code)


@contextmanager
def ranks_of_a_tool(device: torch.device) -> Iterator[None]:
    """The process group of a tool: all ranks begin together, and one that loses another leaves."""
    with phase("waiting for all ranks", announce=False):
        start(device)
    try:
        yield
    except LostRankError as error:
        _, code = first_to_fail(EXIT_REQUEUE)
        if code != EXIT_REQUEUE:
            leave_after_the_first(code)
        # Without leaving the group, which may wait for the others for ever.
        print_error(f"rank {rank()}: another rank is gone ({error}); the same command goes on")
        os._exit(EXIT_REQUEUE)
    except Exception as error:
        explained = explain_no_memory(error)
        if explained is not None:  # here, before the others notice that this rank has left the group
            first, code = first_to_fail(EXIT_USER_ERROR)
            if first != rank():
                leave_after_the_first(code)
            exit_with(explained, speaks=True)
        raise
    finally:
        stop()


class Exchange:
    """Lets ranks that each work through a share of their own learn within seconds that another has failed.

    A context around the work; its end waits for the work of all ranks. A UserError of one is raised on every rank.

    Args:
        on_exchange: called on every rank, every few seconds and at the end, with the sum of what ranks have done.
    """

    def __init__(self, on_exchange: Callable[[int], None] = lambda num_done: None) -> None:
        self._on_exchange = on_exchange
        self._num_done, self._exchanged_at = 0, time.monotonic()
        self._failed = False

    def add(self, num_done: int) -> None:
        """Counts what this rank has done since the last call."""
        self._num_done += num_done
        if time.monotonic() - self._exchanged_at >= _EXCHANGE_SECONDS:
            self._exchange(has_ended=False)

    def __enter__(self) -> "Exchange":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, UserError) and not self._failed:
            self._exchange(has_ended=True, problem=str(error))
        while error is None and not self._exchange(has_ended=True):
            pass

    def _exchange(self, has_ended: bool, problem: str | None = None) -> bool:
        """Whether the work of all ranks has ended."""
        ended, num_done, problems = zip(*gather((has_ended, self._num_done, problem)), strict=True)
        self._exchanged_at = time.monotonic()
        for found in problems:
            if found is not None:
                self._failed = True
                raise UserError(found)
        self._on_exchange(sum(num_done))
        return all(ended)


def package_versions(*modules: str) -> dict[str, str]:
    """Versions of cfpretrain and of these packages, which must be cheap to import: some have no metadata to read."""
    return {"cfpretrain": __version__, **{name: str(importlib.import_module(name).__version__) for name in modules}}


def peak_rss_mb() -> float:
    """The most memory this process has held, in MB."""
    # ru_maxrss counts KiB on Linux.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
