"""What tools/measure.py step times, each in a process: the trainer, the bare engine, the plain implementation."""

import functools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfpretrain.base import console, runtime
from cfpretrain.base.config import Config
from cfpretrain.core.objective import Batch, Draws
from cfpretrain.data.loader import Loader
from cfpretrain.data.samples import Prepare, Samples
from cfpretrain.run.build import choose_blocks, initial_weights, make_loss, make_model, make_prepare, make_scaling
from cfpretrain.run.metrics import training_flops
from tools.measuring.common import refuse_skipped, resident_bytes, synchronise
from tools.measuring.profiling import profile

NAIVE = ("naive", "naive-autocast")


@dataclass(frozen=True)
class StepResult:
    """One step as one side made it."""

    seconds: float
    loss: float  # of the global batch
    flops: float = 0.0  # of the global batch; 0 where the side does not count


class TrainerSide:
    """The trainer's step."""

    def __init__(self, config: Config, device: torch.device) -> None:
        from cfpretrain.training import trainer

        # Each window counts the peak of memory from the start.
        metrics = replace(config.metrics, log_every_steps=config.train.num_steps)
        config = replace(config, metrics=metrics)
        trainer.prepare_folder(config, device)
        self._trainer = trainer.Trainer(config, device)

    def prepare(self, num_steps: int) -> None:
        """Nothing: its loader is part of the step."""

    def step(self) -> tuple[float, float]:
        """The next step, and what training does with its row; returns the loss and the FLOPs."""
        trainer = self._trainer
        result = trainer.train_step()
        if trainer.log.is_due(trainer.at.step):
            trainer.close_window()
        refuse_skipped(trainer)
        return result.loss, result.flops

    def close(self) -> None:
        """Ends the loader's workers and the EMA's update."""
        self._trainer.loader.close()
        self._trainer.ema.wait()


class _OnBatches:
    """A side whose batches are made ahead."""

    def __init__(self, config: Config, device: torch.device, prepare: Prepare[Any], move: Callable[[Any], Any]) -> None:
        self._config, self._device, self._move = config, device, move
        self._loader: Loader[Any] = Loader(config, prepare, 0, 1)
        self._ready: list[list[Any]] = []

    def prepare(self, num_steps: int) -> None:
        """Puts the batches of the next steps on the device."""
        self._ready += [list(map(self._move, next(self._loader))) for _ in range(num_steps)]

    def close(self) -> None:
        """Ends the loader's workers."""
        self._loader.close()


class BareSide(_OnBatches):
    """The engine and the objective alone."""

    def __init__(self, config: Config, device: torch.device) -> None:
        from cfpretrain.training.engine import build_engine

        self._loss, blocks = make_loss(config), choose_blocks(config, device.type)
        self._engine = build_engine(lambda: make_model(config, blocks), config, device)
        self._engine.initialise(initial_weights(config))
        super().__init__(config, device, make_prepare(config), lambda batch: batch.to(device))

    def step(self) -> tuple[float, float]:
        """The next step; returns the loss and the FLOPs."""
        batches: list[Batch] = self._ready.pop(0)
        all_terms = []
        for batch in batches:
            all_terms.append(self._loss(self._engine, batch))
            self._engine.backward(self._loss.total(all_terms[-1]))
        self._engine.step(self._config.train.learning_rate)
        loss = statistics.mean(float(self._loss.total(terms).detach()) for terms in all_terms)
        return loss, sum(training_flops(self._config.model, batch.work, self._config.train.freeze) for batch in batches)


class NaiveSide(_OnBatches):
    """The plain implementation, on the same numbers."""

    def __init__(self, config: Config, device: torch.device, autocast: bool) -> None:
        from tests.plain_step import PlainTraining

        self._training = PlainTraining(config, device, autocast)
        super().__init__(config, device, make_draw(config), lambda drawn: (drawn[0].to(device), drawn[1]))

    def step(self) -> tuple[float, float]:
        """The next step; returns the loss, and no FLOPs."""
        return self._training.step(self._ready.pop(0)), 0.0


