"""Captions of images from a model, written by all ranks together: the same on any number of ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cfpretrain.base import runtime
from cfpretrain.base.config import Config
from cfpretrain.base.console import UserError
from cfpretrain.core.context import Predictor
from cfpretrain.core.continuation import Writing, caption_images
from cfpretrain.core.latents import patchify
from cfpretrain.core.texts import Marks
from cfpretrain.data.cache import Cache
from cfpretrain.data.sample_texts import check_length
from cfpretrain.data.shards import LatentsInfo, Shards
from cfpretrain.data.tokenizer import TextTokenizer
from cfpretrain.evaluation.captions import caption_scores
from cfpretrain.evaluation.perplexity import Likelihood, caption_likelihood, perplexity
from cfpretrain.run.build import make_scaling, make_tokenizer


def read_captioned(
    folder: Path | str, config: Config, num_samples: int, key: str, trained_on: LatentsInfo | None = None
) -> tuple[Tensor, list[str]]:
    """The first samples of latent shards: tokens as the model sees them, of posteriors' means, and captions.

    Args:
        folder: of the shards, or its address.
        config: of the model.
        num_samples: at most so many.
        key: what gave the folder, for messages.
        trained_on: the latents that the model learns, where they are known: others mean nothing to it.

    Returns:
        float32 [B, L, P] on the CPU, and a text for each.
    """
    shards = Shards(folder, key, Cache.of(config.data))
    model, info = config.model, shards.info
    if not isinstance(info, LatentsInfo):
        raise UserError(f"{key}: expected latent shards, got image shards in {folder}; encode them first")
    if info.most_segments:
        raise UserError(f"{key}: expected samples of an image and its caption, got interleaved ones in {folder}")
    expected = (model.latent_channels, model.latent_size, model.latent_size)
    if tuple(info.latent_shape) != expected:
        raise UserError(f"{key}: expected latents of {expected}, as the model has, got {tuple(info.latent_shape)}")
    for name in ("autoencoder", "latent_shift", "latent_scale") if trained_on is not None else ():
        wanted, got = getattr(trained_on, name), getattr(info, name)
        if wanted != got:
            raise UserError(
                f"{key}: expected latents of {name} {wanted}, as in data.shards, got {got} in {folder}; encode their "
                "images with the autoencoder of those"
            )
    samples = shards.samples(range(min(num_samples, len(shards))))
    latents_BCYX = torch.stack([torch.from_numpy(one["mean"].astype(np.float32)) for one in samples])
    tokens_BLP = patchify(make_scaling(config).to_model(latents_BCYX), model.patch_size)
    return tokens_BLP, [one["caption"] for one in samples]


@dataclass(frozen=True)
class Captioner:
    """Writes captions with a model, which all ranks call in step."""

    model: Predictor
    tokenizer: TextTokenizer
    writing: Writing
    batch_size: int  # images a forward on one rank

    def captions(
        self,
        read: Callable[[Sequence[int]], Tensor],
        num_images: int,
        prefix: Sequence[int] = (),
        on_done: Callable[[int], None] = lambda _: None,
    ) -> list[str]:
        """The caption of each image, on every rank. A UserError of `read` on one is raised on all.

        Args:
            read: gives the tokens of images by their numbers: float32 [B, L, P] on the model's device.
            num_images: numbered from 0; with the seed, a number fixes what is drawn.
            prefix: tokens of the text that each caption begins with.
            on_done: called with the number of images that all ranks have done.
        """
        batches = torch.arange(num_images).split(self.batch_size)
        mine: dict[int, str] = {}
        for first in range(0, len(batches), runtime.world_size()):
            place = first + runtime.rank()
            ids_B = batches[min(place, len(batches) - 1)]  # the last one twice, so that ranks run in step
            with runtime.together():
                images_BLP = read(ids_B.tolist())
            runtime.tick()
            texts = caption_images(self.model, images_BLP, ids_B, self.writing, [prefix] * len(ids_B))
            if place < len(batches):
                mine |= zip(ids_B.tolist(), map(self.tokenizer.decode, texts), strict=True)
            on_done(min((first + runtime.world_size()) * self.batch_size, num_images))
        found = {number: text for of_rank in runtime.gather(mine) for number, text in of_rank.items()}
        return [found[number] for number in range(num_images)]


class HeldOut:
    """Images with captions that a model is scored by while it trains: how it captions them, and what it draws of these.

    All ranks call it together.
    """

    def __init__(self, config: Config, trained_on: LatentsInfo | None = None) -> None:
        """Reads them; UserError where a caption is too long. See `read_captioned`."""
        asked, tokenizer, model = config.evaluation, make_tokenizer(config), config.model
        assert tokenizer is not None
        self._images_BLP, self.captions = read_captioned(
            asked.captions, config, asked.num_captions, "evaluation.captions", trained_on
        )
        if not any(self.captions):
            raise UserError(
                f"evaluation.captions: expected captions, got none in {len(self.captions):,} samples of "
                f"{asked.captions}; name shards that were made of a table with a column `caption`"
            )
        self.texts = tokenizer.encode_batch(self.captions)
        check_length(max(self.texts, key=len), f"a caption in {asked.captions}", model.max_text_tokens)
        self.marks, self._tokenizer = Marks(*tokenizer.marks), tokenizer
        self._writing = Writing(self.marks, model.max_text_tokens, config.run.seed, go_on=_on_any_rank)
        self._batch_size = config.train.micro_batch_size

    def scores(self, model: Predictor, device: torch.device, on_step: Callable[[], None]) -> dict[str, float]:
        """Of captions, the likeliest: `captions.caption_scores` and "perplexity"; `on_step` is called now and then."""

        def read(places: Sequence[int]) -> Tensor:
            return self._images_BLP[list(places)].to(device)

        def likelihood(first: int) -> Likelihood:
            places = range(len(self.texts))[first : first + self._batch_size]
            on_step()
            return caption_likelihood(model, read(places), [self.texts[i] for i in places], self.marks)

        captioner = Captioner(model, self._tokenizer, self._writing, self._batch_size)
        written = captioner.captions(read, len(self.texts), on_done=lambda _: on_step())
        # On all ranks, which is cheap beside writing.
        found = [likelihood(first) for first in range(0, len(self.texts), self._batch_size)]
        scores = caption_scores(written, [[caption] for caption in self.captions])
        return scores | {"perplexity": perplexity(found)}


def _on_any_rank(is_open: bool) -> bool:
    return bool(runtime.sum_over_ranks(torch.tensor([float(is_open)])))
