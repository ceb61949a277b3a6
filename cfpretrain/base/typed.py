"""Typed values from plain ones, such as JSON and YAML hold: dataclasses, TypedDicts, tuples, numbers within a range.

A text of the type `FilePath` is a path of this machine. One message names all problems of a value.
"""

import dataclasses
import difflib
import functools
import itertools
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Annotated, Any, Literal, NamedTuple

from cfpretrain.base.console import UserError, excerpt

FilePath = Annotated[str, "path"]  # of this machine, with `~` for a home
Address = Annotated[str, "address"]  # a path, or an address such as s3://bucket/folder

_LARGEST = 2**63 - 1
_MOST_PROBLEMS = 10  # in one message
_LONGEST_VALUE = 200  # characters
OCTAL = re.compile(r"[-+]?0[0-9_]+")  # to YAML 1.1, which reads 0100 as 64
_SHELL_VARIABLE = re.compile(r"\$[A-Za-z_]\w*")
_UNIONS = (types.UnionType, typing.Union)  # of plain types, and of annotated ones
_TRUE_OR_FALSE = dict.fromkeys(("true", "yes", "on"), True) | dict.fromkeys(("false", "no", "off"), False)

Key = tuple[Any, ...]  # names from the outermost to the innermost


class Range(NamedTuple):
    """What a number may be, of a type `Annotated[int, Range(1)]`; none may be infinite or NaN."""

    low: float
    high: float = math.inf

    def check(self, value: float) -> None:
        """ValueError where the number is outside."""
        if not (math.isfinite(value) and self.low <= value <= self.high):
            wanted = f"at least {self.low:g}" if self.high == math.inf else f"between {self.low:g} and {self.high:g}"
            raise ValueError(f"expected {wanted}, got {value}")


Natural = Annotated[int, Range(0)]
Positive = Annotated[int, Range(1)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]


class Problem(NamedTuple):
    """What is wrong with the value of a key."""

    key: Key
    text: str

    def __str__(self) -> str:
        key = ".".join(excerpt(str(name), _LONGEST_VALUE) for name in self.key)
        return f"{key if self.key else 'the file'}: {self.text}"


class _TooManyProblemsError(Exception):
    """More than a message holds: the rest is not looked at."""


def from_plain(kind: Any, plain: Any, source: str, ignore_unknown: bool = False) -> Any:
    """A value of the type `kind`; UserError names all unknown keys, wrong types and numbers out of range.

    Args:
        source: the file, for messages.
        ignore_unknown: whether keys that the type does not have are left out; only those of the outermost level.
    """
    if ignore_unknown and isinstance(plain, dict) and _has_keys(kind):
        plain = {name: value for name, value in plain.items() if name in hints_of(kind)}
    value, problems = convert(kind, plain)
    raise_all((source, problem) for problem in problems)
    return value


def convert(kind: Any, plain: Any) -> tuple[Any, list[Problem]]:
    """A value of the type `kind`, and its problems; with some, the value is of no use. Ends with the first too many."""
    problems: list[Problem] = []
    value = None
    with suppress(_TooManyProblemsError):
        value = _convert(plain, kind, (), problems)
    return value, problems


def raise_all(found: Iterable[tuple[str, Problem]]) -> None:
    """Raises problems, each with the name of its file, as one UserError; does nothing without any."""
    problems = list(itertools.islice(found, _MOST_PROBLEMS + 1))
    count = f"{len(problems)} problems: " if len(problems) > 1 else ""
    if len(problems) > _MOST_PROBLEMS:
        problems, count = problems[:_MOST_PROBLEMS], f"more than {_MOST_PROBLEMS} problems: "
    sources = {source for source, _ in problems}
    if len(sources) == 1:
        raise UserError(f"{sources.pop()}: {count}{' | '.join(str(problem) for _, problem in problems)}")
    if problems:
        raise UserError(f"{count}{' | '.join(f'{source}: {problem}' for source, problem in problems)}")


@functools.cache
def hints_of(kind: Any) -> dict[str, Any]:
    """The type of each key; cached, since an index has thousands of entries of one type."""
    return typing.get_type_hints(kind, include_extras=True)


# ---------------------------------------------------------------------------------------------------------------------
# Groups of values


def _note(problems: list[Problem], key: Key, text: str) -> None:
    problems.append(Problem(key, text))
    if len(problems) > _MOST_PROBLEMS:
        raise _TooManyProblemsError


def _convert(value: Any, hint: Any, key: Key, problems: list[Problem]) -> Any:
    """`value` as the type `hint`; appends to `problems` where it is not of that type."""
    if type(value) is hint and (
        hint is float or (hint is str and "\0" not in value) or (hint is int and abs(value) <= _LARGEST)
    ):
        return value  # the fast path: a file may hold a million
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or (value is None and type(None) in (hint, *inner)):
        return value
    if origin in _UNIONS:  # with None
        return _convert(value, inner[0], key, problems)
    if _has_keys(hint):
        return _build(hint, value, key, problems)
    try:
        if origin in (tuple, list, dict):
            return _convert_items(value, origin, inner, key, problems)
        return _convert_one(value, hint)
    except ValueError as error:
        _note(problems, key, str(error))
        return value


