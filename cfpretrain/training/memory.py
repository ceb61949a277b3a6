"""Memory of a training step: an estimate from sizes alone, and an account of what a real step holds.

The estimate follows what DeepSpeed 0.19.8 allocates under `engine.ds_config`, and what autograd keeps of our blocks;
`tests/test_memory.py` holds it against real steps. All sizes are bytes on one rank.
"""

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cfpretrain.base.config import Config, can_checkpoint
from cfpretrain.core.ar import ARSettings
from cfpretrain.core.attention import BACKENDS
from cfpretrain.core.modalities import class_segment, image_segment
from cfpretrain.core.work import sequence_lengths
from cfpretrain.run.build import choose_attention, make_model
from cfpretrain.training.zero import ds_config

_FP32 = 4

# What autograd keeps of a block, in [B, M, D] tensors: the input, its norm, qkv (3), normed q and k (2), attention's
# output and its rearrangement (2), the sum after attention, its norm, and before and after GELU (8).
_KEPT_OF_BLOCK = 19
# A compiled block keeps as much: inductor computes no input of a matrix product a second time. In fp32 it also keeps
# q and k before their norms apart from qkv.
_KEPT_BY_COMPILER_FP32 = 2
# Gradients alive at once in a block's backward, in [B, M, D] tensors: its output's, and GELU's output's or input's.
_WORKING = 5
# Float tensors of the size of the noised tokens in the loss: latents, noise, noised, prediction, differences, ...
_KEPT_OF_LOSS = 10

# DeepSpeed's own numbers, which `ds_config` leaves as they are.
_ALLREDUCE_NUMEL = 500_000_000  # stage 0 copies gradients of up to so many elements for one all-reduce
_REUSE_NUMEL = 1_000_000_000  # stage 3 keeps parameters gathered that are used again within so many elements


# ---------------------------------------------------------------------------
# What is estimated


@dataclass(frozen=True)
class Network:
    """Sizes of a network.

    Attributes:
        parameter_numels: elements of each parameter.
        width, depth, num_heads: D, blocks, H.
        num_tokens: L.
        patch_values: P.
        max_sequence: tokens of the longest sequence that training can draw.
    """

    parameter_numels: tuple[int, ...]
    width: int
    depth: int
    num_heads: int
    num_tokens: int
    patch_values: int
    max_sequence: int

    @property
    def num_parameters(self) -> int:
        """All elements together."""
        return sum(self.parameter_numels)


@dataclass(frozen=True)
class Plan:
    """How a step is made.

    Attributes:
        num_ranks: GPUs.
        zero_stage: 0 to 3.
        precision: "bf16" or "fp32".
        micro_batch_size: samples of a forward on one rank.
        accumulation_steps: micro-batches of a step.
        checkpointing: activation checkpointing.
        compiled: blocks are compiled.
        mask: whose dense mask attention takes: "sample" for one of each sample, "shared", "none".
        ema_on_host: EMA in host memory.
        on_gpu: one fused update; else torch's foreach update, which makes a copy.
        bucket_numel: elements of a communication bucket.
        overlap: communication overlaps with computation, with two buckets at stages 1 and 2.
        persistent_numel: parameters of fewer elements stay gathered at stage 3.
        optimizer: "adamw" or "muon".
    """

    num_ranks: int
    zero_stage: int
    precision: Literal["bf16", "fp32"]
    micro_batch_size: int
    accumulation_steps: int
    checkpointing: bool
    compiled: bool
    mask: Literal["none", "shared", "sample"]
    ema_on_host: bool
    on_gpu: bool
    bucket_numel: int
    overlap: bool
    persistent_numel: int
    optimizer: str = "adamw"

    @property
    def value_bytes(self) -> int:
        """Of a weight in a forward, and of an activation."""
        return 2 if self.precision == "bf16" else _FP32

    @property
    def num_masks(self) -> int:
        """Dense masks of a micro-batch."""
        return {"none": 0, "shared": 1, "sample": self.micro_batch_size}[self.mask]


def network_of(config: Config, parameter_numels: Sequence[int]) -> Network:
    """The sizes of a config's network; `parameter_numels` are those of `build.make_model`."""
    model = config.model
    image = image_segment(torch.zeros(1, model.num_tokens, dtype=torch.int64))
    segments, ar = [class_segment(model.num_cond_tokens), image], ARSettings(**vars(config.order))
    lengths = sequence_lengths(segments, ar, config.clean_token_multiple())
    return Network(
        parameter_numels=tuple(parameter_numels),
        width=model.width,
        depth=model.depth,
        num_heads=model.num_heads,
        num_tokens=model.num_tokens,
        patch_values=model.patch_values,
        max_sequence=max(lengths),
    )


