"""One engine for ZeRO stages 0 to 3, and its fp32 weights and optimizer state as fragments.

Fragments reach into DeepSpeed's internals (read in 0.19.8). Nothing outside this module and `zero.py` may; EMA,
checkpoints and exports use `Engine.fragments`, `Engine.refresh` and `Engine.optimizer_step` alone.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfpretrain.base.config import Config
from cfpretrain.core.block import Block
from cfpretrain.core.model import WriteInitialValues, is_frozen
from cfpretrain.run.tensor_files import Fragment
from cfpretrain.training import optim, zero
from cfpretrain.training.optim import Range
from cfpretrain.training.zero import Decide


def build_engine(make_module: Callable[[], nn.Module], config: Config, device: torch.device) -> "Engine":
    """Builds the module, its optimizer and DeepSpeed's engine around them. Every rank calls it.

    The weights are whatever `make_module` drew; `Engine.initialise` or a checkpoint gives them their values.

    Args:
        make_module: constructs the module; at stage 3 each submodule is cut into shards as soon as it is constructed,
            so that no rank ever holds the whole model, and the module's dtype is already that of `engine.precision`.
            Every parameter must require a gradient; those of `train.freeze` no longer do then.
        config: checked.
        device: of this rank; torch.distributed is initialised for it.
    """
    assert torch.distributed.is_initialized(), "the process group is started before the engine"
    deepspeed = zero.load_deepspeed(device)
    settings = zero.ds_config(config, torch.distributed.get_world_size(), device)
    module = _construct(deepspeed, make_module, config, settings, device)
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    if frozen:
        raise RuntimeError(f"frozen tensors must be buffers: {frozen}")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not is_frozen(name, config.train.freeze))
    has_blocks = any(isinstance(part, Block) for part in module.modules())
    if has_blocks and config.engine.zero_stage == 3 and (config.engine.compile_blocks or device.type == "cpu"):
        # A block's parameters are gathered at once. Else ZeRO's hooks would gather those of each linear layer inside
        # the compiled graphs, which break there, and are recompiled again and again. On a CPU the hooks themselves
        # take time that a small model feels.
        deepspeed.utils.set_z3_leaf_modules(module, [Block])
    called = module
    if config.engine.zero_stage == 0 and config.engine.precision == "bf16":
        called = _Bfloat16Forward(module)
    deepspeed_engine, *_ = deepspeed.initialize(
        model=called,
        optimizer=optim.make_optimizer(module, config, device, zero.gate.refuses),
        model_parameters=[parameter for parameter in module.parameters() if parameter.requires_grad],
        config=settings,
        dist_init_required=False,
    )
    return Engine(deepspeed_engine, called, dict(module.named_parameters()), config.engine.zero_stage)


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
        optimizer = deepspeed_engine.basic_optimizer
        optim.create_state(optimizer, self._flats())
        # An optimizer that counts no steps (SGD) needs none to go on.
        counts = [state["step"] for state in optimizer.state.values() if "step" in state]
        self._step_counts = counts or [torch.zeros(())]
        moving, self._frozen = (
            {k: p for k, p in parameters.items() if p.requires_grad is moves} for moves in (True, False)
        )
        ranges = {place.name: place for place in self._ranges(moving)}
        for part in getattr(optimizer, "parts", ()):
            if isinstance(part, optim.Muon):
                part.place(ranges)
        made = {
            place.name: _make_fragment(place, place.flat, optimizer.state[place.flat])
            for place in ranges.values()
            if place.flat is not None
        }
        made |= {name: _make_frozen(name, parameter, zero_stage) for name, parameter in self._frozen.items()}
        self._fragments = [made[name] for name in parameters if name in made]
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module's forward; training forwards must come through here, others may call `module`."""
        return self._deepspeed(*args, **kwargs)

    @property
    def optimizer_name(self) -> str:
        """What moves the weights, for people to read."""
        return optim.name_of(self._deepspeed.basic_optimizer)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches, hence backwards, of one step."""
        return int(self._deepspeed.gradient_accumulation_steps())

    def backward(self, loss: Tensor) -> None:
        """Adds one micro-batch's gradients, of the latest `engine(...)`, divided by the number of micro-batches."""
        if self._num_backwards >= self.accumulation_steps:
            raise RuntimeError("a step has as many backwards as micro-batches")
        self._deepspeed.backward(loss)
        self._num_backwards += 1
        if self._num_backwards < self.accumulation_steps:
            # Updates nothing: DeepSpeed counts micro-batches by calls of its step.
            self._deepspeed.step()

    def step(self, learning_rate: float, decide: Decide = lambda norm: math.isfinite(float(norm))) -> bool:
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
        with zero.gate.asking(decide):
            self._deepspeed.step()
            applied = bool(self._deepspeed.was_step_applied())
            if not zero.gate.was_asked:
                raise RuntimeError("DeepSpeed made a step without asking")
        self._num_backwards = 0
        if self._zero_stage == 3:
            # DeepSpeed writes over the gradients that the next backward computes, and would apply the others again:
            # those of parameters that the next step does not use.
            self._deepspeed.optimizer.grad_partitions_flat_buffer.zero_()
        return applied

    @property
    def optimizer_step(self) -> int:
        """Updates that Adam has made, on which its bias correction depends; 0 where no optimizer counts them."""
        return int(self._step_counts[0])

    @optimizer_step.setter
    def optimizer_step(self, num_steps: int) -> None:
        for count in self._step_counts:
            count.fill_(num_steps)

    def fragments(self) -> list[Fragment]:
        """What this rank holds, in the order of the module's parameters; valid for the life of the engine.

        Parameters of which this rank holds nothing are left out, and padding is never part of a fragment.
        """
        return self._fragments

    @torch.no_grad()
    def initialise(self, write_initial_values: WriteInitialValues) -> None:
        """Gives every weight its initial value, whatever the stage and the number of ranks."""
        for fragment in self._fragments:
            write_initial_values(fragment.name, fragment.shape, fragment.offset, fragment.values)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Recomputes the weights that forward uses from the fragments' values; all ranks together."""
        optimizer = self._deepspeed.optimizer
        if self._zero_stage == 0:
            return
        for fragment in self._fragments:
            if fragment.is_frozen:
                _refresh_frozen(self._frozen[fragment.name], fragment.values, self._zero_stage)
        if self._zero_stage < 3:
            optimizer.update_lp_params()
            return
        # Small parameters stay gathered on every rank: released, they are gathered again by the next forward.
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)

    def _flats(self) -> list[tuple[Tensor, Mapping[str, Any]]]:
        """The tensors that the optimizer updates on this rank, each with its group."""
        groups = self._deepspeed.basic_optimizer.param_groups
        if self._zero_stage == 3:
            optimizer = self._deepspeed.optimizer
            flats = optimizer.fp32_partitioned_groups_flat
            return [(flat, groups[optimizer.sub_group_to_group_id[i]]) for i, flat in enumerate(flats)]
        return [(flat, group) for group in groups for flat in group["params"]]

    def _ranges(self, parameters: dict[str, nn.Parameter]) -> Iterator[Range]:
        """One for each parameter, also where this rank holds nothing of it."""
        if self._zero_stage == 0:
            return (Range(name, tuple(p.shape), 0, p, 0, p.numel(), True) for name, p in parameters.items())
        if self._zero_stage < 3:
            return _ranges_of_stages_1_and_2(parameters, [flat for flat, _ in self._flats()])
        return _ranges_of_stage_3(parameters, self._deepspeed.optimizer)


