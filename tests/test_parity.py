"""Parity with the official CausalFusion code: predictions, loss, gradients, samples, schedules, within 1e-5."""

import pytest
import torch
from safetensors.torch import load_file

from cfpretrain.core import ar as order
from cfpretrain.core import sampler
from cfpretrain.core.latents import patchify
from cfpretrain.core.modalities import class_segment, image_segment
from cfpretrain.core.model import CausalFusion
from cfpretrain.core.objective import DenoisingLoss, Draws
from cfpretrain.core.process import make_process
from cfpretrain.core.segments import build_layout, may_attend
from cfpretrain.core.solvers import Solver
from cfpretrain.export.official import our_name, to_official
from tests.closeness import disagreement
from tests.golden_cases import CASES, FOLDER, GoldenCase, load

TOLERANCE = 1e-5


def loss_of(case: GoldenCase, model: CausalFusion):
    c, given = case.config, case.group("input.")
    loss = DenoisingLoss(
        process=make_process(),
        ar=order.ARSettings(
            ar_weight_first=c["max_ar_weight"],
            ar_weight_last=c["min_ar_weight"],
            ar_weight_schedule=c["ar_weight_schedule"],
        ),
        patch_size=c["patch"],
        num_cond_tokens=c["cond_tokens"],
        null_class=c["classes"],
        label_drop_prob=0.0,
        seed=0,
    )
    steps_BL = order.steps_from_sizes(given["ar_step_sizes"])[None].expand(len(given["labels"]), -1)
    noise_BLP = patchify(given["noise"], c["patch"])
    ids_B = torch.arange(len(steps_BL))
    draws = Draws(0, ids_B, given["labels"], given["order"], steps_BL, given["timesteps"], noise_BLP)
    batch = loss.prepare(given["latents"], draws)
    return loss(model, batch)["image"], batch


@pytest.mark.parametrize("name", CASES)
def test_prediction_loss_and_gradients(name: str) -> None:
    case = load(name)
    model = case.model()
    predictions = []
    model.register_forward_hook(lambda module, args, output: predictions.append(output["image"].detach()))
    terms, batch = loss_of(case, model)
    mean = terms.total / terms.count
    mean.backward()
    want = case.group("output.")
    assert disagreement(predictions[0], want["prediction"]) < TOLERANCE
    assert disagreement(terms.squared_error_BLP.mean(-1), want["squared_error"].mean(-1)) < TOLERANCE
    assert disagreement(mean, want["loss"].squeeze()) < TOLERANCE
    assert disagreement(batch.of_kind("image").weights_BL[0], want["ar_weights"]) < TOLERANCE

    grads = to_official({name: p.grad for name, p in model.named_parameters()}, model.grid)
    norms = case.group("output.grad_norm.")
    assert norms.keys() <= grads.keys()
    for parameter, norm in norms.items():
        if parameter.endswith("k_norm.bias"):
            # Softmax ignores it: its gradient is rounding noise.
            assert grads[parameter].norm() < 1e-6, parameter
        else:
            assert disagreement(grads[parameter].norm(), norm.squeeze()) < TOLERANCE, parameter
    full = case.group("output.grad.")
    assert full
    for parameter, gradient in full.items():
        assert disagreement(grads[parameter], gradient) < TOLERANCE, parameter


@pytest.mark.parametrize("name", CASES)
def test_visibility(name: str) -> None:
    case = load(name)
    steps = order.steps_from_sizes(case.tensors["input.ar_step_sizes"])[None]
    layout = build_layout([class_segment(case.config["cond_tokens"]), image_segment(steps)])
    hidden = case.tensors["output.hidden_from_attention"].bool()
    assert torch.equal(may_attend(layout.intervals_BMI, hidden.shape[1])[0], ~hidden)


@pytest.mark.parametrize("name", CASES)
def test_forward_process(name: str) -> None:
    case = load(name)
    given = case.group("input.")
    noised, _ = make_process().noise(given["latents"], given["noise"], given["timesteps"])
    assert disagreement(noised, case.tensors["output.noised_latents"]) < TOLERANCE


@pytest.mark.parametrize("guidance", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_samples(name: str, guidance: int) -> None:
    case = load(name)
    model, given = case.model(), case.group(f"sample.cfg{guidance}.")
    raster = torch.arange(model.grid**2).expand(len(given["start"]), -1)

    def draw(denoising_step: int, positions: torch.Tensor) -> torch.Tensor:
        assert torch.equal(positions, raster)
        return given["start"] if denoising_step == 0 else given["step_noise"][denoising_step - 1]

    tokens = sampler.generate(
        model,
        case.tensors["input.labels"],
        raster,
        [raster.shape[1]],
        Solver(make_process(), case.config["sample_steps"]),
        sampler.Guidance(float(guidance)),
        draw,
    )
    assert disagreement(tokens, given["result"]) < TOLERANCE


def test_schedules() -> None:
    golden = load_file(FOLDER / "schedule.safetensors")
    for num_steps in (1000, 250, 50, 10, 8):
        levels = make_process().levels(num_steps)
        assert torch.equal(levels.times_T, golden[f"timestep_map.{num_steps}"])
        # The official betas come from another summation: equal up to float64 rounding.
        torch.testing.assert_close(levels.alphas_T**2, golden[f"alphas_cumprod.{num_steps}"], rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_official_names_round_trip(name: str) -> None:
    case = load(name)
    weights = case.group("weights.")
    model = case.model()
    again = to_official(model.state_dict(), model.grid)
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[key], weights[key]) for key in weights)


def test_foreign_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"adaLN.weight.*not part of"):
        our_name("adaLN.weight")


def test_published_parameter_counts() -> None:
    sizes = {"L": (1024, 24, 16, 369.5), "XL": (1280, 32, 20, 714.0), "H": (1408, 48, 22, 1235.6)}
    for width, depth, heads, millions in sizes.values():
        with torch.device("meta"):
            model = CausalFusion(
                grid=16,
                patch_values=16,
                width=width,
                depth=depth,
                num_heads=heads,
                num_cond_tokens=64,
                num_classes=1000,
            )
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
