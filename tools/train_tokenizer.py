"""Makes a tokenizer of the texts in shards: byte-level BPE, in which any text can be written.

    python tools/train_tokenizer.py data/photos-latents --out data/photos-tokenizer.json --size 8192

Takes shards of images or of latents, which keep the captions and segments of `make_shards.py`'s table. It ends with the
lines of a config that learns them. Any other tokenizer.json of Hugging Face's `tokenizers` may stand in its place.
"""

import argparse
import itertools
from pathlib import Path

from cfpretrain.base import files, outputs
from cfpretrain.base.command_line import Parser, check_range, positive
from cfpretrain.base.console import UserError, address_argument, ending_in_one_line, explaining, path_argument, phase

_FEWEST_TOKENS = 260  # one for each byte, and those that frame texts
_MOST_TOKENS = 1_000_000  # that `model.vocabulary` may be


def main() -> None:
    """The command."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("shards", nargs="+", type=address_argument, help="folders of shards with captions, or their addresses")
    add("--out", type=path_argument, required=True, help="the file to write, e.g. data/tokenizer.json")
    add(
        "--size",
        type=positive,
        default=8192,
        help=f"the most tokens, {_FEWEST_TOKENS} to {_MOST_TOKENS} (default 8192)",
    )
    with ending_in_one_line():
        run(parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    """Makes the tokenizer, and prints what a config needs of it."""
    out: Path = arguments.out
    check_range("--size", arguments.size, _FEWEST_TOKENS, _MOST_TOKENS)
    outputs.refuse_existing(out, "--out")
    with phase("loading torch and tokenizers"):
        from cfpretrain.data.interleaved import parse_column
        from cfpretrain.data.shards import Shards
        from cfpretrain.data.tokenizer import TextTokenizer
    captions: list[str] = []
    texts: list[str] = []  # of interleaved samples
    with phase("reading texts"):
        folders = [Shards(address, "SHARDS") for address in arguments.shards]
        for shards in folders:
            for sample in itertools.chain.from_iterable(map(shards.shard, range(len(shards.files)))):
                segments = parse_column(sample["segments"]) if "segments" in sample else ()
                if sample["caption"] or not segments:  # which have texts of their own
                    captions.append(sample["caption"])
                texts += [one for one in segments if one is not None]
    said = list(filter(None, [*captions, *texts]))
    if not said:
        raise UserError(
            f"SHARDS: expected captions, got none in {', '.join(arguments.shards)}; give make_shards.py a table with a "
            "column `caption` or `segments`"
        )
    with phase("training"):
        tokenizer = TextTokenizer.train(said, arguments.size)
    with explaining(f"--out: {out} cannot be written: {{reason}}; choose another"):
        files.make_folder(out.parent, follow=True)
        files.replace(out, tokenizer.to_json())
    lengths = [len(tokenizer.encode(caption)) for caption in said]
    num_empty = len(captions) + len(texts) - len(said)
    kind, empty = "texts" if texts else "captions", f", {num_empty} more are empty" if num_empty else ""
    print(f"{len(said)} {kind} of {sum(lengths) / len(said):.1f} tokens in the mean, {max(lengths)} at most{empty}")
    has_classes = any(len(shards.info.class_names) > 1 for shards in folders)
    most_segments = max(shards.info.most_segments for shards in folders)
    tasks = "interleaved: 1" if most_segments else "text_to_image: 3, image_to_text: 1"
    tasks = ("" if has_classes else "class_to_image: 0, ") + tasks
    print("data:", f"  tokenizer: {out}", f"  tasks: {{{tasks}}}", sep="\n")
    print("model:", f"  vocabulary: {tokenizer.size}", f"  max_text_tokens: {max(lengths) + 2}", sep="\n")
    if most_segments > 2:
        print(f"  max_segments: {most_segments}")


if __name__ == "__main__":
    main()
