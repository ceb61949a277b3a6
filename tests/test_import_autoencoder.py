"""Published autoencoders become diffusers' networks exactly, and nothing in a foreign file is run."""

import itertools
import json
import os
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from cfpretrain.autoencoder import CONFIG_FILE, WEIGHTS_FILE, KLAutoencoder, fill_network
from cfpretrain.base.console import UserError
from cfpretrain.export.autoencoder import from_ldm, recognise
from tests.closeness import disagreement
from tests.disks import mounted_disk
from tests.processes import REPOSITORY
from tools import import_autoencoder

Shapes = dict[str, Sequence[int]]

# ---------------------------------------------------------------------------------------------------------------------
# Layouts


def mar_shapes() -> Shapes:
    """The published names and shapes of MAR's KL-16."""
    shapes: Shapes = json.loads((REPOSITORY / "tests/golden/mar_kl16_vae_tensors.json").read_text())["tensors"]
    return shapes


class Layout:
    """Names and shapes in Latent Diffusion's layout."""

    def __init__(self) -> None:
        self.shapes: Shapes = {}

    def norm(self, name: str, num: int) -> None:
        self.shapes |= {f"{name}.weight": [num], f"{name}.bias": [num]}

    def conv(self, name: str, num_in: int, num_out: int, size: int = 3) -> None:
        self.shapes |= {f"{name}.weight": [num_out, num_in, size, size], f"{name}.bias": [num_out]}

    def block(self, name: str, num_in: int, num_out: int) -> None:
        self.norm(f"{name}.norm1", num_in)
        self.conv(f"{name}.conv1", num_in, num_out)
        self.norm(f"{name}.norm2", num_out)
        self.conv(f"{name}.conv2", num_out, num_out)
        if num_in != num_out:
            self.conv(f"{name}.nin_shortcut", num_in, num_out, 1)

    def attend(self, name: str, num: int) -> None:
        self.norm(f"{name}.norm", num)
        for part in ("q", "k", "v", "proj_out"):
            self.conv(f"{name}.{part}", num, num, 1)

    def level(self, name: str, num_in: int, num_out: int, num_blocks: int, attention: bool) -> None:
        for i in range(num_blocks):
            self.block(f"{name}.block.{i}", num_out if i else num_in, num_out)
            if attention:
                self.attend(f"{name}.attn.{i}", num_out)

    def middle(self, side: str, num: int) -> None:
        self.block(f"{side}.mid.block_1", num, num)
        self.attend(f"{side}.mid.attn_1", num)
        self.block(f"{side}.mid.block_2", num, num)


def ldm_shapes(channels: Sequence[int], layers: int, latents: int, attention: Sequence[int] = ()) -> Shapes:
    """An autoencoder in Latent Diffusion's layout; `attention`: levels whose blocks have it."""
    layout, last = Layout(), len(channels) - 1
    layout.conv("encoder.conv_in", 3, channels[0])
    for i, num in enumerate(channels):
        layout.level(f"encoder.down.{i}", channels[max(i - 1, 0)], num, layers, i in attention)
        if i < last:
            layout.conv(f"encoder.down.{i}.downsample.conv", num, num)
    for side in ("encoder", "decoder"):
        layout.middle(side, channels[last])
    layout.norm("encoder.norm_out", channels[last])
    layout.conv("encoder.conv_out", channels[last], 2 * latents)
    layout.conv("quant_conv", 2 * latents, 2 * latents, 1)
    layout.conv("post_quant_conv", latents, latents, 1)
    layout.conv("decoder.conv_in", latents, channels[last])
    for i, num in enumerate(channels):
        layout.level(f"decoder.up.{i}", channels[min(i + 1, last)], num, layers + 1, i in attention)
        if i:
            layout.conv(f"decoder.up.{i}.upsample.conv", num, num)
    layout.norm("decoder.norm_out", channels[0])
    layout.conv("decoder.conv_out", channels[0], 3)
    return layout.shapes


