"""tools/draw_visibility.py: the cells of its picture are those of the rule, and it draws them."""

from pathlib import Path

from cfpretrain.base.console import EXIT_USER_ERROR
from tests.processes import run_alone
from tests.test_pictures import num_near
from tools.draw_visibility import Case, cases


def sees(case: Case, query: str, key: str) -> float:
    """The share of pairs of tokens of these kinds that are seen."""
    rows, columns = ([i for i, kind in enumerate(case.kinds) if kind == wanted] for wanted in (query, key))
    return float(case.may_attend_MK[rows][:, columns].double().mean())


def test_cases_are_what_the_document_says() -> None:
    of_class, prompt, caption, interleaved, packed, padded = cases()
    assert sees(of_class, "image", "class") == sees(of_class, "noised image", "class") == 1
    assert sees(of_class, "class", "image") == 0
    assert of_class.kinds.count("image") == 5  # of nine tokens: no one would see the last step clean
    assert sees(prompt, "text", "text") == 15 / 25
    assert sees(prompt, "noised image", "text") == sees(prompt, "image", "text") == 1
    assert sees(prompt, "text", "image") == 0
    assert sees(caption, "text", "image") == 1
    assert sees(caption, "text", "noised image") == sees(caption, "noised image", "text") == 0
    assert caption.kinds.count("image") == 9
    assert 0 < sees(interleaved, "text", "image") < 1
    places = [i for i, kind in enumerate(packed.kinds) if kind == "text"]
    assert packed.may_attend_MK[places[3:], places[0]].sum() == 0
    assert padded.kinds.count("padding") == 7
    assert sees(padded, "padding", "padding") == 1 / 7
    assert all(sees(padded, "padding", kind) == sees(padded, kind, "padding") == 0 for kind in ("text", "image"))


def test_the_command_draws_each_kind(tmp_path: Path) -> None:
    out = tmp_path / "visibility.png"
    ended = run_alone("tools/draw_visibility.py", [str(out)])
    assert ended.code == 0, ended.err
    for colour in ((107, 114, 128), (209, 73, 91), (37, 99, 168), (232, 163, 61), (195, 201, 210)):
        assert num_near(out, colour) > 5000
    again = run_alone("tools/draw_visibility.py", [str(out)])
    assert again.code == EXIT_USER_ERROR
    assert "OUT: " in again.err
