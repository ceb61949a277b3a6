"""Texts become tokens and come back; whose names special tokens bear says nothing; other files are refused."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cfpretrain.base.console import UserError
from cfpretrain.data.tokenizer import BEGIN, END, IMAGE, PAD, TextTokenizer

TEXTS = ["a bold seven, leaning right", "the digit three: upright"] * 20
TOKENIZER = TextTokenizer.train(TEXTS, 300)


@given(st.text() | st.sampled_from([END, f"{BEGIN} a {IMAGE} {PAD}"]))
def test_any_text_comes_back(text: str) -> None:
    text = text.encode(errors="ignore").decode()  # lone surrogates are no text
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode([TOKENIZER.begin, *ids, TOKENIZER.end, TOKENIZER.pad]) == text
    assert not {TOKENIZER.pad, TOKENIZER.begin, TOKENIZER.end, TOKENIZER.image} & set(ids)
    assert TOKENIZER.encode_batch([text, "a"]) == [ids, TOKENIZER.encode("a")]


def test_what_it_was_trained_on_becomes_fewer_tokens() -> None:
    assert TOKENIZER.size <= 300
    assert len(TOKENIZER.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    assert max(TOKENIZER.encode(TEXTS[0])) < TOKENIZER.size


def test_its_file_gives_the_same_tokens_and_fingerprint(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(TOKENIZER.to_json())
    again = TextTokenizer.load(file, "data.tokenizer")
    assert again.fingerprint == TOKENIZER.fingerprint
    assert again.encode(TEXTS[0]) == TOKENIZER.encode(TEXTS[0])
    assert TextTokenizer.train(TEXTS, 290).fingerprint != TOKENIZER.fingerprint


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"model": {"type": "Nonsense"}}', "\0"])
def test_another_file_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(content)
    with pytest.raises(UserError, match=r"data\.tokenizer: .* cannot be read as a tokenizer\.json") as raised:
        TextTokenizer.load(file, "data.tokenizer")
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="does not exist"):
        TextTokenizer.load(tmp_path / "nothing", "data.tokenizer")


LLAMA = [
    {"type": "Prepend", "prepend": "\u2581"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
]
XLNET = [
    *({"type": "Replace", "pattern": {"String": quote}, "content": '"'} for quote in ("``", "''")),
    *({"type": kind} for kind in ("NFKD", "StripAccents", "Lowercase")),
    {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
]
DOUBLED = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
NESTED = [{"type": "Sequence", "normalizers": [DOUBLED] * 8}] * 3


@pytest.mark.parametrize(
    ("steps", "is_taken"),
    [(LLAMA, True), (XLNET, True), ([DOUBLED] * 3, True), ([DOUBLED] * 17, False), (NESTED, False)]
    + [([{"type": "ByteLevel"}] * number, number < 17) for number in (1, 16, 17, 40)],
)
def test_rules_that_could_fill_the_memory_are_refused(steps: list, is_taken: bool) -> None:
    """A few lines that each double a text make 10^12 letters of one."""
    plain = json.loads(TOKENIZER.to_json()) | {"normalizer": {"type": "Sequence", "normalizers": steps}}
    if is_taken:
        assert len(TextTokenizer.from_json(json.dumps(plain)).encode("abc")) > 0
        return
    with pytest.raises(ValueError, match="its Sequence could make more than 65536 bytes of one"):
        TextTokenizer.from_json(json.dumps(plain))


@pytest.mark.parametrize("is_trained", [True, False])
def test_one_that_draws_tokens_is_refused(is_trained: bool) -> None:
    """Else a resumed run would not be the one that was left alone, nor a prompt the one that was drawn."""
    plain = json.loads(TextTokenizer.train(["a seven"] * 9, 270).to_json())
    for dropout, is_taken in ((0.9, False), (0.0, True), (None, True)):
        text = json.dumps(plain | {"model": plain["model"] | {"dropout": dropout}})
        if is_taken:
            assert len({tuple(TextTokenizer.from_json(text, is_trained).encode("a seven")) for _ in range(3)}) == 1
        else:
            with pytest.raises(ValueError, match=r"its dropout of 0\.9 gives a text other tokens each time"):
                TextTokenizer.from_json(text, is_trained)
