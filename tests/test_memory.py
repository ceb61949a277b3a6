"""The estimate of memory against what real steps hold, and the tool's verdicts."""

import json
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from cfpretrain.base import config as configs
from cfpretrain.base import runtime
from cfpretrain.base.config import Config
from cfpretrain.base.console import UserError
from cfpretrain.core.attention import make_visibility
from cfpretrain.core.block import Block, BlockSettings, make_rotation, make_routes
from cfpretrain.core.design import TRUNKS, make_design
from cfpretrain.core.modalities import class_segment, image_segment
from cfpretrain.core.objective import Draws
from cfpretrain.core.segments import build_layout
from cfpretrain.run import build
from cfpretrain.run.sequences import longest
from cfpretrain.training import memory, zero
from cfpretrain.training.encoding_cost import encoding_cost
from tests.digits import write_digits as write_latents
from tests.image_files import write_digits as write_images
from tests.processes import REPOSITORY, run_in_processes, run_script
from tools import estimate_memory

TOOL = "tools/estimate_memory.py"
CPU = torch.device("cpu")
# Small beside the models here, as the real one is beside real models.
BUCKET_NUMEL = 40_000
KINDS = {
    1: [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")],
    2: [(stage, "bf16") for stage in range(4)],
}


def load(*overrides: str) -> Config:
    return configs.load(REPOSITORY / "configs" / "tiny.yaml", overrides)


def engine_overrides(stage: int, precision: str) -> tuple[str, str]:
    return f"engine.zero_stage={stage}", f"engine.precision={precision}"


def states_config(stage: int, precision: str, world_size: int, *others: str) -> Config:
    """Two micro-batches of one sample on each rank: the states outweigh the activations."""
    batch = ("train.micro_batch_size=1", f"train.global_batch_size={2 * world_size}")
    return load(
        *engine_overrides(stage, precision), "model.width=96", "model.depth=4", "model.num_classes=40", *batch, *others
    )


def activations_config(precision: str, checkpointing: bool, split: str, *others: str) -> Config:
    """A thin model on long sequences and a large micro-batch: the activations outweigh the states."""
    return load(
        *engine_overrides(1, precision),
        "model.width=64",
        "model.num_heads=2",
        "model.patch_size=1",
        f"model.depth={10 if checkpointing else 4}",
        "train.micro_batch_size=4",
        "train.global_batch_size=8",
        f"engine.activation_checkpointing={str(checkpointing).lower()}",
        f"order.ar_split={split}",
        *others,
    )


OTHERS = [("train.optimizer=muon",), ("model.trunk=gpt2", "train.freeze=[trunk]")]
GROUPED = ("model.trunk=qwen3", "model.num_heads=4", "model.num_kv_heads=2", "model.head_width=32")
# Whose logits are the largest tensor of all.
TEXTS = ("model.vocabulary=4000", "model.max_text_tokens=48", "data.tokenizer=any.json")
TEXTS += ("data.tasks.text_to_image=1", "data.tasks.image_to_text=1")
ACTIVATIONS: list[tuple[Any, ...]] = [
    ("fp32", False, "sample"),
    ("fp32", True, "sample"),
    ("bf16", False, "sample"),
    ("bf16", True, "sample"),
    ("fp32", False, "batch"),
    ("fp32", False, "sample", *GROUPED),
    ("bf16", False, "sample", *GROUPED),
    ("fp32", False, "sample", "model.trunk=llama"),
    ("fp32", False, "sample", "model.trunk=gpt2"),
    ("fp32", False, "sample", *TEXTS),
    ("bf16", False, "sample", *TEXTS),
    ("bf16", True, "sample", *TEXTS),
    ("fp32", False, "batch", *TEXTS, "model.vocabulary=300"),
]
# Designs and changes of them whose blocks keep this and that.
BLOCKS: list[tuple[str, dict[str, Any]]] = [
    *((trunk, {}) for trunk in TRUNKS),
    *((trunk, {"num_kv_heads": 2, "head_width": 32, "mlp_width": 96}) for trunk in TRUNKS),
    *((trunk, {"num_kv_heads": n, "separate_image_weights": True}) for trunk in TRUNKS for n in (2, 4)),
]


def measure(cases: list[Config]) -> list[tuple[int, int]]:
    """In a rank: (bytes held between micro-batches, peak) of real steps of each config."""
    runtime.start(CPU)
    with patch.object(zero, "_BUCKET_NUMEL", BUCKET_NUMEL):
        return [estimate_memory.measure_step(config, CPU) for config in cases]


def expect(config: Config, world_size: int) -> memory.Estimate:
    with patch.object(zero, "_BUCKET_NUMEL", BUCKET_NUMEL):
        return memory.estimate(config, world_size, on_gpu=False)


# ---------------------------------------------------------------------------
# Against real steps


@pytest.fixture(scope="module")
def one() -> list[tuple[int, int]]:
    """What steps on one rank held: those of KINDS, of ACTIVATIONS, of KINDS with Muon, and with a frozen trunk."""
    cases = [states_config(*kind, 1) for kind in KINDS[1]] + [activations_config(*kind) for kind in ACTIVATIONS]
    cases += [states_config(*kind, 1, *others) for others in OTHERS for kind in KINDS[1]]
    measured: list[tuple[int, int]] = run_in_processes(measure, 1, cases)[0]
    return measured


def check_states(world_size: int, measured: list[tuple[int, int]]) -> None:
    for (stage, precision), (held, peak) in zip(KINDS[world_size], measured, strict=True):
        found = expect(states_config(stage, precision, world_size), world_size)
        assert found.between_micro_batches == pytest.approx(held, rel=0.02), (stage, precision)
        # Here the reduction or the update is often the worst moment.
        assert 0.95 < found.peak / peak < 1.15, (stage, precision, found, peak)


def test_states_of_one_rank(one: list[tuple[int, int]]) -> None:
    check_states(1, one[: len(KINDS[1])])


@pytest.mark.parametrize("number", range(2))
def test_states_of_muon_and_of_a_frozen_trunk(one: list[tuple[int, int]], number: int) -> None:
    measured = one[len(KINDS[1]) + len(ACTIVATIONS) :][number * len(KINDS[1]) :][: len(KINDS[1])]
    for kind, (held, _) in zip(KINDS[1], measured, strict=True):
        found = expect(states_config(*kind, 1, *OTHERS[number]), 1)
        assert found.between_micro_batches == pytest.approx(held, rel=0.02), kind


def test_states_of_two_ranks() -> None:
    for measured in run_in_processes(measure, 2, [states_config(*kind, 2) for kind in KINDS[2]]):
        check_states(2, measured)


def test_activations(one: list[tuple[int, int]]) -> None:
    for kind, (held, peak) in zip(ACTIVATIONS, one[len(KINDS[1]) : len(KINDS[1]) + len(ACTIVATIONS)], strict=True):
        found = expect(activations_config(*kind), 1)
        assert found.worst_moment == "backward"
        assert found.peak - found.static == pytest.approx(peak - held, rel=0.1), kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("trunk", "changes"), BLOCKS)
