"""Optimizers: which rule moves which parameters.

Another one needs its name in `config.TrainConfig.optimizer`, and here a branch in `make_optimizer` and the names of its
state in `create_state`: checkpoints take what is there.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cfpretrain.base.config import Config
from cfpretrain.core.block import Block
from cfpretrain.core.norm import has_apex


@dataclass(frozen=True)
class Range:
    """A parameter's place on this rank: `numel` values of it, which may be none, lie in `flat` from `begin` on."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    offset: int  # where the range begins in the flattened parameter
    flat: Tensor | None  # that the optimizer updates; None where this rank holds nothing
    begin: int
    numel: int
    replicated: bool  # every rank holds the same range (ZeRO stage 0)

    def of(self, tensor: Tensor) -> Tensor:
        """These values of a tensor that is laid out as `flat`."""
        return tensor.detach().view(-1).narrow(0, self.begin, self.numel)


def make_optimizer(
    module: nn.Module, config: Config, device: torch.device, refuses: Callable[[Tensor], bool]
) -> torch.optim.Optimizer:
    """The optimizer of `train.optimizer` for what trains of a module, whose parameters may be ZeRO's shards already.

    At stage 0, `refuses` says of the norm of the whole gradient whether the update is not to be applied.
    """
    train = config.train
    parts: list[torch.optim.Optimizer] = []
    rest = [p for p in module.parameters() if p.requires_grad]
    if train.optimizer == "muon":
        of_blocks = {id(p) for block in module.modules() if isinstance(block, Block) for p in _linear_weights(block)}
        matrices = {name: p for name, p in module.named_parameters() if id(p) in of_blocks}
        parts.append(Muon(matrices, train.learning_rate, train.muon_momentum, train.weight_decay))
        rest = [p for p in rest if id(p) not in of_blocks]
    parts.append(_make_adamw(rest, _linear_weights(module), config, device))
    if config.engine.zero_stage == 0:
        return Combined(parts, refuses, train.clip_grad_norm)
    return parts[0] if len(parts) == 1 else Combined(parts)


def _linear_weights(module: nn.Module) -> list[nn.Parameter]:
    linears = (part for part in module.modules() if isinstance(part, nn.Linear))
    return [part.get_parameter("weight") for part in linears]


