"""The training of a small KL autoencoder: a step at a time, with a state that a later start goes on from.

The loss is the squared error of pixels in [-1, 1] plus a small weight on the posterior's KL divergence from a normal
distribution, both as means over values. Order and noise are functions of the seed and the step, so that a state is the
weights, Adam's moments and a count.
"""

import copy
import functools
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cfpretrain.autoencoder import PIXELS_AT_ONCE, KLAutoencoder, fingerprint
from cfpretrain.base import files
from cfpretrain.base.console import Progress, SickRunError, UserError, one_line, phase, say
from cfpretrain.base.differences import differences
from cfpretrain.base.stopping import StopRequest
from cfpretrain.core import seeds
from examples.digits.reconstruction import draw_reconstructions

PICTURE_FILE = "reconstructions.png"
NUM_STEPS = "--num-steps"  # of the settings

_STATE_FILE = "state.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, as torch names them
_WARM_UP = 1 / 30  # share of the steps
_NUM_SHOWN = 16  # images of the picture
_MOST_SAVING = 0.05  # share of the time
_FITTING = 0.9  # share of a time limit for the steps themselves; the rest saves, measures and writes
_BATCH = 500  # images at once where nothing is learned


class StoppedError(Exception):
    """There was a request to stop; the state is saved."""


def check(stop: StopRequest) -> None:
    """Raises StoppedError after a request to stop."""
    if stop.reason is not None:
        raise StoppedError


