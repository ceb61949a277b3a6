"""Exports of models with texts: the same pixels and tokens where cfpretrain is not, saved again too. Bad tokenizers."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from cfpretrain.base.console import EXIT_USER_ERROR, UserError
from cfpretrain.core.ar import choose_sizes
from cfpretrain.core.continuation import Drawing, Writing, caption_images, continue_samples, generate_behind_texts
from cfpretrain.core.latents import patchify, take_tokens, unpatchify
from cfpretrain.core.regions import kept_first, parse_region
from cfpretrain.core.sampler import Guidance, noise_by_image, sampling_orders
from cfpretrain.core.solvers import Solver
from cfpretrain.core.texts import Marks
from cfpretrain.core.token_choice import TokenChoice
from cfpretrain.data.tokenizer import TextTokenizer
from cfpretrain.evaluation.editing import read_crop
from cfpretrain.evaluation.generation import GenerationSettings, ImageGenerator
from cfpretrain.evaluation.source import load_source
from cfpretrain.export import model_card
from cfpretrain.export.diffusers_layout import ExportSettings, export
from cfpretrain.export.pipeline_images import _as_pixels
from cfpretrain.export.pipeline_texts import Texts
from cfpretrain.run import build
from tests.environments import make_environment, run_elsewhere
from tests.image_files import digits, write_folder
from tests.processes import run_tool
from tests.runs import TOKENIZER, write_run, write_text_run

CPU = torch.device("cpu")
TRUNKS = {
    "paper": (),
    "gpt2": ("model.trunk=gpt2",),
    "qwen3": ("model.trunk=qwen3", "model.num_kv_heads=1", "model.mlp_width=48"),
    "llama": ("model.trunk=llama", "model.separate_image_weights=true"),
}
PLAIN = json.loads(TOKENIZER.to_json())
PROMPTS = ["a seven", "", "a three, written by hand <|end|>"]
IDS = torch.arange(3)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """Tests read it only."""
    return write_text_run(tmp_path_factory.mktemp("runs") / "run", shards)


@pytest.fixture
def exported(run: Path, tmp_path: Path) -> Path:
    export(run, tmp_path / "exported", ExportSettings())
    return tmp_path / "exported"


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_the_folder_has_the_tokenizer_and_its_code(run: Path, exported: Path) -> None:
    index = json.loads((exported / "model_index.json").read_text())
    [code] = (exported / "tokenizer").glob("*.py")
    assert index["tokenizer"] == [code.stem, "CausalFusionTokenizer"]
    assert sorted(path.name for path in (exported / "tokenizer").iterdir()) == ["tokenizer.json", code.name]
    assert (exported / "tokenizer" / "tokenizer.json").read_text() == TOKENIZER.to_json()
    config = json.loads((exported / "transformer" / "config.json").read_text())
    assert [config[name] for name in ("vocabulary", "max_text_tokens", "max_segments")] == [TOKENIZER.size, 32, 5]
    weights = load_file(exported / "transformer" / "diffusion_pytorch_model.safetensors")
    found = build.find_checkpoint(run).load_model().state_dict()
    assert weights.keys() == found.keys()
    assert all(torch.equal(weights[name], value) for name, value in found.items())


def test_an_export_without_texts_names_none(tmp_path: Path, shards: Path) -> None:
    """As those of before did."""
    export(write_run(tmp_path / "run", shards), tmp_path / "out", ExportSettings())
    assert "tokenizer" not in json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert not (tmp_path / "out" / "tokenizer").exists()
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    assert not {"vocabulary", "max_text_tokens", "max_segments"} & config.keys()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "torch and diffusers only" in card
    assert "prompt" not in card
    assert "| Tasks |" not in card


def test_the_card_says_the_tasks_and_shows_their_calls(exported: Path, tmp_path: Path, shards: Path) -> None:
    card = (exported / "README.md").read_text()
    for words in (
        "- class-conditional-image-generation\n- text-to-image\n- image-to-text\n",
        "Class-conditional images, images of texts and texts about images from",
        "pipe([0, '9'], num_ar_steps=4",
        "pipe(prompt=['a text', 'and another'], num_ar_steps=4",
        "pipe.edit(prompt='a text', region='top'",
        "pipe.caption(images)",
        "torch, diffusers and tokenizers only",
        f"| Texts | {TOKENIZER.size} token ids, up to 32 tokens each",
        "an image of its class (1), an image of its text (3), the text of its image (2)",
    ):
        assert words in card
    assert "interleave" not in card
    other = write_text_run(tmp_path / "run", shards, "data.tasks.image_to_text=0", "data.tasks.class_to_image=0")
    export(other, tmp_path / "other", ExportSettings())
    card = (tmp_path / "other" / "README.md").read_text()
    assert "# other\n\nImages of texts from" in card
    assert "pipe([0" not in card
    assert "caption" not in card


def test_the_card_shows_what_can_be_called() -> None:
    """In the order of the lines; `test_what_the_card_shows_runs_elsewhere` runs some."""
    lines = model_card._calls(["image_to_text", "interleaved"], [], 4, ["a", "b"], 5)
    assert [line.split("(")[0] for line in lines] == [
        "images = [PIL.Image.open",
        "texts = pipe.caption",
        "parts = pipe.interleave",
    ]
    assert "pipe(" not in "".join(model_card._calls(["interleaved"], ["zero"], 4, ["a", "b"], 5))


def test_texts_that_the_card_shows_fit_the_model() -> None:
    words = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
    rules = {"pre_tokenizer": {"type": "Whitespace"}, "decoder": None, "added_tokens": []}
    of_words = TextTokenizer.from_json(json.dumps(PLAIN | {"model": words} | rules))
    bare = TextTokenizer.from_json(json.dumps(PLAIN | {"model": {**words, "vocab": {"c": 0}}} | rules))  # no [UNK]
    first, second = model_card._WORDS
    num_tokens = len(TOKENIZER.encode(first[0]))
    for tokenizer, most, choices, expected in (
        (TOKENIZER, num_tokens + 2, first, first[0]),
        (TOKENIZER, num_tokens + 1, first, first[1]),
        (TOKENIZER, 3, second, "b"),
        (TOKENIZER, 2, first, ""),
        (of_words, 9, first, "a"),
        (of_words, 9, second, ""),
        (bare, 9, first, ""),
    ):
        assert model_card._shown(choices, tokenizer, most) == expected


@pytest.mark.parametrize("name", ["rgba", "grey", "grey_alpha", "palette", "rgb_key", "turned", "cmyk", "small"])
def test_own_pictures_are_cropped_as_files_are(name: str, tmp_path: Path) -> None:
    """Bit for bit as the tools do, which turn images upright."""
    pixels = np.random.default_rng(0).integers(0, 256, (61, 37, 4), np.uint8)
    image, kind, options = Image.fromarray(pixels), "PNG", {}
    if name == "palette":
        image, options = image.convert("P"), {"transparency": 3}
    elif name == "rgb_key":
        image, options = Image.fromarray(pixels[..., :3] // 64 * 64), {"transparency": (64, 0, 128)}
    elif name == "turned":
        image, kind, options = image.convert("RGB"), "JPEG", {"exif": Image.Exif()}
        options["exif"][0x0112] = 6
    elif name == "cmyk":
        image, kind = image.convert("CMYK"), "TIFF"
    elif name == "small":
        image = image.convert("RGB").crop((0, 0, 7, 5))
    elif name != "rgba":
        image = image.convert("L" if name == "grey" else "LA")
    image.save(tmp_path / "image", kind, **options)
    for channels in (1, 3):
        expected, _ = read_crop(tmp_path / "image", 8, channels == 1)
        assert torch.equal(_as_pixels(Image.open(tmp_path / "image"), channels, 8), expected)
        twice = _as_pixels([Image.open(tmp_path / "image"), Image.new("L", (30, 9), 255)], channels, 8)
        assert torch.equal(twice, torch.cat([expected, torch.ones_like(expected)]))


# ---------------------------------------------------------------------------------------------------------------------
# Elsewhere


@dataclass(frozen=True)
class Results:
    runs: dict[str, Path]
    made: dict[str, Tensor]
    said: dict[str, Any]
    given: Tensor


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Results:
    """Everything that is made elsewhere, in one process."""
    folder, runs, exports = tmp_path_factory.mktemp("results"), {}, []
    for name, trunk in TRUNKS.items():
        (folder / "runs").mkdir(exist_ok=True)
        runs[name] = write_text_run(folder / "runs" / name, shards, *trunk)
        exports.append(folder / name)
        export(runs[name], exports[-1], ExportSettings())
    tasks = [f"data.tasks.{task}=0" for task in ("class_to_image", "text_to_image", "image_to_text")]
    for number, sizes in enumerate(((7, 3), (3, 3), (2, 2))):
        texts, segments = sizes
        card = (*tasks, "data.tasks.interleaved=1", f"model.max_text_tokens={texts}", f"model.max_segments={segments}")
        export(
            write_text_run(folder / "runs" / f"card_{number}", shards, *card),
            folder / "cards" / str(number),
            ExportSettings(),
        )
    given = torch.rand(3, 1, 8, 8) * 2 - 1
    pixels = np.random.default_rng(1).integers(0, 256, (45, 23, 4), np.uint8)
    for name in ("own.png", "one.png"):
        Image.fromarray(pixels).save(folder / name)
    crops = torch.cat([read_crop(folder / "own.png", 8, is_grey=True)[0], torch.zeros(1, 1, 8, 8)])
    save_file({"latents": given, "crops": crops}, folder / "given.safetensors")
    python = make_environment(folder, "tokenizers")
    tensors = folder / "given.safetensors", folder / "made.safetensors"
    out, _ = run_elsewhere(python, folder, "elsewhere_texts.py", *tensors, json.dumps(PROMPTS), *exports)
    return Results(runs, load_file(tensors[1]), json.loads(out.splitlines()[-1]), given)


class Ours:
    """What cfpretrain's own functions make of the same run."""

    def __init__(self, run: Path, dtype: torch.dtype = torch.float32) -> None:
        found = build.find_checkpoint(run)
        self.config, self.model = found.config, found.load_model().to(dtype)
        self.solver = Solver(build.make_noise_process(self.config), 3, "time", "ddpm")
        self.marks = Marks(TOKENIZER.begin, TOKENIZER.end, TOKENIZER.image, TOKENIZER.pad)

    def images(self, prompts: list[str], ids_B: Tensor, given: Tensor | None = None, region: str = "") -> Tensor:
        texts, order_BL = [TOKENIZER.encode(text) for text in prompts], sampling_orders(0, ids_B, 16)
        sizes, kept = choose_sizes(16, 4, "equal"), None
        if given is not None:
            order_BL, num_kept = kept_first(order_BL, parse_region(region, 4))
            kept = take_tokens(patchify(given, 2), order_BL[:, :num_kept])
            sizes = choose_sizes(16 - num_kept, 2, "equal")
        noise = noise_by_image(0, ids_B, self.model.patch_values)
        makes = order_BL, sizes, self.solver, Guidance(2.0), noise, kept
        return unpatchify(generate_behind_texts(self.model, texts, self.marks, *makes), 2)

    def captions(self, given: Tensor, ids_B: Tensor, prefixes: list[str], **how: Any) -> list[str]:
        writing = Writing(self.marks, **{"max_tokens": 32, **how})
        starts = [TOKENIZER.encode(one) for one in prefixes]
        return [TOKENIZER.decode(one) for one in caption_images(self.model, patchify(given, 2), ids_B, writing, starts)]

    def interleaved(self, parts: list[Any], seed: int, id: int, first: str | None, max_tokens: int, num: int) -> list:
        sizes = choose_sizes(16, 4, "equal")
        drawing = Drawing(16, self.model.patch_values, sizes, self.solver, seed, Guidance(2.0))
        writing = Writing(self.marks, max_tokens, seed, TokenChoice(1.0))
        samples = [[TOKENIZER.encode(one) if isinstance(one, str) else patchify(one[None], 2)[0] for one in parts]]
        [new] = continue_samples(self.model, samples, torch.tensor([id]), writing, drawing, num, [first])
        return [unpatchify(one[None], 2)[0] if isinstance(one, Tensor) else TOKENIZER.decode(one) for one in new]


