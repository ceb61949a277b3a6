"""Says seconds and memory of tools/export_hf.py for a model of random weights, beside those for a tiny one.

    python tools/measure.py export --config configs/H.yaml model.depth=40

It writes a run folder of that model tensor by tensor, exports it in a process of its own, and asks the system for that
process's largest resident memory. The tiny model's is what Python and the libraries take by themselves. Both lie in
--folder, take five times the weights' size, and are deleted at the end.
"""

import argparse
import json
import math
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from cfpretrain.base import config as configs
from cfpretrain.base import files
from cfpretrain.base.console import UserError, phase, say
from cfpretrain.export import imported_run
from cfpretrain.export.diffusers_layout import ExportSettings, export
from tools.measuring import tool
from tools.measuring.common import resident_bytes

_GB = 1e9
_TINY = ["model.width=32", "model.depth=1", "model.num_heads=1", "model.num_classes=2", "model.num_cond_tokens=1"]


def _export(run: Path, out: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Exports, and says what it took."""
    begin = time.monotonic()
    export(run, out, ExportSettings(dtype=arguments.dtype, max_shard_bytes=round(arguments.max_shard_gb * _GB)))
    seconds = time.monotonic() - begin
    return {"seconds": seconds, "peak_rss_gb": resident_bytes("VmHWM") / _GB}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both models, one after the other."""
    if arguments.export:
        return _export(*arguments.export, arguments)
    # No data is at hand, and an autoencoder is no part of what is measured.
    beside = ["data.shards=none", "data.autoencoder=''"]
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for name, overrides in (("tiny", _TINY), ("model", [])):
            config = configs.load(arguments.config, [*arguments.overrides, *overrides, *beside], arguments.allow_env)
            figures[name] = _measure_one(config, Path(folder) / name, arguments)
            say(f"{name}: {figures[name]}")
    return figures


def _measure_one(config: Any, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = imported_run.expected_shapes(config)

    def read_tensor(content: str, name: str) -> torch.Tensor:
        # The moments do not leave.
        return torch.randn(shapes[name], generator=generator) if content == "ema" else torch.zeros(shapes[name])

    files.make_folder(folder)
    with phase(f"writing a run of {sum(map(math.prod, shapes.values())) / 1e6:,.1f} M parameters"):
        made = imported_run.ForeignCheckpoint("random values", imported_run.Counters(1, 0), read_tensor)
        imported_run.write_run(folder / "run", config, made)
    options = ["--dtype", arguments.dtype, "--max-shard-gb", arguments.max_shard_gb, "--config", arguments.config[0]]
    command = tool("export", "--export", folder / "run", folder / "out", *options)
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if ended.returncode:
        raise UserError(f"the export ended with code {ended.returncode}; see above")
    taken = json.loads(ended.stdout.splitlines()[-1])
    weights = (folder / "out").glob("transformer/*.safetensors")
    return {
        "parameters": sum(map(math.prod, shapes.values())),
        "largest_tensor_gb": 4 * max(map(math.prod, shapes.values())) / _GB,
        "weights_gb": sum(file.stat().st_size for file in weights) / _GB,
        **{name: taken[name] for name in ("seconds", "peak_rss_gb")},
    }