SD_F8 = ldm_shapes((128, 256, 512, 512), 2, 4)
SMALL = ldm_shapes((32, 64, 64), 1, 4)
SMALL_AS_FLUX = {name: shape for name, shape in SMALL.items() if "quant_conv" not in name}
SMALL_ATTENTION = ldm_shapes((32, 64, 64), 2, 3, attention=(1, 2))


def random_tensors(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Weights that keep activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(*shape, generator=generator)
        if len(shape) > 1:
            tensors[name] = values / values[0].numel() ** 0.5
        else:
            tensors[name] = 0.1 * values + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return tensors


# ---------------------------------------------------------------------------------------------------------------------
# The network that Latent Diffusion describes, built from its tensors by torch's functions alone


class Oracle:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.num_levels = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.down."))

    def conv(self, x: Tensor, name: str, **how: int) -> Tensor:
        return F.conv2d(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], **how)

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.group_norm(x, 32, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], eps=1e-6)

    def block(self, x: Tensor, name: str) -> Tensor:
        h = x
        for i in (1, 2):
            h = self.norm(h, f"{name}.norm{i}")
            h = self.conv(h * torch.sigmoid(h), f"{name}.conv{i}", padding=1)
        return (self.conv(x, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in self.tensors else x) + h

    def attend(self, x: Tensor, name: str) -> Tensor:
        h = self.norm(x, f"{name}.norm")
        q, k, v = (self.conv(h, f"{name}.{part}").flatten(2) for part in "qkv")  # [B, C, places]
        weights = torch.softmax(q.transpose(1, 2) @ k / q.shape[1] ** 0.5, dim=-1)
        return x + self.conv((v @ weights.transpose(1, 2)).reshape(x.shape), f"{name}.proj_out")

    def level(self, x: Tensor, name: str) -> Tensor:
        for i in itertools.count():
            if f"{name}.block.{i}.conv1.weight" not in self.tensors:
                return x
            x = self.block(x, f"{name}.block.{i}")
            if f"{name}.attn.{i}.q.weight" in self.tensors:
                x = self.attend(x, f"{name}.attn.{i}")
        raise AssertionError

    def middle(self, x: Tensor, side: str) -> Tensor:
        return self.block(
            self.attend(self.block(x, f"{side}.mid.block_1"), f"{side}.mid.attn_1"), f"{side}.mid.block_2"
        )

    def end(self, x: Tensor, side: str) -> Tensor:
        x = self.norm(x, f"{side}.norm_out")
        return self.conv(x * torch.sigmoid(x), f"{side}.conv_out", padding=1)

    def quantised(self, x: Tensor, name: str) -> Tensor:
        return self.conv(x, name) if f"{name}.weight" in self.tensors else x

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.conv(x, "encoder.conv_in", padding=1)
        for level in range(self.num_levels):
            x = self.level(x, f"encoder.down.{level}")
            if level < self.num_levels - 1:
                x = self.conv(F.pad(x, (0, 1, 0, 1)), f"encoder.down.{level}.downsample.conv", stride=2)
        moments = self.quantised(self.end(self.middle(x, "encoder"), "encoder"), "quant_conv")
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        x = self.conv(self.quantised(z, "post_quant_conv"), "decoder.conv_in", padding=1)
        x = self.middle(x, "decoder")
        for level in reversed(range(self.num_levels)):
            x = self.level(x, f"decoder.up.{level}")
            if level:
                x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                x = self.conv(x, f"decoder.up.{level}.upsample.conv", padding=1)
        return self.end(x, "decoder")


@pytest.mark.parametrize(
    ("shapes", "size"),
    [
        pytest.param(mar_shapes(), 32, id="MAR KL-16"),
        pytest.param(SMALL, 24, id="small, as SD"),
        pytest.param(SMALL_AS_FLUX, 24, id="small, as FLUX"),
        pytest.param(SMALL_ATTENTION, 16, id="attention in levels"),
    ],
)
def test_the_converted_network_is_the_one_that_the_tensors_describe(shapes, size) -> None:
    tensors = random_tensors(shapes)
    config, state = from_ldm(tensors, "test")
    assert len(state) == len(tensors)
    ours, theirs = (
        KLAutoencoder(fill_network(config | {"scaling_factor": 0.5}, state, "test"), "", "test"),
        Oracle(tensors),
    )
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    mean, log_variance = ours.encode(images)
    for got, expected in zip((mean, log_variance), theirs.encode(images * 2 - 1), strict=True):
        assert disagreement(got, expected) < 1e-4
    assert disagreement(ours.decode(mean * 0.5), theirs.decode(mean) / 2 + 0.5) < 1e-4


def test_the_published_layout_of_mar_has_its_place() -> None:
    """As the reference says: 312 tensors, 66,456,019 parameters, attention in the last encoder block alone."""
    tensors = {name: torch.empty(*shape, device="meta") for name, shape in mar_shapes().items()}
    config, state = from_ldm(tensors, "test")
    network = fill_network(config, state, "test")
    assert len(network.state_dict()) == len(tensors) == 312
    assert sum(value.numel() for value in network.state_dict().values()) == 66_456_019
    assert config["down_block_types"] == (*["DownEncoderBlock2D"] * 4, "AttnDownEncoderBlock2D")
    assert config["up_block_types"] == ("UpDecoderBlock2D",) * 5
    assert recognise(config) == ("MAR's KL-16", 0.2325)


def test_stable_diffusion_s_layout_has_its_place() -> None:
    """248 tensors and 83,653,863 parameters, as published."""
    config, state = from_ldm({name: torch.empty(*shape, device="meta") for name, shape in SD_F8.items()}, "test")
    network = fill_network(config, state, "test")
    assert len(network.state_dict()) == 248
    assert sum(value.numel() for value in network.state_dict().values()) == 83_653_863
    assert recognise(config) == ("Stable Diffusion's f8", 0.18215)


def test_other_layouts_are_not_taken_for_published_ones() -> None:
    unquantised = {name: shape for name, shape in SD_F8.items() if "quant_conv" not in name}
    wide, deep = ldm_shapes((128, 256, 512, 512), 2, 16), ldm_shapes((128, 128, 256, 256, 512), 2, 16)
    for shapes in (SMALL, unquantised, wide, deep):
        tensors = {name: torch.empty(*shape, device="meta") for name, shape in shapes.items()}
        assert recognise(from_ldm(tensors, "test")[0]) is None


def test_tensors_that_have_no_place_are_named() -> None:
    tensors = random_tensors(SMALL)
    for changed, named in (
        (tensors | {"encoder.mid.attn_2.q.bias": torch.zeros(64)}, "unknown: encoder.mid.attn_2.q.bias"),
        ({n: v for n, v in tensors.items() if n != "decoder.norm_out.bias"}, "missing: decoder.conv_norm_out.bias"),
        (tensors | {"quant_conv.bias": torch.zeros(9)}, "of another shape: quant_conv.bias"),
    ):
        config, state = from_ldm(changed, "a.ckpt")
        with pytest.raises(UserError, match=f"a.ckpt: expected the .* tensors .*{named}"):
            fill_network(config, state, "a.ckpt")
    twice = tensors | {"encoder.mid_block.resnets.0.conv1.bias": tensors["encoder.mid.block_1.conv1.bias"]}
    with pytest.raises(UserError, match=r"a\.ckpt: .*twice"):
        from_ldm(twice, "a.ckpt")


# ---------------------------------------------------------------------------------------------------------------------
# The command


def convert(file: Path, out: Path, *factors: float | None) -> KLAutoencoder:
    import_autoencoder.run(file, out, *(factors or (None,)))
    return KLAutoencoder.load(out, "cpu")


@pytest.mark.parametrize("wrap", ["state_dict", "model", None])
def test_checkpoints_with_their_other_contents(tmp_path, wrap) -> None:
    """A whole checkpoint: other networks, a discriminator, averages and counters are left out; bits are kept."""
    tensors = {name: value.half() for name, value in random_tensors(SMALL).items()}
    prefix = "first_stage_model." if wrap == "state_dict" else ""
    content = {prefix + name: value for name, value in tensors.items()} | {
        f"{prefix}loss.discriminator.main.0.weight": torch.zeros(3),
        "model_ema.decay": torch.tensor(0.9),
    }
    if prefix:
        content |= {"model.diffusion_model.out.2.bias": torch.zeros(4), "betas": torch.zeros(1000)}
    file = tmp_path / "model.ckpt"
    torch.save({wrap: content, "global_step": 7} if wrap else content, file)
    made = convert(file, tmp_path / "out", 0.5)
    assert made.scale == (0.5,) * 4
    assert made.shift == (0.0,) * 4
    stored = load_file(tmp_path / "out" / WEIGHTS_FILE)
    assert {value.dtype for value in stored.values()} == {torch.float16}
    expected = from_ldm(tensors, "test")[1]
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], expected[name]) for name in stored)
    assert sorted(os.listdir(tmp_path)) == ["model.ckpt", "out"]


