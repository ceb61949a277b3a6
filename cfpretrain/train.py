"""Trains a CausalFusion model: parse, check, build, run.

    deepspeed cfpretrain/train.py --config configs/tiny.yaml [--config more.yaml] [key.sub=value ...] [--dry-run]

The same command resumes. The file is started by the launcher and nothing imports it; torch and DeepSpeed are imported
after the first line is out, since that takes seconds.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__" and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    # Started by its path, python puts this folder first: our modules would be importable under bare names as well, and
    # from a checkout that is not installed not at all under theirs.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cfpretrain.base import launch
from cfpretrain.base.command_line import Parser, add_config, add_local_rank
from cfpretrain.base.console import (
    EXIT_REQUEUE,
    SickRunError,
    UserError,
    ending_in_one_line,
    masked,
    phase,
    printable,
    say,
)
from cfpretrain.base.stopping import StopRequest, leave_before_training

if TYPE_CHECKING:
    from cfpretrain.base.config import Config
    from cfpretrain.base.config_files import Origin
    from cfpretrain.run.sequences import Captions


def parse() -> argparse.Namespace:
    """The command line."""
    started = sys.argv[0] if sys.argv[0].startswith("cfpretrain ") else "deepspeed cfpretrain/train.py"
    parser = Parser("Trains a CausalFusion model; the same command resumes it.", started)
    add_config(parser)
    parser.add_argument(
        "--allow-code", action="store_true", help="let these configs name code to import, as evaluation.features may"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and its arithmetic, and stop")
    parser.add_argument("--num-ranks", type=int, help="ranks that --dry-run assumes (default: those started)")
    add_local_rank(parser)
    return parser.parse_intermixed_args()


def main() -> None:
    """The command."""
    arguments = parse()
    launch.check()
    with ending_in_one_line():
        if arguments.dry_run:
            dry_run(arguments)
        else:
            run(arguments)


def dry_run(arguments: argparse.Namespace) -> None:
    """Prints the resolved config and what follows from it, in seconds; needs neither a GPU nor the weights' memory."""
    from cfpretrain.base import config as configs
    from cfpretrain.base import config_checks, runtime
    from cfpretrain.run.build import parameter_shapes
    from cfpretrain.run.sequences import captions_at_hand

    world_size = runtime.world_size() if arguments.num_ranks is None else arguments.num_ranks
    if world_size < 1:
        raise UserError(f"--num-ranks: expected at least 1, got {world_size}")
    config, origins = _load(arguments, world_size)
    if runtime.rank() != 0:
        return
    print("\n".join(map(printable, configs.to_yaml(configs.to_shown(config)).split("\n"))))

    train = config.train
    print(f"parameters: {sum(map(math.prod, parameter_shapes(config).values())):,}")
    print(
        f"global batch: {train.global_batch_size} = {config.micro_batch_size(world_size)} a micro-batch x "
        f"{config.accumulation_steps(world_size)} micro-batches x {world_size} ranks"
    )
    print(f"samples in all: {train.num_steps * train.global_batch_size:,} over {train.num_steps:,} steps")
    captions = captions_at_hand(config)
    inputs = _describe_inputs(config, world_size, captions)
    for line in (*_describe_sequences(config, captions), *inputs, *_describe_origins(origins)):
        print(printable(masked(line)))
    for doubt in config_checks.doubts(config, origins):
        print(f"WARNING: {doubt}")


def _load(arguments: argparse.Namespace, world_size: int) -> "tuple[Config, dict[str, Origin]]":
    """The config, checked, and where its keys come from."""
    from cfpretrain.base import config as configs
    from cfpretrain.base import config_checks

    config, origins = configs.load_with_origins(arguments.config, arguments.overrides, arguments.allow_env)
    config_checks.check_code(config, origins, arguments.allow_code)
    config_checks.check(config, world_size)
    return config, origins


def _describe_inputs(config: "Config", world_size: int, captions: "Captions") -> Iterator[str]:
    """How many samples the shards hold, and that they, the autoencoder and the tokenizer fit, where they lie here."""
    import torch

    from cfpretrain.data.compatibility import check_autoencoder, check_infos
    from cfpretrain.data.online import open_training_data
    from cfpretrain.run.build import make_autoencoder

    yield from _describe_tokenizer(config)
    folder, elsewhere = config.data.autoencoder, [one for one in config.data.shards if not Path(one).is_dir()]
    data = None if elsewhere else open_training_data(config)
    infos = [] if data is None else data.latents
    if data is not None:
        check_infos(infos, config)
        yield f"shards: {sum(map(len, data.folders)):,} {data.kind}, which fit the config"
        if data.encodings:
            yield from _describe_encoding(config, data.latents[0].crop, world_size, captions)
            return
    else:
        what = "an address" if "://" in elsewhere[0] else "no folder of this machine"
        yield f"shards: not looked at, since {elsewhere[0]} is {what}"
    if not folder:
        return
    if elsewhere and not Path(folder).is_dir():
        yield f"autoencoder: not looked at, since {folder} is no folder of this machine"
        return
    found = make_autoencoder(config, torch.device("cpu"))
    for info in infos:
        check_autoencoder(info, found.fingerprint, found.shift, found.scale, "data.autoencoder")
    yield f"autoencoder: {folder}, which {'made the latents' if infos else 'can be read'}"
    if elsewhere:
        yield "if the shards hold images:"
        yield from _describe_encoding(config, config.data.crop, world_size, captions)


def _describe_tokenizer(config: "Config") -> Iterator[str]:
    """That it is of the model's vocabulary."""
    from cfpretrain.run.build import make_tokenizer

    model, file = config.model, config.data.tokenizer
    if not model.vocabulary:
        return
    if not Path(file).is_file():
        yield f"tokenizer: not looked at, since {file} is no file of this machine"
        return
    make_tokenizer(config)
    yield f"tokenizer: {file}, of {model.vocabulary:,} tokens"


