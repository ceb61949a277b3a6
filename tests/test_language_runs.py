"""Runs that begin as a language model: texts have its logits, its loss is transformers', and it goes out again."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from cfpretrain.base import config as configs
from cfpretrain.base.console import EXIT_USER_ERROR, UserError
from cfpretrain.core import seeds
from cfpretrain.core.model import CausalFusion
from cfpretrain.core.segments import build_layout, with_rotary_positions
from cfpretrain.core.texts import TEXT, pad_texts, text_segment
from cfpretrain.data.tokenizer import TextTokenizer
from cfpretrain.export.imported_run import write_run
from cfpretrain.export.language_model import (
    language_model_of,
    open_language_model,
    start_from,
    write_language_model,
)
from cfpretrain.run.build import find_checkpoint, make_loss
from tests.closeness import disagreement
from tests.digits import digits, digits_info, small_run, write_latents
from tests.processes import run_alone, run_script
from tests.test_language_model import CONFIGS, TINY, VOCABULARY, make_theirs, their_logits
from tools import import_language_model

MARKS = 4
TEXTS = [[3, 17, 40, 8, 8, 21], [], [5], [11, 49, 2]]


def plain_tokenizer() -> str:
    """Of VOCABULARY words, and without the tokens that frame texts, as language models come."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return str(tokenizer.to_str())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each of CONFIGS with random weights and a tokenizer; tests read them only."""
    folder = tmp_path_factory.mktemp("language models")
    for name in CONFIGS:
        make_theirs(name).save_pretrained(folder / name)
        (folder / name / "tokenizer.json").write_text(plain_tokenizer())
    return {name: folder / name for name in CONFIGS}


OVERRIDES = ["model.num_classes=3", "model.max_text_tokens=40", "data.tasks.image_to_text=1", "train.image_drop_prob=1"]


def import_run(model: Path, run: Path, *overrides: str) -> None:
    import_language_model.run(model, run, TINY, [*OVERRIDES, *overrides])


def moved_run(folder: Path, run: Path, *overrides: str) -> None:
    """A run whose weights have all moved since it began as a language model."""
    model = open_language_model(folder, "MODEL")
    config = configs.load(TINY, [*model.overrides(), *OVERRIDES, *overrides])
    begun = start_from(model, config, "MODEL")

    def read_tensor(content: str, name: str) -> Tensor:
        values = begun.read_tensor(content, name).float()
        return values + 0.1 * seeds.normal(seeds.key(0, name), values.shape)

    write_run(run, config, dataclasses.replace(begun, read_tensor=read_tensor))


@torch.no_grad()
def text_logits(model: CausalFusion, ids_BT: Tensor) -> Tensor:
    """Of texts that begin a sample."""
    text = dataclasses.replace(text_segment(ids_BT), ordinal_B=torch.zeros(len(ids_BT), dtype=torch.int64))
    segments = with_rotary_positions([text]) if model.has_rotary else [text]
    logits: Tensor = model(segments, build_layout(segments).intervals_BMI)[TEXT]
    return logits


