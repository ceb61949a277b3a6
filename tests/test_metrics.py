"""Metrics: FLOPs against published figures, the file across a resume."""

import errno
import json
import math
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from cfpretrain.autoencoder import KLAutoencoder, make_network, write_folder
from cfpretrain.base.config import Config, DataConfig, EngineConfig, ModelConfig
from cfpretrain.base.console import UserError
from cfpretrain.core import ar as order
from cfpretrain.core.modalities import class_segment, image_segment
from cfpretrain.core.segments import build_layout
from cfpretrain.core.work import count_work
from cfpretrain.run import metrics


@pytest.mark.parametrize(
    ("width", "depth", "heads", "tera"), [(1024, 24, 16, 0.96), (1280, 32, 20, 1.98), (1408, 48, 22, 3.58)]
)
def test_flops_of_an_image_as_published(width, depth, heads, tera) -> None:
    """At 256 px with the exact mask, in the mean over splits of decay 0.9."""
    model = ModelConfig(width=width, depth=depth, num_heads=heads)
    table = order.last_size_table(256, 0.9)
    keys = torch.arange(2000)
    steps = order.draw_shared_steps
    flops = 0.0
    for i in keys[:200].tolist():
        segments = [class_segment(64), image_segment(steps(torch.tensor(i * 7919 + 1), 1, 256, 0.9))]
        flops += metrics.training_flops(model, count_work(segments, build_layout(segments)))
    assert float(table.sum()) == pytest.approx(1)
    assert flops / 200 / 1e12 == pytest.approx(tera, rel=0.03)


# With attention where latents are, and between.
ATTENTIVE = {
    "block_out_channels": [16, 32, 48],
    "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "norm_num_groups": 8,
    "layers_per_block": 1,
}
IMAGE_SIZE, BATCH_SIZE = 64, 3


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("autoencoder") / "attentive"
    write_folder(folder, make_network(ATTENTIVE, "the test"))
    return folder


def encoding_config(autoencoder: Path | str, precision: str, channels: int = 4) -> Config:
    return Config(
        model=ModelConfig(latent_size=IMAGE_SIZE // 4, latent_channels=channels),
        data=DataConfig(autoencoder=str(autoencoder), encode_batch_size=BATCH_SIZE),
        engine=EngineConfig(precision=precision),
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_cost_of_encoding_is_that_of_real_encoding(autoencoder: Path, precision: str) -> None:
    """FLOPs are equal, memory is within 1 %: what operations allocate inside themselves counts on neither side."""
    cost = metrics.encoding_cost(encoding_config(autoencoder, precision), on_gpu=True)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    real = KLAutoencoder.load(autoencoder, "cpu", dtype)
    assert cost.weights == sum(parameter.nbytes for parameter in real.network.parameters())
    pixels_BYXC = torch.zeros(BATCH_SIZE, IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8)
    flops = 0

    def count_convolution(module: nn.Conv2d, _: object, result: torch.Tensor) -> None:
        nonlocal flops
        flops += 2 * result[0].numel() * module.weight[0].numel()

    def count_attention(module: nn.Module, given: tuple[torch.Tensor], _: object) -> None:
        """Queries, keys, values and the result: four square matrices; and two products of all pairs of places."""
        nonlocal flops
        _, width, height, columns = given[0].shape
        places = height * columns
        flops += 4 * 2 * places * width**2 + 2 * 2 * places**2 * width

    for module in real.network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count_convolution)
        if type(module).__name__ == "Attention":
            module.register_forward_hook(count_attention)
    with metrics.Account() as account:
        images_BCYX = pixels_BYXC.permute(0, 3, 1, 2).contiguous().float() / 255
        held = account.held
        real.encode(images_BCYX)
        weights = account.held - held
    assert cost.flops == flops
    assert cost.working == pytest.approx(account.peak - weights, rel=0.01)
    assert cost.num_bytes == cost.weights + cost.working


def test_a_cpu_encodes_in_fp32(autoencoder: Path) -> None:
    config = encoding_config(autoencoder, "bf16")
    on_cpu, on_gpu = (metrics.encoding_cost(config, on_gpu=on) for on in (False, True))
    assert on_cpu.flops == on_gpu.flops
    assert on_cpu.weights == 2 * on_gpu.weights
    assert on_cpu == metrics.encoding_cost(encoding_config(autoencoder, "fp32"), on_gpu=True)


def test_pixels_as_latents_cost_no_flops() -> None:
    """They are floats in several steps, beside the bytes that were decoded."""
    cost = metrics.encoding_cost(encoding_config("", "bf16", channels=3), on_gpu=True)
    assert (cost.flops, cost.weights) == (0, 0)
    assert cost.working == 17 * BATCH_SIZE * 3 * (IMAGE_SIZE // 4) ** 2


def test_an_autoencoder_for_other_images_has_no_cost(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.autoencoder: expected an autoencoder's folder"):
        metrics.encoding_cost(encoding_config(tmp_path, "bf16"), on_gpu=True)


def test_json_has_no_nan() -> None:
    assert [metrics.finite_or_none(value) for value in (1.5, math.nan, math.inf)] == [1.5, None, None]


def test_resume_drops_rows_of_lost_work(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = metrics.MetricsFile(path, resume_step=0)
    first.append([{"step": i, "loss": 1.0 / i} for i in (1, 2, 3)])
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    assert [row["step"] for row in metrics.read_metrics(path)] == [1, 2, 3]
    again = metrics.MetricsFile(path, resume_step=2)
    again.append([{"step": 3, "loss": 9.0}])
    assert metrics.read_metrics(path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 9.0}]


def test_a_score_joins_the_row_of_its_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = metrics.MetricsFile(path, resume_step=0)
    first.append([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}])
    first.append([{"step": 2, "fd": 3.0}])
    first.append([{"step": 3, "loss": 0.2}, {"step": 3, "fd": 2.0}])
    joined = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5, "fd": 3.0}]
    assert metrics.read_metrics(path) == [*joined, {"step": 3, "loss": 0.2, "fd": 2.0}]
    metrics.MetricsFile(path, resume_step=2)
    assert metrics.read_metrics(path) == joined


