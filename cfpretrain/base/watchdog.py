"""Ends a run whose ranks died or do not arrive.

Threads of their own watch, since the main thread may be inside a collective that never returns.
"""

import functools
import os
import threading
import time
from collections.abc import Callable

from cfpretrain.base import runtime
from cfpretrain.base.background import Task
from cfpretrain.base.console import EXIT_FAILED, EXIT_REQUEUE, print_error
from cfpretrain.base.stopping import StopRequest

_POLL_SECONDS = 1.0
# A rank that does not say that it lives for so long is dead: its process, its machine or the network between.
_SILENCE_SECONDS = 30.0
# How long a rank may keep the others from finishing their last step, where no step has taken so long.
_STOP_SECONDS = 10.0
_STEPS_TO_STOP = 3
# Building the engine and reading a checkpoint: before the first step, ranks may wait at least as long.
_START_SECONDS = 600.0
_LAST_WORDS_SECONDS = 5.0

_Verdict = tuple[int, str]  # exit code and reason


class Watchdog:
    """Ends the run when a rank died, or keeps the others waiting for too long.

    Every rank writes each second that it lives, and how far it is (`runtime.tick`), to the store of the process group.
    Rank 0 reads that of all; its verdict, or its own silence, ends every rank with `EXIT_REQUEUE`. A rank that was
    asked to stop writes that too: another may wait for data, and never come to where ranks agree.

    Args:
        timeout_seconds: the longest that a rank may keep the others waiting; less once the run was asked to stop.
        on_lost: called with the reason before this rank ends.
    """

    def __init__(self, timeout_seconds: float, on_lost: Callable[[str], None], stop: StopRequest) -> None:
        self._timeout, self._on_lost, self._stop = timeout_seconds, on_lost, stop
        self._rank, self._world_size = runtime.rank(), runtime.world_size()
        self._ended = threading.Event()
        self._beats = 0
        self._ticks = (runtime.num_ticks(), time.monotonic())
        self._heard: dict[int, tuple[int, float]] = {}
        self._rank_zero_failed = False
        if self._world_size == 1:
            return
        self._store = runtime.connect_to_store()
        self._beat()
        runtime.barrier()
        self._answered_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()
        if self._rank != 0:
            threading.Thread(target=self._watch_rank_zero, name="watchdog of rank 0", daemon=True).start()

    def end(self) -> None:
        """Stops watching; the ranks may leave one after another."""
        self._ended.set()
        if self._world_size > 1:
            self._thread.join(5 * _POLL_SECONDS)

    def leave_if_ranks_are_lost(self, code: int) -> None:
        """After an exception that ends this rank with `code`: ends it here where other ranks died; takes seconds.

        Otherwise the failure is this rank's own, and the others are told, so that they do not blame a machine; or it
        follows from the failure of another rank, which prints it, and this process ends without a message.
        """
        if self._world_size == 1:
            return
        # First of all: a rank learns of another's failure only once that one has called this. It takes seconds on
        # rank 0, which keeps the store for the others.
        first, code = runtime.first_to_fail(code)
        lost = self._find_lost()
        if lost:
            self._leave((EXIT_REQUEUE, f"{_name(lost)} died"), min(set(range(self._world_size)) - set(lost)))
        if first != self._rank:
            # Rank 0 may end meanwhile, and torch prints a trace for each question to a store that is gone.
            self._ended.set()
            runtime.leave_after_the_first(code)

    def _find_lost(self) -> list[int]:
        """The other ranks that no longer write that they live, nor wrote that they failed by themselves."""
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        try:
            self._store.set(_key("failed", self._rank), "1")
            before = self._read(others)
            time.sleep(2 * _POLL_SECONDS)
            after = self._read(others)
            return [rank for rank in others if before[rank][0] == after[rank][0] and not self._has_failed(rank)]
        except RuntimeError:
            return [] if self._rank_zero_failed else [0]  # who keeps the store

    # ------------------------------------------------------------------
    # The threads

    def _run(self) -> None:
        while not self._ended.wait(_POLL_SECONDS):
            try:
                self._beat()
                if self._stop.reason is not None:
                    self._store.set(_key("stop"), self._stop.reason)
                elif self._store.check([_key("stop")]):
                    self._stop.ask(self._store.get(_key("stop")).decode())
                verdict = self._judge() if self._rank == 0 else self._read_verdict()
                self._answered_at = time.monotonic()
            except RuntimeError:
                continue  # `_watch_rank_zero` counts
            if verdict is not None and not self._ended.is_set():
                self._leave(verdict)

    def _watch_rank_zero(self) -> None:
        # A question to a store that does not answer never returns, whatever its time limit: another thread must count.
        while not self._ended.wait(_POLL_SECONDS):
            silence, verdict = time.monotonic() - self._answered_at, None
            if self._rank_zero_failed:
                # It says why first: the launcher ends all ranks with the first that ends.
                verdict = (EXIT_FAILED, "rank 0 failed") if silence > _LAST_WORDS_SECONDS else None
            elif silence > self._longest_silence():
                verdict = EXIT_REQUEUE, f"rank 0 has been silent for {silence:.0f} s"
            if verdict is not None and not self._ended.is_set():
                self._leave(verdict, speaker=1)

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(_key("alive", self._rank), f"{self._beats} {runtime.num_ticks()}")

    def _judge(self) -> _Verdict | None:
        """What rank 0 finds wrong, told to all."""
        state, now = self._read(list(range(self._world_size))), time.monotonic()
        for rank, (beats, _) in state.items():
            if self._heard.get(rank, (-1, 0.0))[0] != beats:
                self._heard[rank] = (beats, now)
        silent = [rank for rank, (_, heard_at) in self._heard.items() if now - heard_at > self._longest_silence()]
        failed = [rank for rank in silent if self._has_failed(rank)]
        verdict = None
        if failed:
            verdict = EXIT_FAILED, f"{_name(failed)} failed"
        elif silent:
            verdict = EXIT_REQUEUE, f"{_name(silent)} died or lost the network"
        elif (late := self._find_late({rank: ticks for rank, (_, ticks) in state.items()}, now)) is not None:
            verdict = EXIT_REQUEUE, late
        if verdict is not None:
            self._store.set(_key("verdict"), f"{verdict[0]} {verdict[1]}")
        return verdict

    def _find_late(self, ticks: dict[int, int], now: float) -> str | None:
        """Which ranks the others have waited for too long, in words."""
        if sum(ticks.values()) != self._ticks[0]:
            self._ticks = sum(ticks.values()), now
        waited, has_begun = now - self._ticks[1], min(ticks.values()) > 0
        limit, why = self._timeout if has_begun else max(self._timeout, _START_SECONDS), "guard.rank_timeout_seconds"
        if self._is_ending:
            limit, why = min(limit, max(_STOP_SECONDS, _STEPS_TO_STOP * self._stop.longest_step)), "asked to stop"
        if waited <= limit:
            return None
        late = [rank for rank in ticks if ticks[rank] == min(ticks.values())]
        if len(late) == self._world_size:
            return f"no rank has gone on for {waited:.0f} s ({why})"
        return f"{_name(late)} did not arrive for {waited:.0f} s ({why})"

    @property
    def _is_ending(self) -> bool:
        """Whether it was asked to stop and is on its way to the end of the step."""
        return self._stop.reason is not None and self._stop.is_in_step

    def _longest_silence(self) -> float:
        return min(_STOP_SECONDS if self._is_ending else _SILENCE_SECONDS, self._timeout)

    def _read(self, ranks: list[int]) -> dict[int, tuple[int, int]]:
        """(beats, ticks) of each rank."""
        answers = self._store.multi_get([_key("alive", rank) for rank in ranks])
        return {rank: tuple(map(int, text.split())) for rank, text in zip(ranks, answers, strict=True)}  # type: ignore[misc]

    def _has_failed(self, rank: int) -> bool:
        return bool(self._store.check([_key("failed", rank)]))

    def _read_verdict(self) -> _Verdict | None:
        self._rank_zero_failed |= self._has_failed(0)
        if not self._store.check([_key("verdict")]):
            return None
        code, _, reason = self._store.get(_key("verdict")).decode().partition(" ")
        return int(code), reason

    def _leave(self, verdict: _Verdict, speaker: int = 0) -> None:
        code, reason = verdict
        if code == EXIT_REQUEUE:
            # Beside this thread: a file system that is gone may never answer.
            Task(functools.partial(self._on_lost, reason), "requeue")
        if self._rank == speaker:
            what_next = "; the same command goes on from the latest checkpoint" if code == EXIT_REQUEUE else ""
            print_error(f"{reason}: the run ends{what_next}")
        time.sleep(2 * _POLL_SECONDS)  # for the file, and for the others to read rank 0's verdict
        os._exit(code)


def _key(kind: str, rank: int = 0) -> str:
    return f"cfpretrain/{kind}/{rank}"


def _name(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
