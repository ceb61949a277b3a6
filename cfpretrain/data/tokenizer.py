"""Texts <-> token ids: the door to Hugging Face's `tokenizers`.

A text becomes [BEGIN, its tokens, END or IMAGE]: the last token says whether the sample ends or an image follows, so
that a model can decide to draw one. Any `tokenizer.json` serves; the special tokens are added where it lacks them.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from cfpretrain.base.console import UserError, one_line
from cfpretrain.base.files import read_text
from cfpretrain.data.samples import FOLDER_BIT, Samples

PAD, BEGIN, END, IMAGE = "<|pad|>", "<|text|>", "<|end|>", "<|image|>"
SPECIAL = (PAD, BEGIN, END, IMAGE)
_MAX_BYTES = 64 * 2**20  # of a tokenizer.json; those of 250,000 tokens have 20 MB


class TextTokenizer:
    """Makes token ids of texts, and texts of token ids.

    Attributes:
        size: token ids are 0 to size - 1.
        pad, begin, end, image: ids of the special tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # their names in a text are mere text
        tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
        self._tokenizer = tokenizer
        self.size: int = tokenizer.get_vocab_size()
        self.pad, self.begin, self.end, self.image = map(tokenizer.token_to_id, SPECIAL)

    @classmethod
    def load(cls, file: Path, key: str) -> "TextTokenizer":
        """Of a `tokenizer.json`; `key` is the config key or option that gave it."""
        try:
            return cls.from_json(read_text(file, _MAX_BYTES))
        except FileNotFoundError as error:
            raise UserError(f"{key}: expected a tokenizer.json, but {file} does not exist") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{key}: {file} cannot be read as a tokenizer.json ({one_line(error):.200})") from error

    @classmethod
    def from_json(cls, text: str) -> "TextTokenizer":
        """Of the content of a `tokenizer.json`; ValueError where it is none."""
        try:
            found = Tokenizer.from_str(text)
        except Exception as error:  # the package raises nothing more special
            raise ValueError(str(error)) from error
        return cls(found)

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> "TextTokenizer":
        """Byte-level BPE of some texts: any text can be written with it.

        Args:
            texts: what to learn the tokens from.
            size: the most tokens, at least 256 and the special ones.
        """
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=2,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    def to_json(self) -> str:
        """The content of a `tokenizer.json` with the special tokens in it."""
        return self._tokenizer.to_str()

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides which ids a text has, whatever the layout of its file."""
        plain = json.dumps(json.loads(self.to_json()), sort_keys=True)
        return hashlib.blake2b(plain.encode(), digest_size=16).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without the special ones around it."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of several texts."""
        return [list(one.ids) for one in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens up to the first that ends it; special tokens say nothing."""
        ends = [i for i, id in enumerate(ids) if id in (self.end, self.image)]
        text: str = self._tokenizer.decode(list(ids[: ends[0]] if ends else ids), skip_special_tokens=True)
        return text


# ---------------------------------------------------------------------------------------------------------------------
# Of samples


def encode_captions(tokenizer: TextTokenizer, samples: Samples, max_tokens: int) -> list[list[int]]:
    """The tokens of each sample's caption, without those that frame it; UserError where one is too long."""
    texts = [tokenizer.encode(caption) for caption in samples.captions]
    for sample_id, text in zip(samples.ids_B.tolist(), texts, strict=True):
        _check_length(text, "the caption", sample_id, max_tokens)
    return texts


def encode_interleaved(
    tokenizer: TextTokenizer, samples: Samples, max_tokens: int, max_segments: int
) -> list[list[list[int] | None]]:
    """The tokens of the texts of each sample, without those that frame them, and None for each of its images.

    UserError where there are too many, or a text is too long.
    """
    found: list[list[list[int] | None]] = []
    for sample_id, segments in zip(samples.ids_B.tolist(), samples.segments, strict=True):
        if len(segments) > max_segments:
            raise UserError(
                f"model.max_segments: expected at least {len(segments)}, the texts and images of sample "
                f"{sample_id % (1 << FOLDER_BIT)}, got {max_segments}; raise it"
            )
        found.append([None if text is None else tokenizer.encode(text) for text in segments])
        for text in found[-1]:
            _check_length(text or [], "a text", sample_id, max_tokens)
    return found


def _check_length(text: Sequence[int], what: str, sample_id: int, max_tokens: int) -> None:
    if len(text) > max_tokens - 2:
        raise UserError(
            f"model.max_text_tokens: expected at least {len(text) + 2}, the tokens of {what} of sample "
            f"{sample_id % (1 << FOLDER_BIT)} and the two that frame it, got {max_tokens}; raise it, or shorten that"
        )
