"""What happens every n steps: checkpoints are written and gone back to, samples are drawn, weights are scored."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfpretrain.base import files, runtime
from cfpretrain.base.config import Config, to_plain
from cfpretrain.base.console import SickRunError, UserError, count, excerpt, one_line, phase, reason_of, say
from cfpretrain.base.stopping import StopRequest
from cfpretrain.core.ar import equal_sizes
from cfpretrain.core.sampler import Guidance
from cfpretrain.core.texts import FRAME, Marks
from cfpretrain.data.online import TrainingData
from cfpretrain.evaluation import pictures
from cfpretrain.evaluation.evaluator import Evaluator
from cfpretrain.evaluation.generation import (
    Condition,
    GenerationSettings,
    ImageGenerator,
    decode_to_look_at,
    grid_title,
)
from cfpretrain.run.build import METRICS_FILE, SAMPLES, initial_weights, make_store, make_tokenizer
from cfpretrain.run.checkpoint import load
from cfpretrain.run.checkpoint_store import Best, is_healthy
from cfpretrain.run.checkpoint_writer import CheckpointWriter, Outcome
from cfpretrain.run.guard import Guard
from cfpretrain.run.metrics import read_metrics
from cfpretrain.run.state import TrainingState
from cfpretrain.run.tensor_files import DamagedCheckpointError
from cfpretrain.run.tracker import Tracker
from cfpretrain.training.ema import ShardedEMA
from cfpretrain.training.engine import Engine
from cfpretrain.training.step import Counters, StepResult

_MOST_FAILED_CHECKPOINTS = 3  # in a row
_MOST_CAPTIONS_READ = 100  # to find different ones


@dataclass
class Checkpoints:
    """The checkpoints of a run in training: read, written beside the steps, gone back to."""

    config: Config
    engine: Engine
    guard: Guard
    resume_from: Sequence[Path] | None  # in place of those in the run folder, best first

    def __post_init__(self) -> None:
        self.store = make_store(self.config)
        self.saved_step: int | None = None  # of the latest complete one that the run has written or read
        self._num_failed = 0

    def prepare(self) -> TrainingState | None:
        """Restores the run, or initialises the weights where there is no checkpoint; makes EMA and writer."""
        candidates, saved = self.candidates(), None
        if not candidates:
            with phase("initialising the weights"):
                self.engine.initialise(initial_weights(self.config))
        decay, on_host = self.config.train.ema_decay, self.config.engine.ema_on_host
        self.ema = ShardedEMA(self.engine.fragments(), decay, on_host)
        if candidates:
            saved, damaged = self._restore(candidates)
            self.saved_step = saved.step
            if self.resume_from is None:
                self.store.set_aside(saved.step, damaged)
        self.writer = CheckpointWriter(self.store, self.engine.fragments(), self.ema.values)
        return saved

    def candidates(self) -> list[Path]:
        """The checkpoints to resume from, best first."""
        if self.resume_from is not None:
            return list(self.resume_from)
        # One rank's view of the folder decides: file systems may show a new name late on other nodes.
        found: list[Path] = runtime.gather(self.store.candidates())[0]
        return found

    def _restore(self, candidates: Sequence[Path]) -> tuple[TrainingState, list[Path]]:
        """Weights, optimizer, EMA and the guard's window from the first that is whole; and those before it."""
        self.ema.wait()
        for i, checkpoint in enumerate(candidates):
            try:
                with phase(f"resuming from {checkpoint}"):
                    saved = load(checkpoint, self.engine.fragments(), self.ema.values, to_plain(self.config))
            except DamagedCheckpointError as error:
                say(f"WARNING: {checkpoint} is damaged and left out: {error}")
                continue
            self.engine.optimizer_step = saved.optimizer_step
            self.engine.refresh()
            self.guard.restore(saved.guard)
            return saved, list(candidates[:i])
        raise UserError(
            f"run.folder: none of the {len(candidates)} checkpoints in {self.store.folder} is whole; "
            "restore one, or choose another run.folder to begin again"
        )

    def rewind(self, at: Counters, problem: str) -> int:
        """Back to the weights of the last checkpoint before a row of skipped steps; the data goes on after them.

        `at` counts the steps between as skipped; `problem` is that of the last one. Returns the checkpoint's step.

        Raises:
            SickRunError: on all ranks: there were too many rewinds, or there is no such checkpoint.
        """
        skipped = f"{self.guard.num_skips_in_row} steps in a row were skipped, the last one {at.step}"
        if at.num_rewinds >= self.config.guard.max_rewinds:
            raise SickRunError(
                f"{skipped}: {problem}; after {at.num_rewinds} rewinds (guard.max_rewinds) the run stops; look at the "
                f"skipped rows of {Path(self.config.run.folder) / METRICS_FILE}, lower train.learning_rate, or go on "
                "from an earlier checkpoint"
            )
        self.wait()
        good = runtime.gather([path for path in self.candidates() if is_healthy(path)])[0]
        if not good:
            raise SickRunError(
                f"{skipped}: {problem}; and there is no checkpoint from before them to go back to; lower "
                "train.learning_rate or fix the data, and begin again in another run.folder"
            )
        saved, _ = self._restore(good)
        self.guard.num_skips_in_row = 0
        # The learning rate goes back with the weights: it counts the steps whose update is in them.
        at.num_skipped = at.step - (saved.step - saved.num_skipped)
        at.num_rewinds += 1
        say(f"{skipped}: back to the weights of step {saved.step}, on with the data after step {at.step}")
        return saved.step

    def write(self, state: TrainingState) -> None:
        """Begins to write a checkpoint, once the one in flight is complete; it is written beside the steps."""
        with phase("waiting for the checkpoint in flight", announce=False):
            self.wait()
        self.ema.wait()
        self.writer.begin(state)

    def complete(self, state: TrainingState) -> None:
        """Writes a checkpoint, unless it is there already, and waits until it is on disk."""
        with phase(f"writing the checkpoint of step {state.step}", announce=False):
            self.wait()
            if self.saved_step == state.step:
                return
            self.write(state)
            outcome = self.writer.wait()
        assert outcome is not None
        if outcome.error is not None:
            raise UserError(outcome.error)
        self._note(outcome)

    def advance(self, result: StepResult) -> None:
        """After a step: leads the checkpoint in flight to its next phase."""
        self._note(self.writer.advance(result.is_writing, result.has_failed))

    def wait(self) -> None:
        """Until no checkpoint is in flight; all ranks call it together."""
        self._note(self.writer.wait())

    def _note(self, outcome: Outcome | None) -> None:
        """Notes a checkpoint that is complete or has failed; UserError after some failures in a row."""
        if outcome is None:
            return
        if outcome.error is None:
            self.saved_step, self._num_failed = outcome.step, 0
            return
        self._num_failed += 1
        say(f"WARNING: {outcome.error}")
        if self._num_failed >= _MOST_FAILED_CHECKPOINTS:
            raise UserError(f"{self._num_failed} checkpoints in a row failed: {outcome.error}")

    def keep_if_best(self, best: Best) -> bool:
        """Whether no other has a better score; rank 0 calls it once the checkpoint is complete."""
        try:
            return self.saved_step == best.step and self.store.keep_if_best(best)
        except OSError as error:  # the next score tries again
            say(f"WARNING: the best checkpoint cannot be named: {reason_of(error)}")
            return False

    def last_scored_step(self, evaluator: Evaluator) -> int | None:
        """The step of the run's last score, where it was measured as the evaluator does."""
        last = None
        if runtime.rank() == 0:
            rows, best = read_metrics(Path(self.config.run.folder) / METRICS_FILE), None
            with suppress(OSError):  # said at the next save
                best = self.store.best() if rows else None
            if best is None or best.measured_by == evaluator.measured_by:
                last = max((row["step"] for row in rows if evaluator.name in row), default=None)
        agreed: int | None = runtime.gather(last)[0]
        return agreed