def _make_adamw(
    parameters: list[nn.Parameter], matrices: list[nn.Parameter], config: Config, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW; weights of linear layers decay, norms, biases and embeddings (of classes and positions) do not."""
    train = config.train
    decaying = set(map(id, matrices)) if train.weight_decay > 0 else set()
    groups = []
    for decays in (True, False):
        of_group = [p for p in parameters if (id(p) in decaying) == decays]
        if of_group:
            groups.append({"params": of_group, "weight_decay": train.weight_decay * decays})
    options: dict[str, Any] = {
        "lr": train.learning_rate,
        "betas": (train.adam_beta1, train.adam_beta2),
        "eps": train.adam_eps,
    }
    on_gpu = device.type == "cuda"
    fused_adam = _apex_fused_adam() if on_gpu and config.engine.zero_stage > 0 else None
    if fused_adam is not None:
        return _with_step_in_state(fused_adam(groups, adam_w_mode=True, **options))
    # Fused is the fastest, but on the CPU its last bit depends on where a range begins: resuming at another stage would
    # not go on with the same numbers.
    return torch.optim.AdamW(groups, fused=on_gpu, foreach=not on_gpu, **options)


def create_state(optimizer: torch.optim.Optimizer, flats: Iterable[tuple[Tensor, Mapping[str, Any]]]) -> None:
    """The state that it would create at its first step, all 0, so that it can be restored before one.

    `flats` are the tensors that it updates, each with its group of parameters.
    """
    for flat, group in flats:
        is_muon = "momentum" in group
        names = ("momentum_buffer",) if is_muon else ("exp_avg", "exp_avg_sq")
        optimizer.state[flat] = {name: torch.zeros_like(flat, requires_grad=False) for name in names}
        if not is_muon:
            optimizer.state[flat]["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)


def name_of(optimizer: torch.optim.Optimizer) -> str:
    """For people to read."""
    if isinstance(optimizer, Combined):
        return " and ".join(map(name_of, optimizer.parts))
    package = "torch" if isinstance(optimizer, Muon) else type(optimizer).__module__.split(".")[0]
    fused = "fused " if optimizer.defaults.get("fused") else ""
    return f"{fused}{type(optimizer).__name__} of {package}"


# ---------------------------------------------------------------------------------------------------------------------
# Muon


class Muon(torch.optim.Optimizer):
    """Torch's Muon (arXiv 2502.16982 scales it to AdamW's learning rates), also where ZeRO cuts matrices into ranges.

    Momentum is a matter of single values and stays in the ranges. Of each matrix in turn the ranks add their ranges up
    to the whole, which every rank orthogonalises; so all stages make the same update, and hold one matrix more.
    (DeepSpeed's own Muon clips, and gates, by the norm of the orthogonalised update, and keeps its momentum elsewhere.)
    """

    def __init__(
        self, matrices: Mapping[str, nn.Parameter], learning_rate: float, momentum: float, weight_decay: float
    ) -> None:
        options = {"lr": learning_rate, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(list(matrices.values()), options)
        self._names = list(matrices)
        self._places: list[Range] = []

    def place(self, ranges: Mapping[str, Range]) -> None:
        """Tells it where its matrices lie, before the first step; ranks know the same names in the same order."""
        self._places = [ranges[name] for name in self._names]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None, "a closure is not supported"
        (group,) = self.param_groups
        flats = {id(flat) for flat in group["params"] if flat.grad is not None}
        # At stage 3 DeepSpeed makes its step in several, each with one tensor as the whole group.
        for place in self._places if flats else ():
            if place.flat is None or id(place.flat) in flats:
                self._move(place, group, group["params"][0].device)

    def _move(self, place: Range, group: Mapping[str, Any], device: torch.device) -> None:
        whole = torch.zeros(place.shape, device=device)
        end = place.offset + place.numel
        if place.flat is not None and place.flat.grad is not None:
            gradient = place.of(place.flat.grad.contiguous())
            momentum = place.of(self.state[place.flat]["momentum_buffer"])
            momentum.lerp_(gradient, 1 - group["momentum"])
            whole.view(-1)[place.offset : end] = gradient.lerp(momentum, group["momentum"])  # Nesterov's
        if not place.replicated:
            torch.distributed.all_reduce(whole)
        if place.flat is not None:
            update = _orthogonal_update(whole, group["lr"]).view(-1)[place.offset : end]
            place.of(place.flat).mul_(1 - group["lr"] * group["weight_decay"]).add_(update)


def _orthogonal_update(gradient: Tensor, learning_rate: float) -> Tensor:
    """What torch's Muon adds to a matrix of this gradient, momentum included."""
    matrix = nn.Parameter(torch.zeros_like(gradient))
    matrix.grad = gradient
    alone = torch.optim.Muon(
        [matrix], learning_rate, weight_decay=0.0, momentum=0.0, nesterov=False, adjust_lr_fn="match_rms_adamw"
    )
    alone.step()
    return matrix.detach()


# ---------------------------------------------------------------------------------------------------------------------
# What DeepSpeed needs


class Combined(torch.optim.Optimizer):
    """Several optimizers, each with parameters of its own, as one.

    At stage 0 it also clips, and asks before it applies, as the optimizers of ZeRO do: DeepSpeed leaves both out there,
    but takes `overflow` from an optimizer that has it.
    """

    def __init__(
        self,
        parts: Sequence[torch.optim.Optimizer],
        refuses: Callable[[Tensor], bool] | None = None,
        clip_grad_norm: float = 0.0,
    ) -> None:
        # The groups are the parts' own, so that a change of a learning rate or of parameters reaches them.
        super().__init__([group for part in parts for group in part.param_groups], {})
        for part in parts:
            part.state = self.state
        self.parts = list(parts)
        self._refuses, self._clip_grad_norm = refuses, clip_grad_norm
        self.overflow = False

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None, "a closure is not supported"
        if self._refuses is not None:
            parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            # The gradients are summed over the ranks already, so all ranks see one norm and decide alike.
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
            self.overflow = self._refuses(norm)
            if self.overflow:
                return
            if self._clip_grad_norm > 0:
                torch.nn.utils.clip_grads_with_norm_(parameters, self._clip_grad_norm, norm)
        for part in self.parts:
            part.step()


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
            if group["params"]:  # none at stage 3, while another group's turn is
                group["step"] = int(optimizer.state[group["params"][0]]["step"])

    def count_out(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:  # else it is another group's turn, and apex counts it all the same
                    optimizer.state[parameter]["step"].fill_(group["step"])

    optimizer.register_step_pre_hook(count_in)
    optimizer.register_step_post_hook(count_out)
    return optimizer
