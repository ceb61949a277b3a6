"""Seconds and memory of tools/export_hf.py for a model of random weights, beside those for a tiny one.

    python tools/measure_export.py --config configs/H.yaml model.depth=40

It writes a run folder of that model tensor by tensor, exports it in a process of its own, and asks the system for that
process's largest resident memory. The tiny model's is what Python and the libraries take by themselves. Both lie in
--folder, take five times the weights' size, and are deleted at the end.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cfpretrain.base import files
from cfpretrain.base.console import UserError, add_allow_env, ending_in_one_line, path_argument, phase, say

_GB = 1e9
_TINY = ["model.width=32", "model.depth=1", "model.num_heads=1", "model.num_classes=2", "model.num_cond_tokens=1"]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Measure the export of a model with random weights.")
    add_allow_env(parser)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="e.g. model.depth=40")
    parser.add_argument("--config", required=True, help="a YAML file, e.g. configs/H.yaml")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the files (default fp32)")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="GB of a file of weights (default 5)")
    parser.add_argument("--folder", type=path_argument, help="where to work (default: the system's temporary folder)")
    parser.add_argument("--export", type=path_argument, nargs=2, help=argparse.SUPPRESS)  # the process that is measured
    arguments = parser.parse_intermixed_args()
    with ending_in_one_line():
        if arguments.export:
            export(*arguments.export, arguments)
        else:
            print(json.dumps(measure(arguments)))


def export(run: Path, out: Path, arguments: argparse.Namespace) -> None:
    """Exports, and says what it took as one JSON line."""
    from cfpretrain.export.diffusers_layout import ExportSettings, export

    begin = time.monotonic()
    export(run, out, ExportSettings(dtype=arguments.dtype, max_shard_bytes=round(arguments.max_shard_gb * _GB)))
    seconds = time.monotonic() - begin
    status = Path("/proc/self/status").read_text()
    [peak_kb] = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    print(json.dumps({"seconds": seconds, "peak_rss_gb": int(peak_kb) * 1024 / _GB}))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both models, one after the other."""
    with phase("loading torch"):
        from cfpretrain.base import config as configs

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
    import torch

    from cfpretrain.export import imported_run

    generator = torch.Generator().manual_seed(0)
    shapes = imported_run.expected_shapes(config)

    def read_tensor(content: str, name: str) -> torch.Tensor:
        # The moments do not leave.
        return torch.randn(shapes[name], generator=generator) if content == "ema" else torch.zeros(shapes[name])

    files.make_folder(folder)
    with phase(f"writing a run of {sum(map(math.prod, shapes.values())) / 1e6:,.1f} M parameters"):
        imported_run.write_run(folder / "run", config, imported_run.Counters(1, 0), read_tensor, "random values")
    options = ["--config", arguments.config, "--dtype", arguments.dtype, "--max-shard-gb", str(arguments.max_shard_gb)]
    command = [sys.executable, __file__, "--export", str(folder / "run"), str(folder / "out"), *options]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if ended.returncode:
        raise UserError(f"the export ended with code {ended.returncode}; see above")
    weights = (folder / "out").glob("transformer/*.safetensors")
    return {
        "parameters": sum(map(math.prod, shapes.values())),
        "largest_tensor_gb": 4 * max(map(math.prod, shapes.values())) / _GB,
        "weights_gb": sum(file.stat().st_size for file in weights) / _GB,
        **json.loads(ended.stdout.splitlines()[-1]),
    }


if __name__ == "__main__":
    main()
