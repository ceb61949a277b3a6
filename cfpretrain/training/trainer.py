"""The loop of training: a run is built, makes step after step with what happens between them, and ends or pauses."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cfpretrain.base import runtime
from cfpretrain.base.config import Config, to_plain, to_shown
from cfpretrain.base.console import (
    EXIT_FAILED,
    EXIT_USER_ERROR,
    SickRunError,
    UserError,
    count,
    exit_with,
    explain_no_memory,
    explaining,
    phase,
    say,
)
from cfpretrain.base.stopping import StopRequest
from cfpretrain.base.watchdog import Watchdog
from cfpretrain.core.objective import Batch
from cfpretrain.data.loader import Loader, Position
from cfpretrain.data.online import TrainingData, open_training_data
from cfpretrain.evaluation.evaluator import Evaluator
from cfpretrain.run.build import (
    CONFIG_FILE,
    METRICS_FILE,
    choose_blocks,
    make_model,
    make_prepare,
    make_tokenizer,
)
from cfpretrain.run.checkpoint_store import Best
from cfpretrain.run.guard import Guard
from cfpretrain.run.metrics import MetricsFile, read_metrics
from cfpretrain.run.state import TrainingState
from cfpretrain.run.tracker import Tracker
from cfpretrain.training.engine import build_engine
from cfpretrain.training.events import Checkpoints, Samples, tolerating
from cfpretrain.training.folder import (
    finished_step,
    is_done,
    package_versions,
    prepare_folder,
    record_config,
    tracker_run_id,
    write_requeue,
    write_summary,
)
from cfpretrain.training.log import Log
from cfpretrain.training.memory import advise
from cfpretrain.training.step import Counters, LostDataError, StepResult, TrainingStep


class Trainer:
    """A run: built once, then `train`.

    Args:
        config: checked for the number of ranks.
        device: this rank's.
        stop: what asks the run to stop before its end.
        resume_from: checkpoints to resume from, best first; None takes the run folder's.
        evaluator: gives scores every `evaluation.every_steps` and at the end; None: no scores.
        data: of the config, opened on the device; None: it is opened here.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        stop: StopRequest | None = None,
        resume_from: Sequence[Path] | None = None,
        evaluator: Evaluator | None = None,
        data: TrainingData | None = None,
    ) -> None:
        self.config, self.device, self.stop, self.evaluator = config, device, stop or StopRequest(), evaluator
        self.folder, self.must_stop = Path(config.run.folder), False
        with runtime.together():
            data, tokenizer = data or open_training_data(config, device), make_tokenizer(config)
        self._build_engine()
        self.guard = Guard(config.guard)
        self.checkpoints = Checkpoints(config, self.engine, self.guard, resume_from)
        saved = self.checkpoints.prepare()
        self.ema = self.checkpoints.ema
        self.at, position = Counters(), Position()
        if saved is not None:
            self.at = Counters(saved.step, saved.num_skipped, saved.num_rewinds, saved.train_seconds)
            position = Position(saved.epoch, saved.samples_in_epoch)
        class_names = list(data.latents[0].class_names) if config.model.num_classes else []
        # What a checkpoint says besides counters and tensors.
        self.record: dict[str, Any] = {
            "seed": config.run.seed,
            "config": to_plain(config),
            "history": [] if saved is None else saved.history_with(to_plain(config)),
            "class_names": class_names,
            "autoencoder": data.latents[0].autoencoder,
            "data_kind": data.kind,
            "tokenizer": "" if tokenizer is None else tokenizer.fingerprint,
            "working_folder": os.getcwd(),
            "versions": package_versions(),
        }
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
                device,
                data,
            )
        self.step = TrainingStep(
            config, device, self.engine, self.ema, self.loader, self.guard, self.checkpoints.writer, self.stop
        )
        metrics = MetricsFile(self.folder / METRICS_FILE, self.at.step)
        self.scored_step = self.checkpoints.last_scored_step(evaluator) if evaluator is not None else None
        tracker_id = tracker_run_id(saved, self.folder, config.metrics.wandb)
        self.tracker = Tracker(
            config.metrics.wandb, config.metrics.wandb_project, self.folder, tracker_id, to_shown(config)
        )
        self.log = Log(config, device, metrics, self.tracker)
        self.samples = Samples(config, device, self.engine, self.ema, self.tracker, self.stop, data)
        self.stop.end_waiting = self._end_waiting

    def _build_engine(self) -> None:
        config, num_ranks = self.config, runtime.world_size()
        blocks = choose_blocks(config, self.device.type)
        with phase(f"building the model on {count(num_ranks, 'rank')}, ZeRO stage {config.engine.zero_stage}"):
            self.engine = build_engine(lambda: make_model(config, blocks), config, self.device)
        ways = [f"attention {blocks.attention}, in sampling {blocks.sampling_attention}"]
        ways += ["blocks compiled"] * blocks.compile
        ways += ["activations recomputed"] * blocks.checkpoint_activations
        ways += ["apex LayerNorm"] * blocks.fused_norm
        say("; ".join([*ways, self.engine.optimizer_name]))

    def _end_waiting(self) -> None:
        """At a request to stop, from a thread of its own."""
        self.loader.end_waiting()
        self.tracker.expect_end()

    # ------------------------------------------------------------------
    # The loop

    def train(self) -> bool:
        """Trains from wherever the run stands; returns whether it came to the end of the config, or was stopped."""
        say(f"training from step {self.at.step} to {self.config.train.num_steps}")
        self.log.start_clock()
        try:
            with self.log.aside():
                if self.must_score():  # a stop has cut it short
                    self.score()
            while not self.must_stop and not is_done(self.config, self.at.step, self.at.train_seconds):
                self.train_step()
                if self.log.is_due(self.at.step) or self.must_stop:
                    self.close_window()
                with self.log.aside():
                    if not self.must_stop:
                        self.follow_step()
            if not self.must_stop:
                self.log.close()
                self._finish()
            if self.must_stop:
                self._pause()
        except (SickRunError, LostDataError) as error:
            self._close_early(saves=isinstance(error, LostDataError))
            raise
        finally:
            self.loader.close()
            self.tracker.close(seconds=1.0)  # where something failed: the launcher soon ends all ranks
        return not self.must_stop

    def train_step(self) -> StepResult:
        """One step, its row, and what the ranks agreed to do."""
        runtime.tick()
        with self.stop.step():
            result = self.step(self.at)
            row = self.log.add(self.at, result, self.loader.position.epoch)
        self.must_stop |= result.must_stop
        self.checkpoints.advance(result)
        if self.guard.must_rewind:
            with self.log.aside():
                row["rewound_to_step"] = self.checkpoints.rewind(self.at, str(result.problem))
            row |= {"num_skipped_steps": self.at.num_skipped, "num_rewinds": self.at.num_rewinds}
        self.step.refuse_bad_images(result)  # once the step has its row
        return result

    def close_window(self) -> None:
        """Writes the rows of the steps since the last call."""
        self.log.close_window(self.at, self.loader.waited_seconds)

    # ------------------------------------------------------------------
    # Between steps

    def follow_step(self) -> None:
        """What happens every n steps, where it is this step's turn."""
        config, must_score = self.config, self.must_score()
        # Within a row of skips nothing is new, and a rewind would not go there.
        must_save = self.at.step % config.checkpoint.every_steps == 0 and not self.guard.num_skips_in_row
        if must_save or must_score:
            self.checkpoints.write(self.state())
        is_last = is_done(config, self.at.step, self.at.train_seconds)  # `_finish` draws those
        if config.sample.every_steps and self.at.step % config.sample.every_steps == 0 and not is_last:
            self.draw_samples()
        if must_score and not self.must_stop:
            self.score()

    def state(self) -> TrainingState:
        """The counters and the record of the present step."""
        return TrainingState(
            **asdict(self.at),
            **asdict(self.loader.position),
            **self.record,
            optimizer_step=self.engine.optimizer_step,
            guard=self.guard.to_plain(),
            data_fingerprint=self.loader.fingerprint,
            wandb_run_id=self.tracker.run_id,
        )

    def draw_samples(self) -> None:
        """Draws the EMA weights' samples; a request to stop cuts it short."""
        self.samples.draw(self.at.step)
        self.must_stop |= self.samples.was_stopped

    def must_score(self) -> bool:
        """Whether a score of the present step is due."""
        every = self.config.evaluation.every_steps
        is_due = self.evaluator is not None and self.at.step > 0 and self.at.step % every == 0
        return is_due and self.scored_step != self.at.step and not self.guard.num_skips_in_row

    def score(self) -> None:
        """Scores the EMA weights; their checkpoint stays where no score so far is better."""
        evaluator, step = self.evaluator, self.at.step
        assert evaluator is not None
        self.checkpoints.wait()  # a kill while it scores must not cost the steps before
        row = self.samples.score(step, evaluator)
        self.must_stop |= self.samples.was_stopped
        if not row:
            return
        score = row[evaluator.name]
        is_best = runtime.rank() == 0 and self.checkpoints.keep_if_best(Best(step, score, evaluator.measured_by))
        # Last: a run that resumes from here and finds this row need not score again.
        self.log.write([row])
        self.scored_step = step
        floor = "" if evaluator.floor is None else f" (floor {evaluator.floor:.4g})"
        captions = f"; of captions: CIDEr-D {row['cider']:.4g}" if "cider" in row else ""
        say(f"step {step}: {evaluator.name} {score:.4g}{floor}{', the best so far' * is_best}{captions}")

    # ------------------------------------------------------------------
    # The end

    def _close_early(self, saves: bool) -> None:
        """Before an error between two steps ends the run: writes the rows, and a checkpoint if `saves`."""
        if self.log.rows:
            self.close_window()
        if saves and self.at.step:
            self.checkpoints.complete(self.state())
        self.tracker.close()
        runtime.barrier()

    def _pause(self) -> None:
        """Leaves a checkpoint and a note for the job script: the same command goes on."""
        self.checkpoints.complete(self.state())  # first: what is being encoded may take longer than a scheduler waits
        self.loader.close()
        # A rank without a request takes the reason from one that has it.
        reason = next(found for found in runtime.gather(self.stop.reason) if found is not None)
        write_requeue(self.folder, reason)
        self.log.write([])  # what a full disk kept waiting
        self.tracker.close()
        runtime.barrier()  # the launcher ends the others within a second of the first that ends
        say(f"stopped at step {self.at.step} with a checkpoint ({reason}); the same command goes on")

    def _finish(self) -> None:
        """Keeps the last step, draws and scores it, and writes the summary that says the run is done.

        Where it is asked to stop before the summary, `must_stop` is true, and the same command finishes it.
        """
        self.checkpoints.complete(self.state())
        self.loader.close()
        self.draw_samples()
        if self.evaluator is not None and self.scored_step != self.at.step and not self.must_stop:
            self.score()
        if self.must_stop:
            return
        peak_rss_mb = max(runtime.gather(runtime.peak_rss_mb()))
        full_disk = (
            f"{self.folder} cannot be written: {{reason}}; free some space there, then give the same command again"
        )
        with phase("drawing curves and closing", announce=False), runtime.together(), explaining(full_disk):
            if runtime.rank() == 0:
                self.log.write([])  # what a full disk kept waiting
                rows = read_metrics(self.folder / METRICS_FILE)
                with tolerating("drawing curves"):
                    self._draw_curves(rows)
                write_summary(self.config, self.at, rows, peak_rss_mb)
            self.tracker.close()
        train, at = self.config.train, self.at
        say(f"done: step {at.step} after {at.train_seconds:.0f} s of training; see {self.folder}")
        if at.step < train.num_steps:
            fall = " and the learning rate's fall (train.decay_steps)" if train.decay_steps else ""
            say(
                f"WARNING: train.max_train_seconds = {train.max_train_seconds:g} were over before train.num_steps = "
                f"{train.num_steps}{fall}; raise it and give the same command to train on"
            )

    def _draw_curves(self, rows: list[dict[str, Any]]) -> None:
        from cfpretrain.evaluation import figures  # matplotlib, which no step needs

        title = f"{self.config.run.folder}, step {self.at.step}"
        score = (self.evaluator.name, self.evaluator.floor) if self.evaluator else None
        figures.curves(self.folder / "curves.png", rows, title, score)


