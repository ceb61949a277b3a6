"""tools/import_deepspeed.py on what DeepSpeed's own engines write: bit for bit what our checkpoint of them holds."""

import contextlib
import functools
import io
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.config import ZeroStageEnum
from torch import nn

from cfpretrain.base import config as configs
from cfpretrain.base.config import Config, to_plain
from cfpretrain.base.console import UserError
from cfpretrain.core import seeds
from cfpretrain.core.model import write_initial_values
from cfpretrain.export.deepspeed_checkpoint import read_zero_checkpoint
from cfpretrain.export.official import our_name, to_official
from cfpretrain.run import build
from cfpretrain.run.checkpoint import load, open_weights
from cfpretrain.run.checkpoint_store import CheckpointStore
from cfpretrain.run.state import TrainingState, read_state
from cfpretrain.training import optim, zero
from cfpretrain.training.engine import Engine, build_engine
from cfpretrain.training.zero import ds_config
from tests import checkpoints
from tests.checkpoints import make_state
from tests.folders import Bomb
from tests.processes import run_in_processes
from tests.strictness import make_warnings_errors
from tools import import_deepspeed

CPU = torch.device("cpu")
Kind = tuple[int, str]  # ZeRO stage and precision
# By number of ranks. Stage 1 in bf16 has an optimizer and a layout of its own.
KINDS: dict[int, list[Kind]] = {
    1: [(1, "bf16"), (2, "fp32"), (3, "fp32")],
    2: [(stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16")],
}
CASES = [(kind, num_ranks) for num_ranks, kinds in KINDS.items() for kind in kinds]
# Engines with other people's settings, on two ranks: two groups of parameters; at stage 2 in another order than the
# model's, at stage 3 in several flat tensors, as of models of billions of parameters.
OTHERS: dict[Kind, dict[str, Any]] = {
    (1, "bf16"): {},
    (2, "fp32"): {"round_robin_gradients": True},
    (3, "fp32"): {"sub_group_size": 3000},
}
NUM_STEPS, NUM_FURTHER = 2, 2
GLOBAL_BATCH = 4


def make_config(stage: int = 3, precision: str = "fp32") -> Config:
    """A model whose parameters have odd sizes: those of stage 3 are padded on two ranks."""
    default = Config()
    return replace(
        default,
        model=replace(
            default.model,
            latent_size=3,
            latent_channels=3,
            width=20,
            depth=2,
            num_heads=4,
            num_cond_tokens=3,
            num_classes=4,
        ),
        train=replace(default.train, global_batch_size=GLOBAL_BATCH, micro_batch_size=2, adam_eps=1e-8, ema_decay=0.5),
        engine=replace(default.engine, zero_stage=stage, precision=precision),
    )


def make_engine(config: Config) -> Engine:
    return build_engine(lambda: build.make_model(config), config, CPU)


def make_engine_of_others(config: Config) -> Engine:
    def make_settings(*args: Any) -> dict[str, Any]:
        settings = ds_config(*args)
        settings["zero_optimization"] |= OTHERS[config.engine.zero_stage, config.engine.precision]
        return settings

    def make_optimizer(module: nn.Module, config: Config, *_: Any) -> torch.optim.Optimizer:
        def rank_of(parameter: nn.Parameter) -> int:
            return len(getattr(parameter, "ds_shape", parameter.shape))

        train = config.train
        groups = [[p for p in module.parameters() if (rank_of(p) < 2) == is_vector] for is_vector in (True, False)]
        return torch.optim.AdamW(
            [{"params": group} for group in groups], 1e-2, (train.adam_beta1, train.adam_beta2), train.adam_eps, 0.0
        )

    with (
        patch.object(zero, "ds_config", make_settings),
        patch.object(optim, "make_optimizer", make_optimizer),
    ):
        return make_engine(config)


def train_step(engine: Engine, config: Config, step: int) -> float:
    """One step of the real objective on made-up latents; returns the loss of the global batch."""
    loss, model = build.make_loss(config), config.model
    rank, size = dist.get_rank(), dist.get_world_size()
    ids = torch.arange(GLOBAL_BATCH).chunk(size)[rank]
    total = torch.zeros(())
    for ids_B in ids.chunk(engine.accumulation_steps):
        keys_B = seeds.fold(seeds.key(0, "latents"), ids_B)
        latents_BCYX = seeds.normal(keys_B, (model.latent_channels, model.latent_size, model.latent_size))
        draws = loss.draw(step, 0, ids_B, ids_B % model.num_classes, model.num_tokens, model.patch_values)
        mean = loss.total(loss(engine, loss.prepare(latents_BCYX, draws)))
        engine.backward(mean)
        total += mean.detach() / engine.accumulation_steps / size
    dist.all_reduce(total)
    assert engine.step(1e-2)
    return float(total)


def restore(engine: Engine, path: Path, config: Config) -> TrainingState:
    """As the trainer resumes."""
    ema = [fragment.values.clone() for fragment in engine.fragments()]
    state = load(path, engine.fragments(), ema, to_plain(config))
    engine.optimizer_step = state.optimizer_step
    engine.refresh()
    return state


class Found(NamedTuple):
    """Losses of the steps after a checkpoint, in its engine and after the import; what DeepSpeed's reader says."""

    continued: list[float]
    after_import: list[float]
    oracle: str


def campaign(folder: Path) -> dict[Kind, Found]:
    """On each rank: for each kind, a DeepSpeed checkpoint, ours of the same engine, and what comes after."""
    dist.init_process_group("gloo")
    make_warnings_errors()
    found = {}
    num_ranks = dist.get_world_size()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for kind in KINDS[num_ranks]:
            found[kind] = of_kind(folder / name_of(kind, num_ranks), kind, make_engine)
        for kind in OTHERS if num_ranks == 2 else []:
            found[kind, "others"] = of_kind(folder / name_of(kind, "others"), kind, make_engine_of_others)
    return found


def name_of(kind: Kind, which: object) -> str:
    return f"stage_{kind[0]}_{kind[1]}_{which}"


def of_kind(folder: Path, kind: Kind, make: Callable[[Config], Engine]) -> Found:
    config = make_config(*kind)
    engine, model = make(config), config.model
    engine.initialise(functools.partial(write_initial_values, 0, model.grid))
    for step in range(NUM_STEPS):
        train_step(engine, config, step)
    engine._deepspeed.save_checkpoint(str(folder / "deepspeed"))
    if make is make_engine:
        state = make_state(NUM_STEPS, config=to_plain(config))
        ema = [fragment.values.clone() for fragment in engine.fragments()]
        checkpoints.write(CheckpointStore(folder / "ours", 1, 0), state, engine.fragments(), ema)
    further = range(NUM_STEPS, NUM_STEPS + NUM_FURTHER)
    continued = [train_step(engine, config, step) for step in further]

    if dist.get_rank() == 0:
        (folder / "config.yaml").write_text(configs.to_yaml(config))
        import_deepspeed.run(folder / "deepspeed", folder / "run", [str(folder / "config.yaml")], [])
    dist.barrier()
    fresh = make_engine(config)
    restored = restore(fresh, folder / "run" / "checkpoints" / f"step_{NUM_STEPS:08d}", config)
    assert restored.step == restored.optimizer_step == NUM_STEPS
    after_import = [train_step(fresh, config, step) for step in further]
    return Found(continued, after_import, ask_oracle(folder / "deepspeed") if dist.get_rank() == 0 else "")


def ask_oracle(folder: Path) -> str:
    """What DeepSpeed's own reader of weights says; it runs what is in the files, which are ours here."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        theirs = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    except ValueError as error:
        return str(error)
    found = read_zero_checkpoint(folder)
    assert theirs.keys() == found.shapes.keys()
    assert all(torch.equal(theirs[name], found.tensor("weights", name)) for name in theirs)
    return "equal"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Any]]:
    """The folder of all checkpoints, and the losses after them by number of ranks."""
    folder = tmp_path_factory.mktemp("zero")
    return folder, {num_ranks: run_in_processes(campaign, num_ranks, folder)[0] for num_ranks in KINDS}


@pytest.fixture
def copy(made: tuple[Path, Any], tmp_path: Path) -> Path:
    """What DeepSpeed wrote on two ranks at stage 2, to be damaged."""
    shutil.copytree(made[0] / name_of((2, "fp32"), 2) / "deepspeed", tmp_path / "deepspeed")
    return tmp_path / "deepspeed"


@pytest.fixture
def config_file(tmp_path: Path) -> list[str]:
    file = tmp_path / "config.yaml"
    file.write_text(configs.to_yaml(make_config()))
    return [str(file)]


# ---------------------------------------------------------------------------------------------------------------------
# What comes over


@pytest.mark.parametrize(("kind", "num_ranks"), CASES)
def test_it_is_our_own_checkpoint_of_the_same_engine(kind: Kind, num_ranks: int, made: tuple[Path, Any]) -> None:
    """Files of weights and moments are byte for byte those that we write; the averages are the weights."""
    folder = made[0] / name_of(kind, num_ranks)
    ours, imported = (folder / where / f"step_{NUM_STEPS:08d}" for where in ("ours", "run/checkpoints"))
    for content in ("weights", "exp_avg", "exp_avg_sq"):
        name = f"{content}.safetensors"
        assert (imported / name).read_bytes() == (ours / name).read_bytes(), content
    weights, ema = open_weights(imported, "weights").read_all(), open_weights(imported, "ema").read_all()
    assert all(torch.equal(weights[name], ema[name]) for name in weights)
    found = read_zero_checkpoint(folder / "deepspeed" / f"global_step{NUM_STEPS}")
    moments = torch.cat([found.tensor("exp_avg_sq", name).flatten() for name in found.shapes])
    assert moments.count_nonzero() > 0.5 * moments.numel()
    state = read_state(imported)
    assert (state.epoch, state.samples_in_epoch, state.num_skipped) == (0, 0, 0)


@pytest.mark.parametrize(("kind", "num_ranks"), CASES)
def test_training_goes_on_with_the_same_losses(kind: Kind, num_ranks: int, made: tuple[Path, Any]) -> None:
    found = made[1][num_ranks][kind]
    assert found.continued == found.after_import
    assert len(set(found.continued)) == NUM_FURTHER


@pytest.mark.parametrize(("kind", "num_ranks"), CASES)
def test_weights_are_those_of_deepspeeds_own_reader(kind: Kind, num_ranks: int, made: tuple[Path, Any]) -> None:
    """An oracle of another hand, where it reads the layout at all."""
    expected = "is not a zero checkpoint" if kind == (1, "bf16") else "equal"
    assert expected in made[1][num_ranks][kind].oracle


@pytest.mark.parametrize("kind", OTHERS)
def test_engines_of_other_people(kind: Kind, made: tuple[Path, Any]) -> None:
    """Into an engine of ours, which sums gradient norms in another order; wrong moments show in the first digits."""
    found = made[1][2][kind, "others"]
    assert found.after_import == pytest.approx(found.continued, rel=1e-5 if kind[1] == "fp32" else 2e-3)
    assert found.oracle == "equal" or kind == (1, "bf16")
    flats = read_zero_checkpoint(made[0] / name_of(kind, "others") / "deepspeed").flats["weights"][0]
    assert len(flats) >= (3 if kind[0] == 3 else 2)


def test_it_is_said_what_is_not_there(
    copy: Path, config_file: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import_deepspeed.run(copy, tmp_path / "run", config_file, [])
    out = capsys.readouterr().out
    assert "WARNING: DeepSpeed's files are pickles" in out
    assert "WARNING: DeepSpeed keeps no EMA: the averages begin as the weights" in out
    assert "at step 2 (2 updates), written by 2 ranks" in out
    assert build.find_checkpoint(tmp_path / "run").state.step == NUM_STEPS


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    content = torch.load(file, weights_only=False)
    torch.save(change(content) or content, file)


def files(folder: Path, pattern: str) -> list[Path]:
    found = sorted((folder / f"global_step{NUM_STEPS}").glob(pattern))
    assert found
    return found


def test_official_names_are_understood(copy: Path, config_file: list[str], tmp_path: Path) -> None:
    """As of an engine around the official module, in a wrapper."""
    shapes = read_zero_checkpoint(copy).shapes
    theirs = {our_name(name): f"module.{name}" for name in to_official({n: torch.zeros(1) for n in shapes}, 1)}

    def rename_shapes(content: Any) -> None:
        content["param_shapes"] = [{theirs[n]: s for n, s in group.items()} for group in content["param_shapes"]]

    import_deepspeed.run(copy, tmp_path / "before", config_file, [])
    for file in files(copy, "*model_states.pt"):
        edit(file, rename_shapes)
    assert "module.x_proj.weight" in read_zero_checkpoint(copy).shapes
    import_deepspeed.run(copy, tmp_path / "after", config_file, [])
    for content in ("weights", "exp_avg", "exp_avg_sq", "ema"):
        first, second = (
            tmp_path / run / f"checkpoints/step_{NUM_STEPS:08d}/{content}.safetensors" for run in ("before", "after")
        )
        assert first.read_bytes() == second.read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def refusal(source: Path, config_file: list[str], overrides: tuple[str, ...] = ()) -> str:
    """The message of an import that leaves nothing behind."""
    before = sorted(os.listdir(source.parent))
    with pytest.raises(UserError) as error:
        import_deepspeed.run(source, source.parent / "run", config_file, list(overrides))
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(source.parent)) == before
    return str(error.value)


@pytest.mark.parametrize(
    "pattern", ["mp_rank_00_model_states.pt", "*rank_0_*optim_states.pt", "*rank_1_*optim_states.pt"]
)
@pytest.mark.parametrize("form", ["beside", "instead", "pickle"])
def test_a_planted_pickle_is_refused_and_not_run(
    form: str, pattern: str, copy: Path, config_file: list[str], tmp_path: Path
) -> None:
    [file] = files(copy, pattern)
    bomb = Bomb(tmp_path / "trace")
    if form == "beside":
        content = torch.load(file, weights_only=False)
        torch.save(content | {"client_state": {"callback": bomb}}, file)
    elif form == "instead":
        torch.save(bomb, file)
    else:
        file.write_bytes(pickle.dumps(bomb, protocol=2))
    message = refusal(copy, config_file)
    assert not (tmp_path / "trace").exists()
    assert (
        f"expected nothing but tensors, numbers and texts in {file}, got posix.mkdir, which could run code" in message
    )


def test_nothing_of_deepspeed_is_looked_up(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its classes are in the files, and their code could be anything."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    read_zero_checkpoint(copy)
    assert not [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]


class NamedByGetattr:
    """Pickles as a member of an enum does under Python 3.11.0 to 3.11.3."""

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (ZeroStageEnum, "gradients")


def test_members_of_enums_are_read_as_any_python_writes_them(copy: Path) -> None:
    for file in files(copy, "*optim_states.pt"):
        edit(file, zero_state("zero_stage", NamedByGetattr()))
    read_zero_checkpoint(copy)


def zero_state(key: str, value: Any) -> Callable[[Any], None]:
    return lambda content: content["optimizer_state_dict"].__setitem__(key, value)


def forget_moments(content: Any) -> None:
    content["optimizer_state_dict"]["base_optimizer_state"]["state"] = {}


def shorten(content: Any) -> None:
    [flat] = content["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    content["optimizer_state_dict"]["single_partition_of_fp32_groups"] = [flat[:-9].clone()]


def halve(content: Any) -> None:
    [flat] = content["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    content["optimizer_state_dict"]["single_partition_of_fp32_groups"] = [flat.half()]


@pytest.mark.parametrize(
    ("pattern", "change", "reason"),
    [
        ("*optim_states.pt", forget_moments, "no moments"),
        ("*rank_1_*optim_states.pt", shorten, "outside what rank 1 wrote"),
        ("*rank_0_*optim_states.pt", halve, "a flat tensor of torch.float16"),
        ("*optim_states.pt", zero_state("partition_count", [4]), "files of 2 ranks, where 4 wrote it"),
        ("*optim_states.pt", zero_state("base_optimizer_state", 3), "'int' object is not subscriptable"),
        ("*rank_0_*optim_states.pt", shorten, "values of noise_head.linear."),
        ("*optim_states.pt", lambda content: {"other": 1}, "no 'optimizer_state_dict'"),
        ("mp_rank_00_model_states.pt", lambda content: content.pop("param_shapes") and None, "no 'param_shapes'"),
        ("mp_rank_00_model_states.pt", lambda content: content.pop("global_steps") and None, "no 'global_steps'"),
    ],
)
def test_another_layout_is_refused(
    pattern: str, change: Callable[[Any], Any], reason: str, copy: Path, config_file: list[str]
) -> None:
    for file in files(copy, pattern):
        edit(file, change)
    message = refusal(copy, config_file)
    assert "is not what DeepSpeed 0.19 writes of AdamW at ZeRO stage 1, 2 or 3: " in message
    assert reason in message


def remove(pattern: str) -> Callable[[Path], None]:
    return lambda folder: [file.unlink() for file in files(folder, pattern)] and None


def cut(folder: Path) -> None:
    [file] = files(folder, "*rank_1_*optim_states.pt")
    file.write_bytes(file.read_bytes()[:-100])


def add_tensor_parallel_file(folder: Path) -> None:
    [file] = files(folder, "*rank_1_*optim_states.pt")
    shutil.copy(file, file.with_name(file.name.replace("mp_rank_00", "mp_rank_01")))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "expected a folder that DeepSpeed's save_checkpoint wrote"),
        (remove("*optim_states.pt"), "expected files *_optim_states.pt of ZeRO stage 1, 2 or 3 in "),
        (remove("*rank_0_*optim_states.pt"), "got none of rank 0; restore it"),
        (remove("*rank_1_*optim_states.pt"), "files of 1 ranks, where 2 wrote it"),
        (remove("*model_states.pt"), "expected mp_rank_00_model_states.pt or zero_pp_rank_0"),
        (cut, "is no file of tensors, or a damaged one"),
        (add_tensor_parallel_file, "expected one *_optim_states.pt a rank, without tensor parallelism"),
        (lambda folder: (folder / "latest").write_text("../other"), "latest: expected the name of a folder beside it"),
        (lambda folder: (folder / "latest").write_text("global_step9"), "got 'global_step9'; give that folder"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    damage: Callable[[Path], Any], message: str, copy: Path, config_file: list[str]
) -> None:
    damage(copy)
    found = refusal(copy, config_file)
    assert found.startswith("FOLDER: ")
    assert message in found


def test_values_that_are_no_numbers_are_refused(copy: Path, config_file: list[str]) -> None:
    """Also in the moments, of which no loss tells."""

    def spoil(content: Any) -> None:
        content["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["exp_avg_sq"][5] = float("nan")

    edit(files(copy, "*optim_states.pt")[0], spoil)
    assert ": expected finite numbers, got NaN or infinity in 1 of " in (said := refusal(copy, config_file))
    assert said.startswith(f"FOLDER: {copy}: exp_avg_sq of ")


def test_another_model_is_refused_by_its_keys(copy: Path, config_file: list[str]) -> None:
    message = refusal(copy, config_file, ("model.depth=4", "model.num_classes=7"))
    assert f"FOLDER: {copy} does not fit the config: model.depth: expected 4, got 2 | model.num_classes: " in message
    message = refusal(copy, config_file, ("model.position_embedding=sincos",))
    assert "tensors unknown: image_embedder.pos_embed" in message


def test_an_existing_target_is_left_alone(
    copy: Path, config_file: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "run").mkdir()
    command = ["import_deepspeed.py", str(copy), str(tmp_path / "run"), "--config", *config_file]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        import_deepspeed.main()
    assert ended.value.code == 2
    assert "RUN: expected a path where nothing is yet" in capsys.readouterr().err
    assert not list((tmp_path / "run").iterdir())
