"""What takes the place of `base.console` and `base.files` in an export: the standard library alone."""

import os
from pathlib import Path

STAND_INS = dict.fromkeys(("cfpretrain.base.console", "cfpretrain.base.files"), __name__)


class UserError(ValueError):
    """A mistake of the user's, in one line."""


def one_line(error: object) -> str:
    """What an error says."""
    return " ".join(str(error).split())


def read_text(file: Path, max_bytes: int, follow: bool = True) -> str:
    """The content of a file as UTF-8; OSError where it is larger, ValueError where it is no UTF-8.

    The hub's cache is links: they are followed.
    """
    assert follow
    with file.open("rb") as opened:
        content = opened.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise OSError(f"more than {max_bytes} bytes")
    return content.decode()


def put_text(file: Path, text: str) -> None:
    """Writes a file as UTF-8, into a folder that is made where it is not there."""
    os.makedirs(file.parent, exist_ok=True)
    file.write_text(text, encoding="utf-8")
