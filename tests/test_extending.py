"""The page "How to extend": its diffs, applied to a copy of the library, do what it says."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.digits import small_run
from tests.processes import REPOSITORY, free_port, run_script

PAGE = (REPOSITORY / "docs" / "extending.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
OVERRIDES = [
    "noise.process=x0",
    "engine.attention=plain",
    "engine.cached_attention=plain",
    "train.optimizer=sgd",
    "train.learning_rate=0.05",
    "train.decay_steps=0",
    "checkpoint.keep_last=100",
]

# In a process that has imported the library of the checkout already.
RESUME = """
import runpy, sys
for name in [name for name in sys.modules if name.split(".")[0] == "cfpretrain"]:
    del sys.modules[name]
sys.path.insert(0, {folder!r})
runpy.run_path({folder!r} + "/cfpretrain/train.py", run_name="__main__")
"""


def blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", SECTIONS[section], re.MULTILINE | re.DOTALL)


def changes(section: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Each file of a section's diffs, and its hunks: the text before and after."""
    for diff in blocks(section, "diff"):
        for of_file in re.split(r"^--- ", diff, flags=re.MULTILINE)[1:]:
            _, name, *lines = of_file.splitlines(keepends=True)
            assert name.startswith("+++ b/"), name
            hunks = re.split(r"^@@\n", "".join(lines), flags=re.MULTILINE)[1:]
            texts = [
                tuple("".join(line[1:] for line in hunk.splitlines(True) if line[0] in signs) for signs in (" -", " +"))
                for hunk in hunks
            ]
            yield name.removeprefix("+++ b/").strip(), texts


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the library that has all extensions of the page."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(REPOSITORY / "cfpretrain", folder / "cfpretrain", ignore=shutil.ignore_patterns("__pycache__"))
    for section in SECTIONS:
        for name, hunks in changes(section):
            path = folder / name
            for before, after in hunks:
                text = path.read_text() if before else ""
                assert not before or text.count(before) == 1, f"{name} has not exactly once:\n{before}"
                path.write_text(text.replace(before, after) if before else after)
    return folder


@pytest.fixture(scope="module")
def run(extended: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps with all extensions, on two ranks that the page's script has started."""
    folder = tmp_path_factory.mktemp("runs") / "extended"
    [script] = blocks("A cluster", "bash")
    python = Path(sys.executable).parent  # also where its environment is not activated
    ours = {"PYTHONPATH": str(extended), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        ["bash", "-c", script, "two_ranks.sh", *small_run(shards, folder, *OVERRIDES)],
        cwd=extended,
        env=os.environ | ours | {"MASTER_PORT": str(free_port()), "PATH": f"{python}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder


@contextmanager
def library_of(folder: Path) -> Iterator[None]:
    """Imports take the library from the copy."""
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "cfpretrain"}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] == "cfpretrain"]:
            del sys.modules[name]
        sys.modules.update(kept)


@pytest.fixture
def extended_library(extended: Path) -> Iterator[None]:
    with library_of(extended):
        yield


def checkpoint(run: Path, step: int = 12) -> dict[str, dict[str, torch.Tensor]]:
    return {path.stem: load_file(path) for path in (run / "checkpoints" / f"step_{step:08d}").glob("*.safetensors")}


def losses(run: Path) -> list[tuple[float, float]]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(row["loss"], row["grad_norm"]) for row in rows]


def test_the_page_counts_its_files() -> None:
    counted = {name[0].upper() + name[1:]: int(n) for name, n in re.findall(r"^\| \[(.+?)\].+?\| (\d)", PAGE, re.M)}
    assert counted == {section: len(list(changes(section))) for section in SECTIONS}
    assert counted == {
        "An objective": 2,
        "A modality": 3,
        "An attention backend": 2,
        "An optimizer": 2,
        "A cluster": 0,
    }


def test_two_ranks_started_by_hand_train_with_all_extensions(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["world_size"], summary["num_steps"]) == (2, 12)
    assert len(losses(run)) == 12
    assert losses(run)[-1][0] < losses(run)[0][0]
    for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        assert row["loss"] == pytest.approx(row["loss_image"] + row["loss_caption"], rel=1e-9)
        assert (row["num_image_values"], row["num_caption_values"]) == (16 * 64, 16 * 3)
    names = sorted(path.name for path in (run / "samples").iterdir())
    assert names == ["step_00000012_ar_steps_0001.png", "step_00000012_ar_steps_0002.png"]


