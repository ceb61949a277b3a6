"""Every tool that writes, where the names that it may touch are links: what they lead to stays as it was."""

import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import save_file

from cfpretrain.base import config as configs
from cfpretrain.base import files, outputs
from cfpretrain.base.config import GuardConfig
from cfpretrain.base.console import UserError
from cfpretrain.core.model import write_initial_values
from cfpretrain.data.shard_writer import ShardWriter
from cfpretrain.evaluation import pictures
from cfpretrain.evaluation.feature_sums import Work
from cfpretrain.evaluation.image_set import ImageSet
from cfpretrain.export.diffusers_layout import ExportSettings, export
from cfpretrain.export.official import write_official
from cfpretrain.run import build
from cfpretrain.run.guard import Guard
from cfpretrain.run.metrics import MetricsFile
from cfpretrain.training.folder import take, write_requeue
from tests import image_files
from tests.digits import small_run
from tests.image_files import write_digits
from tests.processes import Rank, run_in_processes, run_script
from tests.runs import write_run
from tests.test_import_autoencoder import SMALL, random_tensors
from tests.test_import_deepspeed import make_config, make_engine

# What a run's folder may hold, today and in earlier versions.
NAMES = (
    "config.yaml.partial",
    "summary.json.partial",
    "metrics.partial",
    "requeue",
    "requeue.0",
    "summary.json",
    "curves.png",
    "loss_map.png",
    "report.json",
    "report.json.partial",
    ".report.partial",
    "samples",
    "replay",
)


