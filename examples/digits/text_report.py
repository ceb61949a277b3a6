"""Scores a run with texts on held-out digits: a table, text_report.json, and two pictures in the run folder.

    python tools/text_report.py runs/demo-text --files data/mnist-captioned-files \
        --images data/mnist-images --held-out data/mnist-captioned-held-out

Captions are scored by what they say: digit, thickness, slant and width, of which the last three are measured in the
pixels; drawn digits by what a classifier and the same measurements find in them. What says how good that is, is printed
beside it: guessing from the digit alone, captions of other digits, real digits through the autoencoder.
"""

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cfpretrain.base import files
from cfpretrain.base.command_line import Parser, check_range
from cfpretrain.base.console import ending_in_one_line, path_argument, phase, printable
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
    add("--guidance", type=float, default=4.0, help="beside unguided samples; 0 to 1000 but 1 (default 4)")
    add("--num-denoising-steps", type=int, default=25, help="2 to the run's noise.num_timesteps (default 25)")
    with ending_in_one_line():
        run(parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    """Scores, draws and prints."""
    check_guidance(arguments.guidance)
    with phase("loading torch"):
        import torch

        from cfpretrain.run import build
        from examples.digits import text_exam
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    found = build.find_checkpoint(arguments.run)
    check_range("--num-denoising-steps", arguments.num_denoising_steps, 2, found.config.noise.num_timesteps)
    with phase("reading digits"):
        exam = text_exam.prepare(
            found, arguments.files, arguments.images, arguments.held_out, arguments.num_denoising_steps
        )
    with phase("writing captions"):
        report = exam.score_captions()
    with phase("drawing digits from prompts"):
        report |= exam.score_drawings(arguments.guidance)
    report |= {"guidance": arguments.guidance, "num_denoising_steps": arguments.num_denoising_steps}
    report |= build.read_summary(arguments.run) or {"num_steps": found.state.step}
    with phase("drawing pictures"):
        exam.draw_prompts(arguments.run / PROMPTS_FILE, arguments.guidance)
        exam.draw_captions(arguments.run / CAPTIONS_FILE)
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
    times = report["caption_cpu_seconds_without_cache"] / report["caption_cpu_seconds"]
    return "\n".join(
        [
            *map(printable, table(lines).split("\n")),
            f"  real digits are through the autoencoder; captions with the key-value cache {times:.1f} times as fast",
            f"  trained {report['num_steps']} steps in {report.get('train_seconds', 0):.0f} s",
            f"  pictures: {folder}/{PROMPTS_FILE} {folder}/{CAPTIONS_FILE}",
            f"  numbers:  {folder}/{REPORT_FILE}",
        ]
    )


if __name__ == "__main__":
    main()
