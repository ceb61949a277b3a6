"""tools/measure.py step: all sides train alike, and what it says of a step makes sense."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from cfpretrain.base import config as configs
from cfpretrain.base import runtime
from cfpretrain.base.console import EXIT_USER_ERROR
from cfpretrain.core import attention, block, seeds
from cfpretrain.data.loader import Loader
from cfpretrain.run.build import make_loss, make_prepare
from tests.digits import write_digits
from tests.image_files import write_digits as write_images
from tests.processes import REPOSITORY, run_in_processes, run_script
from tools import measure as command
from tools.measuring import sides, step
from tools.measuring.attention import naive_attention
from tools.measuring.common import on_noise

TOOL = "tools/measure_step.py"
CPU = torch.device("cpu")
SMALL = (
    "model.width=32",
    "model.depth=2",
    "model.num_heads=2",
    "model.num_classes=10",
    "model.latent_size=4",
    "model.num_cond_tokens=4",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
)

TEXTS = ("model.vocabulary=60", "model.max_text_tokens=24", "data.tokenizer=any.json", "data.tasks.image_to_text=1")


def small_config(*overrides: str) -> configs.Config:
    return configs.load(REPOSITORY / "configs" / "benchmark" / "cpu.yaml", [*SMALL, *overrides])


# ---------------------------------------------------------------------------
# The sides


def losses_of(names: tuple[str, ...], overrides: tuple[str, ...], folder: Path, num_steps: int) -> list[list[float]]:
    """Runs in a process of its own: an engine leaves traces in its process."""
    config = on_noise(small_config(*overrides), folder)
    runtime.start(CPU)
    losses = []
    for name in names:
        side = sides.make_side(name, config, CPU)
        losses.append([made.loss for made in sides.make_steps(side, num_steps, CPU)])
        side.close()
    return losses


def test_all_sides_train_alike(tmp_path: Path) -> None:
    """On fixed positions and shared splits; with learned ones, and a split for each sample: `test_step_command`."""
    overrides = ("model.position_embedding=sincos", "order.ar_split=batch", "train.learning_rate=1e-4")
    overrides += ("train.warmup_steps=0", "data.num_workers=0")
    names = ("trainer", "bare", "naive")
    [[trainer, bare, naive]] = run_in_processes(losses_of, 1, names, overrides, tmp_path, 6)
    assert len(set(trainer)) == 6
    assert trainer == pytest.approx(bare, rel=1e-9)
    torch.testing.assert_close(trainer, naive, rtol=2e-5, atol=0)


def test_no_timed_step_is_the_first_of_its_length() -> None:
    compiled = small_config("engine.compile_blocks=true", "engine.clean_token_multiple=8", "model.latent_size=8")
    plan = step.plan_steps(compiled, 8, compiles=True)
    loss = make_loss(compiled)
    lengths = [step._length_of(compiled, loss, at) for at in range(200)]
    end = plan.num_warm_up + 8
    assert plan.lengths == lengths[plan.num_warm_up : end]
    assert 1 < len(set(lengths)) <= 9
    assert set(plan.lengths) <= set(lengths[: plan.num_warm_up])
    assert plan.profiled_length == lengths[end + plan.num_between]
    assert plan.profiled_length in plan.lengths
    assert step.plan_steps(small_config(), 8, compiles=False).num_warm_up == 1


def test_no_timed_step_is_the_first_of_its_length_with_captions(tmp_path: Path) -> None:
    padded = ("engine.compile_blocks=true", "engine.clean_token_multiple=8", "train.global_batch_size=16")
    padded += ("data.num_workers=0",)
    config = on_noise(small_config(*TEXTS, *padded, "model.latent_size=8"), tmp_path)
    plan = step.plan_steps(config, 6, compiles=True)
    loader = Loader(config, make_prepare(config), 0, 1)
    lengths = [{batch.intervals_BMI.shape[1] for batch in next(loader)} for _ in range(plan.num_warm_up + 6)]
    loader.close()
    timed = lengths[plan.num_warm_up :]
    assert plan.lengths == list(map(max, timed))
    assert 1 < len(set().union(*lengths)) <= len(set().union(*lengths[: plan.num_warm_up]))
    assert set().union(*timed) <= set().union(*lengths[: plan.num_warm_up])


def test_lengths_are_those_of_the_batches() -> None:
    config = small_config("model.latent_size=8", "engine.clean_token_multiple=3")
    loss, ids_B = make_loss(config), torch.arange(100, 103)
    latents_BCYX = torch.zeros(3, config.model.latent_channels, 8, 8)
    for at in range(5):
        draws = loss.draw(at, 1, ids_B, ids_B % 10, config.model.num_tokens, config.model.patch_values)
        assert step._length_of(config, loss, at) == loss.prepare(latents_BCYX, draws).intervals_BMI.shape[1]


def test_the_micro_batch_is_halved_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config("train.global_batch_size=48", "train.micro_batch_size=48")
    monkeypatch.setattr(
        step.memory, "estimate", lambda config, *_: SimpleNamespace(peak=1e9 * config.micro_batch_size(1))
    )
    of_gpu = SimpleNamespace(total_memory=13e9 + step._RESERVED_BYTES)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: of_gpu)
    assert step._fitting(config, torch.device("cuda")).micro_batch_size(1) == 12
    assert step._fitting(config, CPU) == config


# ---------------------------------------------------------------------------
# The command


def last_json(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


def test_step_command() -> None:
    options = ["--config", "configs/benchmark/cpu.yaml", *SMALL, "--against", "naive", "--pairs", "2", "--profile"]
    [ended] = run_script(TOOL, options)
    assert ended.code == 0, ended.err
    measured = last_json(ended.out)
    assert measured["side"] == "trainer"
    assert measured["mfu"] is None
    assert measured["images_per_second"] > 0
    assert 0 < measured["tflop_per_second"] < 100
    assert 0 < measured["peak_memory_bytes"] < 1e9
    assert 0 < measured["estimated_memory_bytes"] < 1e9
    assert measured["ratio"]["min"] <= measured["ratio"]["median"] <= measured["ratio"]["max"]
    assert measured["against"]["max_relative_loss_difference"] < 2e-5
    assert len(measured["lengths"]) == len(measured["seconds"]) == 2
    assert measured["start_seconds"]["the first step"] > 0
    assert measured["start_seconds"]["building"] > measured["start_seconds"]["initialising the weights"] > 0
    shares = measured["profile"]["shares"]
    assert abs(sum(shares.values()) - 1) < 1e-6
    assert min(shares["matrix products"], shares["attention"], shares["optimizer"]) > 0
    assert measured["versions"]["torch"]
    assert measured["hardware"]["cpu"]
    assert "median" in ended.out


def test_step_with_captions() -> None:
    """Of words of noise; the plain implementation has none."""
    options = ["--config", "configs/benchmark/cpu.yaml", *SMALL, *TEXTS, "--pairs", "2"]
    [ended] = run_script(TOOL, options)
    assert ended.code == 0, ended.err
    measured = last_json(ended.out)
    assert measured["config"]["model"]["vocabulary"] == 60
    assert 0 < measured["tflop_per_second"] < 100
    assert len(measured["lengths"]) == 2
    [refused] = run_script(TOOL, [*options, "--against", "naive"])
    assert refused.code == EXIT_USER_ERROR
    assert "--against: expected a model without texts" in refused.err


def test_step_on_photos() -> None:
    """Files become latents beside the step, which counts the model's FLOPs alone."""
    overrides = ["model.latent_channels=4", "order.ar_split=batch"]
    options = ["--config", "configs/benchmark/cpu.yaml", *SMALL, *overrides, "--pairs", "1"]
    [plain], [ended] = (run_script(TOOL, [*options, *more]) for more in ([], ["--photos", "small"]))
    assert plain.code == 0, plain.err
    assert ended.code == 0, ended.err
    latents, images = last_json(plain.out), last_json(ended.out)
    cost = images["encoding"]
    assert f"encoding images beside the step: {cost['flops']:.3e} FLOPs an image" in ended.out
    assert images["estimated_memory_bytes"] > cost["weights"] + cost["working"] > 0
    assert latents["encoding"] is None
    flops = [found["tflop_per_second"] / found["images_per_second"] for found in (latents, images)]
    assert flops[0] == pytest.approx(flops[1])  # of one split for all


