"""Tables of images: .csv or .jsonl, a row for each image, with the columns `path`, `label` and `caption`.

In place of `path`, `segments` has the texts and images of an interleaved sample (`interleaved.py`): then in every row.

The names of columns are compared without case and outer spaces. An unknown column is an error unless it is ignored by
name: after a typo in `label`, training would silently go on without labels.
"""

import csv
import io
import itertools
import re
import shlex
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from cfpretrain.base.console import UserError
from cfpretrain.base.files import open_to_read, parse_json
from cfpretrain.data.interleaved import column_of, take_apart

TABLES = (".csv", ".jsonl")
UNLABELLED = "unlabelled"  # the one class of a table without labels

_COLUMNS = ("path", "label", "caption", "segments")
_UNREAD = ("index",)  # of the tables that tools/sample.py writes: the number of the class beside its name
_OTHER_NAMES = {
    "path": ("file", "filename", "filepath", "image", "imagepath", "imagefile", "img", "imgpath"),
    "label": ("class", "classname", "classid", "classlabel", "labelid", "category", "target", "species", "tag", "y"),
    "caption": ("text", "prompt", "description", "title"),
    "segments": ("interleaved", "sequence", "parts"),
}
_MEANT_BY = {name: column for column, names in _OTHER_NAMES.items() for name in (column, *names)}
_LIKENESS = 0.75  # of two names, as difflib measures it, from which on one is taken for a typo of the other
# Characters that cannot be written as UTF-8; in a path, which need not be UTF-8, those that no name of a file has.
_UNFIT = {
    "path": re.compile("[\0\ud800-\udc7f\udd00-\udfff]"),
    "label": re.compile("[\0-\x1f\x7f\ud800-\udfff]"),  # it is shown in a line with others
    "caption": re.compile("[\ud800-\udfff]"),
}

_FORMULA = re.compile("'*[=+@\t\r-]")

_Row = tuple[int, tuple[str, ...], list[Any]]  # line, names as they are written, values
_Records = list[tuple[int, dict[str, Any]]]  # (line, value of each known column) of each row


@dataclass(frozen=True)
class Table:
    """The rows of a table, in its order."""

    paths: Sequence[Sequence[str]]  # of the images of each row
    segments: Sequence[str]  # as a shard has them; "" where rows are images
    labels: Sequence[int]
    captions: Sequence[str]
    class_names: tuple[str, ...]
    ignored: Sequence[str]  # columns that were left out because it was asked for


def read_table(file: Path, ignore: Iterable[str] = ()) -> Table:
    """Reads a table.

    Args:
        file: .csv with a first line that names the columns, or .jsonl with an object a line.
        ignore: names of columns that are left out.
    """
    left_out = {_normal(name): name for name in ignore}
    for column in ("path", "segments"):
        if column in left_out:
            raise UserError(f"--ignore-columns: expected columns other than {column}, which says where images are")
    records: _Records = []
    columns: dict[tuple[str, ...], list[str]] = {}  # the known ones, by names as they are written
    for line, names, values in _read_rows(file):
        if names not in columns:
            where = f"{file}" if _is_csv(file) else f"{file}, line {line}"
            columns[names] = _known_columns(where, names, left_out)
        records.append((line, {name: value for name, value in zip(columns[names], values, strict=True) if name}))
    if not records:
        raise UserError(f"images: expected a row for each image in {file}, got none")
    there = dict.fromkeys(name for names in columns for name in names)
    absent = [name for normal, name in left_out.items() if normal not in map(_normal, there)]
    if absent:
        raise UserError(
            f"--ignore-columns: expected columns of {file} ({', '.join(there):.200}), got {', '.join(absent)}; "
            "correct or leave out"
        )
    paths, segments = zip(*(_images(file, line, record) for line, record in records), strict=True)
    if any(segments) and not all(segments):
        line = records[segments.index("")][0]
        raise UserError(f"images: {file}, line {line}: expected segments, as in other rows, got none; add them")
    labels, class_names = _classes(file, records)
    captions = [_text(file, line, record, "caption") for line, record in records]
    ignored = sorted(name.strip() or "without a name" for name in there if _normal(name) in left_out)
    return Table(paths, segments, labels, captions, class_names, ignored)


