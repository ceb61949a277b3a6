"""The door to DeepSpeed: one engine for ZeRO stages 0 to 3, and what it keeps in fp32 (weights, moments) as fragments.

Fragments reach into DeepSpeed's internals (read in 0.19.8). Nothing outside this module may; EMA, checkpoints and
exports use `Engine.fragments`, `Engine.refresh` and `Engine.optimizer_step` alone.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from cfpretrain.base.config import Config
from cfpretrain.core.model import Block, BlockSettings, WriteInitialValues
from cfpretrain.core.norm import has_apex
from cfpretrain.run.tensor_files import Fragment

# Elements of a communication bucket, at least (fp32: 200 MB). DeepSpeed's own default allocates ten times as much.
_BUCKET_NUMEL = 50_000_000

# (global norm of the gradient before clipping, a scalar on the device: infinite where a gradient is not finite) ->
# whether to apply the update; alike on all ranks, and never where the norm is infinite
Decide = Callable[[Tensor], bool]


@dataclass(frozen=True)
class _Range:
    """A fragment's place: `numel` values of a parameter lie in `flat` from `begin` on."""

    name: str
    shape: tuple[int, ...]
    offset: int
    flat: Tensor
    begin: int
    numel: int


# ---------------------------------------------------------------------------------------------------------------------
# Building


