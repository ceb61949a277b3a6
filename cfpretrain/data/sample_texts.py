"""The captions of samples, and the texts of interleaved ones, as tokens."""

from collections.abc import Sequence

from cfpretrain.base.config import Config
from cfpretrain.base.console import UserError
from cfpretrain.core.texts import FRAME
from cfpretrain.data.samples import FOLDER_BIT, Samples
from cfpretrain.data.tokenizer import TextTokenizer

Captions = list[list[int]]  # of each sample
Interleaved = list[list[list[int] | None]]  # of each sample its texts, and None for an image


def encode_texts(samples: Samples, tokenizer: TextTokenizer | None, config: Config) -> tuple[Captions, Interleaved]:
    """What the tasks of a config need of each sample, without the tokens that frame texts; empty where they need none.

    UserError where a text is too long, or a sample has too many.
    """
    tasks, model = config.data.tasks, config.model
    captions: Captions = []
    interleaved: Interleaved = []
    if tokenizer is not None and tasks.text_to_image + tasks.image_to_text:
        captions = _encode_captions(tokenizer, samples, model.max_text_tokens)
    if tokenizer is not None and tasks.interleaved:
        interleaved = _encode_interleaved(tokenizer, samples, model.max_text_tokens, model.max_segments)
    return captions, interleaved


def _encode_captions(tokenizer: TextTokenizer, samples: Samples, max_tokens: int) -> Captions:
    """The tokens of each sample's caption, without those that frame it."""
    texts = [tokenizer.encode(caption) for caption in samples.captions]
    for sample_id, text in zip(samples.ids_B.tolist(), texts, strict=True):
        check_length(text, f"the caption of sample {_in_its_folder(sample_id)}", max_tokens)
    return texts


def _encode_interleaved(tokenizer: TextTokenizer, samples: Samples, max_tokens: int, max_segments: int) -> Interleaved:
    """The tokens of the texts of each sample, without those that frame them, and None for each of its images."""
    found: Interleaved = []
    for sample_id, segments in zip(samples.ids_B.tolist(), samples.segments, strict=True):
        if len(segments) > max_segments:
            raise UserError(
                f"model.max_segments: expected at least {len(segments)}, the texts and images of sample "
                f"{_in_its_folder(sample_id)}, got {max_segments}; raise it"
            )
        found.append([None if text is None else tokenizer.encode(text) for text in segments])
        for text in found[-1]:
            check_length(text or [], f"a text of sample {_in_its_folder(sample_id)}", max_tokens)
    return found


def check_length(text: Sequence[int], what: str, max_tokens: int) -> None:
    """UserError where the tokens of a text, without those that frame it, are more than a model knows."""
    if len(text) > max_tokens - FRAME:
        raise UserError(
            f"model.max_text_tokens: expected at least {len(text) + FRAME}, the tokens of {what} and the two that "
            f"frame it, got {max_tokens}; raise it, or shorten that"
        )


def _in_its_folder(sample_id: int) -> int:
    return sample_id % (1 << FOLDER_BIT)
