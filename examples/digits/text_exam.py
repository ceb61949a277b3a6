"""What a model of texts and images is asked about digits, and what says how good its answers are."""

import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cfpretrain.core.ar import equal_sizes
from cfpretrain.core.continuation import Drawing, Part, Writing, caption_images
from cfpretrain.core.latents import patchify, unpatchify
from cfpretrain.core.sampler import Guidance
from cfpretrain.data.tokenizer import TextTokenizer
from cfpretrain.evaluation import pictures
from cfpretrain.evaluation.captioning import Captioner
from cfpretrain.evaluation.captions import caption_scores
from cfpretrain.evaluation.figures import make_figure, save
from cfpretrain.evaluation.generation import GenerationSettings, ImageGenerator
from cfpretrain.evaluation.pictures import INK
from cfpretrain.evaluation.source import Source
from cfpretrain.run.build import Autoencoder, make_scaling
from examples.digits import captions, classifier
from examples.digits.captioned_digits import read_words
from examples.digits.described import Examiner, agreement, captions_of, guesses, never_trained, parts_said
from examples.digits.pixels import read_all_images
from examples.digits.summary import read_labelled
from tools.measuring.captions import caption_plainly

_BATCH = 125
_SEED = 0
_OF_COMBINATION = 24  # digits drawn of each combination never trained on
_WARM_UP = 50  # captions, before the time of others is taken
_SHOWN_OF_PROMPT, _SHOWN_CAPTIONED, _SHOWN_IN_ROW = 10, 20, 5
_LINE = 31  # characters of a caption in the picture
_RED = "#d1495b"
_WORDS = (captions.DIGITS, *captions.WORDS)

Parts = NDArray[np.int64]  # [N, 4], digit and levels of thickness, slant and width


def prepare(source: Source, described: Path, real: Path, held_out: Path, num_denoising_steps: int) -> "Exam":
    """Reads all that is needed.

    Args:
        source: the model, with texts.
        described: the folder of digits with captions that its shards were made of.
        real: image shards of real digits to fit the classifier on.
        held_out: image shards of digits to ask about.
        num_denoising_steps: of each digit drawn.
    """
    labelled = read_labelled(real, "--images")
    examiner = Examiner(classifier.fit(labelled.images, labelled.labels_N), read_words(described))
    pixels_N1YX, labels_N = read_all_images(held_out, "--held-out")
    images_N1YX = pixels_N1YX.float() / 255
    return Exam(
        source,
        source.texts("RUN"),
        source.make_autoencoder(),
        examiner,
        images_N1YX,
        examiner.parts_true(images_N1YX, labels_N),
        examiner.parts_true((labelled.images + 1) / 2, labelled.labels_N),
        num_denoising_steps,
    )


