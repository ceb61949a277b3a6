"""Typed dataclasses from YAML files and `key.sub=value` overrides, with the file that each value came from.

It knows no key: what there is, of which type, the dataclass says (or a TypedDict, of what stays a dict). A text is a
path where its type is `FilePath`.

Files and overrides that a user wrote may refer to keys, and to the environment where that is allowed; files that were
recorded hold values alone. Nothing else is resolved: omegaconf has resolvers that import modules.
"""

import dataclasses
import difflib
import functools
import io
import itertools
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from omegaconf import OmegaConf

from cfpretrain.base.console import UserError, excerpt, hide, masked, one_line
from cfpretrain.base.files import read_text

FilePath = Annotated[str, "path"]  # of this machine, with `~` for a home
Address = Annotated[str, "address"]  # a path, or an address such as s3://bucket/folder

COMMAND_LINE = "command line"
# Larger than any real config; the readers of YAML take a second for a hundred kilobytes, and recurse.
_MAX_BYTES, _MAX_DEPTH, _MAX_VALUES = 2**18, 16, 5_000
_LARGEST = 2**63 - 1
_MOST_PROBLEMS = 10  # in one message
_LONGEST_VALUE = 200  # characters
# YAML 1.1 reads 0100 as 64, and 1:30 as 90.
_OCTAL, _SEXAGESIMAL = re.compile(r"[-+]?0[0-9_]+"), re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_KEY_REFERENCE = re.compile(r"\$\{[A-Za-z_][\w.\[\]]*\}")
_ENV_REFERENCE = re.compile(r"\$\{oc\.env:(\w+)(,[^${}]*)?\}")
_SHELL_VARIABLE = re.compile(r"\$[A-Za-z_]\w*")
_UNIONS = (types.UnionType, typing.Union)  # of plain types, and of annotated ones
_TRUE_OR_FALSE = dict.fromkeys(("true", "yes", "on"), True) | dict.fromkeys(("false", "no", "off"), False)


class Range(NamedTuple):
    """What a number may be, of a field's type `Annotated[int, Range(1)]`; none may be infinite or NaN."""

    low: float
    high: float = math.inf


class Origin(NamedTuple):
    """Where a value came from: later places win."""

    place: int
    name: str


class Problem(NamedTuple):
    """What is wrong with a key, or with what stands in its place."""

    key: tuple[Any, ...]
    text: str

    def __str__(self) -> str:
        key = ".".join(excerpt(str(name), _LONGEST_VALUE) for name in self.key)
        return f"{key if self.key else 'the file'}: {self.text}"


class _TooManyProblemsError(Exception):
    """More than a message holds: the rest is not looked at."""


def load(
    kind: type,
    paths: str | Path | Sequence[str | Path],
    overrides: Sequence[str],
    allow_env: bool = False,
    is_recorded: Callable[[Path], bool] = lambda _: False,
) -> tuple[Any, dict[str, Origin]]:
    """Reads YAML files and overrides into a dataclass of dataclasses.

    Args:
        kind: the dataclass.
        paths: one file or several; where two set the same key, the later one wins.
        overrides: win over all files.
        allow_env: whether `${oc.env:NAME}` is read; what it says is hidden from then on (`console.hide`).
        is_recorded: of a file, whether it holds values alone, so that `${` is refused in it.

    Returns:
        The dataclass, and for each key that is set ("section.name") where its value came from.

    Raises:
        UserError: a file is missing or not YAML; unknown keys and wrong types, all in one message.
    """
    files = [paths] if isinstance(paths, str | Path) else list(paths)
    trees = [(str(path), _read(path)) for path in files]
    if overrides:
        trees.append((COMMAND_LINE, _parse_overrides(overrides)))
    for name, tree in trees:  # omegaconf would not say which key holds what cannot be merged
        parts: Any = OmegaConf.to_container(tree)
        _raise_all([(name, _no_keys((key,), part)) for key, part in parts.items() if isinstance(part, list)])
        recorded = name != COMMAND_LINE and is_recorded(Path(name))
        _raise_all([(name, problem) for problem in _check_references(parts, (), recorded, allow_env)])
    try:
        plain = OmegaConf.to_container(OmegaConf.merge(*(tree for _, tree in trees)), resolve=True)
    except Exception as error:  # omegaconf raises errors of its own classes
        hint = (
            "; it refers to a key of these files, or as ${oc.env:NAME} to the environment, with --allow-env"
            if "Interpolation" in str(error)
            else ""
        )
        named = " + ".join(str(path) for path in files)
        raise UserError(f"config file {named} cannot be read: {one_line(error)}{hint}") from error
    origins: dict[tuple[Any, ...], Origin] = {}
    for place, (name, tree) in enumerate(trees):
        origins |= dict.fromkeys(_keys_of(OmegaConf.to_container(tree)), Origin(place, name))
    problems: list[Problem] = []
    loaded = None
    with suppress(_TooManyProblemsError):
        loaded = _build(kind, plain, (), problems)
    _raise_all([(_origin(problem.key, origins).name, problem) for problem in problems])
    return loaded, {".".join(key): origin for key, origin in origins.items() if len(key) > 1}


