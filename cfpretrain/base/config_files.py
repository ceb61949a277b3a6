"""Dataclasses of knobs from YAML files and `key.sub=value` overrides, and back to plain values and YAML.

Files and overrides that a user wrote may refer to keys, and to the environment where that is allowed; files that were
recorded hold values alone. Nothing else is resolved: omegaconf has resolvers that import modules.
"""

import dataclasses
import io
import json
import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf

from cfpretrain.base.console import UserError, hide, masked, one_line
from cfpretrain.base.files import read_text
from cfpretrain.base.typed import OCTAL, Address, FilePath, Key, Problem, convert, hints_of, raise_all

COMMAND_LINE = "command line"
# Larger than any real config; the readers of YAML take a second for a hundred kilobytes, and recurse.
_MAX_BYTES, _MAX_DEPTH, _MAX_VALUES = 2**18, 16, 5_000
_SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")  # YAML 1.1 reads 1:30 as 90
_KEY_REFERENCE = re.compile(r"\$\{[A-Za-z_][\w.\[\]]*\}")
_ENV_REFERENCE = re.compile(r"\$\{oc\.env:(\w+)(,[^${}]*)?\}")


class Origin(NamedTuple):
    """Where a value came from: later places win."""

    place: int
    name: str


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
        allow_env: whether `${oc.env:NAME}` is read; its value is hidden from then on (`console.hide`).
        is_recorded: of a file, whether it holds values alone, so that `${` is refused in it.

    Returns:
        The dataclass, and for each key that is set ("section.name") where its value came from.
    """
    files = [paths] if isinstance(paths, str | Path) else list(paths)
    trees = [(str(path), _read(path)) for path in files]
    if overrides:
        trees.append((COMMAND_LINE, _parse_overrides(overrides)))
    tree: Any = {}
    origins: dict[Key, Origin] = {}
    for place, (name, part) in enumerate(trees):
        recorded = name != COMMAND_LINE and is_recorded(Path(name))
        raise_all([(name, problem) for problem in _check_references(part, (), recorded, allow_env)])
        tree = _merge(tree, part)
        origins |= dict.fromkeys(_keys_of(part), Origin(place, name))
    try:
        plain = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except Exception as error:  # omegaconf raises errors of its own classes
        hint = "; it refers to a key of these files, or as ${oc.env:NAME} to the environment, with --allow-env"
        named = " + ".join(str(path) for path in files)
        raise UserError(f"config file {named} cannot be read: {one_line(error)}{hint}") from error
    loaded, problems = convert(kind, plain)
    raise_all([(_origin(problem.key, origins).name, problem) for problem in problems])
    return loaded, {".".join(key): origin for key, origin in origins.items() if len(key) > 1}


def _merge(under: Any, over: Any) -> Any:
    """`over` on top of `under`: groups of keys are joined, all else is replaced."""
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return over
    return {**under, **{name: _merge(under.get(name), value) for name, value in over.items()}}


def _keys_of(plain: Any, key: Key = ()) -> Iterator[Key]:
    yield key
    for name, value in plain.items() if isinstance(plain, dict) else ():
        yield from _keys_of(value, (*key, name))


def _origin(key: Key, origins: Mapping[Key, Origin]) -> Origin:
    # The value of a reference has the origin of the key that holds the reference.
    return next(origins[key[:end]] for end in range(len(key), -1, -1) if key[:end] in origins)


def refuse_references(plain: Any, source: str) -> None:
    """Raises UserError where recorded values hold `${`, which nothing may resolve."""
    raise_all((source, problem) for problem in _check_references(plain, (), True, False))


def _check_references(plain: Any, key: Key, recorded: bool, allow_env: bool) -> Iterator[Problem]:
    """References that may not be resolved; hides the values of the environment that the others bring."""
    if isinstance(plain, dict | list):
        for name, value in plain.items() if isinstance(plain, dict) else [("", value) for value in plain]:
            if "${" in str(name):
                yield Problem(key, f"expected the name of a key, got {str(name)!r:.100}")
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


# ---------------------------------------------------------------------------------------------------------------------
# Texts


def _read(path: str | Path) -> dict[Any, Any]:
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
        tree: Any = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except Exception as error:  # omegaconf and yaml raise errors of their own classes
        raise UserError(f"config file {path} cannot be read: {one_line(error)}") from error
    raise_all([(str(path), problem) for problem in traps])
    if not isinstance(tree, dict):
        raise UserError(f"{path}: the file: expected keys with values, got {tree!r}")
    return tree


def _parse_overrides(overrides: Sequence[str]) -> Any:
    traps: list[Problem] = []
    try:
        for text in overrides:
            key, equals, value = text.partition("=")
            if not equals or not key.strip() or text.startswith("-"):
                raise UserError(f"argument {text!r} is not understood; overrides look like train.num_steps=100")
            traps += _traps(_compose(value), tuple(key.split(".")))
        tree = OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))
    except UserError:
        raise
    except Exception as error:  # as in `_read`
        raise UserError(f"the overrides {' '.join(overrides)} cannot be read: {one_line(error)}") from error
    raise_all([(COMMAND_LINE, problem) for problem in traps])
    return tree


def _compose(text: str) -> yaml.Node | None:
    """The nodes of YAML; ValueError where it nests too deep for its readers, or its aliases stand for too much."""
    num_values, opened, sizes = 0, [], {}  # values so far; before each open collection; of each anchor
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


def _traps(node: yaml.Node | None, key: Key) -> Iterator[Problem]:
    """Values that YAML 1.1 or omegaconf reads as something else than they look like."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield from _traps(value, (*key, name.value))
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _traps(item, key)
    elif isinstance(node, yaml.ScalarNode) and node.style is None:
        if OCTAL.fullmatch(node.value):
            yield Problem(key, f"expected a number without a leading 0 (octal to YAML), got {node.value}; quote a text")
        elif node.value == "???":  # omegaconf takes the key for one that is not there
            yield Problem(key, "expected a value, got ???; give one, or leave the key out for its default")
        elif _SEXAGESIMAL.fullmatch(node.value):
            yield Problem(key, f"expected a number, got {node.value}, which YAML counts in sixties; quote it if a text")


# ---------------------------------------------------------------------------------------------------------------------
# Back to plain values


def to_plain(config: Any) -> dict[str, Any]:
    """The dataclass as nested dicts of plain values, tuples as lists: what YAML and JSON can hold."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def to_shown(config: Any) -> dict[str, Any]:
    """As `to_plain`, for people and services: values of the environment are replaced by their names."""
    return typing.cast(dict[str, Any], _masked(to_plain(config)))


def _masked(plain: Any) -> Any:
    if isinstance(plain, dict):
        return {key: _masked(value) for key, value in plain.items()}
    if isinstance(plain, list):
        return [_masked(value) for value in plain]
    return masked(plain) if isinstance(plain, str) else plain


def without_texts(config: Any) -> dict[str, Any]:
    """As `to_plain`, for strangers: without paths, addresses and names, which are of the machine that trained."""
    plain = to_plain(config)
    for section, kind in hints_of(config.__class__).items():
        for key, hint in hints_of(kind).items():
            item = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint
            if item in (str, FilePath, Address):
                del plain[section][key]
    return plain


def to_yaml(config: Any) -> str:
    """The dataclass, or what `to_plain` and the like made of one, as YAML, loadable again."""
    plain = config if isinstance(config, dict) else to_plain(config)
    return OmegaConf.to_yaml(OmegaConf.create(plain))
