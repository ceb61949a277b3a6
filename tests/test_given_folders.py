"""What a stranger's folder says of sizes: pipes, devices, depths and numbers that nobody means end in one line."""

import dataclasses
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cfpretrain.autoencoder import KLAutoencoder, make_network, shift_and_scale
from cfpretrain.base.config import load as load_config
from cfpretrain.base.console import UserError
from cfpretrain.data.shards import Shards, read_info
from cfpretrain.evaluation import array_files, given_images, references
from cfpretrain.evaluation.features import make_extractor
from cfpretrain.evaluation.given_images import open_images, read_arrays
from cfpretrain.evaluation.source import load_source
from cfpretrain.export import foreign_files
from cfpretrain.export.deepspeed_checkpoint import read_zero_checkpoint
from cfpretrain.export.diffusers_layout import ExportSettings, export
from cfpretrain.run import build, checkpoint
from cfpretrain.run.state import dump
from tests.digits import write_digits
from tests.processes import REPOSITORY
from tests.runs import STEP, write_run

CPU = torch.device("cpu")
CHECKPOINT = f"checkpoints/step_{STEP:08d}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its shards, and its export in several files of weights."""
    folder = tmp_path_factory.mktemp("made")
    run = write_run(folder / "run", write_digits(folder / "digits"))
    export(run, folder / "export", ExportSettings(max_shard_bytes=20_000))
    return folder


@pytest.fixture
def given(made: Path, tmp_path: Path) -> Path:
    """A copy."""
    return Path(shutil.copytree(made, tmp_path / "given"))


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    """What hangs for ever fails."""

    def stop(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


FILES = {
    "run/config.yaml": lambda given: load_source(given / "run", CPU),
    "run/checkpoints/latest": lambda given: load_source(given / "run", CPU),
    f"run/{CHECKPOINT}/state.json": lambda given: load_source(given / "run", CPU, step=STEP),
    f"run/{CHECKPOINT}/ranges.json": lambda given: load_source(given / "run", CPU),
    f"run/{CHECKPOINT}/ema.safetensors": lambda given: load_source(given / "run", CPU),
    "export/config.yaml": lambda given: load_source(given / "export", CPU),
    "export/transformer/config.json": lambda given: load_source(given / "export", CPU),
    "export/transformer/diffusion_pytorch_model.safetensors.index.json": lambda given: load_source(
        given / "export", CPU
    ),
    "digits/cfpretrain.json": lambda given: read_info(given / "digits"),
    "digits/index.json": lambda given: Shards(given / "digits"),
    "digits/shard.00000.mds": lambda given: Shards(given / "digits"),
}


def _pipe(file: Path) -> None:
    os.mkfifo(file)


def _endless(file: Path) -> None:
    file.symlink_to("/dev/zero")


@pytest.mark.parametrize("plant", [_pipe, _endless], ids=["pipe", "endless"])
@pytest.mark.parametrize("name", FILES)
def test_no_pipe_and_no_device_is_read(name: str, plant: Callable[[Path], None], given: Path) -> None:
    (given / name).unlink()
    plant(given / name)
    refusal(lambda: FILES[name](given))


@pytest.mark.parametrize("plant", [_pipe, _endless], ids=["pipe", "endless"])
def test_no_pipe_is_an_autoencoder_a_reference_or_a_tag(plant: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "deepspeed").mkdir()
    for file in ("vae/config.json", "deepspeed/latest", "real.npz"):
        plant(tmp_path / file)
    assert "config.json cannot be read" in refusal(lambda: KLAutoencoder.load(tmp_path / "vae", "cpu"))
    assert "latest cannot be read" in refusal(lambda: read_zero_checkpoint(tmp_path / "deepspeed"))
    assert "real.npz" in refusal(lambda: read_arrays(tmp_path / "real.npz", "--reference", ["mu"]))
    assert "real.npz" in refusal(lambda: foreign_files.read(tmp_path / "real.npz", "FILE"))


def test_a_command_ends_in_one_line(given: Path) -> None:
    (given / "run/checkpoints/latest").unlink()
    _pipe(given / "run/checkpoints/latest")
    command = [sys.executable, REPOSITORY / "tools/sample.py", given / "run", "--out", given / "out"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2, ended.stderr
    assert re.fullmatch(r"\[cfpretrain\] error: .*/latest cannot be read: not a regular file .*\n", ended.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Depth


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".json")])
def test_json_of_any_depth(name: str, given: Path) -> None:
    for text in ("[" * 200_000, '{"a":' * 200_000, "[" * 900 + "]" * 900):
        (given / name).write_text(text)
        refusal(lambda: FILES[name](given))


