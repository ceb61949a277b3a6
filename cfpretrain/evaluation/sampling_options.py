"""The options that tools which sample share; torch is imported only once they are read."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cfpretrain.base.command_line import add_local_rank, check_range
from cfpretrain.base.console import UserError

if TYPE_CHECKING:
    from cfpretrain.base.config import Config
    from cfpretrain.core.continuation import Writing
    from cfpretrain.evaluation.generation import GenerationSettings
    from cfpretrain.evaluation.source import Source

# Denoising steps and the spacing of their levels, where none are asked for.
_BY_SOLVER = {"ddpm": (250, "time"), "ddim": (50, "time"), "dpm++": (25, "log_snr"), "sde-dpm++": (25, "log_snr")}
_SIZES = ("equal", "cosine")
MOST_IN_A_BATCH = 4096
_MOST_GUIDANCE = 1000
_MOST_TEMPERATURE, _LEAST_TOP_P = 100, 1e-6


def add_sampling_options(parser: argparse.ArgumentParser, batch_size: int | None, guidance: float = 2.0) -> None:
    """Adds those of images to a command, and those of `add_source_options`, with its defaults."""
    add = parser.add_argument_group("how images are made").add_argument
    add("--num-ar-steps", type=int, help="1: diffusion ... one a token: pure AR (default 1)")
    add("--ar-sizes", default="equal", help="tokens of the AR steps: equal, cosine (few first), or given: 1,3,12")
    orders = ("random", "raster", "block_raster", "dilated")
    add("--order", choices=orders, help="in which tokens are made (default: as the model was trained)")
    add("--block-size", type=int, help="of block_raster and dilated (default: the model's)")
    solver_help = "sde-dpm++ is the one for few steps; ddim and dpm++ draw no noise on the way (default ddpm)"
    add("--solver", choices=_BY_SOLVER, default="ddpm", help=solver_help)
    add("--num-denoising-steps", type=int, help="of each AR step (default 250; ddim 50; others 25)")
    spacing_help = "what noise levels are even in (default time; dpm++ log_snr)"
    add("--spacing", choices=("time", "log_snr"), help=spacing_help)
    guidance_help = f"towards the class or the text; 1: none (default {guidance:g})"
    add("--guidance", type=float, default=guidance, help=guidance_help)
    schedule_help = "along the AR steps: the same for all, or from 1 up (default constant)"
    add("--guidance-schedule", choices=("constant", "linear"), default="constant", help=schedule_help)
    interval_help = "timesteps between which guidance acts, e.g. 100 700 (default: all)"
    add("--guidance-interval", type=int, nargs=2, metavar=("FIRST", "LAST"), help=interval_help)
    add_source_options(parser, batch_size)


def add_source_options(parser: argparse.ArgumentParser, batch_size: int | None) -> None:
    """Adds those that say which weights a command takes and how they compute; None: it makes one thing at a time."""
    add = parser.add_argument_group("which weights, and how they compute").add_argument
    add("--seed", type=int, default=0, help="of all that is drawn (default 0)")
    if batch_size is None:
        parser.set_defaults(batch_size=1)
    else:
        add("--batch-size", type=int, default=batch_size, help=f"images a forward on one rank (default {batch_size})")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="of the model (default fp32)")
    weights_help = "of a run: averaged, or as trained (default ema)"
    add("--weights", choices=("ema", "raw"), default="ema", help=weights_help)
    add("--step", type=step_or_best, help="of a run's checkpoint, or best: by its scores (default: the latest)")
    add_local_rank(parser)


def add_text_options(parser: argparse.ArgumentParser, guidance_option: str) -> None:
    """Adds those of texts to a command."""
    add = parser.add_argument_group("how texts are written").add_argument
    add("--temperature", type=float, default=0.0, help="of what is drawn; 0: the likeliest token (default 0)")
    add("--top-k", type=int, default=0, help="draw from the k likeliest tokens; 0: all (default 0)")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest that reach p together (default 1: all)")
    add("--max-text-tokens", type=int, help="of a text, the two around it among them (default: the model's)")
    guidance_help = "away from a text without what comes before it; 1: none (default 1)"
    add(guidance_option, dest="text_guidance", type=float, default=1.0, metavar="SCALE", help=guidance_help)


def read_writing(arguments: argparse.Namespace, source: "Source", guidance_option: str) -> "Writing":
    """How the options of `add_text_options` say that texts are written."""
    from cfpretrain.core.continuation import Writing
    from cfpretrain.core.token_choice import TokenChoice

    known, model = source.marks("SOURCE"), source.config.model
    max_tokens = _or(arguments.max_text_tokens, model.max_text_tokens)
    check_range("--temperature", arguments.temperature, 0, _MOST_TEMPERATURE)
    check_range("--top-k", arguments.top_k, 0, model.vocabulary)
    check_range("--top-p", arguments.top_p, _LEAST_TOP_P, 1)
    check_range("--max-text-tokens", max_tokens, 2, model.max_text_tokens)
    check_guidance(arguments.text_guidance, guidance_option)
    for option, value, usual in (("--top-k", arguments.top_k, 0), ("--top-p", arguments.top_p, 1)):
        if value != usual and arguments.temperature == 0:
            raise UserError(f"{option}: expected with a --temperature above 0, which draws; got 0, which does not")
    choice = TokenChoice(arguments.temperature, arguments.top_k, arguments.top_p)
    return Writing(known, max_tokens, arguments.seed, choice, arguments.text_guidance)


def step_or_best(text: str) -> int | Literal["best"]:
    """The value of an option that names a checkpoint."""
    if text == "best":
        return "best"
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a step or best, got {text!r}")
    return int(text)


def usual_spacing(solver: str) -> str:
    """What the noise levels of a solver are even in where nothing else is asked for; see `NoiseProcess.levels`."""
    return _BY_SOLVER[solver][1]


def check_guidance(scale: float, option: str = "--guidance") -> None:
    """UserError where nothing can be guided so."""
    if not 0 <= scale <= _MOST_GUIDANCE:
        raise UserError(f"{option}: expected 0 to {_MOST_GUIDANCE} (1: none), got {scale}")


def is_picture(path: Path) -> bool:
    """Whether a path is called as a PNG."""
    return path.suffix.lower() == ".png"


def check_picture(option: str, path: Path) -> None:
    """UserError where an option's path is not called as the PNG that is written there."""
    if not is_picture(path):
        raise UserError(f"{option}: expected a name that ends in .png, got {path}; a PNG is what is written")


