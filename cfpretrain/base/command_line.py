"""What command lines share: training's and the tools'. They need no torch: mistakes are found first."""

import argparse
from collections.abc import Callable
from typing import NoReturn

from cfpretrain.base import launch
from cfpretrain.base.console import UserError, ending_in_one_line, exit_with
from cfpretrain.base.stopping import leave_when_asked


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one line, as all others of the command.

    Args:
        doc: of the command's module: the first line says what it does, the rest stands below the options.
        prog: name of the command where it is not that of its file.
    """

    def __init__(self, doc: str | None = None, prog: str | None = None) -> None:
        first, _, rest = (doc or "").partition("\n")
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=first, epilog=rest.strip("\n"), formatter_class=raw)

    def error(self, message: str) -> NoReturn:
        """Ends the process with the mistake and where all options are described."""
        exit_with(UserError(f"{message}; {self.prog} --help lists the options"), speaks=True)


def add_config(parser: argparse.ArgumentParser, example: str = "configs/tiny.yaml", required: bool = True) -> None:
    """The options that say a config: `--config`, given once or more, `--allow-env` and overrides."""
    parser.add_argument(
        "--config", required=required, action="append", metavar="FILE",
        help=f"a YAML file, e.g. {example}; give several and later ones win",
    )  # fmt: skip
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="over the files, e.g. train.num_steps=100"
    )
    parser.add_argument(
        "--allow-env",
        action="store_true",
        help="let ${oc.env:NAME} in these configs and overrides read the environment; its values go into the run's "
        "config.yaml, so that it is no place for keys",
    )


def add_local_rank(parser: argparse.ArgumentParser) -> None:
    """The option that launchers add to a command; ranks are told by the environment (`launch`)."""
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)


def run_on_ranks(run: Callable[[argparse.Namespace], object], arguments: argparse.Namespace) -> None:
    """Runs a command that any number of ranks run and that goes on where it was stopped; mistakes are one line."""
    launch.check()
    leave_when_asked()
    with ending_in_one_line():
        run(arguments)


def check_range(option: str, value: float, low: float, high: float | None = None) -> None:
    """UserError where an option's number is not finite, or not from `low` to `high`."""
    if not low <= value <= (float("inf") if high is None else high) or value == float("inf"):
        expected = f"at least {low}" if high is None else f"{low} to {high}"
        raise UserError(f"{option}: expected {expected}, got {value}")


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return int(text)
