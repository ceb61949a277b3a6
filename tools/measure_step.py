"""Times a training step, attention alone, or profiles a step; prints tables and, last, one JSON line.

    python tools/measure_step.py --config configs/benchmark/cpu.yaml --against naive
    python tools/measure_step.py --attention
    python tools/measure_step.py --config configs/benchmark/cpu.yaml --profile

No shards are needed: latents are noise and every draw is a function of the step's number, so both sides of a comparison
train on the same numbers, and their losses are compared as well.

A comparison runs each side in a process of its own, one at work at a time, in the order a b, b a, a b, ... A step is
forward, backward, clipping and the optimizer's update for the config's global batch on one rank; EMA, data loading and
logging are left out on both sides. FLOPs count visible pairs of attention only.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfpretrain import config as configs
from cfpretrain import runtime, seeds
from cfpretrain.build import choose_attention, choose_blocks, initial_weights, make_loss, make_model
from cfpretrain.config import Config, ModelConfig, OrderConfig
from cfpretrain.console import UserError, exit_with, say
from cfpretrain.export.official import to_official
from cfpretrain.loss import Draws
from cfpretrain.metrics import peak_flops, training_flops
from cfpretrain.model import attention
from cfpretrain.model.transformer import Block, BlockSettings, initialise
from cfpretrain.order import Condition, Image, build_layout, count_visible, draw_steps, shares_split

_NAIVE = ("naive", "naive-autocast")
_PACKAGES = ("cfpretrain", "torch", "triton", "deepspeed")
_LEARNING_RATE = 1e-4  # constant, so that both sides' losses soon depend on their gradients
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")


def main() -> None:
    """The command."""
    arguments = _parse()
    try:
        device = runtime.pick_device()
        if runtime.world_size() != 1:
            raise UserError(f"measure_step measures one rank, got {runtime.world_size()}; start it with python alone")
        if arguments.attention:
            measured = measure_attention(arguments, device)
        else:
            if not arguments.config:
                raise UserError("--config: expected a YAML file, e.g. configs/benchmark/cpu.yaml, got none")
            config = configs.load(arguments.config, arguments.overrides)
            configs.check(config, 1)
            choose_blocks(config, device.type)
            measured = (profile if arguments.profile else measure)(config, arguments, device)
    except UserError as error:
        exit_with(error)
    print(json.dumps(measured | {"versions": _versions(), "hardware": _hardware(device)}))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time a training step or attention alone, in alternation.")
    parser.add_argument("--config", action="append", metavar="FILE", help="a YAML file; of several, later ones win")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--against", choices=_NAIVE, help="the plain implementation to compare with")
    parser.add_argument("--pairs", type=_positive, default=6, help="timed steps of each side (default 6)")
    parser.add_argument("--profile", action="store_true", help="profile a step and count a compiled block's kernels")
    parser.add_argument("--attention", action="store_true", help="attention alone, for every backend that runs here")
    parser.add_argument("--tokens", type=_positive, nargs="+", help="--attention: tokens of an image")
    parser.add_argument(
        "--head-widths", type=_positive, nargs="+", default=[64, 128], help="--attention: default 64 128"
    )
    parser.add_argument("--width", type=_positive, default=1024, help="--attention: heads times head width (1024)")
    parser.add_argument("--batch-size", type=_positive, help="--attention: sequences (32 on a GPU, 1 on a CPU)")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher adds it
    return parser.parse_intermixed_args()


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


# ---------------------------------------------------------------------------
# The plain implementation: over the official tensors, and nothing of ours


class Naive:
    """The network and its loss as one would first write them: dense float mask, materialised softmax, eager.

    Args:
        tensors: the official state dict.
        num_heads: heads.
        patch_size: latent rows = columns of a token.
        autocast: compute in bf16 where torch's autocast does.
        shared_split: all samples are cut alike, and one mask serves them.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        num_heads: int,
        patch_size: int,
        autocast: bool = False,
        shared_split: bool = False,
    ) -> None:
        self.weights = {name: nn.Parameter(value.detach().clone()) for name, value in tensors.items()}
        self.depth = len([name for name in tensors if name.endswith("attn.qkv.weight")])
        self._num_heads, self._patch_size = num_heads, patch_size
        self._autocast, self._shared_split = autocast, shared_split

    def loss(self, latents_BCYX: Tensor, draws: Draws, schedule: Tensor, weights_BL: Tensor) -> tuple[Tensor, Tensor]:
        """The mean loss and the predictions [B, L, P].

        Args:
            latents_BCYX: what the network sees.
            draws: on the device of the weights.
            schedule: [T], the share of the signal's variance left at each timestep.
            weights_BL: the tokens' loss weights.
        """
        B, C, Y, X = latents_BCYX.shape
        p = self._patch_size
        tokens = latents_BCYX.reshape(B, C, Y // p, p, X // p, p).permute(0, 2, 4, 3, 5, 1).reshape(B, -1, p * p * C)
        index = draws.order_BL[:, :, None].expand(-1, -1, tokens.shape[2])
        clean, noise = tokens.gather(1, index), draws.noise_BLP.gather(1, index)
        kept = schedule[draws.timesteps_B][:, None, None]
        noised = (kept.sqrt() * clean + (1 - kept).sqrt() * noise).float()
        with torch.autocast(latents_BCYX.device.type, torch.bfloat16, enabled=self._autocast):
            prediction = self._predict(clean, noised, draws)
        return ((prediction.float() - noise).square() * weights_BL[:, :, None]).mean(), prediction

    def _predict(self, clean: Tensor, noised: Tensor, draws: Draws) -> Tensor:
        w = self.weights
        B, L, _ = noised.shape
        num_clean = int((draws.steps_BL[0] != draws.steps_BL[0, -1]).sum())
        condition = w["y_embedder.embedding_table.weight"][draws.labels_B].reshape(B, *w["cond_pos_embed"].shape[1:])
        condition = condition + w["cond_pos_embed"]
        positions = w["pos_embed"][0][draws.order_BL]
        clean = self._linear(clean[:, :num_clean], "x_proj") + positions[:, :num_clean]
        noised = self._linear(noised, "x_proj") + positions + self._embed_timesteps(draws.timesteps_B)[:, None]
        x = torch.cat([condition, clean, noised], dim=1)
        splits = draws.steps_BL[:1] if self._shared_split else draws.steps_BL
        mask = _float_mask(condition.shape[1], num_clean, splits)
        for i in range(self.depth):
            x = x + self._attention(self._norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn", mask)
            hidden = F.gelu(self._linear(self._norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"), approximate="tanh")
            x = x + self._linear(hidden, f"blocks.{i}.mlp.fc2")
        return self._linear(self._norm(x[:, -L:], "final_layer.0"), "final_layer.1")

    def _attention(self, x: Tensor, name: str, mask: Tensor) -> Tensor:
        B, M, D = x.shape
        qkv = F.linear(x, self.weights[f"{name}.qkv.weight"])
        q, k, v = qkv.reshape(B, M, 3, self._num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self._norm(q, f"{name}.q_norm"), self._norm(k, f"{name}.k_norm")
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + mask
        seen = scores.softmax(dim=-1) @ v
        return self._linear(seen.transpose(1, 2).reshape(B, M, D), f"{name}.proj")

    def _embed_timesteps(self, timesteps: Tensor) -> Tensor:
        frequency = 10000.0 ** (-torch.arange(128, device=timesteps.device) / 128)
        angle = timesteps[:, None].float() * frequency
        hidden = self._linear(torch.cat([angle.cos(), angle.sin()], dim=1), "t_embedder.mlp.0")
        return self._linear(F.silu(hidden), "t_embedder.mlp.2")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, 1e-5)


def _float_mask(num_cond: int, num_clean: int, steps_BL: Tensor) -> Tensor:
    """The rule of visibility as a mask to add: float [B, 1, M, M], 0 or -inf."""
    step = F.pad(torch.cat([steps_BL[:, :num_clean], steps_BL], dim=1) + 1, (num_cond, 0))
    clean = torch.arange(step.shape[1], device=step.device) < num_cond + num_clean
    query, key = step[:, :, None], step[:, None, :]
    seen = (clean & (key < query)) | ((key == query) & (clean == clean[:, None]))
    return torch.zeros(seen.shape, device=step.device).masked_fill(~seen, -math.inf)[:, None]


def naive_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The plain implementation's attention alone, under a mask to add."""
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + mask).softmax(dim=-1).to(v.dtype) @ v


def _plain_schedule(config: Config) -> Tensor:
    scale = 1000 / config.noise.num_timesteps
    first, last = scale * config.noise.beta_first, scale * config.noise.beta_last
    return (1 - torch.linspace(first, last, config.noise.num_timesteps, dtype=torch.float64)).cumprod(0)


def _plain_weights(order: OrderConfig, steps_BL: Tensor) -> Tensor:
    """Loss weights from where each token's AR step begins."""
    first, last = order.ar_weight_first, order.ar_weight_last
    begin = (steps_BL[:, None, :] < steps_BL[:, :, None]).sum(2) / steps_BL.shape[1]
    if order.ar_weight_schedule == "cosine":
        return (first - last) / 2 * (math.pi * begin).cos() + (first + last) / 2
    return first - (first - last) * begin


# ---------------------------------------------------------------------------
# The two sides, each a process


@dataclass(frozen=True)
class StepResult:
    """One step as one side made it.

    Attributes:
        seconds: of the step.
        loss: the mean over its micro-batches.
        num_sequences, num_tokens, num_visible: of all micro-batches, padding left out; what FLOPs count.
        length: tokens that a sequence was computed with.
    """

    seconds: float
    loss: float
    num_sequences: int = 0
    num_tokens: int = 0
    num_visible: int = 0
    length: int = 0


MicroBatch = tuple[Tensor, Draws]


def make_micro_batches(config: Config, step: int, device: torch.device) -> list[MicroBatch]:
    """The listed step's latents (noise) and draws; the same numbers for both sides."""
    loss, model = make_loss(config), config.model
    size, count = config.micro_batch_size(1), config.accumulation_steps(1)
    shape = (model.latent_channels, model.latent_size, model.latent_size)
    made = []
    for i in range(count):
        ids_B = torch.arange(size) + size * (count * step + i)
        latents_BCYX = seeds.normal(seeds.fold(seeds.key(config.run.seed, "measured latents"), ids_B), shape)
        labels_B = seeds.integers(seeds.fold(seeds.key(config.run.seed, "measured labels"), ids_B), model.num_classes)
        draws = loss.draw(step, 0, ids_B, labels_B, model.num_tokens, model.patch_values)
        made.append((latents_BCYX.to(device), draws))
    return made


class OurSide:
    """The config's network in the engine of a run."""

    def __init__(self, config: Config, device: torch.device) -> None:
        from cfpretrain.engine import build_engine

        self._loss = make_loss(config)
        blocks = choose_blocks(config, device.type)
        self._engine = build_engine(lambda: make_model(config, blocks), config, device)
        self._engine.initialise(initial_weights(config))

    def step(self, micro_batches: Sequence[MicroBatch], learning_rate: float) -> StepResult:
        """One optimizer step; its seconds are the caller's."""
        all_terms, batches = [], []
        for latents_BCYX, draws in micro_batches:
            batches.append(self._loss.prepare(latents_BCYX.cpu(), draws).to(latents_BCYX.device))
            terms = self._loss(self._engine, batches[-1])
            self._engine.backward(terms.total / terms.count)
            all_terms.append(terms)
        self._engine.step(learning_rate)
        return StepResult(
            seconds=math.nan,
            loss=statistics.mean(float(terms.total.detach()) / terms.count for terms in all_terms),
            num_sequences=sum(map(len, batches)),
            num_tokens=sum(batch.num_tokens for batch in batches),
            num_visible=sum(batch.num_visible for batch in batches),
            length=batches[0].intervals_BMI.shape[1],
        )


class NaiveSide:
    """The plain implementation with torch's plain AdamW."""

    def __init__(self, config: Config, device: torch.device, autocast: bool) -> None:
        model = make_model(config)
        initialise(model, config.run.seed)
        tensors = {name: value.to(device) for name, value in to_official(model.state_dict(), model.grid).items()}
        order = config.order
        shared_split = shares_split(order.ar_split, order.num_ar_steps, order.ar_step_sizes)
        self._naive = Naive(tensors, config.model.num_heads, config.model.patch_size, autocast, shared_split)
        if config.model.position_embedding == "sincos":
            self._naive.weights["pos_embed"].requires_grad_(False)
        self._trained = [weight for weight in self._naive.weights.values() if weight.requires_grad]
        train = config.train
        self._adam = torch.optim.AdamW(
            self._trained,
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_eps,
            weight_decay=train.weight_decay,
        )
        self._config, self._schedule = config, _plain_schedule(config).to(device)

    def step(self, micro_batches: Sequence[MicroBatch], learning_rate: float) -> StepResult:
        """One optimizer step; its seconds are the caller's."""
        self._adam.zero_grad()
        losses = []
        for latents_BCYX, draws in micro_batches:
            tensors = {name: value for name, value in vars(draws).items() if isinstance(value, Tensor)}
            here = replace(draws, **{name: value.to(latents_BCYX.device) for name, value in tensors.items()})
            weights_BL = _plain_weights(self._config.order, here.steps_BL)
            loss, _ = self._naive.loss(latents_BCYX, here, self._schedule, weights_BL)
            (loss / len(micro_batches)).backward()
            losses.append(loss.detach())
        if self._config.train.clip_grad_norm > 0:
            nn.utils.clip_grad_norm_(self._trained, self._config.train.clip_grad_norm)
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._adam.step()
        return StepResult(seconds=math.nan, loss=statistics.mean(map(float, losses)))


def make_side(name: str, config: Config, device: torch.device) -> OurSide | NaiveSide:
    """The side of that name: "ours", "naive" or "naive-autocast"."""
    return OurSide(config, device) if name == "ours" else NaiveSide(config, device, name == "naive-autocast")


class Stepper:
    """Makes listed steps of one side and times them."""

    def __init__(self, side: OurSide | NaiveSide, config: Config, device: torch.device) -> None:
        self._side, self._config, self._device = side, config, device

    def __call__(self, step: int) -> StepResult:
        """Makes the listed step's draws, then the step, and times the latter."""
        micro_batches = make_micro_batches(self._config, step, self._device)
        _synchronise(self._device)
        begin = time.perf_counter()
        made = self._side.step(micro_batches, _LEARNING_RATE)
        _synchronise(self._device)
        return StepResult(**vars(made) | {"seconds": time.perf_counter() - begin})


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def serve(pipe: Any, name: str, config: Config) -> None:
    """A side's process: makes the steps it is told, and says what memory they took when it is told None."""
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        os.environ.pop(variable, None)  # of a launcher that started the parent
    try:
        device = runtime.pick_device()
        runtime.start(device)
        if name == "ours":
            # Its libraries are no memory of a step.
            os.environ.setdefault("DS_ACCELERATOR", device.type)
            import deepspeed  # noqa: F401
        bare = _resident_bytes("VmRSS")
        stepper = Stepper(make_side(name, config, device), config, device)
        pipe.send(None)
        while (step := pipe.recv()) is not None:
            pipe.send(vars(stepper(step)))
        pipe.send(_peak_bytes(device, bare))
    except BaseException:
        pipe.send(traceback.format_exc())
    finally:
        runtime.stop()


def _peak_bytes(device: torch.device, bare: int) -> int:
    """Weights, gradients, moments and activations at their highest."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return max(0, _resident_bytes("VmHWM") - bare)


def _resident_bytes(field: str) -> int:
    """This process's resident memory: VmRSS now, VmHWM at its highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


class Worker:
    """A side in its process."""

    def __init__(self, name: str, config: Config) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, name, config), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()

    def step(self, step: int) -> StepResult:
        """The listed step, made and timed there."""
        self._pipe.send(step)
        return StepResult(**self._receive())

    def stop(self) -> int:
        """Ends the process; returns its peak memory in bytes."""
        self._pipe.send(None)
        peak = self._receive()
        self._process.join()
        return peak

    def _receive(self) -> Any:
        try:
            received = self._pipe.recv()
        except EOFError as error:
            self._process.join()
            code = self._process.exitcode
            raise RuntimeError(f"the process of {self.name} died with exit code {code}; out of memory?") from error
        if isinstance(received, str):
            raise RuntimeError(f"{self.name} failed:\n{received}")
        return received


# ---------------------------------------------------------------------------
# Steps in alternation


def measure(config: Config, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Times the config's step, against the plain implementation where the command says so."""
    names = ["ours", *([arguments.against] if arguments.against else [])]
    workers = []
    for name in names:
        say(f"starting {name}")
        workers.append(Worker(name, config))
    for step in _warm_up_steps(config, arguments.pairs, device):
        say(f"warming up with step {step}")
        for worker in workers:
            worker.step(step)
    results: dict[str, list[StepResult]] = {name: [] for name in names}
    for step in range(arguments.pairs):
        say(f"step {step + 1} of {arguments.pairs}")
        for worker in workers if step % 2 == 0 else workers[::-1]:
            results[worker.name].append(worker.step(step))
    peaks = {worker.name: worker.stop() for worker in workers}
    _print_steps(results, peaks)
    return _summarise(config, arguments, device, results, peaks)


def _warm_up_steps(config: Config, num_steps: int, device: torch.device) -> list[int]:
    """Listed steps, after those that are timed, such that no timed step is the first of anything."""
    if not config.engine.compile_blocks and device.type == "cpu":
        return [num_steps]
    # Each length is compiled, or tuned, when it first comes.
    first_by_length: dict[int, int] = {}
    for step in range(num_steps):
        [(_, draws), *_] = make_micro_batches(config, step, torch.device("cpu"))
        layout = build_layout([Condition(1), Image(draws.steps_BL)], config.clean_token_multiple())
        first_by_length.setdefault(layout.step_BM.shape[1], step)
    return list(first_by_length.values())


def _print_steps(results: dict[str, list[StepResult]], peaks: dict[str, int]) -> None:
    ours, *others = results
    titles = "".join(f"{name + ' s':>18}" for name in results)
    print(f"{'step':>6}{'tokens':>8}{titles}{'ratio':>8}{'loss':>10}")
    for i, made in enumerate(results[ours]):
        seconds = "".join(f"{of_side[i].seconds:18.3f}" for of_side in results.values())
        ratio = f"{results[others[0]][i].seconds / made.seconds:8.2f}" if others else f"{'':8}"
        print(f"{i:6}{made.length:8}{seconds}{ratio}{made.loss:10.5f}")
    for label, pick in (("min", min), ("median", statistics.median), ("max", max)):
        seconds = "".join(f"{pick(made.seconds for made in of_side):18.3f}" for of_side in results.values())
        ratio = f"{_ratios(results)[label]:8.2f}" if others else ""
        print(f"{label:>14}{seconds}{ratio}")
    print(f"{'peak GB':>14}" + "".join(f"{peaks[name] / 1e9:18.2f}" for name in results))


def _ratios(results: dict[str, list[StepResult]]) -> dict[str, float]:
    """How many times longer the other side takes, pair by pair."""
    ours, theirs = results.values()
    ratios = [b.seconds / a.seconds for a, b in zip(ours, theirs, strict=True)]
    return {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)}


def _summarise(
    config: Config,
    arguments: argparse.Namespace,
    device: torch.device,
    results: dict[str, list[StepResult]],
    peaks: dict[str, int],
) -> dict[str, Any]:
    ours, *others = results
    made = results[ours]
    seconds = sum(one.seconds for one in made)
    flops = sum(training_flops(config.model, one.num_sequences, one.num_tokens, one.num_visible) for one in made)
    peak = peak_flops(device, config.engine.precision)
    summary = {
        "seconds_per_step": statistics.median(one.seconds for one in made),
        "images_per_second": sum(one.num_sequences for one in made) / seconds,
        "tflops": flops / seconds / 1e12,
        "mfu": flops / seconds / peak if peak else None,
        "peak_memory_bytes": peaks[ours],
        "lengths": [one.length for one in made],
        "blocks": vars(choose_blocks(config, device.type)),
        "threads": torch.get_num_threads(),
        "command": {"config": arguments.config, "overrides": arguments.overrides, "pairs": arguments.pairs},
        "config": {name: configs.to_plain(config)[name] for name in ("model", "order", "train", "engine")},
    }
    if not others:
        return summary
    theirs = results[others[0]]
    difference = max(abs(a.loss / b.loss - 1) for a, b in zip(made, theirs, strict=True))
    return summary | {
        "ratio": _ratios(results),
        "against": {
            "name": others[0],
            "seconds_per_step": statistics.median(one.seconds for one in theirs),
            "peak_memory_bytes": peaks[others[0]],
            "max_relative_loss_difference": difference,
        },
    }


# ---------------------------------------------------------------------------
# Attention alone


@dataclass(frozen=True)
class AttentionResult:
    """One backend at one size.

    Attributes:
        forward, both: median seconds of a forward, and of a forward and backward.
        error: of the output, against float64, relative to its largest value.
    """

    forward: float
    both: float
    error: float


def measure_attention(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Times attention for every backend that trains here, on layouts of the paper's AR steps (decay 0.9)."""
    on_gpu = device.type == "cuda"
    backends, missing = _backends(device, arguments.head_widths)
    for name, reason in missing.items():
        print(f"{name}: not measured: {reason}")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    batch_size = arguments.batch_size or (32 if on_gpu else 1)
    tokens = arguments.tokens or ([128, 256, 1024] if on_gpu else [128, 256])
    print(f"batch {batch_size}, width {arguments.width}, {dtype}; TFLOP/s on visible pairs, backward as 2.5 forwards")
    print(f"{'length':>8}{'visible':>9}{'head':>6}  {'backend':<8}{'fwd ms':>10}{'both ms':>10}", end="")
    print(f"{'fwd TFLOP/s':>13}{'both TFLOP/s':>14}{'error':>10}")
    rows = []
    for num_tokens in tokens:
        for head_width in arguments.head_widths:
            if arguments.width % head_width:
                raise UserError(f"--head-widths: expected divisors of --width = {arguments.width}, got {head_width}")
            rows += _measure_size(backends, num_tokens, head_width, arguments.width, batch_size, dtype, device)
    return {"attention": rows, "not_measured": missing, "threads": torch.get_num_threads()}


def _backends(device: torch.device, head_widths: Sequence[int]) -> tuple[list[str], dict[str, str]]:
    """The backends that train here, and of the others why not."""
    run, missing = ["naive"], {}
    for name in ("sdpa", "flex", "triton"):
        try:
            run.append(attention.choose(name, device.type, min(head_widths)))
        except ValueError as error:
            missing[name] = str(error)
    return run, missing


def _measure_size(
    backends: list[str],
    num_tokens: int,
    head_width: int,
    width: int,
    batch_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[dict[str, Any]]:
    intervals_BMI = _full_intervals(0, batch_size, 64, num_tokens).to(device)
    num_visible = int(count_visible(intervals_BMI).sum())
    length = intervals_BMI.shape[1]
    measured = _race(_attention_runs(backends, intervals_BMI, head_width, width // head_width, dtype), device)
    forward_flops = 4 * width * num_visible
    rows = []
    for name, result in measured.items():
        forward, both = forward_flops / result.forward / 1e12, 3.5 * forward_flops / result.both / 1e12
        share = num_visible / (batch_size * length**2)
        print(
            f"{length:8}{share:9.2f}{head_width:6}  {name:<8}{1e3 * result.forward:10.3f}{1e3 * result.both:10.3f}"
            f"{forward:13.3f}{both:14.3f}{result.error:10.1e}"
        )
        rows.append(
            {"length": length, "head_width": head_width, "backend": name, "visible_share": share, **vars(result)}
            | {"forward_tflops": forward, "both_tflops": both}
        )
    return rows


def _full_intervals(seed: int, batch_size: int, num_cond_tokens: int, num_tokens: int) -> Tensor:
    """Row intervals of a drawn layout with all clean tokens, hence of Q + 2 L tokens whatever the seed."""
    key = seeds.key(seed, "measured splits")
    while True:
        steps_BL = draw_steps(key, seeds.fold(key, torch.arange(batch_size)), num_tokens, 0.9)
        if bool(steps_BL[0, -1] > 0):
            return build_layout([Condition(num_cond_tokens), Image(steps_BL)], num_tokens).intervals_BMI
        # One AR step has no clean tokens.
        key = seeds.fold(key, 0)


@dataclass(frozen=True)
class AttentionRun:
    """Attention of one backend on given inputs."""

    qkv: Tensor
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    gradient: Tensor
    wanted: Tensor

    def forward(self) -> Tensor:
        # As the network has them: permuted views of one projection.
        return self.attend(*self.qkv.permute(2, 0, 3, 1, 4).unbind(0))

    def both(self) -> None:
        self.qkv.grad = None
        self.forward().backward(self.gradient)


def _attention_runs(
    backends: list[str], intervals_BMI: Tensor, head_width: int, num_heads: int, dtype: torch.dtype
) -> dict[str, AttentionRun]:
    B, M, _ = intervals_BMI.shape
    device = intervals_BMI.device
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(B, M, 3, num_heads, head_width, generator=generator, device=device).to(dtype).requires_grad_()
    gradient = torch.randn(B, num_heads, M, head_width, generator=generator, device=device).to(dtype)
    may_attend = attention.make_visibility(intervals_BMI, M, "sdpa").mask
    assert isinstance(may_attend, Tensor)
    mask = torch.zeros(may_attend.shape, device=device).masked_fill(~may_attend, -math.inf)
    # One sample is enough to see that a backend computes what it should.
    sample = qkv.detach()[:1].double().permute(2, 0, 3, 1, 4).unbind(0)
    wanted = naive_attention(*sample, mask[:1].double())

    def attend_with(backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        if backend == "naive":
            return lambda q, k, v: naive_attention(q, k, v, mask.to(dtype))
        visibility = attention.make_visibility(intervals_BMI, M, backend)
        return lambda q, k, v: attention.attend(q, k, v, visibility)

    return {name: AttentionRun(qkv, attend_with(name), gradient, wanted) for name in backends}


def _race(runs: dict[str, AttentionRun], device: torch.device) -> dict[str, AttentionResult]:
    """Times the backends in turns."""
    repeats, turns = (20, 7) if device.type == "cuda" else (1, 5)
    seconds: dict[tuple[str, str], list[float]] = {(name, kind): [] for name in runs for kind in ("forward", "both")}
    errors = {}
    for name, run in runs.items():
        with torch.no_grad():
            difference = run.forward()[:1].double() - run.wanted
        errors[name] = float(difference.abs().max() / run.wanted.abs().max())
        run.both()
    for _ in range(turns):
        for name, run in runs.items():
            with torch.no_grad():
                seconds[name, "forward"].append(_seconds(run.forward, repeats, device))
            seconds[name, "both"].append(_seconds(run.both, repeats, device))
    median = {key: statistics.median(values) for key, values in seconds.items()}
    return {name: AttentionResult(median[name, "forward"], median[name, "both"], errors[name]) for name in runs}


def _seconds(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    call()
    _synchronise(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    _synchronise(device)
    return (time.perf_counter() - begin) / repeats


# ---------------------------------------------------------------------------
# Profile


def profile(config: Config, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Prints the operators of one step by time, and how many kernels a compiled block launches."""
    runtime.start(device)
    try:
        stepper = Stepper(make_side(arguments.against or "ours", config, device), config, device)
        stepper(0)
        stepper(0)
        # Names of ranges would hide the operators in them.
        with torch.profiler.profile() as recorded:
            stepper(0)
        by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        print(recorded.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60))
    finally:
        runtime.stop()
    kernels = count_kernels(config.model, choose_attention(config, device.type), device)
    print(f"a compiled block, forward and backward: {kernels}")
    return {"kernels_of_compiled_block": kernels}


def count_kernels(model: ModelConfig, backend: str, device: torch.device) -> dict[str, int]:
    """Kernels of a compiled block, forward and backward, counted by what the device, or else the compiler, does.

    Returns:
        `launched`: on a GPU, all kernels of one call. `generated`: kernels that the compiler made, attention of a
        library and matrix products not among them. `graphs`: those of two AR splits, 1 where splits do not matter.
        `graph_breaks`: where the compiler gave up, and went on behind.
    """
    from torch._dynamo.utils import counters
    from torch._inductor import metrics

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch._dynamo.reset()
    counters.clear()
    metrics.reset()
    with device:
        block = Block(model.width, model.num_heads, BlockSettings(attention=backend, compile=True)).to(dtype)
    run = _block_run(block, model, backend, device, dtype)
    run(0)
    run(1)
    counted = {
        "generated": int(metrics.generated_kernel_count),
        "graphs": int(counters["stats"]["unique_graphs"]),
        "graph_breaks": sum(counters["graph_break"].values()),
    }
    if device.type != "cuda":
        return counted
    with torch.profiler.profile() as recorded:
        run(0)
        _synchronise(device)
    on_device = [event for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return counted | {"launched": len(on_device)}


def _block_run(
    block: Block, model: ModelConfig, backend: str, device: torch.device, dtype: torch.dtype
) -> Callable[[int], None]:
    def run(seed: int) -> None:
        intervals_BMI = _full_intervals(seed, 2, model.num_cond_tokens, model.num_tokens).to(device)
        length = intervals_BMI.shape[1]
        visibility = attention.make_visibility(intervals_BMI, length, backend)
        x_BMD = torch.randn(2, length, model.width, device=device, dtype=dtype, requires_grad=True)
        block(x_BMD, visibility).sum().backward()

    return run


# ---------------------------------------------------------------------------
# Where it was measured


def _versions() -> dict[str, str | None]:
    def find(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {"python": platform.python_version(), **{name: find(name) for name in _PACKAGES}}


def _hardware(device: torch.device) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {line.split(":")[0].strip(): line.split(":", 1)[1].strip() for line in lines if ":" in line}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    cpu = {
        "cpu": fields.get("model name", platform.machine()),
        "instruction_sets": [flag for flag in _CPU_FLAGS if flag in flags],
        "cores": os.cpu_count(),
    }
    return cpu if device.type == "cpu" else cpu | {"gpu": torch.cuda.get_device_name(device)}


if __name__ == "__main__":
    main()
