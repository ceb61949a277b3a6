"""Turns a checkpoint in DeepSpeed's own format into a run folder, which trains on and is sampled from.

    python tools/import_deepspeed.py checkpoints/ runs/XL --config configs/XL.yaml
    deepspeed cfpretrain/train.py --config runs/XL/config.yaml

It takes what `save_checkpoint` of DeepSpeed wrote of this model at ZeRO stage 1, 2 or 3 on any number of ranks, under
our names of the parameters or the official ones: fp32 weights and Adam's moments, bit for bit, and the step. An EMA is
not in there, so the averages begin as the weights; nor is the place in the data, so an epoch begins.

Such files are pickles, and a pickle can run code when it is read. Here they are read by torch's restricted reader,
which makes data only: nothing in a file is run, not even DeepSpeed's code, and a file that asks for more is refused.
"""

from pathlib import Path

from cfpretrain.base.command_line import Parser, add_config
from cfpretrain.base.console import ending_in_one_line, path_argument, phase


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    parser.add_argument(
        "folder", type=path_argument, help="what save_checkpoint wrote: the folder with `latest`, or one step's"
    )
    parser.add_argument("run", type=path_argument, help="run folder to write; it must not be there yet")
    add_config(parser, "configs/XL.yaml")
    arguments = parser.parse_intermixed_args()
    with ending_in_one_line():
        run(arguments.folder, arguments.run, arguments.config, arguments.overrides, arguments.allow_env)


def run(source: Path, folder: Path, paths: list[str], overrides: list[str], allow_env: bool = False) -> None:
    """Reads, checks and writes."""
    with phase("loading torch"):
        from cfpretrain.export.deepspeed_checkpoint import read_deepspeed
        from cfpretrain.export.imported_run import import_run
    import_run(folder, paths, overrides, allow_env, lambda config: read_deepspeed(source, config), source)


if __name__ == "__main__":
    main()