def _images(file: Path, line: int, record: dict[str, Any]) -> tuple[list[str], str]:
    """The paths of a row's images, and its segments as a shard has them."""
    value = record.get("segments")
    if value in (None, ""):
        return [_text(file, line, record, "path")], ""
    where = f"images: {file}, line {line}: segments"
    if record.get("path"):
        raise UserError(f"{where}: expected no path beside them, got {record['path']!r:.40}; leave one out")
    try:
        segments, paths = take_apart(parse_json(value, tuple) if isinstance(value, str) else value)
        column = column_of(segments)
    except ValueError as error:
        raise UserError(f"{where}: {error}; fix them") from error
    return [_text(file, line, {"path": path}, "path") for path in paths], column


def _is_csv(file: Path) -> bool:
    return file.suffix.lower() == ".csv"


def _read_rows(file: Path) -> Iterator[_Row]:
    try:
        with io.TextIOWrapper(open_to_read(file), encoding="utf-8-sig", newline="") as text:
            yield from _read_csv(file, text) if _is_csv(file) else _read_jsonl(file, text)
    except OSError as error:
        raise UserError(f"images: {file} cannot be read ({error.strerror}); fix it") from error
    except UnicodeDecodeError as error:
        raise UserError(f"images: {file}: expected UTF-8 text ({error}); save it so") from error


def _read_csv(file: Path, text: io.TextIOBase) -> Iterator[_Row]:
    names: tuple[str, ...] = ()
    begin = 1  # of a record; the reader's own count is where it ends
    try:
        head, lines = itertools.tee(text)
        first = next(filter(None, csv.reader(head, strict=True)), [])
        del head  # else the lines would be kept for it
        # Below `path, label`, values do not begin with a space either.
        has_spaces = any(name[:1].isspace() for name in first)
        reader = csv.reader(lines, strict=True, skipinitialspace=has_spaces)
        for values in reader:
            if values and not names:
                names = tuple(values)
                _check_has_path(file, names)
                are_labels = [_normal(name) == "label" for name in names]
            elif values:
                if len(values) != len(names):
                    raise UserError(
                        f"images: {file}, line {begin}: expected {len(names)} values, as the first line names, got "
                        f"{'more' if len(values) > len(names) else 'fewer'}; fix it (quote texts that hold commas)"
                    )
                cells = zip(values, are_labels, strict=True)
                yield begin, names, [from_cell(value) if is_label else value for value, is_label in cells]
            begin = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"images: {file}, line {begin}: expected CSV ({error}); close its quotes, or shorten it"
        ) from error
    if not names:
        _check_has_path(file, names)


def _check_has_path(file: Path, names: Sequence[str]) -> None:
    if {"path", "segments"}.intersection(map(_normal, names)):
        return
    meant = [name for name in names if _meant(name) == "path"]
    got, advice = ", ".join(names) or "nothing", "add it"
    if meant:
        advice = f"rename `{meant[0].strip()}`"
    elif len(names) == 1 and re.search("[;\t]", names[0]):
        advice = "separate columns by commas"
    raise UserError(f"images: {file}: expected a first line that names the column path, got {got:.80}; {advice}")


def _read_jsonl(file: Path, text: io.TextIOBase) -> Iterator[_Row]:
    for line, content in enumerate(text, start=1):
        if not content.strip():
            continue
        try:
            # Pairs: of a key that comes twice a dict would keep the last.
            record = parse_json(content, tuple)
        except ValueError as error:
            raise UserError(f"images: {file}, line {line}: expected one JSON object ({error}); fix it") from error
        if not isinstance(record, tuple):
            got = content.strip()
            raise UserError(f"images: {file}, line {line}: expected one JSON object, got {got:.40}; fix it")
        yield line, tuple(name for name, _ in record), [value for _, value in record]