def from_plain(kind: Any, plain: Any, source: str, ignore_unknown: bool = False) -> Any:
    """Builds a dataclass, or a value of another type, from plain values such as JSON's.

    Args:
        kind: the type.
        plain: nested dicts.
        source: the file, for messages.
        ignore_unknown: whether keys that the type does not have are left out; only those on top.

    Raises:
        UserError: unknown keys, wrong types and numbers out of range, all in one message.
    """
    if ignore_unknown and isinstance(plain, dict) and _has_keys(kind):
        plain = {name: value for name, value in plain.items() if name in _hints(kind)}
    problems: list[Problem] = []
    built = None
    with suppress(_TooManyProblemsError):
        built = _convert(plain, kind, (), problems)
    _raise_all((source, problem) for problem in problems or out_of_range(built, kind))
    return built


def out_of_range(value: Any, hint: Any, key: tuple[str, ...] = ()) -> Iterator[Problem]:
    """The numbers in a value of a type, e.g. a dataclass of dataclasses, that its `Range`s do not allow."""
    for bounds in getattr(hint, "__metadata__", ()):
        if isinstance(bounds, Range):
            yield from in_range(key, value, *bounds)
    for name, part, of_part in _parts(value, hint):
        yield from out_of_range(part, of_part, (*key, *name))


def _parts(value: Any, hint: Any) -> Iterable[tuple[tuple[str, ...], Any, Any]]:
    """What a value of a type consists of: where it has one the name of each part, the part and its type."""
    inner = typing.get_args(hint)
    if _has_keys(hint):
        found = value if isinstance(value, dict) else vars(value)
        return [((name,), found[name], of_name) for name, of_name in _hints(hint).items() if name in found]
    if typing.get_origin(hint) in _UNIONS:  # with None
        return [] if value is None else [((), value, inner[0])]
    if inner and isinstance(value, dict):
        return [((name,), part, inner[1]) for name, part in value.items()]
    return [((), part, inner[0]) for part in value] if inner and isinstance(value, list | tuple) else []


def in_range(key: tuple[str, ...], value: float, low: float, high: float = math.inf) -> Iterator[Problem]:
    """The problem with a number that is not finite, or not from `low` to `high`; none where it is."""
    if not (math.isfinite(value) and low <= value <= high):
        wanted = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
        yield Problem(key, f"expected {wanted}, got {value}")


def refuse_references(plain: Any, source: str) -> None:
    """Raises UserError where recorded values hold `${`, which nothing may resolve."""
    _raise_all((source, problem) for problem in _check_references(plain, (), True, False))


def to_plain(config: Any) -> dict[str, Any]:
    """The dataclass as nested dicts of plain values, tuples as lists: what YAML and JSON can hold."""
    plain = OmegaConf.to_container(OmegaConf.create(dataclasses.asdict(config)))
    return typing.cast(dict[str, Any], plain)


def to_shown(config: Any) -> dict[str, Any]:
    """As `to_plain`, for people and services: of what came from the environment, its name (`console.masked`)."""
    return typing.cast(dict[str, Any], _masked(to_plain(config)))


def without_texts(config: Any) -> dict[str, Any]:
    """As `to_plain`, for strangers: without paths, addresses and names, which are of the machine that trained."""
    hints = {name: _hints(kind) for name, kind in _hints(config.__class__).items()}
    return {
        section: {key: value for key, value in values.items() if not _is_text(hints[section][key])}
        for section, values in to_plain(config).items()
    }


def to_yaml(config: Any) -> str:
    """The dataclass, or what `to_plain` and the like made of one, as YAML, loadable again."""
    plain = config if isinstance(config, dict) else to_plain(config)
    return OmegaConf.to_yaml(OmegaConf.create(plain))


