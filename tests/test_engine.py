"""The engine against plain torch, against itself at other ZeRO stages and numbers of ranks, and its refusals."""

import contextlib
import functools
import importlib.util
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cfpretrain.base import runtime
from cfpretrain.base.config import Config
from cfpretrain.base.config import load as load_config
from cfpretrain.base.console import UserError
from cfpretrain.core import seeds
from cfpretrain.core.ar import ARSettings
from cfpretrain.core.block import BlockSettings
from cfpretrain.core.model import CausalFusion, write_initial_values
from cfpretrain.core.norm import has_apex
from cfpretrain.core.objective import DenoisingLoss
from cfpretrain.core.process import make_process
from cfpretrain.run.build import make_model
from cfpretrain.run.checkpoint import load
from cfpretrain.run.checkpoint_store import CheckpointStore
from cfpretrain.run.tensor_files import Fragment
from cfpretrain.training import optim, zero
from cfpretrain.training.engine import Engine, build_engine
from cfpretrain.training.zero import Decide, ds_config
from tests import checkpoints
from tests.checkpoints import CONFIG, make_state
from tests.closeness import disagreement
from tests.processes import REPOSITORY, run_in_processes
from tests.strictness import make_warnings_errors

CPU = torch.device("cpu")
STAGES = (0, 1, 2, 3)
PRECISIONS = ("fp32", "bf16")
KINDS = [(stage, precision) for stage in STAGES for precision in PRECISIONS]
GLOBAL_BATCH = 8
LEARNING_RATE = 1e-2
# Below the norms of the toy's gradients, so that every step is clipped.
CLIP = 0.1

# ---------------------------------------------------------------------------------------------------------------------
# A small module whose parameters have odd sizes (so that shards are padded), lie on the root, on a submodule directly
# and in layers, and of which one is too large to stay gathered at stage 3 where small ones do, as on a GPU.


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(5, 13))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.table


class Toy(nn.Module):
    """Tokens -> predictions; the keyword `head` chooses which submodules a forward uses."""

    num_tokens = 5

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(13))
        self.embedding = nn.Embedding(8009, 13)
        self.positions = Positions()
        self.norm = nn.LayerNorm(13)
        self.mlp = nn.Sequential(nn.Linear(13, 29), nn.GELU(), nn.Linear(29, 13))
        self.head = nn.Linear(13, 3, bias=False)

    def forward(self, parts: list[Tensor], head: bool = False) -> Tensor:
        tokens = self.norm(self.positions(self.embedding(parts[0])) * self.scale)
        output: Tensor = self.head(tokens) if head else self.mlp(tokens)
        return output


def write_toy_values(name: str, shape: tuple[int, ...], offset: int, values: Tensor) -> None:
    """Initial values: a pure function of the place."""
    del shape
    values.copy_(0.3 * seeds.normal(seeds.key(0, name), values.shape, first=offset))


def toy_values(name: str, parameter: Tensor) -> Tensor:
    """Those of a whole parameter."""
    values = torch.empty(parameter.numel())
    write_toy_values(name, tuple(parameter.shape), 0, values)
    return values.view_as(parameter)


def toy_config(stage: int, precision: str, micro_batch_size: int = 2, clip_grad_norm: float = CLIP) -> Config:
    default = Config()
    return replace(
        default,
        train=replace(
            default.train,
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=micro_batch_size,
            clip_grad_norm=clip_grad_norm,
            weight_decay=0.01,
            adam_eps=1e-8,
        ),
        engine=replace(default.engine, zero_stage=stage, precision=precision),
    )


def toy_engine(stage: int, precision: str, **options: Any) -> Engine:
    engine = build_engine(Toy, toy_config(stage, precision, **options), CPU)
    engine.initialise(write_toy_values)
    return engine


def toy_batch(step: int) -> tuple[Tensor, Tensor]:
    """Tokens [8, 5] and targets [8, 5, 13] of a step's global batch."""
    keys = seeds.fold(seeds.fold(seeds.key(1, "batch"), step), torch.arange(GLOBAL_BATCH))
    return seeds.integers(keys, 8009, (5,)), seeds.normal(keys, (5, 13))


def toy_loss(prediction: Tensor, targets: Tensor) -> Tensor:
    return (prediction.float() - targets).square().mean()


