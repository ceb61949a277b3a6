"""Names and notes of a stranger's folder are texts wherever they go: a terminal, a model card, a spreadsheet."""

import csv
import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from cfpretrain.base import console
from cfpretrain.base.console import UserError
from cfpretrain.data.listing import list_images
from cfpretrain.data.shards import read_info
from cfpretrain.data.tables import as_cell, from_cell
from cfpretrain.evaluation.image_set import ImageSet
from cfpretrain.export.diffusers_layout import ExportSettings, export
from cfpretrain.run.state import TrainingState, dump
from cfpretrain.run.tensor_files import DamagedCheckpointError
from tests.checkpoints import make_state
from tests.digits import write_digits
from tests.runs import write_run

ESCAPE, OVERRIDE, ZERO_WIDTH = "\x1b]0;owned\x07", "\u202egnp.exe", "a\u200bb"
NAMES = [
    "# Free weights\n\n<script>alert(1)</script>",
    "[click](https://evil.example)",
    "=cmd|'/c calc'!A0",
    "@SUM(1)",
    "-1+1",
    f"x{ESCAPE}",
    OVERRIDE,
    ZERO_WIDTH,
    "'=quoted",
    "na\u00efve \u540d\u524d \U0001f600",
]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (ESCAPE, r"\x1b]0;owned\x07"),
        ("a\nb\rc\td", r"a\nb\rc\td"),
        (OVERRIDE, r"\u202egnp.exe"),
        (ZERO_WIDTH, r"a\u200bb"),
        ("line\u2028line\x85", r"line\u2028line\x85"),
        (NAMES[-1], NAMES[-1]),
        ("no\u00a0break\u3000wide", "no\u00a0break\u3000wide"),
    ],
)
def test_a_terminal_is_told_nothing(text: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    console.say(text)
    with pytest.raises(SystemExit):
        console.exit_with(UserError(text))
    said = capsys.readouterr()
    assert said.out == f"[cfpretrain] {shown}\n"
    assert said.err == f"[cfpretrain] error: {shown}\n"


def test_a_model_card_shows_names_and_obeys_none(tmp_path: Path) -> None:
    shards = write_digits(tmp_path / "digits")
    versions = {"torch": "1 | <b>\n# x", "`": "](", "x": "www.evil.example, WWW.evil.example"}
    run = write_run(tmp_path / "run", shards, class_names=NAMES, versions=versions, data_fingerprint="`</td>\n\n# y")
    export(run, tmp_path / "# <i>out", ExportSettings(licence='mit"\ntags: [x'))
    card = (tmp_path / "# <i>out" / "README.md").read_text()
    _, front_matter, text = card.split("---\n", 2)
    assert yaml.safe_load(front_matter)["license"] == 'mit"\ntags: [x'
    assert re.findall("^#.*", text, re.MULTILINE) == [r"# \# \<i\>out", "## Use", "## Model", "## Training"]
    assert not re.search(r"(?<!\\)[<>]", re.sub("```.*?```", "", text, flags=re.DOTALL))
    assert r"\[click\](https\://evil.example)" in text
    assert r"\@SUM(1)" in text
    assert r"www\.evil.example, WWW\.evil.example" in text
    assert all(line.count("|") - line.count(r"\|") == 3 for line in text.splitlines() if line.startswith("|"))
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e\u200b]", card)


def test_a_spreadsheet_computes_no_name(tmp_path: Path) -> None:
    names = [name for name in NAMES if name.isprintable()]
    images = ImageSet(tmp_path / "out", range(len(names)), names, len(names), {"x": 1})
    images.begin()
    images.write(torch.arange(len(names)), torch.zeros(len(names), 1, 4, 4))
    images.finish()
    with (tmp_path / "out" / "labels.csv").open(newline="") as file:
        _, *rows = csv.reader(file)
    assert not any(cell.startswith(("=", "+", "-", "@")) for row in rows for cell in row)
    listing = list_images(tmp_path / "out" / "labels.csv")
    assert [listing.class_names[row.label] for row in listing.rows] == names
    assert all(from_cell(as_cell(name)) == name for name in NAMES)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("class_names", [1, 2]),
        ("class_names", {"a": "b"}),
        ("num_samples", "many"),
        ("num_samples", 10**400),
        ("latent_shape", [1, 1]),
        ("latent_shape", [10**9, 10**9, 10**9]),
        ("latent_scale", ["x"]),
        ("source", None),
        ("image_size", 10**9),
        ("has_mirror", 7),
        ("statistics", {"mean": "x"}),
        ("versions", []),
        ("plan_", {}),
    ],
)
def test_the_fields_of_a_description_have_their_types(key: str, value: object, tmp_path: Path) -> None:
    file = write_digits(tmp_path / "digits") / "cfpretrain.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(UserError, match=r"cfpretrain\.json cannot be read") as caught:
        read_info(tmp_path / "digits")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"config": {"model": 3}},
        {"history": [3]},
        {"history": [{"step": 1, "changed": {"a.b": 1}}]},
        {"history": [{"step": 1, "changed": {"a.b": [1, 2, 3]}}]},
        {"history": [{"step": -1, "changed": {}}]},
        {"guard": {"losses": ["x"]}},
        {"guard": {"losses": [-1.0]}},
        {"guard": {"num_skips_in_row": 1.5}},
        {"working_folder": "a\0b"},
        {"class_names": [1]},
        {"versions": {"torch": 2}},
    ],
)
def test_the_fields_of_a_state_have_their_types(changed: dict[str, object]) -> None:
    """Where the hash is right, as a stranger would make it."""
    plain = json.loads(make_state(1).to_json()) | changed
    del plain["sha256"]
    text = dump(plain | {"sha256": hashlib.sha256(dump(plain).encode()).hexdigest()})
    with pytest.raises(DamagedCheckpointError, match=rf": {next(iter(changed))}[\w.]*: expected"):
        TrainingState.from_json(text, Path("state.json"))