class _AskedToStopError(Exception):
    """Ends sampling on all ranks, where one of them is asked to stop."""


class Rows(NamedTuple):
    """What the rows of a grid of samples show."""

    names: tuple[str, ...]
    conditions: tuple[Condition, ...]
    marks: Marks | None  # of texts


def choose_rows(config: Config, data: TrainingData) -> Rows:
    """What grids show: texts, classes or images without any condition, whichever the model learns.

    Texts are those of the config, or else the first different captions where a model learns to draw captions.
    UserError where a text is too long.
    """
    most, tasks, tokenizer = config.sample.max_classes, config.data.tasks, make_tokenizer(config)
    texts = config.sample.prompts
    if tokenizer is None or (tasks.class_to_image and not tasks.text_to_image and not texts):
        names = tuple(data.latents[0].class_names[:most])
        return Rows(names, tuple(range(len(names))), None)
    if not texts and not tasks.text_to_image:
        return Rows(("no condition",), (None,), Marks(*tokenizer.marks))
    if not texts:
        first = data.folders[0].samples(range(min(len(data.folders[0]), _MOST_CAPTIONS_READ)))
        texts = tuple(dict.fromkeys(one["caption"] for one in first if one["caption"]))[:most] or ("",)
    conditions, most_tokens = tuple(tokenizer.encode_batch(texts)), config.model.max_text_tokens - FRAME
    for text, tokens in zip(texts, conditions, strict=True):
        if len(tokens) > most_tokens:
            raise UserError(
                f"sample.prompts: expected at most {most_tokens} tokens (model.max_text_tokens "
                f"without the two that frame them), got {len(tokens)} in {excerpt(repr(text), 80)}; shorten it"
            )
    return Rows(texts, conditions, Marks(*tokenizer.marks))


