"""Makes a run folder whose trunk is that of a language model: GPT-2, Llama or Qwen3 in Hugging Face's layout.

    python tools/import_language_model.py Qwen3-0.6B runs/from-qwen3 --config configs/L.yaml
    deepspeed cfpretrain/train.py --config runs/from-qwen3/config.yaml

It takes a folder of this machine with config.json and model.safetensors, one or several files; nothing is downloaded
and no pickle is read. Width, depth and all that says what a block computes are the language model's, whatever the
config has; the rest is the config's. Where tokenizer.json is there too, the run has texts, with the language model's
tokens and four more that frame texts (model.vocabulary=0 on the command line takes the trunk alone). What a language
model lacks (images, classes, noise) begins as in a new run, and Adam's moments begin at 0.
"""

from pathlib import Path

from cfpretrain.base.command_line import Parser, add_config
from cfpretrain.base.console import ending_in_one_line, path_argument, phase


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    parser.add_argument("model", type=path_argument, help="folder of the language model, as save_pretrained writes it")
    parser.add_argument("run", type=path_argument, help="run folder to write; it must not be there yet")
    add_config(parser, "configs/L.yaml")
    arguments = parser.parse_intermixed_args()
    with ending_in_one_line():
        run(arguments.model, arguments.run, arguments.config, arguments.overrides, arguments.allow_env)


def run(folder: Path, out: Path, paths: list[str], overrides: list[str], allow_env: bool = False) -> None:
    """Reads, checks and writes."""
    with phase("loading torch"):
        from cfpretrain.export.imported_run import import_run
        from cfpretrain.export.language_model import open_language_model, start_from
    model = open_language_model(folder, "MODEL")
    import_run(
        out,
        paths,
        [*model.overrides(), *overrides],
        allow_env,
        lambda config: start_from(model, config, f"MODEL: {folder}"),
        folder,
    )


if __name__ == "__main__":
    main()
