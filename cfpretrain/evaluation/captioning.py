"""Captions of images from a model, written by all ranks together: the same on any number of ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cfpretrain.base import runtime
from cfpretrain.core.context import Predictor
from cfpretrain.core.continuation import Writing, caption_images
from cfpretrain.data.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Captioner:
    """Writes captions with a model that is whole on every rank."""

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
            on_done: called with the number of images that all ranks have done, every few seconds and at the end.
        """
        batches = torch.arange(num_images).split(self.batch_size)
        mine: dict[int, str] = {}
        with runtime.Exchange(on_done) as exchange:
            for ids_B in batches[runtime.rank() :: runtime.world_size()]:
                runtime.tick()
                texts = caption_images(self.model, read(ids_B.tolist()), ids_B, self.writing, [prefix] * len(ids_B))
                mine |= zip(ids_B.tolist(), map(self.tokenizer.decode, texts), strict=True)
                exchange.add(len(ids_B))
        found = {number: text for of_rank in runtime.gather(mine) for number, text in of_rank.items()}
        return [found[number] for number in range(num_images)]
