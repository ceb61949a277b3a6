"""Digits drawn from prompts, and captions written of digits: a model of texts and images in both directions."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cfpretrain.base.config import Config
from cfpretrain.core.ar import equal_sizes
from cfpretrain.core.context import Context
from cfpretrain.core.latents import patchify, unpatchify
from cfpretrain.core.modalities import IMAGE
from cfpretrain.core.model import CausalFusion
from cfpretrain.core.sampler import Guidance, generate_image, noise_by_image, sampling_orders
from cfpretrain.core.segments import Segment
from cfpretrain.core.solvers import Solver
from cfpretrain.core.texts import TEXT, Marks, pad_texts, text_segment
from cfpretrain.core.token_choice import TokenChoice
from cfpretrain.core.writing import write_texts, writing_keys
from cfpretrain.data.tokenizer import TextTokenizer
from cfpretrain.run.build import make_noise_process

_SOLVER, _SPACING = "sde-dpm++", "log_snr"  # for few denoising steps


@dataclass(frozen=True)
class TextModel:
    """A trained model with what stands between it and people."""

    config: Config
    model: CausalFusion
    tokenizer: TextTokenizer
    batch_size: int = 250
    seed: int = 0

    @property
    def marks(self) -> Marks:
        """The tokens that frame texts."""
        one = self.tokenizer
        return Marks(one.begin, one.end, one.image, one.pad)

    def draw(
        self, prompts: Sequence[str], guidance: float, num_ar_steps: int = 1, num_denoising_steps: int = 25
    ) -> Tensor:
        """A latent for each prompt, as the model sees it: float32 [N, C, Y, X]."""
        model = self.config.model
        solver = Solver(make_noise_process(self.config), num_denoising_steps, _SPACING, _SOLVER)
        order = self.config.order
        made = []
        for ids_B in torch.arange(len(prompts)).split(self.batch_size):
            of_batch = self.tokenizer.encode_batch([prompts[i] for i in ids_B.tolist()])
            texts = [[self.marks.begin, *text, self.marks.image] for text in of_batch]
            # The branch without the text begins with its image.
            branches = [texts] if guidance == 1 else [texts, [[]] * len(texts)]
            has_text_B = torch.tensor([bool(text) for branch in branches for text in branch])
            text = text_segment(*pad_texts([one for branch in branches for one in branch], self.marks.pad))
            capacity = text.num_tokens + 2 * model.num_tokens
            context = Context(self.model, capacity)
            context.read(dataclasses.replace(text, ordinal_B=torch.zeros_like(has_text_B, dtype=torch.int64)))
            tokens_BLP = generate_image(
                context,
                sampling_orders(self.seed, ids_B, model.num_tokens, order.token_order, order.block_size),
                equal_sizes(model.num_tokens, num_ar_steps),
                solver,
                Guidance(guidance),
                noise_by_image(self.seed, ids_B, model.patch_values),
                ordinal_B=has_text_B.long(),
            )
            made.append(unpatchify(tokens_BLP, model.patch_size))
        return torch.cat(made)

    def caption(self, latents_NCYX: Tensor, prefix: str = "") -> list[str]:
        """A caption of each image, whose latents are as the model sees them, in the likeliest words."""
        model = self.config.model
        begins = self.tokenizer.encode(prefix) if prefix else []
        captions = []
        for tokens_BLP in patchify(latents_NCYX, model.patch_size).split(self.batch_size):
            B = len(tokens_BLP)
            context = Context(self.model, model.num_tokens + model.max_text_tokens)
            context.read(self._image(tokens_BLP))
            keys_B = writing_keys(self.seed, torch.arange(B))
            texts = write_texts(
                context,
                [begins] * B,
                self.marks,
                model.max_text_tokens,
                TokenChoice(),
                keys_B,
                ordinal_B=torch.ones(B, dtype=torch.int64),
            )
            captions += [self.tokenizer.decode(text[1:]) for text in texts]
        return captions

    def caption_without_cache(self, latents_NCYX: Tensor) -> list[str]:
        """As `caption`, with all tokens computed again for each one that is written."""
        model, captions = self.config.model, []
        for tokens_BLP in patchify(latents_NCYX, model.patch_size).split(self.batch_size):
            B = len(tokens_BLP)
            ids_BT = torch.full((B, 1), self.marks.begin)
            while ids_BT.shape[1] < model.max_text_tokens and not (ids_BT == self.marks.end).any(1).all():
                context = Context(self.model, model.num_tokens + ids_BT.shape[1])
                context.read(self._image(tokens_BLP))
                text = dataclasses.replace(text_segment(ids_BT), ordinal_B=torch.ones(B, dtype=torch.int64))
                logits_BTV = context.read(text)[TEXT]
                ids_BT = torch.cat([ids_BT, logits_BTV[:, -1].argmax(-1, keepdim=True)], 1)
            captions += [self.tokenizer.decode(text[1:]) for text in ids_BT.tolist()]
        return captions

    @staticmethod
    def _image(tokens_BLP: Tensor) -> Segment:
        """An image that is given, of one AR step, the first of its sample's segments."""
        B, L = tokens_BLP.shape[:2]
        places_BL = torch.arange(L).expand(B, L)
        return Segment(IMAGE, clean=tokens_BLP, positions_BL=places_BL, ordinal_B=torch.zeros(B, dtype=torch.int64))