def make_draw(config: Config) -> Prepare[tuple[Tensor, Draws]]:
    """What makes of samples the latents that the network sees, and the draws: `build.make_prepare` halfway."""
    scaling, loss, model = make_scaling(config), make_loss(config), config.model

    def draw(samples: Samples, step: int) -> tuple[Tensor, Draws]:
        drawn = loss.draw(step, samples.epoch, samples.ids_B, samples.labels_B, model.num_tokens, model.patch_values)
        return scaling.to_model(samples.latents_BCYX), drawn

    return draw


Side = TrainerSide | BareSide | NaiveSide


def make_side(name: str, config: Config, device: torch.device) -> Side:
    """The side of that name: "trainer", "bare", "naive" or "naive-autocast"."""
    if name in NAIVE:
        return NaiveSide(config, device, name == "naive-autocast")
    return TrainerSide(config, device) if name == "trainer" else BareSide(config, device)


def make_steps(side: Side, num_steps: int, device: torch.device) -> list[StepResult]:
    """Makes the side's next steps, one right after the other, and times them."""
    side.prepare(num_steps)
    synchronise(device)
    made = []
    for i in range(num_steps):
        begin = time.perf_counter()
        loss, flops = side.step()
        if i == num_steps - 1:  # what the device still has to do is part of the steps as a whole
            synchronise(device)
        made.append(StepResult(time.perf_counter() - begin, loss, flops))
    return made


def _seconds_since_start() -> float:
    """Since this process was started."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


_IMPORTS = _seconds_since_start()


class Measured:
    """A side in this process, which joins a process group of its own for it."""

    def __init__(self, name: str, config: Config) -> None:
        for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
            os.environ.pop(variable, None)  # of a launcher that started the process
        self.name, self._device = name, runtime.pick_device()
        begin = time.perf_counter()
        runtime.start(self._device)
        if name not in NAIVE:
            # Its libraries are no memory of a step.
            os.environ.setdefault("DS_ACCELERATOR", self._device.type)
            import cfpretrain.training.trainer  # noqa: F401
        imported = time.perf_counter()
        self._bare_bytes = resident_bytes("VmRSS")
        self._side = make_side(name, config, self._device)
        # Seconds, by phase; a phase of the engine is part of the building.
        self.start = {
            "imports": _IMPORTS,
            "deepspeed": imported - begin,
            "building": time.perf_counter() - imported,
            **console.phase_seconds,
        }
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)  # what building took is no memory of a step

    def steps(self, num_steps: int) -> list[StepResult]:
        """The next steps, one right after the other."""
        return make_steps(self._side, num_steps, self._device)

    def profile(self) -> dict[str, Any]:
        """The next step, profiled."""
        self._side.prepare(1)
        return profile(self._side.step, self._device)

    def end(self) -> int:
        """Ends it; returns its peak memory in bytes: weights, gradients, moments and activations at their highest."""
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
        else:
            peak = max(0, resident_bytes("VmHWM") - self._bare_bytes)
        self._side.close()
        runtime.stop()
        return peak


_measured: Measured  # in the process of a `Worker`


def _begin(name: str, config: Config) -> dict[str, float]:
    global _measured
    _measured = Measured(name, config)
    return _measured.start


def _call(method: str, *given: Any) -> Any:
    return getattr(_measured, method)(*given)


class Worker:
    """`Measured` in a process of its own, which ends with the pool."""

    def __init__(self, name: str, config: Config) -> None:
        self.name = name
        others = set(multiprocessing.active_children())
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self._pool.submit(os.getpid).result()
        (self._process,) = set(multiprocessing.active_children()) - others
        try:
            self.start = self._run(_begin, name, config)
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """Ends the process: where another side fails, its loader's workers would keep it alive."""
        self._process.kill()
        self._pool.shutdown()

    def __getattr__(self, method: str) -> Callable[..., Any]:
        """A method of `Measured`, called there."""
        return functools.partial(self._run, _call, method)

    def _run(self, function: Callable[..., Any], *given: Any) -> Any:
        try:
            return self._pool.submit(function, *given).result()
        except BrokenProcessPool as error:
            raise RuntimeError(f"the process of {self.name} died; out of memory?") from error
