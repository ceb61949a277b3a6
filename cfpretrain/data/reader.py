"""Reading micro-batches: in worker processes that read ahead, or in the process that asks.

Workers are handed the places of a micro-batch and need no state; they also make of its samples what is wanted.
"""

import errno
import gc
import multiprocessing
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any, Generic

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from cfpretrain.base.background import Task, how_it_ended
from cfpretrain.base.console import UserError, one_line, say
from cfpretrain.base.stopping import leave_signals_to_the_rank
from cfpretrain.data.cache import RetryBudget
from cfpretrain.data.samples import FOLDER_BIT, REPETITION_BIT, T, Visits
from cfpretrain.data.shards import Shards

# The optimizer step, the epoch, and visits (see `loader.epoch_visits`): one micro-batch.
Request = tuple[int, int, NDArray[np.int64]]

_SHARED_MEMORY = "/dev/shm"
_PREFETCH = 2  # micro-batches a worker makes ahead
_POLL_SECONDS = 1.0
_DEATH_SECONDS = 0.5
_CLOSE_SECONDS = 5.0


class _Failure(str):
    """Why a micro-batch could not be read: an exception would leave the worker as a traceback."""


class _Handed(Generic[T]):
    """A micro-batch on its way out of a worker, its tensors in shared memory.

    It goes through `multiprocessing` where it is made: where that memory is full, torch's queue would print a traceback
    and deliver nothing.
    """

    def __init__(self, batch: T) -> None:
        self._pickled = bytes(ForkingPickler.dumps(batch))

    def open(self) -> T:
        batch: T = ForkingPickler.loads(self._pickled)
        return batch

    def pin_memory(self) -> Any:
        """What torch's thread that pins asks for."""
        batch: Any = self.open()
        return batch.pin_memory()