def test_what_autograd_keeps_of_a_block(trunk: str, changes: dict[str, Any], dtype: torch.dtype) -> None:
    """Bytes of all tensors that the backward needs, but weights, the mask and the rotation, which blocks share."""
    B, M, design = 2, 40, make_design(trunk, 64, 4, changes)
    block = Block(design, BlockSettings()).to(dtype)
    end_M = torch.arange(1, M + 1)
    mask = make_visibility(torch.stack([0 * end_M, end_M, 0 * end_M, 0 * end_M], -1)[None], M, "sdpa")
    rotation = make_rotation(design, end_M[None], dtype) if design.rotary_base else None
    is_image_BM = (torch.arange(M) % 3 > 0).expand(B, M)
    routes = (
        make_routes(is_image_BM, int(is_image_BM[0].sum()), int((~is_image_BM[0]).sum()))
        if design.separate_image_weights
        else None
    )
    shared = {one.untyped_storage()._cdata for one in [*block.parameters(), *(rotation or ()), *(routes or ())]}
    kept: dict[int, tuple[Any, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in shared and tensor.shape[-2:] != (M, M):
            kept[storage._cdata] = storage, storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out_BMD = block(torch.randn(B, M, 64, dtype=dtype, requires_grad=True), mask, None, rotation, routes)
    assert out_BMD.requires_grad
    measured = sum(num_bytes for _, num_bytes in kept.values())
    assert B * M * memory.kept_of_block(design, dtype.itemsize, on_gpu=False) == pytest.approx(measured, rel=0.02)


# ---------------------------------------------------------------------------
# The arithmetic


def three_billion(num_ranks: int = 1, **knobs: Any) -> Config:
    """The largest preset, in 8 micro-batches of 4 a rank; `knobs` are of its section `engine`."""
    batch = [f"train.global_batch_size={32 * num_ranks}", "train.micro_batch_size=4"]
    config = configs.load(REPOSITORY / "configs" / "3B.yaml", batch)
    return memory.with_knobs(config, {f"engine.{name}": value for name, value in knobs.items()})


def estimate(num_ranks: int = 1, **knobs: Any) -> memory.Estimate:
    return memory.estimate(three_billion(num_ranks, **knobs), num_ranks, on_gpu=True)


def test_three_billion_on_one_gpu() -> None:
    """Bytes a parameter: bf16 weights 2 + fp32 gradients 4 + masters 4 + Adam 8 + EMA 4."""
    num_parameters = sum(memory.parameter_numels(three_billion().model))
    assert num_parameters == pytest.approx(3004.2e6, rel=1e-4)
    for stage in (1, 2, 3):
        found = estimate(zero_stage=stage)
        # At stage 3 small parameters stay gathered beside the shards.
        assert found.weights / num_parameters == pytest.approx(2, rel=1e-3 if stage == 3 else 0)
        states = (found.gradients, found.optimizer, found.ema)
        assert states == (4 * num_parameters, 12 * num_parameters, 4 * num_parameters)
        assert found.static == sum((found.weights, *states, found.buffers))


def test_ema_moves_to_the_host() -> None:
    device, host = (estimate(ema_on_host=on) for on in (False, True))
    size = 4 * sum(memory.parameter_numels(three_billion().model))
    assert (device.ema, device.host, host.ema, host.host) == (size, 0, 0, size)
    assert device.peak - host.peak == size


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", range(4))
def test_largest_micro_batch_is_the_largest_that_fits(stage: int, checkpointing: bool) -> None:
    config = three_billion(8, zero_stage=stage, activation_checkpointing=checkpointing, attention="sdpa")
    sizes = {size: memory.with_knobs(config, {"train.micro_batch_size": size}) for size in (1, 2, 4, 8, 16, 32)}
    fits = {size: memory.estimate(other, 8, True).peak <= 76e9 for size, other in sizes.items()}
    largest = max((size for size, does in fits.items() if does), default=None)
    assert memory.largest_micro_batch(config, 8, True, int(76e9)) == largest
    assert memory.largest_micro_batch(config, 8, True, 10**9) is None


def test_more_ranks_and_higher_stages_never_need_more() -> None:
    by_stage = [estimate(8, zero_stage=stage).static for stage in range(4)]
    assert by_stage == sorted(by_stage, reverse=True)
    for stage in range(4):
        by_ranks = [estimate(num_ranks, zero_stage=stage).peak for num_ranks in (1, 2, 8, 64)]
        assert by_ranks == sorted(by_ranks, reverse=True)


def masks_of(*overrides: str, on_gpu: bool = True) -> int:
    """Dense masks of a micro-batch of 4."""
    config = load("train.micro_batch_size=4", "train.global_batch_size=8", *overrides)
    return memory.num_dense_masks(config, 1, on_gpu)


def test_masks_are_those_of_the_backend_that_runs() -> None:
    compiled, narrow = "engine.compile_blocks=true", "model.num_heads=16"
    # What `auto` chooses on a GPU for heads of 32 and of 16, for narrower ones, and on a CPU.
    assert masks_of() == masks_of(compiled) == masks_of("model.num_heads=8") == 0
    assert masks_of(narrow) == masks_of(compiled, narrow) == masks_of(on_gpu=False) == 4
    assert masks_of("engine.attention=triton") == 0
    for shared in (
        ["order.ar_split=batch"],
        ["order.num_ar_steps=1"],
        ["order.num_ar_steps=4", "order.ar_step_sizes=equal"],
    ):
        assert masks_of(*shared, on_gpu=False) == 1
    with pytest.raises(
        UserError, match=r"engine\.attention: flex needs a GPU, and this run computes on the cpu; or use sdpa"
    ):
        masks_of("engine.attention=flex", on_gpu=False)


def test_a_mask_of_each_sample_grows_with_the_micro_batch() -> None:
    def masks(size: int, split: str) -> int:
        """Bytes of activations more than without a mask."""
        batch = {"train.micro_batch_size": size, "order.ar_split": split}
        masked, plain = (
            memory.estimate(memory.with_knobs(three_billion(attention=name), batch), 1, True).activations
            for name in ("sdpa", "triton")
        )
        return masked - plain

    of_one = masks(4, "batch")
    assert of_one > 0
    assert masks(16, "batch") == of_one
    for size in (1, 4, 16):
        assert masks(size, "sample") == size * of_one


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["order.num_ar_steps=1"],
        ["order.num_ar_steps=3"],
        ["order.num_ar_steps=16"],
        ["order.num_ar_steps=4", "order.ar_step_sizes=equal"],
        ["engine.clean_token_multiple=6"],
        ["engine.clean_token_multiple=6", "order.num_ar_steps=4", "order.ar_step_sizes=equal"],
    ],
    ids=str,
)
def test_the_longest_sequence_is_estimated_and_measured(overrides: list[str]) -> None:
    """The longest that training draws, in the estimate and in a measured step."""
    config = load(*overrides)
    loss, num_tokens = build.make_loss(config), config.model.num_tokens

    def length(draws: Draws) -> int:
        segments = [class_segment(config.model.num_cond_tokens), image_segment(draws.steps_BL)]
        return build_layout(segments, loss.clean_multiple).step_BM.shape[1]

    drawn = [loss.draw(step, 0, torch.arange(2), torch.arange(2), num_tokens, 1) for step in range(200)]
    assert longest(config).computed == max(map(length, drawn)) == length(estimate_memory.longest(drawn[0], config))