def ds_config(config: Config, world_size: int, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's configuration, derived from ours; no user ever writes one.

    Args:
        config: checked for `world_size` ranks.
        world_size: number of ranks.
        device: where the ranks compute.
    """
    # At stage 0 DeepSpeed knows of fp32 only, and does not clip where it should: `_GuardedAdamW` clips.
    has_masters = config.engine.precision == "bf16" and config.engine.zero_stage > 0
    clip_grad_norm = config.train.clip_grad_norm if config.engine.zero_stage > 0 else 0.0
    stage, bucket_numel = config.engine.zero_stage, _bucket_numel(config)
    return {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size(world_size),
        "gradient_accumulation_steps": config.accumulation_steps(world_size),
        "gradient_clipping": clip_grad_norm,
        "steps_per_print": 10**12,
        # Its timer waits for the device at every forward and every step.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
        "bf16": {
            "enabled": has_masters,
            "check_grad_overflow": True,
            # Adds each bf16 gradient to the fp32 ones at once, and frees it (stage 1).
            "immediate_grad_update": True,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        # Its default under bf16 would round the sums over ranks, also those of gradients accumulated in fp32.
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": overlaps(stage, world_size, device.type == "cuda"),
            # Stages 1 and 2 sum a bucket over all ranks either way. So they do it in place, and divide the sum in fp32;
            # what they call reduce-scatter divides stage 2's bf16 gradients first, which rounds where the number of
            # ranks is no power of two.
            "reduce_scatter": stage == 3,
            "reduce_bucket_size": bucket_numel,
            "allgather_bucket_size": bucket_numel,
            "stage3_prefetch_bucket_size": bucket_numel,
            # It replaces torch's linear in the whole process by one that rounds before it adds the bias,
            # so that stage 3 would compute other numbers than stages 0 to 2.
            "memory_efficient_linear": False,
            "stage3_param_persistence_threshold": _persistent_numel(device),
        },
    }


def overlaps(zero_stage: int, num_ranks: int, on_gpu: bool) -> bool:
    """Whether communication overlaps with computation, where DeepSpeed can."""
    # Stages 1 and 2 with overlap stop the host after each backward until the GPU is done, and one rank has nothing to
    # send. Stage 3 stops it at each block without: the stream that it waits for would be that of the computation.
    return on_gpu and (zero_stage == 3 or (zero_stage > 0 and num_ranks > 1))


def _bucket_numel(config: Config) -> int:
    """Elements of a bucket: stage 3 gathers a whole block ahead."""
    with torch.device("meta"):
        block = Block(config.model.width, config.model.num_heads, BlockSettings())
    largest = sum(parameter.numel() for parameter in block.parameters())
    return max(_BUCKET_NUMEL, largest + largest % 2)  # DeepSpeed takes even ones only


def _persistent_numel(device: torch.device) -> int:
    """Parameters of fewer elements stay gathered at stage 3."""
    # They are sent one by one after each step. Over gloo that costs more than gathering them with their modules: the
    # demo's step took 250 ms instead of 200. On a GPU it is DeepSpeed's own default.
    return 0 if device.type == "cpu" else 100_000


def build_engine(make_module: Callable[[], nn.Module], config: Config, device: torch.device) -> "Engine":
    """Builds the module, its optimizer and DeepSpeed's engine around them. Every rank calls it.

    The weights are whatever `make_module` drew; `Engine.initialise` or a checkpoint gives them their values.

    Args:
        make_module: constructs the module; at stage 3 each submodule is cut into shards as soon as it is constructed,
            so that no rank ever holds the whole model, and the module's dtype is already that of `engine.precision`.
            Every parameter must require a gradient: frozen tensors are buffers.
        config: checked; its sections `train` and `engine` are used.
        device: of this rank; torch.distributed is initialised for it.
    """
    assert torch.distributed.is_initialized(), "the process group is started before the engine"
    deepspeed = _load_deepspeed(device)
    settings = ds_config(config, torch.distributed.get_world_size(), device)
    module = _construct(deepspeed, make_module, config, settings, device)
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    if frozen:
        raise RuntimeError(f"frozen tensors must be buffers: {frozen}")
    has_blocks = any(isinstance(part, Block) for part in module.modules())
    if has_blocks and config.engine.zero_stage == 3 and (config.engine.compile_blocks or device.type == "cpu"):
        # A block's parameters are gathered at once. Else ZeRO's hooks would gather those of each linear layer inside
        # the compiled graphs, which break there, and are recompiled again and again. On a CPU the hooks themselves
        # take time that a small model feels.
        deepspeed.utils.set_z3_leaf_modules(module, [Block])
    called = module
    if config.engine.zero_stage == 0 and config.engine.precision == "bf16":
        called = _Bfloat16Forward(module)
    parameters = list(module.parameters())
    deepspeed_engine, *_ = deepspeed.initialize(
        model=called,
        optimizer=_make_optimizer(parameters, config, device),
        model_parameters=parameters,
        config=settings,
        dist_init_required=False,
    )
    return Engine(deepspeed_engine, called, dict(module.named_parameters()), config.engine.zero_stage)


def _load_deepspeed(device: torch.device) -> ModuleType:
    # DeepSpeed chooses its accelerator at import; unset, it guesses, and warns where it finds no GPU.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime import bf16_optimizer, utils
    from deepspeed.runtime.fp16 import loss_scaler
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    found = get_accelerator().device_name()
    if found != device.type:
        raise RuntimeError(f"DeepSpeed computes on {found}, the run on {device.type}")
    # Otherwise `init_distributed` compiles a shared-memory all-reduce on the CPU (up to a minute, needs a C++
    # compiler), which only inference calls: DeepSpeed builds no op that is not in this table.
    deepspeed.ops.__compatible_ops__ = {}
    # Stage 1 with bf16 prints the memory in use, whatever the level of the log.
    bf16_optimizer.see_memory_usage = _do_nothing
    # It calls every step that is not applied an overflow; the caller knows better, and says so.
    loss_scaler.log_dist = _do_nothing
    # Each of these makes the host wait for the device in a step: a search for gradients that are not finite, which
    # their norm shows as well; -1 written over such a norm, which `_Gate` takes as it is; the question whether to clip;
    # stage 3's norm.
    for owner, name, double in (
        (stage_1_and_2.DeepSpeedZeroOptimizer, "check_overflow", _do_nothing),
        (stage_1_and_2, "mask_nan_or_inf_with_val_inplace", _do_nothing),
        (utils, "mask_nan_or_inf_with_val_inplace", _do_nothing),
        (bf16_optimizer, "clip_tensors_by_global_norm", _clip),
        (stage3.DeepSpeedZeroOptimizer_Stage3, "get_grad_norm_direct", _gradient_norm),
    ):
        if not hasattr(owner, name):
            raise RuntimeError(f"{owner.__name__} of DeepSpeed {deepspeed.__version__} has no {name}")
        setattr(owner, name, double)
    # All that optimizers of ZeRO ask before they apply an update; when refused, they discard the gradients.
    for optimizers in (bf16_optimizer, stage_1_and_2, stage3):
        if not hasattr(optimizers, "is_invalid_grad_norm"):
            raise RuntimeError(
                f"{optimizers.__name__} of DeepSpeed {deepspeed.__version__} asks no is_invalid_grad_norm"
            )
        optimizers.is_invalid_grad_norm = _gate.refuses
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
    return deepspeed


def _gradient_norm(optimizer: Any, gradients: list[Tensor], parameters: list[nn.Parameter], *_: Any) -> Tensor:
    """In place of stage 3's `get_grad_norm_direct`; not finite where that one gives -1."""
    total = torch.stack(torch._foreach_norm(gradients, 2.0, torch.float64)).square().sum()
    torch.distributed.all_reduce(total, group=optimizer._get_param_partition_group(parameters[0]))
    return total.sqrt()


def _clip(input_tensors: list[Tensor], max_norm: float, global_norm: Tensor, mpu: None = None) -> None:
    """In place of stage 1's `clip_tensors_by_global_norm`: scales by 1 where there is nothing to clip."""
    torch._foreach_mul_([tensor.detach() for tensor in input_tensors], (max_norm / (global_norm + 1e-6)).clamp(max=1))


def _do_nothing(*_: Any, **__: Any) -> None:
    """In place of a function of DeepSpeed's whose output is not used."""


class _Gate:
    """Where the optimizers ask whether to apply an update, on all ranks with the same gradient norm."""

    def __init__(self) -> None:
        self._decide: Decide | None = None  # while a step is made
        self._applies: bool | None = None  # its answer, once it was asked
        self.norm = torch.tensor(math.inf)  # of the latest step; infinite where it is no number

    @contextmanager
    def asking(self, decide: Decide) -> Iterator[None]:
        """One step, in which `decide` is asked once."""
        self._decide, self._applies = decide, None
        try:
            yield
        finally:
            self._decide = None

    @property
    def was_asked(self) -> bool:
        """In the latest step."""
        return self._applies is not None

    def refuses(self, norm: Tensor | float) -> bool:
        """In place of DeepSpeed's `is_invalid_grad_norm`, which marks a norm that is not finite by -1 at times."""
        # Stages 1 and 2 ask again while they clip, having begun to apply.
        if self._applies is None:
            assert self._decide is not None, "DeepSpeed applies an update outside of a step"
            norm = torch.as_tensor(norm).detach()
            self.norm = torch.where(norm.isfinite() & (norm >= 0), norm, math.inf).reshape(())
            self._applies = self._decide(self.norm)
        return not self._applies


def _is_finite(norm: Tensor) -> bool:
    return math.isfinite(float(norm))


_gate = _Gate()


def _construct(
    deepspeed: ModuleType,
    make_module: Callable[[], nn.Module],
    config: Config,
    settings: dict[str, Any],
    device: torch.device,
) -> nn.Module:
    if config.engine.zero_stage < 3:
        with device:
            return make_module()
    with deepspeed.zero.Init(config_dict_or_path=settings):
        module = make_module()
    # DeepSpeed moves the buffers of stages 0 to 2 only.
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)
    return module


