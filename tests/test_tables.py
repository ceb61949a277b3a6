"""Tables of images: which columns are read, which names of them are refused, and what becomes of labels."""

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cfpretrain.base.console import UserError
from cfpretrain.data.images import read_file
from cfpretrain.data.listing import list_images
from tests.test_images import write_tree

_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)


@given(
    rows=st.lists(st.tuples(_TEXT, st.from_regex("[a-z][a-z0-9]{0,3}", fullmatch=True), _TEXT), min_size=1, max_size=8)
)
def test_both_kinds_of_table_list_the_same(
    rows: list[tuple[str, str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tables")
    with (folder / "t.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("path", "label", "caption"), *rows])
    with (folder / "t.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"caption": c, "label": l, "path": p}) + "\n" for p, l, c in rows)
    from_csv, from_jsonl = list_images(folder / "t.csv"), list_images(folder / "t.jsonl")
    assert from_csv == from_jsonl
    assert from_csv.class_names == tuple(sorted({label for _, label, _ in rows}))
    found = [(row.path, from_csv.class_names[row.label], row.caption) for row in from_csv.rows]
    assert found == rows


def table(folder: Path, text: str, name: str = "t.csv") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_labels_that_are_numbers_are_kept(tmp_path: Path) -> None:
    rows = "".join(f"{label},{label}.png\n" for label in range(10))
    listing = list_images(table(tmp_path, f"label,path\n10,a.png\n{rows}010,c.png\n"))
    assert listing.class_names == tuple(map(str, range(11)))
    assert [row.label for row in listing.rows] == [10, *range(10), 10]
    lines = '{"path": "a.png", "label": 1}\n\n{"path": "b.png", "label": "0"}\n'
    assert [row.label for row in list_images(table(tmp_path, lines, "t.jsonl")).rows] == [1, 0]
    names = list_images(table(tmp_path, "path,label\na.png,10\nb.png,9\nc.png,cat\n"))
    assert names.class_names == ("10", "9", "cat")


def test_a_table_without_labels_has_one_class(tmp_path: Path) -> None:
    for text in ("path\na.png\nb.png\n", "path,label,caption\na.png,,\nb.png,,\n"):
        listing = list_images(table(tmp_path, text))
        assert listing.class_names == ("unlabelled",)
        assert [row.label for row in listing.rows] == [0, 0]
    lines = '{"path": "a.png", "label": null, "caption": null}\n{"path": "b.png"}\n'
    assert list_images(table(tmp_path, lines, "t.jsonl")).rows == listing.rows


def test_where_a_tables_paths_begin(tmp_path: Path) -> None:
    write_tree(tmp_path / "pictures", cat=1)
    (tmp_path / "lists").mkdir()
    absolute = tmp_path / "pictures" / "cat" / "000.png"
    for text, root in (
        ("path\n../pictures/cat/000.png\n", None),
        ("path\ncat/000.png\n", tmp_path / "pictures"),
        (f"path\n{absolute}\n", None),
    ):
        listing = list_images(table(tmp_path / "lists", text), root)
        assert read_file(listing.root / listing.rows[0].path) == absolute.read_bytes()


@pytest.mark.parametrize(
    "header",
    [
        "path,label,caption",
        " Path , LABEL,Caption ",
        "\ufeffpath, label, caption",
        'path, "label", "caption"',
        "PATH,label ,caption",
    ],
)
def test_names_of_columns_are_compared_without_case_and_spaces(header: str, tmp_path: Path) -> None:
    listing = list_images(table(tmp_path, f"{header}\na.png,cat,one\nb.png,dog,two\n"))
    assert [(row.path, row.label, row.caption) for row in listing.rows] == [("a.png", 0, "one"), ("b.png", 1, "two")]
    names = header.lstrip("\ufeff").replace('"', "").split(",")
    lines = "".join(
        json.dumps(dict(zip(names, values, strict=True))) + "\n"
        for values in (("a.png", "cat", "one"), ("b.png", "dog", "two"))
    )
    assert list_images(table(tmp_path, lines, "t.jsonl")).rows == listing.rows


def test_spaces_around_values_make_no_other_class(tmp_path: Path) -> None:
    rows = 'a.png, cat, "one, two"\nb.png,cat ,two\nc.png,dog, three\n'
    listing = list_images(table(tmp_path, f"path, label, caption\n{rows}"))
    assert listing.class_names == ("cat", "dog")
    assert [row.caption for row in listing.rows] == ["one, two", "two", "three"]
    assert list_images(table(tmp_path, "path,label\na.png, cat\nb.png,cat\nc.png,dog\n")).class_names == ("cat", "dog")
    lines = '{"path": "a.png", "label": "cat "}\n{"path": "b.png", "label": "cat"}\n'
    assert list_images(table(tmp_path, lines, "t.jsonl")).class_names == ("cat",)


@pytest.mark.parametrize("name", ["notes, of mine", 'notes\n"of" mine'])
@pytest.mark.parametrize("space", ["", " "])
def test_a_quoted_name_among_spaces_may_hold_anything(space: str, name: str, tmp_path: Path) -> None:
    quoted = space + '"' + name.replace('"', '""') + '"'
    text = f'\n{quoted}, path, label\n"x, y", a.png, cat\n\nz, b.png, "dog"\n'
    listing = list_images(table(tmp_path, text), ignore_columns=[name])
    assert [(row.path, row.label) for row in listing.rows] == [("a.png", 0), ("b.png", 1)]
    assert listing.class_names == ("cat", "dog")
    line = text.count("\n") + 1
    with pytest.raises(UserError, match=f"line {line}: expected 3 values, as the first line names, got fewer"):
        list_images(table(tmp_path, f"{text}c.png, z\n"), ignore_columns=[name])


@pytest.mark.parametrize("name", ["labels", "class", "Class", "lable", "class_name", "category", "target"])
def test_a_column_that_may_be_meant_for_the_label_is_refused(name: str, tmp_path: Path) -> None:
    message = rf"got `{name}`; rename `{name}` to `label`, or leave .* --ignore-columns {name}$"
    with pytest.raises(UserError, match=message):
        list_images(table(tmp_path, f"path,{name}\na.png,cat\n"))
    with pytest.raises(UserError, match=message):
        list_images(table(tmp_path, json.dumps({"path": "a.png", name: "cat"}) + "\n", "t.jsonl"))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("path,captions", "rename `captions` to `caption`, or"),
        ("path,text", "rename `text` to `caption`, or"),
        (",path,label", r"got one without a name; leave out .* --ignore-columns ''$"),
        ("path,label,class", r"got `class`; leave out what is not to be read with --ignore-columns class$"),
        ("path,width,image height", r"got `width`, `image height`; leave .* --ignore-columns width 'image height'$"),
        ("path,label,label", "expected one column label, got 2"),
        ("path,Label,label ", "expected one column label, got 2"),
        ("path,label,path", "expected one column path, got 2"),
        ("filename,label", "names the column path, got filename, label; rename `filename`$"),
        ("image_path,label", "rename `image_path`$"),
        ("path;label", "got path;label; separate columns by commas"),
        ("path\tlabel", "separate columns by commas"),
        ("width,height", "got width, height; add it"),
    ],
)
def test_columns_that_are_not_known_are_refused(header: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as raised:
        list_images(table(tmp_path, f"{header}\na.png{',x' * header.count(',')}\n"))
    assert "\n" not in str(raised.value)


def test_a_key_that_comes_once_is_found(tmp_path: Path) -> None:
    for line, message in (
        ('{"path": "c.png", "lable": "x"}', "line 2: expected .* got `lable`; rename `lable` to `label`"),
        ('{"path": "c.png", "label": "x", "label": "y"}', "line 2: expected one column label, got 2"),
        ('{"path": "c.png", "label": "x", "Label": "y"}', "line 2: expected one column label, got 2"),
    ):
        with pytest.raises(UserError, match=message):
            list_images(table(tmp_path, f'{{"path": "a.png", "label": "x"}}\n{line}\n', "t.jsonl"))


def test_columns_are_ignored_where_that_is_asked_for(tmp_path: Path) -> None:
    csv_file = table(tmp_path, "path,Width,class,label\na.png,3,x,cat\nb.png,3,x,dog\n")
    lines = '{"path": "a.png", "Width": 3, "label": "cat"}\n{"path": "b.png", "class": [], "label": "dog"}\n'
    for file in (csv_file, table(tmp_path, lines, "t.jsonl")):
        listing = list_images(file, ignore_columns=["width", " CLASS"])
        assert listing.ignored == "columns Width, class"
        assert listing.class_names == ("cat", "dog")
        with pytest.raises(UserError, match=r"--ignore-columns: expected columns of .*label.*, got widths; correct or"):
            list_images(file, ignore_columns=["width", "class", "widths"])
        with pytest.raises(UserError, match="--ignore-columns: expected columns other than path"):
            list_images(file, ignore_columns=["Path"])
    assert list_images(csv_file, ignore_columns=["width", "class", "label"]).class_names == ("unlabelled",)


def test_one_class_in_all_is_warned_of(tmp_path: Path) -> None:
    for text, message in (
        ("path\na.png\nb.png\n", "no row has a label: all 2 images are of one class, unlabelled"),
        ("path,label\na.png,\nb.png,\n", "no row has a label: all 2 images are of one class, unlabelled"),
        ("path,label\na.png,cat\nb.png,cat\n", "all 2 images are of one class, cat"),
    ):
        assert list_images(table(tmp_path, text)).warnings == (message,)
    assert list_images(table(tmp_path, "path,label\na.png,cat\nb.png,dog\n")).warnings == ()


def test_odd_rows_are_warned_of(tmp_path: Path) -> None:
    text = "path,label,caption\na.png,cat,x\na.png,cat,y\na.png,cat,x\nb.png,Cat,x\n"
    assert list_images(table(tmp_path, "path,label\na.png,cat\nb.png,NaN\n")).warnings == (
        "'NaN' is a class like the others; where it stands for no label, leave out its images",
    )
    repeated, alike = list_images(table(tmp_path, text)).warnings
    assert repeated == "1 row repeats an earlier one: each counts as one more image"
    assert alike.startswith("'Cat' and 'cat' are two classes, ") or alike.startswith(
        "'cat' and 'Cat' are two classes, "
    )


def test_an_image_of_two_classes_is_warned_of(tmp_path: Path) -> None:
    text = "path,label\na.png,cat\nb.png,cat\na.png,dog\nb.png,cat\n"
    warnings = list_images(table(tmp_path, text)).warnings
    assert "a.png has more than one label: each row counts as one image" in warnings


@pytest.mark.parametrize("label", ["0.0", "+0", "1e0", "-1.0", '"0,0"', "\uff11", "1\u200b", "\u0661"])
def test_labels_that_are_numbers_written_otherwise_are_refused(label: str, tmp_path: Path) -> None:
    """As pandas writes them, where one was missing; as names they would be sorted as texts."""
    with pytest.raises(UserError, match=r"line 3: expected whole numbers as labels, got '.*'; write them in digits"):
        list_images(table(tmp_path, f"path,label\na.png,0\nb.png,{label}\nc.png,2\n"))


def test_labels_that_hold_more_than_a_number_are_names(tmp_path: Path) -> None:
    names = list_images(table(tmp_path, "path,label\na.png,1.5 l\nb.png,2.0\n")).class_names
    assert names == ("1.5 l", "2.0")


def test_a_mistake_names_the_line_where_its_row_begins(tmp_path: Path) -> None:
    """A caption may be of several lines, and too long."""
    begin = 'path,caption\na.png,"one\ntwo"\n\n'
    for row, message in (
        (f'b.png,"{"x" * 140_000}"\n', r"line 5: expected CSV \(field larger than field limit"),
        ('b.png,"one\ntwo",three\n', "line 5: expected 2 values, .* got more"),
        (',"one\ntwo"\n', "line 5: expected a path"),
        ('b.png,"one\ntwo\n', "line 5: expected CSV .*close its quotes"),
    ):
        with pytest.raises(UserError, match=message):
            list_images(table(tmp_path, f"{begin}{row}c.png,last\n" if "larger" in message else begin + row))


def test_the_identity_of_a_table(tmp_path: Path) -> None:
    texts = ["path,label,caption\na.png,a,x\n", "path,label,caption\na.png,b,x\n", "path,label,caption\na.png,a,y\n"]
    identities = [str(list_images(table(tmp_path, text)).identity()) for text in texts]
    (tmp_path / "a.png").write_bytes(b"1")
    identities.append(str(list_images(table(tmp_path, texts[0])).identity()))
    assert len(set(identities)) == 4


TABLE_MISTAKES = [
    ("t.csv", "", "expected a first line that names the column path, got nothing"),
    ("t.csv", "file,label\na.png,1\n", "names the column path, got file, label"),
    ("t.csv", "path,label\n", "expected a row for each image in .*, got none"),
    ("t.csv", "path,caption\na.png,one, two\n", "line 2: expected 2 values, .* got more; .*quote"),
    ("t.csv", "path,caption\na.png,one\nb.png\n", "line 3: expected 2 values, .* got fewer"),
    ("t.csv", 'path\n"a.png\n', "line .*: expected CSV"),
    ("t.csv", f"path,label\na.png,{'9' * 999}\n", "from 0 on as label, got '999"),
    ("t.csv", "path,label\na.png,cat\n,cat\n", "line 3: expected a path, got none"),
    ("t.csv", "path,label\na.png,cat\nb.png,\n", "line 3: expected a label, as in other rows, got none"),
    ("t.csv", "path,label\na.png,-1\n", "line 2: expected a name or a number from 0 on as label, got '-1'"),
    (
        "t.csv",
        "path,label\na.png,0\nb.png,2\n",
        "class from 0 to 2, since all labels are numbers, got none of 1; ",
    ),
    ("t.csv", "path,label\na.png,7\nb.png,3\n", "class from 0 to 7, .* got none of 0 and 5 more; .* such as class7"),
    ("t.csv", f"path,label\na.png,0\nb.png,{10**15}\n", "got none of 1 and 999999999999998 more"),
    ("t.jsonl", "", "expected a row for each image in .*, got none"),
    ("t.jsonl", '{"path": "a.png"}\n{"path"\n', "line 2: expected one JSON object"),
    ("t.jsonl", '["a.png"]\n', "line 1: expected one JSON object, got"),
    ("t.jsonl", '{"file": "a.png"}\n', "line 1: .* got `file`; rename `file` to `path`"),
    ("t.jsonl", '{"path": 7}\n', "line 1: expected a text as path, got 7"),
    ("t.jsonl", '{"path": "a.png", "caption": ["x"]}\n', r"line 1: expected a text as caption, got \['x'\]"),
    ("t.jsonl", '{"path": "a.png", "label": 1.5}\n', "from 0 on as label, got 1.5"),
    ("t.jsonl", '{"path": "a.png", "label": true}\n', "from 0 on as label, got True"),
    ("t.csv", "path\na\0.png\n", "line 2: expected a text as path, got 'a.x00.png'"),
    ("t.csv", f"path,label\na.png,{'9' * 5000}\n", "line 2: expected a name or a number from 0 on as label, got '999"),
    ("t.jsonl", '{"path": "a.png", "caption": "\\ud800"}\n', "line 1: expected a text as caption, got '.ud800'"),
    ("t.jsonl", '{"path": "a.png", "label": "\\ud800"}\n', "from 0 on as label, got '.ud800'"),
    ("t.csv", 'path,label\na.png,"a\nb"\n', r"line 2: .* from 0 on as label, got 'a.nb'"),
    ("t.jsonl", "[" * 100_000 + "\n", "line 1: expected one JSON object .it nests too deep"),
]


@pytest.mark.parametrize(("name", "text", "message"), TABLE_MISTAKES)
def test_mistakes_in_a_table(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as raised:
        list_images(table(tmp_path, text, name))
    assert "\n" not in str(raised.value)
    assert str(tmp_path / name) in str(raised.value)


def test_a_table_of_another_encoding_and_another_root(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"path\ncaf\xe9.png\n")
    with pytest.raises(UserError, match=r"t\.csv: expected UTF-8 text"):
        list_images(tmp_path / "t.csv")
    with pytest.raises(UserError, match=r"--root: expected the folder that paths in .*t\.csv begin at, got"):
        list_images(tmp_path / "t.csv", tmp_path / "nowhere")