WAYS = [*TRUNKS, *(f"{name} saved" for name in TRUNKS), "paper hub"]


@pytest.mark.parametrize("way", WAYS)
def test_the_same_pixels_and_tokens_elsewhere(results: Results, way: str) -> None:
    ours, made, said = Ours(results.runs[way.split()[0]]), results.made, results.said
    images = ours.images(PROMPTS, IDS)
    assert torch.equal(made[f"{way} prompt"], images)
    assert torch.equal(made[f"{way} alone"], ours.images(PROMPTS[2:], IDS[2:]))
    settings = GenerationSettings(choose_sizes(16, 4, "equal"), 3, Guidance(2.0), 2, 0)
    assert torch.equal(
        made[f"{way} class"], ImageGenerator(ours.config, ours.model, settings, CPU).images([3, 7], lambda x: x)
    )
    edited = ours.images(PROMPTS, IDS, results.given, "centre")
    assert torch.equal(made[f"{way} edited"], edited)
    assert not torch.equal(edited, images)
    assert said[f"{way} captions"] == ours.captions(results.given, IDS, ["", "", ""])
    how = {"max_tokens": 12, "seed": 3, "choice": TokenChoice(1.0, 50, 0.9), "guidance": 1.5}
    drawn = ours.captions(results.given, IDS + 4, ["a", "", "a th"], **how)
    assert said[f"{way} drawn"] == drawn
    assert drawn[2].startswith("a th")
    assert len(set(drawn)) == 3