def _make_optimizer(parameters: list[nn.Parameter], config: Config, device: torch.device) -> torch.optim.Optimizer:
    train = config.train
    fused_adam = _apex_fused_adam() if device.type == "cuda" and config.engine.zero_stage > 0 else None
    if fused_adam is not None:
        return _with_step_in_state(
            fused_adam(
                parameters,
                lr=train.learning_rate,
                betas=(train.adam_beta1, train.adam_beta2),
                eps=train.adam_eps,
                weight_decay=train.weight_decay,
                adam_w_mode=True,
            )
        )
    # Fused is the fastest, but on the CPU its last bit depends on where a range begins: resuming at another stage would
    # not go on with the same numbers.
    on_gpu = device.type == "cuda"
    options: dict[str, Any] = {
        "lr": train.learning_rate,
        "betas": (train.adam_beta1, train.adam_beta2),
        "eps": train.adam_eps,
        "weight_decay": train.weight_decay,
        "fused": on_gpu,
        "foreach": not on_gpu,
    }
    if config.engine.zero_stage == 0:
        return _GuardedAdamW(parameters, clip_grad_norm=train.clip_grad_norm, **options)
    return torch.optim.AdamW(parameters, **options)


def _apex_fused_adam() -> Any:
    """FusedAdam of NVIDIA's apex; None where apex is not installed with its CUDA code."""
    # The package `apex` on the registry is another: it has no optimizers.
    if not has_apex("amp_C"):
        return None
    from apex.optimizers import FusedAdam

    return FusedAdam