def test_safetensors_and_pickle_give_the_same_folder(tmp_path, capsys) -> None:
    tensors = random_tensors(SMALL)
    torch.save(tensors, tmp_path / "a.pt")
    save_file(tensors, tmp_path / "a.safetensors")
    made = [convert(tmp_path / f"a{suffix}", tmp_path / suffix, 0.5) for suffix in (".pt", ".safetensors")]
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / ".pt" / name).read_bytes() == (tmp_path / ".safetensors" / name).read_bytes()
    assert made[0].fingerprint == made[1].fingerprint
    assert f"fingerprint {made[0].fingerprint}" in capsys.readouterr().out


def test_values_that_are_no_numbers_are_refused(tmp_path) -> None:
    tensors = random_tensors(SMALL)
    tensors["encoder.mid.block_1.conv1.bias"][:3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    save_file(tensors, tmp_path / "a.safetensors")
    message = (
        r"FILE: .*a\.safetensors: encoder\.mid.*conv1\.bias: expected finite numbers, got NaN .* in 3 of 64 values"
    )
    with pytest.raises(UserError, match=message):
        import_autoencoder.run(tmp_path / "a.safetensors", tmp_path / "out", 0.5)
    assert not (tmp_path / "out").exists()


def test_the_same_command_again_leaves_what_is_there(tmp_path, capsys) -> None:
    file, out = tmp_path / "a.safetensors", tmp_path / "out"
    save_file(random_tensors(SMALL), file)
    made = convert(file, out, 0.5, 0.25)
    assert (made.scale, made.shift) == ((0.5,) * 4, (0.25,) * 4)
    written = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    first = capsys.readouterr().out
    assert "in a config: data.latent_shift=[0.25] data.latent_scale=[0.5]" in first
    convert(file, out, 0.5, 0.25)
    assert capsys.readouterr().out.splitlines()[-3:] == first.replace("out: ", "out: already there: ").splitlines()[-3:]
    save_file(random_tensors(SMALL, seed=1), tmp_path / "b.safetensors")
    for source, *factors in ((file, 0.25, 0.25), (file, 0.5, None), (tmp_path / "b.safetensors", 0.5, 0.25)):
        with pytest.raises(
            UserError, match=r"OUT: expected a path where nothing is yet, got .*out; remove it or give another"
        ):
            import_autoencoder.run(source, out, *factors)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()} == written


