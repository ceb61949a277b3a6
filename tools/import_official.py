"""Turns a checkpoint of the official CausalFusion code into a run folder, which trains on and is sampled from.

    python tools/import_official.py causalfusion_xl.pt runs/XL --config configs/XL.yaml
    deepspeed cfpretrain/train.py --config runs/XL/config.yaml

It takes the official .pt (keys `model` and `ema`, or one of them), and a bare state dict, .pt or .safetensors, under
the official names or ours. The values are kept bit for bit. Sizes come from the tensors and must be the config's. No
state of an optimizer is taken over: Adam's moments begin at 0, and an epoch begins. Nothing in a file is run: one that
holds more than tensors, numbers and texts is refused.
"""

from pathlib import Path

from cfpretrain.base.command_line import Parser, add_config, check_range
from cfpretrain.base.console import ending_in_one_line, path_argument, phase

_MOST_STEPS = 10**12


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    parser.add_argument(
        "file", type=path_argument, help="the official .pt, or a bare state dict as .pt or .safetensors"
    )
    parser.add_argument("run", type=path_argument, help="run folder to write; it must not be there yet")
    add_config(parser, "configs/XL.yaml")
    parser.add_argument(
        "--step",
        type=int,
        default=0,
        help="steps it was trained for (default 0: warm-up and step count start from zero)",
    )
    arguments = parser.parse_intermixed_args()
    with ending_in_one_line():
        run(arguments.file, arguments.run, arguments.config, arguments.overrides, arguments.step, arguments.allow_env)


def run(
    file: Path, folder: Path, paths: list[str], overrides: list[str], step: int = 0, allow_env: bool = False
) -> None:
    """Reads, checks and writes."""
    check_range("--step", step, 0, _MOST_STEPS)
    with phase("loading torch"):
        from cfpretrain.export.imported_run import import_run
        from cfpretrain.export.official import read_official
    import_run(folder, paths, overrides, allow_env, lambda config: read_official(file, config, step), file)


if __name__ == "__main__":
    main()
