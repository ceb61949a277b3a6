"""The folder of a run's checkpoints: which there are, which to resume from, which stay."""

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfpretrain.base import files, runtime
from cfpretrain.base.console import UserError, reason_of, say
from cfpretrain.base.files import read_json, read_text
from cfpretrain.run.checkpoint import RANGES_FILE, tensor_file
from cfpretrain.run.state import STATE_FILE, dump, read_state
from cfpretrain.run.tensor_files import PlainHashes, checked_hashes, read_header

_LATEST_FILE, BEST_FILE = "latest", "best.json"
_COMPLETE_NAME = re.compile(r"step_([0-9]{8,18})")
_LEFTOVER_NAME = re.compile(r"(step_[0-9]{8,18})\.(partial|deleted|replaced)")
_MAX_NAME_BYTES = 4096  # of what `latest` may hold


def step_of(checkpoint: Path) -> int:
    """The step that a complete checkpoint's name says."""
    return int(checkpoint.name.removeprefix("step_").removesuffix(".replaced"))


def remove(path: Path) -> None:
    """Deletes a folder or a file; a failure is only reported, since training can go on and a later run retries."""
    try:
        files.remove(path)
    except OSError as error:
        say(f"{path} cannot be deleted now: {reason_of(error)}")


def _move(path: Path, target: Path) -> bool:
    """Renames a folder; a failure is only reported."""
    try:
        files.move(path, target)
    except OSError as error:
        say(f"{path} cannot be renamed to {target.name} now: {reason_of(error)}")
        return False
    return True


def is_healthy(path: Path) -> bool:
    """Whether a checkpoint can be read and was not written in a row of skipped steps."""
    try:
        return bool(read_state(path).guard.get("num_skips_in_row", 0) == 0)
    except UserError:
        return False