class MicroBatches(Dataset[T | _Handed[T] | _Failure]):
    """Reads a requested micro-batch and makes of it what is wanted; runs in the workers, where there are any."""

    def __init__(self, folders: Sequence[Shards], make: Callable[[Visits], T]) -> None:
        self._folders, self._make = folders, make
        self._ends = np.cumsum([len(folder) for folder in folders])

    def __getitem__(self, request: Request) -> T | _Handed[T] | _Failure:
        step, epoch, visits = request
        try:
            samples, ids_B = self._read(visits)
            labels_B = torch.tensor([int(sample["label"]) for sample in samples])
            batch = self._make(Visits(step, epoch, ids_B, labels_B, samples))
        except UserError as error:
            return _Failure(error)
        worker = get_worker_info()
        if worker is None:
            return batch
        try:
            return _Handed(batch)
        except (OSError, RuntimeError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                return _Failure(f"data.num_workers: {one_line(error)}; raise `ulimit -n`, or set fewer workers")
            num_bytes = sum(value.nbytes for value in vars(batch).values() if isinstance(value, Tensor))
            return _Failure(_describe_full_memory(error, num_bytes * _PREFETCH * worker.num_workers))

    def _read(self, visits: NDArray[np.int64]) -> tuple[list[dict[str, Any]], Tensor]:
        places, repetitions = visits & ((1 << REPETITION_BIT) - 1), visits >> REPETITION_BIT
        folders = np.searchsorted(self._ends, places, side="right")
        found: dict[int, dict[str, Any]] = {}
        for folder in set(folders.tolist()):
            wanted, first = places[folders == folder], self._ends[folder] - len(self._folders[folder])
            found.update(zip(wanted.tolist(), self._folders[folder].samples((wanted - first).tolist()), strict=True))
        samples = [found[place] for place in places.tolist()]
        ids = np.array([sample["id"] for sample in samples], np.int64)
        return samples, torch.from_numpy(ids + (folders << FOLDER_BIT) + (repetitions << REPETITION_BIT))


class Reader(Generic[T]):
    """Reads requests in order, in worker processes that read ahead, or in this process where there are none."""

    def __init__(
        self, dataset: MicroBatches[T], requests: Iterator[Request], num_workers: int, pinned: bool, budget: RetryBudget
    ) -> None:
        self._budget = budget
        num_cores = len(os.sched_getaffinity(0))
        if num_workers > num_cores:
            say(f"WARNING: data.num_workers: expected at most {num_cores}, the cores of a rank, got {num_workers}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # said above, on one line
            data_loader: DataLoader[Any] = DataLoader(
                dataset,
                sampler=requests,
                batch_size=None,  # a request is a whole micro-batch
                num_workers=num_workers,
                prefetch_factor=_PREFETCH if num_workers else None,
                timeout=_POLL_SECONDS if num_workers else 0,
                # A fork starts in milliseconds; any other way imports torch and streaming again in every worker.
                multiprocessing_context="fork" if num_workers else None,
                worker_init_fn=leave_signals_to_the_rank,
                pin_memory=pinned,
                generator=torch.Generator(),  # else torch would draw from the global one
            )
        on_child_death, others = signal.getsignal(signal.SIGCHLD), set(multiprocessing.active_children())
        # Workers never collect this process's garbage: DALI's destructors wait for threads that a fork does not have.
        gc.freeze()
        try:
            self._batches: Iterator[T | _Handed[T] | _Failure] = iter(data_loader)
        except OSError as error:  # of the queues' locks
            raise UserError(_describe_full_memory(error)) from error
        finally:
            gc.unfreeze()
        self._workers: set[BaseProcess] = set(multiprocessing.active_children()) - others
        if threading.current_thread() is threading.main_thread():
            # Torch would raise in whatever the main thread does when a worker dies; `read` finds it as well.
            signal.signal(signal.SIGCHLD, on_child_death)

    def read(self) -> T:
        """The next micro-batch; UserError where it cannot be read, a worker is dead, or the run needs no more data."""
        while True:
            try:
                batch = next(self._batches)
                if isinstance(batch, _Handed):
                    return self._open(batch)
            except (RuntimeError, OSError, EOFError) as error:  # the latter two of a worker that is gone
                has_timed_out = "timed out" in str(error)
                if not has_timed_out:  # a socket to a process closes a moment before it is dead
                    for worker in self._workers:
                        worker.join(_DEATH_SECONDS / len(self._workers))
                dead = [worker for worker in self._workers if not worker.is_alive()]
                if not dead and has_timed_out:
                    self._budget.check()
                    continue
                if not dead and "exited unexpectedly" not in str(error):  # one that died at once is not in the list
                    raise
                # Raised below, where it does not keep `error`.
                batch = _Failure(_describe_death(dead[0].exitcode if dead else None))
            if isinstance(batch, _Failure):
                raise UserError(str(batch))
            return batch

    def _open(self, handed: _Handed[T]) -> T:
        """In a thread: its worker sends the tensors' file descriptors, and a worker that hangs never does."""
        found: list[T] = []
        opening = Task(lambda: found.append(handed.open()), "batch")
        while opening.is_alive():
            opening.join(_POLL_SECONDS)
            if opening.is_alive():
                self._budget.check()
        if opening.error is not None:
            raise opening.error
        return found[0]

    def close(self) -> None:
        """Ends the workers."""
        # One may be stopped, or wait for a disk that never answers: torch and `multiprocessing` would wait for it.
        killing = threading.Timer(_CLOSE_SECONDS, self.kill)
        killing.start()
        del self._batches  # torch ends them with its iterator, which an error's traceback must not keep
        if not any(worker.is_alive() for worker in self._workers):
            killing.cancel()

    def kill(self) -> None:
        """Kills the workers."""
        for worker in self._workers:
            worker.kill()


def _describe_full_memory(error: Exception, num_bytes: int | None = None) -> str:
    size = shutil.disk_usage(_SHARED_MEMORY)
    need = "" if num_bytes is None else f", up to {num_bytes / 1e6:.4g} MB"
    return (
        f"data.num_workers: {_SHARED_MEMORY} ({size.total / 1e6:.4g} MB, of which {size.free / 1e6:.4g} free) cannot "
        f"take what the workers of each rank hand over{need} ({one_line(error):.120}); "
        "start the container with more (docker run --shm-size=8g, or --ipc=host), or set data.num_workers=0"
    )


def _describe_death(exit_code: int | None) -> str:
    how = "at its start" if exit_code is None else how_it_ended(exit_code)
    if exit_code == -signal.SIGBUS:
        how += ", as where /dev/shm is full"
    return (
        f"data.num_workers: a process that reads data ended {how}; set fewer, or give the machine more memory, then "
        "give the same command again"
    )