def test_a_fresh_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 5, "loss": 1.0}) + "\n")
    metrics.MetricsFile(path, resume_step=0)
    assert metrics.read_metrics(path) == []


@pytest.mark.parametrize("line", [b'{"st', b"\xff\xfe", b"3", b'{"loss": 1}', b'{"step": null}'])
def test_damage_in_the_middle_is_said_and_kept_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes
) -> None:
    path = tmp_path / "metrics.jsonl"
    damaged = b'{"step": 1}\n' + line + b'\n{"step": 3}\n'
    path.write_bytes(damaged)
    assert metrics.read_metrics(path) == [{"step": 1}, {"step": 3}]
    assert "metrics.jsonl: 1 damaged lines are left out" in capsys.readouterr().out
    metrics.MetricsFile(path, resume_step=3)
    assert metrics.read_metrics(path) == [{"step": 1}, {"step": 3}]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damaged


def steps_on_disk(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@contextmanager
def at_most_bytes(num_bytes: int) -> Iterator[None]:
    """No file of this process may become larger: a write goes as far as that and then fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_rows_that_cannot_be_written_wait_in_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    file = metrics.MetricsFile(path, resume_step=0)
    file.append([{"step": 1}])
    with at_most_bytes(40):
        for step in (2, 3, 4, 5):
            file.append([{"step": step, "loss": 0.5}])
            # A whole file at every moment: nothing of the row that did not fit.
            assert steps_on_disk(path) == [1, 2]
    said = capsys.readouterr().out
    assert said.count("WARNING: ") == 1
    assert f"{path} cannot be written now: File too large; its rows are kept in memory" in said
    file.append([{"step": 6}])
    assert steps_on_disk(path) == [1, 2, 3, 4, 5, 6]
    assert "can be written again: 3 rows that waited are on disk" in capsys.readouterr().out
    file.append([])
    assert steps_on_disk(path) == [1, 2, 3, 4, 5, 6]
    assert capsys.readouterr().out == ""


def test_a_copy_by_hard_links_keeps_what_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "metrics.jsonl"
    file = metrics.MetricsFile(path, resume_step=0)
    file.append([{"step": 1}])
    (tmp_path / "copy.jsonl").hardlink_to(path)
    for step in (2, 3):
        file.append([{"step": step}])
    assert steps_on_disk(path) == [1, 2, 3]
    assert steps_on_disk(tmp_path / "copy.jsonl") == [1]
    assert capsys.readouterr().out == ""


def test_a_call_without_rows_tries_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = metrics.MetricsFile(path, resume_step=0)
    with at_most_bytes(5):
        file.append([{"step": 1}])
    assert steps_on_disk(path) == []
    file.append([])
    assert steps_on_disk(path) == [1]


def test_what_could_not_be_taken_back_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails under the write, and again where half a row should be cut off."""
    path = tmp_path / "metrics.jsonl"
    file = metrics.MetricsFile(path, resume_step=0)
    file.append([{"step": 1}])

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(metrics.os, "fsync", fail)
    file.append([{"step": 2}])
    with path.open("ab") as half:
        half.write(b'{"step": 2, "lo')
    monkeypatch.undo()
    file.append([{"step": 3}])
    assert steps_on_disk(path) == [1, 2, 3]


def test_a_file_that_cannot_be_begun_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be written: No such file or directory; free some space"):
        metrics.MetricsFile(tmp_path / "gone" / "metrics.jsonl", resume_step=0)