def some_ids(vocabulary: int) -> Tensor:
    return torch.randint(0, vocabulary, (3, 40), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_begins_with_the_logits_of_the_language_model(
    folders: dict[str, Path], tmp_path: Path, name: str, capsys
) -> None:
    run = tmp_path / "run"
    import_run(folders[name], run)
    assert "initialised: class_embedder, image_embedder, noise_head, ordinal_table" in capsys.readouterr().out
    found, ids_BT = find_checkpoint(run), some_ids(VOCABULARY)
    model, theirs = found.load_model("raw"), their_logits(folders[name], ids_BT)
    logits = text_logits(model, ids_BT)
    assert disagreement(logits[..., :VOCABULARY], theirs) < 1e-5
    # The tokens that frame texts are average tokens.
    average = theirs.mean(-1, keepdim=True).expand(*theirs.shape[:2], MARKS)
    assert disagreement(logits[..., VOCABULARY:], average) < 1e-5

    import_run(folders[name], tmp_path / "separate", "model.separate_image_weights=true")
    separate = find_checkpoint(tmp_path / "separate").load_model("raw")
    assert torch.equal(text_logits(separate, ids_BT), logits)
    for block in separate.trunk.blocks:  # those of images begin as those of texts
        weights, of_images = dict(block.named_parameters()), dict(block.image.named_parameters())
        assert all(torch.equal(value, weights[key]) for key, value in of_images.items())
        assert len(weights) == 2 * len(of_images)

    tokenizer = TextTokenizer.load(run / "tokenizer.json", "RUN")
    assert found.config.model.vocabulary == tokenizer.size == VOCABULARY + MARKS
    assert found.config.data.tokenizer == str(run / "tokenizer.json")
    assert found.state.tokenizer == tokenizer.fingerprint
    assert tokenizer.encode("w3 w17 w40") == [3, 17, 40]


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_text_side_of_a_moved_run_goes_out_to_transformers(
    folders: dict[str, Path], tmp_path: Path, name: str, separate: bool
) -> None:
    run, out, ids_BT = tmp_path / "run", tmp_path / "out", some_ids(VOCABULARY + MARKS)
    moved_run(folders[name], run, f"model.separate_image_weights={separate}")
    write_language_model(out, *without_size(language_model_of(run, None, "ema", torch.float32)))
    theirs, ours = their_logits(out, ids_BT), text_logits(find_checkpoint(run).load_model(), ids_BT)
    assert disagreement(theirs, ours) < 1e-5
    assert disagreement(ours[..., :VOCABULARY], their_logits(folders[name], ids_BT % VOCABULARY)) > 1e-2  # it has moved
    tokenizer, own = AutoTokenizer.from_pretrained(out), TextTokenizer.load(run / "tokenizer.json", "RUN")
    assert tokenizer("w3 w17 w40", add_special_tokens=False).input_ids == own.encode("w3 w17 w40")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (own.begin, own.end, own.pad)

    import_run(out, tmp_path / "again")  # all of its tokens are known now
    again = find_checkpoint(tmp_path / "again")
    assert again.config.model.design == open_language_model(folders[name], "MODEL").settings.design
    assert disagreement(text_logits(again.load_model("raw"), ids_BT), ours) < 1e-5


def without_size(pair: tuple[Any, dict[str, str]]) -> tuple[Any, int, dict[str, str]]:
    return pair[0], 10**9, pair[1]


def test_a_tied_head_goes_out_tied_where_it_is_still_the_table(folders: dict[str, Path], tmp_path: Path) -> None:
    import_run(folders["gpt2"], tmp_path / "run")
    model, _ = language_model_of(tmp_path / "run", None, "raw", torch.float32)
    assert model.plain["tie_word_embeddings"] is True
    moved_run(folders["gpt2"], tmp_path / "moved")
    assert language_model_of(tmp_path / "moved", None, "raw", torch.float32)[0].plain["tie_word_embeddings"] is False


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_of_texts_is_that_of_transformers(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Of captions of different lengths without their images, as a micro-batch is prepared and summed."""
    run, out = tmp_path / "run", tmp_path / "out"
    moved_run(folders[name], run)
    write_language_model(out, *without_size(language_model_of(run, None, "ema", torch.float32)))
    found = find_checkpoint(run)
    config, model = found.config, found.load_model()
    loss = make_loss(dataclasses.replace(config, data=dataclasses.replace(config.data, tasks=only_captions())))
    ids_B, size = torch.arange(len(TEXTS)), config.model.latent_size
    latents = seeds.normal(seeds.fold(seeds.key(0, "latents"), ids_B), (config.model.latent_channels, size, size))
    draws = loss.draw(0, 0, ids_B, ids_B % 3, config.model.num_tokens, config.model.patch_values)
    batch = loss.prepare(latents, draws, texts=TEXTS)
    assert [one.kind for one in batch.segments] == [TEXT]
    with torch.no_grad():
        terms = loss(model, batch)[TEXT]
    assert terms.count == sum(len(text) + 1 for text in TEXTS)

    tokenizer = TextTokenizer.load(run / "tokenizer.json", "RUN")
    ids_BT, length_B = pad_texts([[tokenizer.begin, *text, tokenizer.end] for text in TEXTS], tokenizer.pad)
    has_BT = torch.arange(ids_BT.shape[1]) < length_B[:, None]
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = theirs(ids_BT, attention_mask=has_BT.long(), labels=ids_BT.masked_fill(~has_BT, -100)).loss
    assert disagreement(terms.total / terms.count, wanted) < 1e-5


def only_captions() -> configs.TasksConfig:
    return configs.TasksConfig(class_to_image=0.0, image_to_text=1.0)


# ---------------------------------------------------------------------------
# From the first to the last command

CAPTIONS = [
    f"a {size} {name}" for size in ("small", "rather large") for name in ("zero", "one", "two", "three", "four")
]


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In `shards` digits with captions, and in `llama` a language model with a tokenizer of these."""
    folder = tmp_path_factory.mktemp("captioned")
    (folder / "llama").mkdir()
    write_latents(folder / "shards", digits_info(64), digits(64), captions={i: CAPTIONS[i % 10] for i in range(64)})
    out = folder / "llama" / "tokenizer.json"
    ended = run_alone("tools/train_tokenizer.py", [str(folder / "shards"), f"--out={out}", "--size=280"])
    assert ended.code == 0, ended.err
    plain = json.loads(out.read_text())  # as of a language model, which knows none of the tokens that frame texts
    plain["added_tokens"] = []
    plain["model"]["vocab"] = {name: id - MARKS for name, id in plain["model"]["vocab"].items() if id >= MARKS}
    out.write_text(json.dumps(plain))
    torch.manual_seed(0)
    sizes = LlamaConfig(**{**CONFIGS["llama"].to_dict(), "vocab_size": len(plain["model"]["vocab"])})
    AutoModelForCausalLM.from_config(sizes).save_pretrained(folder / "llama")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("freezes", [False, True])
def test_a_language_model_learns_images_and_goes_out_again(captioned: Path, tmp_path: Path, freezes: bool) -> None:
    """Imported, trained on two ranks at ZeRO-3, generated from both ways, and exported."""
    run, out = tmp_path / "run", tmp_path / "out"
    preset, *rest = small_run(captioned / "shards", run, "train.num_steps=3", "engine.zero_stage=3")[1:]
    overrides = [one for one in rest if not one.startswith(("model.", "run."))]
    overrides += ["data.tasks.text_to_image=1", "data.tasks.image_to_text=1", "model.num_classes=10"]
    if freezes:
        overrides += ["train.freeze=[trunk,text]", "model.separate_image_weights=true"]
    call("tools/import_language_model.py", captioned / "llama", run, "--config", preset, *overrides)
    for rank in run_script("cfpretrain/train.py", ["--config", str(run / "config.yaml")], 2):
        assert rank.code == 0, rank.err
    found = find_checkpoint(run)
    assert found.state.step == 3

    # Drawn from the run and from its export, and captioned again.
    call("tools/export_hf.py", run, tmp_path / "diffusers")
    for source in ("run", "diffusers"):
        options = ["--prompt", *CAPTIONS[:2], "--num-per-class=1", "--num-denoising-steps=2", "--num-ar-steps=2"]
        call("tools/sample.py", tmp_path / source, *options, "--guidance=2", f"--out={tmp_path / source}_drawn")
    drawn = [sorted((tmp_path / f"{source}_drawn").rglob("*.png")) for source in ("run", "diffusers")]
    assert len(drawn[0]) == 2
    assert [one.read_bytes() for one in drawn[0]] == [one.read_bytes() for one in drawn[1]]
    call("tools/caption.py", run, *drawn[0], "--temperature=1", f"--out={tmp_path / 'captions.jsonl'}")
    assert len((tmp_path / "captions.jsonl").read_text().splitlines()) == 2

    model, tokenizer = found.load_model("raw"), TextTokenizer.load(run / "tokenizer.json", "RUN")
    call("tools/export_hf.py", run, out, "--format=transformers", "--weights=raw")
    ids_BT = some_ids(tokenizer.size)
    assert disagreement(their_logits(out, ids_BT), text_logits(model, ids_BT)) < 1e-5
    num_before = tokenizer.size - MARKS
    before, after = (
        their_logits(folder, ids_BT % num_before)[..., :num_before] for folder in (captioned / "llama", out)
    )
    assert torch.equal(before, after) is freezes


def call(tool: str, *arguments: object) -> None:
    ended = run_alone(tool, list(map(str, arguments)))
    assert ended.code == 0, ended.err


# ---------------------------------------------------------------------------
# What does not fit


def test_more_places_than_the_language_model_has_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"model\.max_text_tokens: expected at most 64, the positions of MODEL: .*got 65"
    ):
        import_run(folders["gpt2"], tmp_path / "run", "model.max_text_tokens=65")
    import_run(folders["llama"], tmp_path / "run", "model.max_text_tokens=65")  # which has rotary ones


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.vocabulary=0", "data.tasks.image_to_text=0"], "RUN: expected a run with texts, got "),
        (["model.trunk=causalfusion"], "model.trunk: expected one of gpt2, llama, qwen3, which transformers knows"),
        (["model.rotary_base=100"], "model.trunk: expected blocks as models of the kind gpt2 have them"),
    ],
)
def test_runs_without_a_language_model_do_not_go_out(
    folders: dict[str, Path], tmp_path: Path, overrides: list[str], words: str
) -> None:
    model = open_language_model(folders["gpt2"], "MODEL")
    config = configs.load(TINY, [*model.overrides(), *OVERRIDES, *overrides])
    shapes = start_from(model, configs.load(TINY, [*model.overrides(), *OVERRIDES]), "MODEL")

    def read_tensor(content: str, name: str) -> Tensor:
        from cfpretrain.run.build import parameter_shapes

        return torch.zeros(parameter_shapes(config)[name])

    write_run(tmp_path / "run", config, dataclasses.replace(shapes, read_tensor=read_tensor))
    ended = run_alone("tools/export_hf.py", [str(tmp_path / "run"), str(tmp_path / "out"), "--format=transformers"])
    assert ended.code == EXIT_USER_ERROR
    assert words in ended.err
    assert ended.err.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_the_command_writes_in_the_dtype_that_is_asked_for(folders: dict[str, Path], tmp_path: Path) -> None:
    import_run(folders["qwen3"], tmp_path / "run")
    arguments = [str(tmp_path / "run"), str(tmp_path / "out"), "--format=transformers", "--dtype=bf16"]
    ended = run_alone("tools/export_hf.py", arguments)
    assert ended.code == 0, ended.err
    assert "AutoModelForCausalLM.from_pretrained(" in ended.out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16
    ended = run_alone("tools/export_hf.py", [*arguments[:2], "--format=transformers", "--license=mit"])
    assert ended.code == EXIT_USER_ERROR
    assert "--format transformers: expected no --license; leave it out" in ended.err
