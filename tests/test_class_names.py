"""Which class a word means: names and numbers share one argument, and whatever could be both is asked about."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cfpretrain.base.class_names import label_of

TEXT_ORDER = tuple(sorted(map(str, range(12))))  # 0 1 10 11 2 ...
WORDS = ("tench, Tinca", "Goldfish", "crane", "crane", "7", "caf\u00e9", "Nut", "nut")


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("goldfish", 1),
        ("2", 2),
        ("name:7", 4),
        ("index:7", 7),
        ("index:2", 2),
        ("cafe\u0301", 5),  # as macOS spells the name of a folder
        ("nut", 7),
        ("Nut", 6),
    ],
)
def test_names_and_numbers(text: str, label: int) -> None:
    assert label_of(text, WORDS) == label


def test_a_number_that_is_also_the_name_of_another_class_is_refused_with_both_readings() -> None:
    with pytest.raises(ValueError, match="'10' is the name of class 2, and class 10 is '8'; give name:10 or index:10"):
        label_of("10", TEXT_ORDER)
    assert (label_of("name:10", TEXT_ORDER), label_of("index:10", TEXT_ORDER)) == (2, 10)
    assert label_of("1", TEXT_ORDER) == 1  # both readings are one class


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crane", "'crane' is the name of classes 2, 3; give index:2 or index:3"),
        ("NUT", "'NUT' is the name of classes 6, 7; give index:6 or index:7"),
        ("GOLDFSH", "a name, or a number from 0 to 7, got 'GOLDFSH'; did you mean 'Goldfish'?"),
        ("tench", "got 'tench'; did you mean 'tench, Tinca'?"),
        ("name:tench", "got 'name:tench'; did you mean 'tench, Tinca'?"),
        ("name:2", "expected a name, or a number from 0 to 7, got 'name:2'; names are tench, Tinca, Goldfish"),
        ("index:crane", "got 'index:crane'"),
        ("8", "got '8'; names are"),
        ("-1", "got '-1'"),
        ("1.0", "got '1.0'"),
        ("\u0662", "got"),  # a digit, and no number that a command line has
        ("9" * 5000, "got"),
        ("", "expected a name, or a number from 0 to 7, got ''; names are tench, Tinca"),
    ],
)
def test_words_that_mean_no_class_or_several(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"expected|name of") as raised:
        label_of(text, WORDS)
    assert message in str(raised.value)


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=8), min_size=1, max_size=20, unique=True), st.data())
def test_every_class_can_be_named_in_both_ways(names: list[str], data: st.DataObject) -> None:
    label = data.draw(st.integers(0, len(names) - 1))
    assert label_of(f"index:{label}", names) == label
    assert label_of(f"name:{names[label]}", names) == label
