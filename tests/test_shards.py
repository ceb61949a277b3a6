"""Shard folders: what is written is read, nothing unfinished looks finished, and every mistake has its message."""

import dataclasses
import importlib.util
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from cfpretrain.config import Config, DataConfig, ModelConfig, TrainConfig
from cfpretrain.console import UserError
from cfpretrain.data import shards
from cfpretrain.data.shards import ShardInfo, Shards, check_info, fingerprint, read_all, read_info, write_shards

INFO = ShardInfo(
    autoencoder="identity",
    latent_shape=(2, 4, 4),
    latent_shift=(0.5, 0.25),
    latent_scale=(2.0, 4.0),
    class_names=("cat", "dog", "owl"),
    num_samples=50,
    source="test",
)
CONFIG = Config(
    model=ModelConfig(latent_size=4, latent_channels=2, num_classes=3),
    data=DataConfig(latent_shift=INFO.latent_shift, latent_scale=INFO.latent_scale),
    train=TrainConfig(global_batch_size=16, micro_batch_size=8),
)


def latent_of(sample_id: int) -> np.ndarray:
    return np.random.default_rng(sample_id).standard_normal((2, 4, 4)).astype(np.float16)


def samples(count: int = 50) -> Iterator[tuple[int, np.ndarray, int]]:
    # Ids with gaps, in no order: they are names, not places.
    return ((7 * ((i * 13) % count) + 3, latent_of(i), i % 3) for i in range(count))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    assert write_shards(tmp_path / "shards", INFO, samples())
    return tmp_path / "shards"


# ---------------------------------------------------------------------------------------------------------------------
# Writing and reading


def test_what_is_written_is_read(folder: Path) -> None:
    assert read_info(folder) == INFO
    ids_B, latents_BCYX, labels_B = read_all(folder)
    wanted_ids, wanted_latents, wanted_labels = zip(*samples(), strict=True)
    assert ids_B.tolist() == list(wanted_ids)
    assert labels_B.tolist() == list(wanted_labels)
    assert latents_BCYX.numpy().dtype == np.float32
    np.testing.assert_array_equal(latents_BCYX.numpy(), np.stack(wanted_latents))


def test_the_schema_on_disk_is_the_documented_one(folder: Path) -> None:
    entry = json.loads((folder / "index.json").read_text())["shards"][0]
    assert dict(zip(entry["column_names"], entry["column_encodings"], strict=True)) == {
        "id": "int64",
        "label": "int32",
        "latent": "ndarray:float16:2,4,4",
    }
    assert entry["hashes"] == ["blake2b"]
    described = json.loads((folder / "cfpretrain.json").read_text())
    assert described == {
        "schema_version": 1,
        "autoencoder": "identity",
        "latent_shape": [2, 4, 4],
        "latent_shift": [0.5, 0.25],
        "latent_scale": [2.0, 4.0],
        "class_names": ["cat", "dog", "owl"],
        "num_samples": 50,
        "source": "test",
    }


def test_samples_are_found_in_any_shard_and_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_SHARD_BYTES", 1000)
    write_shards(tmp_path / "many", INFO, samples())
    opened = Shards(tmp_path / "many")
    assert len(opened.shard_sizes) > 5
    assert len(opened) == opened.shard_sizes.sum() == 50
    places = np.random.default_rng(0).permutation(50)
    ids_B, latents_BCYX, _ = opened.read(places)
    wanted = list(samples())
    assert ids_B.tolist() == [wanted[p][0] for p in places]
    np.testing.assert_array_equal(latents_BCYX.numpy(), np.stack([wanted[p][1] for p in places]))


