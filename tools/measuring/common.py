"""What the measurements share: turns of several sides, shards of noise, and where it was measured."""

import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

import cfpretrain
from cfpretrain.autoencoder import are_pixels
from cfpretrain.base import files, runtime
from cfpretrain.base.config import Config
from cfpretrain.base.console import UserError, say
from cfpretrain.core.texts import FRAME
from cfpretrain.data.shard_writer import ShardWriter
from cfpretrain.data.shards import LatentsInfo, columns_of
from cfpretrain.data.tokenizer import SPECIAL
from cfpretrain.run.metrics import peak_flops

_PACKAGES = ("torch", "triton", "deepspeed", "mosaicml-streaming", "flash-attn", "diffusers")
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")
_SHARD_BYTES = 1 << 26
_FEWEST_SAMPLES = 64

Value = TypeVar("Value")  # what a side measures in a turn


# ---------------------------------------------------------------------------
# Shards of noise


def on_noise(config: Config, folder: Path, num_samples: int = 0) -> Config:
    """Writes latent shards of noise that fit the config, and returns the config of a run on them; all ranks call it.

    They hold what the recipe reads: pixels where its latents are taken for some, else the moments of a posterior, and
    those of the mirrored image where images are mirrored; captions of any words and any length, where it has texts.
    Nothing of such a run is seen outside of the folder.

    Args:
        config: of a run.
        folder: gets the shards and the run folder.
        num_samples: in the shards; 0: two global batches.
    """
    refuse_segments(config)
    model, data = config.model, config.data
    pixels = are_pixels(model.latent_channels)

    def of_each_channel(values: tuple[float, ...]) -> tuple[float, ...]:
        return values * model.latent_channels if len(values) == 1 else values

    info = LatentsInfo(
        autoencoder="identity" if pixels else "noise",
        latent_shape=(model.latent_channels, model.latent_size, model.latent_size),
        latent_shift=of_each_channel(data.latent_shift),
        latent_scale=of_each_channel(data.latent_scale),
        class_names=tuple(map(str, range(max(1, model.num_classes)))),
        num_samples=num_samples or max(2 * config.train.global_batch_size, _FEWEST_SAMPLES),
        source="noise",
        has_posterior=not pixels,
        has_mirror=not pixels and data.mirror_prob > 0,
    )
    if runtime.rank() == 0:
        most_words = model.max_text_tokens - FRAME if model.vocabulary else 0
        _write_noise(folder / "latents", info, most_words, model.vocabulary - len(SPECIAL))
        config = with_words(config, folder)
    runtime.barrier()
    return confined(config, folder, folder / "latents")


def refuse_segments(config: Config) -> None:
    """UserError where samples are trained as what those of noise are not."""
    if config.data.tasks.interleaved:
        raise UserError(
            f"data.tasks.interleaved: expected 0, since samples are made here that have no segments, got "
            f"{config.data.tasks.interleaved:g}; set it so, and the tasks of pairs"
        )


def with_words(config: Config, folder: Path) -> Config:
    """The config with a tokenizer of as many words, "w0", "w1", ..., as its vocabulary has; itself without texts."""
    if not config.model.vocabulary:
        return config
    vocabulary = {f"w{i}": i for i in range(config.model.vocabulary - len(SPECIAL))}
    words = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    file = folder / "words.json"
    files.make_folder(folder, follow=True)
    files.replace(file, json.dumps({"model": words, "pre_tokenizer": {"type": "WhitespaceSplit"}, "added_tokens": []}))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(file)))


def confined(config: Config, folder: Path, shards: Path | None = None, autoencoder: str = "") -> Config:
    """The config of a run of which nothing is seen outside of the folder.

    Args:
        config: of a run.
        folder: gets the run folder.
        shards: it reads these; None: those that the config names, with its autoencoder.
        autoencoder: folder of the one that belongs to `shards`.
    """
    data = config.data
    if shards is not None:
        data = dataclasses.replace(data, shards=(str(shards),), repeat=(1.0,), autoencoder=autoencoder)
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, folder=str(folder / "run")),
        data=data,
        evaluation=dataclasses.replace(config.evaluation, every_steps=0),
        metrics=dataclasses.replace(config.metrics, wandb="disabled"),
    )


def refuse_skipped(trainer: Any) -> None:
    """Ends a measurement in which a step was skipped: such a step does less, and a rewind much more."""
    if trainer.at.num_skipped:
        raise RuntimeError(f"a step before {trainer.at.step} was skipped: the times say nothing")


