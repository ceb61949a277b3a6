"""Which class a word on a command line means: by name or number."""

import difflib
import unicodedata
from collections.abc import Sequence

_NUM_NAMES_SHOWN = 10
_BY_NAME, _BY_INDEX = "name:", "index:"


def label_of(text: str, names: Sequence[str]) -> int:
    """The class of a word: its name, its number, or `name:...` or `index:...`.

    Args:
        names: of the classes, by number.

    Raises:
        ValueError: no class, or more than one: a name that several have, or one that is also the number of another.
    """
    by_name, by_index = _named(text, names), _numbered(text, names)
    if text.startswith(_BY_NAME):
        by_name = _named(text.removeprefix(_BY_NAME), names) or by_name
    elif text.startswith(_BY_INDEX):
        by_index = _numbered(text.removeprefix(_BY_INDEX), names)
        by_name = [] if by_index else by_name
    found = sorted({*by_name, *by_index})
    if len(found) == 1:
        return found[0]
    if len(by_name) > 1:
        choices = " or ".join(f"{_BY_INDEX}{i}" for i in by_name)
        raise ValueError(f"{text!r} is the name of classes {', '.join(map(str, by_name))}; give {choices}")
    if found:
        raise ValueError(
            f"{text!r} is the name of class {by_name[0]}, and class {by_index[0]} is {names[by_index[0]]!r}; "
            f"give {_BY_NAME}{text} or {_BY_INDEX}{text}"
        )
    raise ValueError(f"expected a name, or a number from 0 to {len(names) - 1}, got {text!r}; {_advice(text, names)}")


def _named(text: str, names: Sequence[str]) -> list[int]:
    """The classes of exactly this name; else those of one that differs in case or in how accents are coded."""
    exact = [i for i, name in enumerate(names) if name == text]
    return exact or [i for i, name in enumerate(names) if _folded(name) == _folded(text)]


def _numbered(text: str, names: Sequence[str]) -> list[int]:
    # No class has a number of thousands of digits, which python refuses to read.
    is_number = text.isascii() and text.isdecimal() and len(text) < 20
    return [int(text)] if is_number and int(text) < len(names) else []


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


def _advice(text: str, names: Sequence[str]) -> str:
    wanted = _folded(text.removeprefix(_BY_NAME))
    by_folded = {_folded(name): name for name in names}
    # "tench" is far from "tench, Tinca tinca" by the letters that differ.
    holding = [folded for folded in by_folded if wanted and wanted in folded]
    near = [by_folded[folded] for folded in holding or difflib.get_close_matches(wanted, by_folded, cutoff=0.5)]
    if near:
        return f"did you mean {' or '.join(map(repr, near[:3]))}?"
    return f"names are {', '.join(names[:_NUM_NAMES_SHOWN])}" + ", ..." * (len(names) > _NUM_NAMES_SHOWN)
