"""Work beside the training thread: tasks in threads, and copies to the device on a stream of their own."""

import ctypes
import functools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol, Self, TypeVar

import torch


class Task(threading.Thread):
    """Work in a thread, which begins at once; what stopped it is in `error`.

    A process that ends does not wait for it.
    """

    def __init__(self, work: Callable[[], None], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.error = error

    def stop(self) -> None:
        """Raises `StoppedError` in the thread at its next line of Python; a call of the system is not interrupted."""
        assert self.ident is not None
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident), ctypes.py_object(StoppedError))


class StoppedError(Exception):
    """Nobody needs any more what a task works for."""


class OnDevice(Protocol):
    """A collection of tensors that can be copied to a device."""

    def to(self, device: torch.device, non_blocking: bool = False) -> Self: ...

    def tensors(self) -> Mapping[str, torch.Tensor]: ...


_T = TypeVar("_T", bound=OnDevice)


def upload_ahead(batches: Iterable[_T], device: torch.device) -> Iterator[_T]:
    """A step's batches on the device; each is copied while the device works on the one before.

    The first is copied while the device works on the update of the step before.

    Args:
        batches: in pinned memory.
        device: on a CPU, batches are handed on as they are.
    """
    if device.type != "cuda":
        yield from batches
        return
    compute, copying = torch.cuda.current_stream(device), _copy_stream(device)
    ahead: deque[tuple[_T, torch.cuda.Event]] = deque()
    for batch in batches:
        with torch.cuda.stream(copying):
            ahead.append((batch.to(device, non_blocking=True), copying.record_event()))
        if len(ahead) > 1:
            yield _arrived(*ahead.popleft(), compute)
    while ahead:
        yield _arrived(*ahead.popleft(), compute)


def _arrived(batch: _T, copied: torch.cuda.Event, stream: torch.cuda.Stream) -> _T:
    """Lets a stream work with what another has copied."""
    stream.wait_event(copied)
    for tensor in batch.tensors().values():
        tensor.record_stream(stream)  # the other stream may reuse the memory only once this one is done with it
    return batch


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
