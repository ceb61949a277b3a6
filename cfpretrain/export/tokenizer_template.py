"""The tokenizer of CausalFusion (arXiv 2412.12095): what its texts are to the model, by the package `tokenizers` alone.

That is what it was trained with, and what reads a `tokenizer.json` whole. `transformers` reads one too, but takes the
names of special tokens in a text for these tokens, and need not be installed beside diffusers.
"""

import os
from pathlib import Path
from typing import Any

from cfpretrain.data.tokenizer import TextTokenizer
from cfpretrain.export.plain_files import put_text

TOKENIZER_FILE = "tokenizer.json"


class CausalFusionTokenizer(TextTokenizer):
    """Texts <-> token ids, as diffusers loads a part of a pipeline."""

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **_: Any) -> TextTokenizer:
        """Of a folder with a tokenizer.json."""
        return cls.load(Path(folder, TOKENIZER_FILE), "tokenizer", is_trained=True)

    def save_pretrained(self, folder: str | os.PathLike[str], **_: Any) -> None:
        """Writes the same into a folder."""
        put_text(Path(folder, TOKENIZER_FILE), self.to_json())