def test_an_index_whose_entries_nest(given: Path) -> None:
    """Deeper than may be copied by a function that calls itself, though not too deep for JSON."""
    file = given / "digits" / "index.json"
    index = json.loads(file.read_text())
    index["shards"][0]["raw_data"]["hashes"] = json.loads("[" * 400 + "]" * 400)
    file.write_text(json.dumps(index))
    assert "index.json" in refusal(lambda: Shards(given / "digits"))


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".json")])
def test_json_of_too_many_values(name: str, given: Path) -> None:
    """As text they are small, and as values they would fill the memory."""
    num_values = 8_100_000 if name.endswith("ranges.json") else 2_100_000
    (given / name).write_text(f'{{"a": [{"1," * num_values}1]}}')
    assert "values" in refusal(lambda: FILES[name](given))


@pytest.mark.parametrize(
    "given_json",
    [
        {"weight_map": dict.fromkeys(map(str, range(300_000)), 1), "metadata": {}},
        {"weight_map": {"x" * 10**6: 1}, "metadata": {}},
        {"weight_map": 1, "metadata": {"a": [1] * 10**6}},
    ],
    ids=["many", "long", "nested"],
)
def test_a_message_stays_short(given_json: dict[str, Any], given: Path) -> None:
    name = "export/transformer/diffusion_pytorch_model.safetensors.index.json"
    (given / name).write_text(json.dumps(given_json))
    assert len(refusal(lambda: FILES[name](given))) < 2_000


def test_values_that_contradict_are_cut(given: Path) -> None:
    file = given / "export/transformer/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"grid": "x" * 10**6}))
    said = refusal(lambda: load_source(given / "export", CPU))
    assert "contradicts" in said
    assert len(said) < 2_000


def test_the_header_of_tensors_has_so_many_values(given: Path, tmp_path: Path) -> None:
    header = b'{"x":{"dtype":"F32","shape":[' + b"1," * 1_100_000 + b'1],"data_offsets":[0,4]}}'
    file = given / "run" / CHECKPOINT / "ema.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert "1,000,000 values" in refusal(lambda: load_source(given / "run", CPU, step=STEP))
    assert "1,000,000 values" in refusal(lambda: foreign_files.read(file, "FILE"))


