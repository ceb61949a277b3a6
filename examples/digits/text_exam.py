"""What a model of texts and images is asked about digits, and what says how good its answers are."""

import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cfpretrain.data.tokenizer import TextTokenizer
from cfpretrain.evaluation import pictures
from cfpretrain.evaluation.captions import caption_scores
from cfpretrain.evaluation.figures import make_figure, save
from cfpretrain.evaluation.pictures import INK
from cfpretrain.run.build import TOKENIZER_FILE, Autoencoder, RunCheckpoint, make_scaling
from examples.digits import captions, classifier
from examples.digits.captioned_digits import read_words
from examples.digits.described import Examiner, agreement, captions_of, guesses, never_trained, parts_said
from examples.digits.pixels import read_all_images
from examples.digits.prompted import TextModel
from examples.digits.summary import read_labelled

_WARM_UP = 50  # captions, before the time of others is taken
_OF_COMBINATION = 24  # digits drawn of each combination never trained on
_SHOWN_OF_PROMPT, _SHOWN_CAPTIONED, _SHOWN_IN_ROW = 10, 20, 5
_LINE = 31  # characters of a caption in the picture
_RED = "#d1495b"
_WORDS = (captions.DIGITS, *captions.WORDS)


def prepare(found: RunCheckpoint, described: Path, real: Path, held_out: Path, num_denoising_steps: int) -> "Exam":
    """Reads all that is needed.

    Args:
        found: the model.
        described: the folder of digits with captions that its shards were made of.
        real: image shards of real digits to fit the classifier on.
        held_out: image shards of digits to ask about.
        num_denoising_steps: of each digit drawn.
    """
    config, device = found.config, torch.device("cpu")
    tokenizer = TextTokenizer.load(Path(config.run.folder) / TOKENIZER_FILE, "RUN")
    labelled = read_labelled(real, "--images")
    examiner = Examiner(classifier.fit(labelled.images, labelled.labels_N), read_words(described))
    pixels_N1YX, labels_N = read_all_images(held_out, "--held-out")
    return Exam(
        TextModel(config, found.load_model(), tokenizer),
        found.make_autoencoder(device),
        examiner,
        pixels_N1YX.float() / 255,
        examiner.parts_true(pixels_N1YX.float() / 255, labels_N),
        examiner.parts_true((labelled.images + 1) / 2, labelled.labels_N),
        num_denoising_steps,
    )


@dataclass(frozen=True)
class Exam:
    """A model, and what it is asked."""

    model: TextModel
    autoencoder: Autoencoder
    examiner: Examiner
    images_N1YX: Tensor  # held out, in [0, 1]
    parts_N4: NDArray[np.int64]  # what is true of them
    learned_N4: NDArray[np.int64]  # what is true of the real digits trained on
    num_denoising_steps: int

    def draw(self, parts_N4: NDArray[np.int64], guidance: float) -> Tensor:
        """Latents of true captions, the templates in turn."""
        prompts = [captions_of(parts)[i % len(captions.TEMPLATES)] for i, parts in enumerate(parts_N4)]
        return self.model.draw(prompts, guidance, num_denoising_steps=self.num_denoising_steps)

    def seen(self, latents_NCYX: Tensor) -> NDArray[np.int64]:
        """What is to be seen in latents when they are decoded."""
        return self.examiner.parts_seen(self.autoencoder.decode(latents_NCYX))

    def latents(self) -> Tensor:
        """Of the images held out, the means of their posteriors as the model sees them."""
        scaling = make_scaling(self.model.config)
        return scaling.to_model(self.autoencoder.encode(self.images_N1YX)[0])

    def score_captions(self) -> dict[str, Any]:
        """Of real digits."""
        latents_NCYX, true = self.latents(), [captions_of(parts) for parts in self.parts_N4]
        texts, seconds, kinds = [], [], (self.model.caption, self.model.caption_without_cache)
        for write in kinds:
            write(latents_NCYX[:_WARM_UP])
            begin = time.process_time()
            texts.append(write(latents_NCYX))
            seconds.append(time.process_time() - begin)
        written, again = texts
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
            "caption_cpu_seconds": seconds[0],
            "caption_cpu_seconds_without_cache": seconds[1],
            "same_captions_without_cache": float(np.mean([a == b for a, b in zip(written, again, strict=True)])),
        }

    def score_drawings(self, guidance: float) -> dict[str, Any]:
        """Of digits drawn from prompts that are true of the digits held out, and of combinations never trained on."""
        new_N4 = np.array(never_trained()).repeat(_OF_COMBINATION, 0)
        unguided, guided = (self.draw(self.parts_N4, scale) for scale in (1.0, guidance))
        return {
            "text_to_image": agreement(self.seen(guided), self.parts_N4),
            "text_to_image_unguided": agreement(self.seen(unguided), self.parts_N4),
            "through_autoencoder": agreement(self.seen(self.latents()), self.parts_N4),
            "text_to_image_to_text": agreement(parts_said(self.model.caption(guided)), self.parts_N4),
            "num_drawn_never_trained": len(new_N4),
            "text_to_image_never_trained": agreement(self.seen(self.draw(new_N4, guidance)), new_N4),
        }

    def draw_prompts(self, path: Path, guidance: float) -> None:
        """A grid of digits drawn from prompts: one for each digit, never trained on where there is such a one."""
        new = {parts[0]: parts for parts in never_trained()}
        wanted = [
            new.get(digit) or next(parts for parts in self.parts_N4.tolist() if parts[0] == digit)
            for digit in range(len(captions.DIGITS))
        ]
        prompts = [captions_of(parts)[i % len(captions.TEMPLATES)] for i, parts in enumerate(wanted)]
        latents_NCYX = self.model.draw(
            [prompt for prompt in prompts for _ in range(_SHOWN_OF_PROMPT)],
            guidance,
            num_denoising_steps=self.num_denoising_steps,
        )
        names = [f"{prompt}{' *' if digit in new else ''}" for digit, prompt in enumerate(prompts)]
        title = f"Drawn from the words on the left, guidance {guidance:g}\n* a combination never trained on"
        pictures.sample_grid(path, self.autoencoder.decode(latents_NCYX), names, title, (0.0, 1.0), cell_size=64)

    def draw_captions(self, path: Path) -> None:
        """Held-out digits with the captions that the model writes of them, what is false in them beneath."""
        places = np.linspace(0, len(self.parts_N4) - 1, _SHOWN_CAPTIONED).round().astype(int)
        written = self.model.caption(self.latents()[torch.from_numpy(places)])
        rows = -(-len(places) // _SHOWN_IN_ROW)
        figure = make_figure(2.0 * _SHOWN_IN_ROW, 2.3 * rows, "Held-out digits, and what the model writes of them")
        for place, text, axes in zip(places.tolist(), written, figure.subplots(rows, _SHOWN_IN_ROW).flat, strict=True):
            axes.imshow(self.images_N1YX[place, 0], cmap="gray", vmin=0, vmax=1)
            axes.set_axis_off()
            said, true = parts_said([text])[0], self.parts_N4[place]
            wrong = [_WORDS[k][true[k]] for k in range(len(true)) if said[k] != true[k]]
            measured = f"measured: {', '.join(wrong)}" if wrong else ""
            for top, line, colour in ((-0.04, textwrap.fill(text, _LINE), INK), (-0.26, measured, _RED)):
                axes.text(0.5, top, line, transform=axes.transAxes, ha="center", va="top", color=colour, fontsize=8)
        save(figure, path)
