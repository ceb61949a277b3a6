"""Frozen parts of a model stay as they are, bit by bit, at every ZeRO stage, and cost no optimizer; runs go on so."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cfpretrain.base import config as configs
from cfpretrain.base import config_checks, runtime
from cfpretrain.base.config import Config
from cfpretrain.base.console import UserError
from cfpretrain.core.modalities import count_values
from cfpretrain.core.model import is_frozen
from cfpretrain.core.work import Work
from cfpretrain.run import checkpoint
from cfpretrain.run.checkpoint_store import CheckpointStore
from cfpretrain.run.metrics import training_flops
from cfpretrain.training import memory
from cfpretrain.training.ema import ShardedEMA
from cfpretrain.training.engine import Engine, build_engine
from tests.checkpoints import make_state, write
from tests.processes import REPOSITORY, run_in_processes
from tests.test_engine import CPU, KINDS, LEARNING_RATE, toy_config, write_toy_values
from tests.test_modalities import micro_batch, text_network, total_loss

BOTH = ("trunk", "text")
Values = dict[str, Tensor]  # by content and name, as in "ema/ordinal_table.weight"


def frozen_config(stage: int, precision: str, freeze: Sequence[str]) -> Config:
    config = toy_config(stage, precision, micro_batch_size=4, clip_grad_norm=0.0)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, freeze=tuple(freeze)))


class Run:
    """An engine with averages and checkpoints, on ranks whose micro-batches lack other kinds."""

    def __init__(self, stage: int, precision: str, freeze: Sequence[str], separate: bool = False) -> None:
        self.config = frozen_config(stage, precision, freeze)
        self.engine: Engine = build_engine(lambda: text_network(separate_image_weights=separate), self.config, CPU)
        self.engine.initialise(write_toy_values)
        self.ema = ShardedEMA(self.engine.fragments(), decay=0.5)

    def step(self, number: int) -> None:
        segments = micro_batch(number + runtime.rank())
        counts = {kind: runtime.sum_over_ranks(torch.tensor(n)) / 2 for kind, n in count_values(segments).items()}
        self.engine.backward(total_loss(in_precision_of(self.engine), segments, counts))
        assert self.engine.step(LEARNING_RATE)
        self.ema.update()

    def values(self) -> Values:
        """Whole tensors; of the optimizer's, those that there are."""
        found: Values = {}
        for rank in runtime.gather(
            [self._held(f, ema) for f, ema in zip(self.engine.fragments(), self.ema.values, strict=True)]
        ):
            for name, numel, offset, contents in rank:
                for content, values in contents.items():
                    whole = found.setdefault(f"{content}/{name}", torch.full((numel,), math.nan))
                    whole[offset : offset + len(values)] = values
        return found

    @staticmethod
    def _held(fragment: Any, average: Tensor) -> tuple[str, int, int, Values]:
        contents = {"weights": fragment.values, "ema": average, **fragment.state}
        copies = {name: values.clone() for name, values in contents.items()}
        return fragment.name, math.prod(fragment.shape), fragment.offset, copies

    def save(self, folder: Path) -> None:
        state = make_state(1, config=configs.to_plain(self.config), optimizer_step=self.engine.optimizer_step)
        write(CheckpointStore(folder, 1, 0), state, self.engine.fragments(), self.ema.values)

    def load(self, folder: Path) -> None:
        path = CheckpointStore(folder, 1, 0).path(1)
        saved = checkpoint.load(path, self.engine.fragments(), self.ema.values, configs.to_plain(self.config))
        self.engine.optimizer_step = saved.optimizer_step
        self.engine.refresh()


def in_precision_of(engine: Engine) -> Any:
    """The engine, whose predictions come in fp32, as the loss of the toy's targets wants."""
    return lambda *args, **kwargs: {kind: one.float() for kind, one in engine(*args, **kwargs).items()}


def check_kind(stage: int, precision: str, freeze: Sequence[str], separate: bool = False) -> None:
    run = Run(stage, precision, freeze, separate)
    before = run.values()
    for number in range(3):
        run.step(number)
    after = run.values()
    names = [key.removeprefix("weights/") for key in after if key.startswith("weights/")]
    assert set(names) == {name for name, _ in text_network(separate_image_weights=separate).named_parameters()}
    for name in names:
        stays = is_frozen(name, freeze)
        for content in ("weights", "ema"):
            assert torch.equal(before[f"{content}/{name}"], after[f"{content}/{name}"]) is stays, (name, content)
        assert (f"exp_avg/{name}" in after) is not stays
        if stays:
            assert torch.equal(after[f"ema/{name}"], after[f"weights/{name}"])


def campaign() -> None:
    runtime.start(CPU)
    for kind in KINDS:
        check_kind(*kind, BOTH)
    check_kind(0, "fp32", ["text"])
    check_kind(3, "fp32", ["trunk"])
    for stage in (2, 3):  # weights of images are not of the trunk
        check_kind(stage, "fp32", BOTH, separate=True)


def test_frozen_parts_stay_at_every_stage_and_the_others_move() -> None:
    run_in_processes(campaign, 2, timeout_s=200)