# ---------------------------------------------------------------------------
# The command


def arguments(**values: Any) -> Any:
    given = {"num_gpus": 1, "gpu_memory_gb": 80.0, "reserve_gb": 4.0, "json": False, "measure": False}
    given |= {"from_images": False}
    given |= {"overrides": [], "allow_env": False}
    return type("Arguments", (), {**given, **values})


def test_command_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    config, overrides = [str(REPOSITORY / "configs" / "3B.yaml")], ["train.micro_batch_size=4"]
    assert estimate_memory.run(arguments(config=config, overrides=overrides, num_gpus=8, json=True))
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    # All but stage 0 with checkpointing, which bf16 does not have.
    assert [(row["zero_stage"], row["checkpointing"]) for row in report["rows"]] == [
        (stage, checkpointing) for stage in range(4) for checkpointing in (False, True) if stage or not checkpointing
    ]
    assert [row["chosen"] for row in report["rows"]].count(True) == 1
    marked = [line for line in lines if line.startswith("*")]
    assert len(marked) == 2
    assert "fits as written" in marked[1]


def test_command_says_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    three_billion = str(REPOSITORY / "configs" / "3B.yaml")
    run = partial(arguments, config=[three_billion], overrides=["engine.ema_on_host=false"])
    assert not estimate_memory.run(run(gpu_memory_gb=76.0))
    said = capsys.readouterr().out
    assert "does not fit as written" in said
    assert any("engine.ema_on_host=true" in changes for changes in advised(said))
    assert not estimate_memory.run(run(gpu_memory_gb=24.0))
    assert "more GPUs" in capsys.readouterr().out