class Victim:
    """A file and a folder of somebody else's."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "key"
        folder.mkdir()
        self.file.write_text("secret")
        (folder / "lock").write_text("secret")

    def is_whole(self) -> bool:
        names = sorted(path.name for path in self.folder.iterdir())
        return names == ["key", "lock"] and all((self.folder / name).read_text() == "secret" for name in names)


@pytest.fixture
def victim(tmp_path: Path) -> Victim:
    return Victim(tmp_path / "victim")


@pytest.fixture
def run(tmp_path: Path, shards: Path) -> Path:
    # Of any data, and ready to be trained on.
    return write_run(tmp_path / "run", shards, data_fingerprint="", guard=Guard(GuardConfig(6.0, 100, 10)).to_plain())


def succeeds_or_says_why(work: Callable[[], Any]) -> str:
    """What a user is told where it fails: one line, without what a link leads to."""
    said = ""
    try:
        work()
    except (UserError, OSError) as error:
        said = str(error)
    assert "\n" not in said
    assert "secret" not in said
    return said


def hidden_of(out: Path) -> list[Path]:
    return [out.with_name(f".{out.name}.{kind}") for kind in ("partial", "unfinished")]


def write_set(out: Path) -> None:
    images = ImageSet(out, [0, 1], ["a", "b"], 2, {"made": "by a test"})
    images.is_complete()
    images.begin()
    images.write(torch.arange(2), torch.zeros(2, 1, 4, 4))
    images.finish()


def write_shards(out: Path) -> None:
    writer = ShardWriter(out, {"id": "int64"}, {"made": "by a test"})
    writer.is_complete()
    writer.begin()


def write_picture(out: Path) -> None:
    with outputs.whole_or_nothing(out, "--out") as unfinished:
        pictures.write_png(unfinished, np.zeros((4, 4, 3), np.uint8))


def sum_features(out: Path) -> None:
    Work(out, "--out", {"made": "by a test"}, 1, 1).begin()


def train_hidden(out: Path) -> None:
    work = outputs.Unfinished(out, "OUT", kind="partial")
    work.take()
    work.release()


# How the tools give an output its name; a run stands beside it.
OUTPUTS = {
    "export_hf": lambda run, out: export(run, out, ExportSettings()),
    "export_official": lambda run, out: write_official(run, out),
    "sample a set": lambda run, out: write_set(out),
    "sample an archive": lambda run, out: write_set(out.with_name(f"{out.name}.npz")),
    "sample and edit": lambda run, out: write_picture(out),
    "make_shards and encode_latents": lambda run, out: write_shards(out),
    "evaluate_fid and references": lambda run, out: sum_features(out),
    "train_autoencoder and report": lambda run, out: train_hidden(out),
}


@pytest.mark.parametrize("to", ["file", "folder", "nowhere"])
@pytest.mark.parametrize("way", OUTPUTS)
def test_hidden_folders_that_are_links_are_not_entered(
    way: str, to: str, run: Path, victim: Victim, tmp_path: Path
) -> None:
    target = {"file": victim.file, "folder": victim.folder, "nowhere": victim.folder / "new"}[to]
    for out in (tmp_path / "out", tmp_path / "out.npz"):
        for link in hidden_of(out):
            link.symlink_to(target)
    assert succeeds_or_says_why(lambda: OUTPUTS[way](run, tmp_path / "out"))
    assert victim.is_whole()


@pytest.mark.parametrize("way", OUTPUTS)
def test_links_in_hidden_folders_are_not_followed(way: str, run: Path, victim: Victim, tmp_path: Path) -> None:
    for out in (tmp_path / "out", tmp_path / "out.npz"):
        for folder in hidden_of(out):
            folder.mkdir()
            for name, target in (("out", victim.folder), ("records", victim.folder), ("rest", victim.file)):
                (folder / name).symlink_to(target)
            for name in ("plan.json", "settings.json", "start", "000000.png", ".writing.plan.json"):
                (folder / name).symlink_to(victim.folder / "new")
    succeeds_or_says_why(lambda: OUTPUTS[way](run, tmp_path / "out"))
    assert victim.is_whole()
    for folder in tmp_path.glob(".out*"):
        for link in folder.iterdir():
            link.unlink()
        (folder / outputs.LOCK_FILE).symlink_to(victim.file)
    succeeds_or_says_why(lambda: OUTPUTS[way](run, tmp_path / "out2"))
    assert victim.is_whole()


@pytest.mark.parametrize("name", ["key", "picture"])
def test_a_sample_that_is_a_link_is_not_copied_into_an_export(
    name: str, run: Path, victim: Victim, tmp_path: Path
) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "picture", "PNG")
    (run / "samples").mkdir()
    sample = run / "samples" / "step_00000007_ar_steps_0001.png"
    sample.symlink_to(victim.file if name == "key" else tmp_path / "picture")
    said = succeeds_or_says_why(lambda: export(run, tmp_path / "out", ExportSettings()))
    assert re.match(rf"RUN: {sample}: expected a picture to show, which is no link .*; remove it$", said)
    sample.unlink()
    sample.write_text("secret")
    assert "not a file of the expected kind" in succeeds_or_says_why(
        lambda: export(run, tmp_path / "out", ExportSettings())
    )
    assert not (tmp_path / "out").exists()
    sample.unlink()
    Image.new("RGB", (4, 4)).save(sample, "PNG")
    export(run, tmp_path / "out", ExportSettings())
    assert (tmp_path / "out" / "samples.png").read_bytes() == sample.read_bytes()


@pytest.mark.parametrize(
    "write",
    [
        take,
        lambda folder: MetricsFile(folder / "metrics.jsonl", 3).append([{"step": 4}]),
        lambda folder: write_requeue(folder, "stopped"),
        lambda folder: files.replace(folder / build.CONFIG_FILE, "x: 1\n"),
        lambda folder: pictures.write_png(folder / "curves.png", np.zeros((4, 4, 3), np.uint8)),
    ],
)
def test_links_in_a_run_are_not_written_through(
    write: Callable[[Path], Any], victim: Victim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (*NAMES, "lock", "config.yaml", "metrics.jsonl", "curves.png"):
        (folder / name).is_symlink() or (folder / name).symlink_to(victim.file)
    succeeds_or_says_why(partial(write, folder))
    assert victim.is_whole()


_QUICK = ("--num-denoising-steps", "2")


def plant(folder: Path, target: Path, *names: str) -> None:
    """Puts links where nothing is, for names that a tool may touch."""
    for name in (*NAMES, *names):
        if not os.path.lexists(folder / name):
            (folder / name).symlink_to(target)


@pytest.mark.parametrize("to", ["file", "folder"])
@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("cfpretrain/train.py", []),
        ("tools/replay.py", ["{run}", "--step", "8"]),
        (
            "tools/edit.py",
            ["{run}", "--generate", "0", "--region", "top", "--class", "1", "--out", "{run}/curves.png", *_QUICK],
        ),
        ("tools/sample.py", ["{run}", "--out", "{run}/curves.png", "--num-images", "1", *_QUICK]),
    ],
)
def test_tools_on_a_run_full_of_links_change_nothing_else(
    script: str, options: list[str], to: str, run: Path, victim: Victim, shards: Path
) -> None:
    (run / "metrics.jsonl").write_text("")
    plant(run, victim.file if to == "file" else victim.folder, "wandb", ".curves.png.partial", ".out.unfinished")
    plant(run / "checkpoints", victim.folder, "best.json", "step_00000008.partial", "step_00000008.deleted")
    what = small_run(shards, run, "train.num_steps=8", "sample.every_steps=8") if "train" in script else []
    (ended,) = run_script(script, [*what, *(option.format(run=run) for option in options)], 1)
    assert ended.code in ((0,) if "train" in script else (0, 2)), ended.out + ended.err
    assert "Traceback" not in (ended.out + ended.err)
    assert "usage:" not in ended.err
    assert "secret" not in (ended.out + ended.err)
    assert victim.is_whole()


def test_a_lock_that_is_a_link_ends_a_run_in_one_line(run: Path, victim: Victim, shards: Path) -> None:
    (run / "lock").unlink(missing_ok=True)
    (run / "lock").symlink_to(victim.file)
    (ended,) = run_script("cfpretrain/train.py", small_run(shards, run), 1)
    assert ended.code == 2
    assert f"run.folder: {run} cannot be written (" in (ended.out + ended.err)
    assert victim.is_whole()


# ---------------------------------------------------------------------------------------------------------------------
# What writes beside the folder that it was given, as scripts

# What lies in the hidden folders of unfinished work.
_UNFINISHED = (
    "out",
    "made",
    "records",
    "checkpoints",
    "config.yaml",
    "plan.json",
    "settings.json",
    "start",
    "state.safetensors",
    "reconstructions.png",
    "joined.npz",
    "shard.00000.mds",
    "index.json",
    "cfpretrain.json",
    "rejected.jsonl",
    "sums_00001_00000.npz",
    "rows_00000000.npy",
    "batch_000000.npy",
    "report_ar_steps_0001_guidance_1.png",
    "report_ar_steps_0001_guidance_2.png",
    ".writing.plan.json.01234567",
)


def write_gpt2(folder: Path) -> None:
    """A small GPT-2 with random weights, as transformers saves it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=32, n_layer=1, n_head=2, n_positions=8)).save_pretrained(folder)