def test_fingerprint_is_of_the_content(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == fingerprint(folder)
    changed = ((i, latent + np.float16(1) if i == 3 else latent, label) for i, latent, label in samples())
    write_shards(tmp_path / "other", INFO, changed)
    assert fingerprint(tmp_path / "other") != fingerprint(folder)
    write_shards(tmp_path / "renamed", dataclasses.replace(INFO, class_names=("a", "b", "c")), samples())
    assert fingerprint(tmp_path / "renamed") != fingerprint(folder)


def test_a_complete_folder_of_the_same_info_is_kept(folder: Path) -> None:
    before = fingerprint(folder)

    def unread() -> Iterator[tuple[int, np.ndarray, int]]:
        pytest.fail("samples were read")
        yield

    assert write_shards(folder, INFO, unread()) is False
    assert fingerprint(folder) == before


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert write_shards(tmp_path / "empty", INFO, samples())
    assert len(Shards(tmp_path / "empty")) == 50
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


# ---------------------------------------------------------------------------------------------------------------------
# Writing that goes wrong


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ((1, np.zeros((2, 4, 5)), 0), ["sample 1", "(2, 4, 4)", "(2, 4, 5)"]),
        ((1, np.zeros((2, 4, 4)), 3), ["sample 1", "0 to 2", "got 3"]),
        ((1, np.zeros((2, 4, 4)), -1), ["sample 1", "0 to 2", "got -1"]),
        ((1, np.full((2, 4, 4), 1e5), 0), ["sample 1", "float16", "100000"]),
        ((1, np.full((2, 4, 4), np.nan), 0), ["sample 1", "float16", "nan"]),
        ((3, np.zeros((2, 4, 4)), 0), ["unique", "3 twice"]),
        (None, ["expected 50 samples", "got 49"]),
    ],
)
def test_bad_samples_are_refused_and_leave_nothing(tmp_path: Path, bad: tuple | None, words: list[str]) -> None:
    given = list(samples())[:49] + ([bad] if bad else [])
    with pytest.raises(UserError) as raised:
        write_shards(tmp_path / "out", INFO, given)
    assert all(word in str(raised.value) for word in words), raised.value
    assert list(tmp_path.iterdir()) == []


def test_no_samples_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected some samples, got 0"):
        write_shards(tmp_path / "out", dataclasses.replace(INFO, num_samples=0), [])


def test_a_killed_write_leaves_nothing_that_looks_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Small shards, so that files were written before the end; and a killed process cleans nothing up.
    monkeypatch.setattr(shards, "_SHARD_BYTES", 1000)
    monkeypatch.setattr(shards.shutil, "rmtree", lambda path: None)

    def interrupted() -> Iterator[tuple[int, np.ndarray, int]]:
        yield from list(samples())[:40]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "out", INFO, interrupted())
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.writing-")
    assert any(left.glob("*.mds"))
    with pytest.raises(UserError, match="has no"):
        read_info(left)
    assert write_shards(tmp_path / "out", INFO, samples())


def test_a_write_that_fails_at_its_last_act_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        assert read_info(source) == INFO
        raise OSError("no")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OSError, match="no"):
        write_shards(tmp_path / "out", INFO, samples())
    assert list(tmp_path.iterdir()) == []


def test_other_content_is_never_overwritten(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"other shards already \(different: class_names, source\)"):
        write_shards(folder, dataclasses.replace(INFO, class_names=("a", "b", "c"), source="else"), samples())
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("milk")
    with pytest.raises(UserError, match=r"notes.*holds no complete shards.*another folder"):
        write_shards(tmp_path / "notes", INFO, samples())
    with pytest.raises(UserError, match="is a file"):
        write_shards(tmp_path / "notes" / "todo.txt", INFO, samples())
    with pytest.raises(UserError, match="cannot be written"):
        write_shards(tmp_path / "notes" / "todo.txt" / "out", INFO, samples())
    (folder / "shard.00000.mds").write_bytes(b"")
    with pytest.raises(UserError, match="holds no complete shards"):
        write_shards(folder, INFO, samples())
    assert (tmp_path / "notes" / "todo.txt").read_text() == "milk"


# ---------------------------------------------------------------------------------------------------------------------
# Reading that goes wrong


def read_error(folder: Path | str, key: str = "data.shards") -> str:
    with pytest.raises(UserError) as raised:
        read_all(folder, key)
    message = str(raised.value)
    assert message.startswith(f"{key}: ")
    assert "\n" not in message
    assert str(folder) in message
    return message


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    message = read_error(tmp_path / "nowhere")
    assert "does not exist" in message
    assert "tools/make_shards.py" in message
    read_error(tmp_path / "nowhere", key="held-out")
    assert "address" in read_error("s3://bucket/shards")


def test_an_empty_folder(tmp_path: Path) -> None:
    message = read_error(tmp_path)
    assert "is empty" in message
    assert "tools/make_shards.py" in message


@pytest.mark.parametrize("name", ["cfpretrain.json", "index.json"])
def test_a_folder_that_is_not_ours(folder: Path, name: str) -> None:
    (folder / name).unlink()
    message = read_error(folder)
    assert f"has no {name}" in message
    assert "tools/make_shards.py" in message


@pytest.mark.parametrize(
    ("name", "old", "new", "word"),
    [
        ("cfpretrain.json", "{", "", "cannot be read"),
        ("cfpretrain.json", '"schema_version": 1', '"schema_version": 2', "expected schema_version 1, got 2"),
        ("cfpretrain.json", "latent_shift", "latent_offset", "latent_offset"),
        ("cfpretrain.json", '"num_samples": 50', '"num_samples": 51', "expected 51 samples"),
        ("index.json", "{", "", "cannot be read"),
        ("index.json", '"version": 2', '"version": 3', "cannot be read"),
    ],
)
def test_a_damaged_description(folder: Path, name: str, old: str, new: str, word: str) -> None:
    path = folder / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    message = read_error(folder)
    assert word in message
    assert "write the folder again" in message