def _build(kind: type, plain: Any, key: Key, problems: list[Problem]) -> Any:
    if not isinstance(plain, dict):
        got = "nothing; leave the key out" if plain is None else _shown(plain)
        _note(problems, key, f"expected keys with values, got {got}")
        return None
    hints = hints_of(kind)
    values = {}
    for name, value in plain.items():
        path, hint = (*key, name), hints.get(name)
        if hint is None:
            _note(problems, path, f"unknown key{_suggest(excerpt(str(name), _LONGEST_VALUE), hints, key)}")
        else:
            values[name] = _convert(value, hint, path, problems)
    missing = [name for name in hints if name not in plain and _is_required(kind, name)]
    for name in missing:
        _note(problems, (*key, name), "missing")
    return None if missing else kind(**values)


def _has_keys(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint) or typing.is_typeddict(hint)


def _is_required(kind: Any, name: str) -> bool:
    if typing.is_typeddict(kind):
        return name in kind.__required_keys__
    field = kind.__dataclass_fields__[name]
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _suggest(name: str, known: Mapping[str, Any], key: Key) -> str:
    section, _, rest = name.partition(".")
    if rest and not key and section in known:
        return f"; in a file, write {section}: and {rest}: below it, two spaces further in"
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {'.'.join((*key, near[0]))}?" if near else f"; known here: {', '.join(known)}"


def _convert_items(value: Any, kind: type, inner: tuple[Any, ...], key: Key, problems: list[Problem]) -> Any:
    if kind is dict:
        if not isinstance(value, dict):
            raise _refusal("keys with values", value)
        return {name: _convert(item, inner[1], (*key, name), problems) for name, item in value.items()}
    if kind is list and not isinstance(value, list):
        raise _refusal("a list", value)
    items = value if isinstance(value, list | tuple) else [value]
    if kind is tuple and inner[-1] is not Ellipsis and len(items) != len(inner):
        raise _refusal(f"{len(inner)} values", value)
    return kind(_convert(item, inner[0], key, problems) for item in items)


# ---------------------------------------------------------------------------------------------------------------------
# Single values; ValueError says what was expected


def _convert_one(value: Any, hint: Any) -> Any:
    if hint in (FilePath, Address):
        text = _text(value)
        return text if "://" in text and hint == Address else _path(text)
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        if value not in inner:
            raise ValueError(f"expected one of {', '.join(map(str, inner))}; got {_shown(value)}")
        return value
    if typing.get_origin(hint) is Annotated:
        number = _convert_one(value, inner[0])
        for limit in inner[1:]:
            limit.check(number)
        return number
    return {int: _whole, float: _number, bool: _true_or_false, str: _text, type(None): _nothing}[hint](value)


def _nothing(value: Any) -> None:
    raise _refusal("nothing", value)


def _refusal(expected: str, value: Any, hint: str = "") -> ValueError:
    if value is None:
        return ValueError(
            f"expected {expected}, got nothing, as YAML also reads ~ and null; leave the key out for its default"
        )
    return ValueError(f"expected {expected}, got {_shown(value)}{hint}")


def _shown(value: Any) -> str:
    return excerpt(repr(value), _LONGEST_VALUE)


def _text(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:  # no path may hold NUL, and no terminal shows it
        quoted = f"""; put it in quotes, on a command line in both kinds: "'{value}'\""""
        raise _refusal("a text", value, quoted if isinstance(value, int | float) else "")
    return value


def _path(text: str) -> str:
    if "://" in text:
        raise ValueError(
            f"expected a path of this machine, got the address {_shown(text)}; mount it, or copy there afterwards"
        )
    if _SHELL_VARIABLE.search(text):
        raise ValueError(
            f"expected a path, got {_shown(text)}: only a shell replaces variables; write ~ or ${{oc.env:NAME}}"
        )
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        folder = excerpt(text, _LONGEST_VALUE)
        raise ValueError(f"expected a path, got {folder!r}: there is no such user; a folder of that name is ./{folder}")
    return expanded


def _number(value: Any) -> float:
    """Of a number, or of a text that is one: a number in quotes is the same number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number or (isinstance(value, str) and not OCTAL.match(value.strip())):
        with suppress(ValueError, OverflowError):
            return float(value)
    raise _refusal("a number", value)


def _whole(value: Any) -> int:
    """Of a whole number however it is written: 100, 1e2, 100.0, "100"."""
    try:
        number: float = value if type(value) is int else _number(value)
    except ValueError:
        number = math.nan
    if isinstance(number, float) and not number.is_integer():
        raise _refusal("a whole number", value)
    if abs(number) > _LARGEST:
        raise _refusal(f"a whole number of at most {_LARGEST}", value)
    return int(value) if isinstance(value, str) and value.strip().isdecimal() else int(number)


def _true_or_false(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _TRUE_OR_FALSE:
        return _TRUE_OR_FALSE[value.lower()]
    raise _refusal("true or false", value)
