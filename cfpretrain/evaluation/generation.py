"""Images from a model, made by all ranks together: the same images on any number of ranks."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfpretrain.autoencoder import are_pixels
from cfpretrain.base import runtime
from cfpretrain.base.config import Config
from cfpretrain.base.outputs import whole_or_nothing
from cfpretrain.core.continuation import Drawing, generate_behind_texts
from cfpretrain.core.latents import take_tokens, unpatchify
from cfpretrain.core.regions import kept_first
from cfpretrain.core.sampler import Guidance, Model, Watch, generate, noise_by_image, sampling_orders
from cfpretrain.core.solvers import Solver
from cfpretrain.core.texts import Marks
from cfpretrain.evaluation.pictures import false_colours, sample_grid, to_rgb
from cfpretrain.run.build import Autoencoder, make_autoencoder, make_noise_process


@dataclass(frozen=True)
class GenerationSettings:
    """How images are made."""

    ar_step_sizes: Sequence[int]  # tokens of each AR step
    num_denoising_steps: int  # levels that each AR step runs through
    guidance: Guidance  # towards the class or the text
    batch_size: int  # images a forward on one rank
    seed: int  # of noise and orders
    solver: str = "ddpm"
    spacing: str = "time"  # of the solver's levels
    token_order: str | None = None  # see `ar.draw_orders`; None: as the model was trained
    block_size: int | None = None

    @property
    def num_ar_steps(self) -> int:
        """S."""
        return len(self.ar_step_sizes)

    def num_batches(self, num_images: int) -> int:
        """Batches that so many images fill."""
        return -(-num_images // self.batch_size)

    def __str__(self) -> str:
        return f"AR steps {self.num_ar_steps}, denoising steps {self.num_denoising_steps} ({self.solver})"


def plan_of(config: Config, weights: str, autoencoder: str, settings: GenerationSettings) -> dict[str, Any]:
    """All that images depend on besides classes and texts, JSON-able; `weights` and `autoencoder` are hashes."""
    return {
        "weights": weights,
        "autoencoder": autoencoder,
        "trained_order": [config.order.token_order, config.order.block_size],
        "noise_schedule": dataclasses.asdict(config.noise),
        **dataclasses.asdict(settings),
    }


# What an image is made of: a class, or the tokens of a text; None: nothing, of a model with texts.
Condition = int | Sequence[int] | None
# Latents as the model sees them -> images [B, 1 or 3, Y, X], 0 black and 1 white.
Decode = Callable[[Tensor], Tensor]


def decode_to_look_at(
    config: Config, device: torch.device, make: Callable[[], Autoencoder] | None = None
) -> tuple[Decode, str]:
    """How latents become a picture, whether or not the config names an autoencoder, and what its title says of it.

    `make` makes the autoencoder; None: `build.make_autoencoder`.
    """
    if config.data.autoencoder or are_pixels(config.model.latent_channels):
        return (make() if make else make_autoencoder(config, device)).decode, ""
    return false_colours, "false colours"


def to_pixels(images_BCYX: Tensor) -> Tensor:
    """Images [B, 1 or 3, Y, X] in [0, 1] as a file holds them: uint8 [B, 3, Y, X]; what is not finite is magenta."""
    return torch.from_numpy(to_rgb(images_BCYX, (0.0, 1.0))).permute(0, 3, 1, 2).contiguous()


def grid_title(what: str, settings: GenerationSettings, note: str = "") -> str:
    """What stands above a grid of samples: whose they are, how they were made, and a note on their colours."""
    order = f"order {settings.token_order}" if settings.token_order else ""
    return f"{what}, guidance {settings.guidance.scale:g}\n" + ", ".join(filter(None, (f"{settings}", order, note)))


def draw_grid(path: Path, option: str, images_BCYX: Tensor, row_names: Sequence[str], title: str, **how: Any) -> None:
    """Writes a new grid of images in [0, 1] as PNG, from rank 0; called by all ranks.

    Args:
        path: the PNG.
        option: that gave it, for messages.
        images_BCYX, row_names, title, how: as `pictures.sample_grid` takes them.
    """
    with runtime.together():
        if runtime.rank() == 0:
            with whole_or_nothing(path, option) as unfinished:
                sample_grid(unfinished, images_BCYX, row_names, title, (0.0, 1.0), **how)


# ---------------------------------------------------------------------------
# Making them


@dataclass(frozen=True)
class Trajectory:
    """States of one image while it is made: AR steps by noise levels."""

    states: Tensor  # float32 [rows, columns, L, P], the clean tokens of earlier AR steps and the noised ones of this
    is_made: Tensor  # bool [rows, L], the tokens that are there, noised ones among them
    ar_steps: Sequence[int]  # of the rows, counted from 1
    timesteps: Sequence[int | None]  # of the columns; None: clean


@dataclass(frozen=True)
class ImageGenerator:
    """Makes images with a model, which all ranks call the same number of times."""

    config: Config  # says which noise process and order the model was trained with
    model: Model
    settings: GenerationSettings
    device: torch.device  # of the model
    marks: Marks | None = None  # of a model with texts

    def images(
        self, conditions: Sequence[Condition], decode: Decode | None = None, on_step: Callable[[], None] = lambda: None
    ) -> Tensor:
        """An image of each condition, float32 [len(conditions), C, Y, X] on the CPU of every rank; for small sets.

        Arguments as `batches`.
        """
        mine = list(self.batches(conditions, decode, on_step=on_step))
        batches = [batch for made in runtime.gather(mine) for batch in made]
        ids, images = (torch.cat(part) for part in zip(*batches, strict=True))
        return images[ids.argsort()]

    def batches(
        self,
        conditions: Sequence[Condition],
        decode: Decode | None = None,
        numbers: Sequence[int] | None = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One image of each condition; image i has id i, which fixes its noise and order.

        The images are cut into batches of equal size, dealt to the ranks in turn. The last one is filled up, and where
        batches run out some are made twice, so that every rank runs the same number of forwards (ZeRO-3 would hang
        otherwise) and no image depends on the number of ranks; the surplus is not given out.

        Args:
            conditions: the class of each image, or the text of each.
            decode: makes images of latents; None: the config's autoencoder.
            numbers: of the batches to make; None: all.
            on_step: called after every denoising step.

        Yields:
            This rank's share, batch by batch: ids int64 [B] and images float32 [B, C, Y, X], both on the CPU.
        """
        settings = self.settings
        decode = decode or make_autoencoder(self.config, self.device).decode
        numbers = range(settings.num_batches(len(conditions))) if numbers is None else numbers

        def watch(_: int, num_steps_left: int, *__: Tensor) -> None:
            if num_steps_left < settings.num_denoising_steps:
                runtime.tick()
                on_step()

        for first in range(0, len(numbers), runtime.world_size()):
            place = first + runtime.rank()
            number = numbers[min(place, len(numbers) - 1)]
            ids_B = torch.arange(number * settings.batch_size, (number + 1) * settings.batch_size)
            own = [conditions[min(i, len(conditions) - 1)] for i in ids_B.tolist()]
            tokens_BLP = self._make_tokens(own, ids_B, self._orders(ids_B), watch=watch)
            images_BCYX = decode(unpatchify(tokens_BLP, self.config.model.patch_size)).cpu()
            if place < len(numbers):
                is_wanted_B = ids_B < len(conditions)
                yield ids_B[is_wanted_B], images_BCYX[is_wanted_B]

    def edit(self, tokens_BLP: Tensor, region_L: Tensor, conditions: Sequence[Condition], first_id: int = 0) -> Tensor:
        """Generates a region of images again, each under a class or text of its own; on one rank.

        Args:
            tokens_BLP: the images, in the model's scale.
            region_L: bool, the tokens that are generated again, as many as the AR steps of the settings add up to.
            conditions: the new class of each image, or the new text.
            first_id: ids, which fix noise and orders, begin here.

        Returns:
            float32 [B, L, P]: outside of the region the tokens that were given, bit by bit.
        """
        edited = []
        for places_B in torch.arange(len(conditions)).split(self.settings.batch_size):
            ids_B, own = first_id + places_B, [conditions[i] for i in places_B.tolist()]
            order_BL, num_kept = kept_first(self._orders(ids_B), region_L.to(self.device))
            given_BKP = take_tokens(tokens_BLP[places_B].to(self.device), order_BL[:, :num_kept])
            edited.append(self._make_tokens(own, ids_B, order_BL, given_BKP))
        return torch.cat(edited)

    def drawing(self) -> Drawing:
        """How an image among texts and images is made."""
        model, settings, trained = self.config.model, self.settings, self.config.order
        return Drawing(
            model.num_tokens,
            model.patch_values,
            settings.ar_step_sizes,
            self._solver(),
            settings.seed,
            settings.guidance,
            settings.token_order or trained.token_order,
            settings.block_size or trained.block_size,
            lambda *_: runtime.tick(),
        )

    def follow(self, condition: Condition, num_rows: int = 8, num_columns: int = 9) -> Trajectory:
        """Makes the image of id 0 and keeps at most so many states of its way, evenly spread along both axes."""
        model = self.config.model
        ar_steps = _evenly(self.settings.num_ar_steps - 1, num_rows)
        levels_left = _evenly(self.settings.num_denoising_steps, num_columns)[::-1]
        tokens_LP = torch.zeros(model.num_tokens, model.patch_values)
        is_made_L = torch.zeros(model.num_tokens, dtype=torch.bool)
        states, is_made = [], []

        def watch(ar_step: int, num_left: int, positions_BN: Tensor, tokens_BNP: Tensor) -> None:
            runtime.tick()
            is_made_L[positions_BN[0].cpu()] = True
            tokens_LP[positions_BN[0].cpu()] = tokens_BNP[0].cpu()
            if ar_step in ar_steps and num_left in levels_left:
                states.append(tokens_LP.clone())
                if num_left == 0:
                    is_made.append(is_made_L.clone())

        ids_B = torch.tensor([0])
        self._make_tokens([condition], ids_B, self._orders(ids_B), watch=watch)
        times = self._solver().levels.times_T.tolist()
        return Trajectory(
            torch.stack(states).unflatten(0, (len(ar_steps), len(levels_left))),
            torch.stack(is_made),
            [ar_step + 1 for ar_step in ar_steps],
            [round(times[left - 1]) if left else None for left in levels_left],
        )

    def _make_tokens(
        self,
        conditions: Sequence[Condition],
        ids_B: Tensor,
        order_BL: Tensor,
        given_BKP: Tensor | None = None,
        watch: Watch = lambda *_: None,
    ) -> Tensor:
        settings = self.settings
        draw_noise = noise_by_image(settings.seed, ids_B.to(self.device), self.config.model.patch_values)
        makes = order_BL, settings.ar_step_sizes, self._solver(), settings.guidance, draw_noise, given_BKP, watch
        texts = [one for one in conditions if not isinstance(one, int)]
        if not texts:
            return generate(self.model, torch.tensor(conditions, device=self.device), *makes)
        assert self.marks is not None
        assert len(texts) == len(conditions)
        return generate_behind_texts(self.model, texts, self.marks, *makes)

    def _orders(self, ids_B: Tensor) -> Tensor:
        how = self.drawing()
        return sampling_orders(how.seed, ids_B, how.num_tokens, how.token_order, how.block_size).to(self.device)

    def _solver(self) -> Solver:
        settings = self.settings
        process = make_noise_process(self.config)
        return Solver(process, settings.num_denoising_steps, settings.spacing, settings.solver)


def _evenly(last: int, most: int) -> list[int]:
    """At most so many of 0..last, both ends among them."""
    num = min(last + 1, most)
    return [round(i * last / max(num - 1, 1)) for i in range(num)]
