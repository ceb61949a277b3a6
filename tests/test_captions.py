"""Scores of captions: against the published scorers' numbers, at their bounds, and where they are undefined."""

import pytest

from cfpretrain.evaluation.captions import caption_scores, words_of

CAPTIONS = [
    "a bold narrow seven leaning right",
    "a thin wide three",
    "this digit is upright",
    "a a a nine",
    "two",
    "the digit six regular and bold",
]
REFERENCES = [
    ["a bold narrow seven leaning right", "the digit seven leaning right narrow and bold"],
    ["a thin regular three upright", "this thin three is upright and regular", "thin strokes three"],
    ["this bold nine is upright"],
    ["a nine", "this thin nine leans left"],
    ["a bold two leaning left", "the digit two leaning left"],
    ["the digit six upright regular and bold"],
]


def test_scores_equal_those_of_the_published_scorers() -> None:
    # By pycocoevalcap 1.2 (Cider and Bleu) of these very words.
    expected = {
        "cider": 3.1213327091523397,
        "bleu_1": 0.6607674032430434,
        "bleu_2": 0.5729580028849887,
        "bleu_3": 0.4801158456645241,
        "bleu_4": 0.41273523606384716,
    }
    scores = caption_scores(CAPTIONS, REFERENCES)
    assert scores == pytest.approx({**expected, "exact_match": 1 / 6}, rel=1e-8)  # it adds 1e-9 to the counts


def test_a_caption_equal_to_its_only_reference_has_the_highest_scores() -> None:
    texts = ["a bold seven leaning right", "the digit two upright and thin", "one more wide regular nine"]
    assert caption_scores(texts, [[text] for text in texts]) == pytest.approx(
        {"cider": 10.0, "bleu_1": 1.0, "bleu_2": 1.0, "bleu_3": 1.0, "bleu_4": 1.0, "exact_match": 1.0}
    )


def test_nothing_in_common_scores_nothing() -> None:
    scores = caption_scores(["", "five"], [["a seven"], ["a two"]])
    assert set(scores.values()) == {0.0}


def test_words_are_compared_without_case_and_punctuation() -> None:
    assert words_of("The digit 7: it's BOLD, leaning-right!") == [
        "the",
        "digit",
        "7",
        "it's",
        "bold",
        "leaning",
        "right",
    ]


@pytest.mark.parametrize(("captions", "references"), [([], []), (["a"], []), (["a"], [[]])])
def test_an_image_without_caption_or_reference_is_refused(captions: list[str], references: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="expected"):
        caption_scores(captions, references)