def plan_of(config: Config, num_ranks: int, zero_settings: dict[str, Any], attention: str, on_gpu: bool) -> Plan:
    """How a config makes a step.

    Args:
        config: checked for `num_ranks`.
        num_ranks: GPUs.
        zero_settings: section `zero_optimization` of `engine.ds_config`.
        attention: its backend, chosen by `build.choose_attention`.
        on_gpu: whether the ranks compute on GPUs.
    """
    engine, order = config.engine, config.order
    shared = ARSettings(**vars(order)).shares_split
    return Plan(
        num_ranks=num_ranks,
        zero_stage=engine.zero_stage,
        precision=engine.precision,
        micro_batch_size=config.micro_batch_size(num_ranks),
        accumulation_steps=config.accumulation_steps(num_ranks),
        checkpointing=engine.activation_checkpointing,
        compiled=engine.compile_blocks,
        mask="none" if not BACKENDS[attention].has_dense_mask else "shared" if shared else "sample",
        ema_on_host=engine.ema_on_host,
        on_gpu=on_gpu,
        bucket_numel=zero_settings["reduce_bucket_size"],
        overlap=zero_settings["overlap_comm"],
        persistent_numel=zero_settings["stage3_param_persistence_threshold"],
        optimizer=config.train.optimizer,
    )