class Sources(NamedTuple):
    """What the tools read, all small."""

    run: Path
    images: Path
    held_out: Path
    tree: Path
    archive: Path
    official: Path
    autoencoder: Path
    deepspeed: Path
    language_model: Path
    entry: str  # of the archive's reference in a cache


def save_deepspeed(folder: Path) -> None:
    """What `save_checkpoint` of DeepSpeed writes on one rank, and the config of its model."""
    dist.init_process_group("gloo")
    config = make_config()
    engine = make_engine(config)
    engine.initialise(partial(write_initial_values, 0, config.model.grid))
    engine._deepspeed.save_checkpoint(str(folder))
    (folder / "config.yaml").write_text(configs.to_yaml(config))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Sources:
    folder = tmp_path_factory.mktemp("sources")
    names = (
        "run",
        "images",
        "held_out",
        "tree",
        "archive.npz",
        "official.pt",
        "autoencoder.safetensors",
        "deepspeed",
        "gpt2",
    )
    found = Sources(*(folder / name for name in names), entry="")
    write_run(found.run, shards)
    write_official(found.run, found.official)
    write_digits(found.images, 0, 40)
    write_digits(found.held_out, 40, 20)
    image_files.write_folder(found.tree, image_files.digits(0, 20))
    np.savez(found.archive, arr_0=image_files.digits(20, 20))
    save_file(random_tensors(SMALL), found.autoencoder)
    run_in_processes(save_deepspeed, 1, found.deepspeed)
    write_gpt2(found.language_model)
    arguments = COMMANDS["evaluate_fid"].format(given=folder, **found._asdict()).split()
    (ended,) = run_script("tools/evaluate_fid.py", arguments, 1)
    assert ended.code == 0, ended.err
    [entry] = (folder / "cache").iterdir()
    return found._replace(entry=entry.name)