def test_a_tensor_that_the_model_lacks_is_not_read(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = build.find_checkpoint(given / "run")
    smaller = dataclasses.replace(found.config.model, depth=found.config.model.depth - 1)
    found = dataclasses.replace(found, config=dataclasses.replace(found.config, model=smaller))
    monkeypatch.setattr(checkpoint, "read_whole", None)
    assert "unknown: trunk.blocks." in refusal(found.load_model)


def yaml_of(kind: str) -> str:
    if kind == "aliases":
        lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
        return "\n".join([*lines, *(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]" for i in range(9))])
    return {
        "brackets": f"model: {'[' * 100_000}",
        "braces": f"model: {'{a: ' * 100_000}",
        "dashes": "model:\n" + "- " * 100_000,
        "indents": "\n".join(f"{' ' * i}a:" for i in range(300)),
        "itself": "model: &a [*a]",
        "merged": "a: &a {<<: *a}",
        "large": f"# {'x' * 300_000}",
        "sixties": f"run: {{seed: {':'.join(['1'] * 60_000)}}}",
    }[kind]


@pytest.mark.parametrize(
    "kind", ["aliases", "brackets", "braces", "dashes", "indents", "itself", "merged", "large", "sixties"]
)
def test_yaml_of_any_depth(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml_of(kind))
    said = refusal(lambda: load_config(file))
    assert str(file) in said


def test_anchors_that_are_meant_are_read(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("train: {decay_steps: &n 7, warmup_steps: *n, num_steps: *n}\n")
    assert load_config(file).train.warmup_steps == 7


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize(
    "key",
    [f"model.{name}" for name in ("depth", "width", "num_heads", "latent_size", "num_classes", "num_cond_tokens")],
)
def test_sizes_that_no_network_has(key: str, given: Path) -> None:
    section, name = key.split(".")
    for folder in ("run", "export"):
        file = given / folder / "config.yaml"
        plain = yaml.safe_load(file.read_text())
        plain[section][name] = 1_000_000_000
        file.write_text(yaml.safe_dump(plain))
        assert key in refusal(lambda folder=folder: load_source(given / folder, CPU))


HUGE = 10**400
GUARD = {"losses": [], "grad_norms": [], "num_skips_in_row": 0}


@pytest.mark.parametrize(
    "changed",
    [
        {"step": HUGE},
        {"train_seconds": HUGE},
        {"guard": GUARD | {"losses": [HUGE]}},
        {"guard": {"losses": 5}},
        {"guard": GUARD | {"num_skips_in_row": []}},
        {"history": [{"step": HUGE, "changed": {}}]},
        {"working_folder": "a\0b"},
        {"class_names": ["a\0b"]},
        {"class_names": [f"n{i}" for i in range(20)]},
        {"class_names": ["one", "two"]},
    ],
    ids=lambda changed: f"{changed!s:.30}",
)
def test_states_that_nobody_wrote(changed: dict[str, Any], given: Path) -> None:
    """With a hash that fits, which anyone can compute."""
    file = given / "run" / CHECKPOINT / "state.json"
    plain = json.loads(file.read_text()) | changed
    del plain["sha256"]
    file.write_text(dump(plain | {"sha256": hashlib.sha256(dump(plain).encode()).hexdigest()}))
    assert re.search(
        r"state\.json|the names of 10 classes", refusal(lambda: load_source(given / "run", CPU, step=STEP))
    )


@pytest.mark.parametrize("name", ["step_" + "9" * 300, "step_\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0663"])
def test_names_that_no_checkpoint_has(name: str, given: Path) -> None:
    (given / "run" / "checkpoints" / "latest").write_text(name)
    assert "expected the name of a checkpoint" in refusal(lambda: load_source(given / "run", CPU))


@pytest.mark.parametrize("step", [HUGE, -1, 1e300])
def test_a_best_checkpoint_that_cannot_be(step: float, given: Path) -> None:
    note = {"step": step, "score": 1, "measured_by": [["a", "b"]]}
    (given / "run" / "checkpoints" / "best.json").write_text(json.dumps(note))
    refusal(lambda: load_source(given / "run", CPU, step="best"))


def test_a_shape_that_is_no_number(given: Path) -> None:
    file = given / "run" / CHECKPOINT / "ema.safetensors"
    header = b'{"x":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert "safetensors header" in refusal(lambda: load_source(given / "run", CPU, step=STEP))


@pytest.mark.parametrize("number", ["1" + "0" * 400, "1e400", "9223372036854775808", ".nan"])
def test_numbers_that_no_machine_counts(number: str, tmp_path: Path) -> None:
    for key in ("run: {seed: %s}", "train: {learning_rate: %s}"):
        (tmp_path / "config.yaml").write_text(key % number)
        if "seed" in key or number != "9223372036854775808":  # as a learning rate it is merely bold
            refusal(lambda: build.checked(load_config(tmp_path / "config.yaml")))


@pytest.mark.parametrize(
    "changed",
    [
        {"layers_per_block": 1_000_000_000},
        {"latent_channels": 1_000_000_000},
        {"block_out_channels": [64] * 100_000},
        {"block_out_channels": [64, "x"]},
        {"down_block_types": {"a": 1}},
    ],
)
def test_sizes_that_no_autoencoder_has(changed: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **changed}))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    assert "makes none" in refusal(lambda: KLAutoencoder.load(tmp_path, "cpu"))


def npy(shape: tuple[int, ...], descr: str = "|u1", data: bytes = b"") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue() + data


@pytest.mark.parametrize(
    "content",
    [
        npy((10**12,)),
        npy((10**6, 10**6, 3, 3), data=b"x" * 90),
        npy((-1, 3), data=b"x"),
        npy((1,), "|O", b"\x80\x04N."),
        npy((10**12,), "|V0"),
        b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535,
    ],
)
def test_arrays_are_held_against_their_headers(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "array.npy").write_bytes(content)
    for is_mapped in (False, True):
        with pytest.raises((ValueError, OSError)):
            array_files.load(tmp_path / "array.npy", is_mapped)
    archive = tmp_path / "archive.npz"
    with zipfile.ZipFile(archive, "w") as opened:
        for name in ("mu", "arr_0"):
            opened.writestr(f"{name}.npy", content)
    refusal(lambda: read_arrays(archive, "--reference", ["mu"]))
    refusal(lambda: open_images(archive, "--reference"))


def test_an_archive_that_grows_a_thousandfold(tmp_path: Path) -> None:
    file = tmp_path / "bomb.npz"
    zeros = bytes(2**24)
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("mu.npy", "w", force_zip64=True) as member,
    ):
        member.write(npy((40 * len(zeros),)))
        for _ in range(40):
            member.write(zeros)
    assert file.stat().st_size < 2**20
    assert "at most" in refusal(lambda: read_arrays(file, "--reference", ["mu"]))


def test_images_of_more_pixels_than_are_scored(tmp_path: Path) -> None:
    """Zeros, which take no room in an archive."""
    np.savez_compressed(tmp_path / "a.npz", arr_0=np.zeros((2, 4096, 2048, 1), np.uint8))
    said = refusal(lambda: open_images(tmp_path / "a.npz", "REAL"))
    assert said.startswith("REAL: expected images of at most 4194304 pixels, got 2048 x 4096 in ")


def test_an_image_is_refused_by_its_size_before_it_is_decoded(tmp_path: Path) -> None:
    """Of a file that ends behind its header."""
    for size, said in (((4096, 2048), "at most 4194304 pixels, got 4096 x 2048"), ((16, 17), "one size, got 16 x 17")):
        for name in ("a.png", "b.png"):
            Image.new("1", (16, 16)).save(tmp_path / name)
        Image.new("1", size).save(tmp_path / "large.png")
        file = tmp_path / ("a.png" if "pixels" in said else "b.png")
        file.write_bytes((tmp_path / "large.png").read_bytes()[:60])
        (tmp_path / "large.png").unlink()
        line = refusal(lambda: open_images(tmp_path, "REAL").read([0, 1]))
        assert f"REAL: expected images of {said} in {file}" in line


@pytest.mark.parametrize(
    "changed",
    [
        *({"norm_num_groups": value} for value in (-1, -1.0, 0)),
        *({"scaling_factor": value} for value in (0, math.inf, math.nan, 1e-300, 1e300, HUGE)),
        *({"shift_factor": value} for value in (math.nan, 1e300)),
        *({"latent_channels": 0}, {"in_channels": -3}, {"block_out_channels": [-8]}),
    ],
)
def test_autoencoders_that_make_no_pixels(changed: dict[str, Any]) -> None:
    config: dict[str, Any] = {"block_out_channels": [8], "norm_num_groups": 4, "latent_channels": 4} | changed
    assert "expected the config of an AutoencoderKL" in refusal(lambda: make_network(config, "vae/config.json"))


def test_autoencoders_may_shift_by_whole_numbers() -> None:
    config = {"block_out_channels": [8], "norm_num_groups": 4, "latent_channels": 2, "latents_mean": [-1, 2]}
    network: Any = make_network(config | {"latents_std": [1, 2], "scaling_factor": 1}, "vae/config.json")
    assert shift_and_scale(network.config) == ((-1.0, 2.0), (1.0, 0.5))


@pytest.mark.parametrize(
    "changed",
    [*({"num_images": value} for value in (math.inf, math.nan, None, -1, HUGE)), {"features": 5}, {"features": {}}],
)
def test_statistics_whose_note_is_none(changed: dict[str, Any], tmp_path: Path) -> None:
    extractor = make_extractor("effnet_lite0", CPU)
    note = {"num_images": 2, "features": extractor.fingerprint, "name": "n", "made_by": "m"} | changed
    np.savez(tmp_path / "a.npz", mu=np.zeros(2), sigma=np.eye(2), **{references._OWN_KEY: json.dumps(note)})
    said = refusal(lambda: references._given_statistics(tmp_path / "a.npz", extractor))
    assert ("does not say of which features" in said) == ("num_images" in changed)


def test_an_archive_in_fortrans_order_is_told_to_be_written_in_cs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    np.savez(tmp_path / "a.npz", arr_0=np.asfortranarray(images))
    read = open_images(tmp_path / "a.npz", "REAL").read([0, 1])
    assert torch.equal(read, torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    monkeypatch.setattr(given_images, "_MOST_BYTES_AT_ONCE", 100)
    said = refusal(lambda: open_images(tmp_path / "a.npz", "REAL"))
    assert "in C order, got Fortran's" in said
    assert "damaged" not in said


def test_an_array_of_an_archive_is_held_once(tmp_path: Path) -> None:
    num_bytes = 2**25
    np.savez_compressed(tmp_path / "a.npz", mu=np.zeros(num_bytes, np.uint8))
    with array_files.open_archive(tmp_path / "a.npz") as archive:
        tracemalloc.start()
        try:
            array_files.read_member(archive, "mu")
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert num_bytes <= peak < 1.5 * num_bytes


@pytest.mark.parametrize("number", [HUGE, "text", -1, None, [1]])
def test_summaries_that_no_run_wrote(number: object, given: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = {"num_steps": STEP, "train_seconds": 1.5, "loss_first": None, "of_another_version": 1}
    file = given / "run" / "summary.json"
    file.write_text(json.dumps(summary))
    assert build.read_summary(given / "run") == {"num_steps": STEP, "train_seconds": 1.5}
    assert not capsys.readouterr().out
    for name in ("num_steps", "world_size", "images_per_second", "versions"):
        file.write_text(json.dumps(summary | {name: number}))
        assert build.read_summary(given / "run") is None
        (line,) = capsys.readouterr().out.splitlines()
        assert f"WARNING: {file} is left out, as if the run were not complete: summary.json: {name}" in line
    export(given / "run", given / "out", ExportSettings())


def test_arrays_are_what_numpy_wrote(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6.0).reshape(2, 3), "f": np.asfortranarray(np.eye(3)), "n": np.array(7), "e": np.empty(0)}
    np.savez_compressed(tmp_path / "x.npz", **arrays)
    read = array_files.read_members(tmp_path / "x.npz")
    for name, array in arrays.items():
        np.save(tmp_path / "x.npy", array)
        for found in (read[name], array_files.load(tmp_path / "x.npy"), array_files.load(tmp_path / "x.npy", True)):
            assert found.dtype == array.dtype
            assert np.array_equal(found, array)


@pytest.mark.parametrize(("key", "value"), [("samples", 10**12), ("samples", -1), ("bytes", 10**12), ("bytes", "9")])
def test_an_index_of_other_sizes_than_its_files(key: str, value: object, given: Path) -> None:
    file = given / "digits" / "index.json"
    index = json.loads(file.read_text())
    entry = index["shards"][0]
    (entry if key == "samples" else entry["raw_data"])[key] = value
    file.write_text(json.dumps(index))
    refusal(lambda: Shards(given / "digits"))


def test_a_sample_that_says_four_gigabytes(given: Path) -> None:
    shards = Shards(given / "digits")
    file = given / "digits" / shards.files[0].name
    data = bytearray(file.read_bytes())
    data[8:12] = (2**32 - 1).to_bytes(4, "little")  # the end of the first sample
    file.write_bytes(data)
    assert "of" in refusal(lambda: shards.sample(0))


def test_tensors_that_stand_for_more_than_they_hold(tmp_path: Path) -> None:
    sparse = torch.sparse_coo_tensor(size=(10**6, 10**6), check_invariants=True)
    for tensor in (torch.zeros(1).expand(10**6, 10**6), sparse):
        torch.save({"model": {"x": tensor}}, tmp_path / "x.pt")
        assert "expected plain tensors" in refusal(lambda: foreign_files.read(tmp_path / "x.pt", "FILE"))


@pytest.mark.parametrize(
    ("file", "changed", "said"),
    [
        ("model_index.json", {"id2label": {"3": 7}}, "id2label.3: expected a text, got 7"),
        ("model_index.json", {"id2label": ["a"]}, "id2label: expected keys with values, got ['a']"),
        ("model_index.json", {"vae": {"a": 1}}, "vae: expected a text, got {'a': 1}"),
        ("transformer/diffusion_pytorch_model.safetensors.index.json", {"weight_map": {"x": None}}, "weight_map.x: "),
        ("transformer/diffusion_pytorch_model.safetensors.index.json", {"metadata": 3}, "metadata: expected keys"),
    ],
)
def test_the_fields_of_an_export_have_their_types(
    file: str, changed: dict[str, object], said: str, given: Path
) -> None:
    path = given / "export" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {"of_another_version": 1}))
    load_source(given / "export", CPU)
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    line = refusal(lambda: load_source(given / "export", CPU))
    assert line.startswith(f"{path}: {said}")
    assert line.endswith("; export the run again")


@pytest.mark.parametrize("name", ["../config.yaml", "/etc/passwd", "..", "a/../b.safetensors", "x.pt", ".safetensors"])
def test_a_weight_map_stays_in_its_folder(name: str, given: Path) -> None:
    index = given / "export/transformer/diffusion_pytorch_model.safetensors.index.json"
    plain = json.loads(index.read_text())
    plain["weight_map"] = dict.fromkeys(plain["weight_map"], name)
    index.write_text(json.dumps(plain))
    assert "files beside it" in refusal(lambda: load_source(given / "export", CPU))