@pytest.mark.parametrize("way", WAYS)
def test_the_same_samples_go_on_elsewhere(results: Results, way: str) -> None:
    ours = Ours(results.runs[way.split()[0]])
    goes_on = ours.interleaved([results.given[0], "a se"], 1, 7, "text", 10, 1)
    assert results.said[f"{way} goes on"] == goes_on
    assert isinstance(goes_on[0], str)
    image, *text = ours.interleaved(["a se"], 0, 1, "image", 32, 2)
    assert torch.equal(results.made[f"{way} interleaved"], image)
    assert results.said[f"{way} interleaved"] == text
    assert len(text) == 1


def test_pictures_are_read_and_drawn_elsewhere(results: Results) -> None:
    [alone], [again] = results.said["pictured"]
    assert alone == again
    assert results.said["pil"] == "Image"


def test_what_the_card_shows_runs_elsewhere(results: Results) -> None:
    assert results.said["card"] == {"images": 2, "edited": 1, "texts": 2}
    assert results.said["interleaved cards"] == [{"images": 1, "parts": 1}] * 3
    for number in range(3):
        card = (results.runs["paper"].parent.parent / "cards" / str(number) / "README.md").read_text()
        assert "import PIL.Image\n" in card
        assert not any(words in card for words in ("...", "Classes", "| Condition |", "a class"))


