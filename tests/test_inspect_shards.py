"""tools/inspect_shards.py: what it shows, and what its --verify finds."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cfpretrain.autoencoder import KLAutoencoder
from cfpretrain.base import config as configs
from cfpretrain.base import files
from cfpretrain.data.compatibility import check_infos
from cfpretrain.data.online import open_training_data
from cfpretrain.data.shards import read_info
from tests.digits import digits_info, write_digits, write_latents
from tests.image_files import encoded, write_images
from tests.image_files import write_digits as write_digit_images
from tests.processes import REPOSITORY
from tools import inspect_shards

REJECTED = '{"id": 9, "path": "a.png", "reason": "the file is empty"}'


def png(size: int) -> bytes:
    return encoded(np.random.default_rng(0).integers(256, size=(size, size, 3), dtype=np.uint8))


def rejecting(num: int, text: str) -> dict[str, Any]:
    """What describes image shards whose folder has this list of rejected images."""
    return {"num_rejected": num, "files": {"rejected.jsonl": text} if text else {}}


def inspect(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["inspect_shards.py", *map(str, arguments)])
    inspect_shards.main()


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        inspect(monkeypatch, *arguments)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_latents_are_described_drawn_and_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_digits(tmp_path / "digits", 100)
    inspect(monkeypatch, folder, "--grid", tmp_path / "pictures" / "grid.png", "--verify")
    shown = capsys.readouterr().out
    assert "samples: 100 in 1 shards" in shown
    assert "latents: 1 x 8 x 8 of 8 px, crop adm" in shown
    assert "scaling: (raw - 0.5) * 2" in shown
    said = "\n".join(line.strip() for line in shown.splitlines() if line.startswith(("  model: {", "  data: {")))
    (tmp_path / "mine.yaml").write_text(said)
    config = configs.load(tmp_path / "mine.yaml", ["train.global_batch_size=16"])
    check_infos([read_info(folder)], config)
    assert config.data.shards == (str(folder),)
    assert "verified: 1 files, 100 samples" in shown
    picture = Image.open(tmp_path / "pictures" / "grid.png")
    assert picture.width > 8 * 64
    assert len(np.unique(np.asarray(picture))) > 10


def test_the_config_names_the_autoencoder_that_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = REPOSITORY / "configs" / "autoencoders" / "digits"
    autoencoder = KLAutoencoder.load(folder, "cpu")
    info = dataclasses.replace(
        digits_info(20),
        autoencoder=autoencoder.fingerprint,
        latent_shape=(4, 4, 4),
        latent_shift=autoencoder.shift,
        latent_scale=autoencoder.scale,
        image_size=32,
    )
    latents = write_latents(tmp_path / "latents", info, [(i, i % 10, np.zeros((4, 4, 4))) for i in range(20)])
    inspect(monkeypatch, latents)
    assert '"autoencoder": "FOLDER"' in capsys.readouterr().out
    inspect(monkeypatch, latents, "--autoencoder", folder)
    shown = capsys.readouterr().out
    said = "\n".join(line.strip() for line in shown.splitlines() if line.startswith(("  model: {", "  data: {")))
    (tmp_path / "mine.yaml").write_text(said)
    overrides = ["train.global_batch_size=16", "data.mirror_prob=0", "model.patch_size=1"]
    assert configs.load(tmp_path / "mine.yaml", overrides).data.autoencoder == str(folder)
    other = write_latents(
        tmp_path / "other", dataclasses.replace(info, autoencoder="0" * 32), [(0, 0, np.zeros((4, 4, 4)))] * 20
    )
    message = refused(monkeypatch, capsys, other, "--autoencoder", folder)
    assert "--autoencoder: expected the autoencoder that made the latents, of fingerprint 000" in message
    digits = write_digits(tmp_path / "digits", 20)
    assert "expected none for shards of pixels" in refused(monkeypatch, capsys, digits, "--autoencoder", "x")


@pytest.mark.parametrize("folder", ["", str(REPOSITORY / "configs" / "autoencoders" / "digits")], ids=["pixels", "KL"])
def test_what_is_shown_of_images_trains_from_them(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_digit_images(tmp_path / "images", 0, 20, size=32)
    inspect(monkeypatch, images, *["--autoencoder", folder] * bool(folder), "--grid", tmp_path / "grid.png")
    shown = capsys.readouterr().out
    assert "to train from these images, without encode_latents.py, a config says" in shown
    said = "\n".join(line.strip() for line in shown.splitlines() if line.startswith(("  model: {", "  data: {")))
    (tmp_path / "mine.yaml").write_text(said)
    config = configs.load(tmp_path / "mine.yaml", ["train.global_batch_size=16"])
    assert config.data.autoencoder == folder
    check_infos(open_training_data(config).latents, config)


def test_what_images_lost_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"composited": 1, "enlarged": 1}
    write_images(tmp_path / "images", [[png(16)]], 16, background=(0, 0, 0), changes=changes)
    inspect(monkeypatch, tmp_path / "images")
    shown = capsys.readouterr().out
    assert "of these: 1 image with transparency is composited on black (--background)\n" in shown
    assert ": 1 image has a side of fewer than 16 pixels and is enlarged\n" in shown


def test_images_are_described_and_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(tmp_path / "images", [[png(16)] * 4], 16, **rejecting(2, f"{REJECTED}\n{REJECTED}\n"))
    inspect(monkeypatch, folder, "--verify", "--grid", tmp_path / "grid.png")
    shown = capsys.readouterr().out
    assert "images: lossless, 16 x 16 x 3" in shown
    assert "2 to 2 samples a class" in shown


def test_a_list_of_rejected_images_may_be_longer_than_any_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = REJECTED.replace("a.png", "a" * 2**20)
    folder = write_images(tmp_path / "images", [[png(16)] * 2], 16, **rejecting(65, f"{line}\n" * 65))
    assert (folder / "rejected.jsonl").stat().st_size > files.MAX_TEXT_BYTES
    inspect(monkeypatch, folder, "--verify")
    assert "verified" in capsys.readouterr().out


def test_what_is_wrong_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = write_images(tmp_path / "cut", [[png(16), png(16)[:-300]]], 16)
    assert "sample 3 does not decode" in refused(monkeypatch, capsys, cut, "--verify")
    small = write_images(tmp_path / "small", [[png(16), png(15)]], 16)
    assert "sample 3 is 15 x 15, not 16" in refused(monkeypatch, capsys, small, "--verify")
    twice = write_images(tmp_path / "twice", [[png(16)] * 3], 16, ids=[4, 5, 4])
    assert "id 4 comes twice" in refused(monkeypatch, capsys, twice, "--verify")
    wrong = write_latents(tmp_path / "nan", digits_info(1), [(0, 0, np.full((1, 8, 8), np.nan))])
    assert "sample 0 is not finite" in refused(monkeypatch, capsys, wrong, "--verify")
    for name, content, problem in (
        ("none", "", "but it cannot be read"),
        ("one", REJECTED, "got 1"),
        ("half", f"{REJECTED}\n{REJECTED[:20]}", "but it cannot be read"),
        *(
            (f"text{i}", f"{REJECTED}\n{line}", "but it cannot be read")
            for i, line in enumerate(("{", "5", "null", "[]", '{"id": 1}', '"reason"', '{"id": 1e400, "path": 1}'))
        ),
    ):
        folder = write_images(tmp_path / name, [[png(16)]], 16, **rejecting(2, content))
        message = refused(monkeypatch, capsys, folder, "--verify")
        assert f"{name}/rejected.jsonl: expected 2 images, as the description says, {problem}" in message
    flipped = write_digits(tmp_path / "flipped", 20)
    file = flipped / "shard.00000.mds"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "shard.00000.mds: expected the blake2b hash" in refused(monkeypatch, capsys, flipped, "--verify")
    assert "does not exist" in refused(monkeypatch, capsys, tmp_path / "nowhere")