def resume(folder: Path, stage: int, precision: str, other: tuple[int, str]) -> None:
    """A checkpoint of one kind goes on as another, and as with other parts frozen."""
    runtime.start(CPU)
    first = Run(stage, precision, BOTH)
    for number in range(2):
        first.step(number)
    first.save(folder)
    saved = first.values()
    again = Run(*other, BOTH)
    again.load(folder)
    assert equal(again.values(), saved)
    if other == (stage, precision):
        for run in (first, again):
            run.step(2)
        assert equal(first.values(), again.values())

    thawed = Run(*other, ["text"])
    thawed.load(folder)
    values = thawed.values()
    assert equal({key: values[key] for key in saved}, saved)
    added = values.keys() - saved.keys()
    assert {key.split("/")[1].split(".")[0] for key in added} == {"trunk"}
    assert all(not values[key].any() for key in added)
    thawed.step(2)
    assert not torch.equal(
        thawed.values()["weights/trunk.blocks.0.mlp.fc1.weight"], values["weights/trunk.blocks.0.mlp.fc1.weight"]
    )

    thawed.save(folder)
    refrozen = Run(*other, BOTH)
    refrozen.load(folder)
    values = thawed.values()
    for key, value in refrozen.values().items():
        content, name = key.split("/")
        wanted = "weights" if is_frozen(name, BOTH) else content  # a frozen one's average is itself
        assert torch.equal(value, values[f"{wanted}/{name}"]), key


def equal(some: Values, others: Values) -> bool:
    return some.keys() == others.keys() and all(torch.equal(value, others[key]) for key, value in some.items())


@pytest.mark.parametrize(
    ("kind", "other"),
    [((3, "fp32"), (3, "fp32")), ((2, "bf16"), (2, "bf16")), ((3, "bf16"), (0, "bf16")), ((0, "fp32"), (1, "fp32"))],
)
def test_a_run_goes_on_with_the_same_and_with_other_parts_frozen(tmp_path: Path, kind, other) -> None:
    run_in_processes(resume, 2, tmp_path / "checkpoints", *kind, other)


# ---------------------------------------------------------------------------


def load(*overrides: str) -> Config:
    return configs.load(REPOSITORY / "configs" / "tiny.yaml", ["model.trunk=gpt2", *overrides])


def test_frozen_parts_cost_no_gradients_and_no_optimizer() -> None:
    texts = ["model.vocabulary=1000", "data.tokenizer=tokenizer.json"]
    free, frozen = load(*texts), load(*texts, "train.freeze=[trunk,text]")
    some, none = (sum(memory.parameter_numels(free.model, freeze)) for freeze in ((), BOTH))
    assert none < some / 2
    for stage in (0, 2, 3):
        estimates = []
        for config in (free, frozen):
            config = dataclasses.replace(
                config, engine=dataclasses.replace(config.engine, zero_stage=stage, precision="fp32")
            )
            estimates.append(memory.estimate(config, 1, on_gpu=False))
        assert [one.weights for one in estimates] == [4 * some, 4 * some]
        assert [one.ema for one in estimates] == [4 * some, 4 * none]
        assert estimates[1].optimizer == estimates[0].optimizer * none // some
        assert estimates[1].gradients == 4 * none
    model, work = free.model, Work(10, 7, {"image": 5, "text": 3}, text_tokens=4)
    matrices = model.depth * model.design.matrix_values
    difference = training_flops(model, work) - training_flops(model, work, ("trunk",))
    assert difference == 2 * matrices * work.tokens
    separate = dataclasses.replace(model, separate_image_weights=True)
    assert training_flops(separate, work) == training_flops(model, work)
    assert training_flops(separate, work) - training_flops(separate, work, ("trunk",)) == 2 * matrices * 4
    difference = training_flops(model, work) - training_flops(model, work, ("text",))
    assert difference == 2 * 3 * model.vocabulary * model.width


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.freeze=[text]"], "train.freeze: expected no text where a model has none"),
        (
            ["train.freeze=[trunk]", "train.optimizer=muon"],
            "train.optimizer: expected adamw where train.freeze has trunk",
        ),
        (
            ["model.separate_image_weights=true"],
            "model.separate_image_weights: expected false where a model has no texts",
        ),
        (["train.freeze=[images]"], "train.freeze: expected one of trunk, text; got 'images'"),
    ],
)
def test_what_cannot_be_frozen_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError) as error:
        config_checks.check(load(*overrides), 1)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_frozen_marks_of_captions_are_doubted() -> None:
    def doubts(*overrides: str) -> list[str]:
        return [
            one for one in config_checks.doubts(load("model.vocabulary=300", *overrides), {}) if "train.freeze" in one
        ]

    assert len(doubts("train.freeze=[trunk,text]", "data.tasks.image_to_text=1")) == 1
    assert doubts("train.freeze=[trunk]", "data.tasks.image_to_text=1") == []
    assert len(doubts("train.freeze=[text]", "data.tasks.interleaved=1")) == 1
    assert doubts("train.freeze=[text]") == []