def test_the_scaling_factor_of_an_unknown_layout_must_be_given(tmp_path) -> None:
    save_file(random_tensors(SMALL), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="--scaling-factor: expected"):
        import_autoencoder.run(tmp_path / "a.safetensors", tmp_path / "out", None)
    with pytest.raises(UserError, match="--scaling-factor: expected a number above 0"):
        import_autoencoder.run(tmp_path / "a.safetensors", tmp_path / "out", -1.0)
    with pytest.raises(UserError, match="--shift-factor: expected a number"):
        import_autoencoder.run(tmp_path / "a.safetensors", tmp_path / "out", 1.0, float("nan"))
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_pickle_in_diffusers_layout_is_converted_with_the_config_beside_it(tmp_path) -> None:
    """As older releases have it: the attention's matrices under other names."""
    save_file(random_tensors(SMALL), tmp_path / "a.safetensors")
    expected = convert(tmp_path / "a.safetensors", tmp_path / "new", 0.5)
    old = tmp_path / "old"
    old.mkdir()
    (old / CONFIG_FILE).write_text((tmp_path / "new" / CONFIG_FILE).read_text())
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    content = {}
    for name, value in load_file(tmp_path / "new" / WEIGHTS_FILE).items():
        for new, before in names.items():
            name = name.replace(new, before)
        content[name] = value
    assert "encoder.mid_block.attentions.0.query.weight" in content
    torch.save(content, old / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match=r"only diffusion_pytorch_model\.bin, a pickle.*tools/import_autoencoder\.py"):
        KLAutoencoder.load(old, "cpu")
    made = convert(old / "diffusion_pytorch_model.bin", tmp_path / "again")
    assert (made.fingerprint, made.scale) == (expected.fingerprint, (0.5,) * 4)