class Training:
    """A training at some step.

    Args:
        network: an AutoencoderKL, on the device where it will be trained, in place.
        train_BCYX: images to train on, uint8, on the CPU.
        held_out_BCYX: images for the picture, likewise.
        settings: all that the weights depend on, JSON-able, by the argument's name: `--num-steps`, `--batch-size`,
            `--learning-rate` (its height), `--kl-weight`, `--seed`, and what says which images and first weights.
            Without a number of steps, `settle` must follow.
        folder: where the state and the picture are saved, and a state of the same settings may lie.
    """

    def __init__(
        self, network: Any, train_BCYX: Tensor, held_out_BCYX: Tensor, settings: Mapping[str, Any], folder: Path
    ) -> None:
        self.network, self.settings, self.folder = network, dict(settings), folder
        self.step, self.seconds = 0, 0.0  # done, and what they took, all starts together
        self._train_BCYX, self._held_out_BCYX = train_BCYX, held_out_BCYX
        self._device: torch.device = next(network.parameters()).device
        self._machine = (
            f"a CPU with {torch.get_num_threads()} threads" if self._device.type == "cpu" else str(self._device)
        )
        self._optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.0)
        self._order = functools.lru_cache(2)(self._draw_order)
        if (folder / _STATE_FILE).exists():
            self._load()

    @property
    def num_steps(self) -> int:
        """In all."""
        return int(self.settings[NUM_STEPS])

    def settle(self, most_steps: int, max_seconds: float) -> None:
        """Times a step, says how long the training takes, and settles the number of steps where the settings have none.

        Args:
            most_steps: in that case.
            max_seconds: the time limit, for all starts together.
        """
        with phase("timing a step"):
            seconds = self._time_a_step()
        fitting = (max_seconds - self.seconds) / seconds
        if self.settings[NUM_STEPS] is None:
            self.settings[NUM_STEPS] = max(1, int(min(most_steps, _FITTING * fitting)))
        left = self.num_steps - self.step
        going_on = f"going on at step {self.step} of {self.num_steps}: " if self.step else ""
        say(f"{going_on}a step takes {seconds:.3g} s, {left} steps about {_duration(left * seconds)}")
        if left > fitting:
            say(
                f"WARNING: about {max(0, int(fitting))} of them fit into --max-minutes, and the learning rate will not "
                f"have fallen by then; give fewer {NUM_STEPS}"
            )

    def run(self, stop: StopRequest, save_seconds: float, max_seconds: float) -> None:
        """Trains to the end, or to its time limit, and saves; StoppedError after a request to stop, the state saved.

        Args:
            stop: looked at after each step.
            save_seconds: between two saved states, at least; more where a twentieth of the time would not do for them.
            max_seconds: as for `settle`.

        Raises:
            SickRunError: the loss is not finite.
            OSError: the state cannot be written.
        """
        begin, first, earlier = time.monotonic(), self.step, self.seconds
        saved_at, took = begin, 0.0
        progress = Progress(self.num_steps, self.step)
        self.network.train()
        while stop.reason is None and self.step < self.num_steps and self.seconds < max_seconds:
            squared_error, divergence = self._train_step()
            self.step, now = self.step + 1, time.monotonic()
            self.seconds = earlier + now - begin
            left = (now - begin) / (self.step - first) * (self.num_steps - self.step)
            text = f"squared error {squared_error:.4f}  KL {divergence:.3f} nats a value"
            progress.show(self.step, text, max(0.0, min(left, max_seconds - self.seconds)))
            if now - saved_at >= max(save_seconds, took / _MOST_SAVING):
                self.save()
                saved_at = time.monotonic()
                took = saved_at - now
        progress.close()
        self.network.eval()
        self.save()
        if self.step < self.num_steps:
            check(stop)
            say(
                f"the time is over (--max-minutes): {self.num_steps - self.step} of {self.num_steps} steps are "
                f"missing, and the learning rate is still {self._learning_rate():.2g}"
            )

    def save(self) -> None:
        """Writes the state, whole or not at all, and the picture."""
        tensors: dict[str, Tensor] = {}
        for name, value in self.network.named_parameters():
            moments = self._optimizer.state.get(value)
            parts = {"weights": value} | ({key: moments[key] for key in _MOMENTS} if moments else {})
            tensors |= {f"{part}/{name}": one for part, one in parts.items()}
        state = {"step": self.step, "seconds": self.seconds, "settings": self.settings, "machine": self._machine}
        files.replace(self.folder / _STATE_FILE, functools.partial(_write_state, tensors=tensors, state=state))
        # As they will be written: in half precision.
        made = KLAutoencoder(copy.deepcopy(self.network).half().float(), "", "OUT")
        self.draw(self.folder / PICTURE_FILE, made)

    def draw(self, file: Path, made: KLAutoencoder) -> None:
        """Puts held-out images beside what an autoencoder makes of them, as PNG."""
        title = f"held-out images after {self.step} of {self.num_steps} steps"
        draw_reconstructions(file, made, evenly(self._held_out_BCYX, _NUM_SHOWN), self._device, title)

    def _load(self) -> None:
        tensors, state = _read_state(self.folder / _STATE_FILE, f"delete {self.folder} to begin again")
        if self.settings[NUM_STEPS] is None:
            self.settings[NUM_STEPS] = state["settings"][NUM_STEPS]
        different = differences(state["settings"], self.settings)
        if different:
            raise UserError(
                f"OUT: {self.folder} is the unfinished training of other settings ({different}); give those, or delete "
                "it to begin again"
            )
        if state["machine"] != self._machine:
            say(f"WARNING: begun on {state['machine']}, continued on {self._machine}, which rounds differently")
        self.step, self.seconds = state["step"], state["seconds"]
        with torch.no_grad():
            for name, value in self.network.named_parameters():
                value.copy_(tensors[f"weights/{name}"])
                if self.step:
                    moments = {key: tensors[f"{key}/{name}"].to(self._device) for key in _MOMENTS}
                    self._optimizer.state[value] = {"step": torch.tensor(float(self.step)), **moments}

    def _time_a_step(self) -> float:
        """Seconds, of some that change nothing; the first does not count, but where it takes long."""
        seconds: list[float] = []
        while len(seconds) < 2 or (len(seconds) < 5 and sum(seconds) < 1):
            begin = time.monotonic()
            self._add_gradients()
            self._optimizer.zero_grad()
            seconds.append(time.monotonic() - begin)
            if seconds[-1] > 5:
                break
        return min(seconds)

    def _train_step(self) -> tuple[float, float]:
        errors = self._add_gradients()
        if not all(map(math.isfinite, errors)):
            raise SickRunError(
                f"the loss of step {self.step + 1} is not finite; delete {self.folder} and give a smaller "
                f"--learning-rate than {self.settings['--learning-rate']:g}"
            )
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return errors

    def _learning_rate(self) -> float:
        """Of the next step: linear warm-up, then half a cosine."""
        warm_up = min(1.0, (self.step + 1) / math.ceil(_WARM_UP * self.num_steps))
        return float(
            self.settings["--learning-rate"] * warm_up * (1 + math.cos(math.pi * self.step / self.num_steps)) / 2
        )

    def _add_gradients(self) -> tuple[float, float]:
        """The backward pass of the next step; returns its squared error and KL divergence, a value."""
        batch_BCYX = to_network(self._train_BCYX[self._batch()], self._device)
        posterior = self.network.encode(batch_BCYX).latent_dist
        key = seeds.fold(seeds.key(self.settings["--seed"], "autoencoder posterior"), self.step)
        squared_error = (self.network.decode(_sample(posterior, key)).sample - batch_BCYX).square().mean()
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
        (squared_error + self.settings["--kl-weight"] * divergence).backward()
        return squared_error.item(), divergence.item()

    def _batch(self) -> Tensor:
        """The places of the next step's images: epochs one after the other, each in an order of its own."""
        num, size = len(self._train_BCYX), self.settings["--batch-size"]
        position_B = torch.arange(self.step * size, (self.step + 1) * size)
        epoch_B = position_B // num
        return torch.cat(
            [self._order(epoch)[position_B[epoch_B == epoch] - epoch * num] for epoch in epoch_B.unique().tolist()]
        )

    def _draw_order(self, epoch: int) -> Tensor:
        key = seeds.fold(seeds.key(self.settings["--seed"], "autoencoder order"), epoch)
        return seeds.permutation(key, len(self._train_BCYX))


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _sample(posterior: Any, key: Tensor) -> Tensor:
    # On the CPU: the same numbers on every device.
    noise_BCYX = seeds.normal(key, posterior.mean.shape).to(posterior.mean.device)
    drawn: Tensor = posterior.mean + posterior.std * noise_BCYX
    return drawn