def test_a_damaged_shard(folder: Path) -> None:
    path = folder / "shard.00000.mds"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path}: expected {size} bytes, got {size - 1}" in read_error(folder)
    path.unlink()
    assert f"{path}: expected {size} bytes, got 0" in read_error(folder)


def test_shards_that_fit_the_config_pass() -> None:
    check_info(INFO, CONFIG)
    one_value = dataclasses.replace(INFO, latent_shift=(0.5, 0.5))
    check_info(one_value, dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, latent_shift=(0.5,))))


MISFITS = [
    ("model", {"latent_size": 8}, "model.latent_size: expected 4", "got 8"),
    ("model", {"latent_channels": 3}, "model.latent_channels: expected 2", "got 3"),
    ("model", {"num_classes": 1000}, "model.num_classes: expected 3", "got 1000"),
    ("data", {"latent_shift": (0.5,)}, "data.latent_shift: expected [0.5, 0.25]", "got [0.5]"),
    ("data", {"latent_scale": (2.0, 0.2325)}, "data.latent_scale: expected [2.0, 4.0]", "got [2.0, 0.2325]"),
    ("data", {"num_canonical_nodes": 64}, "data.num_canonical_nodes: expected at most 50", "got 64"),
    ("train", {"global_batch_size": 64}, "train.global_batch_size: expected at most 50", "got 64"),
]


@pytest.mark.parametrize(("section", "values", "expected", "got"), MISFITS)
def test_shards_that_do_not_fit_are_named_by_their_key(section: str, values: dict, expected: str, got: str) -> None:
    changed = dataclasses.replace(getattr(CONFIG, section), **values)
    with pytest.raises(UserError) as raised:
        check_info(INFO, dataclasses.replace(CONFIG, **{section: changed}))
    message = str(raised.value)
    assert expected in message
    assert got in message
    assert CONFIG.data.shards in message
    assert "|" not in message


def test_all_misfits_come_at_once() -> None:
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, latent_size=8, num_classes=9),
        data=dataclasses.replace(CONFIG.data, latent_scale=(1.0,)),
    )
    with pytest.raises(UserError, match=r"model\.latent_size.*\| data\.latent_scale.*\| model\.num_classes"):
        check_info(INFO, config)
    with pytest.raises(UserError, match="rows as columns"):
        check_info(dataclasses.replace(INFO, latent_shape=(2, 4, 8)), CONFIG)


# ---------------------------------------------------------------------------------------------------------------------
# tools/make_shards.py


def load_tool() -> ModuleType:
    path = Path(__file__).parents[1] / "tools" / "make_shards.py"
    spec = importlib.util.spec_from_file_location("make_shards", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["make_shards.py", "--source", "digits", *map(str, arguments)])
    load_tool().main()


def test_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from sklearn.datasets import load_digits

    out, held_out = tmp_path / "digits", tmp_path / "held-out"
    run_tool(monkeypatch, "--out", out, "--held-out", held_out)
    printed = capsys.readouterr().out
    assert "1500 samples of 10 classes, 1 x 8 x 8" in printed
    assert "297 samples of 10 classes" in printed
    pixels, labels = load_digits(return_X_y=True)
    seen = []
    for folder in (out, held_out):
        ids_B, latents_BCYX, labels_B = read_all(folder)
        seen += ids_B.tolist()
        np.testing.assert_array_equal(labels_B, labels[ids_B])
        np.testing.assert_array_equal(latents_BCYX.reshape(-1, 64) * 16, pixels[ids_B])
        share = np.array([count for _, count in sorted(Counter(labels_B.tolist()).items())]) / np.bincount(labels)
        assert np.ptp(share) < 0.01
    assert sorted(seen) == list(range(1797))
    info = read_info(out)
    assert (info.latent_shift, info.latent_scale) == ((0.5,), (2.0,))

    before = fingerprint(out), fingerprint(held_out)
    run_tool(monkeypatch, "--out", out, "--held-out", held_out)
    assert capsys.readouterr().out.count("already there") == 2
    assert (fingerprint(out), fingerprint(held_out)) == before

    for arguments in (("--out", out, "--held-out", out), ("--out", held_out)):
        with pytest.raises(SystemExit) as ended:
            run_tool(monkeypatch, *arguments)
        assert ended.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