def _with_step_in_state(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Lets apex's optimizer count its steps where torch's does, so that they are saved and restored alike.

    It counts in the group, and a restored run would begin again with the bias correction of step 1.
    """

    def count_in(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            group["step"] = int(optimizer.state[group["params"][0]]["step"])

    def count_out(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["step"].fill_(group["step"])

    optimizer.register_step_pre_hook(count_in)
    optimizer.register_step_post_hook(count_out)
    return optimizer


class _GuardedAdamW(torch.optim.AdamW):
    """AdamW of stage 0, which clips and which asks before it applies, as the optimizers of ZeRO do.

    DeepSpeed leaves both out at stage 0, but takes `overflow` from an optimizer that has it.
    """

    def __init__(self, parameters: list[nn.Parameter], clip_grad_norm: float, **options: Any) -> None:
        super().__init__(parameters, **options)
        self._clip_grad_norm = clip_grad_norm
        self.overflow = False

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None, "a closure is not supported"
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        # The gradients are summed over the ranks already, so all ranks see one norm and decide alike.
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        self.overflow = _gate.refuses(norm)
        if self.overflow:
            return
        if self._clip_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._clip_grad_norm, norm)
        super().step()


class _Bfloat16Forward(nn.Module):
    """Computes in bf16 with fp32 weights: each forward rounds them, and their gradients arrive in fp32.

    DeepSpeed's own bf16 without ZeRO accumulates gradients in bf16 only. The weights of a forward are those of the
    other stages, bit by bit. (Activation checkpointing would recompute with the fp32 weights: it needs stage 1.)
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rounded = {name: parameter.to(torch.bfloat16) for name, parameter in self.module.named_parameters()}
        return torch.func.functional_call(self.module, rounded, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        # What callers ask of the module (its sizes, its null class) is the inner module's to answer.
        own = self.__dict__["_modules"]
        return own[name] if name in own else getattr(own["module"], name)


# ---------------------------------------------------------------------------------------------------------------------
# The engine


class Engine:
    """A module in training: forward, backward, step, and the fp32 state of this rank.

    A step of training is `loss = engine(...)` and `engine.backward(loss)` for each micro-batch, then one
    `engine.step(learning_rate)`. The gradient applied is the mean over micro-batches and ranks, so a loss that is the
    mean over its micro-batch's samples gives the gradient of the mean over the global batch.

    Every rank calls the same methods in the same order, forwards under `torch.no_grad` included.
    """

    def __init__(
        self, deepspeed_engine: Any, module: nn.Module, parameters: dict[str, nn.Parameter], zero_stage: int
    ) -> None:
        self._deepspeed = deepspeed_engine
        self._zero_stage = zero_stage
        self._num_backwards = 0
        self._grad_norm = torch.zeros(())
        self._states = _create_adam_states(deepspeed_engine.basic_optimizer, self._flats())
        self._fragments = [self._make_fragment(place) for place in self._ranges(parameters)]
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module's forward; training forwards must come through here, others may call `module`."""
        return self._deepspeed(*args, **kwargs)

    @property
    def optimizer_name(self) -> str:
        """What moves the weights, for people to read."""
        optimizer = self._deepspeed.basic_optimizer
        package = type(optimizer).__module__.split(".")[0]
        fused = "fused " if optimizer.defaults.get("fused") else ""
        return f"{fused}{type(optimizer).__name__.removeprefix('_Guarded')} of {package}"

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches, hence backwards, of one step."""
        return int(self._deepspeed.gradient_accumulation_steps())

    def backward(self, loss: Tensor) -> None:
        """Adds one micro-batch's gradients, divided by the number of micro-batches.

        Args:
            loss: scalar, computed from the output of the latest `engine(...)`.
        """
        if self._num_backwards >= self.accumulation_steps:
            raise RuntimeError("a step has as many backwards as micro-batches")
        self._deepspeed.backward(loss)
        self._num_backwards += 1
        if self._num_backwards < self.accumulation_steps:
            # Updates nothing: DeepSpeed counts micro-batches by calls of its step.
            self._deepspeed.step()

    def step(self, learning_rate: float, decide: Decide = _is_finite) -> bool:
        """Clips, updates the weights and clears the gradients, after the last micro-batch's backward.

        Args:
            learning_rate: of this step.
            decide: whether to apply the update; called exactly once. On a GPU all work of the step is in flight when it
                is called, and a read-back in it is the only one of the step.

        Returns:
            Whether the update was applied; false on all ranks alike where `decide` refused, and then neither weights
            nor moments nor the step count have changed.
        """
        if self._num_backwards != self.accumulation_steps:
            raise RuntimeError("a step has as many backwards as micro-batches")
        for group in self._deepspeed.basic_optimizer.param_groups:
            group["lr"] = learning_rate
        with _gate.asking(decide):
            self._deepspeed.step()
            applied = bool(self._deepspeed.was_step_applied())
            if not _gate.was_asked:
                raise RuntimeError("DeepSpeed made a step without asking")
        self._num_backwards = 0
        self._grad_norm = _gate.norm
        if self._zero_stage == 3:
            # DeepSpeed writes over the gradients that the next backward computes, and would apply the others again:
            # those of parameters that the next step does not use.
            self._deepspeed.optimizer.grad_partitions_flat_buffer.zero_()
        return applied

    @property
    def grad_norm(self) -> float:
        """Norm of the whole gradient of the latest step, applied or not, before clipping; infinity if not finite.

        Waits for the device.
        """
        return float(self._grad_norm)

    @property
    def optimizer_step(self) -> int:
        """Updates that Adam has made, on which its bias correction depends."""
        return int(self._states[0]["step"])

    @optimizer_step.setter
    def optimizer_step(self, num_steps: int) -> None:
        for state in self._states:
            state["step"].fill_(num_steps)

    def fragments(self) -> list[Fragment]:
        """What this rank holds, in the order of the module's parameters; valid for the life of the engine.

        Parameters of which this rank holds nothing are left out, and padding is never part of a fragment.
        """
        return self._fragments

    @torch.no_grad()
    def initialise(self, write_initial_values: WriteInitialValues) -> None:
        """Gives every weight its initial value, whatever the stage and the number of ranks.

        Args:
            write_initial_values: (name, shape of the whole parameter, flat offset, fp32 [numel]), writes into the last;
                the same function on every rank.
        """
        for fragment in self._fragments:
            write_initial_values(fragment.name, fragment.shape, fragment.offset, fragment.values)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Recomputes the weights that forward uses from the fragments' values; all ranks together."""
        optimizer = self._deepspeed.optimizer
        if self._zero_stage == 0:
            return
        if self._zero_stage < 3:
            optimizer.update_lp_params()
            return
        # Small parameters stay gathered on every rank: released, they are gathered again by the next forward.
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)

    def _flats(self) -> list[Tensor]:
        """The tensors that the optimizer updates on this rank."""
        if self._zero_stage == 3:
            return list(self._deepspeed.optimizer.fp32_partitioned_groups_flat)
        return [flat for group in self._deepspeed.basic_optimizer.param_groups for flat in group["params"]]

    def _ranges(self, parameters: dict[str, nn.Parameter]) -> Iterator[_Range]:
        if self._zero_stage == 0:
            return (_Range(name, tuple(p.shape), 0, p, 0, p.numel()) for name, p in parameters.items())
        if self._zero_stage < 3:
            return _ranges_of_stages_1_and_2(parameters, self._flats())
        return _ranges_of_stage_3(parameters, self._deepspeed.optimizer)

    def _make_fragment(self, place: _Range) -> Fragment:
        state = self._deepspeed.basic_optimizer.state[place.flat]
        values, exp_avg, exp_avg_sq = (
            tensor.detach().view(-1).narrow(0, place.begin, place.numel)
            for tensor in (place.flat, state["exp_avg"], state["exp_avg_sq"])
        )
        replicated = self._zero_stage == 0
        return Fragment(place.name, place.shape, place.offset, values, exp_avg, exp_avg_sq, replicated)


def _create_adam_states(optimizer: torch.optim.Optimizer, flats: list[Tensor]) -> list[dict[str, Tensor]]:
    """The state that AdamW would create at its first step, so that it can be restored before one."""
    for flat in flats:
        optimizer.state[flat] = {
            "step": torch.zeros((), dtype=torch.float32, device=flat.device),
            "exp_avg": torch.zeros_like(flat, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(flat, requires_grad=False),
        }
    return [optimizer.state[flat] for flat in flats]


def _ranges_of_stages_1_and_2(parameters: dict[str, nn.Parameter], flats: list[Tensor]) -> Iterator[_Range]:
    """One flat tensor holds all parameters one after another, and each rank an equal part of it."""
    for name, parameter in parameters.items():
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            continue
        place, flat = mapping.get_hp_fragment_address(), flats[mapping.param_group_index]
        offset = mapping.lp_fragment_address.start
        yield _Range(name, tuple(parameter.shape), offset, flat, place.start, place.numel)


def _ranges_of_stage_3(parameters: dict[str, nn.Parameter], optimizer: Any) -> Iterator[_Range]:
    """Each parameter is cut into equal parts, one a rank, and a rank's parts lie one after another."""
    names = {parameter: name for name, parameter in parameters.items()}
    for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        begin = 0
        for parameter in group:
            size = parameter.partition_numel()
            offset = torch.distributed.get_rank() * size
            # The last ranks' parts may be padded, or be nothing else.
            numel = min(size, parameter.ds_numel - offset)
            if numel > 0:
                yield _Range(names[parameter], tuple(parameter.ds_shape), offset, flat, begin, numel)
            begin += size