# {given} is the folder full of links; what each is given to read is small, and makes it write all that it can.
COMMANDS = {
    "report": "{given}/run --images {images} --held-out {held_out} --num-images 100 --num-ar-steps 1 "
    "--num-denoising-steps 2 --batch-size 100",
    "evaluate_fid": "{archive} --reference {tree} --features tests.small_features:make --out {given}/out "
    "--cache {given}/cache",
    "export_hf": "{given}/run {given}/out",
    "export_hf official": "{given}/run {given}/out --format official",
    "import_official": "{official} {given}/out --config {run}/config.yaml",
    "import_autoencoder": "{autoencoder} {given}/out --scaling-factor 1",
    "import_deepspeed": "{deepspeed} {given}/out --config {deepspeed}/config.yaml",
    "import_language_model": "{language_model} {given}/out --config {run}/config.yaml",
    "train_autoencoder": "{images} {given}/out --channels 8 8 --num-steps 2 --batch-size 8 --save-seconds 0",
    "encode_latents": "{images} --autoencoder identity --out {given}/out --no-mirror",
    "make_shards": "{tree} --out {given}/out --size 8 --hold-out 0.2 --held-out {given}/rest --workers 1",
    "inspect_shards": "{images} --grid {given}/out.png",
    "example_images": "digits --out {given}/out --held-out {given}/rest",
    "sample": "{given}/run --out {given}/out --num-images 2 --num-denoising-steps 2",
}


def plant_outputs(given: Path, where: str, entry: str, victim: Victim) -> list[Path]:
    """Links at what the tools write, or at the hidden folders where it comes into being, or at all in such folders."""
    outs = [given / name for name in ("out", "rest", "out.png", f"cache/{entry}", "run/report.json")]
    hidden = [folder for out in outs for folder in hidden_of(out)] + [given / "run" / ".report.partial"]
    if where == "outputs":
        (given / "run" / ".report.partial").mkdir()
        return [link_to(path, victim.folder) for path in (*outs, given / "run" / "samples")]
    (given / "run" / "samples").mkdir()
    if where == "hidden folders":
        return [link_to(path, victim.folder) for path in hidden]
    for folder in hidden:
        folder.mkdir()
    links = [folder / name for folder in (*hidden, given / "run" / "samples") for name in _UNFINISHED]
    if where == "files to come":  # whatever is not read first
        return [link_to(link, victim.folder / "new") for link in links if "." in link.name]
    return [link_to(link, victim.file if "." in link.name else victim.folder) for link in links]


def link_to(path: Path, target: Path) -> Path:
    if not os.path.lexists(path):
        path.symlink_to(target)
    return path


@pytest.mark.parametrize("where", ["outputs", "hidden folders", "in hidden folders", "files to come"])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_tools_write_goes_through_no_link(
    command: str, where: str, sources: Sources, victim: Victim, tmp_path: Path
) -> None:
    given = tmp_path / "given"
    shutil.copytree(sources.run, given / "run")
    (given / "cache").mkdir()
    planted = plant_outputs(given, where, sources.entry, victim)
    plant(given / "run", victim.file)
    arguments = COMMANDS[command].format(given=given, **sources._asdict()).split()
    tool = Rank(f"tools/{command.split()[0]}.py", arguments, {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})
    out, err = tool.communicate(timeout=120)
    said = out + err
    assert victim.is_whole()
    assert "Traceback" not in said
    assert "secret" not in said
    if where == "files to come":
        assert tool.returncode == 0, said
        assert not [path for path in (given / "out").glob("**/*") if path.is_symlink()] or command == "sample"
    elif tool.returncode != 0:  # the mistake is a link, and not the command's
        assert tool.returncode == 2, said
        assert err.count("\n") == 1, said
        assert any(str(path) in err for path in planted), said