def _describe_encoding(config: "Config", crop: str, world_size: int, captions: "Captions") -> Iterator[str]:
    """How images are encoded during training, and what that costs beside the training step."""
    from cfpretrain.data.online import encoding_precision
    from cfpretrain.run import metrics
    from cfpretrain.run.sequences import mean_work
    from cfpretrain.training.encoding_cost import encoding_cost

    data, at_once = config.data, config.data.encode_batch_size
    if not data.autoencoder:
        yield f"images: decoded during training, {crop} crop; their pixels are the latents"
        return
    on_gpu, on_cpu = (encoding_precision(config, device_type) for device_type in ("cuda", "cpu"))
    precision = on_cpu if on_gpu == on_cpu else f"{on_gpu} (on a CPU {on_cpu})"
    flops = encoding_cost(config, on_gpu=True).flops
    of_model = metrics.training_flops(config.model, mean_work(config, captions.num_tokens), config.train.freeze)
    yield (
        f"images: encoded during training, by {data.autoencoder} in {precision}, {at_once} at once, {crop} crop: "
        f"{flops:.3e} FLOPs an image, {flops / of_model:.2%} of the model's training FLOPs, which come to it"
    )
    padding, micro_batch_size = config.encoding_padding(world_size), config.micro_batch_size(world_size)
    if padding:
        num_encoded = micro_batch_size + padding
        yield (
            f"images: a micro-batch of {micro_batch_size} is padded to {num_encoded}, which takes "
            f"{num_encoded / micro_batch_size:.2f} times the FLOPs: see data.encode_batch_size"
        )


def _describe_origins(origins: "Mapping[str, Origin]") -> Iterator[str]:
    """Which keys come from where, of several files."""
    sources = sorted(set(origins.values()))
    for source in sources if len(sources) > 1 else ():
        yield f"set by {source.name}: {', '.join(key for key, origin in origins.items() if origin == source)}"


def _describe_sequences(config: "Config", captions: "Captions") -> Iterator[str]:
    """AR steps, lengths and FLOPs of the training sequences, exact in the mean over splits."""
    import torch

    from cfpretrain.core import ar
    from cfpretrain.core.work import sequence_lengths
    from cfpretrain.run import metrics, sequences

    model, order, num_sequences = config.model, config.order, config.train.global_batch_size
    L, law = model.num_tokens, (config.order.ar_step_decay, config.order.num_ar_steps)
    mean = float(ar.step_count_probabilities(L, *law) @ torch.arange(1, L + 1, dtype=torch.float64))
    drawn = "" if order.num_ar_steps else f" in the mean, decay {order.ar_step_decay:g}"
    yield f"AR steps: {mean:g}{drawn}, {order.ar_step_sizes} sizes, {order.token_order} order"

    work, each = sequences.mean_work(config, captions.num_tokens), "a sample"
    tokens = f"tokens a sequence: {work.tokens:.1f} in the mean"
    if sequences.has_texts(config):
        yield f"{captions}"
        yield f"{tokens}, with padding {sequences.longest(config).computed} at most"
    else:
        ((_, segments),) = sequences.drawn_samples(config, captions.num_tokens)
        share_by_length = sequence_lengths(segments, ar.ARSettings(**vars(order)), config.clean_token_multiple())
        lengths = list(share_by_length)
        few, each = len(lengths) < 10, "an image"
        shown = ", ".join(map(str, lengths)) if few else f"{len(lengths)} from {lengths[0]} to {lengths[-1]}"
        padded = sum(length * share for length, share in share_by_length.items())
        yield f"{tokens}, {padded:.1f} with padding; lengths: {shown}"
        yield f"visible pairs: {work.visible / work.tokens**2:.1%} of the mean length's square"
    flops = num_sequences * metrics.training_flops(model, work, config.train.freeze)
    yield f"training FLOPs: {flops / num_sequences:.3e} {each}, {flops:.3e} a step"


def run(arguments: argparse.Namespace) -> None:
    """Checks the config, then trains; ends the process with `EXIT_REQUEUE` where the same command should go on."""
    stop = StopRequest(leave_before_training)
    stop.listen()
    with phase("loading torch"):
        from cfpretrain.base import config_checks, runtime
    config, origins = _load(arguments, runtime.world_size())
    for doubt in config_checks.doubts(config, origins):
        say(f"WARNING: {doubt}")
    with phase("loading deepspeed and streaming"):
        from cfpretrain.training import folder as run_folder
        from cfpretrain.training import trainer
    run_folder.check_moved(arguments.config, config)
    device, folder = runtime.pick_device(), Path(config.run.folder)
    # Before ranks meet: ranks that a killed launcher has left behind still hold the port where they would.
    problem = None
    try:
        if folder.is_dir():
            run_folder.take(folder)
    except UserError as error:
        problem = str(error)
    except OSError:
        pass  # said with its reason where the folder is prepared
    with phase("waiting for all ranks", announce=False):
        runtime.start(device)
    try:
        runtime.agree(problem)
        # Not before: where rank 0 found its port in use, the others have met the other run, which does not answer.
        stop.leave = lambda _: run_folder.leave_at_start(folder)
        finished = trainer.run(config, device, stop)
    except (UserError, SickRunError, SystemExit):  # the last where memory ran out
        if problem is None:  # the folder is this run's
            run_folder.remove_requeue(folder)
        raise
    finally:
        runtime.stop()
    if not finished:
        sys.exit(EXIT_REQUEUE)


if __name__ == "__main__":
    main()