def advised(said: str) -> list[list[str]]:
    """The overrides of each line of advice."""
    prefix = "  fits with: "
    return [line.removeprefix(prefix).split() for line in said.splitlines() if line.startswith(prefix)]


@pytest.mark.parametrize(
    ("name", "overrides", "num_gpus", "gpu_memory_gb"),
    [
        ("3B", ["engine.ema_on_host=false"], 1, 76.0),
        ("3B", ["engine.zero_stage=0", "engine.activation_checkpointing=false"], 8, 60.0),
        ("XL", ["engine.zero_stage=0"], 8, 30.0),
        ("XL", ["engine.zero_stage=0", "engine.precision=fp32"], 2, 40.0),
        ("L", ["engine.compile_blocks=false"], 8, 40.0),
    ],
    ids=str,
)
def test_advice_is_a_config_that_passes_its_check_and_fits(
    name: str, overrides: list[str], num_gpus: int, gpu_memory_gb: float, capsys: pytest.CaptureFixture[str]
) -> None:
    run = partial(
        arguments, config=[str(REPOSITORY / f"configs/{name}.yaml")], num_gpus=num_gpus, gpu_memory_gb=gpu_memory_gb
    )
    assert not estimate_memory.run(run(overrides=overrides))
    advice = advised(capsys.readouterr().out)
    assert advice
    for changes in advice:
        # It checks the config first.
        assert estimate_memory.run(run(overrides=[*overrides, *changes])), changes