def run(config: Config, device: torch.device, stop: StopRequest) -> bool:
    """A run from its checks to its end; the process group is started. All ranks call it.

    Returns:
        Whether the run is complete; False where it was asked to stop, and the same command goes on.
    """
    data = prepare_folder(config, device)
    step = finished_step(config)
    if step is not None:
        limit = "num_steps" if step >= config.train.num_steps else "max_train_seconds"
        say(f"nothing to do: {config.run.folder} is complete at step {step}; raise train.{limit} to train on")
        return True
    record_config(config)
    folder = Path(config.run.folder)
    watchdog = Watchdog(config.guard.rank_timeout_seconds, lambda reason: write_requeue(folder, reason), stop)
    try:
        # Its mistakes are found before the engine is built.
        evaluator = Evaluator(config, device, data.latents[0]) if config.evaluation.every_steps else None
        return Trainer(config, device, stop, evaluator=evaluator, data=data).train()
    except (UserError, SickRunError):
        raise
    except Exception as error:
        if explain_no_memory(error) is not None:
            num_ranks = runtime.world_size()
            advice = advise(config, num_ranks, device.type == "cuda", data.kind)
            command = f"python tools/estimate_memory.py --config {folder / CONFIG_FILE} --num-gpus {num_ranks}"
            error.add_note(f"{advice}; all choices: {command}")
        explained = explain_no_memory(error)
        watchdog.leave_if_ranks_are_lost(EXIT_FAILED if explained is None else EXIT_USER_ERROR)
        if explained is not None:  # this rank is the first that failed
            exit_with(explained, speaks=True)
        raise
    finally:
        watchdog.end()
