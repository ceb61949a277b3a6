"""Memory of a training step on one rank, estimated from sizes alone.

The estimate follows what DeepSpeed 0.19.8 allocates under `zero.ds_config`, and what autograd keeps of our blocks;
`tests/test_memory.py` holds it against real steps.
"""

import functools
import itertools
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from cfpretrain.base.config import Config, ModelConfig, can_checkpoint
from cfpretrain.base.console import UserError
from cfpretrain.core.ar import ARSettings
from cfpretrain.core.attention import BACKENDS
from cfpretrain.core.design import BlockDesign
from cfpretrain.core.model import is_frozen
from cfpretrain.run.build import choose_attention, parameter_shapes
from cfpretrain.run.sequences import has_texts, longest
from cfpretrain.training.encoding_cost import NO_ENCODING, EncodingCost, encoding_cost
from cfpretrain.training.zero import ds_config

_FP32 = 4

# Float tensors of the size of the noised tokens in the loss: latents, noise, noised, prediction, differences, ...
_KEPT_OF_LOSS = 10

# DeepSpeed's own numbers, which `ds_config` leaves as they are.
_ALLREDUCE_NUMEL = 500_000_000  # stage 0 copies gradients of up to so many elements for one all-reduce
_REUSE_NUMEL = 1_000_000_000  # stage 3 keeps parameters gathered that are used again within so many elements


@dataclass(frozen=True)
class Estimate:
    """Bytes on one rank."""

    weights: int  # held all the time, in low precision where there is another copy
    # As held between two micro-batches. (Where a step has one micro-batch only, stages 0 and 2 hold none when its
    # backward begins; they are counted all the same.)
    gradients: int
    optimizer: int  # fp32 masters and the optimizer's state
    ema: int  # on the GPU
    autoencoder: int  # that encodes images during training, at any moment of the step; 0 where latents are read
    buffers: int  # of communication
    lasting_buffers: int  # of them, those that also live between two micro-batches
    activations: int  # kept from the forward for the backward, at the longest sequence
    # What else lives at the three moments that can be the worst: "backward", when it begins (beside the activations),
    # "reduction", when it ends and the last gradients are reduced, and "update", of the weights.
    moments: dict[str, int]
    host: int  # in host memory

    @property
    def static(self) -> int:
        """What does not depend on the micro-batch."""
        return self.weights + self.gradients + self.optimizer + self.ema + self.autoencoder + self.buffers

    @property
    def between_micro_batches(self) -> int:
        """What is held when no forward or backward is under way."""
        return self.static - self.buffers + self.lasting_buffers

    @property
    def worst_moment(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=self._at)

    @property
    def temporary(self) -> int:
        """What lives at the peak beside the static part and the activations."""
        return self.moments[self.worst_moment]

    @property
    def peak(self) -> int:
        """The most bytes held at once."""
        return self.static + self._at(self.worst_moment)

    def _at(self, moment: str) -> int:
        return self.moments[moment] + (self.activations if moment == "backward" else 0)


def estimate(config: Config, num_ranks: int, on_gpu: bool, encoding: EncodingCost = NO_ENCODING) -> Estimate:
    """The memory of a config's training step on one of `num_ranks` ranks, for which it is checked.

    `encoding` is what `encoding_cost` finds where training reads image shards.
    """
    return _Step(config, num_ranks, on_gpu, encoding).estimate()


