"""Asks a run trained on analogies of digits (`analogies.py`) for what comes next: a table on the screen.

    python -m examples.digits.analogy_report runs/analogies --files data/mnist-captioned-files \
        --images data/mnist-images --held-out data/mnist-captioned-held-out

Of [A] "three" [A'] "four" [B] "seven eight" [B'] only the three images are given, of digits held out. All words and the
last image are the model's own.
"""

import argparse
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cfpretrain.base.command_line import Parser, positive, run_on_ranks
from cfpretrain.base.console import path_argument, phase
from cfpretrain.evaluation.sampling_options import check_guidance
from examples.digits.analogies import NEVER_ASKED, RULES, digits_of
from examples.digits.captions import DIGITS

if TYPE_CHECKING:
    from cfpretrain.core.continuation import Part
    from examples.digits.text_exam import Exam

_SEED = 0
_NOT_SAID = -1
_COLUMNS = ("words read", "answer word", "image as word", "image right", "B again")


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", type=path_argument, help="a run folder")
    add("--files", type=path_argument, required=True, help="what tools/captioned_digits.py has written")
    add("--images", type=path_argument, required=True, help="image shards of real digits, for the classifier")
    add("--held-out", type=path_argument, required=True, help="image shards of digits kept from training")
    add("--guidance", type=float, default=3.0, help="of the last image, away from one without context (default 3)")
    add("--num", type=positive, default=150, help="of questions for each rule (default 150)")
    run_on_ranks(run, parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    """Asks, and prints."""
    check_guidance(arguments.guidance)
    with phase("loading torch"):
        from cfpretrain.base import runtime
        from cfpretrain.evaluation.source import load_source
        from examples.digits import text_exam
        from examples.digits.summary import table
    device = runtime.pick_device()
    with phase("reading digits"):
        source = load_source(arguments.run, device)
        exam = text_exam.prepare(source, arguments.files, arguments.images, arguments.held_out, 25)
    rng = np.random.default_rng(_SEED)
    rows: list[tuple[object, ...]] = [("", *_COLUMNS)]
    with phase("asking"):
        for rule in RULES:
            asked = np.array([digit for digit in range(10) if (digit, rule) not in NEVER_ASKED])
            second_N, first_N = rng.choice(asked, arguments.num), rng.integers(0, 10, arguments.num)
            rows.append((f"rule {rule:+d}", *ask(exam, first_N, second_N, rule, arguments.guidance, rng)))
        for digit, rule in NEVER_ASKED:
            first_N, second_N = rng.integers(0, 10, arguments.num), np.full(arguments.num, digit)
            scores = ask(exam, first_N, second_N, rule, arguments.guidance, rng)
            rows.append((f"never asked: {DIGITS[digit]}, rule {rule:+d}", *scores))
    print(table(rows), flush=True)


def ask(
    exam: "Exam",
    first_N: NDArray[np.int64],
    second_N: NDArray[np.int64],
    rule: int,
    guidance: float,
    rng: np.random.Generator,
) -> list[float]:
    """Shares of questions, as in `_COLUMNS`.

    Of right words for all of A, A' and B; of answers that are right in words, of images that are the answer in words,
    and that are right; of answers that are B again.
    """
    import torch

    from cfpretrain.core.continuation import continue_samples

    digits_N4 = np.array([digits_of(first, second, rule) for first, second in zip(first_N, second_N, strict=True)])
    tokens_NLP, labels_N = exam.tokens(exam.images_N1YX), exam.parts_N4[:, 0]
    places = [np.nonzero(labels_N == digit)[0] for digit in range(10)]
    samples: list[list[Part]] = [[] for _ in first_N]
    ids_N, texts = torch.arange(len(samples)), []
    for k in range(3):
        for sample, digit in zip(samples, digits_N4[:, k].tolist(), strict=True):
            sample.append(tokens_NLP[int(rng.choice(places[digit]))])
        drawing = exam.drawing(guidance) if k == 2 else None
        made = continue_samples(exam.source.model, samples, ids_N, exam.writing, drawing, 2 if k == 2 else 1)
        for sample, parts in zip(samples, made, strict=True):
            sample.append(parts[0])
        texts.append([exam.tokenizer.decode(list(parts[0])).split() for parts in made])
    said_N4 = np.array(
        [[_digit(one, 0) for one in texts[k]] for k in range(3)] + [[_digit(one, 1) for one in texts[2]]]
    ).T
    drawn_N = exam.digits_drawn([parts[1] if len(parts) > 1 else None for parts in made])
    scores = (
        (said_N4[:, :3] == digits_N4[:, :3]).all(1),
        said_N4[:, 3] == digits_N4[:, 3],
        drawn_N == said_N4[:, 3],
        drawn_N == digits_N4[:, 3],
        said_N4[:, 3] == digits_N4[:, 2],
    )
    return [float(one.mean()) for one in scores]


def _digit(words: list[str], place: int) -> int:
    return DIGITS.index(words[place]) if len(words) > place and words[place] in DIGITS else _NOT_SAID


if __name__ == "__main__":
    main()