IMAGES = [str(REPOSITORY / "configs" / "demo.yaml")]
DIGITS = f"data.autoencoder={REPOSITORY / 'configs' / 'autoencoders' / 'digits'}"


def reported(capsys: pytest.CaptureFixture[str], **given: Any) -> tuple[str, dict[str, Any]]:
    """What the tool says, and its last line."""
    estimate_memory.run(arguments(config=IMAGES, json=True, **given))
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


def test_command_counts_the_autoencoder_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where shards at hand hold images, or somebody says that others do."""
    images, latents = write_images(tmp_path / "images", 0, 20), write_latents(tmp_path / "latents", 100)
    of_images = [DIGITS, f"data.shards={images}"]
    said, found = reported(capsys, overrides=of_images)
    cost = encoding_cost(configs.load(IMAGES, of_images), on_gpu=True)
    assert "data.shards hold images, encoded during training: " in said
    assert found["encoding"] == {"flops": cost.flops, "weights": cost.weights, "working": cost.working}
    elsewhere = [DIGITS, f"data.shards={tmp_path / 'elsewhere'}"]
    said, assumed = reported(capsys, overrides=elsewhere, from_images=True)
    assert "data.shards are taken to hold images, " in said
    assert assumed == found
    for overrides, kind in (
        (elsewhere, "data.shards are not at hand, and taken for latents (for images: --from-images)"),
        ([f"data.shards={latents}"], "data.shards hold latents: no autoencoder is at work"),
    ):
        said, without = reported(capsys, overrides=overrides)
        assert kind in said
        assert without["encoding"] is None
        for row, plain in zip(found["rows"], without["rows"], strict=True):
            assert row["autoencoder"] == cost.num_bytes
            assert row["peak"] == plain["peak"] + cost.num_bytes
    with pytest.raises(UserError, match=r"--from-images: expected image shards, but data.shards hold latents"):
        reported(capsys, overrides=[f"data.shards={latents}"], from_images=True)


def test_micro_batches_leave_room_for_the_autoencoder(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a memory that holds the largest micro-batch, and of one that holds nothing beside a large encoded batch."""
    overrides = ["train.micro_batch_size=8", DIGITS, "data.encode_batch_size=64", "data.shards=elsewhere"]
    config = configs.load(IMAGES, overrides)
    encoding = encoding_cost(config, on_gpu=True)
    peak = memory.estimate(config, 1, True, encoding).peak
    largest = memory.largest_micro_batch(config, 1, True, peak, encoding)
    assert largest == memory.largest_micro_batch(config, 1, True, peak - encoding.num_bytes) is not None
    exactly = {"overrides": overrides, "reserve_gb": 0.0, "gpu_memory_gb": peak / 1e9}
    for from_images, is_larger in ((True, False), (False, True)):
        said, found = reported(capsys, **exactly, from_images=from_images)
        [chosen] = [row for row in found["rows"] if row["chosen"]]
        assert chosen["fits"]
        assert (chosen["largest_micro_batch_size"] > 8) == is_larger
    said, found = reported(capsys, **exactly | {"gpu_memory_gb": encoding.num_bytes / 1e9}, from_images=True)
    assert not any(row["fits"] for row in found["rows"])
    assert "are the autoencoder's: a smaller data.encode_batch_size needs less" in said