@pytest.mark.usefixtures("extended_library")
def test_the_objective_leads_back_and_is_sampled_by_all_solvers() -> None:
    from cfpretrain.core import seeds
    from cfpretrain.core.process import make_process, process_of_scheduler
    from cfpretrain.core.solvers import SOLVERS, Solver

    process = make_process("x0")
    assert process_of_scheduler("sample", process.scheduler_config()) == process
    clean, epsilon = seeds.normal(seeds.fold(seeds.key(0, "x"), torch.arange(2)), (5, 3, 2)).double()
    times_B = torch.tensor([0, 10, 500, 900, 999])
    noised, target = process.noise(clean, epsilon, times_B)
    assert torch.equal(target, clean)
    for i, (alpha, sigma) in enumerate(zip(*process.coefficients(times_B), strict=True)):
        found = process.split(noised[i], target[i], float(alpha), float(sigma))
        torch.testing.assert_close(found, (clean[i], epsilon[i]), rtol=0, atol=1e-10)
    for name in SOLVERS:
        made = Solver(process, 4, name=name).denoise(lambda *_: clean, lambda _: epsilon)
        torch.testing.assert_close(made, clean)


@pytest.mark.usefixtures("extended_library")
def test_the_modality_is_learned_beside_class_and_image(run: Path) -> None:
    from cfpretrain.core import seeds
    from cfpretrain.core.ar import ARSettings
    from cfpretrain.core.model import CausalFusion
    from cfpretrain.core.objective import DenoisingLoss
    from cfpretrain.core.process import make_process

    torch.manual_seed(0)
    model = CausalFusion(grid=3, patch_values=4, width=16, depth=2, num_heads=2, num_cond_tokens=2, num_classes=10)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    loss = DenoisingLoss(make_process(), ARSettings(), 2, 2, model.null_class, label_drop_prob=0.0, seed=0)
    ids_B, labels_B = torch.arange(3), torch.tensor([7, 0, 9])
    latents = seeds.normal(seeds.fold(seeds.key(0, "latents"), ids_B), (1, 6, 6))
    batch = loss.prepare(latents, loss.draw(0, 0, ids_B, labels_B, 9, 4))
    assert [one.kind for one in batch.segments] == ["class", "image", "caption"]
    caption = batch.segments[2]
    assert caption.clean.tolist() == [[10, 0, 0]] * 3
    assert caption.targets.tolist() == [[0, 0, 7], [0, 0, 0], [0, 0, 9]]

    predicted = model(batch.segments, batch.intervals_BMI)
    of_image, of_caption = predicted["image"], predicted["caption"]
    assert (of_image.shape, of_caption.shape) == ((3, 9, 4), (3, 3, 10))
    terms = loss(model, batch)
    assert {kind: one.count for kind, one in terms.items()} == {"image": 3 * 9 * 4, "caption": 3 * 3}
    assert batch.counts() | {"image": 3 * 9 * 4, "caption": 3 * 3} == batch.counts()
    assert terms["image"].squared_error_BLP.shape == (3, 9, 4)
    weighted = (of_image - batch.segments[1].targets).square() * batch.segments[1].weights_BL[..., None]
    cost = -of_caption.log_softmax(-1).gather(-1, caption.targets[..., None]).sum()
    torch.testing.assert_close(terms["image"].total, weighted.sum())
    torch.testing.assert_close(terms["caption"].total, cost)
    total = loss.total(terms)
    torch.testing.assert_close(total, weighted.mean() + cost / 9)
    total.backward()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "k_norm" not in name)

    # Of its tokens each sees those before; the image sees none.
    other = dataclasses.replace(caption, clean=torch.tensor([[10, 0, 1]] * 3))
    again = model([*batch.segments[:2], other], batch.intervals_BMI)
    caption_again = again["caption"]
    assert torch.equal(again["image"], of_image)
    assert torch.equal(caption_again[:, :2], of_caption[:, :2])
    assert (caption_again[:, 2] != of_caption[:, 2]).any(-1).all()
    for name, moved in checkpoint(run)["momentum_buffer"].items():
        assert not name.startswith("caption") or moved.abs().sum() > 0, name


