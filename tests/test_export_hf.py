"""Exports: whole or not there, the same from any ranks, and they load and sample where cfpretrain is not installed."""

import dataclasses
import errno
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from cfpretrain.autoencoder import make_network
from cfpretrain.base import files
from cfpretrain.base.config import Config
from cfpretrain.base.console import UserError
from cfpretrain.core.ar import choose_sizes
from cfpretrain.core.latents import patchify, unpatchify
from cfpretrain.core.regions import parse_region
from cfpretrain.core.sampler import Guidance
from cfpretrain.core.solvers import SOLVERS
from cfpretrain.evaluation.generation import GenerationSettings, ImageGenerator
from cfpretrain.evaluation.sampling_options import _BY_SOLVER
from cfpretrain.evaluation.source import load_source
from cfpretrain.export import diffusers_layout, model_card, weight_files
from cfpretrain.export.diffusers_layout import ExportSettings, export
from cfpretrain.export.official import our_name
from cfpretrain.run import build, tensor_files
from cfpretrain.run.checkpoint import open_weights
from tests import checkpoints
from tests.checkpoints import same_bits
from tests.closeness import disagreement
from tests.digits import small_config
from tests.environments import make_environment, run_elsewhere
from tests.processes import REPOSITORY, run_in_processes
from tests.runs import STEP, write_run
from tools import export_hf
from tools import measure as measuring

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """A run of pixels with random weights, a grid of samples and a summary; tests read it only."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "run", shards)
    (folder / "samples").mkdir()
    for name in ("step_00000004_ar_steps_0001", "step_00000007_ar_steps_0004", "step_00000007_ar_steps_0001"):
        (folder / "samples" / f"{name}.png").write_bytes(files.PNG_BEGIN + name.encode())
    (folder / "samples" / "step_00000009_ar_steps_0001.png").write_text("of a later step")
    summary = {"num_steps": STEP, "train_seconds": 1.5, "loss_first": 2.0, "loss_last": 0.25, "images_per_second": 9.0}
    (folder / "summary.json").write_text(json.dumps({**summary, "world_size": 2, "zero_stage": 1}))
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, run: Path) -> Path:
    """The run, exported; tests read it only."""
    out = tmp_path_factory.mktemp("exports") / "digits"
    export(run, out, ExportSettings(licence="apache-2.0"))
    return out


def weights_of(folder: Path) -> dict[str, Tensor]:
    files = sorted((folder / "transformer").glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(same_bits(value, second[name]) for name, value in first.items())


def refused(run: Path, out: Path, **settings: Any) -> str:
    """The message of an export that leaves nothing."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError) as caught:
        export(run, out, ExportSettings(**settings))
    assert sorted(out.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def copy_of(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_the_folder_has_what_diffusers_reads(exported: Path) -> None:
    index = json.loads((exported / "model_index.json").read_text())
    [pipeline], [transformer] = exported.glob("*.py"), (exported / "transformer").glob("*.py")
    assert index["_class_name"] == [pipeline.stem, "CausalFusionPipeline"]
    assert index["transformer"] == [transformer.stem, "CausalFusionTransformer"]
    assert index["vae"] == [None, None]
    assert index["id2label"] == {str(i): str(i) for i in range(10)}
    scheduler = json.loads((exported / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["beta_start"], scheduler["beta_end"], scheduler["num_train_timesteps"]) == (1e-4, 0.02, 1000)
    assert sorted(path.name for path in exported.iterdir()) == [
        "README.md",
        "config.yaml",
        "model_index.json",
        pipeline.name,
        "samples.png",
        "scheduler",
        "transformer",
    ]


@pytest.mark.parametrize("which", ["ema", "raw"])
def test_run_to_export_is_exact(run: Path, tmp_path: Path, which) -> None:
    export(run, tmp_path / "out", ExportSettings(which))
    [path] = (run / "checkpoints").glob("step_*")
    assert equal(weights_of(tmp_path / "out"), open_weights(path, "ema" if which == "ema" else "weights").read_all())


def test_bf16_is_rounded_once(run: Path, exported: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out", ExportSettings(dtype="bf16"))
    rounded, full = weights_of(tmp_path / "out"), weights_of(exported)
    assert rounded.keys() == full.keys()
    for name, value in rounded.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, full[name].to(torch.bfloat16))


def test_shards_are_as_diffusers_names_them(run: Path, exported: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tensor_files, "CHUNK_VALUES", 1000)
    export(run, tmp_path / "out", ExportSettings(max_shard_bytes=30_000))
    folder = tmp_path / "out" / "transformer"
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    found = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            found |= dict.fromkeys(opened.keys(), file.name)
            assert file.stat().st_size < 34_000 or len(list(opened.keys())) == 1
    assert index["weight_map"] == found
    assert equal(weights_of(tmp_path / "out"), weights_of(exported))
    assert index["metadata"]["total_size"] == sum(4 * value.numel() for value in weights_of(exported).values())


def test_the_files_do_not_know_ranks(run: Path, exported: Path, tmp_path: Path) -> None:
    """Whole tensors on each rank, flat ranges of all or some, in 1 to 4 ranks: stages 0 to 3 leave such checkpoints."""
    [path] = (run / "checkpoints").glob("step_*")
    full = {content: load_file(path / f"{content}.safetensors") for content in checkpoints.CONTENTS}
    for world_size, replicated in ((1, False), (2, True), (2, False), (4, False)):
        other = tmp_path / f"{world_size}_{replicated}"
        shutil.copytree(run, other, ignore=shutil.ignore_patterns("checkpoints"))
        ranks: list[checkpoints.Rank] = [([], []) for _ in range(world_size)]
        for number, (name, values) in enumerate(full["weights"].items()):
            for rank in range(world_size):
                begin, end = (values.numel() * (rank + at) // world_size for at in (0, 1))
                if not replicated and world_size == 4:  # as stage 1 may: some hold nothing of it
                    begin, end = (0, values.numel()) if number % 4 == rank else (0, 0)
                begin, end = (0, values.numel()) if replicated else (begin, end)
                fragment, ema = checkpoints.cut(full, name, begin, end, replicated)
                ranks[rank][0].append(fragment)
                ranks[rank][1].append(ema)
        store = checkpoints.make_store(other / "checkpoints")
        written = checkpoints.write_as_ranks(store, ranks, full, STEP)
        shutil.copyfile(path / "state.json", written / "state.json")
        store._replace("latest", f"{written.name}\n")
        export(other, tmp_path / f"out_{world_size}_{replicated}", ExportSettings(licence="apache-2.0"))
        for file in exported.rglob("*"):
            if file.is_file() and file.name not in ("README.md", "config.yaml"):
                again = tmp_path / f"out_{world_size}_{replicated}" / file.relative_to(exported)
                assert again.read_bytes() == file.read_bytes(), file


def train(shards: Path, folder: Path, *overrides: str) -> None:
    """Two steps that change nothing, since runs on other ranks differ in rounding."""
    from cfpretrain.base import runtime
    from cfpretrain.training import trainer

    steps = ("train.num_steps=2", "train.decay_steps=0", "train.learning_rate=0", "checkpoint.every_steps=2")
    config = small_config(shards, folder, *steps, *overrides)
    if not torch.distributed.is_initialized():
        runtime.start(CPU)
    trainer.prepare_folder(config, CPU)
    trainer.record_config(config)
    assert trainer.Trainer(config, CPU).train()


def train_each(shards: Path, folders: dict[str, Path]) -> None:
    """A run of each noise process, whose weights change, and a trunk of another kind for one of them."""
    for process, folder in folders.items():
        trunk = ("model.trunk=qwen3", "model.num_kv_heads=1", "model.mlp_width=48") if process == "flow" else ()
        train(shards, folder, f"noise.process={process}", "train.learning_rate=0.01", "train.warmup_steps=0", *trunk)


@pytest.mark.slow
def test_ranks_and_stages_of_training_leave_the_same_weights(shards: Path, tmp_path: Path) -> None:
    for which in ("ema", "raw"):
        exports = set()
        for world_size in (1, 2, 4):
            for stage in (1, 3):
                folder, out = tmp_path / f"{world_size}_{stage}", tmp_path / f"{world_size}_{stage}_{which}"
                if not folder.exists():
                    run_in_processes(train, world_size, shards, folder, f"engine.zero_stage={stage}")
                export(folder, out, ExportSettings(which))
                exports.add((out / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes())
        assert len(exports) == 1


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path, capsys) -> None:
    """160 MB of weights, of which one tensor has 4."""
    sizes = [f"model.{size}" for size in ("width=512", "depth=12", "num_heads=8")]
    config = str(REPOSITORY / "configs" / "tiny.yaml")
    told = ["--config", config, "--dtype", "bf16", "--max-shard-gb", "0.03", "--folder", str(tmp_path)]
    measuring.main(["export", *sizes, *told])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["model"]["parameters"] > 38e6
    assert figures["model"]["peak_rss_gb"] - figures["tiny"]["peak_rss_gb"] < 0.05


def test_a_checkpoint_is_chosen_by_its_step(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out", ExportSettings(step=STEP))
    message = refused(run, tmp_path / "other", step=8)
    assert message == f"--step: expected a checkpoint of {run} (steps 7), got 8"


def test_the_card_says_what_is_known(exported: Path, run: Path, tmp_path: Path) -> None:
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\nlicense: apache-2.0\n")
    assert (exported / "samples.png").read_bytes() == files.PNG_BEGIN + b"step_00000007_ar_steps_0001"
    for known in ("# digits\n", "![samples](samples.png)", "f00d", "0.2500 at last", "9.0 images/s, ranks: 2"):
        assert known in card
    other = copy_of(run, tmp_path / "run")
    (other / "summary.json").unlink()
    shutil.rmtree(other / "samples")
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(
        config.replace(str(build.configs.load(other / "config.yaml").data.shards[0]), "gone")
    )
    export(other, tmp_path / "out", ExportSettings())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: unknown" in card
    assert "images/s" not in card
    assert "samples.png" not in card
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["id2label"]["3"] == "3"


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong


def test_what_is_no_run_or_not_whole_is_refused(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    assert "empty holds no config.yaml; give a folder that" in refused(tmp_path / "empty", out)
    other = copy_of(run, tmp_path / "run")
    [path] = (other / "checkpoints").glob("step_*")
    ranges = (path / "ranges.json").read_text()
    checkpoints.flip_byte(path / "ema.safetensors", -5)
    assert "are not those that were written (expected sha256" in refused(other, out)
    (path / "ema.safetensors").unlink()
    assert f"{path}/ema.safetensors cannot be read: No such file" in refused(other, out)
    (path / "ranges.json").unlink()
    assert f"{path}/ranges.json cannot be read" in refused(other, out)
    (path / "ranges.json").write_text(ranges[:100])
    assert "ranges.json: expected JSON" in refused(other, out)
    shutil.rmtree(other / "checkpoints")
    assert "holds no complete checkpoint yet" in refused(other, out)


def test_an_existing_target_is_left_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert "OUT: expected a path where nothing is yet" in refused(run, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "mine"


def test_a_killed_export_is_not_there_and_the_next_one_is_whole(
    run: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it dies: nothing has the folder's name; full disks are said in one line."""
    out = tmp_path / "digits"

    def dies(*_: Any, **__: Any) -> None:
        shutil.copytree(tmp_path / ".digits.partial", tmp_path / "seen")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    places = ("write_weights", "scheduler_config", "_copy_picture")
    others = ((weight_files, "_plan_shards"), (model_card, "text"), (files, "flush"))
    for module, place in (*((diffusers_layout, place) for place in places), *others):
        with monkeypatch.context() as patch:
            patch.setattr(module, place, dies)
            with pytest.raises(UserError, match=r"digits cannot be written \(No space left on device\); free some"):
                export(run, out, ExportSettings())
        assert list(tmp_path.iterdir()) == [tmp_path / "seen"]
        shutil.copytree(tmp_path / "seen", tmp_path / ".digits.partial")  # as a kill leaves it
        shutil.rmtree(tmp_path / "seen")
    export(run, out, ExportSettings(licence="apache-2.0"))
    assert list(tmp_path.iterdir()) == [out]
    for file in exported.rglob("*"):
        if file.is_file():
            assert (out / file.relative_to(exported)).read_bytes() == file.read_bytes()


def test_the_command(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(
        sys, "argv", ["export_hf.py", str(run), str(out), "--dtype", "bf16", "--max-shard-gb", "0.00003"]
    )
    export_hf.main()
    assert f"DiffusionPipeline.from_pretrained('{out}', trust_remote_code=True)" in capsys.readouterr().out
    assert len(list((out / "transformer").glob("*.safetensors"))) > 2
    for wrong, message in (
        (["--max-shard-gb", "0"], "--max-shard-gb"),
        (["--max-shard-gb", "inf"], "--max-shard-gb"),
        (["--license", "a b\n"], "--license"),
        (["--push", ""], "--push"),
    ):
        monkeypatch.setattr(sys, "argv", ["export_hf.py", str(run), str(tmp_path / "no"), *wrong])
        with pytest.raises(SystemExit, match="2"):
            export_hf.main()
        assert capsys.readouterr().err.startswith(f"[cfpretrain] error: {message}: expected")
    assert not (tmp_path / "no").exists()


def test_the_official_format(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """What its own tests say is exact; here, that the command leads there."""
    out, command = tmp_path / "out.pt", ["export_hf.py", str(run), str(tmp_path / "out.pt"), "--format", "official"]
    monkeypatch.setattr(sys, "argv", [*command, "--weights", "raw"])
    with pytest.raises(SystemExit, match="2"):
        export_hf.main()
    assert "--format official: expected no --weights; leave it out" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", command)
    export_hf.main()
    content = torch.load(out, weights_only=True)
    [path] = (run / "checkpoints").glob("step_*")
    for key, which in (("model", "weights"), ("ema", "ema")):
        tensors = {our_name(name): value for name, value in content[key].items()}
        assert equal(tensors, open_weights(path, which).read_all())  # type: ignore[arg-type]


def test_pushing_is_asked_for(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[tuple[str, Any]] = []

    class Hub:
        def create_repo(self, *args: Any, **options: Any) -> None:
            calls.append(("create", (*args, options)))

        def upload_folder(self, **options: Any) -> None:
            calls.append(("upload", options))
            if options["repo_id"] == "me/full":
                raise OSError("no more room")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    for index, push in enumerate([[], ["--push", "me/digits"]]):
        monkeypatch.setattr(sys, "argv", ["export_hf.py", str(run), str(tmp_path / f"out{index}"), *push])
        export_hf.main()
    assert calls == [
        ("create", ("me/digits", {"private": True, "exist_ok": True})),
        ("upload", {"repo_id": "me/digits", "folder_path": str(tmp_path / "out1")}),
    ]
    with pytest.raises(UserError, match=r"me/full: no more room; .* is complete, upload it later with: hf upload me"):
        diffusers_layout.push(tmp_path / "out1", "me/full")


# ---------------------------------------------------------------------------------------------------------------------
# Elsewhere


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of an environment with torch, diffusers and what these need; no more."""
    return make_environment(tmp_path_factory.mktemp("elsewhere"))


def write_autoencoder(folder: Path) -> Path:
    """A small AutoencoderKL with random weights, a shift and a scale."""
    channels = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4, "in_channels": 3}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    config = {**channels, **blocks, "out_channels": 3, "scaling_factor": 0.7, "shift_factor": 0.1}
    torch.manual_seed(0)
    make_network(config, "the test").save_pretrained(folder)
    return folder


@dataclasses.dataclass(frozen=True)
class Results:
    run: Path
    latents_run: Path
    by_process: dict[str, Path]
    made: dict[str, Tensor]
    given: Tensor
    said: dict[str, Any]
    warnings: str


@pytest.fixture(scope="module")
def results(
    run: Path, exported: Path, elsewhere: Path, tmp_path_factory: pytest.TempPathFactory, shards: Path
) -> Results:
    """Everything that is made elsewhere, in one process, since that takes ten seconds to import."""
    folder = tmp_path_factory.mktemp("results")
    export(run, folder / "raw", ExportSettings("raw", max_shard_bytes=30_000))
    with pytest.MonkeyPatch.context() as patch:
        real = diffusers_layout.bundle
        # Another version of the code: its noise is another.
        changed = lambda *args: real(*args).replace('"sampling noise"', '"other noise"')  # noqa: E731
        patch.setattr(diffusers_layout, "bundle", changed)
        export(run, folder / "version", ExportSettings())
    autoencoder = write_autoencoder(folder / "autoencoder")
    options = ("model.latent_channels=4", "model.latent_size=4", "model.patch_size=1", "data.shards=gone")
    scales = (f"data.autoencoder={autoencoder}", "data.latent_shift=0.1", "data.latent_scale=0.7")
    latents_run = write_run(folder / "latents_run", shards, *options, *scales)
    export(latents_run, folder / "latents", ExportSettings())
    by_process = {process: folder / f"{process}_run" for process in ("v", "flow")}
    run_in_processes(train_each, 1, shards, by_process)
    for process, trained in by_process.items():
        export(trained, folder / process, ExportSettings())
    given = torch.rand(3, 1, 8, 8) * 2 - 1
    from safetensors.torch import save_file

    save_file({"latents": given}, folder / "given.safetensors")
    exports = (exported, folder / "raw", folder / "version", folder / "latents")
    tensors = [folder / "given.safetensors", folder / "made.safetensors"]
    others = (folder / process for process in by_process)
    out, err = run_elsewhere(elsewhere, folder, "elsewhere.py", *exports, *tensors, ",".join(SOLVERS), *others)
    made = load_file(tensors[1])
    return Results(run, latents_run, by_process, made, given, json.loads(out.splitlines()[-1]), err)


def ours(
    run: Path,
    number: int = 0,
    labels: tuple[int, ...] = (3, 7, 0),
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> tuple[Tensor, Tensor]:
    """What cfpretrain's own sampler makes in one batch: latents, and images."""
    found = build.find_checkpoint(run)
    config, model = found.config, found.load_model()
    model = model.to(dtype)
    images = []
    decode = build.make_autoencoder(config, CPU).decode

    def keep(latents: Tensor) -> Tensor:
        images.append(decode(latents))
        return latents

    generator = ImageGenerator(config, model, settings_of(config, len(labels), **changes), CPU)
    [(_, latents)] = generator.batches(labels * (number + 1), keep, [number])
    return latents, images[0].clamp(0, 1)


def settings_of(config: Config, batch_size: int, **changes: Any) -> GenerationSettings:
    settings = GenerationSettings(choose_sizes(16, 4, "equal"), 3, Guidance(2.0), batch_size, 0)
    return dataclasses.replace(settings, **changes)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_same_pixels_elsewhere(results: Results, solver) -> None:
    _, spacing = _BY_SOLVER[solver]
    latents, images = ours(results.run, solver=solver, spacing=spacing)
    assert torch.equal(results.made[f"{solver} latent"], latents)
    assert torch.equal(results.made[f"{solver} pt"], images)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("process", ["v", "flow"])
def test_other_processes_elsewhere(results: Results, process, solver) -> None:
    """Trained, sampled and exported; and scored, of which the loss is finite."""
    run = results.by_process[process]
    assert build.load_run_config(run).noise.process == process
    latents, _ = ours(run, solver=solver, spacing=_BY_SOLVER[solver][1])
    assert torch.equal(results.made[f"{process} {solver}"], latents)
    assert len(list((run / "samples").glob("*.png"))) == 2
    summary = build.read_summary(run)
    assert summary is not None
    assert 0 < summary["loss_last"] < 10


def test_a_scheduler_for_another_process_is_refused_elsewhere(results: Results) -> None:
    assert results.said["swapped"] == (
        "scheduler: expected flow_prediction and linear betas, as the model was trained, got epsilon and linear"
    )


def test_all_settings_elsewhere(results: Results) -> None:
    guidance = Guidance(2.0, "linear", 100, 700)
    latents, _ = ours(
        results.run,
        number=2,
        ar_step_sizes=choose_sizes(16, 5, "cosine"),
        num_denoising_steps=4,
        guidance=guidance,
        seed=3,
        spacing="log_snr",
    )
    assert torch.equal(results.made["settings"], latents)


def test_pictures_and_arrays_elsewhere(results: Results) -> None:
    _, images = ours(results.run)
    assert torch.equal(results.made["np"], images.permute(0, 2, 3, 1))
    pixels = (images.numpy() * 255).round().astype(np.uint8).reshape(3, 64)
    assert np.array_equal(results.made["pil"].numpy(), pixels)


def test_editing_elsewhere(results: Results) -> None:
    """The same as our own; what is kept comes back bit for bit."""
    found = build.find_checkpoint(results.run)
    config, model = found.config, found.load_model()
    region, tokens = parse_region("centre", 4), patchify(results.given, 2)
    settings = settings_of(config, 3, ar_step_sizes=choose_sizes(4, 2, "equal"))
    expected = unpatchify(ImageGenerator(config, model, settings, CPU).edit(tokens, region, [3, 7, 0]), 2)
    assert torch.equal(results.made["edited"], expected)
    kept = patchify(results.made["edited"], 2)[:, ~region]
    assert same_bits(kept, tokens[:, ~region])
    # A mask of the same tokens, and pixels instead of latents, whose way there and back rounds.
    assert disagreement(results.made["masked"], expected) < 1e-5
    pixels = results.made["pil"].reshape(3, 1, 8, 8) / 255
    torch.testing.assert_close(
        patchify(results.made["pictures"], 2)[:, ~region], patchify(pixels, 2)[:, ~region], rtol=0, atol=1e-6
    )
    assert torch.equal(results.made["everywhere"], ours(results.run)[0])


def test_exports_do_not_disturb_one_another(results: Results, exported: Path) -> None:
    made = results.made
    for other in ("raw", "version"):
        assert torch.equal(made[f"after {other}"], made["ddpm latent"])
        assert torch.equal(made[f"edited after {other}"], made["edited"])
        assert torch.equal(made[f"{other} again"], made[other])
        assert disagreement(made[other], made["ddpm latent"]) > 1e-4
    pipeline, transformer, other_pipeline, other_transformer = results.said["modules"]
    assert pipeline == other_pipeline
    assert transformer != other_transformer


def test_the_hub_needs_no_other_files(results: Results) -> None:
    for name in ("raw", "autoencoder latent"):
        assert torch.equal(results.made[f"{name} from hub"], results.made[name])


def test_an_autoencoder_goes_with_it(results: Results) -> None:
    latents, images = ours(results.latents_run, labels=(0, 4), ar_step_sizes=choose_sizes(16, 2, "equal"))
    assert torch.equal(results.made["autoencoder latent"], latents)
    assert torch.equal(results.made["autoencoder pt"], images)
    assert images.shape == (2, 3, 8, 8)
    for name in ("saved", "after saving"):
        assert torch.equal(results.made[name], images)


def test_weights_elsewhere(results: Results, exported: Path) -> None:
    loaded = {name.removeprefix("weights."): value for name, value in results.made.items() if "weights." in name}
    assert equal(loaded, weights_of(exported))
    assert equal(load_source(exported, CPU).model.state_dict(), loaded)
    latents, _ = ours(results.run, dtype=torch.bfloat16, solver="ddim")
    assert torch.equal(results.made["half"], latents)


def test_classes_go_by_name(results: Results) -> None:
    assert torch.equal(results.made["by name"], results.made["by number"])


def test_mistakes_elsewhere_are_named(results: Results) -> None:
    expected = [
        "class_labels: expected a name, or a number from 0 to 9, got 'eight'; names are ",
        "class_labels: 'bass' is the name of classes 1, 2; give index:1 or index:2",
        "class_labels: expected a name, or a number from 0 to 9, got 'owll'; did you mean 'owl'?",
        "class_labels: expected 0 to 9, got 10",
        "class_labels: expected 0 to 9, got 3.7",
        "class_labels: expected 0 to 9, got True",
        "class_labels: expected at least one class, got none",
        f"solver: expected one of {', '.join(SOLVERS)}, got 'euler'",
        "sizes of AR steps: expected 2 numbers of at least 1 that add up to 16",
        "num_ar_steps: expected 1 to 16 (the tokens of an image), got 17",
        "denoising steps: expected 2 to 1000, got 1",
        "ids: expected 3, one for each class, got 1",
        "output_type: expected one of pil, np, pt, latent, got 'png'",
        "region: expected centre, top, bottom, outside, box:Y0,X0,Y1,X1 or tokens:NUMBERS, got 'middle'",
        "region: expected a mask of 4 x 4 tokens, true or false, got [3, 3]",
        "image: expected an image or latents, got both or none",
        "latents: expected [1, 1, 8, 8] in all, got [3, 1, 8, 8]",
        "image: expected [1, 1, 8, 8] in all, got [1, 1, 8, 7]",
        "region: expected one, since images to edit are given, got none",
        "The directory",
    ]
    for found, begin in zip(results.said["refusals"], expected, strict=True):
        assert found is not None, begin
        assert found.startswith(begin)


def test_nothing_strange_is_loaded_or_said(results: Results) -> None:
    assert results.said["strangers"] == []
    for words in ("Expected types", "not expected", "were not used", "newly initialized", "might require", "Traceback"):
        assert words not in results.warnings, results.warnings
