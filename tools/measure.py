"""Measures a part of this project; prints tables and, last, one JSON line with versions and hardware.

    python tools/measure.py step --config configs/benchmark/cpu.yaml --against naive
    python tools/measure.py report --minutes 8 --out gpu-report

`python tools/measure.py WHAT --help` lists the options of one. docs/benchmarks.md has the figures.
"""

import ast
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tools share code

from cfpretrain.base import launch
from cfpretrain.base.command_line import Parser, add_config, positive
from cfpretrain.base.console import ending_in_one_line, path_argument

_PRECISIONS = ("fp32", "bf16")
_ON_RANKS = ("step", "saving", "evaluation")  # they mind what a launcher says


def _step(parser: Parser) -> None:
    add_config(parser)
    add = parser.add_argument
    add("--bare", action="store_true", help="engine and objective alone, on batches made ahead")
    add("--against", choices=("naive", "naive-autocast"), help="the plain implementation to compare with")
    add("--pairs", type=positive, default=6, help="timed steps of each side (default 6)")
    add("--profile", action="store_true", help="profile one step more")
    add("--photos", choices=("small", "kl16"), help="from JPEG photos, by an autoencoder of this layout")
    add("--fit", action="store_true", help="halve the micro-batch until the estimate fits the GPU")
    add("--compile", action="store_true", help="the same with one block: fills the compilers' caches")
    add("--kernels", action="store_true", help="count the kernels of a compiled block instead")


def _attention(parser: Parser) -> None:
    add = parser.add_argument
    add("--tokens", type=positive, nargs="+", help="of an image; the sequence has 64 + twice as many")
    add("--head-widths", type=positive, nargs="+", default=[64, 128], help="default 64 128")
    add("--num-heads", type=positive, default=20, help="default 20")
    add("--batch-size", type=positive, help="sequences (default: 1 on a CPU, 18432 tokens on a GPU)")
    add("--compile", action="store_true", help="run everything once, and time nothing")


def _launches(parser: Parser) -> None:
    add = parser.add_argument
    add("--seconds", type=positive, default=150, help="after which it ends with what it has (150)")
    add("--tokens", type=positive, nargs="+", default=[256, 1024], help="of an image (256 1024)")
    add("--head-widths", type=positive, nargs="+", default=[64, 128], help="default 64 128")
    add("--out", type=path_argument, help="a file that gets the best settings as JSON")
    add("--worker", type=int, nargs=2, help="which of how many processes, to compile alone")


def _sampling(parser: Parser) -> None:
    add_config(parser, required=False)
    add = parser.add_argument
    add("--num-ar-steps", type=positive, nargs="+", default=[8, 16], help="default 8 16")
    add("--num-denoising-steps", type=positive, default=10, help="default 10")
    add("--guidance", type=float, default=2.0, help="default 2")
    add("--batch-size", type=positive, default=4, help="images (default 4)")
    add("--precision", choices=_PRECISIONS, default="fp32", help="of the network (default fp32)")
    add("--alone", action="store_true", help="the sampler with its cache alone")
    add("--pairs", type=positive, default=3, help="timed turns of each (default 3)")


def _captions(parser: Parser) -> None:
    add = parser.add_argument
    add("source", type=path_argument, help="a run folder of a model with texts, or an export of one")
    add("--shards", type=path_argument, help="a folder of latent shards with images (default: noise)")
    add("--num-images", type=positive, default=200, help="default 200")
    add("--precision", choices=_PRECISIONS, default="fp32", help="of the network (default fp32)")
    add("--pairs", type=positive, default=3, help="timed turns of each (default 3)")


def _data(parser: Parser) -> None:
    add = parser.add_argument
    add("what", choices=("make_shards", "encode", "loader", "ready", "images"), help="see below")
    add("--pairs", type=positive, default=5, help="runs of each side (default 5)")
    add("--images", type=positive, help="photos that are made (default 96; make_shards 800); of images also: a turn's")
    add("--size", type=positive, default=256, help="pixels a side of the photos' crop (default 256)")
    add("--store", choices=("lossless", "original"), default="lossless", help="of make_shards, images (lossless)")
    add("--shards", type=path_argument, help="of images: a folder of image shards (default: of photos)")
    add("--no-mirror", action="store_true", help="of images: as data.mirror_prob=0 (default: 0.5)")
    add("--autoencoder", type=path_argument, help="of encode, images: its folder (default: one with random weights)")
    add("--layout", choices=("small", "kl16"), default="small", help="of random weights (default small)")
    add("--precision", choices=_PRECISIONS, default="fp32", help="of the autoencoder (default fp32)")
    add("--batch-size", type=positive, help="images or latents at once (default 32; encode 16, ready 64)")
    add("--latents", choices=("kl16", "demo"), default="kl16", help="of loader, ready: their shape (default kl16)")
    add("--samples", type=positive, help="of loader, ready: latents in the shards (default 4096; ready 1024)")
    add("--workers", type=int, help="of loader, ready, images: processes that read (default: one a core; ready 1)")