@pytest.mark.usefixtures("extended_library")
def test_an_export_brings_the_modality_and_the_objective(extended: Path, run: Path, tmp_path: Path) -> None:
    from cfpretrain.base.console import UserError
    from cfpretrain.core.ar import equal_sizes
    from cfpretrain.core.latents import patchify
    from cfpretrain.core.sampler import Guidance
    from cfpretrain.evaluation.generation import GenerationSettings, ImageGenerator
    from cfpretrain.evaluation.source import load_source
    from cfpretrain.export.diffusers_layout import ExportSettings, export
    from cfpretrain.export.official import to_official

    out = tmp_path / "out"
    export(run, out, ExportSettings())
    averages = checkpoint(run)["ema"]
    assert any(name.startswith("caption") for name in averages)
    exported = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    assert exported.keys() == averages.keys()
    assert all(torch.equal(value, averages[name]) for name, value in exported.items())

    # The file of code alone, as diffusers runs it, samples what the library samples.
    [code] = (out / "transformer").glob("*.py")
    spec = spec_from_file_location("exported_with_captions", code)
    assert spec is not None
    assert spec.loader is not None
    alone = module_from_spec(spec)
    spec.loader.exec_module(alone)
    how = {"seed": 5, "num_inference_steps": 3, "solver": "ddpm", "level_spacing": "time", "num_ar_steps": 2}
    guided = {"guidance_scale": 2.0, "guidance_schedule": "constant", "guidance_interval": (0, None)}
    latents = alone.CausalFusionTransformer.from_pretrained(out / "transformer").sample(
        *(torch.tensor([3, 7]), torch.arange(2)),
        scheduler=json.loads((out / "scheduler" / "scheduler_config.json").read_text()),
        ar_step_sizes="equal",
        **how,
        **guided,
    )
    source, num_tokens = load_source(run, torch.device("cpu")), 16
    settings = GenerationSettings(equal_sizes(num_tokens, 2), 3, Guidance(2.0), batch_size=2, seed=5)
    nothing, everywhere = torch.zeros(2, num_tokens, 4), torch.ones(num_tokens, dtype=torch.bool)
    generator = ImageGenerator(source.config, source.model, settings, torch.device("cpu"))
    tokens = generator.edit(nothing, everywhere, [3, 7])
    assert torch.equal(patchify(latents, 2), tokens)

    with pytest.raises(ValueError, match=r"'caption_\S+' is not part of a CausalFusion model"):
        to_official(averages, 4)
    captions = extended / "cfpretrain" / "core" / "captions.py"
    text = captions.read_text()
    captions.write_text(text.replace("import torch\n", "import torch\nimport yaml\n", 1))
    try:
        with pytest.raises(UserError, match=r"^yaml cannot be imported everywhere; an export may use"):
            export(run, tmp_path / "other", ExportSettings())
    finally:
        captions.write_text(text)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("extended_library")
def test_the_backend_computes_what_sdpa_computes() -> None:
    from cfpretrain.core import attention
    from cfpretrain.core.ar import steps_from_sizes
    from cfpretrain.core.modalities import class_segment, image_segment
    from cfpretrain.core.segments import build_layout

    assert attention.choose("plain", "training", "cpu", "fp32", 8, print) == "plain"
    assert attention.choose("auto", "training", "cpu", "fp32", 8, print) == "sdpa"
    torch.manual_seed(0)
    steps_BL = torch.stack([steps_from_sizes(sizes) for sizes in ([2, 3, 4], [3, 2, 4])])
    layout = build_layout([class_segment(2), image_segment(steps_BL)])
    M = layout.step_BM.shape[1]
    values = [torch.randn(2, 2, M, 8, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    for intervals in (layout.intervals_BMI, None):
        results = []
        for name in ("plain", "sdpa"):
            out = attention.attend(*values[:3], attention.make_visibility(intervals, M, name))
            results.append((out, *torch.autograd.grad(out, values[:3], values[3])))
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_the_optimizers_state_survives_a_checkpoint_bit_for_bit(extended: Path, shards: Path, run: Path) -> None:
    whole, numbers = checkpoint(run), losses(run)
    assert whole.keys() == {"weights", "ema", "momentum_buffer"}
    assert any(value.abs().sum() > 0 for value in checkpoint(run, 4)["momentum_buffer"].values())
    (run / "checkpoints" / "latest").write_text("step_00000004\n")
    program = RESUME.format(folder=str(extended))
    for ended in run_script(program, small_run(shards, run, *OVERRIDES), 2):
        assert ended.code == 0, ended.err
        assert not ended.out or "training from step 4 to 12" in ended.out
    assert losses(run) == numbers
    for content, tensors in checkpoint(run).items():
        assert tensors.keys() == whole[content].keys()
        assert all(torch.equal(value, whole[content][name]) for name, value in tensors.items()), content
