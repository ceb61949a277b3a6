"""The trainer and the tools on each device, by the same functions: a CPU, and a GPU where there is one.

Stages, compiled blocks, recomputed activations and an EMA in host memory, all together or each alone, train alike.
"""

import itertools
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cfpretrain.base import runtime
from cfpretrain.export.diffusers_layout import ExportSettings, export
from tests.digits import small_config, small_run
from tests.folders import rows
from tests.image_files import digits, write_folder
from tests.processes import run_in_processes, run_script
from tests.runs import write_run

NUM_STEPS, RESUMED_AT = 20, 10
CONTENTS = ("weights", "ema", "exp_avg", "exp_avg_sq")
ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)
DEVICES = ("cpu", ON_GPU)


@dataclass(frozen=True)
class Kind:
    """A way to compute the same training."""

    stage: int
    precision: str = "bf16"
    compiled: bool = False
    recomputed: bool = False
    ema_on_host: bool = False

    @property
    def overrides(self) -> list[str]:
        switches = {
            "engine.compile_blocks": self.compiled,
            "engine.activation_checkpointing": self.recomputed,
            "engine.ema_on_host": self.ema_on_host,
        }
        return [
            f"engine.zero_stage={self.stage}",
            f"engine.precision={self.precision}",
            *(f"{key}={str(value).lower()}" for key, value in switches.items()),
        ]


def kind_of(stage: int, compiled: bool, recomputed: bool) -> Kind:
    # Every two settings meet in each of their values, and all are on in one: the 3B preset's on one GPU.
    precision = "fp32" if stage == 0 and recomputed else "bf16"  # the other has no recomputation
    return Kind(stage, precision, compiled, recomputed, ema_on_host=compiled == recomputed)


KINDS = [kind_of(*settings) for settings in itertools.product(range(4), (False, True), (False, True))]
ALL_ON = Kind(3, "bf16", compiled=True, recomputed=True, ema_on_host=True)
PLAIN = {precision: Kind(0, precision) for precision in ("fp32", "bf16")}
RESUMED = [ALL_ON, Kind(2, "bf16", ema_on_host=True)]
# A CPU compiles for long: there the one with all settings stands for the compiled ones.
KINDS_ON = {"cpu": [*(kind for kind in KINDS if not kind.compiled), ALL_ON], "cuda": KINDS}


def folder_of(runs: Path, kind: Kind) -> Path:
    return runs / "_".join(kind.overrides)


# ---------------------------------------------------------------------------------------------------------------------
# What runs in a rank: one process trains all kinds, since one with a GPU takes long to start


def make_trainer(shards: Path, folder: Path, kind: Kind, device: torch.device) -> Any:
    from cfpretrain.training import trainer

    config = small_config(
        shards,
        folder,
        *kind.overrides,
        f"train.num_steps={NUM_STEPS}",
        f"checkpoint.every_steps={RESUMED_AT}",
        "model.width=64",  # heads that our kernel takes
        "train.micro_batch_size=8",
        "engine.clean_token_multiple=16",  # two lengths to compile
        "sample.max_classes=2",
        "sample.num_ar_steps=[1]",
    )
    torch.compiler.reset()  # a process compiles the same code so many times only
    trainer.prepare_folder(config, device)
    return trainer.Trainer(config, device)


def go_back(folder: Path, resumed: Path) -> None:
    """A copy of a complete run as it was after its first checkpoint."""
    shutil.copytree(folder, resumed)
    (resumed / "summary.json").unlink()
    (resumed / "checkpoints" / "latest").write_text(f"step_{RESUMED_AT:08d}\n")


def train_each(shards: Path, runs: Path, kinds: Sequence[Kind]) -> str:
    """Trains each kind, and some of them again from a checkpoint on; returns the device."""
    device = runtime.pick_device()
    runtime.start(device)
    for kind in kinds:
        assert make_trainer(shards, folder_of(runs, kind), kind, device).train()
    for kind in set(RESUMED) & set(kinds):
        go_back(folder_of(runs, kind), runs / "resumed" / folder_of(runs, kind).name)
        assert make_trainer(shards, folder_of(runs / "resumed", kind), kind, device).train()
    return device.type


def wait_once_a_step(shards: Path, runs: Path, stages: Sequence[int]) -> list[int]:
    """Read-backs of five steps at each stage, in which nothing else may wait for the GPU."""
    device = runtime.pick_device()
    runtime.start(device)
    return [count_read_backs(make_trainer(shards, runs / f"{stage}", Kind(stage), device)) for stage in stages]


def count_read_backs(trainer: Any) -> int:
    num_calls, read = 0, runtime.read_back

    def allowed(call: Any) -> Any:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            torch.cuda.set_sync_debug_mode("default")
            try:
                return call(*arguments, **options)
            finally:
                torch.cuda.set_sync_debug_mode("error")

        return wrapper

    @allowed
    def read_back(tensor: torch.Tensor) -> list[float]:
        nonlocal num_calls
        num_calls += 1
        values: list[float] = read(tensor)
        return values

    # DeepSpeed's stage 3 waits for its streams, at the end of a backward and of a gathering.
    streams = patch.object(torch.cuda.Stream, "synchronize", allowed(torch.cuda.Stream.synchronize))
    for _ in range(3):
        trainer.train_step()
    with patch.object(runtime, "read_back", read_back), streams:
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(5):
                trainer.train_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    trainer.loader.close()
    return num_calls


# ---------------------------------------------------------------------------------------------------------------------
# Training


def tensors(run: Path, content: str) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step_{NUM_STEPS:08d}" / f"{content}.safetensors")