def train_step(engine: Engine, step: int, poison: bool = False, decide: Decide | None = None) -> tuple[bool, float]:
    """One step over the global batch; returns (applied, mean loss). `poison` spoils a micro-batch of the last rank."""
    loss = backward_step(engine, step, poison)
    return engine.step(LEARNING_RATE, *[decide] * (decide is not None)), loss


def backward_step(engine: Engine, step: int, poison: bool = False) -> float:
    """All of a step but the engine's step; returns the mean loss."""
    rank, size = dist.get_rank(), dist.get_world_size()
    tokens, targets = toy_batch(step)
    micro_batches = list(
        zip(
            tokens.chunk(size)[rank].chunk(engine.accumulation_steps),
            targets.chunk(size)[rank].chunk(engine.accumulation_steps),
            strict=True,
        )
    )
    total = torch.zeros(())
    for i, (tokens_micro, targets_micro) in enumerate(micro_batches):
        loss = toy_loss(engine([tokens_micro]), targets_micro)
        total += loss.detach() / len(micro_batches) / size
        if poison and rank == size - 1 and i == 0:
            loss = loss * float("nan")
        engine.backward(loss)
    dist.all_reduce(total)
    return float(total)


# ---------------------------------------------------------------------------------------------------------------------
# Whole tensors from fragments, as a checkpoint would hold them


def content(fragment: Fragment) -> dict[str, Tensor]:
    return {"values": fragment.values, **fragment.state}


def gather(engine: Engine) -> dict[str, Tensor]:
    """{"name/values": whole parameter, "name/exp_avg": ..., "name/exp_avg_sq": ..., "name/times_held": ...}"""
    whole: dict[str, Tensor] = {}
    for name, parameter in Toy().named_parameters():
        for key in ("values", "exp_avg", "exp_avg_sq", "times_held"):
            whole[f"{name}/{key}"] = torch.zeros(parameter.numel())
    for fragment in engine.fragments():
        end = fragment.offset + len(fragment.values)
        whole[f"{fragment.name}/times_held"][fragment.offset : end] += 1
        if not fragment.replicated or dist.get_rank() == 0:
            for key, values in content(fragment).items():
                whole[f"{fragment.name}/{key}"][fragment.offset : end] = values
    for tensor in whole.values():
        dist.all_reduce(tensor)
    return whole


def restore(engine: Engine, whole: dict[str, Tensor], optimizer_step: int) -> None:
    for fragment in engine.fragments():
        for key, values in content(fragment).items():
            saved = whole[f"{fragment.name}/{key}"]
            values.copy_(saved[fragment.offset : fragment.offset + len(fragment.values)])
    engine.optimizer_step = optimizer_step
    engine.refresh()


def equal(first: dict[str, Tensor], second: dict[str, Tensor], ignoring: str = "\0") -> bool:
    return all(torch.equal(first[key], second[key]) for key in first if not key.endswith(ignoring))


# ---------------------------------------------------------------------------------------------------------------------
# What runs in the ranks. One group of processes does everything, since starting one takes seconds.


@dataclass
class Run:
    """What one engine did."""

    initial: dict[str, Tensor]
    first_output: Tensor  # in fp32
    output_dtype: str
    replicated: bool
    losses: list[float]
    grad_norms: list[float]
    final: dict[str, Tensor]
    num_updates: int

    def mapped(self, convert: Callable[[Any], Any]) -> "Run":
        """The same with every tensor converted."""
        initial, final = ({key: convert(value) for key, value in d.items()} for d in (self.initial, self.final))
        return replace(self, initial=initial, final=final, first_output=convert(self.first_output))


def portable(runs: dict[Any, Run]) -> dict[Any, Run]:
    """With arrays for tensors, which outlive the process that sends them."""
    return {key: run.mapped(Tensor.numpy) for key, run in runs.items()}


def received(runs: dict[Any, Run]) -> dict[Any, Run]:
    return {key: run.mapped(torch.from_numpy) for key, run in runs.items()}


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """A process group in which torch's warnings are errors, and so is whatever DeepSpeed logs or prints."""
    dist.init_process_group("gloo")
    make_warnings_errors()
    said = io.StringIO()
    # DeepSpeed's log goes to the standard output of the moment it is imported, which is below.
    with contextlib.redirect_stdout(said):
        yield
    assert not said.getvalue(), f"DeepSpeed said: {said.getvalue()}"