def to_network(images_BCYX: Tensor, device: torch.device) -> Tensor:
    """uint8 images -> pixels in [-1, 1], on a device."""
    return images_BCYX.to(device).float() / 127.5 - 1


def evenly(images_BCYX: Tensor, most: int) -> Tensor:
    """At most so many of the images, evenly spread."""
    places = torch.linspace(0, len(images_BCYX) - 1, min(len(images_BCYX), most), dtype=torch.float64)
    return images_BCYX[places.round().long()]


def measure_latents(network: Any, images_BCYX: Tensor, seed: int, stop: StopRequest) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of the posterior's samples, in four digits; see `check`."""
    key, device, samples = seeds.key(seed, "autoencoder latents"), next(network.parameters()).device, []
    with torch.no_grad():
        # Of large images fewer: their activations take hundreds of times the memory of the images.
        num_at_once = min(_BATCH, max(1, PIXELS_AT_ONCE // (images_BCYX.shape[-2] * images_BCYX.shape[-1])))
        for number, batch_BCYX in enumerate(images_BCYX.split(num_at_once)):
            check(stop)
            posterior = network.encode(to_network(batch_BCYX, device)).latent_dist
            samples.append(_sample(posterior, seeds.fold(key, number)).cpu())
    std_C, mean_C = torch.std_mean(torch.cat(samples).double(), dim=(0, 2, 3))
    mean, std = ([float(f"{value:.4g}") for value in values_C.tolist()] for values_C in (mean_C, std_C))
    return mean, std


# ---------------------------------------------------------------------------------------------------------------------
# The state of a training, in one file


def _write_state(file: IO[bytes], tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Writes safetensors whose header carries a JSON-able state, and a hash of the tensors."""
    held = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    file.write(save(held, {"state": json.dumps({**state, "fingerprint": fingerprint(held)})}))


def _read_state(file: Path, fix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of `_write_state`; UserError, with what to do about it, where a byte is another."""
    try:
        files.check_safetensors(file)
        with safe_open(file, "pt") as opened:
            state: dict[str, Any] = files.parse_json(opened.metadata()["state"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if state.pop("fingerprint") != fingerprint(tensors):
            raise ValueError("its values are not those that were written")
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({one_line(error):.200}); {fix}") from error
    return tensors, state