def kept_of_block(design: BlockDesign, value: int, on_gpu: bool, is_compiled: bool = False) -> int:
    """Bytes that autograd keeps of a block for each token, in activations of `value` bytes.

    Of the paper's block, in units of D values: the input, its norm, qkv (3), normed q and k (2), attention's output and
    its rearrangement (2), the sum after attention, its norm, and before and after GELU (8); and statistics.
    """
    H, of_keys = design.num_heads, design.num_kv_heads * design.head_width
    of_queries, normed = design.attended_width, 0
    if design.qk_norm:
        normed = of_queries + of_keys
    # RMSNorm without a kernel of its own keeps its input and the normalised values, both in fp32.
    is_plain_rms = design.norm == "rms" and not on_gpu
    copied, normalised = is_plain_rms * (value < _FP32), is_plain_rms * _FP32
    kept = 2 * design.width * ((_FP32 if copied else value) + normalised + value)
    kept += normed * (normalised + copied * _FP32)
    # q is a view of qkv unless something is computed from it, v unless it is repeated; a norm's input is one too.
    is_changed, is_repeated = design.qk_norm or design.rotary_base > 0, of_keys < of_queries
    if not is_changed or not is_repeated or (design.qk_norm and not copied):
        kept += value * design.qkv_width
    kept += value * of_queries * (is_changed + (is_changed or is_repeated) + is_repeated)
    is_separate, has_rotary = design.separate_image_weights, design.rotary_base > 0
    if is_separate and design.qk_norm and not copied and not (has_rotary and is_repeated):
        # What both sets of weights made, together, of which q, k or v are views.
        kept += value * (design.qkv_width - (not has_rotary) * of_queries * (2 - is_repeated))
    kept += value * (
        of_queries * (1 + (is_changed or is_separate)) + design.mlp_width * (4 if design.mlp == "swiglu" else 2)
    )
    if is_compiled and value == _FP32:
        # Otherwise as much: inductor computes no input of a matrix product a second time. In fp32 it also keeps q and k
        # before their norms apart from qkv.
        kept += value * normed
    # Mean and reciprocal deviation of two norms of a token and two of each head, and attention's log-sum-exp.
    of_norm = 1 if design.norm == "rms" else 2
    return kept + _FP32 * (of_norm * (2 + normed // design.head_width) + H)


@functools.cache
def parameter_numels(model: ModelConfig, frozen: tuple[str, ...] = ()) -> tuple[int, ...]:
    """Elements of each parameter, without those that `train.freeze` keeps as they are."""
    shapes = parameter_shapes(Config(model=model))
    return tuple(math.prod(shape) for name, shape in shapes.items() if not is_frozen(name, frozen))


def num_dense_masks(config: Config, num_ranks: int, on_gpu: bool) -> int:
    """Masks of all pairs that attention takes in a micro-batch."""
    if not BACKENDS[choose_attention(config, "cuda" if on_gpu else "cpu")].has_dense_mask:
        return 0
    shares_mask = ARSettings(**vars(config.order)).shares_split and not has_texts(config)
    return 1 if shares_mask else config.micro_batch_size(num_ranks)


class _Step:
    """The formulas, over the sizes that they share: numbers of elements, and bytes where no other unit is named."""

    def __init__(self, config: Config, num_ranks: int, on_gpu: bool, encoding: EncodingCost) -> None:
        self.config, self.num_ranks, self.on_gpu, self.encoding = config, num_ranks, on_gpu, encoding
        self.stage, self.is_bf16 = config.engine.zero_stage, config.engine.precision == "bf16"
        self.value = 2 if self.is_bf16 else _FP32  # of a weight in a forward, and of an activation
        self.all_numels = parameter_numels(config.model)
        self.numels = parameter_numels(config.model, config.train.freeze)  # of those that are trained, as what follows
        self.P, self.largest = sum(self.numels), max(self.numels)
        self.share = self.P if self.stage == 0 else -(-self.P // num_ranks)
        zero = ds_config(config, num_ranks, torch.device("cuda" if on_gpu else "cpu"))["zero_optimization"]
        self.bucket, self.overlaps = zero["reduce_bucket_size"], zero["overlap_comm"]
        self.persistent_numel = zero["stage3_param_persistence_threshold"]
        # Stage 1 in bf16 is another optimizer of DeepSpeed's, which reduces its gradients where they lie.
        self.has_buckets = self.stage >= 2 or (self.stage == 1 and not self.is_bf16)

    def estimate(self) -> Estimate:
        ema, on_host = _FP32 * self.share, self.config.engine.ema_on_host
        activations, working, of_logits = self._activations()
        buffers = self._buffers()
        return Estimate(
            weights=self._weights(),
            gradients=self._gradients(),
            # At stage 0 the weights themselves are fp32; elsewhere there are masters, even of fp32 weights.
            optimizer=(2 if self.stage == 0 else 3) * _FP32 * self.share - _FP32 * self._muon_share(),
            ema=0 if on_host else ema,
            autoencoder=self.encoding.num_bytes,
            buffers=buffers,
            # Stage 2 allocates its buckets in each backward.
            lasting_buffers=0 if self.stage == 2 else buffers,
            activations=activations,
            moments={
                "backward": self._gathered() + max(working + self._conversions(), of_logits),
                "reduction": self._reduction(),
                "update": self._update(),
            },
            host=ema if on_host else 0,
        )

    def _weights(self) -> int:
        P, num_ranks = sum(self.all_numels), self.num_ranks
        if self.stage == 0:
            return _FP32 * P
        copies = _FP32 * -(-(P - self.P) // num_ranks) if self.is_bf16 else 0  # in fp32, of frozen ones
        if self.stage < 3:
            return self.value * P + copies
        persistent = sum(numel for numel in self.all_numels if numel < self.persistent_numel)
        return self.value * (-(-P // num_ranks) + persistent) + copies

    def _gradients(self) -> int:
        if self.stage < 2:
            # Stage 1 sums over micro-batches before ranks, so that every rank holds all gradients.
            return _FP32 * self.P
        return _FP32 * self.share if self.stage == 3 else self._gradients_of_partition()

    def _gradients_of_partition(self) -> int:
        """A rank's part of the summed gradients at stages 1 and 2."""
        if self.is_bf16:
            return _FP32 * self.share
        # In fp32 it has room for the whole of each parameter that begins or ends in another rank's part.
        ends = list(itertools.accumulate(self.numels))
        rooms = [
            sum(
                numel
                for numel, end in zip(self.numels, ends, strict=True)
                if end > rank * self.share and end - numel < (rank + 1) * self.share
            )
            for rank in range(self.num_ranks)
        ]
        return _FP32 * max(rooms)

    def _buffers(self) -> int:
        if not self.has_buckets:
            return 0
        count = 2 if self.overlaps and self.stage < 3 else 1
        # Stage 2 fills its buckets with gradients as they come.
        return count * (self.value if self.stage == 2 else _FP32) * self.bucket

    def _gathered(self) -> int:
        """Weights that exist for a forward and a backward only."""
        if self.stage == 0:
            # `engine._Bfloat16Forward` rounds all of them.
            return self.value * sum(self.all_numels) if self.is_bf16 else 0
        if self.stage < 3:
            return 0
        # When the backward begins, the last ones are used again within the distance, there and back; and prefetching.
        return self.value * min(sum(self.all_numels), _REUSE_NUMEL // 2 + self.bucket)

    def _conversions(self) -> int:
        """Copies of gradients that are on their way into their sums while the activations still live."""
        model = self.config.model
        matrix = max(model.design.largest_matrix, model.vocabulary * model.width)
        # At stage 3 a full bucket is flattened and cut for the ranks, at stage 2 in bf16 it is summed in an fp32 copy.
        num_copies = {2: int(self.is_bf16), 3: 2}.get(self.stage, 0)
        copies = (self.value + _FP32) * matrix + num_copies * _FP32 * min(self.bucket, self.P)
        return copies + (self._new_sums() if self.stage == 2 or self.overlaps else 0)

    def _new_sums(self) -> int:
        """In fp32 stages 1 and 2 sum over ranks beside the gradients that they already hold."""
        if self.is_bf16 or self.stage not in (1, 2):
            return 0
        if self.stage == 2 and self.config.accumulation_steps(self.num_ranks) == 1:
            return 0
        return self._gradients_of_partition()

    def _reduction(self) -> int:
        """Beside the static part when the backward ends; the largest parameter, the class table, comes last."""
        if self.stage == 0:
            return _FP32 * min(self.P, _ALLREDUCE_NUMEL + self.largest)
        gradient = (self.value + _FP32) * self.largest
        if self.stage == 3:
            padded = _FP32 * self.largest if self.largest % self.num_ranks else 0
            return gradient + self.value * self.largest + padded
        if not self.has_buckets:
            return gradient
        cut = (self.value + _FP32) * -(-self.largest // self.num_ranks)
        return self._new_sums() + self.value * self.largest + cut

    def _update(self) -> int:
        """Beside the static part while the weights are updated."""
        # A GPU makes one fused update; torch's foreach update makes a copy.
        foreach = 0 if self.on_gpu else _FP32 * self.share
        flattened = _FP32 * self.share if self.stage == 3 else 0
        # The norm of a gradient is taken in fp64.
        norm = 2 * _FP32 * -(-self.largest // self.num_ranks) if self.stage >= 2 else 0
        return max(foreach + flattened, norm)

    def _muon_share(self) -> int:
        """Values on one rank that Muon moves, with one buffer where Adam has two: qkv, proj, fc1 and fc2 of a block."""
        if self.config.train.optimizer != "muon":
            return 0
        design, freeze = self.config.model.design, self.config.train.freeze
        num_sets = 1 + design.separate_image_weights - ("trunk" in freeze)
        matrices = num_sets * design.matrix_values * self.config.model.depth
        return matrices if self.stage == 0 else -(-matrices // self.num_ranks)

    def _activations(self) -> tuple[int, int, int]:
        """Bytes that the forward keeps for the backward, those that its blocks then add, and before that the logits."""
        model, engine = self.config.model, self.config.engine
        B, lengths = self.config.micro_batch_size(self.num_ranks), longest(self.config)
        M, N = lengths.computed, lengths.noised
        num_masks = num_dense_masks(self.config, self.num_ranks, self.on_gpu)
        tensor = self.value * B * M * model.width
        # Torch turns the boolean mask into one to be added, again in each block.
        added_mask = self.value * num_masks * M * M
        design = model.design
        block = B * M * kept_of_block(design, self.value, self.on_gpu, engine.compile_blocks) + added_mask
        loss = _KEPT_OF_LOSS * _FP32 * B * N * model.patch_values
        # The trunk's output, where it was given, and its norm, the projected tokens and their places, the boolean mask.
        output = self.value * B * max(M, lengths.given) * model.width
        ends = output + self.value * B * N * model.width + B * (M * model.patch_values * self.value + 8 * M) + loss
        ends += num_masks * M * M
        # Of the text head: the norm of its tokens, and the logarithms of their probabilities.
        logits = _FP32 * B * lengths.learned_text * model.vocabulary
        ends += self.value * B * lengths.learned_text * model.width + logits
        # Gradients alive at once when a block's backward begins: its output's, and GELU's output's or input's. Of
        # silu(g) * u, those of both factors.
        num_factors = 2 if design.mlp == "swiglu" else 1
        working = self.value * B * M * (model.width + num_factors * design.mlp_width)
        of_blocks = model.depth * block
        if engine.activation_checkpointing:
            of_blocks, working = model.depth * tensor, working + block - tensor
        # Logits go before the blocks' backward; at first their gradients and those of the logarithms are there.
        return of_blocks + ends, working - logits, 2 * logits


# ---------------------------------------------------------------------------
# Other knobs


def with_knobs(config: Config, knobs: Mapping[str, Any]) -> Config:
    """The config with other values of some keys, such as "train.micro_batch_size"; it is not checked."""
    for key, value in knobs.items():
        section, _, name = key.partition(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def micro_batch_sizes(config: Config, num_ranks: int) -> list[int]:
    """Those that divide a rank's share of the global batch, the largest first."""
    share = config.train.global_batch_size // num_ranks
    return [size for size in range(share, 0, -1) if share % size == 0]


def largest_micro_batch(
    config: Config, num_ranks: int, on_gpu: bool, budget: int, encoding: EncodingCost = NO_ENCODING
) -> int | None:
    """The largest micro-batch that fits into `budget` bytes together with what encodes images; None where none does."""
    for size in micro_batch_sizes(config, num_ranks):
        if estimate(with_knobs(config, {"train.micro_batch_size": size}), num_ranks, on_gpu, encoding).peak <= budget:
            return size
    return None


def advise(config: Config, num_ranks: int, on_gpu: bool, kind: str = "latents") -> str:
    """What a step needs that reads shards of this kind, and the knobs that would lower it, in a line."""
    encodes, encoding = kind == "images", NO_ENCODING
    if encodes:
        with suppress(UserError):  # the autoencoder's folder is gone since: the advice must not hide why memory ran out
            encoding = encoding_cost(config, on_gpu)
    found = estimate(config, num_ranks, on_gpu, encoding)
    engine, now, at_once = config.engine, config.micro_batch_size(num_ranks), config.data.encode_batch_size
    smaller = next((size for size in micro_batch_sizes(config, num_ranks) if size < now), None)
    may_recompute = not engine.activation_checkpointing and can_checkpoint(engine.zero_stage, engine.precision)
    knobs = {
        f"train.micro_batch_size={smaller}": smaller is not None,
        f"data.encode_batch_size={at_once // 2}": encodes and at_once > 1,
        "engine.activation_checkpointing=true": may_recompute,
        "engine.ema_on_host=true": on_gpu and not engine.ema_on_host,
        "engine.zero_stage=3": num_ranks > 1 and engine.zero_stage < 3,
        "more GPUs at engine.zero_stage=3": num_ranks == 1 and engine.zero_stage < 3,
        "more GPUs": engine.zero_stage == 3,
    }
    return (
        f"by the estimate this config needs {found.peak / 1e9:.1f} GB on each rank ({found.worst_moment}"
        f"{f', with {found.autoencoder / 1e9:.1f} GB to encode images' if encodes else ''}); "
        f"to lower it: {', '.join(knob for knob, helps in knobs.items() if helps)}"
    )