def _masked(plain: Any) -> Any:
    if isinstance(plain, dict):
        return {key: _masked(value) for key, value in plain.items()}
    if isinstance(plain, list | tuple):
        return [_masked(value) for value in plain]
    return masked(plain) if isinstance(plain, str) else plain


def _is_text(hint: Any) -> bool:
    item = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint
    return item in (str, FilePath, Address)


def _check_references(plain: Any, key: tuple[Any, ...], recorded: bool, allow_env: bool) -> Iterator[Problem]:
    """What may not be resolved; hides what the environment says where the rest is read from it."""
    if isinstance(plain, dict | list):
        for name, value in plain.items() if isinstance(plain, dict) else [("", value) for value in plain]:
            if "${" in str(name):
                yield Problem(key, f"expected the name of a key, got {excerpt(str(name), _LONGEST_VALUE)}")
            yield from _check_references(value, (*key, name) if name else key, recorded, allow_env)
    elif isinstance(plain, str) and "${" in plain:
        if recorded:
            yield Problem(key, f"expected a value, as a run records it, got {plain!r:.100}; write what it stands for")
            return
        names = [found[1] for found in _ENV_REFERENCE.finditer(plain)]
        if "${" in _KEY_REFERENCE.sub("", _ENV_REFERENCE.sub("", plain)):
            yield Problem(key, f"expected ${{section.key}} or ${{oc.env:NAME}}, got {plain!r:.100}")
        elif names and not allow_env:
            yield Problem(key, f"the environment is only read with --allow-env, got {plain!r:.100}")
        for name in names if allow_env else ():
            hide(os.environ.get(name, ""), f"${{oc.env:{name}}}")


def _raise_all(found: Iterable[tuple[str, Problem]]) -> None:
    problems = list(itertools.islice(found, _MOST_PROBLEMS + 1))
    count = f"{len(problems)} problems: " if len(problems) > 1 else ""
    if len(problems) > _MOST_PROBLEMS:
        problems, count = problems[:_MOST_PROBLEMS], f"more than {_MOST_PROBLEMS} problems: "
    sources = {source for source, _ in problems}
    if len(sources) == 1:
        raise UserError(f"{sources.pop()}: {count}{' | '.join(str(problem) for _, problem in problems)}")
    if problems:
        raise UserError(f"{count}{' | '.join(f'{source}: {problem}' for source, problem in problems)}")


# ---------------------------------------------------------------------------------------------------------------------
# Texts


def _read(path: str | Path) -> Any:
    try:
        text = read_text(Path(path).expanduser(), _MAX_BYTES)
    except (FileNotFoundError, RuntimeError) as error:  # the latter of ~somebody
        raise UserError(
            f"config file {path} does not exist; give the path of a YAML file, e.g. configs/tiny.yaml"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path} cannot be read: {one_line(error)}") from error
    try:
        traps = list(_traps(_compose(text), ()))
        _raise_all([(str(path), problem) for problem in traps])
        tree = OmegaConf.load(io.StringIO(text))
    except UserError:
        raise
    except Exception as error:  # omegaconf and yaml raise errors of their own classes
        raise UserError(f"config file {path} cannot be read: {one_line(error)}") from error
    if not OmegaConf.is_dict(tree):
        raise UserError(f"{path}: the file: expected keys with values, got {OmegaConf.to_container(tree)!r}")
    return tree


def _parse_overrides(overrides: Sequence[str]) -> Any:
    traps: list[Problem] = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip() or text.startswith("-"):
            raise UserError(f"argument {text!r} is not understood; overrides look like train.num_steps=100")
        try:
            traps += _traps(_compose(value), tuple(key.split(".")))
        except Exception as error:  # as in `_read`
            raise UserError(f"the overrides {' '.join(overrides)} cannot be read: {one_line(error)}") from error
    _raise_all([(COMMAND_LINE, problem) for problem in traps])
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except Exception as error:  # as in `_read`
        raise UserError(f"the overrides {' '.join(overrides)} cannot be read: {one_line(error)}") from error


def _compose(text: str) -> yaml.Node | None:
    """The nodes of YAML; ValueError where it nests too deep for its readers, or its aliases stand for too much."""
    num_values, opened, sizes = 0, [], {}  # values so far; before each open collection; of what has an anchor
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, num_values))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            sizes[anchor] = num_values - before
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in dict(opened):
                raise ValueError(f"*{event.anchor} is part of what it stands for")
            num_values += sizes.get(event.anchor, 0)
        num_values += 1
        if len(opened) > _MAX_DEPTH or num_values > _MAX_VALUES:
            raise ValueError(f"expected at most {_MAX_DEPTH} levels and {_MAX_VALUES:,} values, got more")
    node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    return node