def test_pictures_of_any_size_are_taken_elsewhere(results: Results) -> None:
    """As their crops are; arrays are not cropped."""
    said, ours = results.said, Ours(results.runs["paper"])
    assert said["own captions"][0] == said["own captions"][1]
    assert said["own goes on"][0] == said["own goes on"][1]
    crop = load_file(results.runs["paper"].parent.parent / "given.safetensors")["crops"][:1]
    latents = build.make_scaling(ours.config).to_model(crop)
    assert torch.equal(results.made["own edited"], ours.images(PROMPTS[:1], IDS[:1], latents, "centre"))
    thin, empty, tensor, array = said["own refusals"]
    assert thin.startswith("image: expected one less thin, got 1 x 4194304")
    assert empty == "image: expected pixels, got 0 x 4"
    assert tensor == "image: expected [2, 1, 8, 8] in all, got [2, 1, 8, 7]"
    assert array == "image: expected [1, 1, 8, 8] in all, got [1, 1, 7, 8]"


def test_blanks_that_end_a_beginning_are_left_out_elsewhere(results: Results) -> None:
    plain, blank = results.said["blanks"]
    assert plain == blank
    assert plain[1].startswith("a th")
    alone, alone_blank, behind, behind_blank = results.said["blank goes on"]
    assert alone == alone_blank
    assert behind == behind_blank
    assert TOKENIZER.encode("a se ") != TOKENIZER.encode("a se")  # else it would show nothing


