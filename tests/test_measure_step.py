"""tools/measure_step.py: the plain implementation is the official network, and both sides train alike."""

import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from cfpretrain import config as configs
from cfpretrain import noise, order, runtime, seeds
from cfpretrain.loss import Draws
from cfpretrain.model import attention, transformer
from cfpretrain.model.transformer import patchify
from tests.closeness import disagreement
from tests.digits import write_digits
from tests.golden_cases import CASES, load
from tests.processes import REPOSITORY, run_in_processes, run_script
from tools import measure_step

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


def small_config(*overrides: str) -> configs.Config:
    return configs.load(REPOSITORY / "configs" / "benchmark" / "cpu.yaml", [*SMALL, *overrides])


# ---------------------------------------------------------------------------
# The plain implementation


@pytest.mark.parametrize("name", CASES)
def test_naive_has_the_official_prediction_loss_and_gradients(name: str) -> None:
    case = load(name)
    c, given, want = case.config, case.group("input."), case.group("output.")
    naive = measure_step.Naive(case.group("weights."), c["heads"], c["patch"])
    steps_BL = order.steps_from_sizes(given["ar_step_sizes"])[None].expand(len(given["labels"]), -1)
    noise_BLP = patchify(given["noise"], c["patch"])
    ids_B = torch.arange(len(steps_BL))
    draws = Draws(0, ids_B, given["labels"], given["order"], steps_BL, given["timesteps"], noise_BLP)
    knobs = configs.OrderConfig(
        ar_weight_first=c["max_ar_weight"],
        ar_weight_last=c["min_ar_weight"],
        ar_weight_schedule=c["ar_weight_schedule"],
    )
    weights_BL = measure_step._plain_weights(knobs, steps_BL)
    schedule = measure_step._plain_schedule(configs.Config())
    loss, prediction = naive.loss(given["latents"], draws, schedule, weights_BL)
    loss.backward()
    assert disagreement(weights_BL[0], want["ar_weights"]) < 1e-5
    # Both are float32 and sum in orders of their own.
    assert disagreement(prediction, want["prediction"]) < 3e-5
    assert disagreement(loss, want["loss"].squeeze()) < 1e-5
    for parameter, norm in case.group("output.grad_norm.").items():
        if not parameter.endswith("k_norm.bias"):  # softmax ignores it
            assert disagreement(naive.weights[parameter].grad.norm(), norm.squeeze()) < 1e-5, parameter


def test_naive_schedule_is_the_run_s() -> None:
    ours = noise.linear_schedule().alphas_cumprod_T
    torch.testing.assert_close(measure_step._plain_schedule(configs.Config()), ours, rtol=1e-12, atol=0)


def test_autocast_computes_in_bf16() -> None:
    case = load("patch1")
    tensors = case.group("weights.")
    given = case.group("input.")
    steps_BL = order.steps_from_sizes(given["ar_step_sizes"])[None].expand(len(given["labels"]), -1)
    noise_BLP, ids_B = patchify(given["noise"], 1), torch.arange(len(steps_BL))
    draws = Draws(0, ids_B, given["labels"], given["order"], steps_BL, given["timesteps"], noise_BLP)
    naive = measure_step.Naive(tensors, case.config["heads"], 1, autocast=True)
    ones = torch.ones_like(steps_BL, dtype=torch.float32)
    _, prediction = naive.loss(given["latents"], draws, measure_step._plain_schedule(configs.Config()), ones)
    assert prediction.dtype == torch.bfloat16
    assert 1e-5 < disagreement(prediction, case.tensors["output.prediction"]) < 0.1


# ---------------------------------------------------------------------------
# Both sides


def losses_of_both(overrides: tuple[str, ...], num_steps: int) -> list[list[float]]:
    """Runs in a process of its own: an engine leaves traces in its process."""
    config = small_config(*overrides)
    runtime.start(CPU)
    sides = [measure_step.make_side(name, config, CPU) for name in ("ours", "naive")]
    return [[measure_step.Stepper(side, config, CPU)(step).loss for step in range(num_steps)] for side in sides]