def with_micro_batch(plan: Plan, micro_batch_size: int) -> Plan:
    """The same global batch in other micro-batches; `micro_batch_size` divides a rank's share."""
    share = plan.micro_batch_size * plan.accumulation_steps
    if share % micro_batch_size:
        raise RuntimeError(f"micro-batches of {micro_batch_size} do not divide a rank's share of {share}")
    return replace(plan, micro_batch_size=micro_batch_size, accumulation_steps=share // micro_batch_size)


# ---------------------------------------------------------------------------
# The estimate


@dataclass(frozen=True)
class Estimate:
    """Bytes on one rank.

    Attributes:
        weights: those that are held all the time, in low precision where there is another copy.
        gradients: as held between two micro-batches. (Where a step has one micro-batch only, stages 0 and 2 hold none
            when its backward begins; they are counted all the same.)
        optimizer: fp32 masters and the optimizer's state.
        ema: on the GPU.
        buffers: of communication.
        lasting_buffers: of them, those that also live between two micro-batches.
        activations: kept from the forward for the backward, at the longest sequence.
        moments: what else lives at the three moments that can be the worst: when the backward begins (beside the
            activations), when it ends and the last gradients are reduced, and when the weights are updated.
        host: in host memory.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    buffers: int
    lasting_buffers: int
    activations: int
    moments: dict[str, int]
    host: int

    @property
    def static(self) -> int:
        """What does not depend on the micro-batch."""
        return self.weights + self.gradients + self.optimizer + self.ema + self.buffers

    @property
    def between_micro_batches(self) -> int:
        """What is held when no forward or backward is under way."""
        return self.static - self.buffers + self.lasting_buffers

    @property
    def worst_moment(self) -> str:
        """The moment of the peak: "backward", "reduction" or "update"."""
        return max(self.moments, key=lambda name: self._at(name))

    @property
    def temporary(self) -> int:
        """What lives at the peak beside the static part and the activations."""
        return self.peak - self.static - (self.activations if self.worst_moment == "backward" else 0)

    @property
    def peak(self) -> int:
        """The most bytes held at once."""
        return self.static + self._at(self.worst_moment)

    def _at(self, moment: str) -> int:
        return self.moments[moment] + (self.activations if moment == "backward" else 0)


def estimate(network: Network, plan: Plan) -> Estimate:
    """The memory of a training step on one rank."""
    P, stage = network.num_parameters, plan.zero_stage
    share = P if stage == 0 else -(-P // plan.num_ranks)
    ema = _FP32 * share
    kept, working = _activations(network, plan)
    buffers = _buffers(plan)
    return Estimate(
        weights=_weights(network, plan),
        gradients=_gradients(network, plan, share),
        # At stage 0 the weights themselves are fp32; elsewhere there are masters, even of fp32 weights.
        optimizer=(2 if stage == 0 else 3) * _FP32 * share - _FP32 * _muon_share(network, plan),
        ema=0 if plan.ema_on_host else ema,
        buffers=buffers,
        # Stage 2 allocates its buckets in each backward.
        lasting_buffers=0 if stage == 2 else buffers,
        activations=kept,
        moments={
            "backward": working + _gathered(network, plan) + _conversions(network, plan),
            "reduction": _reduction(network, plan),
            "update": _update(network, plan, share),
        },
        host=ema if plan.ema_on_host else 0,
    )


def _weights(network: Network, plan: Plan) -> int:
    P = network.num_parameters
    if plan.zero_stage == 0:
        return _FP32 * P
    if plan.zero_stage < 3:
        return plan.value_bytes * P
    persistent = sum(numel for numel in network.parameter_numels if numel < plan.persistent_numel)
    return plan.value_bytes * (-(-P // plan.num_ranks) + persistent)


def _gradients(network: Network, plan: Plan, share: int) -> int:
    if plan.zero_stage < 2:
        # Stage 1 sums over micro-batches before ranks, so that every rank holds all gradients.
        return _FP32 * network.num_parameters
    return _FP32 * share if plan.zero_stage == 3 else _gradients_of_partition(network, plan, share)


def _gradients_of_partition(network: Network, plan: Plan, share: int) -> int:
    """A rank's part of the summed gradients at stages 1 and 2."""
    if plan.precision == "bf16":
        return _FP32 * share
    # In fp32 it has room for the whole of each parameter that begins or ends in another rank's part.
    ends = list(itertools.accumulate(network.parameter_numels))
    rooms = [
        sum(
            numel
            for numel, end in zip(network.parameter_numels, ends, strict=True)
            if end > rank * share and end - numel < (rank + 1) * share
        )
        for rank in range(plan.num_ranks)
    ]
    return _FP32 * max(rooms)


def _has_buckets(plan: Plan) -> bool:
    # Stage 1 in bf16 is another optimizer of DeepSpeed's, which reduces its gradients where they lie.
    return plan.zero_stage >= 2 or (plan.zero_stage == 1 and plan.precision == "fp32")


def _buffers(plan: Plan) -> int:
    if not _has_buckets(plan):
        return 0
    count = 2 if plan.overlap and plan.zero_stage < 3 else 1
    # Stage 2 fills its buckets with gradients as they come.
    return count * (plan.value_bytes if plan.zero_stage == 2 else _FP32) * plan.bucket_numel


def _gathered(network: Network, plan: Plan) -> int:
    """Weights that exist for a forward and a backward only."""
    P = network.num_parameters
    if plan.zero_stage == 0:
        # `engine._Bfloat16Forward` rounds all of them.
        return plan.value_bytes * P if plan.precision == "bf16" else 0
    if plan.zero_stage < 3:
        return 0
    # When the backward begins, the last ones are used again within the distance, there and back; and prefetching.
    return plan.value_bytes * min(P, _REUSE_NUMEL // 2 + plan.bucket_numel)


def _conversions(network: Network, plan: Plan) -> int:
    """Copies of gradients that are on their way into their sums while the activations still live."""
    fc1 = 4 * network.width**2
    copies = (plan.value_bytes + _FP32) * fc1
    # At stage 3 a full bucket is flattened and cut for the ranks, at stage 2 in bf16 it is summed in an fp32 copy.
    num_copies = {2: int(plan.precision == "bf16"), 3: 2}.get(plan.zero_stage, 0)
    copies += num_copies * _FP32 * min(plan.bucket_numel, network.num_parameters)
    if plan.zero_stage == 2 or plan.overlap:
        copies += _new_sums(network, plan)
    return copies


def _new_sums(network: Network, plan: Plan) -> int:
    """In fp32 stages 1 and 2 sum over ranks beside the gradients that they already hold."""
    if plan.precision == "bf16" or plan.zero_stage not in (1, 2):
        return 0
    if plan.zero_stage == 2 and plan.accumulation_steps == 1:
        return 0
    return _gradients_of_partition(network, plan, -(-network.num_parameters // plan.num_ranks))


def _reduction(network: Network, plan: Plan) -> int:
    """Beside the static part when the backward ends; the largest parameter, the class table, has its gradient last."""
    P, W, largest = network.num_parameters, plan.num_ranks, max(network.parameter_numels)
    if plan.zero_stage == 0:
        return _FP32 * min(P, _ALLREDUCE_NUMEL + largest)
    gradient = (plan.value_bytes + _FP32) * largest
    if plan.zero_stage == 3:
        return gradient + plan.value_bytes * largest + (_FP32 * largest if largest % W else 0)
    if not _has_buckets(plan):
        return gradient
    return _new_sums(network, plan) + plan.value_bytes * largest + (plan.value_bytes + _FP32) * -(-largest // W)


def _update(network: Network, plan: Plan, share: int) -> int:
    """Beside the static part while the weights are updated."""
    foreach = 0 if plan.on_gpu else _FP32 * share
    flattened = _FP32 * share if plan.zero_stage == 3 else 0
    # The norm of a gradient is taken in fp64.
    norm = 2 * _FP32 * -(-max(network.parameter_numels) // plan.num_ranks) if plan.zero_stage >= 2 else 0
    return max(foreach + flattened, norm)


def _muon_share(network: Network, plan: Plan) -> int:
    """Values on one rank that Muon moves, with one buffer where Adam has two: qkv, proj, fc1 and fc2 of a block."""
    matrices = 12 * network.width**2 * network.depth if plan.optimizer == "muon" else 0
    return matrices if plan.zero_stage == 0 else -(-matrices // plan.num_ranks)


def _activations(network: Network, plan: Plan) -> tuple[int, int]:
    """Bytes that the forward keeps for the backward, and those that the backward adds when it begins."""
    B, M, L, value = plan.micro_batch_size, network.max_sequence, network.num_tokens, plan.value_bytes
    tensor = value * B * M * network.width
    # Mean and reciprocal deviation of two norms of a token and two of each head, and attention's log-sum-exp.
    statistics = _FP32 * B * M * (4 + 5 * network.num_heads)
    # Torch turns the boolean mask into one to be added, again in each block.
    added_mask = value * plan.num_masks * M * M
    num_kept = _KEPT_OF_BLOCK + (_KEPT_BY_COMPILER_FP32 if plan.compiled and plan.precision == "fp32" else 0)
    block = num_kept * tensor + statistics + added_mask
    loss = _KEPT_OF_LOSS * _FP32 * B * L * network.patch_values
    # The trunk's output and its norm, the projected tokens and their places, the boolean mask.
    ends = tensor + value * B * L * network.width + B * (M * network.patch_values * value + 8 * M) + loss
    ends += plan.num_masks * M * M
    working = _WORKING * tensor
    if plan.checkpointing:
        return network.depth * tensor + ends, block - tensor + working
    return network.depth * block + ends, working


def largest_micro_batch(network: Network, plan: Plan, budget: int) -> int | None:
    """The largest micro-batch that divides a rank's share of the global batch and fits; None where none does.

    Args:
        budget: bytes that may be held.
    """
    share = plan.micro_batch_size * plan.accumulation_steps
    sizes = (size for size in range(share, 0, -1) if share % size == 0)
    return next((size for size in sizes if estimate(network, with_micro_batch(plan, size)).peak <= budget), None)


def advise(network: Network, plan: Plan) -> str:
    """What a step needs, and the knobs that would lower it, in a line."""
    found = estimate(network, plan)
    share = plan.micro_batch_size * plan.accumulation_steps
    smaller = next((size for size in range(plan.micro_batch_size - 1, 0, -1) if share % size == 0), None)
    may_recompute = not plan.checkpointing and can_checkpoint(plan.zero_stage, plan.precision)
    knobs = {
        f"train.micro_batch_size={smaller}": smaller is not None,
        "engine.activation_checkpointing=true": may_recompute,
        "engine.ema_on_host=true": plan.on_gpu and not plan.ema_on_host,
        "engine.zero_stage=3": plan.num_ranks > 1 and plan.zero_stage < 3,
        "more GPUs at engine.zero_stage=3": plan.num_ranks == 1 and plan.zero_stage < 3,
        "more GPUs": plan.zero_stage == 3,
    }
    return (
        f"by the estimate this config needs {found.peak / 1e9:.1f} GB on each rank ({found.worst_moment}); "
        f"to lower it: {', '.join(knob for knob, helps in knobs.items() if helps)}"
    )


# ---------------------------------------------------------------------------
# The account of a real step


class TensorAccount(TorchDispatchMode):
    """Bytes of the tensors that live, by their storages; on a CPU, what `torch.cuda.max_memory_allocated` is on a GPU.

    A storage counts from the first operation inside the block that sees it until it is freed. What an operation
    allocates and frees inside itself is not seen.

    Attributes:
        held: bytes now.
        peak: the most since `reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._sizes: dict[int, int] = {}

    def reset_peak(self) -> None:
        """Counts the peak from now on."""
        self.peak = self.held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and notes the storages that it saw or made."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._see(leaf.untyped_storage())
        self.peak = max(self.peak, self.held)
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            weakref.finalize(storage, self._forget, key)
        # A storage can be resized.
        self.held += storage.nbytes() - self._sizes.get(key, 0)
        self._sizes[key] = storage.nbytes()

    def _forget(self, key: int) -> None:
        self.held -= self._sizes.pop(key, 0)


def plan_memory(config: Config, num_ranks: int, on_gpu: bool) -> tuple[Network, Plan]:
    """The sizes of a config's network and the plan of its step, from which `estimate` follows."""
    with torch.device("meta"):
        numels = [parameter.numel() for parameter in make_model(config).parameters()]
    device = torch.device("cuda" if on_gpu else "cpu")
    settings = ds_config(config, num_ranks, device)["zero_optimization"]
    attention = choose_attention(config, device.type)
    return network_of(config, numels), plan_of(config, num_ranks, settings, attention, on_gpu)