def latest_norm() -> float:
    """Of the whole gradient of the latest step of any engine, applied or not, before clipping."""
    return float(zero.gate.norm)


def run_steps(engine: Engine, num_steps: int = 4) -> Run:
    initial = gather(engine)
    engine.module.eval()
    with torch.no_grad():
        first_output = engine.module([toy_batch(0)[0]])
    engine.module.train()
    losses, grad_norms = [], []
    for step in range(num_steps):
        applied, loss = train_step(engine, step)
        assert applied
        losses.append(loss)
        grad_norms.append(latest_norm())
    replicated = all(fragment.replicated for fragment in engine.fragments())
    output_dtype = str(first_output.dtype).removeprefix("torch.")
    final, num_updates = gather(engine), engine.optimizer_step
    return Run(initial, first_output.float(), output_dtype, replicated, losses, grad_norms, final, num_updates)


def check_skip(stage: int, precision: str) -> None:
    """Steps that are not applied, for each reason, leave nothing behind: the next is that of a run without them."""
    engine, control = toy_engine(stage, precision), toy_engine(stage, precision)
    assert train_step(engine, 0) == train_step(control, 0)
    before = gather(engine)
    norms: list[float] = []

    def refuse(norm: Tensor) -> bool:
        norms.append(float(norm))
        return False

    def apply(norm: Tensor) -> bool:
        norms.append(float(norm))
        return True

    def check_untouched(grad_norm: float) -> None:
        assert latest_norm() == grad_norm
        assert engine.optimizer_step == 1
        assert equal(before, gather(engine))

    applied, _ = train_step(engine, 1, poison=True)
    assert not applied
    check_untouched(math.inf)
    applied, _ = train_step(engine, 1, poison=True, decide=refuse)
    assert (applied, norms) == (False, [math.inf])
    check_untouched(math.inf)
    applied, _ = train_step(engine, 2, decide=refuse)
    _, norm_2 = norms
    assert not applied
    check_untouched(norm_2)
    backward_step(engine, 1)
    assert not engine.step(0.0, lambda _: False)
    norm_1 = latest_norm()
    check_untouched(norm_1)

    norms.clear()
    for step in (1, 2):
        assert train_step(engine, step, decide=apply) == train_step(control, step)
        assert norms[-1] == latest_norm()
    assert engine.optimizer_step == 3
    assert equal(gather(control), gather(engine))
    # Asked once a step, with what the refused steps said too, on all ranks.
    assert norms[0] == norm_1
    assert norms[1] == latest_norm() != norm_2
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, [norm_1, norm_2, *norms])
    assert all(seen == everywhere[0] for seen in everywhere)