class Malicious:
    """What a hostile checkpoint would hold: unpickled, it touches a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("zip", r"expected nothing but tensors, numbers and texts in \S*evil\.ckpt, got \S*mkdir"),
        ("plain", r"expected nothing but tensors, numbers and texts in \S*evil\.ckpt, got \S*mkdir"),
        ("newer protocol", r"evil\.ckpt is no file of tensors"),
    ],
)
def test_a_pickle_of_more_than_tensors_is_refused_unread(tmp_path, form, message) -> None:
    file, trace = tmp_path / "evil.ckpt", tmp_path / "trace"
    content = {"state_dict": random_tensors(SMALL), "callbacks": Malicious(trace)}
    if form == "zip":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps({"callbacks": Malicious(trace)}, protocol=2 if form == "plain" else 4))
    with pytest.raises(UserError, match=message):
        import_autoencoder.run(file, tmp_path / "out", 0.5)
    assert os.listdir(tmp_path) == ["evil.ckpt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.ckpt", b"not a checkpoint", "is no file of tensors"),
        ("a.safetensors", b"not a checkpoint", "is no file of tensors"),
        ("a.txt", b"", "is no file of tensors"),
        ("a.ckpt", None, "expected a file of tensors .* which is not there"),
        ("a.pt", [1, 2], "expected tensors by name"),
        ("a.pt", {"head.weight": torch.zeros(2)}, "in Latent Diffusion's layout.*1 tensors"),
        ("a.pt", {}, "in Latent Diffusion's layout.*0 tensors"),
        ("a.pt", {3: torch.zeros(2)}, "in Latent Diffusion's layout.*0 tensors"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, name, content, message) -> None:
    file = tmp_path / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(UserError, match=message) as error:
        import_autoencoder.run(file, tmp_path / "out", 0.5)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_existing_target_is_left_alone(tmp_path, monkeypatch, capsys) -> None:
    save_file(random_tensors(SMALL), tmp_path / "a.safetensors")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    command = ["import_autoencoder.py", str(tmp_path / "a.safetensors"), str(tmp_path / "out"), "--scaling-factor", "1"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        import_autoencoder.main()
    assert ended.value.code == 2
    assert "expected a path where nothing is yet" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine").read_text() == "mine"


def test_a_full_disk_is_one_line(tmp_path) -> None:
    save_file(random_tensors(SMALL), tmp_path / "a.safetensors")
    with mounted_disk(tmp_path / "disk", "64k") as disk:
        with pytest.raises(UserError, match=r"^OUT: \S*out cannot be written \(.*No space left on device"):
            import_autoencoder.run(tmp_path / "a.safetensors", disk / "out", 0.5)
        assert os.listdir(disk) == []


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch) -> None:
    save_file(random_tensors(SMALL), tmp_path / "a.safetensors")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        import_autoencoder.run(tmp_path / "a.safetensors", tmp_path / "out", 0.5)
    assert os.listdir(tmp_path) == ["a.safetensors"]