def test_half_precision_elsewhere(results: Results) -> None:
    ours = Ours(results.runs["paper"], torch.bfloat16)
    assert torch.equal(results.made["half prompt"], ours.images(PROMPTS, IDS))
    assert results.said["half captions"] == ours.captions(results.given, IDS, ["", "", ""])


def test_mistakes_elsewhere_are_named(results: Results) -> None:
    expected = [
        "class_labels: expected classes or a prompt, got both or none",
        "class_labels: expected classes or a prompt, got both or none",
        "prompt: expected a text, or at least one, got []",
        "prompt: expected a text, or at least one, got [7]",
        "prompt: expected at most 30 tokens, got ",
        "prompt: 'utf-8' codec can't encode",
        "image: expected an image or latents, got both or none",
        "latents: expected [3, 1, 8, 8] in all, got [3, 1, 4, 8]",
        "prefix: expected one text, or 3, one for each image, got 2",
        "max_tokens: expected 2 to 32 (with the two that frame a text), got 1",
        "temperature, top_k, top_p: expected at least 0, at least 0, and above 0 up to 1, got -1, 0, 1.0",
        "temperature, top_k, top_p: expected at least 0, at least 0, and above 0 up to 1, got 0.0, 0, 0",
        "max_new_parts: expected at least 1 and, behind 2 parts, at most 3, since",
        "first: expected text, image or None, got 'picture'",
        "parts: expected a list of texts and images, got 'a seven'",
        "parts: expected an image between two texts, as in training, got two texts; join them",
        "image: expected PIL images, or one array or tensor, got None",
        "guidance_scale: expected a finite number, got nan",
        "guidance_scale: expected a finite number, got inf",
        "guidance_scale: expected a finite number, got nan",
        "image: expected PIL images, or one array or tensor, got 'picture.png'",
        "image: expected PIL images, or one array or tensor, got [<PIL.Image.Image",
        "image: expected values from 0 to 1, got 200 to 200; divide bytes by 255",
        "image: expected values from 0 to 1, got nan to nan; divide bytes by 255",
        "latents: expected finite numbers, got others",
        "image: expected values from 0 to 1, got ",
        "image: expected 8 bits a channel, got mode I;16; scale the image to them first",
        f"tokenizer: expected {TOKENIZER.size} token ids, as the transformer has, got 0",
    ]
    for found, begin in zip(results.said["refusals"], expected, strict=True):
        assert found is not None, begin
        assert found.startswith(begin)


def test_a_prompt_that_the_tokens_cannot_say_is_refused() -> None:
    words = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
    rules = {"pre_tokenizer": {"type": "Whitespace"}, "decoder": None, "added_tokens": []}
    texts = Texts(TextTokenizer.from_json(json.dumps(PLAIN | {"model": words} | rules)), 9)
    assert texts.encode("prompt", ["a a"]) == [[0, 0]]
    with pytest.raises(ValueError, match="prompt: expected what the model's tokens can say, got 'b'"):
        texts.encode("prompt", ["a b a"])


def test_no_other_package_is_loaded_elsewhere(results: Results) -> None:
    assert results.said["strangers"] == []


# ---------------------------------------------------------------------------------------------------------------------
# An export as a source


def test_a_run_and_its_export_are_the_same_source(run: Path, exported: Path) -> None:
    one, other = load_source(run, CPU), load_source(exported, CPU)
    assert one.config.model == other.config.model
    assert one.tokenizer is not None
    assert other.tokenizer is not None
    assert one.tokenizer.fingerprint == other.tokenizer.fingerprint == TOKENIZER.fingerprint
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    build.make_tokenizer(other.config)