def _known_columns(where: str, names: Sequence[str], left_out: Collection[str]) -> list[str]:
    """The known column that each name stands for; "" for those that are left out."""
    columns = [_normal(name) for name in names]
    for column in _COLUMNS:
        if columns.count(column) > 1 and column not in left_out:
            raise UserError(
                f"images: {where}: expected one column {column}, got {columns.count(column)} "
                f"({', '.join(names)!r:.80}); remove or rename the others"
            )
    known = (*_COLUMNS, *_UNREAD, *left_out)
    unknown = [name.strip() for name, column in zip(names, columns, strict=True) if column not in known]
    if unknown:
        meant = {name: _meant(name) for name in unknown if _meant(name) and _meant(name) not in columns}
        renames = "".join(f"rename `{name}` to `{column}`, or " for name, column in meant.items())
        named = ", ".join(f"`{name}`" if name else "one without a name" for name in unknown)
        raise UserError(
            f"images: {where}: expected the columns {', '.join(_COLUMNS)}, got {named:.300}; {renames}leave out what "
            f"is not to be read with --ignore-columns {' '.join(map(shlex.quote, unknown)):.300}"
        )
    return ["" if column in (*_UNREAD, *left_out) else column for column in columns]


def as_cell(text: str) -> str:
    """A text as the cell of a table: a spreadsheet would compute `=...`, and shows `'=...` as a text."""
    return f"'{text}" if _FORMULA.match(text) else text


def from_cell(text: str) -> str:
    """The inverse of `as_cell`."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def _normal(name: str) -> str:
    return name.strip().casefold()


def _meant(name: str) -> str:
    """The known column that is most like an unknown name; "" where none is."""
    letters = re.sub("[^a-z0-9]", "", _normal(name))
    near = get_close_matches(letters, _MEANT_BY, 1, _LIKENESS)
    return _MEANT_BY[near[0]] if near else ""


def _text(file: Path, line: int, record: dict[str, Any], column: str) -> str:
    value = record.get(column)
    if not isinstance(value, str | None) or _UNFIT[column].search(value or ""):
        raise UserError(f"images: {file}, line {line}: expected a text as {column}, got {value!r:.40}; fix it")
    if not value and column == "path":
        raise UserError(f"images: {file}, line {line}: expected a path, got none; add it as `path`")
    return value or ""


def _classes(file: Path, records: _Records) -> tuple[list[int], tuple[str, ...]]:
    """The label of each row, and the class names."""
    given = [_label(file, line, record) for line, record in records]
    if not any(given):
        return [0] * len(given), (UNLABELLED,)
    if not all(given):
        line = records[given.index("")][0]
        raise UserError(f"images: {file}, line {line}: expected a label, as in other rows, got none; add it")
    if all(re.fullmatch("[0-9]+", label) for label in given):
        labels = list(map(int, given))
        return labels, _numbered(file, labels)
    if all(map(_is_number, given)):
        place = next(i for i, label in enumerate(given) if not re.fullmatch("[0-9]+", label))
        raise UserError(
            f"images: {file}, line {records[place][0]}: expected whole numbers as labels, got {given[place]!a:.40}; "
            "write them in digits alone"
        )
    class_names = sorted(set(given))
    number_of = {name: number for number, name in enumerate(class_names)}
    return [number_of[label] for label in given], tuple(class_names)


def _is_number(text: str) -> bool:
    """Whether it looks like a number, also with a sign, an exponent, wide digits or characters without width."""
    text = "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")
    try:
        float(text.replace(",", "."))
    except ValueError:
        return False
    return not re.search("[a-z]", text.casefold().replace("e", ""))  # nan and inf may be names


def _numbered(file: Path, labels: Sequence[int]) -> tuple[str, ...]:
    """The names of numbered classes; UserError for a gap, since all numbers above it would change."""
    num_classes, found = max(labels) + 1, set(labels)
    if len(found) < num_classes:
        missing = next(number for number in range(num_classes) if number not in found)
        more = num_classes - len(found) - 1
        raise UserError(
            f"images: {file}: expected images of every class from 0 to {num_classes - 1}, since all labels are "
            f"numbers, got none of {missing}{f' and {more} more' if more else ''}; number the classes from 0 on "
            f"without gaps, or give them names, such as class{num_classes - 1}"
        )
    return tuple(map(str, range(num_classes)))


def _label(file: Path, line: int, record: dict[str, Any]) -> str:
    value = record.get("label")
    if value is None:
        return ""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    text = str(value).strip()
    is_wrong = re.fullmatch("-[0-9]+|[0-9]{20,}", text) or _UNFIT["label"].search(text)
    if not (isinstance(value, str) or is_number) or is_wrong:
        raise UserError(
            f"images: {file}, line {line}: expected a name or a number from 0 on as label, got {value!r:.40}; fix it"
        )
    return text
