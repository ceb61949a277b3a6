"""Plain values as typed ones: what is refused, and how much a message holds."""

from dataclasses import dataclass

import pytest

from cfpretrain.base import typed
from cfpretrain.base.console import UserError


@dataclass(frozen=True)
class Named:
    name: str


def test_what_is_no_config_may_hold_any_text() -> None:
    """The name of a class, say."""
    assert typed.from_plain(Named, {"name": "${x}"}, "file").name == "${x}"


@dataclass(frozen=True)
class Numbered:
    numbers: tuple[int, ...]


def test_a_message_names_ten_problems_and_the_rest_is_not_looked_at() -> None:
    looked_at = []

    class Wrong:
        def __repr__(self) -> str:
            looked_at.append(self)
            return "wrong"

    def said(num_wrong: int) -> str:
        with pytest.raises(UserError) as caught:
            typed.from_plain(Numbered, {"numbers": [Wrong() for _ in range(num_wrong)]}, "file")
        return str(caught.value)

    problem = "numbers: expected a whole number, got wrong"
    assert said(10) == f"file: 10 problems: {' | '.join([problem] * 10)}"
    looked_at.clear()
    assert said(1000) == f"file: more than 10 problems: {' | '.join([problem] * 10)}"
    assert len(looked_at) < 50


def test_a_long_value_and_a_long_name_are_cut() -> None:
    for plain in ({"numbers": [], "n" * 10**6: 1}, {"numbers": "9" * 10**6}):
        with pytest.raises(UserError) as caught:
            typed.from_plain(Numbered, plain, "file")
        assert len(str(caught.value)) < 1000


@dataclass(frozen=True)
class Bounded:
    shares: dict[str, typed.Share]
    counts: tuple[typed.Positive, ...]
    step: typed.Natural | None = None


def test_ranges_hold_inside_groups_and_for_what_may_be_missing() -> None:
    fits = {"shares": {"a": 1, "b": 0.5}, "counts": [1, "2"], "step": None}
    assert typed.from_plain(Bounded, fits, "file") == Bounded({"a": 1.0, "b": 0.5}, (1, 2))
    with pytest.raises(UserError) as caught:
        typed.from_plain(Bounded, {"shares": {"a": 2, "b": float("nan")}, "counts": [1, 0], "step": -1}, "file")
    assert str(caught.value) == (
        "file: 4 problems: shares.a: expected between 0 and 1, got 2.0 | shares.b: expected between 0 and 1, got nan | "
        "counts: expected at least 1, got 0 | step: expected at least 0, got -1"
    )