def test_step_on_image_shards_of_the_config(tmp_path: Path) -> None:
    """They are measured as they are; a side without a loader refuses them."""
    images = write_images(tmp_path / "images", 0, 20)
    tiny = ["--config", "configs/tiny.yaml", f"data.shards={images}", *SMALL, "model.latent_size=8", "--pairs", "1"]
    [ended] = run_script(TOOL, tiny)
    assert ended.code == 0, ended.err
    encoding = last_json(ended.out)["encoding"]
    assert (encoding["flops"], encoding["weights"]) == (0, 0)
    assert encoding["working"] > 0
    for option in (["--bare"], ["--against", "naive"]):
        [ended] = run_script(TOOL, [*tiny, *option])
        assert ended.code == 2
        assert "error: --bare, --against: expected latents, since batches that are made ahead" in ended.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nowhere.yaml"], "error: config file nowhere.yaml does not exist"),
        (["--config", "configs/tiny.yaml", "train.nothing=1"], "error: command line: train.nothing: unknown key"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["step", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------
# The same training

NUM_STEPS = 200
HORIZONS = (50, 100, 150, NUM_STEPS)  # the demo's learning rate makes rounding grow to a tenth of the loss


@pytest.mark.slow
def test_every_backend_trains_as_naive_attention_does(tmp_path: Path) -> None:
    """Losses of the demo differ by no more than twice what summing in another order makes of them."""
    shards = write_digits(tmp_path / "digits", 1000)

    def losses(variant: str) -> Tensor:
        # One launch each: a trainer is built once in a process.
        [values] = run_in_processes(train_tiny, 1, variant, shards, tmp_path / variant, timeout_s=900)
        assert len(values) == NUM_STEPS
        return torch.tensor(values, dtype=torch.float64)

    naive = losses("naive")
    assert naive[-20:].mean() < 0.7 * naive[0]

    def drift(variant: str) -> Tensor:
        """The largest difference up to each horizon."""
        difference = (losses(variant) / naive - 1).abs()
        return torch.stack([difference[:horizon].max() for horizon in HORIZONS])

    controls = {variant: drift(variant) for variant in ("naive, keys reversed", "naive, keys shuffled")}
    measured = {variant: drift(variant) for variant in ("sdpa", "sdpa, compiled")}
    for variant, drifts in (controls | measured).items():
        print(f"{variant:22}", *(f"{value:.1e}" for value in drifts))
    control = torch.stack(list(controls.values())).max(0).values
    assert control.min() > 0
    for variant, drifts in measured.items():
        assert (drifts <= 2 * control).all(), (variant, controls, measured)


def train_tiny(variant: str, shards: Path, folder: Path) -> list[float]:
    """The losses of the first steps of `configs/tiny.yaml`."""
    from cfpretrain.training import trainer

    compiled = variant.endswith("compiled")
    config = configs.load(
        REPOSITORY / "configs" / "tiny.yaml",
        [
            f"run.folder={folder}",
            f"data.shards={shards}",
            "metrics.wandb=disabled",
            f"engine.compile_blocks={str(compiled).lower()}",
        ],
    )
    runtime.start(CPU)
    trainer.prepare_folder(config, CPU)
    run = trainer.Trainer(config, CPU)
    attend = block.attend if variant.startswith("sdpa") else plain_attention(variant)
    with patch.object(block, "attend", attend):
        for _ in range(NUM_STEPS):
            run.train_step()
    run.loader.close()
    return [row["loss"] for row in run.log.rows]


def plain_attention(variant: str) -> Callable[[Tensor, Tensor, Tensor, attention.Visibility], Tensor]:
    """The plain implementation's attention, over keys in the order that the variant's name says."""

    def attend(q: Tensor, k: Tensor, v: Tensor, visibility: attention.Visibility) -> Tensor:
        assert isinstance(visibility.mask, Tensor)
        mask = torch.zeros(visibility.mask.shape).masked_fill(~visibility.mask, -torch.inf)
        num_keys = k.shape[2]
        order_K = torch.arange(num_keys)
        if "reversed" in variant:
            order_K = order_K.flip(0)
        if "shuffled" in variant:
            order_K = seeds.permutation(seeds.key(0, "summation order"), num_keys)
        return naive_attention(q, k[:, :, order_K], v[:, :, order_K], mask[..., order_K])

    return attend
