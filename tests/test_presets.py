"""Presets and overlays: what they build, and that each passes its dry run without the model's memory."""

import argparse
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cfpretrain import train
from cfpretrain.base import config as configs
from cfpretrain.base import config_checks
from cfpretrain.base.console import UserError
from cfpretrain.run.build import make_loss
from cfpretrain.training import memory
from tests.processes import REPOSITORY

CONFIGS = REPOSITORY / "configs"
PRESETS = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "512px")
OVERLAYS = sorted(path.stem for path in (CONFIGS / "ablations").glob("*.yaml"))
ABLATION, AT_512_PX = "L2", ["L", "XL", "H", "3B"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test looks at shards that lie in the checkout."""
    monkeypatch.chdir(tmp_path)


def files(*names: str) -> list[str]:
    return [str(CONFIGS / f"{name}.yaml") for name in names]


COMBINATIONS = [
    *([name] for name in PRESETS),
    *([name, "512px"] for name in AT_512_PX),
    *([ABLATION, f"ablations/{name}"] for name in OVERLAYS),
]


def dry_run(names: list[str], overrides: list[str], capsys: pytest.CaptureFixture[str], num_ranks: int = 8) -> str:
    train.dry_run(
        argparse.Namespace(
            config=files(*names), overrides=overrides, num_ranks=num_ranks, allow_env=False, allow_code=False
        )
    )
    return capsys.readouterr().out


def number(text: str, line: str) -> str:
    found = re.search(rf"^{line}: ([\d,.e+]+)", text, re.MULTILINE)
    assert found, (line, text)
    return found[1].rstrip(",").replace(",", "")


def test_the_presets_that_we_promise_are_there() -> None:
    assert {"tiny", "demo", "L", "L-text", "XL", "H", "3B", "L2"} <= {*PRESETS}
    assert {"dit", "fixed_steps", "acdit", "pure_ar", "order_raster", "order_dilated"} < {*OVERLAYS}


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_every_preset_passes_its_dry_run(names, capsys) -> None:
    shown = dry_run(names, [], capsys)
    config = configs.load(files(*names))
    assert int(number(shown, "parameters")) > 0
    assert "WARNING" not in shown
    assert "shards: not looked at, since " in shown
    # What a run prints is the config that a run loads.
    assert configs.to_yaml(config) in shown
    for num_ranks in (1, 2, 16, 64):
        config_checks.check(config, num_ranks)


@pytest.mark.parametrize(
    ("names", "overrides", "num_parameters"),
    [
        (["L"], [], 369_519_632),
        (["XL"], [], 713_988_368),
        (["H"], [], 1_235_635_088),
        (["H"], ["model.depth=40"], 1_045_203_856),
        (["L2"], [], 307_694_608),
        (["3B"], [], 3_004_221_968),
        (["3B", "512px"], [], 3_006_188_048),
    ],
    ids=str,
)
def test_parameters_are_counted_exactly(names, overrides, num_parameters, capsys) -> None:
    """The published numbers, and each again as the sum of its tensors."""
    assert int(number(dry_run(names, overrides, capsys), "parameters")) == num_parameters
    model = configs.load(files(*names), overrides).model
    D, P, E = model.width, model.patch_values, model.width // model.num_heads
    blocks = model.depth * (12 * D**2 + 4 * D + (D + 4 * D + D) + 4 * E)
    classes = (model.num_classes + 1) * model.num_cond_tokens * D + model.num_cond_tokens * D
    positions = model.num_tokens * D if model.position_embedding == "learnable" else 0
    ends = (P * D + D) + (256 * D + D + D**2 + D) + (2 * D + D * P + P)
    assert blocks + classes + positions + ends == num_parameters


def test_sizes_stand_as_published() -> None:
    sizes = {name: configs.load(files(name)).model for name in ("L", "XL", "H", "3B", "L2")}
    shape = {name: (m.depth, m.width, m.num_heads, m.num_tokens, m.num_cond_tokens) for name, m in sizes.items()}
    assert shape["L"] == (24, 1024, 16, 256, 64)
    assert shape["XL"] == (32, 1280, 20, 256, 64)
    assert shape["H"] == (48, 1408, 22, 256, 64)
    assert shape["L2"] == (24, 1024, 16, 256, 4)
    assert sizes["3B"].width // sizes["3B"].num_heads == 128
    assert configs.load(files("3B", "512px")).model.num_tokens == 1024


@pytest.mark.parametrize("name", ["L", "XL", "H", "3B", "L2"])
def test_the_recipe_stands_as_published(name) -> None:
    config = configs.load(files(name))
    recipe, noise = config.train, config.noise
    assert (recipe.global_batch_size, recipe.learning_rate, recipe.weight_decay) == (2048, 8e-4, 0.0)
    assert (recipe.adam_beta1, recipe.adam_beta2, recipe.adam_eps) == (0.9, 0.95, 1e-15)
    assert (recipe.clip_grad_norm, recipe.label_drop_prob, recipe.ema_decay) == (1.0, 0.1, 0.9999)
    steps_an_epoch = 1_281_167 // 2048
    assert recipe.warmup_steps == 40 * steps_an_epoch
    assert recipe.num_steps == (240 if name == "L2" else 800) * steps_an_epoch
    assert recipe.decay_steps == 0
    assert (noise.num_timesteps, noise.beta_first, noise.beta_last) == (1000, 1e-4, 0.02)
    assert (config.data.mirror_prob, config.data.latent_shift) == (0.5, (0.0,))
    assert config.data.latent_scale == ((0.18215,) if name == "L2" else (0.2325,))
    assert config.engine.zero_stage == (3 if name == "3B" else 2)
    # Compiled for five lengths.
    assert config.engine.compile_blocks
    assert make_loss(config).clean_multiple == 64
    assert config.sample.num_denoising_steps == 250
    order = config.order
    assert (order.ar_step_decay, order.num_ar_steps, order.token_order) == (0.9, 0, "random")
    assert (order.ar_weight_first, order.ar_weight_last, order.ar_weight_schedule) == (2.0, 1.0, "linear")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_ablation_changes_the_order_alone(overlay) -> None:
    base, changed = configs.load(files(ABLATION)), configs.load(files(ABLATION, f"ablations/{overlay}"))
    assert dataclasses.replace(changed, order=base.order, run=base.run, sample=base.sample) == base
    assert changed.run.folder == f"runs/{ABLATION}_{overlay}"
    if overlay != "ar_weight_linear":  # the preset's own
        assert changed.order != base.order


@pytest.mark.parametrize("name", ["L", "L-text", "XL", "H", "3B", "L2", "512px"])
def test_a_header_says_the_memory_that_is_estimated(name) -> None:
    comments = [line[1:].strip() for line in (CONFIGS / f"{name}.yaml").read_text().splitlines() if line[:1] == "#"]
    found = re.search(
        r"Memory per GPU, estimated: ([\d.]+) GB at the peak .*?"
        r"\(tools/estimate_memory\.py ((?:--config \S+ )+)--num-gpus (\d+)\)",
        " ".join(comments),
    )
    assert found, comments
    config = configs.load([str(REPOSITORY / path) for path in found[2].replace("--config", "").split()])
    peak = memory.estimate(config, int(found[3]), on_gpu=True).peak
    assert float(found[1]) == pytest.approx(peak / 1e9, abs=0.1)


def test_ablations_cut_and_order_as_their_names_say() -> None:
    def draws_of(overlay: str):
        loss = make_loss(configs.load(files(ABLATION, f"ablations/{overlay}")))
        return loss.draw(3, 0, torch.arange(2), torch.zeros(2, dtype=torch.int64), num_tokens=256, patch_values=1)

    assert (draws_of("dit").steps_BL == 0).all()
    assert (draws_of("fixed_steps").steps_BL[:, -1] == 3).all()
    assert torch.equal(draws_of("pure_ar").steps_BL[0], torch.arange(256))
    acdit = draws_of("acdit")
    assert torch.equal(acdit.steps_BL[0], torch.arange(256) // 64)
    # Each AR step is one block of 8x8 tokens.
    rows_and_columns = acdit.order_BL[0, 64:128]
    assert {(t // 16 // 8, t % 16 // 8) for t in rows_and_columns.tolist()} == {(0, 1)}
    assert torch.equal(draws_of("order_raster").order_BL[1], torch.arange(256))
    assert draws_of("order_dilated").order_BL[0, :5].tolist() == [0, 4, 8, 12, 64]
    assert draws_of("order_block_raster_4").order_BL[0, :5].tolist() == [0, 1, 2, 3, 16]
    assert draws_of("order_block_raster_8").order_BL[0, :9].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 16]


def test_a_dry_run_tells_what_follows(capsys) -> None:
    """Against what is published at 256 and 512 px: mean lengths, FLOPs of an image, few padded lengths."""
    at_256, at_512 = dry_run(["XL"], [], capsys), dry_run(["XL", "512px"], [], capsys)
    assert "tokens a sequence: 510.5 in the mean, 530.0 with padding; lengths: 320, 384, 448, 512, 576\n" in at_256
    assert float(number(at_256, "training FLOPs")) == pytest.approx(1.98e12, rel=0.01)
    assert float(number(at_512, "tokens a sequence")) == pytest.approx(1850, abs=1)
    assert "AR steps: 10 in the mean, decay 0.9, random sizes, random order" in at_256
    assert "global batch: 2048 = 64 a micro-batch x 4 micro-batches x 8 ranks" in at_256
    acdit = dry_run([ABLATION, "ablations/acdit"], [], capsys)
    assert "AR steps: 4, equal sizes, block_raster order" in acdit
    # Three of the four blocks are clean: 4 + 192 + 256.
    assert "tokens a sequence: 452.0 in the mean, 452.0 with padding; lengths: 452\n" in acdit
    assert "lengths: 260\n" in dry_run([ABLATION, "ablations/dit"], [], capsys)


def test_a_preset_learns_captions_both_ways(capsys) -> None:
    """With the trunk and the recipe of L; what is assumed of captions that are not at hand is said."""
    texts, plain = (configs.load(files(name)) for name in ("L-text", "L"))
    assert (texts.model.depth, texts.model.design) == (plain.model.depth, plain.model.design)
    assert (texts.order, texts.noise, texts.engine) == (plain.order, plain.noise, plain.engine)
    assert dataclasses.replace(texts.train, text_loss_weight=plain.train.text_loss_weight) == plain.train
    tasks = texts.data.tasks
    assert tasks.class_to_image == texts.data.mirror_prob == 0
    assert min(tasks.text_to_image, tasks.image_to_text, texts.train.text_loss_weight) > 0
    shown = dry_run(["L-text"], [], capsys)
    assert "captions: taken to have model.max_text_tokens = 128 tokens, since none is at hand\n" in shown
    assert "tokens a sequence: 568.5 in the mean, with padding 640 at most\n" in shown
    assert "tokenizer: not looked at, since data/in1kcap-tokenizer.json is no file of this machine\n" in shown
    without = dry_run(["L-text"], ["data.tasks.image_to_text=0"], capsys)
    of_head = 3 * 2 * 128 * 8192 * 1024 / 4  # of a quarter of the samples
    shorter = dry_run(["L-text"], ["model.max_text_tokens=64"], capsys)
    for other in (without, shorter):
        less = float(number(shown, "training FLOPs")) - float(number(other, "training FLOPs"))
        assert less > of_head / 2


def test_a_preset_made_impossible_is_refused(capsys) -> None:
    with pytest.raises(UserError, match=r"order\.num_ar_steps: expected at most 64"):
        dry_run([ABLATION, "ablations/pure_ar"], ["model.patch_size=4"], capsys)


def test_the_command_takes_several_files_and_does_not_allocate_the_model(tmp_path: Path) -> None:
    names = [argument for name in files("3B", "512px") for argument in ("--config", name)]
    command = [sys.executable, "cfpretrain/train.py", *names, "train.micro_batch_size=4", "--dry-run"]
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=out, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    shown = (tmp_path / "out").read_text()
    assert process.returncode == 0, shown
    assert "parameters: 3,006,188,048\n" in shown
    assert "micro_batch_size: 4\n" in shown
    # In fp32 the weights alone are 12 GB; torch and its libraries are under 2.
    assert usage.ru_maxrss / 1e6 < 6