def test_command_refuses_mistakes() -> None:
    config = [str(REPOSITORY / "configs" / "tiny.yaml")]
    for wrong, message in (
        ({"num_gpus": 0}, "--num-gpus: expected at least 1"),
        ({"reserve_gb": 80.0}, "--reserve-gb"),
        ({"num_gpus": 2, "measure": True}, "--measure"),
        ({"num_gpus": 3}, "train.global_batch_size"),
    ):
        with pytest.raises(UserError, match=message):
            estimate_memory.run(arguments(config=config, **wrong))


@pytest.mark.slow
def test_command_measures() -> None:
    small = ["model.width=32", "model.depth=2", "model.num_heads=2", "train.global_batch_size=8", "engine.zero_stage=1"]
    ended = run_script(
        TOOL, ["--config", "configs/tiny.yaml", "--measure", "--json", "train.micro_batch_size=4", *small]
    )
    assert ended[0].code == 0, ended[0].err
    report = json.loads(ended[0].out.splitlines()[-1])
    assert report["device"] == "cpu"
    assert report["held_bytes"]["estimated"] == pytest.approx(report["held_bytes"]["measured"], rel=0.02)


def test_advice_names_what_is_not_done_yet() -> None:
    """The line of a run that found too little memory."""
    overrides = ("train.global_batch_size=64", "train.micro_batch_size=8", "engine.zero_stage=1")
    config = load(*overrides)
    first = memory.advise(config, 4, on_gpu=True)
    assert f"needs {memory.estimate(config, 4, on_gpu=True).peak / 1e9:.1f} GB on each rank" in first
    done = (
        "train.micro_batch_size=4, engine.activation_checkpointing=true, engine.ema_on_host=true, engine.zero_stage=3"
    )
    assert first.partition("to lower it: ")[2] == done
    assert memory.advise(config, 1, on_gpu=True).endswith("more GPUs at engine.zero_stage=3")
    knobs = {"activation_checkpointing": True, "ema_on_host": True, "zero_stage": 3}
    config = memory.with_knobs(config, {f"engine.{name}": value for name, value in knobs.items()})
    config = memory.with_knobs(config, {"train.micro_batch_size": 1})
    assert memory.advise(config, 4, on_gpu=True).partition("to lower it: ")[2] == "more GPUs"


def test_advice_of_a_run_from_images() -> None:
    config = configs.load(IMAGES, [DIGITS])
    encoding = encoding_cost(config, on_gpu=True)
    said = memory.advise(config, 1, True, "images")
    peak = memory.estimate(config, 1, True, encoding).peak
    assert peak == memory.estimate(config, 1, True).peak + encoding.num_bytes
    assert f"needs {peak / 1e9:.1f} GB on each rank" in said
    assert f"with {encoding.num_bytes / 1e9:.1f} GB to encode images)" in said
    assert "data.encode_batch_size=16" in said
    assert "images" not in memory.advise(config, 1, True, "latents")
