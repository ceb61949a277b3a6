"""The training loop: one step on one screen, and what happens every n steps."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfpretrain.base import files, runtime
from cfpretrain.base.background import upload_ahead
from cfpretrain.base.config import Config, to_plain, to_shown
from cfpretrain.base.console import (
    EXIT_USER_ERROR,
    Progress,
    SickRunError,
    UserError,
    count,
    exit_with,
    explain_no_memory,
    one_line,
    phase,
    reason_of,
    say,
)
from cfpretrain.base.watchdog import EXIT_FAILED, StopRequest, Watch
from cfpretrain.core.ar import equal_sizes
from cfpretrain.core.model import BlockSettings
from cfpretrain.core.objective import Batch, LossTerms
from cfpretrain.core.sampler import Guidance
from cfpretrain.data.loader import Loader, Position, open_folders
from cfpretrain.data.mosaic import __version__ as streaming_version
from cfpretrain.evaluation import pictures
from cfpretrain.evaluation.evaluator import Evaluator
from cfpretrain.evaluation.generation import GenerationSettings, decode_to_look_at, generate_images, grid_title
from cfpretrain.run.build import (
    CONFIG_FILE,
    METRICS_FILE,
    SAMPLES,
    SUMMARY_FILE,
    choose_blocks,
    initial_weights,
    make_loss,
    make_model,
    make_prepare,
    make_store,
)
from cfpretrain.run.checkpoint import Best, is_healthy
from cfpretrain.run.checkpoint_writer import CheckpointWriter, Outcome
from cfpretrain.run.guard import Guard
from cfpretrain.run.metrics import (
    MetricsFile,
    StepRecord,
    Window,
    finite_or_none,
    peak_flops,
    peak_memory_gb,
    read_metrics,
    training_flops,
)
from cfpretrain.run.state import TrainingState
from cfpretrain.run.tensor_files import DamagedCheckpointError
from cfpretrain.run.tracker import Tracker
from cfpretrain.training.ema import ShardedEMA
from cfpretrain.training.engine import Engine, build_engine
from cfpretrain.training.folder import (
    finished_step,
    is_done,
    prepare_folder,
    record_config,
    remove_requeue,
    tracker_run_id,
    write_requeue,
)
from cfpretrain.training.memory import advise, plan_memory

_MOST_FAILED_CHECKPOINTS = 3  # in a row
_MOST_STEPS_LISTED = 1000
_LONG_WAIT_SHARE = 0.05  # of a step's time: the loader is worth a look


@dataclass
class Progression:
    """The counters of a run; a checkpoint holds them."""

    step: int = 0  # global batches consumed
    num_skipped: int = 0  # of them, those that the weights know nothing of: skipped, or gone back behind
    num_rewinds: int = 0
    train_seconds: float = 0.0  # in the loop, over all resumes


@dataclass(frozen=True)
class Exchanged:
    """What the ranks tell each other in a step, before its update.

    Attributes:
        loss: of the global batch.
        grad_norm: of the whole gradient before clipping; infinite where one is not finite.
        flops: over all ranks.
        must_stop: a rank was asked to stop.
        is_writing, has_failed: of the checkpoint in flight, on any rank.
        lacks_data: a rank could not read its share of the next step.
    """

    loss: float
    grad_norm: float
    flops: float
    must_stop: bool
    is_writing: bool
    has_failed: bool
    lacks_data: bool


class _LostDataError(UserError):
    """Data that cannot be read any more, on all ranks at once, between two steps."""


class _AskedToStopError(Exception):
    """Ends sampling on all ranks, where one of them is asked to stop."""


class Clock:
    """Seconds of a window of steps, those of checkpoints, samples and scores apart."""

    def __init__(self) -> None:
        self._begin, self._aside = time.perf_counter(), 0.0

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What runs inside is not part of the steps."""
        begin = time.perf_counter()
        yield
        self._aside += time.perf_counter() - begin

    def read(self) -> tuple[float, float]:
        """Seconds of the steps and seconds aside since the last reading."""
        now = time.perf_counter()
        seconds = now - self._begin - self._aside, self._aside
        self._begin, self._aside = now, 0.0
        return seconds