def test_it_is_scored_by_its_classes(run: Path, exported: Path, tmp_path: Path, shards: Path) -> None:
    """As the run is; other tools with exports: `test_text_tools.py`."""
    write_folder(tmp_path / "real", digits(0, 60))
    quick = ["--reference", tmp_path / "real", "--features", "tests.small_features:make", "--num-images", "40"]
    scores = []
    for source in (run, exported):
        out = tmp_path / f"{source.name}.json"
        ended = run_tool("tools/evaluate_fid.py", [source, *quick, "--num-denoising-steps", "2", "--out", out], 1)
        assert ended.code == 0, ended.err
        scores.append(json.loads(out.read_text()))
    assert [scores[0][name] for name in ("fd_small", "precision")] == [
        scores[1][name] for name in ("fd_small", "precision")
    ]
    other = write_text_run(tmp_path / "run", shards, "data.tasks.class_to_image=0")
    ended = run_tool("tools/evaluate_fid.py", [other, *quick], 1)
    assert ended.code == EXIT_USER_ERROR
    assert ended.err.count("\n") == 1
    assert "GENERATED: expected a model of classes, got" in ended.err


def test_an_edited_export_is_refused(exported: Path) -> None:
    config = exported / "config.yaml"
    config.write_text(config.read_text().replace("max_segments: 5", "max_segments: 4"))
    with pytest.raises(UserError, match=r"config\.yaml contradicts .*: max_segments is 5 there and 4 by config\.yaml"):
        load_source(exported, CPU)


# ---------------------------------------------------------------------------------------------------------------------
# Bad tokenizers

GROWING = [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40
BAD = {
    "no JSON": ("<html>", "cannot be read as a tokenizer.json"),
    "other JSON": ('{"model": []}', "cannot be read as a tokenizer.json"),
    "another vocabulary": (TextTokenizer.train(["b"], 270).to_json(), "expected the tokenizer that the model"),
    "no special token": (TOKENIZER.to_json().replace("<|end|>", "<|fin|>"), r"it lacks the special token <\|end\|>"),
    "a text that grows": (
        json.dumps(PLAIN | {"normalizer": {"type": "Sequence", "normalizers": GROWING}}),
        "its Sequence could make more than 65536 bytes of one",
    ),
    "a panic": (
        json.dumps(PLAIN | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}),
        "cannot be read as a tokenizer.json .Precompiled: Error",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_tokenizer_is_refused(name: str, run: Path, exported: Path, tmp_path: Path) -> None:
    """Of an export, and of a run that is to be one."""
    content, words = BAD[name]
    other = shutil.copytree(run, tmp_path / "run")
    for file, read in (
        (exported / "tokenizer" / "tokenizer.json", lambda: load_source(exported, CPU).tokenizer),
        (other / build.TOKENIZER_FILE, lambda: export(other, tmp_path / "out", ExportSettings())),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=words) as caught:
            read()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_too_large_is_not_read(exported: Path) -> None:
    file = exported / "tokenizer" / "tokenizer.json"
    with file.open("r+b") as opened:
        opened.truncate(2**33)  # a hole
    with pytest.raises(UserError, match=r"cannot be read as a tokenizer\.json .*8589934592 bytes, at most 67108864"):
        _ = load_source(exported, CPU).tokenizer


def test_another_tokenizer_of_the_same_size_leaves_no_run(run: Path, tmp_path: Path) -> None:
    plain = json.loads(TOKENIZER.to_json())
    plain["model"]["vocab"] |= {"a": plain["model"]["vocab"]["b"], "b": plain["model"]["vocab"]["a"]}
    other = shutil.copytree(run, tmp_path / "run")
    (other / build.TOKENIZER_FILE).write_text(json.dumps(plain))
    with pytest.raises(UserError, match="expected the tokenizer that the model was trained with"):
        export(other, tmp_path / "out", ExportSettings())


def test_no_tokenizer_behind_a_link_leaves_with_an_export(run: Path, tmp_path: Path) -> None:
    """It may be any file of this machine."""
    other = shutil.copytree(run, tmp_path / "run")
    (other / build.TOKENIZER_FILE).rename(tmp_path / "mine.json")
    with pytest.raises(UserError, match=r"expected a tokenizer\.json, but .* does not exist"):
        export(other, tmp_path / "out", ExportSettings())
    (other / build.TOKENIZER_FILE).symlink_to(tmp_path / "mine.json")
    with pytest.raises(UserError, match=r"run/tokenizer\.json cannot be read as a tokenizer\.json"):
        export(other, tmp_path / "out", ExportSettings())
    assert not (tmp_path / "out").exists()
