"""Texts that come into the pipeline of an export: their tokens, within what its model knows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Texts:
    """Texts -> tokens of a model."""

    tokenizer: Any  # a CausalFusionTokenizer
    known: int  # tokens of the longest text that the model knows, the two that frame it among them

    @property
    def marks(self) -> tuple[int, ...]:
        """The tokens that frame texts, as of `core.texts.Marks`."""
        marks: tuple[int, ...] = self.tokenizer.marks
        return marks

    def most(self, max_tokens: int | None) -> int:
        """What `max_tokens` of the pipeline says, checked."""
        if max_tokens is not None and not 2 <= max_tokens <= self.known:
            raise ValueError(
                f"max_tokens: expected 2 to {self.known} (with the two that frame a text), got {max_tokens}"
            )
        return self.known if max_tokens is None else max_tokens

    def encode(self, name: str, texts: Sequence[str], max_tokens: int | None = None) -> list[list[int]]:
        """The tokens of texts without those that frame them; `name` is the argument that gave the texts."""
        most = self.most(max_tokens) - 2
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{name}: expected a text, or at least one, got {texts!r:.100}")
        try:
            tokens: list[list[int]] = self.tokenizer.encode_batch(texts)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        unknown = next(filter(None, map(self.tokenizer.unknown_part, texts)), "")
        if unknown:
            raise ValueError(f"{name}: expected what the model's tokens can say, got {unknown!r}")
        longest = max(map(len, tokens))
        if longest > most:
            raise ValueError(f"{name}: expected at most {most} tokens, got {longest}; shorten the text")
        return tokens


def to_continue(text: Any) -> Any:
    """A text without blanks at its end: a token begins with the blank before its word, so one there would be a word."""
    return text.rstrip() if isinstance(text, str) else text