def _write_noise(folder: Path, info: LatentsInfo, most_words: int, vocabulary: int) -> None:
    columns = columns_of(info)
    arrays = [name for name, encoding in columns.items() if encoding.startswith("ndarray")]
    rng = np.random.default_rng(0)
    writer = ShardWriter(folder, columns, {})
    writer.begin()
    sample_bytes = 2 * len(arrays) * int(np.prod(info.latent_shape))
    per_shard = max(1, min(_SHARD_BYTES // sample_bytes, info.num_samples // 8))
    begins = range(0, info.num_samples, per_shard)
    for number, begin in enumerate(begins):
        ids = range(begin, min(begin + per_shard, info.num_samples))
        moments = rng.standard_normal((len(ids), len(arrays), *info.latent_shape), np.float32).astype(np.float16)
        samples = (
            {
                "id": id,
                "label": id % len(info.class_names),
                "caption": _caption(rng, most_words, vocabulary),
                **dict(zip(arrays, values, strict=True)),
            }
            for id, values in zip(ids, moments, strict=True)
        )
        writer.write(number, samples)
    writer.finish(info, len(begins))


def _caption(rng: np.random.Generator, most_words: int, vocabulary: int) -> str:
    if not most_words:
        return ""
    return " ".join(f"w{i}" for i in rng.integers(vocabulary, size=rng.integers(most_words + 1)))


# ---------------------------------------------------------------------------
# Seconds, and where they were measured


def dtype_of(device: torch.device) -> torch.dtype:
    """What kernels are measured in: bf16 on a GPU, fp32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def synchronise(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def resident_bytes(field: str) -> int:
    """This process's resident memory: VmRSS now, VmHWM at its highest (without what its parent had, unlike rusage)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def seconds_of(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Seconds of a call, the mean of `repeats` that follow each other after one that does not count."""
    call()
    synchronise(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronise(device)
    return (time.perf_counter() - begin) / repeats


def alternate(
    sides: Mapping[str, Callable[[], Value]], num_turns: int, unit: str = "", num_warm_up: int = 1
) -> dict[str, list[Value]]:
    """Runs sides by turns (a b, b a, ...), so that changes of a machine's speed fall on all; returns their values.

    Args:
        sides: by name; each returns what it measured.
        num_turns: that count.
        unit: each value is said with it; empty: turns alone are said, ten of many.
        num_warm_up: turns before, which do not count.
    """
    found: dict[str, list[Value]] = {name: [] for name in sides}
    for turn in range(-num_warm_up, num_turns):
        title = f"turn {turn + 1} of {num_turns}" if turn >= 0 else "warming up"
        if not unit and turn % max(1, num_turns // 10) == 0:
            say(title)
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            value = sides[name]()
            if unit:
                say(f"{title}: {name} {value:.4g} {unit}")
            if turn >= 0:
                found[name].append(value)
    return found


def print_rates(rates: Mapping[str, list[float]], unit: str) -> dict[str, Any]:
    """Prints each side's median and range, and the ratio of the first to the second; returns all of it."""
    for name, values in rates.items():
        print(f"{name:28}{statistics.median(values):10.2f} {unit} ({min(values):.2f} to {max(values):.2f})")
    ours, other, *_ = (statistics.median(values) for values in rates.values())
    print(f"{'ratio' if len(rates) == 2 else 'ratio of the first two':28}{ours / other:10.2f}")
    return {"unit": unit, "rates": rates, "ratio": ours / other}


def whereabouts() -> dict[str, Any]:
    """Versions and hardware, for the last line of a tool."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "cfpretrain": cfpretrain.__version__}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {"versions": versions, "hardware": _hardware(runtime.pick_device()), "threads": torch.get_num_threads()}


def _hardware(device: torch.device) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {line.split(":")[0].strip(): line.split(":", 1)[1].strip() for line in lines if ":" in line}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    found: dict[str, Any] = {
        "cpu": fields.get("model name", platform.machine()),
        "instruction_sets": [flag for flag in _CPU_FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found |= {"gpu": gpu.name, "gpu_bytes": gpu.total_memory, "cuda": torch.version.cuda}
        found["peak_tflops"] = (peak_flops(device, "bf16") or 0) / 1e12 or None
    return found
