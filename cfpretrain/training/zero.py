"""The door to DeepSpeed: its settings, derived from ours, and our patches of it (read in 0.19.8)."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from cfpretrain.base.config import Config
from cfpretrain.core.block import Block, BlockSettings

# Elements of a communication bucket, at least (fp32: 200 MB). DeepSpeed's own default allocates ten times as much.
_BUCKET_NUMEL = 50_000_000
# Parameters of fewer elements stay gathered at stage 3, and are sent one by one after each step. Over gloo that costs
# more than gathering them with their modules: the demo's step took 250 ms instead of 200. For GPUs it is DeepSpeed's
# own default.
_PERSISTENT_NUMEL = {"cpu": 0, "cuda": 100_000}

# (global norm of the gradient before clipping, a scalar on the device: infinite where a gradient is not finite) ->
# whether to apply the update; alike on all ranks, and never where the norm is infinite
Decide = Callable[[Tensor], bool]


def ds_config(config: Config, world_size: int, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's configuration, derived from ours, which is checked for so many ranks; no user ever writes one."""
    # At stage 0 DeepSpeed knows of fp32 only, and does not clip where it should: `optim.Combined` clips.
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
            "stage3_param_persistence_threshold": _PERSISTENT_NUMEL[device.type],
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
        block = Block(config.model.design, BlockSettings())
    largest = sum(parameter.numel() for parameter in block.parameters())
    return max(_BUCKET_NUMEL, largest + largest % 2)  # DeepSpeed takes even ones only


# ---------------------------------------------------------------------------------------------------------------------
# Changes


def load_deepspeed(device: torch.device) -> ModuleType:
    """Imports DeepSpeed for this kind of device and patches it; RuntimeError where a patched name is missing."""
    # DeepSpeed chooses its accelerator at import; unset, it guesses, and warns where it finds no GPU.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime import bf16_optimizer, engine, utils
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
    # All but the last make the host wait for the device in a step: a search for gradients that are not finite, which
    # their norm shows as well; -1 written over such a norm, which `_Gate` takes as it is; the question whether to clip;
    # stage 3's norm.
    for owner, name, double in (
        (stage_1_and_2.DeepSpeedZeroOptimizer, "check_overflow", _do_nothing),
        (stage_1_and_2, "mask_nan_or_inf_with_val_inplace", _do_nothing),
        (utils, "mask_nan_or_inf_with_val_inplace", _do_nothing),
        (bf16_optimizer, "clip_tensors_by_global_norm", _clip),
        (stage3.DeepSpeedZeroOptimizer_Stage3, "get_grad_norm_direct", _gradient_norm),
        # Ours move each value by itself, or know of the ranges.
        (engine, "is_zero_supported_optimizer", lambda _: True),
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
        optimizers.is_invalid_grad_norm = gate.refuses
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


gate = _Gate()
