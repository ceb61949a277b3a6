"""Scores a run with texts on held-out digits: a table, text_report.json, and two pictures in the run folder.

    deepspeed --num_accelerators 2 tools/text_report.py runs/demo-text --files data/mnist-captioned-files \
        --images data/mnist-images --held-out data/mnist-captioned-held-out

Captions are scored by what they say: digit, thickness, slant and width, of which the last three are measured in the
pixels; drawn digits by what a classifier and the same measurements find in them. What says how good that is, is printed
beside it: guessing from the digit alone, captions of other digits, real digits through the autoencoder.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cfpretrain.base import files
from cfpretrain.base.command_line import Parser, add_local_rank, check_range, run_on_ranks
from cfpretrain.base.console import path_argument, phase, printable
from cfpretrain.evaluation.sampling_options import check_guidance

REPORT_FILE, PROMPTS_FILE, CAPTIONS_FILE = "text_report.json", "prompts.png", "captions.png"


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", type=path_argument, help="a run folder, e.g. runs/demo-text")
    add("--files", type=path_argument, required=True, help="what tools/captioned_digits.py has written to train on")
    add("--images", type=path_argument, required=True, help="image shards of real digits, for the classifier")
    add("--held-out", type=path_argument, required=True, help="image shards of digits kept from training")
    add("--guidance", type=float, default=4.0, help="beside unguided samples; 0 to 1000 (default 4)")
    add("--num-denoising-steps", type=int, default=25, help="2 to the run's noise.num_timesteps (default 25)")
    add_local_rank(parser)
    run_on_ranks(run, parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    """All ranks draw and write together; rank 0 prints."""
    check_guidance(arguments.guidance)
    with phase("loading torch"):
        from cfpretrain.base import runtime
        from cfpretrain.evaluation.source import load_source
        from cfpretrain.run.build import read_summary
        from examples.digits import text_exam
    device = runtime.pick_device()
    with runtime.ranks_of_a_tool(device):
        with runtime.together(), phase("reading digits"):
            source = load_source(arguments.run, device)
            num_timesteps = source.config.noise.num_timesteps
            check_range("--num-denoising-steps", arguments.num_denoising_steps, 2, num_timesteps)
            given = arguments.files, arguments.images, arguments.held_out, arguments.num_denoising_steps
            exam = text_exam.prepare(source, *given)
        with phase("writing captions"):
            report = exam.score_captions() | exam.time_captions()
        with phase("drawing digits from prompts"):
            report |= exam.score_drawings(arguments.guidance)
        report |= {"guidance": arguments.guidance, "num_denoising_steps": arguments.num_denoising_steps}
        report |= read_summary(arguments.run) or {}
        with phase("drawing pictures"):
            pictures = (
                exam.draw_prompts(arguments.run / PROMPTS_FILE, arguments.guidance),
                exam.draw_captions(arguments.run / CAPTIONS_FILE),
            )
        with runtime.together():
            if runtime.rank() == 0:
                for write in pictures:
                    write()
                files.replace(arguments.run / REPORT_FILE, json.dumps(report, indent=2) + "\n")
                print(_table(report, arguments.run), flush=True)


def _table(report: Mapping[str, Any], folder: Path) -> str:
    from examples.digits.summary import table

    def rows(what: str, columns: Mapping[str, str], keys: Mapping[str, str]) -> list[tuple[object, ...]]:
        found = [[report[column].get(key, "") for column in columns.values()] for key in keys]
        return [(), (what, *columns), *((f"  {keys[key]}", *row) for key, row in zip(keys, found, strict=True))]

    guided = f"guidance {report['guidance']:g}"
    said = {"digit": "digit", "thickness": "thickness", "slant": "slant", "width": "width", "all_four": "all four"}
    seen = {**said, "all_measures": "thickness, slant and width"}
    scores = {"cider": "CIDEr-D", "bleu_4": "BLEU-4"}
    captions = {"model": "image_to_text", "digit alone": "class_alone", "shuffled": "shuffled_captions"}
    captions |= {"true ones": "true_captions"}
    drawings = {"unguided": "text_to_image_unguided", guided: "text_to_image", "real digits": "through_autoencoder"}
    new = {"drawn": "text_to_image_never_trained", "captioned": "image_to_text_never_trained"}
    lines = [
        *rows(f"image to text, {report['num_held_out']} held-out digits", captions, {**said, **scores}),
        *rows("text to image, what is to be seen", drawings, seen),
        *rows("text to image to text", {guided: "text_to_image_to_text"}, said),
        *rows("combinations never trained on", new, {"digit": "digit", "all_four": "all four"}),
        ("  digits", report["num_drawn_never_trained"], report["num_real_never_trained"]),
        (),
    ]
    trained = (
        [f"  trained {report['num_steps']} steps in {report['train_seconds']:.0f} s"] if "num_steps" in report else []
    )
    times = report["caption_cpu_seconds_without_cache"] / report["caption_cpu_seconds"]
    return "\n".join(
        [
            *map(printable, table(lines).split("\n")),
            f"  real digits are through the autoencoder; captions with the key-value cache {times:.1f} times as fast",
            *trained,
            f"  pictures: {folder}/{PROMPTS_FILE} {folder}/{CAPTIONS_FILE}",
            f"  numbers:  {folder}/{REPORT_FILE}",
        ]
    )


if __name__ == "__main__":
    main()
