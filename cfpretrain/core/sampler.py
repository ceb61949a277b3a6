"""Generation: AR steps outside, diffusion inside, with a cache of the clean context and classifier-free guidance.

    for s = 1..S:  x_{T,kappa_s} ~ N(0, I);  for t = T..1:  x_{t-1,kappa_s} ~ p(. | x_{t,kappa_s}, x_{0,kappa_1..s-1})

One AR step is a plain diffusion transformer; as many AR steps as tokens is pure autoregression. Tokens that are given
beforehand are clean context like those of earlier AR steps, at any places: that is in-context editing, and needs no
training of its own (section 6 of arXiv 2412.12095).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cfpretrain.core import seeds
from cfpretrain.core.ar import draw_orders
from cfpretrain.core.context import Context, Predictor
from cfpretrain.core.modalities import IMAGE, class_segment
from cfpretrain.core.segments import Segment
from cfpretrain.core.solvers import Solver


class Model(Predictor, Protocol):
    """What the sampler needs of a CausalFusion model."""

    num_cond_tokens: int
    null_class: int
    patch_values: int


# draw(k, positions_BN) -> float32 [B, N, P]: k = 0 is where denoising starts, k = 1, 2, ... the noise after the k-th
# denoising step.
NoiseDraw = Callable[[int, Tensor], Tensor]
# watch(s, n, positions_BN, tokens_BNP): in AR step s, counted from 0, n denoising steps are left; at n = 0 tokens are
# clean. Called on every rank alike, before each denoising step and after the last.
Watch = Callable[[int, int, Tensor, Tensor], None]


def noise_by_image(seed: int, image_ids_B: Tensor, patch_values: int) -> NoiseDraw:
    """Noise as a function of (seed, image, denoising step, token), whichever rank or batch the image is in."""
    keys_B = seeds.fold(seeds.key(seed, "sampling noise"), image_ids_B)

    def draw(denoising_step: int, positions_BN: Tensor) -> Tensor:
        keys_BN = seeds.fold(seeds.fold(keys_B, denoising_step)[:, None], positions_BN)
        return seeds.normal(keys_BN, (patch_values,))

    return draw


def sampling_orders(
    seed: int, image_ids_B: Tensor, num_tokens: int, token_order: str = "random", block_size: int = 1
) -> Tensor:
    """The order in which each image's tokens are made, int64 [B, L]; a random one depends on seed and id alone."""
    return draw_orders(seeds.fold(seeds.key(seed, "sampling order"), image_ids_B), num_tokens, token_order, block_size)


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance, f(x_t, null class) + scale (f(x_t, class) - f(x_t, null class)), on all channels.

    It means the same for every process: at one x_t, each one's prediction is an affine function of another's.
    """

    scale: float = 1.0  # 1 leaves the branch without a class out
    # "linear": from 1 to `scale` with the share of the tokens made once an AR step is, as in MAR (arXiv 2406.11838).
    along_ar: str = "constant"
    # Outside of these timesteps, both included, the scale is 1 (guidance interval, arXiv 2404.07724).
    first_timestep: int = 0
    last_timestep: int | None = None  # None: to the end

    def at(self, share_made: float, timestep: float) -> float:
        """The scale at a timestep of the AR step after which this share of the tokens is made."""
        if timestep < self.first_timestep or (self.last_timestep is not None and timestep > self.last_timestep):
            return 1.0
        return self.scale if self.along_ar == "constant" else 1 + (self.scale - 1) * share_made


@torch.no_grad()
def generate(
    model: Model,
    labels_B: Tensor,
    order_BL: Tensor,
    ar_step_sizes: Sequence[int],
    solver: Solver,
    guidance: Guidance,
    draw_noise: NoiseDraw,
    given_BKP: Tensor | None = None,
    watch: Watch = lambda *_: None,
) -> Tensor:
    """Images of classes, int64 [B]: `generate_image` behind their condition tokens, with its other arguments.

    Of a model without classes, they are made without a condition.
    """
    # The branch without a class has its own context: the same clean tokens under the null class.
    branches = [labels_B] if guidance.scale == 1 else [labels_B, torch.full_like(labels_B, model.null_class)]
    context = Context(model, model.num_cond_tokens + order_BL.shape[1])
    labels_B = torch.cat(branches)
    if model.null_class:
        context.read(class_segment(model.num_cond_tokens, labels_B))
    first_B = torch.zeros_like(labels_B)  # the place of an image behind a class, which is told none itself
    makes = context, order_BL, ar_step_sizes, solver, guidance, draw_noise
    return generate_image(*makes, given_BKP, watch, ordinal_B=first_B)


@torch.no_grad()
def generate_image(
    context: Context,
    order_BL: Tensor,
    ar_step_sizes: Sequence[int],
    solver: Solver,
    guidance: Guidance,
    draw_noise: NoiseDraw,
    given_BKP: Tensor | None = None,
    watch: Watch = lambda *_: None,
    is_read: bool = False,
    ordinal_B: Tensor | None = None,
) -> Tensor:
    """Generates an image behind each context, AR step by AR step: tokens in raster order, float32 [B, L, P].

    Args:
        context: of B sequences, and with guidance of B more, by which they are without what guidance is towards.
        order_BL: int64, which token of the grid is made at each position.
        ar_step_sizes: adding up to the number of tokens that are not given.
        solver: each AR step runs through all of its levels; of the process that the model was trained with.
        guidance: from the second half of the sequences towards the first.
        draw_noise: the randomness, e.g. `noise_by_image`.
        given_BKP: float32, the tokens of the first K positions of the order, which come back as they are.
        watch: sees the tokens on their way.
        is_read: the context gets all tokens of the image, since more will follow.
        ordinal_B: int64, the image's place among the segments of each sequence, of the second half too, where the model
            is told them.
    """
    B, L = order_BL.shape
    copies = 1 if guidance.scale == 1 else 2
    num_given = 0 if given_BKP is None else given_BKP.shape[1]
    assert num_given + sum(ar_step_sizes) == L, (num_given, ar_step_sizes, L)
    sizes = [num_given, *ar_step_sizes] if num_given else list(ar_step_sizes)
    tokens_BLP, begin = None, 0
    for ar_step, size in enumerate(sizes, start=-1 if num_given else 0):
        positions_BN = order_BL[:, begin : begin + size]
        begin += size
        if ar_step < 0:
            assert given_BKP is not None
            step_BNP = given_BKP
        else:
            noised = Segment(IMAGE, positions_BL=positions_BN, ordinal_B=ordinal_B)
            scale_at, watch_step = functools.partial(guidance.at, begin / L), functools.partial(watch, ar_step)
            step_BNP = _denoise(context, noised, copies, scale_at, solver, draw_noise, watch_step)
        if tokens_BLP is None:
            tokens_BLP = torch.zeros(B, L, step_BNP.shape[-1], device=order_BL.device)
        tokens_BLP.scatter_(1, positions_BN.unsqueeze(-1).expand_as(step_BNP), step_BNP)
        if begin < L or is_read:
            clean_BNP, places_BN = step_BNP.repeat(copies, 1, 1), positions_BN.repeat(copies, 1)
            read = Segment(IMAGE, clean=clean_BNP, positions_BL=places_BN, ordinal_B=ordinal_B)
            context.read(read, goes_on=begin < L)
    assert tokens_BLP is not None
    return tokens_BLP


def _denoise(
    context: Context,
    tokens: Segment,
    num_branches: int,
    scale_at: Callable[[float], float],
    solver: Solver,
    draw_noise: NoiseDraw,
    watch: Callable[[int, Tensor, Tensor], None],
) -> Tensor:
    """One AR step's tokens, of which `tokens` has the places, from noise to clean behind the context: [B, N, P]."""
    positions_BN = tokens.positions_BL
    assert positions_BN is not None

    def predict(noised_BNP: Tensor, timestep: float) -> Tensor:
        scale = scale_at(timestep)
        copies = 1 if scale == 1 else num_branches
        places_BN = positions_BN.repeat(copies, 1)
        noised = dataclasses.replace(
            tokens,
            noised=noised_BNP.repeat(copies, 1, 1),
            positions_BL=places_BN,
            times_B=torch.full((len(places_BN),), timestep, device=places_BN.device),
            ordinal_B=None if tokens.ordinal_B is None else tokens.ordinal_B[: len(places_BN)],
        )
        prediction_BNP = context.predict(noised).float()
        if copies == 1:
            return prediction_BNP
        towards, without = prediction_BNP.chunk(2)
        return without + scale * (towards - without)

    return solver.denoise(
        predict, lambda k: draw_noise(k, positions_BN), lambda n, x_BNP: watch(n, positions_BN, x_BNP)
    )