def flat(run: Path, content: str) -> torch.Tensor:
    return torch.cat([values.flatten().double() for _, values in sorted(tensors(run, content).items())])


@pytest.fixture(scope="module")
def plain_runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plainest runs, on the CPU, which all others are compared with."""
    runs = tmp_path_factory.mktemp("plain")
    assert run_in_processes(train_each, 1, shards, runs, list(PLAIN.values())) == ["cpu"]
    return runs


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def runs(device: str, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of every kind on the device."""
    made = tmp_path_factory.mktemp(device)
    assert run_in_processes(train_each, 1, shards, made, KINDS_ON[device], timeout_s=1200, device=device) == [device]
    return made


def test_every_kind_trains_as_the_plainest_on_a_cpu(device: str, runs: Path, plain_runs: Path) -> None:
    for kind in KINDS_ON[device]:
        ours, plain = folder_of(runs, kind), folder_of(plain_runs, PLAIN[kind.precision])
        assert len(rows(ours)) == NUM_STEPS
        losses, expected = (np.array([row["loss"] for row in rows(run)]) for run in (ours, plain))
        tolerance = 1e-3 if kind.precision == "fp32" else 1e-2
        assert np.linalg.norm(losses - expected) <= tolerance * np.linalg.norm(expected), kind
        # The averages stand near the first weights still: so far has the run come.
        moved = (flat(plain, "weights") - flat(plain, "ema")).norm()
        for content in ("weights", "ema"):
            assert (flat(ours, content) - flat(plain, content)).norm() <= 10 * tolerance * moved, (kind, content)


@pytest.mark.parametrize("kind", RESUMED, ids=str)
def test_a_resumed_run_goes_on_bit_by_bit(kind: Kind, runs: Path) -> None:
    whole, resumed = folder_of(runs, kind), folder_of(runs / "resumed", kind)
    for ours, theirs in zip(rows(resumed), rows(whole), strict=True):
        assert [ours[key] for key in ("step", "loss", "grad_norm")] == [
            theirs[key] for key in ("step", "loss", "grad_norm")
        ]
    for content in CONTENTS:
        ours, theirs = tensors(resumed, content), tensors(whole, content)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), content


@pytest.mark.gpu
def test_a_step_waits_for_the_gpu_once(shards: Path, tmp_path: Path) -> None:
    assert run_in_processes(wait_once_a_step, 1, shards, tmp_path, range(4), device="cuda") == [[5] * 4]


@pytest.mark.gpu
def test_out_of_memory_is_one_line(shards: Path, tmp_path: Path) -> None:
    """13 B parameters: 200 GB of state."""
    large = ["model.width=16384", "model.num_heads=128", "model.depth=4", "engine.precision=bf16"]
    [ended] = run_script("cfpretrain/train.py", small_run(shards, tmp_path / "run", *large), device="cuda")
    assert ended.code == 2, ended.err
    [line] = [line for line in ended.err.splitlines() if "[cfpretrain] error: " in line]
    assert "memory" in line
    assert "Traceback" not in ended.err


# ---------------------------------------------------------------------------------------------------------------------
# Tools. On a CPU their own tests say more; here the CPU is the oracle.


def run_tool(name: str, arguments: Sequence[object], device: str) -> str:
    [ended] = run_script(f"tools/{name}.py", list(map(str, arguments)), device=device)
    assert ended.code == 0, ended.out + ended.err
    return ended.out


TOOLS_ON = (pytest.param("cpu", marks=pytest.mark.slow), ON_GPU)


@pytest.mark.parametrize("other", TOOLS_ON)
def test_samples_and_scores_are_those_of_a_cpu(other: str, shards: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", shards)
    write_folder(tmp_path / "real", digits(0, 64))
    images, scores = {}, {}
    for name, device in (("ours", other), ("theirs", "cpu")):
        out = tmp_path / f"{name}.npz"
        quick = ["--solver", "ddim", "--num-denoising-steps", 4, "--batch-size", 16]
        run_tool("sample", [run, "--out", out, "--num-images", 64, *quick], device)
        with np.load(out) as archive:
            images[name] = archive["arr_0"].astype(np.float64)
        told = ["--reference", tmp_path / "real", "--features", "tests.small_features:make"]
        told += ["--cache", tmp_path / f"cache_{name}", "--out", tmp_path / f"{name}.json"]
        run_tool("evaluate_fid", [out, *told], device)
        scores[name] = json.loads((tmp_path / f"{name}.json").read_text())["fd_small"]
    assert np.linalg.norm(images["ours"] - images["theirs"]) <= 1e-2 * np.linalg.norm(images["theirs"])
    assert scores["ours"] == pytest.approx(scores["theirs"], rel=1e-2)


@pytest.mark.parametrize("other", TOOLS_ON)
def test_a_run_is_replayed_and_exported(other: str, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    logged = ["metrics.log_sample_ids=true", *Kind(2).overrides]
    [ended] = run_script("cfpretrain/train.py", small_run(shards, run, *logged), device=other)
    assert ended.code == 0, ended.err
    assert run_tool("replay", [run, "--step", 11], other).count(" logged: equal") == 2
    export(run, tmp_path / "export", ExportSettings())
    exported = load_file(tmp_path / "export" / "transformer" / "diffusion_pytorch_model.safetensors")
    averages = load_file(run / "checkpoints" / "step_00000012" / "ema.safetensors")
    norms = [np.sqrt(sum(float(v.double().square().sum()) for v in side.values())) for side in (exported, averages)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-9)
