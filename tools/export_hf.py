"""Makes a folder of a run that people load with Hugging Face's diffusers, without cfpretrain.

    python tools/export_hf.py runs/demo exports/demo
    python -c "from diffusers import DiffusionPipeline; \
        DiffusionPipeline.from_pretrained('exports/demo', trust_remote_code=True)(3).images[0].show()"

    python tools/export_hf.py runs/demo demo.pt --format official
    python tools/export_hf.py runs/from-qwen3 exports/qwen3 --format transformers

It takes runs of any ranks and ZeRO stage, copies tensor by tensor, so that memory does not grow with the model, and
gives the folder its name once it is complete. --push sends it to a private repository of the hub; nothing else does.
The official code's .pt has weights and averages of the latest checkpoint, and is made in memory. For transformers it is
the text side of a run with the trunk of a language model, which `AutoModelForCausalLM.from_pretrained` loads.
"""

import argparse
import re

from cfpretrain.base.command_line import Parser
from cfpretrain.base.console import UserError, ending_in_one_line, path_argument, phase, say
from cfpretrain.evaluation.sampling_options import step_or_best

_GB = 10**9
_MOST_GB = 10**6
_OF_FILES = {".pt", ".pth", ".ckpt", ".safetensors"}
_OF_DIFFUSERS = ("weights", "step", "dtype", "max_shard_gb", "license", "push")
_OF_CARDS = ("license", "push")  # which transformers' folders do not have


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", type=path_argument, help="a run folder, e.g. runs/demo")
    add("out", type=path_argument, help="folder (or .pt) to write; it must not be there yet")
    format_help = (
        "official: a checkpoint of the official CausalFusion code, without further options; transformers: the language "
        "model in it (default diffusers)"
    )
    add("--format", choices=("diffusers", "official", "transformers"), default="diffusers", help=format_help)
    add("--weights", choices=("ema", "raw"), default="ema", help="averaged, or as trained (default ema)")
    add("--step", type=step_or_best, help="of the checkpoint, or best: by its scores (default: the latest)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the files (default fp32)")
    add("--max-shard-gb", type=float, default=5.0, help="GB of a file of weights (default 5)")
    licence_help = "for the model card, as the hub names it, e.g. apache-2.0 (default unknown)"
    add("--license", default="unknown", metavar="NAME", help=licence_help)
    add("--push", metavar="REPO", help="then upload to a private repository of the hub, e.g. me/demo")
    arguments = parser.parse_args()
    others = [name for name in _OF_DIFFUSERS if getattr(arguments, name) != parser.get_default(name)]
    with ending_in_one_line():
        if arguments.format != "diffusers":
            refused = others if arguments.format == "official" else [one for one in others if one in _OF_CARDS]
            if refused:
                raise UserError(
                    f"--format {arguments.format}: expected no --{refused[0].replace('_', '-')}; leave it out"
                )
        {"official": run_official, "transformers": run_transformers, "diffusers": run}[arguments.format](arguments)


def _check_out(arguments: argparse.Namespace) -> None:
    if arguments.out.suffix.lower() in _OF_FILES:
        raise UserError(f"OUT: expected the name of a folder, got {arguments.out}; for a file give --format official")
    if not 0 < arguments.max_shard_gb <= _MOST_GB:
        raise UserError(f"--max-shard-gb: expected more than 0, up to {_MOST_GB}, got {arguments.max_shard_gb:g}")


def run(arguments: argparse.Namespace) -> None:
    """Checks, writes, and uploads where asked to."""
    _check_out(arguments)
    if not re.fullmatch(r"[\w.+-]+", arguments.license):
        raise UserError(f"--license: expected a name such as apache-2.0, got {arguments.license!r}")
    if arguments.push is not None and not arguments.push.strip():
        raise UserError(f"--push: expected a repository of the hub, e.g. me/demo, got {arguments.push!r}")
    with phase("loading torch"):
        from cfpretrain.export.diffusers_layout import ExportSettings, export, push
    settings = ExportSettings(
        arguments.weights, arguments.step, arguments.dtype, round(arguments.max_shard_gb * _GB), arguments.license
    )
    with phase(f"exporting {arguments.run}"):
        export(arguments.run, arguments.out, settings)
    size = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    say(f"{arguments.out}: {size / 1e6:,.1f} MB; load it with")
    say(f"    DiffusionPipeline.from_pretrained({str(arguments.out)!r}, trust_remote_code=True)")
    if arguments.push:
        with phase(f"uploading to {arguments.push}"):
            push(arguments.out, arguments.push)


def run_official(arguments: argparse.Namespace) -> None:
    """Writes the official code's checkpoint."""
    with phase("loading torch"):
        from cfpretrain.export.official import write_official
    with phase(f"exporting {arguments.run}"):
        write_official(arguments.run, arguments.out)
    say(f"{arguments.out}: weights and averages for the official code")


def run_transformers(arguments: argparse.Namespace) -> None:
    """Writes the text side as transformers has it."""
    _check_out(arguments)
    with phase("loading torch"):
        import torch

        from cfpretrain.export.language_model import language_model_of, write_language_model
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    with phase(f"exporting {arguments.run}"):
        model, beside = language_model_of(arguments.run, arguments.step, arguments.weights, dtype)
        write_language_model(arguments.out, model, round(arguments.max_shard_gb * _GB), beside)
    say(f"{arguments.out}: load it with AutoModelForCausalLM.from_pretrained({str(arguments.out)!r})")


if __name__ == "__main__":
    main()