def _traps(node: yaml.Node | None, key: tuple[Any, ...]) -> Iterator[Problem]:
    """Values that are read as others than stand there."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield from _traps(value, (*key, name.value))
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _traps(item, key)
    elif isinstance(node, yaml.ScalarNode) and node.style is None:
        if _OCTAL.fullmatch(node.value):
            yield Problem(key, f"expected a number without a leading 0 (octal to YAML), got {node.value}; quote a text")
        elif node.value == "???":  # omegaconf takes the key for one that is not there
            yield Problem(key, "expected a value, got ???; give one, or leave the key out for its default")
        elif _SEXAGESIMAL.fullmatch(node.value):
            yield Problem(key, f"expected a number, got {node.value}, which YAML counts in sixties; quote it if a text")


def _keys_of(plain: Any, key: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield key
    for name, value in plain.items() if isinstance(plain, dict) else ():
        yield from _keys_of(value, (*key, name))


def _origin(key: tuple[Any, ...], origins: Mapping[tuple[Any, ...], Origin]) -> Origin:
    # What an interpolation brought has the place of the key that holds it.
    return next(origins[key[:end]] for end in range(len(key), -1, -1) if key[:end] in origins)


# ---------------------------------------------------------------------------------------------------------------------
# Types


def _note(problems: list[Problem], problem: Problem) -> None:
    problems.append(problem)
    if len(problems) > _MOST_PROBLEMS:
        raise _TooManyProblemsError


def _build(kind: type, plain: Any, key: tuple[Any, ...], problems: list[Problem]) -> Any:
    if not isinstance(plain, dict):
        _note(problems, _no_keys(key, plain))
        return None
    hints = _hints(kind)
    values = {}
    for name, value in plain.items():
        path, hint = (*key, name), hints.get(name)
        if hint is None:
            _note(problems, Problem(path, f"unknown key{_suggest(excerpt(str(name), _LONGEST_VALUE), hints, key)}"))
        else:
            values[name] = _convert(value, hint, path, problems)
    missing = [name for name in hints if name not in plain and _is_required(kind, name)]
    for name in missing:
        _note(problems, Problem((*key, name), "missing"))
    return None if missing else kind(**values)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    """The type of each key; kept, since an index has thousands of entries of one kind."""
    return typing.get_type_hints(kind, include_extras=True)


def _has_keys(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint) or typing.is_typeddict(hint)


def _is_required(kind: Any, name: str) -> bool:
    if typing.is_typeddict(kind):
        return name in kind.__required_keys__
    field = kind.__dataclass_fields__[name]
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _no_keys(key: tuple[Any, ...], value: Any) -> Problem:
    got = "nothing; leave the key out" if value is None else _shown(value)
    return Problem(key, f"expected keys with values, got {got}")


def _suggest(name: str, known: Mapping[str, Any], key: tuple[Any, ...]) -> str:
    section, _, rest = name.partition(".")
    if rest and not key and section in known:
        return f"; in a file, write {section}: and {rest}: below it, two spaces further in"
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {'.'.join((*key, near[0]))}?" if near else f"; known here: {', '.join(known)}"


def _convert(value: Any, hint: Any, key: tuple[Any, ...], problems: list[Problem]) -> Any:
    """`value` as the type `hint`; appends to `problems` where it is not of that type."""
    if type(value) is hint and (
        hint is float or (hint is str and "\0" not in value) or (hint is int and abs(value) <= _LARGEST)
    ):
        return value  # at once: a file may hold a million
    if hint not in (FilePath, Address):
        hint = typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint
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
        if origin is Literal:
            return _choice(value, inner)
        if hint in (FilePath, Address):
            text = _text(value)
            return text if "://" in text and hint == Address else _path(text)
        return {int: _whole, float: _number, bool: _true_or_false, str: _text, type(None): _nothing}[hint](value)
    except ValueError as error:
        _note(problems, Problem(key, str(error)))
        return value


def _convert_items(
    value: Any, kind: type, inner: tuple[Any, ...], key: tuple[Any, ...], problems: list[Problem]
) -> Any:
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


def _choice(value: Any, choices: Iterable[Any]) -> Any:
    if value not in choices:
        raise ValueError(f"expected one of {', '.join(map(str, choices))}; got {_shown(value)}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value:  # which no path may hold, nor anything that is shown
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
    if is_number or (isinstance(value, str) and not _OCTAL.match(value.strip())):
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
