"""A model scored while it trains: all ranks make images, their features are summed in memory, rank 0 compares.

No rank holds a second copy of the model, and no image is stored. The reference is read once and its statistics stay in
the run folder.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from cfpretrain.autoencoder import are_pixels
from cfpretrain.base import runtime
from cfpretrain.base.config import Config
from cfpretrain.base.console import UserError, one_line, phase
from cfpretrain.core.ar import equal_sizes
from cfpretrain.core.sampler import Guidance, Model
from cfpretrain.data.shards import LatentsInfo
from cfpretrain.evaluation.captioning import HeldOut
from cfpretrain.evaluation.feature_sums import add, over_ranks, sums_of
from cfpretrain.evaluation.features import make_extractor
from cfpretrain.evaluation.generation import Condition, Decode, GenerationSettings, ImageGenerator, to_pixels
from cfpretrain.evaluation.given_images import say_sizes
from cfpretrain.evaluation.inception_score import splits_of
from cfpretrain.evaluation.references import load_reference
from cfpretrain.evaluation.sampling_options import usual_spacing
from cfpretrain.evaluation.scores import ImageStatistics, compare

_REFERENCES = "references"  # in the run folder
# What mistakes are called in tools, and what their keys are here.
_KEYS = {
    "--feature-weights": "evaluation.feature_weights",
    "--feature-label": "evaluation.feature_label",
    "--features": "evaluation.features",
    "--reference": "evaluation.reference",
    "--cache": "run.folder",
}


class Evaluator:
    """The scores that the section `evaluation` of a config asks for.

    All ranks construct it, and call it, together.
    """

    def __init__(self, config: Config, device: torch.device, trained_on: LatentsInfo | None = None) -> None:
        """Loads the features' network, and reads the reference where its statistics are not kept yet.

        `trained_on` describes the latents of `data.shards`, which those of `evaluation.captions` must be alike.
        """
        asked = config.evaluation
        with _named_as_in_config():
            with runtime.together():
                _check_decodes(config)
                weights = Path(asked.feature_weights) if asked.feature_weights else None
                self._extractor = make_extractor(asked.features, device, weights, asked.feature_label or None)
            with phase(f"reading the statistics of {asked.reference}"):
                cache = Path(config.run.folder) / _REFERENCES
                # With ticks: it may take longer than a rank may be silent.
                reference = load_reference(
                    Path(asked.reference), self._extractor, cache, on_done=lambda _: runtime.tick()
                )
        self.name = self._extractor.name  # of the score by which checkpoints are compared, a Frechet distance
        # That distance between two halves of the reference; None where it is not known.
        self.floor = None if reference.floor is None else reference.floor.get(self.name)
        # All that a score depends on besides the model, JSON-able.
        self.measured_by = dataclasses.asdict(asked) | {
            "score": self.name,
            "features": self._extractor.fingerprint,
            "reference": reference.record["fingerprint"],
        }
        # Scores of before are as good as those that ask for no captions.
        unasked = () if asked.captions else ("captions", "num_captions")
        for key in ("every_steps", "feature_weights", *unasked):
            del self.measured_by[key]
        # Precision and recall of so few images say little, and their features are large.
        self._reference = dataclasses.replace(reference.statistics, neighbours_KF=None)
        self._real_size = reference.image_size  # None once compared with the size of the model's images
        self._config, self._device = config, device
        with runtime.together():
            self._held_out = HeldOut(config, trained_on) if asked.captions else None
        conditions: Sequence[Condition] = range(max(1, config.model.num_classes))
        if self._held_out is not None and config.data.tasks.text_to_image:
            conditions = self._held_out.texts
        self._conditions = [conditions[i % len(conditions)] for i in range(asked.num_images)]
        self._splits_N = splits_of(asked.num_images)
        self._settings = GenerationSettings(
            equal_sizes(config.model.num_tokens, asked.num_ar_steps),
            asked.num_denoising_steps,
            Guidance(asked.guidance),
            # Of any number of ranks, so that the images do not depend on it.
            config.train.micro_batch_size,
            config.run.seed,
            asked.solver,
            usual_spacing(asked.solver),
        )
        # A rank may have no image to make: its sums need their shape.
        self._none = sums_of(self._extractor.none(), torch.zeros(0, dtype=torch.int64))

    def __call__(self, model: Model, decode: Decode, on_step: Callable[[], None] = lambda: None) -> dict[str, float]:
        """The model's scores, by the names of `scores.compare`; equal on all ranks. Arguments as `ImageGenerator`'s."""
        sums = self._none
        marks = None if self._held_out is None else self._held_out.marks
        generator = ImageGenerator(self._config, model, self._settings, self._device, marks)
        for ids_B, images_BCYX in generator.batches(self._conditions, decode, on_step=on_step):
            say_sizes((images_BCYX.shape[3], images_BCYX.shape[2]), self._real_size)
            self._real_size = None
            features = self._extractor(to_pixels(images_BCYX))
            sums = add(sums, sums_of(features, self._splits_N[ids_B]))
        sums = over_ranks(sums)
        scores: dict[str, float] = {}
        with runtime.together():
            if runtime.rank() == 0:
                try:
                    scores = compare(ImageStatistics.of(sums, None), self._reference, self.name)
                except (ArithmeticError, RuntimeError, ValueError) as error:  # as where no eigenvalues are found
                    raise UserError(f"scores cannot be computed: {one_line(error)}") from error
        # One rank's digits decide which checkpoint stays.
        agreed: dict[str, float] = runtime.gather(scores)[0]
        if self._held_out is not None and self._config.data.tasks.image_to_text:
            agreed |= self._held_out.scores(model, self._device, on_step)
        return agreed


def _check_decodes(config: Config) -> None:
    if not config.data.autoencoder and not are_pixels(config.model.latent_channels):
        raise UserError(
            "data.autoencoder: expected the folder of the autoencoder behind the latents, since evaluation.every_steps "
            "asks for scores of images, got none; name it, or set evaluation.every_steps=0"
        )


@contextmanager
def _named_as_in_config() -> Iterator[None]:
    """Mistakes inside are called by the keys of a config, not by the options of a tool."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for option, key in _KEYS.items():
            text = text.replace(option, key)
        raise UserError(text) from error