def _evaluation(parser: Parser) -> None:
    add = parser.add_argument
    add("what", choices=("scale", "ranks", "one-rank"), help="see below")
    add("--num-images", type=positive, default=50_000, help="of scale, in each set (default 50000)")
    add("--num-features", type=positive, default=2048, help="of scale (default 2048)")
    add("--batches", type=positive, default=20, help="of images, over all processes (default 20)")
    add("--batch-size", type=positive, default=32, help="images of a batch (default 32)")
    add("--features", default="effnet_lite0", help="effnet_lite0 (default) or inception")
    add("--pairs", type=positive, default=3, help="of ranks: turns of each (default 3)")


def _export(parser: Parser) -> None:
    add_config(parser, "configs/H.yaml")
    add = parser.add_argument
    add("--dtype", choices=_PRECISIONS, default="fp32", help="of the files (default fp32)")
    add("--max-shard-gb", type=float, default=5.0, help="GB of a file of weights (default 5)")
    add("--folder", type=path_argument, help="where to work (default: the system's temporary folder)")
    add("--export", type=path_argument, nargs=2, metavar=("RUN", "OUT"), help="export a run, and measure that alone")


def _saving(parser: Parser) -> None:
    kinds = ("bare", "unguarded", "full", "saving")
    add_config(parser)
    add = parser.add_argument
    add("--kinds", nargs="+", choices=kinds, default=kinds, help="of blocks (default: all four)")
    add("--pairs", type=positive, default=6, help="turns of the kinds (default 6)")
    add("--block-steps", type=positive, default=50, help="steps of a block (default 50)")
    add("--warm-up-steps", type=int, default=50, help="before the first block (default 50)")


def _report(parser: Parser) -> None:
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="after which it ends with what it has (default 8)")
    add("--out", type=path_argument, default=Path("gpu-report"), help="folder of the report (gpu-report)")
    add("--only", nargs="+", metavar="SECTION", help="these sections alone, e.g. XL attention sweep")
    add("--sweep", action="store_true", help="sweep the launch settings of the attention kernels too")


_OPTIONS: dict[str, Callable[[Parser], None]] = {
    "step": _step,
    "attention": _attention,
    "launches": _launches,
    "sampling": _sampling,
    "captions": _captions,
    "data": _data,
    "evaluation": _evaluation,
    "export": _export,
    "saving": _saving,
    "machine": lambda parser: None,
    "report": _report,
}


def _doc(what: str) -> str:
    """The docstring of a module, which is not imported: most load torch."""
    file = Path(__file__).parent / "measuring" / f"{what}.py"
    return ast.get_docstring(ast.parse(file.read_text())) or ""


def main(given: Sequence[str] | None = None) -> None:
    """The command.

    Args:
        given: what to measure, and its options; None: those of the command line.
    """
    command = "measure.py" if given else Path(sys.argv[0]).name
    words = sys.argv[1:] if given is None else given
    what, *options = [word for word in words if not word.startswith("--local_rank=")] or [""]  # the launcher adds it
    if what not in _OPTIONS:
        lines = (f"  {name:<12}{_doc(name).splitlines()[0]}" for name in _OPTIONS)
        parser = Parser("\n".join([__doc__ or "", "WHAT is one of", "", *lines]), command)
        parser.add_argument("what", metavar="WHAT", choices=_OPTIONS, help="see below")
        parser.parse_args([what] if what else [])
    parser = Parser(_doc(what), f"{command} {what}")
    _OPTIONS[what](parser)
    arguments = parser.parse_intermixed_args(options)
    if what in _ON_RANKS:
        launch.check()
    with ending_in_one_line():
        found = importlib.import_module(f"tools.measuring.{what}").measure(arguments)
        if found is not None:  # rank 0 has it
            from tools.measuring.common import whereabouts

            print(json.dumps(found | whereabouts()), flush=True)


if __name__ == "__main__":
    main()
