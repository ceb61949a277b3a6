"""tools/sample.py, edit.py, caption.py and interleave.py with texts: the same on any ranks; mistakes are one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from cfpretrain.base.console import EXIT_USER_ERROR
from cfpretrain.core.continuation import Writing, caption_images
from cfpretrain.core.texts import Marks
from cfpretrain.data.tokenizer import TextTokenizer
from cfpretrain.evaluation.editing import read_tokens
from cfpretrain.evaluation.source import load_source
from cfpretrain.export.diffusers_layout import ExportSettings, export
from tests.digits import digits
from tests.folders import content
from tests.image_files import pixels
from tests.processes import run_tool
from tests.runs import TOKENIZER, write_run, write_text_run

SAMPLE, EDIT, CAPTION, INTERLEAVE = (f"tools/{name}.py" for name in ("sample", "edit", "caption", "interleave"))
QUICK = ["--solver", "ddim", "--num-denoising-steps", "2"]
PROMPTS = ["a seven", "a three, written by hand", ""]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """Tests read it only."""
    return write_text_run(tmp_path_factory.mktemp("runs") / "run", shards)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Real digits, and a wide picture of colours."""
    folder = tmp_path_factory.mktemp("images")
    for i, (_, _, image) in enumerate(digits(5)):
        Image.fromarray(np.uint8(image[0] * 255)).save(folder / f"{i}.png")
    Image.fromarray(np.uint8(np.linspace(0, 255, 40 * 30 * 3).reshape(30, 40, 3))).save(folder / "wide.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    out = tmp_path_factory.mktemp("exports") / "export"
    export(source, out, ExportSettings())
    return out


# ---------------------------------------------------------------------------
# Prompts


def test_prompts_are_drawn_the_same_on_any_ranks(source: Path, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    common = ["--num-images", 7, "--batch-size", 2, *QUICK]
    ways = {
        "alone": (source, ["--prompt", *PROMPTS], 1),
        "ranks": (source, ["--prompt", *PROMPTS], 2),
        "file": (source, ["--prompts", tmp_path / "prompts.txt"], 1),
        "export": (exported, ["--prompt", *PROMPTS], 1),
    }
    for name, (path, prompts, world_size) in ways.items():
        ended = run_tool(SAMPLE, [path, *prompts, "--out", tmp_path / name, *common], world_size)
        assert (ended.code, ended.err) == (0, "")
    made = {name: content(tmp_path / name) for name in ways}
    assert made["ranks"] == made["file"] == made["alone"]
    assert made["alone"]["labels.csv"].decode().splitlines()[:4] == [
        "path,label,index",
        "000000.png,a seven,0",
        '000001.png,"a three, written by hand",1',
        "000002.png,,2",
    ]
    drawn = {name: data for name, data in made["alone"].items() if name.endswith(".png")}
    assert drawn == {name: data for name, data in made["export"].items() if name.endswith(".png")}
    assert len(set(drawn.values())) == 7


def test_an_archive_says_the_prompts(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "drawn.npz"
    command = [source, "--out", out, "--num-per-class", 1, *QUICK, "--guidance", 1]
    ended = run_tool(SAMPLE, [*command, "--prompt", *PROMPTS])
    assert (ended.code, ended.err) == (0, "")
    with np.load(out) as archive:
        assert archive["arr_0"].shape == (3, 8, 8, 3)
        assert archive["arr_1"].tolist() == [0, 1, 2]
        assert archive["arr_2"].tolist() == PROMPTS
    assert "nothing to do" in run_tool(SAMPLE, [*command, "--prompt", *PROMPTS]).out
    ended = run_tool(SAMPLE, [*command, "--prompt", *PROMPTS[:2], "a two"])
    assert ended.code == EXIT_USER_ERROR
    assert "holds images of other settings already (other prompts" in ended.err


def test_a_file_of_prompts_has_one_a_line_as_editors_show_them(source: Path, tmp_path: Path) -> None:
    """With the mark that some editors write in front, and characters that only Python ends a line at."""
    (tmp_path / "prompts.txt").write_bytes("\ufeffa seven\r\na\u2028b\x0b\x1c\x85\r\n\na two".encode())
    command = [source, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "drawn.npz", "--num-per-class", 1]
    ended = run_tool(SAMPLE, [*command, *QUICK])
    assert (ended.code, ended.err) == (0, "")
    with np.load(tmp_path / "drawn.npz") as archive:
        assert archive["arr_2"].tolist() == ["a seven", "a\u2028b\x0b\x1c\x85", "", "a two"]


def test_prompts_are_drawn_in_a_grid_and_on_the_way(source: Path, tmp_path: Path) -> None:
    for option in ("--out", "--trajectory"):
        out = tmp_path / f"{option[2:]}.png"
        ended = run_tool(SAMPLE, [source, option, out, "--prompt", *PROMPTS, *QUICK])
        assert (ended.code, ended.err) == (0, "")
        assert pixels(out).shape[1] > 2 * 56


def test_regions_are_edited_by_texts(source: Path, images: list[Path], tmp_path: Path) -> None:
    common = ["--region", "top", "--prompt", "a seven", "a three", "--num-seeds", 2, *QUICK]
    for i, given in enumerate((["--image", images[0]], ["--generate", "two bold numbers"])):
        out = [f"--out={tmp_path / f'{i}.png'}", f"--images={tmp_path / f'{i}'}"]
        ended = run_tool(EDIT, [source, *given, *common, *out])
        assert (ended.code, ended.err) == (0, "")
        edits = [pixels(path) for path in sorted((tmp_path / f"{i}").iterdir())]
        assert len({edit.tobytes() for edit in edits}) == 4
        assert all((edit[4:] == edits[0][4:]).all() for edit in edits)
    assert (edits[0][4:] != pixels(images[0])[4:, :, None]).any()


# ---------------------------------------------------------------------------
# Captions


def test_captions_are_the_same_on_any_ranks_and_from_an_export(
    source: Path, exported: Path, images: list[Path], tmp_path: Path
) -> None:
    drawn = ["--temperature", 1.5, "--top-k", 200, "--top-p", 0.99, "--guidance", 1.5, "--prefix", "two"]
    found = []
    for path, world_size in ((source, 1), (source, 2), (exported, 1)):
        out = tmp_path / f"{len(found)}.jsonl"
        ended = run_tool(CAPTION, [path, *images, *drawn, "--batch-size", 2, "--out", out], world_size)
        assert (ended.code, ended.err) == (0, "")
        found.append([json.loads(line) for line in out.read_text().splitlines()])
    assert found[0] == found[1] == found[2]
    assert [one["image"] for one in found[0]] == list(map(str, images))
    captions = [one["caption"] for one in found[0]]
    assert all(caption.startswith("two") for caption in captions)
    assert len(set(captions)) == len(captions)
    ended = run_tool(CAPTION, [source, *images, *drawn, "--batch-size", 2, "--seed", 1])
    assert [line for line in ended.out.splitlines() if f"{images[0]}: " in line]
    assert f"{images[0]}: {captions[0]}\n" not in ended.out


def test_greedy_captions_are_the_models(source: Path, images: list[Path], tmp_path: Path) -> None:
    ended = run_tool(CAPTION, [source, *images, "--out", tmp_path / "out.jsonl", "--max-text-tokens", 9])
    assert (ended.code, ended.err) == (0, "")
    found = load_source(source, torch.device("cpu"))
    _, tokens_BLP = read_tokens(images, found.config, found.make_autoencoder(), found.device)
    texts = caption_images(found.model, tokens_BLP, torch.arange(len(images)), Writing(Marks(*TOKENIZER.marks), 9))
    assert max(map(len, texts)) <= 7
    said = [json.loads(line)["caption"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert said == [TOKENIZER.decode(text) for text in texts]


def test_a_blank_behind_a_prefix_changes_nothing(source: Path, images: list[Path], tmp_path: Path) -> None:
    """Tokens begin with their blank."""
    for script, given, blank in (
        (CAPTION, [images[0], "--prefix", "a"], [images[0], "--prefix", "a "]),
        (INTERLEAVE, [f"image:{images[0]}", "text:a"], [f"image:{images[0]}", "text:a  "]),
    ):
        found = []
        for i, words in enumerate((given, blank)):
            out = tmp_path / f"{Path(script).stem}_{i}.jsonl"
            ended = run_tool(script, [source, *words, "--out", out])
            assert (ended.code, ended.err) == (0, "")
            found.append(content(out) if out.is_dir() else out.read_text())
        assert found[0] == found[1]


def test_what_is_no_image_ends_all_ranks(source: Path, images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "words.png").write_text("a seven")
    for path in (tmp_path / "words.png", tmp_path / "absent.png"):
        ended = run_tool(CAPTION, [source, *images, path, "--batch-size", 1], 2)
        assert ended.code == EXIT_USER_ERROR
        assert ended.err.startswith(f"[cfpretrain] error: IMAGE: {path}: ")
        assert ended.err.count("\n") == 1


# ---------------------------------------------------------------------------
# Samples that go on


def transcript(out: Path) -> list[dict]:
    return json.loads((out / "transcript.json").read_text())


def test_a_sample_of_texts_and_images_goes_on(source: Path, exported: Path, images: list[Path], tmp_path: Path) -> None:
    parts = [f"image:{images[0]}", "text:a seven", f"image:{images[5]}"]
    drawn = ["--temperature", 2, "--max-new-parts", 2, *QUICK]
    for path, out in ((source, tmp_path / "run"), (exported, tmp_path / "export")):
        ended = run_tool(INTERLEAVE, [path, *parts, "--out", out, *drawn])
        assert (ended.code, ended.err) == (0, "")
    assert content(tmp_path / "run") == content(tmp_path / "export")
    found = transcript(tmp_path / "run")
    assert [one["is_new"] for one in found[:4]] == [False, False, False, True]
    assert [next(iter(one)) for one in found[:4]] == ["image", "text", "image", "text"]
    assert (pixels(tmp_path / "run" / "part_1.png") == pixels(images[0])[..., None]).all()
    assert pixels(tmp_path / "run" / "part_3.png").shape == (8, 8, 3)


def test_the_last_part_says_what_comes_first(source: Path, images: list[Path], tmp_path: Path) -> None:
    """An image behind images alone, a text of its own, or one that goes on."""
    for name, parts, expected in (
        ("analogy", [f"image:{path}" for path in images[:3]] + ["image"], ["image"] * 4),
        ("text", [f"image:{images[0]}", "text:a seven", "text"], ["image", "text", "text"]),
        ("goes on", [f"image:{images[0]}", "text:a seven"], ["image", "text"]),
        ("nothing given", ["image"], ["image"]),
    ):
        ended = run_tool(INTERLEAVE, [source, *parts, "--out", tmp_path / name, "--max-new-parts", 1, *QUICK])
        assert (ended.code, ended.err) == (0, ""), name
        found = transcript(tmp_path / name)
        assert [next(iter(one)) for one in found] == expected, name
        assert [one["is_new"] for one in found] == [False] * (len(expected) - 1) + [True], name
    full = [*["text:a", f"image:{images[0]}"] * 2, "image"]  # one place is left
    ended = run_tool(INTERLEAVE, [source, *full, "--out", tmp_path / "full", *QUICK])
    assert (ended.code, ended.err) == (0, "")
    assert [next(iter(one)) for one in transcript(tmp_path / "full")] == ["text", "image", "text", "image", "image"]
    assert transcript(tmp_path / "goes on")[1]["text"].startswith("a seven")
    assert (tmp_path / "analogy" / "part_4.png").is_file()


# ---------------------------------------------------------------------------
# Mistakes

NO_TEXTS = "expected a model with texts (model.vocabulary), got"
WRITES = "expected a text that the model's tokenizer can write, got"
MISTAKES = [
    (SAMPLE, ["--prompt", "a " * 31], "--prompt: expected at most 30 tokens, got"),
    (SAMPLE, ["--prompt", "a seven <|image|>"], f"--prompt: {WRITES} <|image|> in it"),
    (SAMPLE, ["--prompt", "caf\udce9"], f"--prompt: {WRITES} bytes that are no UTF-8"),
    (SAMPLE, ["--prompt", "IMAGE"], "--prompt: expected a text, got the image file"),
    (SAMPLE, ["--prompts", "IMAGE"], "--prompts: expected a text file with a prompt a line, got"),
    (SAMPLE, ["--prompts", "nowhere.txt"], "--prompts: expected a text file with a prompt a line, got nowhere.txt (No"),
    (SAMPLE, ["--prompts", "/dev/null"], "--prompts: expected a text file with a prompt a line, got /dev/null"),
    (SAMPLE, ["--prompt", "a seven", "--classes", "7"], "--classes: expected alone, got --prompt too"),
    (SAMPLE, ["--prompt"], "argument --prompt: expected at least one argument"),
    (SAMPLE, ["--prompt", "a seven", "--num-images", "0"], "--num-images: expected at least 1, got 0"),
    (SAMPLE, ["--prompt", "one", "two", "--num-images", "3"], "--num-images: expected a multiple of the 2 prompts"),
    (EDIT, ["--image", "IMAGE", "--region", "top", "--prompt", "<|end|>"], f"--prompt: {WRITES} <|end|> in it"),
    (EDIT, ["--image", "IMAGE", "--region", "top", "--prompt", "a", "--class", "7"], "argument --class: not allowed"),
    (CAPTION, [], "the following arguments are required: IMAGE"),
    (CAPTION, ["IMAGE", "--prefix", "a " * 31], "--prefix: expected at most 30 tokens, got"),
    (CAPTION, ["IMAGE", "--prefix", "a a a", "--max-text-tokens", "4"], "--prefix: expected at most 2 tokens, got"),
    (CAPTION, ["IMAGE", "--max-text-tokens", "33"], "--max-text-tokens: expected 2 to 32, got 33"),
    (CAPTION, ["IMAGE", "--temperature", "-1"], "--temperature: expected 0 to 100, got -1"),
    (CAPTION, ["IMAGE", "--temperature", "nan"], "--temperature: expected 0 to 100, got nan"),
    (CAPTION, ["IMAGE", "--top-k", "5"], "--top-k: expected with a --temperature above 0"),
    (CAPTION, ["IMAGE", "--top-p", "0", "--temperature", "1"], "--top-p: expected 1e-06 to 1, got 0"),
    (CAPTION, ["IMAGE", "--guidance", "-1"], "--guidance: expected 0 to 1000 (1: none), got -1"),
    (CAPTION, ["IMAGE", "--batch-size", "0"], "--batch-size: expected 1 to 4096, got 0"),
    (CAPTION, ["IMAGE", "--background", "blu"], "background"),
    (INTERLEAVE, ["seven"], "PART: expected text:WORDS or image:FILE, or as the last one text or image, got 'seven'"),
    (INTERLEAVE, ["image", "text:a"], "PART: expected text:WORDS or image:FILE, or as the last one text or image"),
    (INTERLEAVE, ["image:"], "PART: expected image:FILE, got 'image:' without a file"),
    (INTERLEAVE, ["image:nowhere.png"], "PART: nowhere.png: "),
    (INTERLEAVE, ["image:s3://bucket/one.png"], "PART: expected a path of this machine, got the address s3:"),
    (INTERLEAVE, ["text:IMAGE"], "PART: expected a text, got the image file"),
    (INTERLEAVE, ["image:a seven"], "PART: a seven: "),
    (INTERLEAVE, ["text:a", "text:b"], "PART: expected an image between two texts, as in training, got 'a' and 'b'"),
    (
        INTERLEAVE,
        [*["text:a", "image:IMAGE"] * 3, "image"],
        "PART: expected fewer than the 5 parts of a sample that the model knows",
    ),
    (
        INTERLEAVE,
        [*["text:a", "image:IMAGE"] * 2, "image", "--max-new-parts", "2"],
        "--max-new-parts: expected 1 to 1, got 2",
    ),
    (INTERLEAVE, ["text:a", "--max-new-parts", "0"], "--max-new-parts: expected at least 1, got 0"),
    (INTERLEAVE, ["text:a", "--text-guidance", "inf"], "--text-guidance: expected 0 to 1000"),
]


@pytest.mark.parametrize(("script", "words", "message"), MISTAKES)
def test_mistakes(source: Path, images: list[Path], tmp_path: Path, script: str, words: list[str], message) -> None:
    arguments = [word.replace("IMAGE", str(images[0])) for word in words]
    out = [] if script == CAPTION else ["--out", tmp_path / "out.png"]
    ended = run_tool(script, [source, *arguments, *out])
    assert ended.code == EXIT_USER_ERROR
    assert ended.err.startswith("[cfpretrain] error: ")
    assert message in ended.err
    assert ended.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_models_without_texts_or_classes(shards: Path, images: list[Path], tmp_path: Path) -> None:
    plain = write_run(tmp_path / "plain", shards)
    without_classes = write_text_run(tmp_path / "texts", shards, "data.tasks.class_to_image=0")
    edit = ["--image", images[0], "--region", "top"]
    for script, path, words, message in (
        (SAMPLE, plain, ["--prompt", "a seven"], f"--prompt: {NO_TEXTS} {plain}, step 7"),
        (EDIT, plain, [*edit, "--prompt", "a seven"], f"--prompt: {NO_TEXTS}"),
        (CAPTION, plain, [images[0]], f"SOURCE: {NO_TEXTS}"),
        (INTERLEAVE, plain, ["text:a"], f"SOURCE: {NO_TEXTS}"),
        (SAMPLE, without_classes, ["--classes", "7"], "--classes: expected a text, since"),
        (SAMPLE, without_classes, [], "--prompt: expected a text, since"),
        (EDIT, without_classes, [*edit, "--class", "7"], "--class: expected a text, since"),
    ):
        ended = run_tool(script, [path, *words])
        assert ended.code == EXIT_USER_ERROR
        assert f"error: {message}" in ended.err
        assert ended.err.count("\n") == 1


def test_a_tokenizer_that_is_not_the_runs(source: Path, images: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(source, folder)
    of_other_size = TextTokenizer.train(["a seven", "a two"] * 9, 265)
    of_other_words = TextTokenizer.train(["quite other words", "that are not these"] * 9, TOKENIZER.size)
    assert of_other_words.size == TOKENIZER.size != of_other_size.size
    for text in (of_other_size.to_json(), of_other_words.to_json(), "{}", None):
        (folder / "tokenizer.json").unlink()
        if text is not None:
            (folder / "tokenizer.json").write_text(text)
        for script, words in ((SAMPLE, ["--prompt", "a seven"]), (CAPTION, [images[0]])):
            ended = run_tool(script, [folder, *words])
            assert ended.code == EXIT_USER_ERROR
            assert "tokenizer" in ended.err
            assert ended.err.count("\n") == 1


def test_words_without_a_token_are_named() -> None:
    """A tokenizer of whole words has one for what it does not know; others leave that out."""
    words = Tokenizer(models.WordLevel({"a": 0, "seven": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = Tokenizer(models.BPE({one: i for i, one in enumerate("aenstv")}, []))
    for tokenizer in map(TextTokenizer, (words, letters)):
        assert tokenizer.unknown_part("a seven") == ""
    assert TextTokenizer(words).unknown_part("a nine") == "nine"
    assert TextTokenizer(letters).unknown_part("a seven, ...") == ","
    assert TOKENIZER.unknown_part("café ☃ \U0001f600\n") == ""
