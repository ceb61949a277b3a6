"""Every kind of file that the tools read, changed at random: each is read, or refused in one line, soon and in little
memory."""

import copy
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cfpretrain.autoencoder import KLAutoencoder
from cfpretrain.base import config as configs
from cfpretrain.base.console import UserError
from cfpretrain.data.images import RejectedImageError, read_file, read_image
from cfpretrain.data.shards import Shards
from cfpretrain.evaluation.given_images import open_images, read_arrays
from cfpretrain.evaluation.source import load_source
from cfpretrain.export import foreign_files
from cfpretrain.export.diffusers_layout import ExportSettings, export
from cfpretrain.export.language_model import open_language_model
from cfpretrain.run import build
from cfpretrain.run.metrics import read_metrics
from tests.digits import write_digits
from tests.processes import REPOSITORY
from tests.runs import STEP, write_run, write_text_run

SECONDS, MEMORY = 10, 2 * 2**30
NUM_EXAMPLES = 3500
CPU = torch.device("cpu")


def make(folder: Path) -> None:
    """A file of each kind, where tools look for it."""
    run = write_run(folder / "run", write_digits(folder / "digits"))
    (run / build.METRICS_FILE).write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n')
    (run / build.SUMMARY_FILE).write_text('{"num_steps": 7, "train_seconds": 1.5}\n')
    export(run, folder / "export", ExportSettings(max_shard_bytes=100_000))
    export(write_text_run(folder / "text_run", folder / "digits"), folder / "text_export", ExportSettings())
    _write_autoencoder(folder / "vae")
    _write_language_model(folder / "llama")
    np.savez(folder / "images.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    np.savez_compressed(folder / "statistics.npz", mu=np.zeros(4), sigma=np.eye(4))
    torch.save({"model": {"a": torch.ones(2, 3), "b": torch.ones(1).bfloat16()}, "step": 3}, folder / "foreign.pt")
    (folder / "picture.png").write_bytes(_png())


def _write_autoencoder(folder: Path) -> None:
    from diffusers import AutoencoderKL

    network: Any = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8)
    network.save_pretrained(folder, safe_serialization=True)


