"""A training step as one would first write it: the yardstick of tools/measure.py step.

Over the official tensors, and nothing of ours: a dense float mask, a materialised softmax, eager, torch's plain AdamW.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfpretrain.base.config import Config, OrderConfig
from cfpretrain.base.console import UserError
from cfpretrain.core.ar import ARSettings
from cfpretrain.core.model import initialise
from cfpretrain.core.objective import Draws
from cfpretrain.export.official import to_official
from cfpretrain.run.build import make_model


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


def plain_schedule(config: Config) -> Tensor:
    scale = 1000 / config.noise.num_timesteps
    first, last = scale * config.noise.beta_first, scale * config.noise.beta_last
    return (1 - torch.linspace(first, last, config.noise.num_timesteps, dtype=torch.float64)).cumprod(0)


def plain_weights(order: OrderConfig, steps_BL: Tensor) -> Tensor:
    """Loss weights from where each token's AR step begins."""
    first, last = order.ar_weight_first, order.ar_weight_last
    begin = (steps_BL[:, None, :] < steps_BL[:, :, None]).sum(2) / steps_BL.shape[1]
    if order.ar_weight_schedule == "cosine":
        return (first - last) / 2 * (math.pi * begin).cos() + (first + last) / 2
    return first - (first - last) * begin


class PlainTraining:
    """The plain implementation in training.

    Args:
        config: of a run; the same network, initial weights and optimizer.
        device: where it computes.
        autocast: compute in bf16 where torch's autocast does.
    """

    def __init__(self, config: Config, device: torch.device, autocast: bool) -> None:
        if config.noise.process != "epsilon":
            raise UserError(f"noise.process: the plain implementation predicts epsilon, got {config.noise.process}")
        model = make_model(config)
        initialise(model, config.run.seed)
        tensors = {name: value.to(device) for name, value in to_official(model.state_dict(), model.grid).items()}
        order = config.order
        shared_split = ARSettings(**vars(order)).shares_split
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
        self._config, self._schedule = config, plain_schedule(config).to(device)

    def step(self, micro_batches: Sequence[tuple[Tensor, Draws]]) -> float:
        """One optimizer step on pairs of latents, as the network sees them, and draws; returns the mean loss."""
        self._adam.zero_grad()
        losses = []
        for latents_BCYX, draws in micro_batches:
            tensors = {name: value for name, value in vars(draws).items() if isinstance(value, Tensor)}
            here = replace(draws, **{name: value.to(latents_BCYX.device) for name, value in tensors.items()})
            weights_BL = plain_weights(self._config.order, here.steps_BL)
            loss, _ = self._naive.loss(latents_BCYX, here, self._schedule, weights_BL)
            (loss / len(micro_batches)).backward()
            losses.append(loss.detach())
        if self._config.train.clip_grad_norm > 0:
            nn.utils.clip_grad_norm_(self._trained, self._config.train.clip_grad_norm)
        self._adam.step()
        return statistics.mean(map(float, losses))