def test_both_sides_train_alike_with_fixed_positions_and_shared_splits() -> None:
    """With learned ones, and a split for each sample: `test_step_command`."""
    overrides = ("model.position_embedding=sincos", "order.ar_split=batch")
    [[ours, naive]] = run_in_processes(losses_of_both, 1, overrides, 6)
    torch.testing.assert_close(ours, naive, rtol=2e-5, atol=0)


def test_listed_steps_are_repeatable_and_of_several_lengths() -> None:
    config = small_config("model.latent_size=8")
    first, again = (measure_step.make_micro_batches(config, 3, CPU) for _ in range(2))
    assert len(first) == 2
    for (latents, draws), (latents_again, draws_again) in zip(first, again, strict=True):
        assert torch.equal(latents, latents_again)
        assert torch.equal(draws.steps_BL, draws_again.steps_BL)
    assert not torch.equal(first[0][0], first[1][0])
    last_sizes = {
        int((draws.steps_BL[0] == draws.steps_BL[0, -1]).sum())
        for step in range(8)
        for _, draws in measure_step.make_micro_batches(config, step, CPU)
    }
    assert len(last_sizes) > 2


def test_warm_up_meets_every_length_that_is_compiled() -> None:
    compiled = small_config("engine.compile_blocks=true", "engine.clean_token_multiple=8")
    lengths = [0, 8, 16]
    warm_up = measure_step._warm_up_steps(compiled, 30, CPU)
    assert 1 < len(warm_up) <= len(lengths)
    assert measure_step._warm_up_steps(small_config(), 30, CPU) == [30]


@pytest.mark.slow
def test_kernels_of_a_compiled_block_are_counted() -> None:
    counted = measure_step.count_kernels(small_config().model, "sdpa", CPU)
    assert counted["generated"] >= 2  # a forward and a backward
    assert (counted["graphs"], counted["graph_breaks"]) == (1, 0)


# ---------------------------------------------------------------------------
# The command


def last_json(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


def test_step_command() -> None:
    [ended] = run_script(TOOL, ["--config", "configs/benchmark/cpu.yaml", *SMALL, "--against", "naive", "--pairs", "2"])
    assert ended.code == 0, ended.err
    measured = last_json(ended.out)
    assert measured["mfu"] is None
    assert measured["images_per_second"] > 0
    assert 0 < measured["tflops"] < 100
    assert 0 < measured["peak_memory_bytes"] < 1e9
    assert measured["ratio"]["min"] <= measured["ratio"]["median"] <= measured["ratio"]["max"]
    assert measured["against"]["max_relative_loss_difference"] < 2e-5
    assert len(measured["lengths"]) == 2
    assert measured["versions"]["torch"]
    assert measured["hardware"]["cpu"]
    assert "median" in ended.out


def run_here(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", [TOOL, *arguments])
    measure_step.main()


def test_attention_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--tokens", "16", "40", "--head-widths", "32", "--width", "64", "--batch-size", "2")
    run_here(monkeypatch, "--attention", *sizes)
    measured = last_json(capsys.readouterr().out)
    rows = measured["attention"]
    expected = [(length, backend) for length in (64 + 2 * 16, 64 + 2 * 40) for backend in ("naive", "sdpa")]
    assert [(row["length"], row["backend"]) for row in rows if row["backend"] in ("naive", "sdpa")] == expected
    assert all(row["error"] < 1e-5 for row in rows)
    assert set(measured["not_measured"]) | {row["backend"] for row in rows} == {"naive", "sdpa", "flex", "triton"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: --config: expected a YAML file"),
        (["--config", "nowhere.yaml"], "error: config file nowhere.yaml does not exist"),
        (
            ["--attention", "--width", "100", "--head-widths", "64", "--tokens", "8"],
            "error: --head-widths: expected divisors of --width = 100, got 64",
        ),
    ],
)
def test_mistakes_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_here(monkeypatch, *arguments)
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
    from cfpretrain import trainer

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
    attend = transformer.attend if variant.startswith("sdpa") else plain_attention(variant)
    with patch.object(transformer, "attend", attend):
        for _ in range(NUM_STEPS):
            run.train_step()
    run.loader.close()
    return [record.row["loss"] for record in run.window.records]


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
        return measure_step.naive_attention(q, k[:, :, order_K], v[:, :, order_K], mask[..., order_K])

    return attend