def _make_fragment(place: Range, flat: Tensor, states: Mapping[str, Tensor]) -> Fragment:
    state = {name: place.of(value) for name, value in states.items() if value.shape == flat.shape}
    return Fragment(place.name, place.shape, place.offset, place.of(flat), state, place.replicated)


# ---------------------------------------------------------------------------
# Frozen parameters, of which DeepSpeed's optimizers know nothing


def _make_frozen(name: str, parameter: nn.Parameter, zero_stage: int) -> Fragment:
    """This rank's equal part of a frozen parameter; in bf16 an fp32 copy of it, which no step needs."""
    if zero_stage == 0:
        return Fragment(name, tuple(parameter.shape), 0, parameter.detach().view(-1), {}, True, is_frozen=True)
    numel = parameter.ds_numel if zero_stage == 3 else parameter.numel()  # type: ignore[attr-defined]
    shape = parameter.ds_shape if zero_stage == 3 else parameter.shape  # type: ignore[attr-defined]
    size = -(-numel // torch.distributed.get_world_size())
    begin = min(torch.distributed.get_rank() * size, numel)
    part = parameter.detach().view(-1)[begin : begin + size] if zero_stage < 3 else parameter.ds_tensor.view(-1)  # type: ignore[attr-defined]
    return Fragment(name, tuple(shape), begin, part[: min(size, numel - begin)].float(), {}, False, is_frozen=True)


def _refresh_frozen(parameter: nn.Parameter, values: Tensor, zero_stage: int) -> None:
    """Gives a frozen parameter the values of all ranks' parts."""
    if zero_stage == 3:
        parameter.ds_tensor.view(-1)[: len(values)].copy_(values)  # type: ignore[attr-defined]
        return
    num_ranks = torch.distributed.get_world_size()
    size = -(-parameter.numel() // num_ranks)
    whole = values.new_empty(num_ranks * size)
    torch.distributed.all_gather_into_tensor(whole, F.pad(values, (0, size - len(values))))
    parameter.view(-1).copy_(whole[: parameter.numel()])


def _ranges_of_stages_1_and_2(parameters: dict[str, nn.Parameter], flats: list[Tensor]) -> Iterator[Range]:
    """One flat tensor holds all parameters of a group one after another, and each rank an equal part of it."""
    for name, parameter in parameters.items():
        mapping, shape = parameter._hp_mapping, tuple(parameter.shape)  # type: ignore[attr-defined]
        if mapping is None:
            yield Range(name, shape, 0, None, 0, 0, False)
            continue
        place, flat = mapping.get_hp_fragment_address(), flats[mapping.param_group_index]
        yield Range(name, shape, mapping.lp_fragment_address.start, flat, place.start, place.numel, False)


def _ranges_of_stage_3(parameters: dict[str, nn.Parameter], optimizer: Any) -> Iterator[Range]:
    """Each parameter is cut into equal parts, one a rank, and a rank's parts lie one after another."""
    places = {}
    for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        begin = 0
        for parameter in group:
            size = parameter.partition_numel()
            # The last ranks' parts may be padded, or be nothing else.
            offset = min(torch.distributed.get_rank() * size, parameter.ds_numel)
            places[parameter] = (offset, flat, begin, min(size, parameter.ds_numel - offset))
            begin += size
    for name, parameter in parameters.items():
        yield Range(name, tuple(parameter.ds_shape), *places[parameter], False)  # type: ignore[attr-defined]