class Trainer:
    """A run: built once, then `train`.

    Args:
        config: checked for the number of ranks.
        device: this rank's.
        stop: what asks the run to stop before its end; None where nothing does.
        resume_from: checkpoints to begin with, wherever they lie, best first; None takes the run folder's.
        evaluator: gives scores every `evaluation.every_steps` and at the end; None: no scores.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        stop: StopRequest | None = None,
        resume_from: Sequence[Path] | None = None,
        evaluator: Evaluator | None = None,
    ) -> None:
        self.config, self.device, self.stop, self.resume_from = config, device, stop, resume_from
        self.evaluator = evaluator
        self.folder, self.working_folder = Path(config.run.folder), os.getcwd()
        self.store = make_store(config)
        with runtime.together():
            self.latents_info = open_folders(config)[0].latents_info
            self.decode, self.decode_note = decode_to_look_at(config, device)
        self.loss = make_loss(config)
        guard = config.guard
        self.guard = Guard(guard.spike_deviations, guard.window_steps, guard.max_skips_in_row)
        blocks = choose_blocks(config, device.type)
        with phase(
            f"building the model on {count(runtime.world_size(), 'rank')}, ZeRO stage {config.engine.zero_stage}"
        ):
            self.engine: Engine = build_engine(lambda: make_model(config, blocks), config, device)
        say(f"{_describe(blocks)}; {self.engine.optimizer_name}")
        self.at = Progression()
        self.must_stop = False
        self.damaged: list[Path] = []
        candidates = self._candidates()
        if not candidates:
            with phase("initialising the weights"):
                self.engine.initialise(initial_weights(config))
        self.ema = ShardedEMA(self.engine.fragments(), config.train.ema_decay, config.engine.ema_on_host)
        saved = self._restore(candidates) if candidates else None
        self.saved_step = None if saved is None else saved.step
        self.history = saved.history_with(to_plain(config)) if saved is not None else []
        if saved is not None:
            self.at = Progression(saved.step, saved.num_skipped, saved.num_rewinds, saved.train_seconds)
            if resume_from is None:
                self.store.set_aside(saved.step, self.damaged)
        position = Position(saved.epoch, saved.samples_in_epoch) if saved else None
        ranks_per_node = runtime.ranks_per_node()
        with runtime.together():
            self.loader: Loader[Batch] = Loader(
                config,
                make_prepare(config),
                runtime.rank(),
                runtime.world_size(),
                position,
                self.at.step,
                ranks_per_node,
                pinned=device.type == "cuda",
            )
        self.lacks_data = True  # until a step is read ahead, and where a rank could not read its share of it
        self.writer = CheckpointWriter(self.store, self.engine.fragments(), self.ema.values)
        self.num_failed_checkpoints = 0
        self.metrics = MetricsFile(self.folder / METRICS_FILE, self.at.step)
        self.scored_step = self._last_scored_step()
        self.tracker = Tracker(
            config.metrics.wandb,
            config.metrics.wandb_project,
            self.folder,
            tracker_run_id(saved, self.folder),
            to_shown(config),
        )
        if stop is not None:
            stop.end_waiting = self.end_waiting
        self.window = Window()
        self.clock = Clock()
        self.waited_before = 0.0  # seconds that the loader had kept training waiting when the last window closed

    def _candidates(self) -> list[Path]:
        """The checkpoints to resume from, best first."""
        if self.resume_from is not None:
            return list(self.resume_from)
        # One rank's view of the folder decides: file systems may show a new name late on other nodes.
        found: list[Path] = runtime.gather(self.store.candidates())[0]
        return found

    def _restore(self, candidates: Sequence[Path]) -> TrainingState:
        """Weights, moments, EMA and the guard's window from the first of these checkpoints that is whole."""
        self.ema.wait()
        for checkpoint in candidates:
            try:
                with phase(f"resuming from {checkpoint}"):
                    saved = self.store.load(checkpoint, self.engine.fragments(), self.ema.values, to_plain(self.config))
            except DamagedCheckpointError as error:
                say(f"WARNING: {checkpoint} is damaged and left out: {error}")
                self.damaged.append(checkpoint)
                continue
            self.engine.optimizer_step = saved.optimizer_step
            self.engine.refresh()
            self.guard.restore(saved.guard)
            return saved
        raise UserError(
            f"run.folder: none of the {len(candidates)} checkpoints in {self.store.folder} is whole; "
            "restore one, or choose another run.folder to begin again"
        )

    def _last_scored_step(self) -> int | None:
        """Where a run that goes on has its last score of the kind that is asked for."""
        if self.evaluator is None:
            return None
        rows = read_metrics(self.folder / METRICS_FILE) if runtime.rank() == 0 else []
        best = None
        with suppress(OSError):  # said at the next save
            best = self.store.best() if rows else None
        if best is not None and best.measured_by != self.evaluator.measured_by:
            rows = []
        last: int | None = max((row["step"] for row in rows if self.evaluator.name in row), default=None)
        return runtime.gather(last)[0]

    # ------------------------------------------------------------------
    # The loop

    def train(self) -> bool:
        """Trains from wherever the run stands; returns whether it came to the end of the config, or was stopped."""
        config = self.config
        progress = Progress(config.train.num_steps, self.at.step)
        say(f"training from step {self.at.step} to {config.train.num_steps}")
        self.clock = Clock()
        try:
            with self.clock.aside():
                if self.must_evaluate():  # what a stop has cut short
                    self.evaluate()
            while not self.must_stop and not is_done(config, self.at.step, self.at.train_seconds):
                self.train_step()
                if self.window_ends() or self.must_stop:
                    self.close_window(progress)
                with self.clock.aside():
                    if not self.must_stop:
                        self.follow_step()
            if not self.must_stop:
                progress.close()
                self._finish()
            if self.must_stop:
                return self._pause()
        except (SickRunError, _LostDataError) as error:
            self._close_early(progress, saves=isinstance(error, _LostDataError))
            raise
        finally:
            self.loader.close()
            self.tracker.close(seconds=1.0)  # where something failed: the launcher soon ends all ranks
        return True

    def _close_early(self, progress: Progress, saves: bool) -> None:
        """Before an error between two steps ends the run: the rows that say why, and what was trained, if `saves`."""
        if self.stop is not None:
            self.stop.end_step()
        if self.window.records:
            self.close_window(progress)
        if saves and self.at.step:
            self._complete_checkpoint()
        self.tracker.close()
        runtime.barrier()

    def follow_step(self) -> None:
        """What happens every n steps, where it is this step's turn."""
        config = self.config
        must_evaluate = self.must_evaluate()
        # Within a row of skips nothing is new, and a rewind would not go there.
        must_save = self.at.step % config.checkpoint.every_steps == 0 and not self.guard.num_skips_in_row
        if must_save or must_evaluate:
            self.save_checkpoint()
        is_last = is_done(config, self.at.step, self.at.train_seconds)  # `_finish` draws those
        if config.sample.every_steps and self.at.step % config.sample.every_steps == 0 and not is_last:
            self.draw_samples()
        if must_evaluate and not self.must_stop:
            self.evaluate()

    def train_step(self) -> None:
        """One optimizer step: the batches of a global batch become a loss, which moves the engine."""
        runtime.tick()
        if self.stop is not None:
            self.stop.begin_step()
        batches = self.next_batches()
        terms = []
        for batch in upload_ahead(batches, self.device):
            terms.append(self.loss(self.engine, batch))
            self.engine.backward(terms[-1].total / terms[-1].count)
        if not self.is_asked_to_stop():
            self.loader.read_ahead()  # a GPU is at work on the backward meanwhile

        told = self.exchange(terms, batches)
        learning_rate = self._learning_rate()
        self.ema.wait()
        applied = self.engine.step(learning_rate, lambda grad_norm: self.is_healthy(told, grad_norm))
        if applied:
            self.ema.update()
        self.at.step += 1
        self.record_step(batches, learning_rate, applied)
        self.obey()

    def end_waiting(self) -> None:
        """What a request to stop ends, from a thread of its own."""
        self.loader.end_waiting()
        self.tracker.expect_end()

    def is_asked_to_stop(self) -> bool:
        """Whether this rank is."""
        return self.stop is not None and self.stop.reason is not None

    def next_batches(self) -> list[Batch]:
        """The step's micro-batches; UserError on all ranks where one of them cannot be read."""
        if self.lacks_data:
            self.loader.read_ahead()
            try:
                runtime.agree(self.loader.problem)
            except UserError as error:
                raise _LostDataError(str(error)) from error
        batches = next(self.loader)
        if any(batch.step != self.at.step for batch in batches):
            raise RuntimeError(f"the loader gave batches of step {batches[0].step} at step {self.at.step}")
        return batches

    def exchange(self, terms: Sequence[LossTerms], batches: Sequence[Batch]) -> Tensor:
        """What all ranks must know before the update, as one sum over ranks on the device: the loss, then `told`."""
        num_sequences, num_tokens = sum(map(len, batches)), sum(batch.num_tokens for batch in batches)
        num_visible = sum(batch.num_visible for batch in batches)
        told = [
            sum(t.count for t in terms),
            training_flops(self.config.model, num_sequences, num_tokens, num_visible),
            self.is_asked_to_stop(),
            self.writer.is_working,
            self.writer.has_failed,
            self.loader.problem is not None,
        ]
        total = torch.stack([t.total.detach() for t in terms]).double().sum(0, keepdim=True)
        return runtime.sum_over_ranks(torch.cat([total, runtime.to_device(told, self.device)]))

    def is_healthy(self, told: Tensor, grad_norm: Tensor) -> bool:
        """Reads back what the ranks told each other and the gradient's norm; whether the step may move the weights."""
        values = runtime.read_back(torch.cat([told, grad_norm.to(told, non_blocking=True).reshape(1)]))
        total, count, flops, *flags, norm = values
        self.exchanged = Exchanged(total / count, norm, flops, *(flag > 0 for flag in flags))
        return self._problem() is None

    def _problem(self) -> str | None:
        """Why the present step may not move the weights."""
        loss, grad_norm = self.exchanged.loss, self.exchanged.grad_norm
        return self.guard.problem_of_loss(loss) or self.guard.problem_of_grad_norm(grad_norm)

    def _learning_rate(self) -> float:
        """Linear warm-up, constant, and where the config asks for it a linear fall to 0 over the last steps."""
        train = self.config.train
        # A skipped step does not move the warm-up; the end stands fixed.
        num_applied = self.at.step - self.at.num_skipped
        warm_up = (num_applied + 1) / max(train.warmup_steps, 1)
        fall = (train.num_steps - self.at.step) / max(train.decay_steps, 1)
        return train.learning_rate * min(1.0, warm_up, fall)

    # ------------------------------------------------------------------
    # Every n steps

    def record_step(self, batches: Sequence[Batch], learning_rate: float, applied: bool) -> None:
        """Notes the step just made, for the metrics and for the guard."""
        loss, grad_norm = self.exchanged.loss, self.exchanged.grad_norm
        row: dict[str, Any] = {
            "step": self.at.step,
            "loss": finite_or_none(loss),
            "grad_norm": finite_or_none(grad_norm),
            "learning_rate": learning_rate,
            "epoch": self.loader.position.epoch,
            "num_ranks": runtime.world_size(),
            "zero_stage": self.config.engine.zero_stage,
        }
        if applied:
            self.guard.applied(loss, grad_norm)
        else:
            row["skipped"] = self._problem()
            say(f"step {self.at.step} is skipped: {row['skipped']}")
            self.guard.skipped()
            self.at.num_skipped += 1
        row |= {"num_skipped_steps": self.at.num_skipped, "num_rewinds": self.at.num_rewinds}
        ids = [i for batch in batches for i in batch.ids_B.tolist()] if self.config.metrics.log_sample_ids else None
        self.window.records.append(StepRecord(row, self.exchanged.flops, ids))

    def obey(self) -> None:
        """Follows what the step's exchange and the guard ask for."""
        self.must_stop |= self.exchanged.must_stop
        if self.stop is not None:
            self.stop.end_step()
            self.stop.leave = None  # from here on there is something to save
        self.lacks_data = self.exchanged.lacks_data
        self._note_checkpoint(self.writer.advance(self.exchanged.is_writing, self.exchanged.has_failed))
        if self.guard.must_rewind:
            with self.clock.aside():
                self._rewind()

    def _rewind(self) -> None:
        """Back to the weights of the last checkpoint before the skipped steps, and on with the data after them."""
        skipped = f"{self.guard.num_skips_in_row} steps in a row were skipped, the last one {self.at.step}"
        if self.at.num_rewinds >= self.config.guard.max_rewinds:
            raise SickRunError(
                f"{skipped}: {self.window.records[-1].row['skipped']}; after {self.at.num_rewinds} rewinds "
                f"(guard.max_rewinds) the run stops; look at the skipped rows of {self.folder / METRICS_FILE}, lower "
                "train.learning_rate, or go on from an earlier checkpoint"
            )
        self._note_checkpoint(self.writer.wait())
        good = runtime.gather([path for path in self._candidates() if is_healthy(path)])[0]
        if not good:
            raise SickRunError(
                f"{skipped}: {self.window.records[-1].row['skipped']}; and there is no checkpoint from before them to "
                "go back to; lower train.learning_rate or mend the data, and begin again in another run.folder"
            )
        saved = self._restore(good)
        self.guard.begin_row()
        # The data of the steps between are behind us; the weights, and the learning rate with them, know nothing of it.
        self.at.num_skipped = self.at.step - (saved.step - saved.num_skipped)
        self.at.num_rewinds += 1
        self.window.records[-1].row |= {
            "rewound_to_step": saved.step,
            "num_skipped_steps": self.at.num_skipped,
            "num_rewinds": self.at.num_rewinds,
        }
        say(f"{skipped}: back to the weights of step {saved.step}, on with the data after step {self.at.step}")

    def window_ends(self) -> bool:
        """Whether the present step's row is due on disk."""
        # A checkpoint's metrics are on disk before it, so that a resume finds all rows up to its step; and wandb takes
        # no row once it has a picture of a later step.
        config = self.config
        every = (
            config.metrics.log_every_steps,
            config.checkpoint.every_steps,
            config.sample.every_steps,
            config.evaluation.every_steps,
            config.train.num_steps,
        )
        return any(n and self.at.step % n == 0 for n in every)

    def close_window(self, progress: Progress) -> None:
        """Sums the window over ranks and writes, logs and shows it."""
        num_steps = len(self.window.records)
        waited, self.waited_before = self.loader.waited_seconds - self.waited_before, self.loader.waited_seconds
        # One slow rank keeps all waiting, and one without memory ends all.
        waited, *peaks = map(max, zip(*runtime.gather((waited, *peak_memory_gb(self.device))), strict=True))
        rows, flops, (seconds, seconds_aside) = self.window.close(self.clock.read())
        self.at.train_seconds += seconds + seconds_aside
        images_per_second = num_steps * self.config.train.global_batch_size / seconds
        peak = peak_flops(self.device, self.config.engine.precision)
        rows[-1] |= {
            "images_per_second": images_per_second,
            "tflops_per_second": flops / seconds / 1e12,
            "mfu": flops / seconds / (peak * runtime.world_size()) if peak else None,
            "data_wait_share": waited / seconds,
            **dict(zip(("peak_memory_gb", "peak_reserved_gb"), peaks, strict=False)),
            "train_seconds": self.at.train_seconds,
        }
        self.metrics.append(rows)
        for row in rows:
            self.tracker.log(row)
        left = self.config.train.num_steps - self.at.step
        seconds_left = left * seconds / num_steps
        if self.config.train.max_train_seconds:
            seconds_left = min(seconds_left, max(0.0, self.config.train.max_train_seconds - self.at.train_seconds))
        loss = rows[-1]["loss"]
        skipped = f"  skipped {self.at.num_skipped}" if self.at.num_skipped else ""
        shown = "not finite" if loss is None else f"{loss:.4f}"
        # Without workers, what takes the time is making the batches.
        doing = "waiting for data" if self.config.data.num_workers else "making batches"
        slow = f"  {waited / seconds:.0%} {doing}" if waited > _LONG_WAIT_SHARE * seconds else ""
        speed = f"{images_per_second:.0f} images/s  {peaks[0]:.1f} GB"
        progress.show(self.at.step, f"loss {shown}  {speed}{skipped}{slow}", seconds_left)

    def save_checkpoint(self) -> None:
        """Begins to write a checkpoint of the present step, once the one in flight is complete."""
        with phase("waiting for the checkpoint in flight", announce=False):
            self._note_checkpoint(self.writer.wait())
        position = self.loader.position
        state = TrainingState(
            step=self.at.step,
            optimizer_step=self.engine.optimizer_step,
            num_skipped=self.at.num_skipped,
            num_rewinds=self.at.num_rewinds,
            guard=self.guard.to_plain(),
            epoch=position.epoch,
            samples_in_epoch=position.samples_in_epoch,
            train_seconds=self.at.train_seconds,
            seed=self.config.run.seed,
            config=to_plain(self.config),
            history=self.history,
            class_names=list(self.latents_info.class_names),
            autoencoder=self.latents_info.autoencoder,
            working_folder=self.working_folder,
            data_fingerprint=self.loader.fingerprint,
            wandb_run_id=self.tracker.run_id,
            versions=_versions(),
        )
        self.ema.wait()
        self.writer.begin(state)

    def _note_checkpoint(self, outcome: Outcome | None) -> None:
        """Takes note of a checkpoint that is complete, or could not be written."""
        if outcome is None:
            return
        if outcome.error is None:
            self.saved_step, self.num_failed_checkpoints = outcome.step, 0
            return
        self.num_failed_checkpoints += 1
        say(f"WARNING: {outcome.error}")
        if self.num_failed_checkpoints >= _MOST_FAILED_CHECKPOINTS:
            raise UserError(f"{self.num_failed_checkpoints} checkpoints in a row failed: {outcome.error}")

    def _complete_checkpoint(self) -> None:
        """A checkpoint of the present step, complete on disk."""
        with phase(f"writing the checkpoint of step {self.at.step}", announce=False):
            self._note_checkpoint(self.writer.wait())
            if self.saved_step == self.at.step:
                return
            self.save_checkpoint()
            outcome = self.writer.wait()
        if outcome is None or outcome.error is not None:
            raise UserError(f"{outcome.error if outcome else 'no checkpoint was written'}")
        self._note_checkpoint(outcome)

    def _pause(self) -> bool:
        """Leaves what the same command goes on from; False: the run is not complete."""
        self.loader.close()
        self._complete_checkpoint()
        # A rank that nobody asked has its reason from another.
        reason = next(found for found in runtime.gather(self.stop.reason if self.stop else None) if found is not None)
        write_requeue(self.folder, reason)
        self.metrics.append([])  # what a full disk kept waiting
        self.tracker.close()
        runtime.barrier()  # the launcher ends the others within a second of the first that ends
        say(f"stopped at step {self.at.step} with a checkpoint ({reason}); the same command goes on")
        return False

    def draw_samples(self) -> None:
        """Writes a labelled grid of EMA samples for each number of AR steps of `config.sample`."""
        sample = self.config.sample
        names = self.latents_info.class_names[: sample.max_classes]
        labels = [i for i in range(len(names)) for _ in range(sample.num_per_class)]
        batch_size = -(-len(labels) // runtime.world_size())
        grids = []
        with phase(f"sampling {count(len(labels), 'image')} at step {self.at.step}"), self._sampling() as module:
            for num_ar_steps in sample.num_ar_steps:
                settings = GenerationSettings(
                    equal_sizes(self.config.model.num_tokens, num_ar_steps),
                    sample.num_denoising_steps,
                    Guidance(sample.guidance),
                    batch_size,
                    self.config.run.seed,
                )
                images = generate_images(
                    self.config, module, labels, settings, self.device, self.decode, self._leave_if_asked
                )
                grids.append((settings, images))
        for settings, images in grids if runtime.rank() == 0 else []:
            with _not_worth_a_run("drawing samples"):
                title = grid_title(f"step {self.at.step}, EMA weights", settings, self.decode_note)
                self._draw_grid(images, names, settings, title)

    @contextmanager
    def _sampling(self) -> Iterator[Any]:
        """The model with its EMA weights, for forwards alone; `_leave_if_asked` leaves the block early."""
        module: Any = self.engine.module
        with suppress(_AskedToStopError), self.ema.applied(self.engine):
            module.eval()
            try:
                yield module
            finally:
                module.train()

    def _leave_if_asked(self) -> None:
        """Between denoising steps: whoever is asked to stop has little time. All ranks call it together."""
        if self.stop is None:
            return
        if runtime.sum_over_ranks(torch.tensor([float(self.is_asked_to_stop())])):
            self.must_stop = True
            raise _AskedToStopError

    def must_evaluate(self) -> bool:
        """Whether a score of the present step is due."""
        every = self.config.evaluation.every_steps
        is_due = self.evaluator is not None and self.at.step > 0 and self.at.step % every == 0
        return is_due and self.scored_step != self.at.step and not self.guard.num_skips_in_row

    def evaluate(self) -> None:
        """Scores the EMA weights; their checkpoint stays where no score so far is better."""
        assert self.evaluator is not None
        # A kill while it scores must not cost the steps before.
        self._note_checkpoint(self.writer.wait())
        begin, name = time.perf_counter(), self.evaluator.name
        num_images, scores = self.config.evaluation.num_images, {}
        doing = phase(f"scoring {num_images} images at step {self.at.step}")
        with doing, _not_worth_a_run("scoring", UserError), self._sampling() as module:
            scores = self.evaluator(module, self.decode, self._leave_if_asked)
        if not scores:  # asked to stop, or impossible: the next score may be
            return
        seconds = time.perf_counter() - begin
        is_best = self.saved_step == self.at.step and runtime.rank() == 0 and self._keep_if_best(scores[name])
        # Last: a run that goes on from here and finds this row has no score to make up for.
        row = {"step": self.at.step, **scores, "evaluation_seconds": seconds}
        self.metrics.append([row])
        self.tracker.log(row)
        self.scored_step = self.at.step
        floor = "" if self.evaluator.floor is None else f" (floor {self.evaluator.floor:.4g})"
        say(f"step {self.at.step}: {name} {scores[name]:.4g}{floor}{', the best so far' * is_best}")

    def _keep_if_best(self, score: float) -> bool:
        assert self.evaluator is not None
        try:
            return self.store.keep_if_best(Best(self.at.step, score, self.evaluator.measured_by))
        except OSError as error:  # the next score tries again
            say(f"WARNING: the best checkpoint cannot be named: {reason_of(error)}")
            return False

    def _draw_grid(self, images: Tensor, names: tuple[str, ...], settings: GenerationSettings, title: str) -> None:
        path = self.folder / SAMPLES / f"step_{self.at.step:08d}_ar_steps_{settings.num_ar_steps:04d}.png"
        files.make_folder(path.parent)
        pictures.sample_grid(path, images, names, title=title, value_range=(0.0, 1.0))
        self.tracker.log_picture(f"samples/ar_steps_{settings.num_ar_steps}", path, self.at.step)

    def _finish(self) -> None:
        """Keeps the last step, draws and scores it, and writes the summary that says the run is done.

        Where it is asked to stop before the summary, `must_stop` is true, and the same command finishes it.
        """
        self.loader.close()
        self._complete_checkpoint()
        self.draw_samples()
        if self.evaluator is not None and self.scored_step != self.at.step and not self.must_stop:
            self.evaluate()
        if self.must_stop:
            return
        peak_rss_mb = runtime.gather(runtime.peak_rss_mb())
        with phase("drawing curves and closing", announce=False), _writes_in(self.folder):
            if runtime.rank() == 0:
                self.metrics.append([])  # what a full disk kept waiting
                rows = read_metrics(self.folder / METRICS_FILE)
                with _not_worth_a_run("drawing curves"):
                    from cfpretrain.evaluation import figures  # matplotlib, which no step needs

                    title = f"{self.config.run.folder}, step {self.at.step}"
                    score = (self.evaluator.name, self.evaluator.floor) if self.evaluator else None
                    figures.curves(self.folder / "curves.png", rows, title, score)
                summary = json.dumps(self._summary(rows, peak_rss_mb), indent=2) + "\n"
                files.replace(self.folder / SUMMARY_FILE, summary)
                remove_requeue(self.folder)
            self.tracker.close()
        say(f"done: step {self.at.step} after {self.at.train_seconds:.0f} s of training; see {self.folder}")
        train = self.config.train
        if self.at.step < train.num_steps:
            fall = " and the learning rate's fall (train.decay_steps)" if train.decay_steps else ""
            say(
                f"WARNING: train.max_train_seconds = {train.max_train_seconds:g} were over before train.num_steps = "
                f"{train.num_steps}{fall}; raise it and give the same command to train on"
            )

    def _summary(self, rows: list[dict[str, Any]], peak_rss_mb: list[float]) -> dict[str, Any]:
        losses = [row["loss"] for row in rows if row.get("loss") is not None]
        tail = losses[-max(1, len(losses) // 20) :]
        return {
            "world_size": runtime.world_size(),
            "zero_stage": self.config.engine.zero_stage,
            "engine_precision": self.config.engine.precision,
            "num_steps": self.at.step,
            "num_skipped_steps": self.at.num_skipped,
            "num_rewinds": self.at.num_rewinds,
            "skipped_steps": [row["step"] for row in rows if "skipped" in row][:_MOST_STEPS_LISTED],
            "train_seconds": self.at.train_seconds,
            "images_per_second": self.at.step * self.config.train.global_batch_size / self.at.train_seconds,
            "loss_first": losses[0] if losses else None,
            "loss_last": sum(tail) / len(tail) if losses else None,
            "peak_rss_mb": max(peak_rss_mb),
            "versions": _versions(),
        }


def run(config: Config, device: torch.device, stop: StopRequest) -> bool:
    """A run from its checks to its end; the process group is started. All ranks call it.

    Returns:
        Whether the run is complete; False where it was asked to stop, and the same command goes on.
    """
    prepare_folder(config, device)
    step = finished_step(config)
    if step is not None:
        limit = "num_steps" if step >= config.train.num_steps else "max_train_seconds"
        say(f"nothing to do: {config.run.folder} is complete at step {step}; raise train.{limit} to train on")
        return True
    record_config(config)
    folder = Path(config.run.folder)
    watch = Watch(config.guard.rank_timeout_seconds, lambda reason: write_requeue(folder, reason), stop)
    try:
        # Its mistakes are found before the engine is built.
        evaluator = Evaluator(config, device) if config.evaluation.every_steps else None
        return Trainer(config, device, stop, evaluator=evaluator).train()
    except (UserError, SickRunError):
        raise
    except Exception as error:
        if explain_no_memory(error) is not None:
            error.add_note(_advise_on_memory(config, device))
        explained = explain_no_memory(error)
        watch.leave_if_ranks_are_lost(EXIT_FAILED if explained is None else EXIT_USER_ERROR)
        if explained is not None:  # this rank is the first that failed
            exit_with(explained, speaks=True)
        raise
    finally:
        watch.end()


@contextmanager
def _not_worth_a_run(what: str, of_kind: type[Exception] = Exception) -> Iterator[None]:
    """An error in a picture or a score is said, and the run goes on; on all ranks where they work together."""
    try:
        yield
    except of_kind as error:
        say(f"WARNING: {what} failed, and the run goes on: {one_line(error):.300}")


@contextmanager
def _writes_in(folder: Path) -> Iterator[None]:
    """Runs a block on each rank; a full disk under one of them ends all."""
    with runtime.together():
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{error.filename or folder} cannot be written: {error.strerror or error}; "
                "free some space there, then give the same command again"
            ) from error


def _advise_on_memory(config: Config, device: torch.device) -> str:
    """What a run that found too little memory needs, and what to change."""
    num_ranks = runtime.world_size()
    network, plan = plan_memory(config, num_ranks, device.type == "cuda")
    file = Path(config.run.folder) / CONFIG_FILE
    return (
        f"{advise(network, plan)}; all choices: python tools/estimate_memory.py --config {file} --num-gpus {num_ranks}"
    )


def _versions() -> dict[str, str]:
    """Of the packages that decide numbers."""
    return runtime.package_versions("torch", "deepspeed") | {"streaming": streaming_version}


def _describe(blocks: BlockSettings) -> str:
    ways = [f"attention {blocks.attention}, in sampling {blocks.cached_attention}"]
    ways += ["blocks compiled"] * blocks.compile
    ways += ["activations recomputed"] * blocks.checkpoint_activations
    ways += ["apex LayerNorm"] * blocks.fused_norm
    return "; ".join(ways)
