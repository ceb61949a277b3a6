"""Texts <-> token ids: the door to Hugging Face's `tokenizers`.

A text becomes [BEGIN, its tokens, END or IMAGE]: the last token says whether the sample ends or an image follows, so
that a model can decide to draw one. Any `tokenizer.json` serves; the special tokens are added where it lacks them.
"""

import hashlib
import json
import math
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from cfpretrain.base.console import UserError, one_line
from cfpretrain.base.files import read_text

PAD, BEGIN, END, IMAGE = "<|pad|>", "<|text|>", "<|end|>", "<|image|>"
SPECIAL = (PAD, BEGIN, END, IMAGE)
_UNKNOWN = ("<unk>", "[UNK]")  # what tokenizers call the token of all that they have none for
_MAX_BYTES = 64 * 2**20  # of a tokenizer.json; those of 250,000 tokens have 20 MB
_MAX_DOUBLINGS = 16  # of a text's bytes, by the steps of a tokenizer one after another


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
        self.size: int = 1 + max(tokenizer.get_vocab().values())  # some files leave ids out
        self.pad, self.begin, self.end, self.image = map(tokenizer.token_to_id, SPECIAL)

    @classmethod
    def load(cls, file: Path, key: str, is_trained: bool = False, follow: bool = True) -> "TextTokenizer":
        """Of a `tokenizer.json`.

        Args:
            file: its path, which may be a link if `follow`.
            key: the config key or option that gave it.
            is_trained: a model was trained with it, so that it has the special tokens already.
        """
        try:
            return cls.from_json(read_text(file, _MAX_BYTES, follow), is_trained)
        except FileNotFoundError as error:
            raise UserError(f"{key}: expected a tokenizer.json, but {file} does not exist") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{key}: {file} cannot be read as a tokenizer.json ({one_line(error):.200})") from error

    @classmethod
    def load_trained(
        cls, file: Path, key: str, vocabulary: int, fingerprint: str = "", follow: bool = True
    ) -> "TextTokenizer":
        """The one that a model of so many token ids was trained with; `fingerprint`: its own, where that is known."""
        found = cls.load(file, key, is_trained=True, follow=follow)
        if found.size != vocabulary or fingerprint not in ("", found.fingerprint):
            raise UserError(
                f"{key}: expected the tokenizer that the model was trained with, of {vocabulary} token ids, in {file}, "
                f"got another, of {found.size}; put that one there"
            )
        return found

    @classmethod
    def from_json(cls, text: str, is_trained: bool = False) -> "TextTokenizer":
        """Of the content of a `tokenizer.json`; ValueError where it is none. See `load`."""
        with _as_value_error():
            found = Tokenizer.from_str(text)
            missing = [name for name in SPECIAL if is_trained and found.token_to_id(name) is None]
            if missing:
                raise ValueError(f"it lacks the special token {missing[0]}")
            dropout = json.loads(found.model.__getstate__()).get("dropout")
            if dropout:
                raise ValueError(f"its dropout of {dropout} gives a text other tokens each time; set it to null")
            for part in (found.normalizer, found.pre_tokenizer, found.decoder):
                if part is not None and _doublings(json.loads(part.__getstate__())) > _MAX_DOUBLINGS:
                    raise ValueError(f"its {type(part).__name__} could make more than {2**_MAX_DOUBLINGS} bytes of one")
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

    def name_of(self, number: int) -> str:
        """How a token is written in the file."""
        return str(self._tokenizer.id_to_token(number))

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides which ids a text has, whatever the layout of its file."""
        plain = json.dumps(json.loads(self.to_json()), sort_keys=True)
        return hashlib.blake2b(plain.encode(), digest_size=16).hexdigest()

    @property
    def marks(self) -> tuple[int, int, int, int]:
        """The tokens that frame texts, in the order of `core.texts.Marks`."""
        return self.begin, self.end, self.image, self.pad

    def unknown_part(self, text: str) -> str:
        """The first part of a text that its tokens do not say; "" where they say all."""
        unknown = {self._tokenizer.token_to_id(name) for name in _UNKNOWN} - {None}
        found = self._tokenizer.encode(text, add_special_tokens=False)
        for id, (begin, end) in zip(found.ids, found.offsets, strict=True):
            if id in unknown:
                return text[begin:end]
        # Others leave out what they have no token for. Blanks, accents and marks of direction may be so on purpose.
        needed = [one for one in dict.fromkeys(text) if unicodedata.category(one)[0] not in "ZMC"]
        return next((one for one in needed if not self.encode(one)), "")

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without the special ones around it; ValueError where it cannot be written in them."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of several texts."""
        for text in texts:
            text.encode()  # of a lone surrogate the package says nothing that helps
        with _as_value_error():
            return [list(one.ids) for one in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens up to the first that ends it; special tokens say nothing."""
        ends = [i for i, id in enumerate(ids) if id in (self.end, self.image)]
        text: str = self._tokenizer.decode(list(ids[: ends[0]] if ends else ids), skip_special_tokens=True)
        return text


@contextmanager
def _as_value_error() -> Iterator[None]:
    """Turns whatever the package raises into ValueError; a panic of its Rust code is no `Exception`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ValueError(str(error)) from error


def _doublings(step: Any) -> float:
    """How often a step may double the bytes of a text, nearly: a short file of many steps could fill any memory."""
    steps = [one for value in step.values() if isinstance(value, list) for one in value if isinstance(one, dict)]
    if steps:
        return sum(map(_doublings, steps))
    kind = step.get("type")
    if kind in ("Replace", "Prepend"):
        return math.log2(1 + len(str(step.get("content", step.get("prepend"))).encode()))
    return 4 if kind in ("NFKC", "NFKD", "Precompiled") else 1