def check_place(option: str, path: Path, must_be_new: bool = True) -> None:
    """UserError where an option's path lies in no folder, or something is there already."""
    if not path.absolute().parent.is_dir():
        raise UserError(f"{option}: expected a place in a folder that is there, got {path}; make {path.parent} first")
    if must_be_new and os.path.lexists(path):
        raise UserError(f"{option}: expected a place where nothing is yet, got {path}; delete it or give another")


def read_settings(arguments: argparse.Namespace, config: "Config", num_tokens: int) -> "GenerationSettings":
    """How the options of `add_sampling_options` say that so many tokens of an image are made."""
    from cfpretrain.core.ar import choose_sizes, fixed_order
    from cfpretrain.core.sampler import Guidance
    from cfpretrain.evaluation.generation import GenerationSettings

    num_timesteps = config.noise.num_timesteps
    usual_steps, usual_spacing = _BY_SOLVER[arguments.solver]
    num_denoising_steps = _or(arguments.num_denoising_steps, min(usual_steps, num_timesteps))
    given_sizes = None if arguments.ar_sizes in _SIZES else _sizes(arguments.ar_sizes)
    num_ar_steps = _or(arguments.num_ar_steps, len(given_sizes) if given_sizes else 1)
    first, last = _or(arguments.guidance_interval, (0, num_timesteps - 1))
    for name, value, low, high in (
        ("--num-ar-steps", num_ar_steps, 1, num_tokens),
        ("--num-denoising-steps", num_denoising_steps, 2, num_timesteps),
        ("--batch-size", arguments.batch_size, 1, MOST_IN_A_BATCH),
        ("--guidance-interval", first, 0, num_timesteps - 1),
        ("--guidance-interval", last, first, num_timesteps - 1),
        # Also where the order has no blocks.
        ("--block-size", _or(arguments.block_size, 1), 1, config.model.grid),
        *(("--ar-sizes", size, 1, num_tokens) for size in given_sizes or ()),
    ):
        check_range(name, value, low, high)
    check_guidance(arguments.guidance)
    try:
        ar_step_sizes = choose_sizes(num_tokens, num_ar_steps, given_sizes or arguments.ar_sizes)
    except ValueError as error:
        raise UserError(f"--ar-sizes: {error}") from error
    token_order = arguments.order or config.order.token_order
    if token_order != "random":
        try:
            fixed_order(config.model.grid, token_order, _or(arguments.block_size, config.order.block_size))
        except ValueError as error:
            raise UserError(f"--block-size: {error}") from error
    return GenerationSettings(
        ar_step_sizes=tuple(ar_step_sizes),
        num_denoising_steps=num_denoising_steps,
        guidance=Guidance(arguments.guidance, arguments.guidance_schedule, first, last),
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        solver=arguments.solver,
        spacing=_or(arguments.spacing, usual_spacing),
        token_order=arguments.order,
        block_size=arguments.block_size,
    )


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _sizes(text: str) -> list[int]:
    try:
        return [int(size) for size in text.split(",")]
    except ValueError as error:
        raise UserError(f"--ar-sizes: expected {' or '.join(_SIZES)}, or sizes such as 1,3,12, got {text!r}") from error