def _write_language_model(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    config = LlamaConfig(vocab_size=9, **sizes, rope_scaling={"rope_type": "llama3", **scaling})
    LlamaForCausalLM(config).save_pretrained(folder)


def _png() -> bytes:
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(data, "PNG")
    return data.getvalue()


def read_run(folder: Path) -> None:
    load_source(folder / "run", CPU)
    load_source(folder / "run", CPU, step=STEP).label_of("3")


def read_shards(folder: Path) -> None:
    shards = Shards(folder / "digits")
    for i in range(0, len(shards), 10):
        shards.sample(i)


def read_export(folder: Path) -> None:
    load_source(folder / "export", CPU).label_of("3")


def read_texts(folder: Path) -> None:
    tokenizer = load_source(folder / "text_export", CPU).tokenizer
    assert tokenizer is not None
    with suppress(ValueError):  # some texts have no tokens there
        tokenizer.decode(tokenizer.encode("A seven, written by hand. \u00e9\ufdfa" * 4))


def read_language_model(folder: Path) -> None:
    model = open_language_model(folder / "llama", "MODEL")
    for name in model.shapes:
        model.read(name)
    build.checked(configs.load(REPOSITORY / "configs" / "tiny.yaml", model.overrides()))


CHECKPOINT = f"run/checkpoints/step_{STEP:08d}"
READERS: dict[str, Callable[[Path], Any]] = {
    "run/config.yaml": read_run,
    "run/checkpoints/latest": read_run,
    f"{CHECKPOINT}/state.json": read_run,
    f"{CHECKPOINT}/ranges.json": read_run,
    f"{CHECKPOINT}/ema.safetensors": read_run,
    "run/metrics.jsonl": lambda folder: read_metrics(folder / "run/metrics.jsonl"),
    "run/summary.json": lambda folder: build.read_summary(folder / "run"),
    "digits/cfpretrain.json": read_shards,
    "digits/index.json": read_shards,
    "digits/shard.00000.mds": read_shards,
    "export/model_index.json": read_export,
    "export/config.yaml": read_export,
    "export/transformer/config.json": read_export,
    "export/scheduler/scheduler_config.json": read_export,
    "export/transformer/diffusion_pytorch_model.safetensors.index.json": read_export,
    "export/transformer/diffusion_pytorch_model-00001-of-00002.safetensors": read_export,
    "text_export/tokenizer/tokenizer.json": read_texts,
    "vae/config.json": lambda folder: KLAutoencoder.load(folder / "vae", "cpu"),
    "vae/diffusion_pytorch_model.safetensors": lambda folder: KLAutoencoder.load(folder / "vae", "cpu"),
    "llama/config.json": read_language_model,
    "llama/model.safetensors": read_language_model,
    "images.npz": lambda folder: open_images(folder / "images.npz", "--images").read([0, 1]),
    "statistics.npz": lambda folder: read_arrays(folder / "statistics.npz", "--reference", ["mu", "sigma"]),
    "foreign.pt": lambda folder: foreign_files.read(folder / "foreign.pt", "FILE"),
    "picture.png": lambda folder: read_image(read_file(folder / "picture.png")),
}


# ---------------------------------------------------------------------------------------------------------------------
# Changes

STRANGE = st.sampled_from(
    [
        *(None, True, -1, 0, 1.5, 10**9, 10**12, 2**63, 10**400, float("inf"), float("nan"), "", "x", "9" * 30, "../x"),
        *([], {}, [[]], [1, "a"], {"a": {"b": [None]}}, "\x1b[2J\n# x", "\ud800"),
    ]
).map(copy.deepcopy)  # else one that was put into itself would be circular


def _deep(opening: str, closing: str) -> st.SearchStrategy[str]:
    return st.sampled_from([10, 100, 900, 100_000]).map(lambda n: opening * n + "1" + closing * n)


@st.composite
def changed_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Cut, overwritten, doubled, or with numbers set to large ones."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(changed) - 1)) | st.integers(0, min(200, max(0, len(changed) - 1))))
        kind = draw(st.sampled_from(["cut", "flip", "large", "insert", "swap"]))
        if kind == "cut":
            del changed[at:]
        elif kind == "flip" and changed:
            changed[at] ^= draw(st.integers(1, 255))
        elif kind == "large":
            changed[at : at + 4] = draw(st.sampled_from([b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\0"]))
        elif kind == "insert":
            changed[at:at] = draw(st.binary(min_size=1, max_size=9))
        else:
            changed[at : at + 1] = draw(
                st.sampled_from([b"9" * 20, b"-1", b"[", b"{", b'"', b"e999", b"null", b"true"])
            )
    return bytes(changed)


@st.composite
def changed_values(draw: st.DrawFn, plain: Any) -> Any:
    """The same tree with some leaf or branch swapped for another value, removed, or beside one that is new."""
    plain = json.loads(json.dumps(plain))
    for _ in range(draw(st.integers(1, 2))):
        at = plain
        while isinstance(at, dict | list) and at:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            key = draw(st.sampled_from(keys))
            if isinstance(at[key], dict | list) and at[key] and draw(st.integers(0, 4)):
                at = at[key]
                continue
            if draw(st.integers(0, 5)):
                at[key] = draw(STRANGE)
            else:
                del at[key]
            break
    return plain


def changes(name: str, data: bytes) -> st.SearchStrategy[bytes]:
    kinds = [changed_bytes(data), changed_bytes(data)]
    if name.endswith(".json"):
        values = changed_values(json.loads(data)).map(lambda plain: _signed(name, plain))
        kinds += [values, values, values, (_deep("[", "]") | _deep('{"a":', "}")).map(str.encode)]
    if name.endswith(".yaml"):
        import yaml

        values = changed_values(yaml.safe_load(data)).map(lambda plain: json.dumps(plain).encode())
        kinds += [values, values, values, (_deep("[", "]") | _deep("{a: ", "}") | _deep("- ", "")).map(str.encode)]
    if name.endswith(".safetensors"):
        size = int.from_bytes(data[:8], "little")
        header = changed_values(json.loads(data[8 : 8 + size])).map(lambda plain: json.dumps(plain).encode())
        kinds += [header.map(lambda text: len(text).to_bytes(8, "little") + text + data[8 + size :])]
    return st.one_of(kinds)


def _signed(name: str, plain: Any) -> bytes:
    """As a stranger would: the hash of a state is of what stands there."""
    import hashlib

    from cfpretrain.run.state import dump

    if name.endswith("state.json") and isinstance(plain, dict):
        plain.pop("sha256", None)
        with suppress(ValueError):
            plain["sha256"] = hashlib.sha256(dump(plain).encode()).hexdigest()
    return json.dumps(plain).encode()


# ---------------------------------------------------------------------------------------------------------------------
# The test


@contextmanager
def watched() -> Iterator[None]:
    """Ends what takes too long."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check(read: Callable[[Path], Any], folder: Path) -> None:
    said = ""
    with watched():
        try:
            read(folder)
        except (UserError, RejectedImageError) as error:
            said = str(error)
    assert "\n" not in said
    assert len(said) < 10_000


def plant(file: Path, what: str | bytes) -> None:
    """Puts something else than a file, or bytes, where a file is."""
    file.unlink() if not file.is_dir() or file.is_symlink() else file.rmdir()
    if isinstance(what, bytes):
        file.write_bytes(what)
    elif what == "pipe":
        os.mkfifo(file)
    elif what == "folder":
        file.mkdir()
    elif what == "hole":
        file.touch()
        os.truncate(file, 2**40)
    else:
        file.symlink_to(what)


PLANTED = st.sampled_from(["pipe", "folder", "hole", "/dev/zero", "/dev/stdin", "/nowhere", "latest", "/etc/passwd"])


def fuzz(folder: Path, num_examples: int) -> None:
    """Changes one file after another, in this process."""
    kept = {name: (folder / name).read_bytes() for name in READERS}

    @settings(
        max_examples=num_examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def one(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(list(READERS)))
        what = data.draw(changes(name, kept[name])) if data.draw(st.integers(0, 9)) else data.draw(PLANTED)
        plant(folder / name, what)
        try:
            check(READERS[name], folder)
        finally:
            plant(folder / name, kept[name])

    one()


@pytest.mark.slow
def test_whatever_a_file_holds_ends_well(tmp_path: Path) -> None:
    """In a process of its own, whose memory is bounded: what crashes the interpreter fails, too."""
    command = [sys.executable, "-m", "tests.test_fuzz", str(tmp_path / "made"), str(NUM_EXAMPLES)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def main() -> None:
    folder, num_examples = Path(sys.argv[1]), int(sys.argv[2])
    shutil.rmtree(folder, ignore_errors=True)
    make(folder)
    for name, read in READERS.items():  # what is loaded once, is loaded now
        read(folder)
        assert (folder / name).is_file()
    with open("/proc/self/statm") as statm:
        held = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    fuzz(folder, num_examples)


if __name__ == "__main__":
    main()