@dataclass
class Samples:
    """Pictures and scores of the EMA weights."""

    config: Config
    device: torch.device
    engine: Engine
    ema: ShardedEMA
    tracker: Tracker
    stop: StopRequest
    data: TrainingData

    def __post_init__(self) -> None:
        self.was_stopped = False  # a rank was asked to stop meanwhile, and all have left
        with runtime.together():
            self.decode, self.decode_note = decode_to_look_at(self.config, self.device)
            self._rows = choose_rows(self.config, self.data) if runtime.rank() == 0 else None
        self._rows = runtime.gather(self._rows)[0]

    def draw(self, step: int) -> None:
        """Writes a labelled grid for each number of AR steps of `config.sample`."""
        sample, rows = self.config.sample, self._rows
        assert rows is not None
        conditions = [one for one in rows.conditions for _ in range(sample.num_per_class)]
        batch_size = -(-len(conditions) // runtime.world_size())
        grids = []
        with phase(f"sampling {count(len(conditions), 'image')} at step {step}"), self._model() as model:
            for num_ar_steps in sample.num_ar_steps:
                sizes = equal_sizes(self.config.model.num_tokens, num_ar_steps)
                guidance, seed = Guidance(sample.guidance), self.config.run.seed
                settings = GenerationSettings(sizes, sample.num_denoising_steps, guidance, batch_size, seed)
                generator = ImageGenerator(self.config, model, settings, self.device, rows.marks)
                grids.append((settings, generator.images(conditions, self.decode, self._leave_if_asked)))
        for settings, images in grids if runtime.rank() == 0 else []:
            with tolerating("drawing samples"):
                self._draw_grid(step, images, rows.names, settings)

    def _draw_grid(self, step: int, images: Tensor, names: tuple[str, ...], settings: GenerationSettings) -> None:
        title = grid_title(f"step {step}, EMA weights", settings, self.decode_note)
        path = Path(self.config.run.folder, SAMPLES, f"step_{step:08d}_ar_steps_{settings.num_ar_steps:04d}.png")
        files.make_folder(path.parent)
        pictures.sample_grid(path, images, names, title=title, value_range=(0.0, 1.0))
        self.tracker.log_picture(f"samples/ar_steps_{settings.num_ar_steps}", path, step)

    def score(self, step: int, evaluator: Evaluator) -> dict[str, Any]:
        """The row of the scores; an empty one where it was stopped, or there are none of such images."""
        begin, scores = time.perf_counter(), {}
        doing = phase(f"scoring {self.config.evaluation.num_images} images at step {step}")
        with doing, tolerating("scoring", UserError), self._model() as model:
            scores = evaluator(model, self.decode, self._leave_if_asked)
        return {"step": step, **scores, "evaluation_seconds": time.perf_counter() - begin} if scores else {}

    @contextmanager
    def _model(self) -> Iterator[Any]:
        """The model with its EMA weights, for forwards alone; `_leave_if_asked` leaves the block early."""
        module: Any = self.engine.module
        with suppress(_AskedToStopError), self.ema.applied(self.engine):
            module.eval()
            try:
                yield module
            finally:
                module.train()

    def _leave_if_asked(self) -> None:
        """Between denoising steps: a process that is asked to stop has little time. All ranks call it together."""
        if runtime.sum_over_ranks(torch.tensor([float(self.stop.reason is not None)])):
            self.was_stopped = True
            raise _AskedToStopError


@contextmanager
def tolerating(what: str, of_kind: type[Exception] = Exception) -> Iterator[None]:
    """Reports an error in a picture or a score, and goes on; on all ranks where they work together."""
    try:
        yield
    except of_kind as error:
        say(f"WARNING: {what} failed, and the run goes on: {one_line(error):.300}")
