"""What differs between two plans, as people read it."""

from cfpretrain.base.differences import differences


def test_values_are_shown_and_hashes_are_named() -> None:
    first, second = "0123456789abcdef" * 2, "fedcba9876543210" * 2
    there = {"size": 8, "weights": first, "order": [1, 2], "seed": 0, "gone": "x", "images": first}
    wanted = {"size": 9, "weights": second, "order": [1, 3], "seed": 0, "new": True, "images": 60}
    assert differences(there, wanted) == (
        f"gone: x there, not said now, images: {first} there, 60 now, new: not said there, True now, "
        "order: [1, 2] there, [1, 3] now, size: 8 there, 9 now, other weights"
    )
    assert differences(there, there) == ""


def test_a_value_that_is_long_is_cut() -> None:
    assert differences({"a": "x" * 100}, {"a": ""}) == f"a: {'x' * 60} there,  now"