@dataclass(frozen=True)
class Exam:
    """A model, and what it is asked; all ranks ask together."""

    source: Source
    tokenizer: TextTokenizer
    autoencoder: Autoencoder
    examiner: Examiner
    images_N1YX: Tensor  # held out, in [0, 1]
    parts_N4: Parts  # what is true of them
    learned_N4: Parts  # what is true of real digits trained on
    num_denoising_steps: int

    @property
    def writing(self) -> Writing:
        """How texts are written: in the likeliest words."""
        return Writing(self.source.marks("RUN"), self.source.config.model.max_text_tokens, _SEED)

    def _generator(self, guidance: float) -> ImageGenerator:
        config = self.source.config
        sizes, solver = equal_sizes(config.model.num_tokens, 1), ("sde-dpm++", "log_snr")  # for few denoising steps
        settings = GenerationSettings(sizes, self.num_denoising_steps, Guidance(guidance), _BATCH, _SEED, *solver)
        return ImageGenerator(config, self.source.model, settings, self.source.device, self.source.marks("RUN"))

    def drawing(self, guidance: float) -> Drawing:
        """How images are made of samples that go on, in 1 AR step."""
        return self._generator(guidance).drawing()

    def draw(self, prompts: Sequence[str], guidance: float) -> Tensor:
        """An image of each prompt, in 1 AR step: [N, 1, Y, X] in [0, 1]."""
        conditions = [self.tokenizer.encode(prompt) for prompt in prompts]
        return self._generator(guidance).images(conditions, self.autoencoder.decode)

    def digits_drawn(self, images: Sequence[Part | None]) -> NDArray[np.int64]:
        """What the classifier finds in the tokens of images; -2 where there is none."""
        found_N = np.full(len(images), -2)
        there = [i for i, one in enumerate(images) if isinstance(one, Tensor)]
        if there:
            tokens_NLP = torch.stack([one for one in images if isinstance(one, Tensor)])
            latents_NCYX = unpatchify(tokens_NLP, self.source.config.model.patch_size)
            found_N[there] = self.examiner.parts_seen(self.autoencoder.decode(latents_NCYX))[:, 0]
        return found_N

    def caption(self, images_N1YX: Tensor) -> list[str]:
        """A caption of each image, in the likeliest words."""
        tokens_NLP = self.tokens(images_N1YX)
        captioner = Captioner(self.source.model, self.tokenizer, self.writing, _BATCH)
        return captioner.captions(lambda places: tokens_NLP[list(places)], len(tokens_NLP))

    def tokens(self, images_N1YX: Tensor) -> Tensor:
        """Of images, the means of their posteriors: [N, L, P], as the model sees them."""
        config = self.source.config
        means = [self.autoencoder.encode(part.to(self.source.device))[0] for part in images_N1YX.split(_BATCH)]
        return patchify(make_scaling(config).to_model(torch.cat(means)), config.model.patch_size)

    def _draw_true(self, parts_N4: Parts, guidance: float) -> Tensor:
        """Images of true captions, the templates in turn."""
        prompts = [captions_of(parts)[i % len(captions.TEMPLATES)] for i, parts in enumerate(parts_N4)]
        return self.draw(prompts, guidance)

    def _decoded(self) -> Tensor:
        """The images held out, through the autoencoder."""
        latents = [self.autoencoder.encode(part.to(self.source.device))[0] for part in self.images_N1YX.split(_BATCH)]
        scaling = make_scaling(self.source.config)
        return torch.cat([self.autoencoder.decode(scaling.to_model(part)) for part in latents]).cpu()

    def score_captions(self) -> dict[str, Any]:
        """Of real digits."""
        true = [captions_of(parts) for parts in self.parts_N4]
        written = self.caption(self.images_N1YX)
        said_N4 = parts_said(written)
        is_new_N = np.array([captions.is_held_out(parts[0], parts[1:]) for parts in self.parts_N4.tolist()])
        other = [of_image[(i + 1) % len(of_image)] for i, of_image in enumerate(true)]
        shuffled = other[len(other) // 3 :] + other[: len(other) // 3]  # digits come class by class
        return {
            "num_held_out": len(true),
            "image_to_text": agreement(said_N4, self.parts_N4) | caption_scores(written, true),
            "class_alone": agreement(guesses(self.learned_N4, self.parts_N4), self.parts_N4),
            "shuffled_captions": agreement(parts_said(shuffled), self.parts_N4) | caption_scores(shuffled, true),
            "true_captions": agreement(parts_said(other), self.parts_N4) | caption_scores(other, true),
            "num_real_never_trained": int(is_new_N.sum()),
            "image_to_text_never_trained": agreement(said_N4[is_new_N], self.parts_N4[is_new_N]),
        }

    def time_captions(self) -> dict[str, float]:
        """CPU seconds of all held-out images' captions with the key-value cache and without, and whether they agree."""
        tokens_NLP, model = self.tokens(self.images_N1YX), self.source.model

        def with_cache(tokens_BLP: Tensor) -> list[list[int]]:
            return caption_images(model, tokens_BLP, torch.arange(len(tokens_BLP)), self.writing)

        def without_cache(tokens_BLP: Tensor) -> list[list[int]]:
            return caption_plainly(model, tokens_BLP, self.writing)

        seconds, texts = [], []
        for write in (with_cache, without_cache):
            write(tokens_NLP[:_WARM_UP])
            begin = time.process_time()
            texts.append([self.tokenizer.decode(text) for part in tokens_NLP.split(_BATCH) for text in write(part)])
            seconds.append(time.process_time() - begin)
        return {
            "caption_cpu_seconds": seconds[0],
            "caption_cpu_seconds_without_cache": seconds[1],
            "same_captions_without_cache": float(np.mean([a == b for a, b in zip(*texts, strict=True)])),
        }

    def score_drawings(self, guidance: float) -> dict[str, Any]:
        """Of digits drawn from prompts that are true of the digits held out, and of combinations never trained on."""
        new_N4 = np.array(never_trained()).repeat(_OF_COMBINATION, 0)
        unguided, guided = (self._draw_true(self.parts_N4, scale) for scale in (1.0, guidance))
        new = self._draw_true(new_N4, guidance)

        def seen(images_N1YX: Tensor, wanted_N4: Parts) -> dict[str, float]:
            return agreement(self.examiner.parts_seen(images_N1YX), wanted_N4)

        return {
            "text_to_image": seen(guided, self.parts_N4),
            "text_to_image_unguided": seen(unguided, self.parts_N4),
            "through_autoencoder": seen(self._decoded(), self.parts_N4),
            "text_to_image_to_text": agreement(parts_said(self.caption(guided)), self.parts_N4),
            "num_drawn_never_trained": len(new_N4),
            "text_to_image_never_trained": seen(new, new_N4),
        }

    def draw_prompts(self, path: Path, guidance: float) -> Callable[[], None]:
        """Draws a grid of digits from prompts: one for each digit, never trained on where there is such a one.

        What it returns writes it.
        """
        new = {parts[0]: parts for parts in never_trained()}
        wanted = [
            new.get(digit) or next(parts for parts in self.parts_N4.tolist() if parts[0] == digit)
            for digit in range(len(captions.DIGITS))
        ]
        prompts = [captions_of(parts)[i % len(captions.TEMPLATES)] for i, parts in enumerate(wanted)]
        images_N1YX = self.draw([prompt for prompt in prompts for _ in range(_SHOWN_OF_PROMPT)], guidance)
        names = [f"{prompt}{' *' if digit in new else ''}" for digit, prompt in enumerate(prompts)]
        title = f"Drawn from the words on the left, guidance {guidance:g}\n* a combination never trained on"
        return lambda: pictures.sample_grid(path, images_N1YX, names, title, (0.0, 1.0), cell_size=64)

    def draw_captions(self, path: Path) -> Callable[[], None]:
        """Captions held-out digits, to be shown with what is false in them beneath; what it returns writes that."""
        places = np.linspace(0, len(self.parts_N4) - 1, _SHOWN_CAPTIONED).round().astype(int).tolist()
        written = self.caption(self.images_N1YX[places])
        said_N4 = parts_said(written)

        def write() -> None:
            rows = -(-len(places) // _SHOWN_IN_ROW)
            title = "Held-out digits, and what the model writes of them"
            figure = make_figure(2.0 * _SHOWN_IN_ROW, 2.45 * rows, title)
            for axes in figure.subplots(rows, _SHOWN_IN_ROW).flat:
                axes.set(xticks=[], yticks=[])
            for place, text, said, axes in zip(places, written, said_N4, figure.axes, strict=True):
                axes.imshow(self.images_N1YX[place, 0], cmap="gray", vmin=0, vmax=1)
                true = self.parts_N4[place]
                wrong = [_WORDS[k][true[k]] for k in range(len(true)) if said[k] != true[k]]
                lines = [*textwrap.wrap(text, _LINE), "", "", ""][:3]  # room for what is measured beneath two
                axes.set_xlabel("\n".join(lines), color=INK, fontsize=8)
                if wrong:
                    at = {"xycoords": "axes fraction", "xytext": (0, -31), "textcoords": "offset points"}
                    say = f"measured: {', '.join(wrong)}"
                    axes.annotate(say, (0.5, 0), ha="center", va="top", color=_RED, fontsize=8, **at)
            save(figure, path)

        return write