def check_unused(stage: int, precision: str) -> None:
    """A parameter without a gradient in this step gets none from the step before."""
    engine = toy_engine(stage, precision, micro_batch_size=GLOBAL_BATCH // dist.get_world_size(), clip_grad_norm=0.0)
    tokens = toy_batch(0)[0]
    norms = []
    for head in (False, True, False):
        engine.backward(engine([tokens], head=head).float().square().mean())
        engine.step(0.0)
        norms.append(latest_norm())
    assert norms[0] == pytest.approx(norms[2], rel=1e-6)
    module = Toy()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(toy_values(name, parameter))
    module([tokens], head=True).square().mean().backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
    assert norms[1] == pytest.approx(float(expected), rel=1e-5 if precision == "fp32" else 2e-2)


def check_sampling(stage: int, precision: str) -> None:
    """Forwards through other submodules between the steps: right, and without a trace in the training."""
    engine, control = toy_engine(stage, precision), toy_engine(stage, precision)
    tokens = toy_batch(9)[0]
    outputs = []
    for step in range(3):
        assert train_step(engine, step) == train_step(control, step)
        engine.module.eval()
        with torch.no_grad():
            outputs = [engine.module([tokens], head=True), engine.module([tokens]), engine([tokens], head=True)]
        engine.module.train()
        assert engine.module.num_tokens == 5
    assert torch.equal(outputs[0], outputs[2])
    assert outputs[0].shape == (GLOBAL_BATCH, 5, 3)
    whole = gather(engine)
    assert equal(whole, gather(control))
    module = Toy().to(outputs[0].dtype)
    module.load_state_dict({name: whole[f"{name}/values"].view_as(p) for name, p in module.named_parameters()})
    tolerance = 1e-6 if precision == "fp32" else 2e-2
    assert disagreement(outputs[0], module([tokens], head=True)) < tolerance
    assert disagreement(outputs[1], module([tokens])) < tolerance


def check_restore(source: int, targets: tuple[int, ...], precision: str, micro_batch_size: int) -> None:
    """State of one stage goes on at others with the same losses and weights, bit by bit."""
    # Clipping is off: the norm is summed in another order at each stage, and its last bit reaches every weight.
    options: dict[str, Any] = {"micro_batch_size": micro_batch_size, "clip_grad_norm": 0.0}
    engine = toy_engine(source, precision, **options)
    for step in range(2):
        train_step(engine, step)
    saved = gather(engine)
    continued = [train_step(engine, step) for step in range(2, 5)]
    final = gather(engine)
    for stage in targets:
        fresh = toy_engine(stage, precision, **options)
        # So that there is something to overwrite, in the weights that forward has gathered too.
        train_step(fresh, 7)
        restore(fresh, saved, optimizer_step=2)
        assert continued == [train_step(fresh, step) for step in range(2, 5)], (source, stage, precision)
        assert equal(final, gather(fresh), ignoring="times_held"), (source, stage, precision)
        assert fresh.optimizer_step == 5


def campaign_of_two() -> dict[Any, Run]:
    with process_group():
        runs: dict[Any, Run] = {kind: run_steps(toy_engine(*kind)) for kind in KINDS}
        for kind in KINDS:
            check_skip(*kind)
            check_unused(*kind)
            check_sampling(*kind)
        for precision in PRECISIONS:
            check_restore(0, STAGES, precision, micro_batch_size=4)
            check_restore(3, STAGES, precision, micro_batch_size=4)
        # With accumulation, stages 0 and 1 sum over micro-batches first, stages 2 and 3 over ranks first.
        check_restore(0, (0, 1), "fp32", micro_batch_size=1)
        check_restore(3, (2, 3), "fp32", micro_batch_size=1)
        # As on a GPU: small parameters stay gathered at stage 3.
        with patch.dict(zero._PERSISTENT_NUMEL, cpu=100_000):
            for precision in PRECISIONS:
                check_skip(3, precision)
                check_sampling(3, precision)
                check_restore(3, (3, 1), precision, micro_batch_size=4)
    return portable(runs)


def first_moments() -> dict[Any, dict[str, Any]]:
    """A tenth of the gradient of one micro-batch a rank on three ranks, for each kind of engine."""
    with process_group():
        moments = {}
        for kind in KINDS:
            config = toy_config(*kind, clip_grad_norm=0.0)
            train = replace(config.train, global_batch_size=6, micro_batch_size=2)
            engine = build_engine(Toy, replace(config, train=train), CPU)
            engine.initialise(write_toy_values)
            tokens, targets = (tensor[:6].chunk(3)[dist.get_rank()] for tensor in toy_batch(0))
            engine.backward(toy_loss(engine([tokens]), targets))
            engine.step(LEARNING_RATE)
            moments[kind] = {key: value.numpy() for key, value in gather(engine).items() if key.endswith("exp_avg")}
    return moments


def campaign_of_one() -> dict[Any, Run]:
    with process_group():
        runs: dict[Any, Run] = {kind: run_steps(toy_engine(*kind)) for kind in KINDS}
        for micro_batch_size in (1, 4, 8):
            for stage in STAGES:
                runs[stage, micro_batch_size] = run_steps(toy_engine(stage, "fp32", micro_batch_size=micro_batch_size))
        check_misuse()
        check_that_optimizers_ask()
    return portable(runs)


def check_misuse() -> None:
    engine = toy_engine(3, "fp32", micro_batch_size=4)
    tokens, targets = toy_batch(0)
    engine.backward(toy_loss(engine([tokens[:4]]), targets[:4]))
    with pytest.raises(RuntimeError, match="as many backwards as micro-batches"):
        engine.step(LEARNING_RATE)
    with pytest.raises(RuntimeError, match="frozen tensors must be buffers"):
        build_engine(lambda: Toy().requires_grad_(False), toy_config(1, "fp32"), CPU)


def check_that_optimizers_ask() -> None:
    """A DeepSpeed whose optimizers no longer ask before they apply is noticed, not trained with."""
    from deepspeed.runtime.zero import stage3

    engine = toy_engine(3, "fp32")
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(stage3, "is_invalid_grad_norm", lambda norm: False)
        with pytest.raises(RuntimeError, match="made a step without asking"):
            train_step(engine, 0)
        patches.delattr(stage3, "is_invalid_grad_norm")
        with pytest.raises(RuntimeError, match=r"stage3 of DeepSpeed .* asks no is_invalid_grad_norm"):
            toy_engine(3, "fp32")


@pytest.fixture(scope="module")
def two() -> dict[Any, Run]:
    """Runs on two ranks; restoring, skipping, sampling and unused parameters are checked inside."""
    runs: list[dict[Any, Run]] = run_in_processes(campaign_of_two, 2)
    assert all(runs[0][kind].losses == runs[1][kind].losses for kind in KINDS)
    return received(runs[0])


@pytest.fixture(scope="module")
def one() -> dict[Any, Run]:
    """Runs on one rank."""
    return received(run_in_processes(campaign_of_one, 1)[0])


# ---------------------------------------------------------------------------------------------------------------------
# The tests


def plain_torch(num_steps: int = 4) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """The same training in a loop of torch alone: losses, gradient norms, final weights."""
    train = toy_config(0, "fp32").train
    module = Toy()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(toy_values(name, parameter))
    betas = (train.adam_beta1, train.adam_beta2)
    # Norms, biases and embeddings do not decay.
    decaying = [part.weight for part in module.modules() if isinstance(part, nn.Linear)]
    others = [p for p in module.parameters() if all(p is not weight for weight in decaying)]
    groups: list[Any] = [{"params": decaying}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, LEARNING_RATE, betas, train.adam_eps, train.weight_decay, foreach=False)
    losses, norms = [], []
    for step in range(num_steps):
        tokens, targets = toy_batch(step)
        loss = toy_loss(module([tokens]), targets)
        loss.backward()
        # Every engine gives a parameter that was not used a gradient of zero.
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        norms.append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, {name: parameter.detach().flatten() for name, parameter in module.named_parameters()}


def assert_same_training(run: Run, other: Run, tolerance: float) -> None:
    assert run.losses == pytest.approx(other.losses, rel=tolerance)
    assert run.grad_norms == pytest.approx(other.grad_norms, rel=tolerance)
    for key, expected in other.final.items():
        if key.endswith("/values"):
            # Adam divides by a gradient's size, which magnifies the rounding of the smallest.
            assert disagreement(run.final[key], expected) < max(tolerance, 1e-4), key


@pytest.mark.parametrize("kind", KINDS)
def test_fragments_tile_every_parameter_once(kind: tuple[int, str], two: Any, one: Any) -> None:
    for run, world_size in ((two[kind], 2), (one[kind], 1)):
        assert run.replicated == (kind[0] == 0)
        times = world_size if run.replicated else 1
        held = {key: value for key, value in run.initial.items() if key.endswith("times_held")}
        assert len(held) == len(list(Toy().parameters()))
        assert all(torch.equal(value, torch.full_like(value, times)) for value in held.values())


@pytest.mark.parametrize("kind", KINDS)
def test_initial_weights_depend_on_neither_stage_nor_ranks(kind: tuple[int, str], two: Any, one: Any) -> None:
    for run in (two[kind], one[kind]):
        for name, parameter in Toy().named_parameters():
            expected = toy_values(name, parameter).flatten()
            assert torch.equal(run.initial[f"{name}/values"], expected)
            assert run.initial[f"{name}/exp_avg"].count_nonzero() == 0
        # The weights that forward uses, too.
        assert torch.equal(run.first_output, one[0, kind[1]].first_output)
        assert run.output_dtype == {"bf16": "bfloat16", "fp32": "float32"}[kind[1]]


@pytest.mark.parametrize("stage", STAGES)
def test_training_is_that_of_plain_torch_with_clipping(stage: int, two: Any, one: Any) -> None:
    losses, norms, weights = plain_torch()
    assert min(norms) > 2 * CLIP
    for run in (two[stage, "fp32"], one[stage, "fp32"]):
        assert run.num_updates == 4
        assert run.losses == pytest.approx(losses, rel=1e-5)
        assert run.grad_norms == pytest.approx(norms, rel=1e-5)
        for name, expected in weights.items():
            assert disagreement(run.final[f"{name}/values"], expected) < 1e-4, name


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_and_stages_agree_in_bf16(stage: int, two: Any, one: Any) -> None:
    assert_same_training(two[stage, "bf16"], one[0, "bf16"], 1e-3)
    assert_same_training(one[stage, "bf16"], one[0, "bf16"], 1e-3)
    # And bf16 is what they computed in.
    assert two[stage, "bf16"].losses != two[stage, "fp32"].losses
    assert two[stage, "bf16"].losses == pytest.approx(one[0, "fp32"].losses, rel=2e-2)
    assert two[stage, "bf16"].grad_norms == pytest.approx(one[0, "fp32"].grad_norms, rel=2e-2)


@pytest.mark.parametrize("stage", STAGES)
def test_accumulation_is_the_same_sum(stage: int, one: Any) -> None:
    """8 micro-batches of 1, 4 of 2, 2 of 4 and 1 of 8."""
    for micro_batch_size in (1, 4, 8):
        assert_same_training(one[stage, micro_batch_size], one[stage, "fp32"], 1e-5)


def test_gradients_are_summed_and_divided_in_fp32() -> None:
    """On three ranks: a bf16 gradient divided by three is another one. All stages see the same gradients."""
    moments = run_in_processes(first_moments, 3)[0]
    for stage, precision in KINDS:
        for key, expected in moments[0, precision].items():
            scale = np.linalg.norm(expected)
            assert scale > 0 or key.startswith("head")  # which the forward leaves out
            assert np.linalg.norm(moments[stage, precision][key] - expected) <= 1e-6 * scale, (stage, precision, key)


def test_a_block_fits_into_a_bucket() -> None:
    """Stage 3 gathers so much ahead."""
    for name, num_blocks in (("tiny", 2), ("XL", 2), ("3B", 1)):
        config = load_config(REPOSITORY / "configs" / f"{name}.yaml", [])
        settings = ds_config(config, 8, torch.device("cuda", 0))["zero_optimization"]
        with torch.device("meta"):
            block = make_model(config).trunk.blocks[0]
        numel = sum(parameter.numel() for parameter in block.parameters())
        for key in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"):
            assert num_blocks * numel <= settings[key] < max(5e7 + 1, numel + 2)
            assert settings[key] % 2 == 0


def test_deepspeed_config_follows_ours() -> None:
    config = toy_config(2, "bf16", micro_batch_size=2)
    settings = ds_config(config, 2, CPU)
    assert settings["train_batch_size"] == 8
    assert settings["train_micro_batch_size_per_gpu"] == 2
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["bf16"]["enabled"]
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    assert settings["zero_optimization"]["stage"] == 2
    assert not settings["zero_optimization"]["overlap_comm"]
    gpu = torch.device("cuda", 0)
    assert ds_config(config, 2, gpu)["zero_optimization"]["overlap_comm"]
    assert not ds_config(config, 1, gpu)["zero_optimization"]["overlap_comm"]
    assert ds_config(toy_config(3, "bf16"), 1, gpu)["zero_optimization"]["overlap_comm"]
    assert not ds_config(toy_config(3, "fp32"), 2, CPU)["bf16"]["enabled"]


class CountsInTheGroup(torch.optim.Optimizer):
    """Adam that counts its steps as apex's FusedAdam does (which needs a GPU): in the group, from what it finds there.

    Its update is torch's.
    """

    def __init__(self, parameters: list[Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, correction = self.state[p], [1 - beta ** group["step"] for beta in (0.9, 0.95)]
                state["exp_avg"].lerp_(p.grad, 0.1)
                state["exp_avg_sq"].lerp_(p.grad.square(), 0.05)
                denominator = (state["exp_avg_sq"] / correction[1]).sqrt() + 1e-8
                p -= group["lr"] * state["exp_avg"] / correction[0] / denominator


def test_steps_that_apex_counts_are_saved_and_restored() -> None:
    ours, theirs = (torch.ones(3, requires_grad=True) for _ in range(2))
    optimizer = optim._with_step_in_state(CountsInTheGroup([ours], lr=0.1))
    optim.create_state(optimizer, [(ours, optimizer.param_groups[0])])
    state = optimizer.state[ours]
    control = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for step in range(4):
        if step == 2:
            # Another process goes on from the states alone.
            optimizer = optim._with_step_in_state(CountsInTheGroup([ours], lr=0.1))
            optimizer.state[ours] = state
        ours.grad = theirs.grad = seeds.normal(seeds.fold(seeds.key(0, "gradient"), step), (3,))
        optimizer.step()
        control.step()
        assert int(state["step"]) == step + 1
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_apex_counts_a_step_once_however_many_groups_take_their_turns() -> None:
    """DeepSpeed makes a step of several groups in several, the gradients of one group at a time there."""
    values = [torch.ones(3, requires_grad=True) for _ in range(3)]
    optimizer = CountsInTheGroup([{"params": [one]} for one in values], lr=0.1)
    optim.create_state(optimizer, [(one, group) for one, group in zip(values, optimizer.param_groups, strict=True)])
    optim._with_step_in_state(optimizer)
    for step in range(2):
        for moving in values:
            for one in values:
                one.grad = torch.ones(3) if one is moving else None
            optimizer.step()
        assert [int(optimizer.state[one]["step"]) for one in values] == [step + 1] * 3


@pytest.mark.skipif(optim._apex_fused_adam() is not None, reason="the real apex is installed")
def test_the_registry_package_apex_is_not_taken_for_nvidias(monkeypatch) -> None:
    found = {"apex"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in found else None)
    assert optim._apex_fused_adam() is None
    assert not has_apex()


# ---------------------------------------------------------------------------------------------------------------------
# Compiled blocks and recomputed activations, under ZeRO


def network_losses(stage: int, precision: str, blocks: BlockSettings) -> tuple[list[float], int]:
    """Losses of a small network's steps, weights, splits and lengths changing, and how many graphs were compiled."""
    runtime.start(CPU)
    torch._dynamo.utils.counters.clear()
    config = toy_config(stage, precision, micro_batch_size=4)
    config = replace(config, engine=replace(config.engine, compile_blocks=blocks.compile))
    engine = network_engine(config, blocks)
    losses = network_steps(engine, (0, 1, 0, 2))
    return losses, torch._dynamo.utils.counters["stats"]["unique_graphs"]


def network_engine(config: Config, blocks: BlockSettings) -> Engine:
    engine = build_engine(
        lambda: CausalFusion(
            grid=3,
            patch_values=4,
            width=32,
            depth=2,
            num_heads=2,
            num_cond_tokens=2,
            num_classes=5,
            blocks=blocks,
        ),
        config,
        CPU,
    )
    engine.initialise(functools.partial(write_initial_values, 0, 3))
    return engine


def network_steps(engine: Engine, steps: Sequence[int]) -> list[float]:
    loss = DenoisingLoss(make_process(), ARSettings(), 1, 2, 5, 0.1, seed=0)
    ids = torch.arange(4) + 4 * dist.get_rank()
    losses = []
    for step in steps:
        total = 0.0
        for part in range(engine.accumulation_steps):
            part_ids = ids + 4 * dist.get_world_size() * part
            latents = seeds.normal(seeds.fold(seeds.key(0, "latents"), part_ids), (4, 3, 3))
            draws = loss.draw(step, 0, part_ids, part_ids % 5, 9, 4)
            mean = loss.total(loss(engine, loss.prepare(latents, draws)))
            engine.backward(mean)
            total += float(mean.detach())
        assert engine.step(1e-2)
        losses.append(total / engine.accumulation_steps)
    return losses


# ---------------------------------------------------------------------------------------------------------------------
# Muon


def is_matrix_of_block(name: str) -> bool:
    return name.startswith("trunk.blocks.") and name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight"))


def muon_at_all_stages(folder: Path) -> list[float]:
    """The losses of steps with Muon, which are the same at every stage, and after resuming at another."""
    runtime.start(CPU)
    everything = []
    store = CheckpointStore(folder, 9, 0)
    for stage in STAGES:
        config = toy_config(stage, "fp32", micro_batch_size=4, clip_grad_norm=0.0)
        config = replace(config, train=replace(config.train, optimizer="muon"))
        engine = network_engine(config, BlockSettings())
        first = network_steps(engine, (0, 1))
        ema = [fragment.values.clone() for fragment in engine.fragments()]
        for fragment in engine.fragments():
            names = {"momentum_buffer"} if is_matrix_of_block(fragment.name) else {"exp_avg", "exp_avg_sq"}
            assert fragment.state.keys() == names, fragment.name
            assert all(tensor.count_nonzero() for tensor in fragment.state.values() if len(fragment.values) > 9)
        checkpoints.write(store, make_state(stage + 1), engine.fragments(), ema)
        everything.append(first + network_steps(engine, (2, 0, 1)))
        assert engine.optimizer_step == 5
        resumed = network_engine(config, BlockSettings())
        network_steps(resumed, (3,))
        load(store.path(1), resumed.fragments(), ema, CONFIG)
        resumed.optimizer_step = 2
        resumed.refresh()
        assert network_steps(resumed, (2, 0, 1)) == everything[0][2:], stage
        with pytest.raises(UserError, match=r"holds the state of train.optimizer = adamw, and the config says muon"):
            load(store.path(1), resumed.fragments(), ema, {**CONFIG, "train": {"optimizer": "muon"}})
    assert all(losses == everything[0] for losses in everything), everything
    return everything[0]


def muon_of_torch() -> list[float]:
    """The same steps by torch's own optimizers."""
    runtime.start(CPU)
    config = toy_config(0, "fp32", micro_batch_size=4, clip_grad_norm=0.0)
    train = replace(config.train, optimizer="muon")
    engine = network_engine(replace(config, train=train), BlockSettings())
    named = dict(engine.module.named_parameters())
    matrices = [p for name, p in named.items() if is_matrix_of_block(name)]
    linears = [p for part in engine.module.modules() if isinstance(part, nn.Linear) for p in [part.weight]]
    rest = [p for name, p in named.items() if not is_matrix_of_block(name)]
    groups: list[Any] = [
        {"params": [p for p in rest if any(p is one for one in linears)]},
        {"params": [p for p in rest if all(p is not one for one in linears)], "weight_decay": 0.0},
    ]
    muon = torch.optim.Muon(matrices, 1e-2, train.weight_decay, train.muon_momentum, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(groups, 1e-2, (train.adam_beta1, train.adam_beta2), train.adam_eps, train.weight_decay)
    combined: Any = engine._deepspeed.basic_optimizer
    combined.parts = [muon, adam]
    return network_steps(engine, (0, 1, 2, 0, 1))


def test_muon_makes_the_same_update_at_every_stage_and_that_of_torch(tmp_path: Path) -> None:
    ours, again = run_in_processes(muon_at_all_stages, 2, tmp_path)
    [torchs] = run_in_processes(muon_of_torch, 1)
    assert len(set(ours)) == 5
    # Each of the two ranks knows the loss of its share.
    assert [(a + b) / 2 for a, b in zip(ours, again, strict=True)] == pytest.approx(torchs, rel=1e-3)


COMPILED = [(3, "fp32", True), (3, "bf16", False), (1, "bf16", True), (0, "bf16", False)]


# Each rank compiles for half a minute.
@pytest.mark.parametrize(
    ("stage", "precision", "checkpoint_activations"),
    [COMPILED[0], *(pytest.param(*kind, marks=pytest.mark.slow) for kind in COMPILED[1:])],
)
def test_compiled_blocks_train_alike(stage, precision, checkpoint_activations) -> None:
    plain = run_in_processes(network_losses, 2, stage, precision, BlockSettings())
    settings = BlockSettings(compile=True, checkpoint_activations=checkpoint_activations)
    compiled = run_in_processes(network_losses, 2, stage, precision, settings)
    for (want, _), (got, num_graphs) in zip(plain, compiled, strict=True):
        assert got == pytest.approx(want, rel=1e-5 if precision == "fp32" else 3e-3)
        # Three steps of three lengths at most, whatever the blocks and their weights: nothing is compiled again.
        assert 1 <= num_graphs <= 3
