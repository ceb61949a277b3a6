"""tests/plain_step.py: the plain implementation is the official network."""

import pytest
import torch

from cfpretrain.base import config as configs
from cfpretrain.base.console import UserError
from cfpretrain.core import ar as order
from cfpretrain.core.latents import patchify
from cfpretrain.core.objective import Draws
from cfpretrain.core.process import make_process
from tests import plain_step
from tests.closeness import disagreement
from tests.golden_cases import CASES, load


@pytest.mark.parametrize("name", CASES)
def test_naive_has_the_official_prediction_loss_and_gradients(name: str) -> None:
    case = load(name)
    c, given, want = case.config, case.group("input."), case.group("output.")
    naive = plain_step.Naive(case.group("weights."), c["heads"], c["patch"])
    steps_BL = order.steps_from_sizes(given["ar_step_sizes"])[None].expand(len(given["labels"]), -1)
    noise_BLP = patchify(given["noise"], c["patch"])
    ids_B = torch.arange(len(steps_BL))
    draws = Draws(0, ids_B, given["labels"], given["order"], steps_BL, given["timesteps"], noise_BLP)
    knobs = configs.OrderConfig(
        ar_weight_first=c["max_ar_weight"],
        ar_weight_last=c["min_ar_weight"],
        ar_weight_schedule=c["ar_weight_schedule"],
    )
    weights_BL = plain_step.plain_weights(knobs, steps_BL)
    schedule = plain_step.plain_schedule(configs.Config())
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
    ours = make_process().levels(1000).alphas_T ** 2
    torch.testing.assert_close(plain_step.plain_schedule(configs.Config()), ours, rtol=1e-12, atol=0)


def test_another_noise_process_is_refused() -> None:
    config = configs.load("configs/tiny.yaml", ["noise.process=v"])
    with pytest.raises(UserError, match=r"noise\.process: the plain implementation predicts epsilon, got v"):
        plain_step.PlainTraining(config, torch.device("cpu"), autocast=False)


def test_autocast_computes_in_bf16() -> None:
    case = load("patch1")
    tensors = case.group("weights.")
    given = case.group("input.")
    steps_BL = order.steps_from_sizes(given["ar_step_sizes"])[None].expand(len(given["labels"]), -1)
    noise_BLP, ids_B = patchify(given["noise"], 1), torch.arange(len(steps_BL))
    draws = Draws(0, ids_B, given["labels"], given["order"], steps_BL, given["timesteps"], noise_BLP)
    naive = plain_step.Naive(tensors, case.config["heads"], 1, autocast=True)
    ones = torch.ones_like(steps_BL, dtype=torch.float32)
    _, prediction = naive.loss(given["latents"], draws, plain_step.plain_schedule(configs.Config()), ones)
    assert prediction.dtype == torch.bfloat16
    assert 1e-5 < disagreement(prediction, case.tensors["output.prediction"]) < 0.1