@dataclass(frozen=True)
class Best:
    """The checkpoint with the best score so far."""

    step: int
    score: float  # the smaller, the better
    measured_by: dict[str, Any]  # JSON-able; scores that were measured otherwise are not compared


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run: which there are, which to resume from, which stay."""

    folder: Path
    keep_last: int  # newest checkpoints that stay; at least 1
    keep_every_steps: int  # and every one whose step is a multiple of this; 0 = none

    def path(self, step: int, suffix: str = "") -> Path:
        """Where the checkpoint of a step is, or will be."""
        return self.folder / f"step_{step:08d}{suffix}"

    def candidates(self) -> list[Path]:
        """The checkpoints to resume from, best first: the one that `latest` names, then those before it, newest first.

        Where `latest` is missing or names one that is gone, it says so, and all complete ones are returned. It only
        reads, so every rank may call it, before the first save of a run.
        """
        if self.folder.is_symlink():
            raise UserError(
                f"{self.folder}: expected a folder, got a link, which may lead to another run's checkpoints; move what "
                "it leads to into its place, or make the whole run folder a link"
            )
        named, complete = self._named_by_latest(), self._complete()
        newest_first = sorted(complete, reverse=True)
        if named is not None and named in complete:
            return [complete[step] for step in newest_first if step <= named]
        paths = [complete[step] for step in newest_first]
        found = "is missing" if named is None else f"names step_{named:08d}, which is gone"
        if named is not None and not paths:
            raise UserError(
                f"{self.folder / _LATEST_FILE} {found}, and no complete checkpoint is left; "
                "restore one, or choose another run.folder to begin again"
            )
        if paths:
            say(f"{self.folder / _LATEST_FILE} {found}; the newest complete checkpoint is {paths[0]}")
        return paths

    def remove_leftovers(self) -> None:
        """Deletes half-written and half-deleted checkpoints; nothing may be in flight."""
        for path in sorted(self.folder.iterdir()):
            match = _LEFTOVER_NAME.fullmatch(path.name)
            if match is None:
                continue
            original = path.with_name(match[1])
            if match[2] == "replaced" and not original.exists():
                _move(path, original)
            else:
                remove(path)
        files.remove_leftovers(self.folder)

    def publish(self, step: int, parts: Sequence[Mapping[str, PlainHashes]], state_text: str) -> None:
        """Turns the partial folder into the checkpoint to resume from; each line leaves something usable.

        Args:
            step: of the checkpoint; the tensors are in its partial folder.
            parts: what `write_ranges` returned for each content, on each rank.
            state_text: `TrainingState.to_json`.

        Raises:
            DamagedCheckpointError: not every value of every file was written once.
            OSError: it cannot be written.
        """
        partial, final, replaced = self.path(step, ".partial"), self.path(step), self.path(step, ".replaced")
        hashes = {}
        for content in parts[0]:
            file = tensor_file(partial, content)
            header = read_header(file)
            rows = {name: sorted(row for part in parts for row in part[content][name]) for name in header.shapes}
            checked_hashes(rows, header, file)
            hashes[content] = rows
        files.replace(partial / RANGES_FILE, json.dumps(hashes, separators=(",", ":")))
        files.replace(partial / STATE_FILE, state_text)
        files.flush(partial)
        if final.exists():
            remove(replaced)
            files.move(final, replaced)
        files.move(partial, final)
        files.flush(self.folder)
        self._replace(_LATEST_FILE, f"{final.name}\n")
        remove(replaced)

    def apply_retention(self, step: int) -> None:
        """Deletes what need not stay after a save at `step`; steps beyond it are of another line: left alone."""
        earlier = sorted(s for s in self._complete() if s <= step)
        try:
            best = self.best()
        except OSError as error:  # it may be the best that would go
            say(f"WARNING: no earlier checkpoint is deleted, since {BEST_FILE} cannot be read: {reason_of(error)}")
            return
        # The one to go back to after sick steps stays, however many were written among them.
        kept = {next((s for s in reversed(earlier) if is_healthy(self.path(s))), None), best and best.step}
        for old in earlier[: -self.keep_last]:
            if old not in kept and not (self.keep_every_steps and old % self.keep_every_steps == 0):
                _move(self.path(old), self.path(old, ".deleted"))
        self.remove_leftovers()

    def best(self) -> Best | None:
        """What `keep_if_best` named last; None where there is none, its checkpoint is gone, or the note is damaged."""
        file = self.folder / BEST_FILE
        try:
            plain = read_json(file, follow=False)
            best = Best(int(plain["step"]), float(plain["score"]), dict(plain["measured_by"]))
            if not _COMPLETE_NAME.fullmatch(self.path(best.step).name):
                raise ValueError("step: expected a whole number of at most 18 digits")
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            say(f"WARNING: {file} is damaged and left out: {reason_of(error)}")
            return None
        return best if (self.path(best.step) / STATE_FILE).is_file() else None

    def keep_if_best(self, new: Best) -> bool:
        """Names a complete checkpoint the best where none has a better score; it stays. Rank 0 calls it.

        One whose score was measured otherwise makes place for it.
        """
        old = self.best()
        is_rival = old is not None and old.step != new.step and old.measured_by == new.measured_by
        if old is not None and is_rival and old.score <= new.score:
            return False
        self._replace(BEST_FILE, dump({"checkpoint": self.path(new.step).name, **dataclasses.asdict(new)}))
        return True

    def set_aside(self, resumed_step: int, damaged: Sequence[Path]) -> None:
        """Renames the checkpoints that a run which resumes from `resumed_step` will not use; rank 0 does it.

        Damaged ones, which were refused, become `step_X.damaged`, complete ones above the step `step_X.abandoned`; they
        stay on disk, and each is reported. It is called before a `CheckpointWriter` is made.
        """
        if runtime.rank() != 0:
            return
        kinds = {path: "damaged" for path in damaged if path.exists()}
        kinds = {path: "abandoned" for step, path in self._complete().items() if step > resumed_step} | kinds
        if not kinds:
            return
        try:
            best = self.best()
            if best is not None and self.path(best.step) in kinds:
                remove(self.folder / BEST_FILE)
            # Before the first is renamed: from here on a kill leaves none of them a candidate.
            self._replace(_LATEST_FILE, f"{self.path(resumed_step).name}\n")
        except OSError as error:
            say(f"{self.folder} cannot be written now: {reason_of(error)}")
        for path, kind in kinds.items():
            self._rename_aside(path, kind)
        # One that was being replaced comes to light only when what replaced it is gone.
        for step, path in self._complete().items():
            if step > resumed_step and path not in kinds:
                self._rename_aside(path, "abandoned")

    def _rename_aside(self, path: Path, kind: str) -> None:
        name = f"{path.name.removesuffix('.replaced')}.{kind}"
        names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
        target = next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))
        if _move(path, target):
            say(f"{path} is {kind}: it is now {target.name}, and yours to delete")

    def _replace(self, name: str, text: str) -> None:
        files.replace(self.folder / name, text)
        files.flush(self.folder)

    def _named_by_latest(self) -> int | None:
        file = self.folder / _LATEST_FILE
        try:
            # The target of a link is not read, so that no message shows it.
            name = read_text(file, _MAX_NAME_BYTES, follow=False).strip()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} cannot be read: {reason_of(error)}; fix or delete it") from error
        if not name:
            return None
        match = _COMPLETE_NAME.fullmatch(name)
        if match is None or (self.folder / name).is_symlink():
            got = f"{name!r:.80}" if match is None else f"{name}, a link"
            raise UserError(
                f"{file}: expected the name of a checkpoint in this folder such as step_00000500, got {got}; "
                "write such a name or delete the file"
            )
        return int(match[1])

    def _complete(self) -> dict[int, Path]:
        """The complete checkpoints by step, with those that a kill left moved aside and not yet replaced."""
        complete: dict[int, Path] = {}
        for path in sorted(self.folder.iterdir(), reverse=True) if self.folder.is_dir() else ():
            # step_X comes after step_X.replaced: it wins.
            match = _COMPLETE_NAME.fullmatch(path.name.removesuffix(".replaced"))
            if match and not path.is_symlink() and (path / STATE_FILE).is_file():
                complete[int(match[1])] = path
        return complete
